"""From logits to what is said: a temperature for the probabilities, a threshold for the label.

Both are fitted on validation texts only and stored beside the model in inference.json, with what
else a user of the model needs to treat texts as training did.

Shapes: N examples, K classes.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import bootstrap
import diagnostics
from errors import MISSING, Refusal, printable
from files import read_json
from metrics import softmax

FILE = "inference.json"
SHORTEST = 4  # tokens that data.max_length is at least
TEMPERATURES = (0.01, 100.0)  # beyond them a few sure errors decide
RISING_P = 0.05  # below which scores tell more of the labels than chance may
OVERRULED_P = 0.01  # below which counts overrule the model; the best of many cuts is lucky, too


@dataclass(frozen=True)
class Decision:
    """How logits become probabilities and labels; as it is by default, softmax and argmax."""

    temperature: float = 1.0
    threshold: float | None = None  # on the probability of the positive one of two classes
    positive: int | None = None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """softmax(logits / temperature), (N, K) float64 from logits (N, K)."""
        return softmax(logits.astype(np.float64) / self.temperature)

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        """The class of each text, (N,) int64: the likeliest, or of two by the threshold."""
        if self.threshold is None:
            return probabilities.argmax(axis=1)
        is_positive = probabilities[:, self.positive] >= self.threshold
        return np.where(is_positive, self.positive, 1 - self.positive)


PLAIN = Decision()


def fit(
    labels: np.ndarray, logits: np.ndarray, positive: int | None, score: str = "f1_macro"
) -> Decision:
    """The temperature of least loss, and of two classes the threshold that these texts support.

    labels (N,), logits (N, K); `score` is f1_macro or f1_positive. Without examples of each class,
    or with logits that are not finite, PLAIN; no threshold where no prediction is wrong.
    """
    classes = logits.shape[1]
    if len(np.unique(labels)) < classes or not np.isfinite(logits).all():
        return PLAIN
    decision = Decision(fit_temperature(labels, logits))
    if classes > 2 or (logits.argmax(axis=1) == labels).all():
        return decision
    positive = 1 if positive is None else positive
    threshold = fit_threshold(
        labels == positive, decision.probabilities(logits)[:, positive], score
    )
    if threshold is None:
        return decision
    return replace(decision, threshold=threshold, positive=positive)


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """What logits (N, K) are to be divided by for the least cross-entropy with labels (N,).

    Temperature scaling: Guo et al. 2017 (arXiv:1706.04599). Sought over the inverse, in which the
    loss is convex, within TEMPERATURES. Where no prediction is wrong, 1: ever sharper would be
    better for these texts, which tells nothing about how sure to be of others.
    """
    from scipy.optimize import minimize_scalar  # scikit-learn's; whoever only reads needs it not

    margins = logits.astype(np.float64) - logits[np.arange(len(labels)), labels, None]

    def loss(inverse: float) -> float:
        scaled = margins * inverse
        top = scaled.max(axis=1)
        return float((top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))).mean())

    low, high = (1 / t for t in reversed(TEMPERATURES))
    if (logits.argmax(axis=1) == labels).all():
        return 1.0
    return 1 / minimize_scalar(loss, bounds=(low, high), method="bounded").x


def fit_threshold(
    is_positive: np.ndarray, scores: np.ndarray, score: str = "f1_macro"
) -> float | None:
    """From which of the scores (N,) in [0, 1] on the positive class is to be said.

    `score` is f1_macro or f1_positive. The cut with the highest F1 on a few hundred texts follows
    their noise, so the F1 of expected counts decides: each text counts as positive with its
    probability, by Platt's scaling of the scores' log-odds (of the two ways that Ye et al. 2012
    compare, arXiv:1206.4625, the one with a model of the probability). That scaling may be wrong:
    where the cut of the highest F1 is better by the paired bootstrap, that one is taken. None
    where the scores tell no more of the labels than chance may.
    """
    probability = _platt(is_positive, scores)
    if probability is None:
        return None
    found = []
    for positives in (probability, is_positive):
        cuts = diagnostics.cuts(positives, scores)
        f1 = cuts.f1_macro if score == "f1_macro" else cuts.f1_positive
        highest = cuts.thresholds[f1 >= f1.max() - 1e-12]
        found.append(float(highest[np.abs(highest - 0.5).argmin()]))
    said = [(scores >= cut).astype(int) for cut in found]
    scorer = bootstrap.scorer(score, positive=1)
    difference = bootstrap.paired(is_positive.astype(int), *said, 2, scorer)
    return found[difference.value > 0 and difference.p < OVERRULED_P]


def _platt(is_positive: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
    """The probability of the positive class given a score, (N,); None where it does not rise.

    A logistic regression on the log-odds, with targets a little within 0 and 1, so that separable
    texts do not make it infinitely sure: Platt 1999. Rising is told by the likelihood ratio.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, logit
    from scipy.stats import chi2

    odds = logit(np.clip(scores, 1e-12, 1 - 1e-12))
    inputs = np.stack([(odds - odds.mean()) / max(odds.std(), 1e-12), np.ones_like(odds)])
    n, positives = len(scores), is_positive.sum()
    target = np.where(is_positive, (positives + 1) / (positives + 2), 1 / (n - positives + 2))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        fitted = weights @ inputs
        gradient = inputs @ (expit(fitted) - target)
        return float((np.logaddexp(0, fitted) - target * fitted).mean()), gradient / n

    flat = np.array([0.0, logit(target.mean())])
    found = minimize(loss, flat, jac=True, method="BFGS")
    is_rising = found.x[0] > 0 and chi2.sf(2 * n * (loss(flat)[0] - found.fun), 1) < RISING_P
    return expit(found.x @ inputs) if is_rising else None


# --- stored beside the model ----------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """What inference.json holds: how training treated texts, and how logits are to be read."""

    labels: list[str]
    positive_label: str | None
    max_length: int
    truncation: str
    precision: str  # fp32 or bf16
    temperature: float
    threshold: float | None

    @property
    def decision(self) -> Decision:
        """As a Decision over the indices of `labels`."""
        positive = None if self.threshold is None else self.labels.index(self.positive_label)
        return Decision(self.temperature, self.threshold, positive)


def as_json(inference: Inference) -> str:
    """What is to be stored as FILE in a model's folder."""
    return json.dumps(asdict(inference), indent=1, ensure_ascii=False) + "\n"


def read(folder: Path) -> Inference | None:
    """What a model's folder has of it, None if nothing; Refusal 66 for a file that is not whole."""
    path = folder / FILE
    if not path.exists():
        if FILE in (read_json(folder / "manifest.json") or {}):
            reason = "is gone, though manifest.json lists it"
            raise Refusal(MISSING, f"{printable(path, 300)}: {reason}")
        return None
    found = read_json(path)
    try:
        inference = Inference(**found)
        is_sound = (
            isinstance(inference.labels, list)
            and all(isinstance(label, str) for label in inference.labels)
            and len(set(inference.labels)) == len(inference.labels) > 1
            and type(inference.max_length) is int
            and inference.max_length >= SHORTEST
            and inference.truncation in ("head", "tail", "head_tail")
            and inference.precision in ("fp32", "bf16")
            and TEMPERATURES[0] <= inference.temperature <= TEMPERATURES[1]
            and inference.positive_label in (None, *inference.labels)
            and (inference.threshold is None or 0 <= inference.threshold <= 1)
            and (inference.threshold is None or len(inference.labels) == 2)
            and (inference.threshold is None or inference.positive_label is not None)
        )
    except TypeError:
        is_sound = False
    if not is_sound:
        raise Refusal(MISSING, f"{printable(path, 300)}: is not as a run leaves it")
    return inference
