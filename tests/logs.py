"""Runs whose log was written by hand, for what reads logs."""

import json
import os
import socket
import time
from pathlib import Path

import history

NOW = time.time()
STEPS = {"total_steps": 40, "warmup_steps": 4, "steps_per_epoch": 10}
CONFIG = {"optimizer.lr": 1e-3, "schedule.min_lr_ratio": 0.0, "evaluation.metric": "f1_macro"}
CONFIG |= {"evaluation.patience": 3, "model.name": "some/model", "run.seed": 42}
BASELINES = {"majority": {"f1_macro": 0.4118, "loss": 0.6, "accuracy": 0.7}}
BASELINES |= {"tfidf": {"f1_macro": 0.6116}}
START = {"event": "start", "from_scratch": True, "steps": STEPS, "config": CONFIG}
START |= {"baselines": BASELINES, "labels": ["no", "yes"], "positive_label": "yes"}
START |= {"data": {"train": 320, "validation": 50}, "parameters": 3_100_000}


def rate(step: int) -> float:
    """The learning rate that is due."""
    from schedule import lr_factor

    return 1e-3 * lr_factor(step - 1, warmup_steps=4, total_steps=40)


def step(number: int, **changes: object) -> dict:
    """A step event."""
    fields = {"step": number, "epoch": number / 10, "loss": 0.7 - 0.01 * number}
    fields |= {"lr": rate(number), "grad_norm": 1.0, "step_s": 2.0, "data_wait_share": 0.01}
    fields |= {"examples_per_s": 16.0, "tokens_per_s": 1000.0, "padding_share": 0.03}
    return {"event": "step", **fields, "peak_memory_gib": 1.5, **changes}


def evaluation(number: int, f1: float, *, best: bool, **changes: object) -> dict:
    """An eval event on validation."""
    fields = {"step": number, "split": "validation", "f1_macro": f1, "best": best, "loss": 0.5}
    return {"event": "eval", **fields, "predicted_share": [0.7, 0.3], **changes}


EVENTS = [START, *(step(n) for n in (5, 10)), evaluation(10, 0.7321, best=True)]
EVENTS += [*(step(n) for n in (15, 20)), evaluation(20, 0.7123, best=False)]


def as_lines(*events: dict, began: float | None = None, every_s: float = 2.0) -> bytes:
    """Events as a log that ended just now, or began at a time."""
    began = time.time() - every_s * len(events) if began is None else began
    # In the order of runlog's lines, by whose beginning step lines are told.
    timed = [{"event": e["event"], "time": began + every_s * i} | e for i, e in enumerate(events)]
    return b"".join(json.dumps(e).encode() + b"\n" for e in timed)


def make_run(root: Path, log: bytes, name: str = "some", **state: object) -> Path:
    """A run's directory; by default it is running here, in this process."""
    run = root / "runs" / name
    run.mkdir(parents=True)
    (run / history.LOG).write_bytes(log)
    told = {"status": "running", "pid": os.getpid(), "host": socket.gethostname()} | state
    (run / "run_state.json").write_text(json.dumps(told))
    return run


def read(run: Path) -> history.History:
    """What a run's log amounts to."""
    follower = history.Follower(run)
    follower.poll()
    return follower.history


def contents(run: Path) -> dict[str, bytes]:
    """Every file below a run, to see that none has changed."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
