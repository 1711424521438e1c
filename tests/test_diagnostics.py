"""Curves, bins and cuts are scikit-learn's where it has them, and leave out no text."""

import numpy as np
import pytest
from sklearn import metrics as sk

import diagnostics
import metrics
from predictions import Predictions


def make(n: int = 300, classes: int = 2, *, decimals: int = 7) -> Predictions:
    """Predictions a little better than chance; few decimals make ties."""
    rng = np.random.default_rng(n + classes)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + np.eye(classes)[labels]
    probabilities = metrics.softmax(logits).round(decimals)
    names = [str(k) for k in range(classes)]
    predicted, tokens = logits.argmax(axis=1), rng.integers(0, 200, n)
    return Predictions(names, np.arange(1, n + 1), labels, predicted, probabilities, tokens, {})


@pytest.mark.parametrize("classes", [2, 5])
def test_confusion_and_f1(classes):
    p = make(classes=classes)
    counts = diagnostics.confusion(p.labels, p.predicted, classes)
    assert (counts == sk.confusion_matrix(p.labels, p.predicted)).all()
    assert diagnostics.f1(counts) == pytest.approx(sk.f1_score(p.labels, p.predicted, average=None))
    macro = sk.f1_score(p.labels, p.predicted, average="macro")
    assert diagnostics.f1_macro(counts) == pytest.approx(macro)
    assert diagnostics.f1_macro(np.array([[3, 1], [0, 0]])) is None


def test_the_most_confused_pairs():
    counts = np.array([[9, 2, 0], [5, 9, 1], [0, 0, 9]])
    assert diagnostics.most_confused(counts, 2) == [(1, 0, 5), (0, 1, 2)]
    assert diagnostics.most_confused(counts, 9) == [(1, 0, 5), (0, 1, 2), (1, 2, 1)]
    assert diagnostics.most_confused(np.diag([3, 4]), 9) == []


@pytest.mark.parametrize("decimals", [7, 1])
def test_cuts_are_the_precision_recall_curve(decimals):
    p = make(decimals=decimals)
    is_positive, scores = p.labels == 1, p.probabilities[:, 1]
    cuts = diagnostics.cuts(is_positive, scores)
    precision, recall, _ = sk.precision_recall_curve(is_positive, scores)
    assert cuts.precision[::-1] == pytest.approx(precision[:-1])
    assert cuts.recall[::-1] == pytest.approx(recall[:-1])
    expected = sk.average_precision_score(is_positive, scores)
    assert cuts.average_precision == pytest.approx(expected)


@pytest.mark.parametrize("decimals", [7, 1])
def test_cuts_are_what_their_threshold_gives(decimals):
    p = make(80, decimals=decimals)
    scores = p.probabilities[:, 1]
    cuts = diagnostics.cuts(p.labels == 1, scores)
    assert len(cuts.thresholds) == len(np.unique(scores))
    for t, positive, macro in zip(cuts.thresholds, cuts.f1_positive, cuts.f1_macro, strict=True):
        said = (scores >= t).astype(int)
        assert positive == pytest.approx(sk.f1_score(p.labels, said))
        expected = sk.f1_score(p.labels, said, average="macro", labels=[0, 1], zero_division=0)
        assert macro == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 6])
def test_the_bins_of_reliability_are_those_of_the_calibration_error(classes):
    p = make(classes=classes)
    found = diagnostics.reliability(p)
    gaps = np.abs(np.nan_to_num(found.accuracy - found.confidence))
    expected = metrics.calibration_error(p.probabilities, p.labels)
    assert np.average(gaps, weights=found.counts) == pytest.approx(expected)
    assert found.counts.sum() == len(p) and len(found.counts) == metrics.CALIBRATION_BINS
    assert np.isnan(found.accuracy[found.counts == 0]).all()


@pytest.mark.parametrize("kept", [2, 8, 46, 62, 126, 8190])
def test_every_text_is_in_one_range_of_length(kept):
    p = make()
    ranges = list(diagnostics.by_length(p, kept))
    assert (sum(members.astype(int) for _, members in ranges) == 1).all()
    assert (ranges[-1][1] == (p.tokens > kept)).all() and ranges[-1][0] == f"over {kept}, cut"
    assert ranges[0][0] == f"up to {min(8, kept)}"


def test_the_surest_errors_come_first():
    p = make()
    places = diagnostics.surest_errors(p, 10)
    sure = p.probabilities[places].max(axis=1)
    wrong = p.predicted != p.labels
    assert wrong[places].all() and (np.diff(sure) <= 0).all()
    assert sure[-1] >= np.sort(p.probabilities.max(axis=1)[wrong])[-10]
    assert len(diagnostics.surest_errors(p, 10**6)) == wrong.sum()
