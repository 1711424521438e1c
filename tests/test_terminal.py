"""A terminal gets its screen, cursor and echo back however the monitor ends."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from logs import EVENTS, as_lines, make_run

import monitor
from terminal import ENTER, LEAVE

LIMIT_S = 30
PROGRAM = Path(monitor.__file__).resolve()


class Watched:
    """The monitor on a terminal of its own, in front, as a shell starts it."""

    def __init__(self, *arguments: object, cwd: Path = PROGRAM.parent):
        self.screen, self.terminal = pty.openpty()
        self.resize(80, 24)
        self.before = termios.tcgetattr(self.terminal)
        self.shown = b""
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        self.process = subprocess.Popen(
            [sys.executable, *(arguments if "-c" in arguments else (PROGRAM, *arguments))],
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.terminal),
            env=environment | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def read_until(self, mark: str) -> str:
        """What was shown from here to the mark."""
        new = b""
        while mark.encode() not in new:
            ready, _, _ = select.select([self.screen], [], [], LIMIT_S)
            assert ready, f"nothing more came after {new[-500:]!r}"
            new += os.read(self.screen, 1 << 16)
        self.shown += new
        return new.decode(errors="replace")

    def wait(self) -> int:
        code = self.process.wait(LIMIT_S)
        self.shown += self._rest()
        return code

    def _rest(self) -> bytes:
        os.set_blocking(self.screen, False)
        with contextlib.suppress(OSError):
            return os.read(self.screen, 1 << 20)
        return b""

    def is_restored(self) -> bool:
        """Screen and cursor are back, and what is typed is shown."""
        shown = self.shown.decode(errors="replace")
        is_left = shown.count(ENTER) == shown.count(LEAVE) > 0
        return is_left and termios.tcgetattr(self.terminal) == self.before


@pytest.fixture
def watched(tmp_path):
    run = make_run(tmp_path, as_lines(*EVENTS))
    started = Watched(run)
    started.read_until("alarms")
    assert not started.is_restored()
    attributes = termios.tcgetattr(started.terminal)
    assert not attributes[3] & termios.ECHO, "control: what is typed is not shown"
    yield started
    started.process.kill()
    started.process.wait()


ENDS = {"q": 0, "\x03": 0, "\x04": 0}


@pytest.mark.parametrize("key", ENDS)
def test_a_key_ends_it_and_leaves_the_last_picture(watched, key):
    os.write(watched.screen, key.encode())
    assert watched.wait() == ENDS[key] and watched.is_restored()
    after = watched.shown.decode().rpartition(LEAVE)[2]
    assert "0.7321" in after and "\x1b[?" not in after


def test_a_run_is_waited_for_on_a_screen_that_a_key_ends(tmp_path):
    for comes in (False, True):
        started = Watched(tmp_path / "runs" / "run")
        started.read_until("no run yet: waiting for")
        assert not started.is_restored()
        if comes:
            make_run(tmp_path, as_lines(*EVENTS), "run")
            started.read_until("alarms")
        os.write(started.screen, b"q")
        assert started.wait() == 0 and started.is_restored()
        assert ("0.7321" in started.shown.decode().rpartition(LEAVE)[2]) == comes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it(watched, number):
    watched.process.send_signal(number)
    assert watched.wait() == (0 if number == signal.SIGINT else 128 + number)
    assert watched.is_restored() and b"Traceback" not in watched.shown


def test_what_cannot_be_caught_is_put_right_by_the_process_beside(watched):
    watched.process.kill()
    watched.process.wait()
    watched.read_until(LEAVE)
    while not watched.is_restored():  # a moment later
        pass
    assert watched.is_restored()


def test_an_error_is_shown_on_the_usual_screen(tmp_path):
    run = make_run(tmp_path, as_lines(*EVENTS))
    code = f"import monitor, screen; screen.draw = None; monitor.main(['{run}'])"
    started = Watched("-c", code)
    started.read_until("TypeError")
    assert started.wait() == 1 and started.is_restored()
    assert "Traceback" in started.shown.decode().rpartition(LEAVE)[2]


def test_ctrl_z_gives_the_shell_its_screen_and_fg_takes_it_again(watched):
    os.kill(watched.process.pid, signal.SIGTSTP)
    os.waitpid(watched.process.pid, os.WUNTRACED)
    watched.read_until(LEAVE)
    assert watched.is_restored()
    watched.process.send_signal(signal.SIGCONT)
    watched.read_until(ENTER)
    watched.read_until("alarms")
    os.write(watched.screen, b"q")
    assert watched.wait() == 0 and watched.is_restored()


def test_a_new_size_is_drawn_at_once(watched):
    watched.resize(160, 50)
    watched.process.send_signal(signal.SIGWINCH)
    wide = watched.read_until("calibr")  # a column that 80 characters have no room for
    assert "alarms" in wide or "alarms" in watched.read_until("alarms")
    watched.resize(40, 8)
    watched.process.send_signal(signal.SIGWINCH)
    assert "more lines" in watched.read_until("more lines")


def test_the_newest_run_is_shown_and_a_newer_one_once_it_has_ended(tmp_path):
    first = make_run(tmp_path, as_lines(*EVENTS), "first")
    os.utime(first / "metrics.jsonl", (1, 1))
    started = Watched(cwd=tmp_path)
    started.read_until("first")
    make_run(tmp_path, as_lines(*EVENTS), "second", status="completed")
    with open(first / "metrics.jsonl", "ab") as log:
        log.write(as_lines({"event": "end", "status": "completed", "reason": "all steps done"}))
    os.utime(first / "metrics.jsonl", (1, 1))
    assert "second" not in started.read_until("all steps done")
    started.read_until("second")
    os.write(started.screen, b"q")
    assert started.wait() == 0 and started.is_restored()


def test_a_closed_terminal_ends_it(tmp_path):
    started = Watched(make_run(tmp_path, as_lines(*EVENTS)))
    started.read_until("alarms")
    os.close(started.terminal)
    os.close(started.screen)
    assert started.process.wait(LIMIT_S) in (0, 128 + signal.SIGHUP)


def test_it_may_be_started_without_an_input(tmp_path):
    run = make_run(tmp_path, as_lines(*EVENTS))
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, PROGRAM, run],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        env=os.environ | {"TERM": "xterm"},
    ) as process:
        shown = b""
        while b"alarms" not in shown:
            shown += os.read(screen, 1 << 16)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
