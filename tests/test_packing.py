"""Packed rows and the first position alone give the logits and gradients of padded batches."""

import copy
import random

import numpy as np
import pytest
import tiny
import torch

import encoder
from attention import packed_attention
from batches import Collate, Template
from optimizer import update
from packing import Packing

TEMPLATE = Template([0], [2], 1, 512, "head")
LENGTHS = {
    "one text": [9],
    "equal": [7] * 5,
    "two tokens": [2, 2],
    "all kinds": [512, 300, 47, 46, 30, 12, 11, 11, 3, 2],
    "not sorted": [3, 40, 2, 17, 40, 5],
}


def texts(lengths, seed=0) -> list[tuple[list[int], int, bool]]:
    rng = random.Random(seed)
    return [([0, *rng.choices(range(4, 60), k=n - 2), 2], 0, 1.0, False) for n in lengths]


def models(dtype=torch.float32, **options):
    """The plain model, and the same with savings; dropout is off."""
    plain = tiny.random_model(positions=514, dropout=0.0).to(dtype).train()
    ours = copy.deepcopy(plain)
    encoder.install(ours, **{"packed": True, "first_position": True} | options)
    return plain, ours


def outcome(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of a function of them, as one vector."""
    model.zero_grad()
    logits = model(**batch.inputs).logits
    (
        logits * torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    ).sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return logits.detach(), torch.cat([g.flatten() for g in grads])


def distance(a, b) -> float:
    return float((a - b).norm() / b.norm())


LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("first_position", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_and_padded_agree(lengths, first_position, dtype):
    plain, ours = models(dtype, first_position=first_position)
    rows = texts(lengths)
    expected = outcome(plain, Collate(TEMPLATE, "batch")(rows))
    for is_rounded in (False, True):
        packed = Collate(TEMPLATE, "free", is_rounded)(rows)
        for one, other in zip(outcome(ours, packed), expected, strict=True):
            assert distance(one, other) < LIMITS[dtype], is_rounded


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@torch.no_grad()
def test_they_agree_in_evaluation(lengths, dtype):
    for first_position in (True, False):
        plain, ours = models(dtype, first_position=first_position)
        rows = texts(lengths)
        expected = plain.eval()(**Collate(TEMPLATE, "batch")(rows).inputs).logits
        logits = ours.eval()(**Collate(TEMPLATE, "free", True)(rows).inputs).logits
        assert distance(logits, expected) < LIMITS[dtype]


@pytest.mark.parametrize("padding", ["batch", "max"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_first_position_alone_is_enough(lengths, padding):
    plain, ours = models(packed=False)
    batch = Collate(TEMPLATE, padding)(texts(lengths))
    for one, other in zip(outcome(ours, batch), outcome(plain, batch), strict=True):
        assert distance(one, other) < 1e-6


def test_control_positions_from_zero_and_the_librarys_own_are_wrong():
    plain, ours = models()
    rows = texts(LENGTHS["all kinds"])
    expected, _ = outcome(plain, Collate(TEMPLATE, "batch")(rows))
    packed = Collate(TEMPLATE, "free")(rows)
    packed.inputs["position_ids"] -= 2
    assert distance(outcome(ours, packed)[0], expected) > 1e-3
    packed = Collate(TEMPLATE, "free")(texts([30, 20]))
    expected, _ = outcome(plain, Collate(TEMPLATE, "batch")(texts([30, 20])))
    del packed.inputs["position_ids"]
    assert distance(outcome(ours, packed)[0], expected) > 1e-3


def test_the_order_of_texts_does_not_matter():
    _, ours = models()
    rows = texts(LENGTHS["all kinds"])
    order = [3, 0, 9, 1, 5, 2, 8, 4, 7, 6]
    logits, _ = outcome(ours, Collate(TEMPLATE, "free")(rows))
    permuted, _ = outcome(ours, Collate(TEMPLATE, "free")([rows[i] for i in order]))
    assert distance(permuted, logits[order]) < 1e-6


def test_a_text_leaves_the_others_logits_as_they_are():
    _, ours = models()
    rows = texts([40, 31, 30, 7, 6])
    changed = [*rows[:1], *texts([31], seed=1), *rows[2:]]
    one, two = (outcome(ours, Collate(TEMPLATE, "free", True)(r))[0] for r in (rows, changed))
    others = [0, 2, 3, 4]
    assert torch.equal(one[others], two[others]) and not torch.equal(one[1], two[1])
    mixed = Packing.of([71, 43], is_rounded=False)  # control: two of them taken for one text
    packed = Collate(TEMPLATE, "free")(changed)
    packed.inputs["packing"] = mixed
    assert outcome(ours, packed)[0].shape == (2, 2)
    plain = Collate(TEMPLATE, "free")(rows)
    plain.inputs["packing"] = mixed
    assert not torch.equal(outcome(ours, plain)[0][0], outcome(ours, packed)[0][0])


def test_filler_is_at_most_five_percent_and_rows_take_few_sizes():
    sizes = set()
    for total in range(2, 5000):
        packing = Packing.of([2] * (total // 2) + [1] * (total % 2), is_rounded=True)
        assert 0 <= packing.filler <= total / 20
        sizes.add(total + packing.filler)
    assert len([s for s in sizes if 640 <= s <= 1280]) == 21
    assert Packing.of([5, 3], is_rounded=False).filler == 0


def test_attention_drops_out_its_weights_alone():
    packing = Packing.of([30, 29, 4], is_rounded=False)
    query, key = (torch.randn(1, 2, 63, 8) for _ in range(2))
    value = torch.ones(1, 2, 63, 8)  # so that the output is the sum of the weights that are kept
    torch.manual_seed(1)
    sums = packed_attention(
        None, query, key, value, None, packing=packing, scaling=0.3, dropout=0.4
    )[0]
    torch.manual_seed(1)
    again = packed_attention(
        None, query, key, value, None, packing=packing, scaling=0.3, dropout=0.4
    )[0]
    off = packed_attention(None, query, key, value, None, packing=packing, scaling=0.3)[0]
    assert torch.equal(sums, again) and torch.allclose(off, torch.ones_like(off))
    assert sums.std() > 0.05 and abs(sums.mean() - 1) < 0.2


def test_attentions_gradient_with_dropout_is_that_of_finite_differences():
    packing = Packing.of([4, 4, 3, 2], is_rounded=False)
    for queries in (13, 4):
        shapes = [(1, 2, queries, 3), (1, 2, 13, 3), (1, 2, 13, 3)]
        inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

        def attend(query, key, value):
            torch.manual_seed(0)
            how = {"packing": packing, "scaling": 0.6, "dropout": 0.3}
            return packed_attention(None, query, key, value, None, **how)[0]

        assert torch.autograd.gradcheck(attend, inputs)


def test_the_gradient_through_dropout_and_layer_norm_is_that_of_finite_differences():
    shapes = [(5, 8), (5, 8), (8,), (8,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def add_norm(x, residual, weight, bias):
        torch.manual_seed(0)
        return encoder._AddNorm.apply(x, residual, weight, bias, 1e-5, 0.3)

    assert torch.autograd.gradcheck(add_norm, inputs)


def test_bf16_is_as_near_to_fp32_as_the_padded_path():
    plain, ours = models()
    rows = texts(LENGTHS["all kinds"])
    exact = outcome(plain, Collate(TEMPLATE, "batch")(rows))
    with torch.autocast("cpu", torch.bfloat16):
        padded = outcome(plain, Collate(TEMPLATE, "batch")(rows))
        packed = outcome(ours, Collate(TEMPLATE, "free", True)(rows))
    for ours_, theirs, truth in zip(packed, padded, exact, strict=True):
        assert distance(ours_.float(), truth) < 1.5 * distance(theirs.float(), truth)


def test_weights_are_cast_anew_after_each_change():
    _, ours = models()
    batch = Collate(TEMPLATE, "free", True)(texts([9, 8]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = ours(**batch.inputs).logits
        assert torch.equal(ours(**batch.inputs).logits, before)
        ours.roberta.encoder.layer[0].attention.self.key.weight.mul_(3)
        assert not torch.equal(ours(**batch.inputs).logits, before)


def test_weights_are_cast_anew_after_an_update():
    _, ours = models()
    batch = Collate(TEMPLATE, "free", True)(texts([9, 8]))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            ours(**batch.inputs).logits.sum().backward()
        update(optimizer, 1.0)
    fresh = copy.deepcopy(tiny.random_model(positions=514, dropout=0.0))
    fresh.load_state_dict(ours.state_dict())
    encoder.install(fresh, packed=True, first_position=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(ours(**batch.inputs).logits, fresh(**batch.inputs).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_computes_layers_twice_and_changes_nothing(dropout, monkeypatch):
    calls, layer = [], encoder._layer
    monkeypatch.setattr(encoder, "_layer", lambda *a, **k: calls.append(1) or layer(*a, **k))
    batch = Collate(TEMPLATE, "free", True)(texts(LENGTHS["not sorted"]))
    outcomes = []
    for checkpointing in (False, True):
        model = tiny.random_model(positions=514, dropout=dropout).train()
        encoder.install(model, packed=True, first_position=True, checkpointing=checkpointing)
        torch.manual_seed(3)
        calls.clear()
        outcomes.append(outcome(model, batch))
        assert len(calls) == 2 * (1 + checkpointing)
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_a_packed_batch_moves_to_a_device():
    batch = Collate(TEMPLATE, "free", True)(texts([9, 8])).to(torch.device("meta"))
    assert batch.labels.is_meta and batch.inputs["packing"].cu_seqlens.is_meta
    assert all(batch.inputs[name].is_meta for name in ("input_ids", "position_ids"))


def test_positions_of_a_packing():
    packing = Packing.of([3, 1, 2], is_rounded=False)
    assert packing.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packing.starts.tolist() == [0, 3, 4] and packing.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert np.all(np.diff(packing.cu_seqlens) == [3, 1, 2]) and packing.max_length == 3
