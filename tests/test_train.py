"""The update is that of the whole global batch, however it is cut; dropout, clipping, skipping."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

import train
from ddp import process_group
from metrics import balanced_weights
from optimizer import update
from prepare import named_weights

SMOOTHING = 0.1


def gradients(folder, dtype, micro, *, world=None, naive=False, **speed) -> list[np.ndarray]:
    """The gradient of each step of an epoch on this rank; 33 texts are 16, 16 and 1."""
    world = world or tiny.alone()
    job = tiny.make_job(arguments(folder, micro, **speed), world)
    job.model.to(dtype)
    model, sampler = world.wrap(job.model), job.sampler(world.rank)
    texts, result = job.training_texts, []
    for step in range(job.steps.steps_per_epoch):
        n = len(sampler.global_batch(step))
        batches = [job.collate([texts[i] for i in m]) for m in sampler.micro_batches(step)]
        if naive:
            naive_backward(model, batches)
        else:
            train.backward(model, batches, n, step, job, world)
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        result.append(flat.double().numpy())
        model.zero_grad()
    return result


def naive_backward(model, batches) -> None:
    """What is usually written: the weighted mean of each micro-batch, averaged."""
    for batch in batches:
        logits = model(**batch.inputs).logits
        losses = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=SMOOTHING)
        mean = (batch.weights * losses).sum() / batch.weights.sum()
        (mean / len(batches)).backward()


def arguments(folder, micro, **speed) -> list[str]:
    changes = {"train__global_batch_size": 16, "train__micro_batch_size": micro} | speed
    changes |= {"train__label_smoothing": SMOOTHING, "train__precision": "fp32"}
    return tiny.settings(folder, model__name=folder / "model-without-dropout", **changes)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def gradients_of_all(folder, cases, speed=tiny.SAVINGS["all"]) -> list[list[np.ndarray]]:
    with process_group("cpu") as world:
        return [gradients(folder, dtype, micro, world=world, **speed) for dtype, micro in cases]


LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.dist
@pytest.mark.parametrize("ranks, micros", [(1, [3, 1]), (2, [16, 3]), (4, [16, 1])])
def test_the_gradient_does_not_depend_on_the_split(small, ranks, micros):
    whole = {dtype: gradients(small, dtype, 16) for dtype in LIMITS}
    cases = [(dtype, micro) for dtype in LIMITS for micro in micros]
    if ranks == 1:
        split = [gradients_of_all(small, cases)]
    else:
        split = tiny.run_ranks(ranks, gradients_of_all, small, cases)
    for rank in split:
        for (dtype, micro), steps in zip(cases, rank, strict=True):
            for step, gradient in enumerate(steps):
                error = distance(gradient, whole[dtype][step])
                assert error < LIMITS[dtype], (dtype, micro, step)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("saving", [name for name in tiny.SAVINGS if name != "all"])
def test_nor_with_each_saving_alone(small, saving, ranks):
    speed = tiny.SAVINGS[saving]
    whole = gradients(small, torch.float32, 16, **speed)
    case = [(torch.float32, 3)]
    if ranks == 1:
        split = [gradients_of_all(small, case, speed)]
    else:
        split = tiny.run_ranks(ranks, gradients_of_all, small, case, speed)
    for (steps,) in split:
        for gradient, expected in zip(steps, whole, strict=True):
            assert distance(gradient, expected) < 1e-6


def test_control_the_mean_of_weighted_means_depends_on_the_split(small):
    whole = gradients(small, torch.float64, 16)
    naive = gradients(small, torch.float64, 3, naive=True)
    assert distance(naive[0], whole[0]) > 1e-2 and distance(naive[1], whole[1]) > 1e-2


def test_the_loss_is_the_weighted_sum_over_the_count_of_examples():
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 0, 1])
    weights = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    target = torch.full((6, 3), SMOOTHING / 3, dtype=torch.float64)
    target[range(6), labels] += 1 - SMOOTHING
    per_example = -(target * logits.log_softmax(1)).sum(1)
    expected = (weights[labels] * per_example).sum() / 6
    found = train.step_loss(logits, labels, weights[labels], 6, SMOOTHING)
    assert torch.allclose(found, expected)
    library = F.cross_entropy(logits, labels, weight=weights, label_smoothing=SMOOTHING)
    assert not torch.allclose(library, expected), "control: another formula"


def test_class_weights_equal_scikit_learns_balanced(small):
    job = tiny.make_job(tiny.settings(small))
    labels = job.corpus.train.labels
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    assert job.weights.tolist() == pytest.approx(expected[labels].tolist(), rel=1e-6)
    assert job.weights.mean() == pytest.approx(1, rel=1e-6)
    assert named_weights(job) == pytest.approx({"0": expected[0], "1": expected[1]}, rel=1e-6)


def test_weights_by_a_slice_column_balance_each_of_its_values_alone(small):
    job = tiny.make_job(tiny.settings(small, train__class_weights="balanced:lang"))
    train_split = job.corpus.train
    codes, values = train_split.slices["lang"]
    for code, value in enumerate(values):
        labels = train_split.labels[codes == code]
        expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
        weights = job.weights[codes == code]
        assert weights.tolist() == pytest.approx(expected[labels].tolist(), rel=1e-6)
        assert named_weights(job)[f"{value} 1"] == pytest.approx(expected[1], rel=1e-6)
    plain = tiny.make_job(tiny.settings(small)).weights
    assert np.abs(job.weights - plain).max() > 1e-3, "control: balanced over all is another weight"


def test_a_value_without_some_label_weighs_as_much_as_its_texts():
    assert balanced_weights(np.array([1, 1, 1])).tolist() == [1, 1, 1]
    assert balanced_weights(np.array([0, 2, 2, 2])).mean() == pytest.approx(1)


def test_dropout_is_on_in_training_and_off_in_evaluation(small):
    job = tiny.make_job(tiny.settings(small))
    texts = job.training_texts
    inputs = job.collate([texts[i] for i in range(8)]).inputs
    assert job.model.training
    first, second = (job.model(**inputs).logits for _ in range(2))
    assert not torch.equal(first, second)
    one, two = (train.evaluate(job, job.corpus.validation, tiny.alone()) for _ in range(2))
    assert (one == two).all() and job.model.training


def test_dropout_is_seeded_by_step_rank_and_micro_batch():
    seeds = {
        train.dropout_seed(s, t, r, m)
        for s in (1, 42)
        for t in range(20)
        for r in range(4)
        for m in range(4)
    }
    assert len(seeds) == 2 * 20 * 4 * 4 and max(seeds) < 2**63


def an_optimizer(gradient: list[float]) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.tensor(gradient)
    return parameter, optimizer


def test_clipping_is_by_the_global_norm_and_gives_torchs_update():
    (ours, a), (theirs, b) = an_optimizer([3.0, 4.0, 0.0]), an_optimizer([3.0, 4.0, 0.0])
    norm, skipped = update(a, 1.0)
    torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    b.step()
    assert torch.equal(ours, theirs) and (float(norm), float(skipped)) == (5.0, 0.0)


def test_a_gradient_below_the_limit_is_not_scaled():
    (ours, a), (theirs, b) = an_optimizer([0.3, 0.4, 0.0]), an_optimizer([0.3, 0.4, 0.0])
    b.param_groups[0]["eps"] = a.param_groups[0]["eps"] = 1.0  # or the step has no scale
    norm, _ = update(a, 1.0)
    b.step()
    assert torch.equal(ours, theirs) and float(norm) == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_an_update_that_is_not_finite_is_skipped_and_counted(bad, max_norm):
    parameter, optimizer = an_optimizer([0.5, 0.5, 0.5])
    update(optimizer, max_norm)
    moved, state = parameter.detach().clone(), optimizer.state[parameter]
    before = {name: value.clone() for name, value in state.items()}
    parameter.grad = torch.tensor([1.0, bad, 0.0])
    _, skipped = update(optimizer, max_norm)
    assert float(skipped) == 1.0 and torch.equal(parameter, moved)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    parameter.grad = torch.tensor([1.0, 1.0, 0.0])
    assert float(update(optimizer, max_norm)[1]) == 0.0, "control: the next one counts"
    assert not torch.equal(parameter, moved) and float(state["step"]) == 2.0
