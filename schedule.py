"""How many steps a run takes, how each is cut, and the learning rate of each: pure functions."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """The step arithmetic of a run; `rule` says which setting decided.

    A step is one optimizer update from one global batch, whatever the hardware.
    """

    examples: int  # N, training examples
    world_size: int
    global_batch_size: int  # texts of one step on all ranks
    micro_batch_size: int  # texts of one forward and backward on one rank, at most
    accumulation_steps: int  # micro-batches of a full step on one rank, or more by a token cap
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    rule: str

    def __str__(self) -> str:
        return (
            f"{self.examples:,} texts / {self.global_batch_size} a step = {self.steps_per_epoch:,} "
            f"steps an epoch, {self.total_steps:,} in all, {self.warmup_steps:,} of them warm-up; "
            f"a step = {self.world_size} process{'es' * (self.world_size > 1)} x "
            f"{self.accumulation_steps} or more passes of at most {self.micro_batch_size} texts "
            f"({self.rule})"
        )


def plan_steps(
    examples: int,
    *,
    world_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    accumulation_steps: int | None,
    epochs: float,
    max_steps: int | None,
    warmup_ratio: float,
) -> StepPlan:
    """The step arithmetic of a run over `examples` training texts.

    With `accumulation_steps` given it rules: global batch = micro-batch x accumulation x world
    size. Otherwise the global batch rules and accumulation follows from it. The last, shorter
    batch of an epoch is a step of its own.
    """
    if accumulation_steps is not None:
        global_batch_size = micro_batch_size * accumulation_steps * world_size
        rule = "train.accumulation_steps decides, not train.global_batch_size"
    else:
        share = math.ceil(global_batch_size / world_size)  # texts of the fullest rank
        micro_batch_size = min(micro_batch_size, share)
        accumulation_steps = math.ceil(share / micro_batch_size)
        rule = "train.global_batch_size decides"
    steps_per_epoch = math.ceil(examples / global_batch_size)
    total_steps = max_steps or max(1, math.ceil(epochs * steps_per_epoch))
    return StepPlan(
        examples=examples,
        world_size=world_size,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=math.ceil(warmup_ratio * total_steps),
        rule=rule,
    )


def lr_factor(
    step: int, *, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.0
) -> float:
    """Multiplier on each group's peak learning rate at one optimizer step, in [0, 1].

    Linear warm-up, then half a cosine down to `min_lr_ratio` (Loshchilov & Hutter 2017,
    arXiv:1608.03983, without restarts). A pure function of `step`, so resuming needs no state.

    Args:
        step: global batches consumed before this one, from 0; micro-batches do not count.
        warmup_steps, total_steps: in optimizer steps.
        min_lr_ratio: floor, as a fraction of the peak.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # +1: step 0 must not be a wasted update at rate 0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
