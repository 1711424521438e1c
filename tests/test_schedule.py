"""The learning rate of every step is the closed form; so is the step arithmetic."""

import math

import pytest

from schedule import lr_factor, plan_steps

ARITHMETIC = {
    "world_size": 1,
    "global_batch_size": 32,
    "micro_batch_size": 8,
    "accumulation_steps": None,
    "epochs": 3.0,
    "max_steps": None,
    "warmup_ratio": 0.1,
}


def closed_form(step: int, warmup: int, total: int, floor: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize("warmup, total, floor", [(0, 7, 0.0), (3, 30, 0.0), (10, 100, 0.25)])
def test_every_step_has_the_rate_of_the_closed_form(warmup, total, floor):
    factors = [
        lr_factor(s, warmup_steps=warmup, total_steps=total, min_lr_ratio=floor)
        for s in range(total)
    ]
    wanted = [closed_form(s, warmup, total, floor) for s in range(total)]
    assert factors == pytest.approx(wanted, rel=1e-14, abs=1e-16)
    assert max(factors) == 1.0 and min(factors) > 0.0, "no step may be wasted at rate 0"
    late = [
        lr_factor(s + 1, warmup_steps=warmup, total_steps=total, min_lr_ratio=floor)
        for s in range(total)
    ]
    assert late != pytest.approx(factors, rel=1e-3), "control: an off-by-one step must show"


def test_all_warmup_and_steps_past_the_end_stay_in_range():
    assert lr_factor(4, warmup_steps=5, total_steps=5) == 1.0
    assert lr_factor(9, warmup_steps=5, total_steps=5) == 0.0
    assert lr_factor(50, warmup_steps=1, total_steps=9, min_lr_ratio=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(world_size):
    plan = plan_steps(1000, **ARITHMETIC | {"world_size": world_size})
    assert (plan.global_batch_size, plan.steps_per_epoch, plan.total_steps) == (32, 32, 96)
    assert plan.warmup_steps == 10
    held = plan.micro_batch_size * plan.accumulation_steps
    assert held * world_size >= 32 and "global_batch_size decides" in plan.rule


def test_accumulation_steps_take_precedence_when_given():
    plan = plan_steps(1000, **ARITHMETIC | {"world_size": 2, "accumulation_steps": 3})
    assert plan.global_batch_size == 8 * 3 * 2 and plan.steps_per_epoch == math.ceil(1000 / 48)
    assert "accumulation_steps decides" in plan.rule and str(plan.total_steps) in str(plan)


def test_what_is_told_of_a_step_holds_for_passes_that_a_cap_of_tokens_cuts():
    assert "= 1 process x 4 or more passes of at most 8 texts" in str(
        plan_steps(1000, **ARITHMETIC)
    )


@pytest.mark.parametrize("epochs, max_steps, total", [(0.5, None, 16), (0.001, None, 1), (3, 5, 5)])
def test_parts_of_epochs_and_a_limit_on_steps(epochs, max_steps, total):
    plan = plan_steps(1000, **ARITHMETIC | {"epochs": epochs, "max_steps": max_steps})
    assert plan.total_steps == total
