"""Ranks under the script and torchrun: a lost one is restarted, none is left behind, none hangs."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import LIMIT_S, ROOT, arguments, assert_same, code_of, ranks, wait_until

import checkpoint
import launch
import runlog
from errors import CRASH, OK, STOPPED

pytestmark = [pytest.mark.fault, pytest.mark.dist]

RANK = Path(__file__).resolve().parent / "rank.py"
LAUNCH = "import sys, launch; launch.TRAIN = sys.argv.pop(1); sys.exit(launch.main(sys.argv[1:]))"


class Script:
    """What the script does after the environment: launch.py, here with a fault in a rank."""

    def __init__(self, folder: Path, words: list[str], *faults: dict, **more: str):
        self.output = folder / f"script-{sum(1 for _ in folder.glob('script-*'))}.log"
        self.mark = str(self.output)
        environ = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environ |= {
            "FAULTS": json.dumps(faults),
            **more,
            "MARK": self.mark,
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        environ |= {"FAULT_FIRED": str(self.output.with_suffix(".fired"))}
        empty = folder / "defaults.yaml"
        empty.touch()
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(RANK), str(empty), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=folder,
            )

    def wait(self) -> int:
        """The exit code; afterwards none of its processes is left."""
        try:
            code = self.process.wait(LIMIT_S)
            wait_until(lambda: not self.processes(), "the end of all its processes")
        except (subprocess.TimeoutExpired, AssertionError):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"it hangs; it said:\n{self.said()}") from None
        return code

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def fired(self) -> bool:
        return self.output.with_suffix(".fired").exists()

    def processes(self) -> list[int]:
        """All that it has started, whatever their session or parent."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                found += [int(environ.parent.name)] * (self.mark.encode() in environ.read_bytes())
        return found

    def torchrun(self) -> int:
        """Its process, once both ranks have begun to train."""
        children = launch.children(self.process.pid)
        return next(p for p in children if len(launch.children(p)) == 2)


def steps(log: Path) -> list[dict]:
    return [e for e in runlog.read(log) if e["event"] == "step"]


def wait_for_step(log: Path, step: int, script: Script) -> None:
    def is_there() -> bool:
        assert script.process.poll() is None, script.said()
        return log.exists() and any(e["step"] >= step for e in steps(log))

    wait_until(is_there, f"step {step}")


def test_a_killed_rank_is_restarted_from_the_newest_checkpoint(small, plain_two, tmp_path, name):
    fault = {"rank": 1, "target": "train:backward", "call": 6, "action": "kill", "attempt": 0}
    script = Script(tmp_path, arguments(small, name), fault)
    assert script.wait() == OK and script.fired(), script.said()
    assert "going on after step 4 of 10" in script.said()
    assert_same(small / "runs" / name, plain_two)
    log = [*runlog.lines(small / "runs" / name / "metrics.jsonl")]
    resumed = next(i for i, e in enumerate(log) if e["event"] == "resume")
    lost = [e["time"] for e in log[:resumed] if e["event"] == "step"][-1]
    first = next(e["time"] for e in log[resumed:] if e["event"] == "step")
    print(f"from the last step before the kill to the next one: {first - lost:.1f} s")


def test_a_crash_that_repeats_without_progress_stops_early(small, tmp_path, name):
    fault = {"rank": 1, "target": "train:backward", "call": 2, "action": "raise"}
    script = Script(tmp_path, arguments(small, name), fault)
    assert script.wait() == CRASH, script.said()
    assert script.said().count("ValueError: a planted fault") == 2
    assert "2 starts crashed without a checkpoint beyond step 0" in script.said()
    restarts = re.findall(r"resumed|going on after", script.said())
    assert restarts == [] and launch.Plan.restarts == 3, "there were restarts left"


def test_a_signal_to_torchrun_itself_ends_in_a_checkpoint(small, plain_two, tmp_path, name):
    slow = {"rank": 1, "target": "train:backward", "call": 1, "action": "slow"}
    script = Script(tmp_path, arguments(small, name), slow)
    log = small / "runs" / name / "metrics.jsonl"
    wait_for_step(log, 2, script)
    os.kill(script.torchrun(), signal.SIGTERM)
    assert script.wait() == STOPPED, script.said()
    newest = checkpoint.listed(log.parent / "checkpoints")[-1]
    assert newest.name == f"step-{steps(log)[-1]['step']:08d}"
    again = Script(tmp_path, arguments(small, name))
    assert again.wait() == OK, again.said()
    assert_same(log.parent, plain_two)


@pytest.mark.deep
@pytest.mark.parametrize("whom", ["torchrun", "launcher"])
def test_ranks_that_lose_their_launcher_save_and_end(small, plain_two, tmp_path, name, whom):
    slow = {"rank": 1, "target": "train:backward", "call": 1, "action": "slow"}
    script = Script(tmp_path, arguments(small, name), slow)
    log = small / "runs" / name / "metrics.jsonl"
    wait_for_step(log, 2, script)
    os.kill(script.torchrun() if whom == "torchrun" else script.process.pid, signal.SIGKILL)
    assert script.wait() in (CRASH, -signal.SIGKILL, STOPPED), script.said()
    assert "stopped by the end of its launcher after step" in script.said()
    newest = checkpoint.listed(log.parent / "checkpoints")[-1]
    assert newest.name == f"step-{steps(log)[-1]['step']:08d}"
    again = Script(tmp_path, arguments(small, name))
    assert again.wait() == OK, again.said()
    assert_same(log.parent, plain_two)


@pytest.mark.deep
def test_a_stopped_rank_is_named_when_the_time_is_over(small, plain_two, tmp_path, name):
    fault = {"rank": 1, "target": "train:backward", "call": 6, "action": "stop", "attempt": 0}
    command = arguments(small, name, run__timeout_s=5)
    script = Script(tmp_path, command, fault)
    wait_until(script.fired, "the fault")
    wait_until(lambda: "no sign of life from rank 1 (process " in script.said(), "the name")
    assert "run.timeout_s=5 s" in script.said()
    for pid in script.processes():  # torchrun waits for it to end by itself, which it cannot
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert script.wait() == OK, script.said()
    assert_same(small / "runs" / name, plain_two)


@pytest.mark.deep
def test_a_rank_that_leaves_early_without_a_word_is_restarted(small, plain_two, tmp_path, name):
    fault = {"rank": 1, "target": "train:backward", "call": 6, "action": "leave", "attempt": 0}
    script = Script(tmp_path, arguments(small, name), fault)
    assert script.wait() == OK and script.fired(), script.said()
    assert_same(small / "runs" / name, plain_two)


@pytest.mark.deep
def test_five_kills_of_random_ranks_in_one_run(small, tmp_path, name):
    """A checkpoint each step, so that each start gets further; 20 steps in six starts."""
    rng = random.Random(4)
    kills = [{"rank": rng.randrange(2), "call": rng.randint(2, 4)} for _ in range(5)]
    faults = [
        {"target": "train:update", "action": "kill", "attempt": i, **kill}
        for i, kill in enumerate(kills)
    ]
    changes = {"train__epochs": 4, "checkpoint__every": 1}
    assert code_of(ranks(tmp_path, arguments(small, f"{name}-plain", **changes))) == OK
    script = Script(tmp_path, arguments(small, name, **changes), *faults, MAX_RESTARTS="5")
    assert script.wait() == OK, script.said()
    assert script.said().count("going on after step") == 5
    assert_same(small / "runs" / name, small / "runs" / f"{name}-plain")
