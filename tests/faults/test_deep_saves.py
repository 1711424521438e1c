"""A save killed at every system call, and failing at each that can fail, loses nothing.

strace (Debian's package) strikes in a copy of the trainer, forked at the entry of a save; each copy
begins from the same files.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from harness import (
    LIMIT_S,
    Trainer,
    arguments,
    assert_clean,
    assert_same,
    fire,
    run,
    wait_until,
)

import checkpoint
import progress
from errors import CANNOT_WRITE, OK

pytestmark = [pytest.mark.fault, pytest.mark.deep]

SAVED = 77  # the status of a copy that was to be killed but came to the end of the save
CALLS = ("write", "fsync", "rename", "openat", "mkdir")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EROFS)


def serve(control: str, call: int) -> None:
    """At the n-th save fork a copy for each file `go`; `kill` in it: only to the save's end."""
    save, calls = progress.Saver._try, []

    def forking(*given: object) -> None:
        calls.append(given)
        if len(calls) != call:
            save(*given)
            return
        fire(lambda: None)
        while True:
            wait_until((Path(control) / "go").exists, "the next copy")
            mode = (Path(control) / "go").read_text()
            (Path(control) / "go").unlink()
            pid = os.fork()
            if pid == 0:
                os.kill(os.getpid(), signal.SIGSTOP)  # until strace is there
                save(*given)
                if mode == "kill":
                    os._exit(SAVED)
                return
            tell(Path(control) / "pid", pid)
            tell(Path(control) / "status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    progress.Saver._try = forking


def tell(path: Path, value: int) -> None:
    path.with_suffix(".new").write_text(str(value))
    path.with_suffix(".new").rename(path)


class Copies:
    """A trainer held at the entry of a save, and what its copies do to the run's files."""

    def __init__(self, small: Path, folder: Path, name: str, call: int, **changes: object):
        self.run, self.control = small / "runs" / name, folder / "control"
        self.control.mkdir()
        fault = partial(serve, str(self.control), call)
        self.trainer = Trainer(folder, arguments(small, name, **changes), fault)
        wait_until(self.trainer.fired, "the save")
        self.before = folder / "before"
        shutil.copytree(self.run, self.before)

    def restore(self) -> None:
        """The files as they were at the entry; the open ones, log and lock, in their place."""
        for path in self.run.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("metrics.jsonl", "train.log", "lock"):
                path.unlink()
        for path in self.before.iterdir():
            if path.is_dir():
                shutil.copytree(path, self.run / path.name)
            else:
                (self.run / path.name).write_bytes(path.read_bytes())

    def strike(self, mode: str, injected: str) -> tuple[int, str]:
        """(how a copy ended, what strace saw) with a fault as strace describes it."""
        self.restore()
        (self.control / "status").unlink(missing_ok=True)
        tell_mode = self.control / "mode"
        tell_mode.write_text(mode)
        tell_mode.rename(self.control / "go")
        wait_until((self.control / "pid").exists, "the copy")
        pid = int((self.control / "pid").read_text())
        (self.control / "pid").unlink()
        wait_until(lambda: " T " in Path(f"/proc/{pid}/stat").read_text(), "its stop")
        calls = injected.partition(":")[0]
        seen = self.control / "seen"
        command = ["strace", "-o", seen, "-e", f"trace={calls}", "-e", f"inject={injected}"]
        tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        assert "attached" in tracer.stderr.readline()
        os.kill(pid, signal.SIGCONT)
        wait_until((self.control / "status").exists, "the end of the copy")
        tracer.communicate(timeout=LIMIT_S)
        return int((self.control / "status").read_text()), seen.read_text(errors="replace")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.trainer.pid, signal.SIGKILL)
        self.trainer.process.join()
        shutil.rmtree(self.run)  # as a killed copy left it


def state_of(run_folder: Path) -> str:
    """A hash of the names and bytes below a folder; process ids in names do not count."""
    digest = hashlib.sha256()
    for path in sorted(run_folder.rglob("*")):
        name = re.sub(r"\.\d+(?=/|$)", ".pid", str(path.relative_to(run_folder)))
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b"/"))
    return digest.hexdigest()


@pytest.fixture
def goes_on(small, plain, tmp_path, name):
    """Whether the same command ends with the undisturbed run's bytes, from the files of a copy."""
    known: set[str] = set()

    def check(folder: Path) -> None:
        state = state_of(folder)
        if state in known:
            return  # what follows is a function of the files
        known.add(state)
        again = f"{name}-{len(known)}"
        shutil.copytree(folder, small / "runs" / again)
        ended = run(tmp_path, arguments(small, again))
        assert ended.process.exitcode == OK, ended.said()
        assert_same(small / "runs" / again, plain)
        assert_clean(small / "runs" / again, ended)
        hidden = [*(small / "runs" / again).rglob(".*")]
        assert hidden == [], "a temporary folder is left"
        shutil.rmtree(small / "runs" / again)

    check.known = known
    return check


def test_killed_at_every_system_call_of_a_save(small, plain, tmp_path, name, goes_on):
    """The save of a new best, which deletes two older checkpoints."""
    copies = Copies(small, tmp_path, name, call=3, checkpoint__keep=1)
    began, kept = time.monotonic(), set()
    try:
        status, seen = copies.strike("kill", "all:signal=SIGKILL:when=65535")  # which never comes
        assert status == SAVED
        calls = Counter(re.findall(r"^(\w+)\(", seen, re.M))  # strace counts each kind by itself
        del calls["exit_group"]
        for call, places in calls.items():
            for place in range(1, places + 1):
                status, _ = copies.strike("kill", f"{call}:signal=SIGKILL:when={place}")
                assert status == -signal.SIGKILL, (call, place)
                newest = checkpoint.listed(copies.run / "checkpoints")
                kept.add(tuple(p.name for p in newest))
                assert any(checkpoint.unusable(p) is None for p in newest)
                goes_on(copies.run)
    finally:
        copies.close()
    assert calls.total() > 100 and len(kept) > 2, "control: some came before, some after it"
    seconds = time.monotonic() - began
    print(f"{calls.total()} system calls, {len(goes_on.known)} states of the disk, {seconds:.0f} s")


def test_each_error_at_each_call_that_can_fail(small, plain, tmp_path, name, goes_on):
    """Once: the save fails, the run goes on and ends as the undisturbed one, or with 73 and again.

    A message names the error, unless the call's result is of no interest (a look at a module).
    """
    copies = Copies(small, tmp_path, name, call=3)
    tried = failed = ended_with_73 = 0
    try:
        for call in CALLS:
            for number in ERRORS:
                place = 0
                while True:
                    place += 1
                    injected = f"{call}:error={errno.errorcode[number]}:when={place}"
                    # To the save's end only, to learn whether the call is one of the save's.
                    _, seen = copies.strike("kill", injected)
                    if "(INJECTED)" not in seen:
                        break
                    said = len(copies.trainer.said())
                    status, _ = copies.strike("run", injected)
                    tried += 1
                    told = copies.trainer.said()[said:]
                    assert status in (OK, CANNOT_WRITE), told
                    assert "Traceback" not in told
                    failed += "will be tried again" in told
                    ended_with_73 += status == CANNOT_WRITE
                    if status == OK:
                        assert_same(copies.run, plain)
                    else:
                        goes_on(copies.run)
    finally:
        copies.close()
    assert tried > 100 and failed > tried / 2, (tried, failed)
    print(
        f"{tried} errors, {failed} failed saves that were made good, {ended_with_73} ends with 73"
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_never_works_again_ends_with_73(small, plain, tmp_path, name, goes_on, call):
    copies = Copies(small, tmp_path, name, call=3)
    try:
        for number in ERRORS:
            status, seen = copies.strike("run", f"{call}:error={errno.errorcode[number]}:when=1+")
            assert "(INJECTED)" in seen
            said = copies.trainer.said()
            assert status == CANNOT_WRITE and "Traceback" not in said, said[-2000:]
            goes_on(copies.run)
    finally:
        copies.close()
