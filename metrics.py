"""Scores of one array of logits, as scikit-learn defines them, and how a metric is named.

Shapes: N examples, K classes.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

SCORES = (
    *("loss", "accuracy", "f1_macro", "f1_weighted", "f1_positive", "precision", "recall", "mcc"),
    *("roc_auc", "average_precision", "calibration_error"),
)
LOWER_IS_BETTER = ("loss", "calibration_error")
CALIBRATION_BINS = 15


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class probabilities in float64, (N, K) from logits (N, K)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exp = np.exp(shifted)
    return exp / exp.sum(axis=1, keepdims=True)


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weight of each class, (K,): N / (K * n_c), scikit-learn's `balanced`."""
    counts = np.bincount(labels, minlength=classes)
    return len(labels) / (classes * counts)


def score(labels: np.ndarray, logits: np.ndarray, positive: int | None) -> dict[str, object]:
    """Every score of the examples, by plain argmax and without class weights.

    labels (N,) in 0..K-1, logits (N, K). `positive` is the class that F1, precision, recall and
    average precision are about; without one, precision, recall and average precision are macro
    means and `f1_positive` is None. Where an example of some class is missing, every score that
    needs all classes is None. Logits that are not finite give None throughout.
    """
    from sklearn import metrics as sk  # seconds, for which --check need not wait

    n, classes = logits.shape
    result: dict[str, object] = {name: None for name in SCORES}
    result |= {"examples": n, "confusion": None, "predicted_share": None}
    if n == 0 or not np.isfinite(logits).all():
        return result
    probability = softmax(logits)
    predicted = logits.argmax(axis=1)
    everyone = np.arange(classes)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    result["loss"] = float(-log_probability[np.arange(n), labels].mean())
    result["accuracy"] = float(sk.accuracy_score(labels, predicted))
    result["calibration_error"] = calibration_error(probability, labels)
    result["confusion"] = sk.confusion_matrix(labels, predicted, labels=everyone).tolist()
    result["predicted_share"] = (np.bincount(predicted, minlength=classes) / n).tolist()
    if len(np.unique(labels)) < classes:
        return result
    one = {"labels": [positive], "average": "macro"} if positive is not None else {}
    some = one or {"average": "macro"}
    result["f1_macro"] = float(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    result["f1_weighted"] = float(
        sk.f1_score(labels, predicted, average="weighted", zero_division=0)
    )
    if one:
        result["f1_positive"] = float(sk.f1_score(labels, predicted, zero_division=0, **one))
    result["precision"] = float(sk.precision_score(labels, predicted, zero_division=0, **some))
    result["recall"] = float(sk.recall_score(labels, predicted, zero_division=0, **some))
    result["mcc"] = float(sk.matthews_corrcoef(labels, predicted))
    hot = np.eye(classes)[labels]
    if classes == 2:
        column = positive if positive is not None else 1
        result["roc_auc"] = float(sk.roc_auc_score(hot[:, column], probability[:, column]))
    else:
        result["roc_auc"] = float(sk.roc_auc_score(hot, probability, average="macro"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn explains a missing class, excluded above
        columns = [positive] if positive is not None else range(classes)
        ap = [sk.average_precision_score(hot[:, c], probability[:, c]) for c in columns]
        result["average_precision"] = float(np.mean(ap))
    return result


def calibration_error(probability: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of the predicted class, in [0, 1], over 15 equal bins.

    Naeini et al. 2015: the mean over examples of |accuracy - confidence| of their bin.
    """
    confidence, predicted = probability.max(axis=1), probability.argmax(axis=1)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=(predicted == labels) - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(labels))


def score_slices(
    labels: np.ndarray,
    logits: np.ndarray,
    positive: int | None,
    slices: Mapping[str, tuple[np.ndarray, Sequence[str]]],
) -> dict[str, dict[str, dict[str, object]]]:
    """Column -> value -> scores of its examples. slices: column -> (codes (N,), names)."""
    return {
        column: {
            name: score(labels[codes == code], logits[codes == code], positive)
            for code, name in enumerate(names)
            if (codes == code).any()
        }
        for column, (codes, names) in slices.items()
    }


def parse_metric(name: str) -> tuple[str, str | None, str | None]:
    """`f1_macro` or `f1_macro/worst:lang` as (score, worst or mean, column), or ValueError."""
    base, slash, rest = name.partition("/")
    how, colon, column = rest.partition(":")
    if base not in SCORES or (slash and not (how in ("worst", "mean") and colon and column)):
        raise ValueError(
            f"expected one of {', '.join(SCORES)}, or one with /worst:COLUMN or /mean:COLUMN; "
            f"found '{name}'"
        )
    return (base, how, column) if slash else (base, None, None)


def natural(name: str, value: float) -> float:
    """A value of `select` as its score is read, so a loss positive again."""
    return -value if parse_metric(name)[0] in LOWER_IS_BETTER else value


def select(name: str, scores: Mapping[str, object]) -> float:
    """The value that decides, higher being better: `scores` with its "slices", by metric name.

    A score that is undefined counts as the worst there is.
    """
    base, how, column = parse_metric(name)
    sign = -1.0 if base in LOWER_IS_BETTER else 1.0
    if how is None:
        values = [scores[base]]
    else:
        values = [s[base] for s in scores["slices"][column].values() if s[base] is not None]
    signed = [sign * float(v) for v in values if v is not None]
    if not signed:
        return -math.inf
    return min(signed) if how == "worst" else sum(signed) / len(signed)
