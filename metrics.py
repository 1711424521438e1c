"""Scores of one array of logits, as scikit-learn defines them, and how a metric is named.

Shapes: N examples, K classes.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

SCORES = (
    *("loss", "accuracy", "f1_macro", "f1_weighted", "f1_positive", "precision", "recall", "mcc"),
    *("roc_auc", "average_precision", "calibration_error"),
)
LOWER_IS_BETTER = ("loss", "calibration_error")
CALIBRATION_BINS = 15
COLLAPSED = 0.99  # of the texts get one label, although fewer than
MOSTLY_ONE = 0.97  # have it
SEVERAL = 10  # texts of other labels, of which a working model finds one or other
FLAT = 0.1  # logit_spread of a model whose logits do not depend on the text
RANKED = 0.6  # ROC AUC above chance


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class probabilities in float64, (N, K) from logits (N, K)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exp = np.exp(shifted)
    return exp / exp.sum(axis=1, keepdims=True)


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Weight of each example, (N,): N / (K * n_c), scikit-learn's `balanced`; their mean is 1.

    K is the number of classes that `labels` (N,) has.
    """
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / (len(counts) * counts))[place]


def score(labels: np.ndarray, logits: np.ndarray, positive: int | None) -> dict[str, object]:
    """Every score of the examples, by plain argmax and without class weights.

    labels (N,) in 0..K-1, logits (N, K). `positive` is the class that F1, precision, recall and
    average precision are about; without one, precision, recall and average precision are macro
    means and `f1_positive` is None. Where an example of some class is missing, every score that
    needs all classes is None. Logits that are not finite give None throughout.

    Beside the scores: examples, confusion, predicted_share (K,), entropy (mean of the predicted
    distributions', in nats) and logit_spread.
    """
    from sklearn import metrics as sk  # seconds, for which --check need not wait

    n, classes = logits.shape
    result: dict[str, object] = {name: None for name in SCORES}
    result |= {"examples": n, "confusion": None, "predicted_share": None}
    result |= {"entropy": None, "logit_spread": None}
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
    result["entropy"] = float(-(probability * log_probability).sum(axis=1).mean())
    result["logit_spread"] = logit_spread(logits)
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
    columns = [positive] if positive is not None else range(classes)
    ap = [sk.average_precision_score(hot[:, c], probability[:, c]) for c in columns]
    result["average_precision"] = float(np.mean(ap))
    return result


def logit_spread(logits: np.ndarray) -> float:
    """How much logits (N, K) differ between examples: the root mean square over examples of the
    deviation from their mean, after each example's own mean is taken off."""
    centred = logits - logits.mean(axis=1, keepdims=True, dtype=np.float64)
    return float(np.sqrt(((centred - centred.mean(axis=0)) ** 2).mean()))


def only_class(scores: Mapping[str, object]) -> int | None:
    """The index of the class that was predicted for all but every text, where others are another.

    These must be many, or for every text of several no other class have been predicted.
    """
    shares, confusion = scores.get("predicted_share"), scores.get("confusion")
    if not shares or max(shares) < COLLAPSED:
        return None
    k = shares.index(max(shares))
    others = scores["examples"] - sum(confusion[k])
    is_never = shares[k] == 1 and others >= SEVERAL
    return k if is_never or others / scores["examples"] > 1 - MOSTLY_ONE else None


def collapse_cause(scores: Mapping[str, object]) -> str:
    """The likely cause of one class for all, and what to try, from the scores of `score`."""
    spread, auc = scores["logit_spread"], scores["roc_auc"]
    if spread < FLAT:
        return (
            f"its logits hardly differ between texts (spread {spread:.3f}): nothing was learnt "
            "yet, or a rate too high destroyed it; another optimizer.lr, more train.epochs"
        )
    if auc is not None and auc > RANKED:
        return (
            f"it ranks the texts (ROC AUC {auc:.2f}), but its logits favour one class throughout: "
            "a fitted threshold may mend that, or train.class_weights=balanced if they are off"
        )
    return "what it learnt does not tell the classes apart: other data or settings"


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

    A score that is undefined counts as the worst there is; in a slice only where its logits are
    not finite, as a slice may lack a label.
    """
    base, how, column = parse_metric(name)
    sign = -1.0 if base in LOWER_IS_BETTER else 1.0
    if how is None:
        values = [scores[base]]
    else:
        of_slices = scores["slices"][column].values()
        if any(s["loss"] is None for s in of_slices):
            return -math.inf
        values = [s[base] for s in of_slices]
    signed = [sign * float(v) for v in values if v is not None]
    if not signed:
        return -math.inf
    return min(signed) if how == "worst" else sum(signed) / len(signed)
