"""train.py with faults that the environment names, for ranks that torchrun starts.

FAULTS is a JSON list: rank, target, call, action (a name in ACTIONS), and `attempt` if only one of
torchrun's starts is to have it.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]

import signals

if __name__ == "__main__":
    signals.hold()

import signal

import harness
import torch.distributed as dist

import ddp
import train


def _skip_a_sum():
    total = ddp.World.sum

    def skipped(self, tensor):
        ddp.World.sum = total
        return tensor

    ddp.World.sum = skipped


def _without_detail(wrap):
    """torch 2.13's DistributedDataParallel dies of DETAIL; the group keeps checking collectives."""

    def quiet(self, model):
        dist.set_debug_level(dist.DebugLevel.OFF)
        return wrap(self, model)

    return quiet


def _slowly(update):
    def slow(*given):
        time.sleep(0.3)
        return update(*given)

    return slow


ACTIONS = {
    "kill": harness.KILL,
    "stop": partial(harness.send, signal.SIGSTOP),
    "raise": partial(harness.fail, ValueError("a planted fault")),
    "leave": partial(os._exit, 0),
    "skip": _skip_a_sum,
    "slow": lambda: setattr(train, "update", _slowly(train.update)),
}


if __name__ == "__main__":
    ddp.World.wrap = _without_detail(ddp.World.wrap)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    for fault in json.loads(os.environ["FAULTS"]):
        here = str(fault["rank"]) == os.environ.get("RANK")
        if here and fault.get("attempt", attempt) == attempt:
            harness.at(fault["target"], ACTIONS[fault["action"]], call=fault["call"])
    os._exit(train.main())
