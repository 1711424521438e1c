"""Where a finished run is right and wrong: curves, bins and cuts over its predictions.

Shapes: N examples, K classes. Scores are scikit-learn's, with zero where one divides by zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from metrics import CALIBRATION_BINS
from predictions import Predictions

LENGTHS = [8 << i for i in range(10)]  # tokens


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts (K, K): a row for each true class, a column for each predicted one."""
    cells = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes)


def f1(counts: np.ndarray) -> np.ndarray:
    """F1 of each class, (K,), from a confusion matrix."""
    right, all_ = np.diagonal(counts), counts.sum(axis=0) + counts.sum(axis=1)
    return 2 * right / np.maximum(all_, 1)


def f1_macro(counts: np.ndarray) -> float | None:
    """Their mean; None where a class has no example."""
    return float(f1(counts).mean()) if counts.sum(axis=1).all() else None


def most_confused(counts: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, examples) of the largest errors, the largest first."""
    errors = counts - np.diag(np.diagonal(counts))
    order = np.argsort(-errors, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [(int(t), int(p), int(errors[t, p])) for t, p in pairs if errors[t, p]]


@dataclass(frozen=True)
class Cuts:
    """What follows from calling positive the M highest scores, for each M that a threshold can cut.

    All (M,), from the highest threshold to the lowest; each lies halfway between two scores.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1_positive: np.ndarray
    f1_macro: np.ndarray

    @property
    def average_precision(self) -> float:
        """The sum of precision times the recall gained at each cut."""
        return float((np.diff(self.recall, prepend=0.0) * self.precision).sum())


def cuts(is_positive: np.ndarray, scores: np.ndarray) -> Cuts:
    """Every cut of one class against the rest. scores (N,) in [0, 1].

    is_positive (N,): bool, or probabilities, for what is then to be expected.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.diff(ranked, append=-1.0))  # of each group of equal scores
    called = last + 1.0
    right = np.cumsum(is_positive[order])[last]
    positives, n = is_positive.sum(), len(scores)
    below = np.append(ranked[last[1:]], 0.0)
    negatives_right = (n - positives) - (called - right)
    f1_positive = 2 * right / (called + positives)
    f1_negative = 2 * negatives_right / np.maximum((n - called) + (n - positives), 1)
    return Cuts(
        (ranked[last] + below) / 2,
        right / called,
        right / max(positives, 1e-12),
        f1_positive,
        (f1_positive + f1_negative) / 2,
    )


@dataclass(frozen=True)
class Reliability:
    """How often predictions of like confidence are right, by bin; NaN where one is empty."""

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(predictions: Predictions) -> Reliability:
    """The predicted class's probability against the share that is right, in 15 equal bins."""
    confidence = predictions.probabilities.max(axis=1)
    is_right = predictions.probabilities.argmax(axis=1) == predictions.labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts, sure, right = (
        np.bincount(bins, weights=w, minlength=CALIBRATION_BINS)
        for w in (None, confidence, is_right)
    )
    with np.errstate(invalid="ignore"):
        return Reliability(counts, sure / counts, right / counts)


def by_length(predictions: Predictions, kept: int) -> Iterator[tuple[str, np.ndarray]]:
    """Texts of like length: the range in tokens, in words, and who is in it, (N,) bool.

    kept: tokens of a text beyond which it is cut; those texts are the last range.
    """
    tokens = predictions.tokens
    highs = [h for h in LENGTHS if h < kept] + [kept]
    for low, high in zip([0, *(h + 1 for h in highs)], highs, strict=False):
        yield f"{low} to {high}" if low else f"up to {high}", (tokens >= low) & (tokens <= high)
    yield f"over {kept}, cut", tokens > kept


def surest_errors(predictions: Predictions, most: int) -> np.ndarray:
    """Places of the wrong predictions, those of the highest probability first."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    sure = predictions.probabilities[wrong, predictions.predicted[wrong]]
    return wrong[np.lexsort((predictions.rows[wrong], -sure))[:most]]
