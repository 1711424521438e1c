"""Global batches are the same sets in the same order on any ranks; every text once an epoch."""

import dataclasses
from itertools import chain

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from batches import Collate, StepSampler, Template, cut, deal, evaluation_batches
from schedule import plan_steps

LENGTHS = np.random.default_rng(3).integers(3, 60, 103)
TEMPLATE = Template(prefix=[0], suffix=[2], pad_id=1, max_length=10, truncation="head_tail")


def sampler(world: int, rank: int, *, micro: int = 3, total: int = 16, first: int = 0, seed=42):
    plan = plan_steps(
        len(LENGTHS),
        world_size=world,
        global_batch_size=14,
        micro_batch_size=micro,
        accumulation_steps=None,
        epochs=total / 8,
        max_steps=None,
        warmup_ratio=0,
    )
    return StepSampler(
        LENGTHS, plan, rank=rank, seed=seed, micro_batch_tokens=10**6, first_step=first
    )


def steps_as_sets(world: int, **options) -> list[set[int]]:
    """The texts of each step over all ranks; a text dealt twice would make the counts differ."""
    ranks = [sampler(world, r, **options) for r in range(world)]
    result = []
    for step in range(ranks[0].first_step, ranks[0].steps.total_steps):
        texts = [i for s in ranks for m in s.micro_batches(step) for i in m if i >= 0]
        assert len(texts) == len(set(texts))
        result.append(set(texts))
    return result


@pytest.mark.parametrize("world", [2, 3, 4, 20])
@pytest.mark.parametrize("micro", [1, 3, 14])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(world, micro):
    assert steps_as_sets(world, micro=micro) == steps_as_sets(1)


def test_every_text_once_an_epoch_and_another_order_in_the_next():
    steps = steps_as_sets(2)
    assert len(steps) == 16
    for epoch in (steps[:8], steps[8:]):
        assert sum(map(len, epoch)) == len(LENGTHS) and set.union(*epoch) == set(range(103))
    assert steps[:8] != steps[8:] and steps != steps_as_sets(2, seed=43)


def test_control_the_sampler_as_it_comes_repeats_texts_and_changes_the_batches():
    def plain(world: int) -> list[list[int]]:
        ranks = [list(DistributedSampler(range(103), world, r, seed=42)) for r in range(world)]
        return [
            [t for r in ranks for t in r[i : i + 14 // world]] for i in range(0, 52, 14 // world)
        ]

    assert sum(map(len, plain(2))) > 103
    assert set(plain(2)[0]) != set(plain(1)[0][:14]) or set(plain(4)[0]) != set(plain(1)[0])


def test_beginning_at_a_step_gives_the_rest_of_the_sequence():
    whole, late = list(sampler(2, 1)), sampler(2, 1, first=5)
    rest = list(late)
    assert whole[-len(rest) :] == rest and list(late.counts) == list(sampler_counts(2, 1))[5:]
    assert len(late) == len(rest)


def sampler_counts(world: int, rank: int) -> list[int]:
    s = sampler(world, rank)
    return [len(s.micro_batches(step)) for step in range(16)]


def test_ranks_get_equal_counts_and_nearly_equal_tokens():
    hands = deal(np.arange(100), LENGTHS, 4)
    assert {len(hand) for hand in hands} == {25}
    tokens = [LENGTHS[hand].sum() for hand in hands]
    assert max(tokens) - min(tokens) <= LENGTHS.max()
    blind = [LENGTHS[np.arange(100)[r::4]].sum() for r in range(4)]
    assert max(tokens) - min(tokens) < max(blind) - min(blind), "control: dealing in turn is worse"


def test_a_rank_without_a_text_runs_a_filler():
    batches = [m for r in range(20) for m in sampler(20, r).micro_batches(0)]
    fillers = [m for m in batches if m[0] < 0]
    assert len(fillers) == 6 and all(len(m) == 1 for m in fillers)


@pytest.mark.parametrize("texts, tokens", [(4, 10**6), (100, 120), (5, 64)])
def test_a_micro_batch_keeps_both_caps(texts, tokens):
    batches = cut(np.arange(103), LENGTHS, texts, tokens)
    assert sorted(chain(*batches)) == list(range(103))
    for batch in batches:
        assert len(batch) <= texts and len(batch) * LENGTHS[batch].max() <= tokens
    assert [len(b) for b in cut(np.arange(5), LENGTHS, 9, 1)] == [1] * 5  # never an empty one


def test_evaluation_batches_hold_every_text_once():
    assert sorted(chain(*evaluation_batches(LENGTHS))) == list(range(103))


@pytest.mark.parametrize(
    "truncation, kept",
    [("head", range(8)), ("tail", range(12, 20)), ("head_tail", [0, 1, *range(14, 20)])],
)
def test_truncation_keeps_the_stated_places(truncation, kept):
    template = dataclasses.replace(TEMPLATE, truncation=truncation)
    assert template.dress(np.arange(20) + 100) == [0, *[100 + k for k in kept], 2]
    assert template.dress(np.arange(8) + 100) == [0, *range(100, 108), 2]
    assert template.dress(np.arange(0)) == [0, 2]


def test_collate_pads_to_the_longest_of_the_batch_with_the_pad_id():
    texts = [([0, 5, 6, 2], 1, 2.5, False), ([0, 2], 0, 0.5, False)]
    batch = Collate(TEMPLATE)(texts)
    assert batch.inputs["input_ids"].tolist() == [[0, 5, 6, 2], [0, 2, 1, 1]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    found = (batch.labels.tolist(), batch.weights.tolist(), batch.tokens, batch.is_filler)
    assert found == ([1, 0], [2.5, 0.5], 6, False)
    assert Collate(TEMPLATE, "max")(texts).inputs["input_ids"].shape == (2, 10)
