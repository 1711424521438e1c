"""Trainers in processes of their own, faults inside them, and what must be left afterwards.

A trainer is forked from a process that has imported the program, which costs a tenth of starting
one; what is to be tried on a command of its own is started as the user starts it.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import tiny
import torch

import runlog
import train

# What a trainer imports, lazily too; pytest, which a child imports as its parent's `__main__`.
PRELOADED = [
    *("pytest", "harness", "train", "sklearn.metrics", "sklearn.linear_model"),
    *("sklearn.feature_extraction.text", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.xlm_roberta.modeling_xlm_roberta", "transformers.conversion_mapping"),
]
LIMIT_S = 120  # a trainer that takes longer hangs: the test fails
ROOT = Path(train.__file__).resolve().parent


# --- faults: each is called in the trainer's process before it starts -----------------------------


def at(target: str, action: Callable[[], None], *, call: int = 1, after: bool = False) -> None:
    """Do `action` at the n-th call of `module:function`, before or after it; says that it did."""
    module, _, name = target.partition(":")
    owner = import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def faulty(*arguments: object, **options: object) -> object:
        calls.append(name)
        strikes = len(calls) == call
        if strikes and not after:
            fire(action)
        result = original(*arguments, **options)
        if strikes and after:
            fire(action)
        return result

    setattr(owner, name, faulty)


def fire(action: Callable[[], None]) -> None:
    """Leave the proof that a fault struck, then let it."""
    Path(os.environ["FAULT_FIRED"]).write_text("fired")
    action()


def send(number: int) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), number)


def fail(error: BaseException) -> None:
    """Raise it."""
    raise error


KILL = partial(send, signal.SIGKILL)


# --- trainers -------------------------------------------------------------------------------------


class Trainer:
    """train.py in a process and session of its own, forked; `rank` of `size` if there are many."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        fault: Callable[[], None] | None = None,
        *,
        environ: dict[str, str] | None = None,
    ):
        number = sum(1 for _ in folder.glob("trainer-*.log"))
        self.output = folder / f"trainer-{number}.log"
        self.output.touch()
        self.proof = self.output.with_suffix(".fired")
        environ = {"FAULT_FIRED": str(self.proof), **(environ or {})}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(
            target=_train, args=(arguments, fault, str(self.output), environ)
        )
        self.process.start()
        self.pid = self.process.pid

    def wait(self) -> int:
        """The exit code, negative for a signal; nothing of its session is left but by torchrun."""
        self.process.join(LIMIT_S)
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"it hangs; it said:\n{self.said()}")
        return self.process.exitcode

    def said(self) -> str:
        """All its output."""
        return self.output.read_text(errors="replace")

    def fired(self) -> bool:
        """Whether its fault struck."""
        return self.proof.exists()


def _train(
    arguments: list[str], fault: Callable[[], None] | None, output: str, environ: dict[str, str]
) -> None:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (open(s, "w", buffering=1, closefd=False) for s in (1, 2))  # noqa: SIM115
    os.environ |= environ
    torch.set_num_threads(1)
    if fault:
        fault()
    code = train.main(["--config", os.devnull, *arguments])
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)  # as the interpreter would, without waiting for what the test's modules hold


def arguments(folder: Path, name: str, **changes: object) -> list[str]:
    """A run of 10 steps, 5 an epoch; best at 2, 4, 8 and 10, saved at 3, 6 and 9 as well."""
    usual = {"evaluation__metric": "loss", "train__class_weights": "none", "optimizer__lr": 8e-3}
    usual |= {"evaluation__every": 2, "evaluation__patience": "", "run__name": name}
    usual |= {"checkpoint__every": 3, "checkpoint__keep": "all"}
    usual |= {"data__slice_columns": "[]"}  # most of the time would go into their scores
    return tiny.settings(folder, **(usual | changes))


def run(
    folder: Path, arguments: list[str], fault: Callable[[], None] | None = None, **options: object
) -> Trainer:
    """A trainer that has ended, its fault having struck; `process.exitcode` is its code."""
    trainer = Trainer(folder, arguments, fault, **options)
    trainer.wait()
    assert fault is None or trainer.fired(), f"the fault never struck:\n{trainer.said()}"
    return trainer


def ranks(
    folder: Path,
    arguments: list[str],
    faults: dict[int, Callable[[], None]] | None = None,
    *,
    size: int = 2,
    **environ: str,
) -> list[Trainer]:
    """The trainers of `size` ranks, started; each is told its exit code as the script does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    number = sum(1 for _ in folder.glob("code-*"))
    (folder / f"code-{number}").mkdir()
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"EXIT_CODE_FILE": str(folder / f"code-{number}" / "exit_code"), **environ}
    return [
        Trainer(
            folder,
            arguments,
            (faults or {}).get(rank),
            environ=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]


def code_of(started: list[Trainer]) -> int:
    """The exit code that the script would end with: the first rank's to end, else 0."""
    for trainer in started:
        trainer.wait()
    folder = sorted(started[0].output.parent.glob("code-*"))[-1]
    return next((int(os.readlink(path)) for path in folder.iterdir()), 0)


# --- what must be left ----------------------------------------------------------------------------


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return once `condition()` holds; the test fails if that takes LIMIT_S."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}")
        time.sleep(0.02)


def processes(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
            found += [int(stat.parent.name)] * (int(of) == session and state != "Z")
    return found


def assert_clean(folder: Path, *trainers: Trainer) -> None:
    """No process and no temporary file or folder is left of these trainers."""
    for trainer in trainers:
        wait_until(lambda t=trainer: not processes(t.pid), "the end of all processes")
    hidden = [p for top in ("runs", "cache") for p in (folder / top).rglob(".*")]
    assert hidden == []


def assert_goes_on(folder: Path, name: str, arguments: list[str], plain: Path) -> None:
    """The same command again ends with the bytes of the undisturbed run `plain`."""
    again = run(folder, arguments)
    assert again.process.exitcode == 0, again.said()
    assert_same(folder / "runs" / name, plain)
    assert_clean(folder, again)


def assert_same(ours: Path, plain: Path) -> None:
    """Weights, AdamW's state, metrics and predictions are those of another run, byte for byte."""
    ours, theirs = tiny.outcome(ours), tiny.outcome(plain)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == value, name


def warnings(run_folder: Path) -> list[str]:
    """The codes of the warnings in a run's log."""
    events = runlog.lines(run_folder / "metrics.jsonl")
    return [e["code"] for e in events if e["event"] == "warning"]
