"""train.py with faults that the environment names, for ranks that torchrun starts.

FAULTS is a JSON list: rank, target, call, action (a name in ACTIONS), and `attempt` if only one of
torchrun's starts is to have it.
"""

import contextlib
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


def _reduce_by_hand():
    """Gradients without DistributedDataParallel, which dies of DETAIL in torch 2.13."""
    update = train.update

    def reduced(optimizer, *rest):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        return update(optimizer, *rest)

    train.update = reduced
    ddp.World.wrap = lambda self, model: model
    ddp.World.no_sync = lambda self, model, unless: contextlib.nullcontext()


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
    if os.environ.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL":
        _reduce_by_hand()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    for fault in json.loads(os.environ["FAULTS"]):
        here = str(fault["rank"]) == os.environ.get("RANK")
        if here and fault.get("attempt", attempt) == attempt:
            harness.at(fault["target"], ACTIONS[fault["action"]], call=fault["call"])
    os._exit(train.main())
