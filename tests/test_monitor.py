"""The monitor shows a run as it is, wherever it stands, and leaves it as it was."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from logs import EVENTS, START, as_lines, contents, evaluation, make_run, step
from test_history import JUNK, LONG, UMLAUT

import monitor
import runlog
from errors import printable

LIMIT_S = 60  # a monitor that takes longer hangs: the test fails
PROGRAM = Path(monitor.__file__).resolve()
HEAVY = {"torch", "numpy", "sklearn", "matplotlib", "transformers", "yaml"}


def once(run: Path, capsys, code: int = 0) -> str:
    assert monitor.main([str(run), "--once"]) == code
    return capsys.readouterr().out


def test_once_tells_and_leaves_with_0_or_1_or_66(tmp_path, capsys):
    assert "0.7321" in once(make_run(tmp_path, as_lines(*EVENTS)), capsys)
    bad = make_run(tmp_path, as_lines(*EVENTS, step(25, lr=0.5)), "bad")
    assert "off its schedule" in once(bad, capsys, 1)
    assert monitor.main([str(tmp_path / "nowhere"), "--once"]) == 66
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "nowhere/metrics.jsonl" in told


def test_a_run_is_found_by_its_name_below_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, as_lines(*EVENTS), "one")
    assert "0.7321" in once("one", capsys)
    assert monitor.main(["--compare", "one", "runs/one"]) == 64, "named twice"
    assert "is named twice" in capsys.readouterr().err
    shutil.copytree(make_run(tmp_path, as_lines(START), "other"), tmp_path / "one")
    assert "0.7321" not in once("one", capsys), "control: the run that is there is meant"
    assert monitor.main(["../one", "--once"]) == 66, "runs/../one is not below runs/"
    capsys.readouterr()
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "one").mkdir()
    assert "0.7321" in once("one", capsys), "but no other folder"
    for name, places in (
        ("a" * 300, ("a" * 300, f"runs/{'a' * 300}")),
        ("../one", ("../one",)),
        ("none", ("none", "runs/none")),
    ):
        assert monitor.main([name, "--once"]) == 66
        told = " or ".join(printable(f"{place}/metrics.jsonl", 200) for place in places)
        assert capsys.readouterr().err == f"no run: there is no {told}\n"


def test_a_log_that_cannot_be_read_is_66(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path, as_lines(START))

    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for module in (monitor, runlog):
        monkeypatch.setattr(module, "open_regular", denied)
    for words in (["--once"], ["--export", "csv"]):
        assert monitor.main([str(run), *words]) == 66
        assert capsys.readouterr().err.endswith("metrics.jsonl: Permission denied\n")


def test_of_several_the_newest_is_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert monitor.main(["--once"]) == 66
    for name, age in (("old", 100), ("new", 200), ("older", 50)):
        run = make_run(tmp_path, as_lines(*EVENTS), name)
        os.utime(run / monitor.LOG, (age, age))
    (tmp_path / "runs" / "no-run").mkdir()
    assert "Run new\n" in once(tmp_path / "runs" / "new", capsys)
    assert monitor.main(["--once"]) == 0 and "Run new\n" in capsys.readouterr().out


WRONG = (["--twice"], ["a", "b"], ["--once", "--list"], ["a", "--compare", "b"], ["--out", "x"])


@pytest.mark.parametrize("words", [*WRONG, ["--export", "xml"], ["--compare"]])
def test_a_command_line_that_cannot_be_meant_is_64(words, capsys):
    assert monitor.main(words) == 64
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "needed"), [("--report", "matplotlib"), ("--list", "yaml"), ("--compare", "numpy")]
)
def test_what_only_a_table_or_the_report_needs_is_named(tmp_path, words, needed):
    run = make_run(tmp_path, as_lines(*EVENTS), status="completed")
    code = f"import sys; sys.modules['{needed}'] = None; import monitor; "
    code += (
        f"sys.exit(monitor.main(['{words}', '{run}', '{run}'][: 3 - ('{words}' != '--compare')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=PROGRAM.parent)
    told = done.stderr.decode()
    assert done.returncode == 69 and needed in told and told.count("\n") == 1
    assert monitor.main([str(run), "--once"]) == 0


def test_the_live_view_needs_nothing_heavy_and_changes_nothing(tmp_path):
    run = make_run(tmp_path, as_lines(*EVENTS) + b'{"torn', status="completed")
    before = contents(run)
    code = f"import monitor, terminal, sys; monitor.main(['{run}']); print(*sys.modules)"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=PROGRAM.parent)
    modules = set(shown.splitlines()[-1].split())
    assert "0.7321" in shown and "tqdm" in modules and not HEAVY & modules
    assert contents(run) == before
    (run / "cache").touch()
    assert contents(run) != before


def test_hostile_lines_cost_no_good_one_and_send_nothing_to_the_terminal(tmp_path):
    bidi = {"event": "warning", "code": "\u202eevil\x9b", "message": "\x1b]0;x\x07<b>&\u2066"}
    good = as_lines(*EVENTS) + UMLAUT.encode() + as_lines(bidi) + LONG.encode()
    long = as_lines(evaluation(30, 0.654321, best=True, note="\x1b[2J" * 2_000_000))
    run = make_run(tmp_path, JUNK + good + JUNK + long + as_lines(step(35)), status="completed")
    shown = subprocess.run(
        [sys.executable, PROGRAM, run, "--once"], capture_output=True, check=True
    )
    text = shown.stdout.decode()
    assert "Step 35 of 40" in text and "0.6543" in text and not shown.stderr
    assert all(c.isprintable() or c == "\n" for c in text)


class Lines:
    """The monitor with its output in a file, following."""

    def __init__(self, folder: Path, *arguments: object):
        self.path = folder / "shown"
        with open(self.path, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, *arguments], stdout=file, stderr=file, cwd=folder
            )

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, part: str) -> None:
        """Return once it has shown this; the test fails if it never does."""
        deadline = time.monotonic() + LIMIT_S
        while part not in self.text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)


def test_lines_follow_a_log_until_the_run_has_ended(tmp_path):
    shown = Lines(tmp_path, "runs/some")
    shown.wait_for("no run yet: waiting for runs/some/metrics.jsonl")
    run = make_run(tmp_path, as_lines(*EVENTS))
    shown.wait_for("No alarms.")
    with open(run / monitor.LOG, "ab") as log:
        log.write(as_lines(step(25)))
    shown.wait_for("step  step 25")
    with open(run / monitor.LOG, "ab") as log:
        log.write(as_lines(step(30, lr=0.5)))
    shown.wait_for("ALARM: the learning rate is off its schedule")
    end = {"event": "end", "status": "preempted", "reason": "stopped by SIGTERM"}
    with open(run / monitor.LOG, "ab") as log:
        log.write(as_lines(end))
    shown.wait_for("stopped by SIGTERM")
    with open(run / monitor.LOG, "ab") as log:  # and it goes on
        log.write(as_lines(START, {"event": "resume", "step": 20}, step(22)))
    shown.wait_for("step  step 22")
    with open(run / monitor.LOG, "ab") as log:
        log.write(as_lines(step(40), {"event": "end", "status": "completed"}))
    assert shown.process.wait(LIMIT_S) == 0
    assert "step  step 40" in shown.text() and "end  status completed" in shown.text()


def test_a_reader_that_leaves_is_no_error(tmp_path):
    run = make_run(tmp_path, as_lines(*EVENTS), status="completed")
    command = f"'{sys.executable}' '{PROGRAM}' '{run}' --once | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True)
    assert done.returncode == 0 and done.stderr == b""


def test_a_copy_of_a_run_will_do(tmp_path, capsys):
    run = make_run(tmp_path, as_lines(*EVENTS), status="completed", host="elsewhere")
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(run)
    assert "completed on elsewhere" in once(tmp_path / "copy", capsys)


def test_the_runs_gpus_are_looked_at_not_ours(tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    here = {"event": "hardware", "host": socket.gethostname()}
    gpus = [{"uuid": "GPU-2"}, {"uuid": "GPU-0"}]
    for events, expected in (
        (EVENTS, "7"),
        ([*EVENTS, here | {"gpus": gpus}], "GPU-2,GPU-0"),
        ([*EVENTS, here | {"gpus": gpus, "host": "elsewhere"}], "7"),
    ):
        watcher = monitor.Watcher(make_run(tmp_path, as_lines(*events), str(len(str(events)))))
        watcher.look()
        assert watcher._gpus() == expected


def test_sigterm_ends_lines_quietly(tmp_path):
    shown = Lines(tmp_path, make_run(tmp_path, as_lines(*EVENTS)))
    shown.wait_for("No alarms.")
    shown.process.send_signal(signal.SIGTERM)
    assert shown.process.wait(LIMIT_S) == 128 + signal.SIGTERM and "Traceback" not in shown.text()
