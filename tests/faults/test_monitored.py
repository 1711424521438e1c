"""The monitor beside a real run: through an interruption and a resume, a kill, a hold, a crash."""

import os
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
from harness import Trainer, arguments, assert_same, at, code_of, fail, run, send, wait_until
from logs import contents
from test_monitor import Lines, once

import history
import monitor
import runlog
from view import View

pytestmark = pytest.mark.fault


def view(folder: Path) -> View:
    """The run as the monitor sees it now."""
    return monitor.Watcher(folder).look()


def test_beside_a_run_that_is_interrupted_and_resumed(small, plain, tmp_path, name):
    folder, command = small / "runs" / name, arguments(small, name)
    shown = Lines(tmp_path, folder)
    shown.wait_for("no run yet")
    fault = partial(at, "train:step_loss", partial(send, signal.SIGTERM), call=5)
    stopped = run(tmp_path, command, fault)
    assert stopped.process.exitcode == 75
    shown.wait_for("preempted")
    assert "tep 5" in shown.text() and shown.process.poll() is None
    assert run(tmp_path, command).process.exitcode == 0
    assert shown.process.wait(30) == 0
    text = shown.text()
    for part in ("resume  step 5", "step  step 10", "end  status completed"):
        assert part in text.partition("preempted")[2], part
    assert text.count("step  step 6") == 1
    assert_same(folder, plain)


def test_a_preempted_run_is_no_alarm_and_a_killed_one_is(small, killed, tmp_path, name, capsys):
    fault = partial(at, "train:step_loss", partial(send, signal.SIGTERM), call=2)
    run(tmp_path, arguments(small, name), fault)
    assert "Status: preempted" in once(small / "runs" / name, capsys)
    before = contents(killed)
    told = once(killed, capsys, 1)
    assert "Status: dead" in told and "goes on from the newest checkpoint" in told
    assert contents(killed) == before


def test_a_crashed_run_is_shown_as_failed(small, tmp_path, name, capsys):
    fault = partial(at, "train:update", partial(fail, RuntimeError("on purpose")), call=4)
    crashed = run(tmp_path, arguments(small, name), fault)
    assert crashed.process.exitcode == 70
    told = once(small / "runs" / name, capsys, 1)
    assert "Status: failed" in told and "exit code 70: on purpose" in told


def test_a_run_that_is_held_is_named_and_one_that_goes_on_is_not(small, tmp_path, name):
    fault = partial(at, "train:update", partial(send, signal.SIGSTOP), call=4)
    trainer, folder = Trainer(tmp_path, arguments(small, name), fault), small / "runs" / name
    try:
        wait_until(lambda: view(folder).state.get("is_stopped"), "the hold")
        now = view(folder)
        (held,) = [a for a in now.alarms if a.code == "stalled"]
        assert now.is_running and str(trainer.pid) in held.advice
    finally:
        os.kill(trainer.pid, signal.SIGCONT)
    assert trainer.wait() == 0
    codes = {a.code for a in view(folder).alarms}
    assert "stalled" not in codes and view(folder).state["status"] == "completed"


def on_another_machine() -> None:
    """This process under another host's name."""
    socket.gethostname = lambda: "node2"


@pytest.mark.dist
def test_every_machine_of_a_run_is_in_its_log(small, tmp_path, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"LOCAL_RANK": "0", "EXIT_CODE_FILE": str(tmp_path / "code-0" / "exit_code")}
    (tmp_path / "code-0").mkdir()
    command = arguments(small, name, log__hardware_s=0.1, train__epochs=6)
    ranks = [
        Trainer(tmp_path, command, fault, environ=shared | {"RANK": str(rank)})
        for rank, fault in enumerate((None, on_another_machine))
    ]
    assert code_of(ranks) == 0, ranks[0].said()
    log = small / "runs" / name / "metrics.jsonl"
    events = [e for e in runlog.lines(log) if e["event"] == "hardware"]
    assert {e["host"] for e in events} == {socket.gethostname(), "node2"}
    assert all("disk_free_gib" not in e for e in events if e["host"] == "node2")
    posted = [e["posted"] for e in events if e["host"] == "node2"]
    assert len(posted) == len(set(posted)), "a record that nobody renewed is not told again"
    assert len(history.History.of(events).hardware) == 2
