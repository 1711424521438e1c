"""The monitor shows what the log holds, whatever the log holds, and leaves the run as it was."""

import hashlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import monitor
import runlog

PROGRAM = Path(monitor.__file__).resolve()
STEP = {"event": "step", "loss": 0.5, "lr": 1e-4, "step_s": 2.0, "tokens_per_s": 1000}
START = {"event": "start", "from_scratch": True, "steps": {"total_steps": 40}}
START |= {"baselines": {"majority": {"f1_macro": 0.4118}, "tfidf": {"f1_macro": 0.6116}}}
EVAL = {"event": "eval", "split": "validation", "f1_macro": 0.7321, "best": True}
AT_10 = [STEP | {"step": 10}, EVAL | {"step": 10}]
AT_20 = [STEP | {"step": 20, "loss": 0.25}, EVAL | {"step": 20, "f1_macro": 0.7123, "best": False}]
EVENTS = [START, *AT_10, *AT_20]
RESUME = {"event": "resume", "step": 10}
VALUES = (None, "x\x1b[31m\n", [], {}, [3], True, 10**400, 1e308, -1, 1e999)


def as_lines(*events: dict) -> bytes:
    return b"".join(json.dumps({"time": 1.0} | e).encode() + b"\n" for e in events)


def make_run(root: Path, log: bytes, name: str = "some", **state: object) -> Path:
    run = root / "runs" / name
    run.mkdir(parents=True)
    (run / monitor.LOG).write_bytes(log)
    (run / "run_state.json").write_text(json.dumps({"host": socket.gethostname()} | state))
    return run


def hashes(run: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in run.iterdir()}


def once(run: Path, capsys) -> str:
    assert monitor.main([str(run), "--once"]) == 0
    return capsys.readouterr().out


def test_once_shows_the_last_loss_the_best_scores_and_the_baselines(tmp_path, capsys):
    run = make_run(tmp_path, as_lines(*EVENTS), status="running", pid=os.getpid())
    shown = once(run, capsys)
    for part in ("loss 0.25", "0.7321", "0.7123", "0.4118", "0.6116", "from scratch", "20/40"):
        assert part in shown
    assert "loss 0.5" not in shown and "00:40 left" in shown and "status    running" in shown


def test_a_running_trainer_whose_process_is_gone_is_dead_on_this_host_only(tmp_path, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = make_run(tmp_path, as_lines(*EVENTS), status="running", pid=gone.pid)
    assert "status    dead" in once(run, capsys)
    other = make_run(tmp_path, b"", "b", status="running", pid=gone.pid, host="far")
    assert "status    running on far" in once(other, capsys)


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_following_in_pieces_gives_what_reading_the_whole_log_gives(tmp_path, size):
    junk = b'{"event": "step", "st\n\xff\xfe\n[1]\n{"event": 3}\n\n' + b"[" * 9999 + b"\n"
    data = as_lines(*EVENTS) + junk + as_lines(RESUME, STEP | {"step": 15}) + b'{"event": "st'
    log, new = monitor.Follower(tmp_path), []
    assert log.poll() == []  # there is no log yet
    with open(log.path, "ab", buffering=0) as file:
        for i in range(0, len(data), size):
            file.write(data[i : i + size])
            new += log.poll()
    assert log.poll() == [] and len(new) == 7
    assert log.events == runlog.read(log.path) != list(runlog.lines(log.path))
    assert log.last("step")["step"] == 15 and log.last("eval")["step"] == 10


@pytest.mark.parametrize("value", VALUES)
def test_no_value_breaks_it_or_reaches_the_terminal_raw(tmp_path, capsys, value):
    def spoiled(record: dict) -> dict:
        return {k: spoiled(v) if isinstance(v, dict) else value for k, v in record.items()}

    gpus = [value, {"uuid": value, "name": value, "power_w": value}]
    events = [spoiled(e) | {"event": e["event"], "split": "validation"} for e in [*EVENTS, RESUME]]
    events += [{"event": "hardware", "gpus": gpus, "load": value}, {"event": "\x1b]0;", "a": value}]
    events += [{"event": "start", "steps": value, "config": value, "baselines": value}]
    run = make_run(tmp_path, as_lines(*events), status=value, reason=value, pid=value, time=value)
    events = monitor.Follower(run).poll()
    shown = once(run, capsys) + "\n".join(map(monitor.plain_line, events))
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert ("loss n/a" in shown) == (value != -1)
    assert ("\\x1b[31m\\n" in shown) == isinstance(value, str)  # its text was there, and is escaped


def test_no_run_is_66_and_of_several_the_newest_is_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert monitor.main(["--once"]) == monitor.main(["nowhere", "--once"]) == 66
    assert capsys.readouterr().err.count("\n") == 2
    assert monitor.main(["--twice"]) == monitor.main(["a", "b"]) == 64
    capsys.readouterr()
    for name, age in (("old", 100), ("new", 200), ("older", 50)):
        os.utime(make_run(tmp_path, b"", name) / monitor.LOG, (age, age))
    assert monitor.main(["--once"]) == 0
    assert "run       new\n" in capsys.readouterr().out


def test_the_run_is_left_as_it_was_and_torch_is_not_imported(tmp_path):
    run = make_run(tmp_path, as_lines(*EVENTS) + b'{"torn', status="completed")
    before = hashes(run)
    code = f"import monitor, sys; monitor.main(['{run}']); print(*sys.modules)"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=PROGRAM.parent)
    assert "0.7321" in shown and {"torch", "numpy"}.isdisjoint(shown.split())
    assert "tqdm" in shown.split() and hashes(run) == before
    (run / "cache").touch()
    assert hashes(run) != before


def test_ctrl_c_restores_the_terminal_and_is_no_failure(tmp_path):
    run = make_run(tmp_path, as_lines(*EVENTS), status="running", pid=os.getpid())
    screen, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, PROGRAM, run], stdout=terminal, env=environment)
    shown = b""
    while b"machine" not in shown:
        shown += os.read(screen, 4096)
    assert shown.startswith(b"\x1b[?1049h\x1b[?25l") and b"\x1b[?25h" not in shown
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert os.read(screen, 4096).partition(b"\x1b[?25h\x1b[?1049l")[2]  # the block stays to be read
