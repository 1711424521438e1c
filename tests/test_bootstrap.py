"""Intervals hold the truth as often as they say, and equal models differ as seldom."""

import numpy as np
import pytest
from sklearn import metrics as sk

import bootstrap
from bootstrap import Counts, interval, mean_interval, paired, scorer, told_interval, value

SETS = 500
F1 = scorer("f1_macro")


def simulated(
    rng: np.random.Generator, n: int, *, positives: float = 0.25, recall: float = 0.6
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of a model that takes one in ten negatives for a positive."""
    labels = (rng.random(n) < positives).astype(int)
    return labels, (rng.random(n) < np.where(labels, recall, 0.1)).astype(int)


def truth(name: str, *, positives: float = 0.25, recall: float = 0.6) -> float:
    """The score of that model on endless data."""
    rows = [[(1 - positives) * 0.9, (1 - positives) * 0.1]]
    rows.append([positives * (1 - recall), positives * recall])
    return float(scorer(name, 1)(Counts.of(np.array(rows) * 1e9)))


def share(events: list[bool]) -> float:
    return sum(events) / len(events)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("n", [1, 7, 300])  # of so few examples most lack a class
def test_scores_equal_scikit_learns(classes, n):
    rng = np.random.default_rng(n)
    labels, predicted = rng.integers(0, classes, n), rng.integers(0, classes, n)
    shared = {"labels": range(classes), "zero_division": 0}
    one = shared | {"labels": [1], "average": "macro"}
    expected = {
        ("accuracy", None): sk.accuracy_score(labels, predicted),
        ("f1_macro", None): sk.f1_score(labels, predicted, average="macro", **shared),
        ("f1_positive", 1): sk.f1_score(labels, predicted, **one),
    }
    for key, score in expected.items():
        assert value(labels, predicted, classes, scorer(*key)) == pytest.approx(score, abs=1e-12)


def test_a_stack_of_matrices_is_scored_as_one_by_one():
    stack = np.random.default_rng(0).integers(0, 50, (20, 3, 3))
    each = [float(F1(Counts.of(matrix))) for matrix in stack]
    assert F1(Counts.of(stack)).tolist() == each


@pytest.mark.parametrize("name, positive", [("f1_positive", None), ("roc_auc", 1), ("loss", 1)])
def test_what_confusion_does_not_tell_is_no_score(name, positive):
    with pytest.raises(ValueError, match=name):
        scorer(name, positive)


@pytest.mark.parametrize("name", ["accuracy", "f1_macro", "f1_positive"])
def test_intervals_hold_the_truth_in_95_of_100_sets(name):
    rng, score, held, held_twice = np.random.default_rng(1), scorer(name, 1), [], []
    for _ in range(SETS):
        labels, predicted = simulated(rng, 400)
        low, high = interval(labels, predicted, 2, score, replicates=1000)
        held.append(low <= truth(name) <= high)
        # The same examples once more are no more knowledge.
        arrays = (np.tile(a, 2) for a in (labels, predicted))
        low, high = interval(*arrays, 2, score, replicates=1000)
        held_twice.append(low <= truth(name) <= high)
    assert 0.93 <= share(held) <= 0.97
    assert share(held_twice) < 0.9


def test_too_few_examples_of_a_class_have_no_interval():
    labels = (np.arange(60) < 4).astype(int)
    predicted = np.roll(labels, 2)
    for name in ("f1_macro", "f1_positive"):
        assert told_interval(labels, predicted, 2, name, 1) is None
        labels[10] = 1
        assert told_interval(labels, predicted, 2, name, 1) == interval(
            labels, predicted, 2, scorer(name, 1)
        ), "control: five are enough"
        labels[10] = 0
    assert told_interval(labels, predicted, 2, "accuracy", None)
    assert told_interval(labels + (np.arange(60) > 40), predicted, 3, "f1_macro", None), "the rest"
    assert told_interval(labels, labels, 2, "accuracy", None) is None, "all resamples are alike"
    assert told_interval(labels, predicted, 2, "f1_positive", None) is None


def test_an_interval_is_that_of_resampled_examples():
    rng = np.random.default_rng(2)
    labels, predicted = simulated(rng, 200)
    rows = rng.integers(0, 200, (4000, 200))
    scores = [value(labels[r], predicted[r], 2, F1) for r in rows]
    expected = np.quantile(scores, [0.025, 0.975])
    assert np.abs(interval(labels, predicted, 2, F1) - expected).max() < 0.005
    assert interval(labels, predicted, 2, F1) == interval(labels, predicted, 2, F1)
    assert interval(labels, predicted, 2, F1) != interval(labels, predicted, 2, F1, seed=1)


def test_replicates_that_lost_a_class_do_not_draw_the_interval_down(monkeypatch):
    def shares_held() -> float:
        rng, held = np.random.default_rng(3), []
        while len(held) < SETS:
            labels, predicted = simulated(rng, 40, positives=0.05)
            if labels.any():  # else there is no score to speak of
                low, high = interval(labels, predicted, 2, F1, replicates=1000)
                held.append(low <= truth("f1_macro", positives=0.05) <= high)
        return share(held)

    ours = shares_held()
    counts = bootstrap._counts
    monkeypatch.setattr(
        bootstrap, "_counts", lambda draws, t, s, absent: counts(draws, t, s, absent | True)
    )
    assert shares_held() < ours - 0.04


@pytest.mark.parametrize("name", ["f1_macro", "f1_positive"])
def test_a_model_without_error_has_none_in_replicates_without_positives(name):
    labels = (np.arange(20) == 0).astype(int)  # a third of the replicates have no positive
    assert interval(labels, labels, 2, scorer(name, 1)) == (1, 1)


def test_a_class_that_all_examples_lack_counts_as_it_does_in_the_score():
    labels, predicted = np.zeros(50, dtype=int), np.arange(50) % 2
    low, high = interval(labels, predicted, 2, F1)
    assert low < value(labels, predicted, 2, F1) < high < 0.5
    with pytest.raises(ValueError, match="no examples"):
        interval(labels[:0], predicted[:0], 2, F1)


def two_models(
    rng: np.random.Generator, n: int, recalls: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and predictions of two models that mostly find the same texts hard."""
    labels = (rng.random(n) < 0.25).astype(int)
    hard = rng.random(n)
    luck = (np.where(rng.random(n) < 0.8, hard, rng.random(n)) for _ in recalls)
    a, b = (
        (own < np.where(labels, r, 0.1)).astype(int) for own, r in zip(luck, recalls, strict=True)
    )
    return labels, a, b


def is_told_apart_unpaired(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the scores differ by more than two independent samples' would."""
    lows, highs = zip(*(interval(labels, x, 2, F1, replicates=1000) for x in (a, b)), strict=True)
    margin = np.hypot(*((high - low) / 2 for low, high in zip(lows, highs, strict=True)))
    return abs(value(labels, b, 2, F1) - value(labels, a, 2, F1)) > margin


def test_equal_models_are_told_apart_in_5_of_100_sets():
    rng = np.random.default_rng(4)
    sets = [two_models(rng, 400, (0.6, 0.6)) for _ in range(SETS)]
    found = [paired(*s, 2, F1, replicates=1000).p < 0.05 for s in sets]
    assert 0.03 <= share(found) <= 0.07
    assert share([is_told_apart_unpaired(*s) for s in sets]) < 0.03  # which wastes the pairing


def test_a_real_difference_is_found_where_the_unpaired_test_misses_it():
    rng = np.random.default_rng(5)
    sets = [two_models(rng, 800, (0.6, 0.72)) for _ in range(100)]
    differences = [paired(*s, 2, F1, replicates=1000) for s in sets]
    assert share([d.p < 0.05 and d.value > 0 for d in differences]) > 0.9
    assert share([is_told_apart_unpaired(*s) for s in sets]) < 0.7
    for d in differences:  # the interval and p say the same, but for an interpolated edge
        assert d.low <= d.value <= d.high
        assert (d.p < 0.05) == (d.low > 0 or d.high < 0) or 0.04 < d.p < 0.06


def test_a_difference_turns_round_with_the_pair_and_is_none_to_itself():
    labels, a, b = two_models(np.random.default_rng(6), 300, (0.5, 0.7))
    there, back = paired(labels, a, b, 2, F1), paired(labels, b, a, 2, F1)
    assert there.value == -back.value and abs(there.p - back.p) < 0.02
    assert there.value == value(labels, b, 2, F1) - value(labels, a, 2, F1)
    same = paired(labels, a, a, 2, F1)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_the_interval_of_a_mean_holds_it_in_95_of_100_sets():
    rng = np.random.default_rng(7)
    intervals = [mean_interval(rng.exponential(size=400)) for _ in range(SETS)]
    assert 0.93 <= share([low <= 1 <= high for low, high in intervals]) <= 0.97


def test_many_classes_are_drawn_in_pieces(monkeypatch):
    rng = np.random.default_rng(8)
    labels, predicted = rng.integers(0, 30, 500), rng.integers(0, 30, 500)
    whole = interval(labels, predicted, 30, F1, replicates=500)
    monkeypatch.setattr(bootstrap, "CHUNK", 5000)
    assert interval(labels, predicted, 30, F1, replicates=500) == whole
