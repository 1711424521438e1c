"""Each signal at each phase ends with 75 and a checkpoint; the same command then goes on."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from harness import (
    ROOT,
    arguments,
    assert_clean,
    assert_goes_on,
    assert_same,
    at,
    code_of,
    ranks,
    run,
    send,
    wait_until,
)

import checkpoint
import runlog
import signals

pytestmark = pytest.mark.fault

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = {  # where it comes: (target, call), and the step of the checkpoint that must be there
    "tokenising": ("corpus:_write_split", 1, None),
    "loading": ("model:load_model", 1, None),
    "opening the run": ("results:start", 1, None),
    "before the first step": ("train:make_optimizer", 1, 1),
    "forward": ("train:step_loss", 4, 4),
    "evaluation": ("train:evaluate", 2, 4),
    "saving": ("checkpoint:seal", 2, 4),
    "the last save": ("checkpoint:seal", 7, 10),
    "scoring the splits": ("train:evaluate", 6, 10),
}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_at_each_phase(small, plain, tmp_path, name, phase, number):
    target, call, step = PHASES[phase]
    changes = {"data__cache_dir": tmp_path / "cache"} if phase == "tokenising" else {}
    command = arguments(small, name, **changes)
    stopped = run(tmp_path, command, partial(at, target, partial(send, number), call=call))
    assert stopped.process.exitcode == 75, stopped.said()
    assert number.name in stopped.said() and "Traceback" not in stopped.said()
    kept = checkpoint.listed(small / "runs" / name / "checkpoints")
    assert kept[-1:] == ([] if step is None else [checkpoint.folder_of(kept[-1].parent, step)])
    assert_clean(small, stopped)
    assert not [p for p in tmp_path.rglob(".*")], "no temporary folder of the cache is left"
    assert_goes_on(small, name, command, plain)


@pytest.mark.parametrize(("target", "call"), [("train:update", 3), ("train:evaluate", 1)])
@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_with_workers_running(small, plain, tmp_path, name, target, call, to_all):
    """To the process alone, as a scheduler does, and to all of its group, as a terminal does."""
    command = arguments(small, name, data__workers=2)
    action = partial(_to_group, signal.SIGINT) if to_all else partial(send, signal.SIGTERM)
    stopped = run(tmp_path, command, partial(at, target, action, call=call))
    assert stopped.process.exitcode == 75, stopped.said()
    assert_clean(small, stopped)
    assert_goes_on(small, name, command, plain)


def test_a_signal_before_a_worker_has_learnt_to_ignore_it(small, plain, tmp_path, name):
    """As when a terminal interrupts all of a group while the workers are being forked."""
    early = partial(at, "signals:ignore_in_worker", partial(send, signal.SIGTERM))
    ended = run(tmp_path, arguments(small, name, data__workers=2), early)
    assert ended.process.exitcode == 0, ended.said()
    assert_same(small / "runs" / name, plain)


def _to_group(number: int) -> None:
    os.killpg(0, number)


@pytest.mark.parametrize("phase", ["forward", "evaluation", "saving"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_interrupt_ends_at_once_and_the_last_checkpoint_stands(
    small, plain, tmp_path, name, phase, workers
):
    target, call, _ = PHASES[phase]
    command = arguments(small, name, data__workers=workers)
    stopped = run(tmp_path, command, partial(at, target, _interrupt_twice, call=call))
    assert stopped.process.exitcode == 130 and "ended at once" in stopped.said()
    kept = checkpoint.listed(small / "runs" / name / "checkpoints")
    assert [checkpoint.unusable(folder) for folder in kept] == [None] * len(kept)
    assert_goes_on(small, name, command, plain)
    assert_clean(small, stopped)


def _interrupt_twice() -> None:
    send(signal.SIGINT)
    send(signal.SIGINT)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "told", "target", "call"),
    [
        (signal.SIGTERM, (0,), "train:backward", 4),
        (signal.SIGUSR1, (1,), "train:backward", 4),
        (signal.SIGINT, (0, 1), "train:evaluate", 1),
        (signal.SIGTERM, (1,), "prepare:weigh", 1),
        (signal.SIGTERM, (0,), "prepare:load_corpus", 1),
    ],
)
def test_ranks_stop_after_the_same_step(
    small, plain_two, tmp_path, name, number, told, target, call
):
    command = arguments(small, name)
    faults = {rank: partial(at, target, partial(send, number), call=call) for rank in told}
    stopped = ranks(tmp_path, command, faults)
    assert code_of(stopped) == 75, stopped[0].said() + stopped[1].said()
    assert [t.process.exitcode for t in stopped] == [0, 0], "an agreed end is none for torchrun"
    assert all(stopped[rank].fired() for rank in faults)
    again = ranks(tmp_path, command)
    assert code_of(again) == 0, again[0].said()
    assert_same(small / "runs" / name, plain_two)
    assert_clean(small, *stopped, *again)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_in_a_destructor_is_not_lost():
    class Odd:
        def __del__(self):
            stop._note(signal.SIGTERM, None)

    stop, reached = signals.StopRequest(), []
    with pytest.raises(signals.Stopped), stop.at_once():
        odd = Odd()
        del odd
        reached.append("here, as what is raised in a destructor is printed and gone")
    assert reached


def test_a_part_that_ends_at_once_leaves_the_whole_as_it_was():
    stop = signals.StopRequest()
    with pytest.raises(signals.Stopped), stop.at_once():
        with stop.at_once():
            pass
        stop._note(signal.SIGTERM, None)
        pytest.fail("the whole went on")
    stop._note(signal.SIGTERM, None)  # control: outside, it is only noted
    assert stop.is_set(0)


# --- the command itself, as a user starts it ------------------------------------------------------


def start(*words: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def is_held(pid: int, number: int) -> bool:
    """Whether a process keeps a signal waiting, as train.py does from its first line on."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
def test_a_signal_while_the_program_is_still_imported(small, name, number):
    """Python needs 20 ms to the first line of train.py; the imports after it take seconds."""
    words = [ROOT / "train.py", "--config", os.devnull, *arguments(small, name)]
    process = start(sys.executable, *words)
    wait_until(lambda: is_held(process.pid, number), "the first line of train.py")
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == 75, said
    assert number.name in said and "Traceback" not in said


def test_ctrl_c_in_a_terminal_and_the_same_command_again(small, plain, tmp_path, name):
    """Through the script, in a terminal of its own: the bar is there, the checkpoint too."""
    import pty

    words = [ROOT / "run_xlm_roberta_v2.sh", *arguments(small, name, train__epochs=400)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC": "1"}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    shown = b""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(words[0], [*map(str, words)], environ)
    is_told = False
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end was closed
            break
        if not is_told and b"step 4, " in shown:
            os.write(terminal, b"\x03")
            is_told = True
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75, shown.decode()
    assert b"stopped by SIGINT after step" in shown and b"Traceback" not in shown
    log = small / "runs" / name / "metrics.jsonl"
    steps = [e["step"] for e in runlog.read(log) if e["event"] == "step"]
    newest = checkpoint.listed(log.parent / "checkpoints")[-1]
    assert newest.name == f"step-{steps[-1]:08d}" and checkpoint.unusable(newest) is None
