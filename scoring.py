"""What the logits of a split are worth: scores, what they have to beat, and how sure they are.

Shapes: N examples, K classes.
"""

from collections.abc import Mapping

import numpy as np

import baselines
import bootstrap
import metrics
from bootstrap import F1_SCORES
from corpus import TokenisedSplit
from decision import Decision, fit
from prepare import Job
from progress import Progress
from runlog import number

BLUNT = 50  # a fitted temperature above which all probabilities are nearly alike
MANY = 2000  # classes x values of a slice column beyond which intervals would take minutes


def score_split(job: Job, split: TokenisedSplit, logits: np.ndarray) -> dict[str, object]:
    """All scores of a split from its logits (N, K), with "slices": column -> value -> scores.

    "collapse" says why, if all but every text gets one class.
    """
    scores = metrics.score(split.labels, logits, job.positive)
    slices = metrics.score_slices(split.labels, logits, job.positive, split.slices)
    is_collapsed = metrics.only_class(scores) is not None
    collapse = metrics.collapse_cause(scores) if is_collapsed else None
    return scores | {"slices": slices, "collapse": collapse}


def score_baselines(job: Job, split: TokenisedSplit) -> dict[str, dict[str, object]]:
    """The same scores for the most frequent class and for TF-IDF."""
    classes = len(job.corpus.label_names)
    shares = baselines.majority(job.corpus.train.labels, len(split), classes)
    predictions = {"majority": shares, "tfidf": split.baseline}
    tiny = 1e-12  # a probability of zero has no logarithm
    return {
        name: score_split(job, split, np.log(np.maximum(probability, tiny))) | {"collapse": None}
        for name, probability in predictions.items()
    }


def deciding(job: Job, scores: Mapping[str, object]) -> float:
    """The value of evaluation.metric, as it is read."""
    metric = job.cfg.evaluation.metric
    return metrics.natural(metric, metrics.select(metric, scores))


def evaluation_line(job: Job, progress: Progress, scores: Mapping[str, object]) -> str:
    """One evaluation for the terminal: the deciding score, loss, and whether it is the best."""
    metric = job.cfg.evaluation.metric
    epoch = progress.step / job.steps.steps_per_epoch
    value = deciding(job, scores)
    parts = [f"step {progress.step}, epoch {epoch:.2f}: validation {metric} {value:.4f}"]
    if metric != "f1_macro" and scores["f1_macro"] is not None:
        parts.append(f"f1_macro {scores['f1_macro']:.4f}")
    if metric != "loss" and scores["loss"] is not None:
        parts.append(f"loss {scores['loss']:.4f}")
    if progress.best_step == progress.step:
        parts.append("best so far")
    else:
        parts.append(
            f"best {metrics.natural(metric, progress.best):.4f} at step {progress.best_step}"
        )
    if scores["collapse"]:
        parts.append(f"predicts only '{job.corpus.label_names[metrics.only_class(scores)]}'")
    return "  ".join(parts)


# --- the final scores -----------------------------------------------------------------------------


def fit_decision(job: Job, logits: np.ndarray) -> Decision:
    """Temperature and threshold for the model's logits on validation, (N, K)."""
    score = metrics.parse_metric(job.cfg.evaluation.metric)[0]
    score = "f1_positive" if score == "f1_positive" else "f1_macro"
    return fit(job.corpus.validation.labels, logits, job.positive, score)


def final_scores(
    job: Job, split: TokenisedSplit, logits: np.ndarray, decision: Decision
) -> dict[str, object]:
    """`score_split` with intervals, worst slices, both baselines, and what `decision` makes of it.

    "intervals": score -> [low, high] of 95 %, in slices, too; "worst": column -> value and score;
    "decided": F1 by threshold and calibration error at the temperature; "near_duplicates": how
    many texts are nearly equal to a training text (`Checked.is_near`), and the others' scores.
    """
    scores = score_split(job, split, logits)
    predicted = logits.argmax(axis=1)
    scores["intervals"] = intervals(job, split.labels, predicted)
    for column, (codes, names) in split.slices.items():
        if len(names) * len(job.corpus.label_names) <= MANY:
            for value, of_value in scores["slices"][column].items():
                members = codes == names.index(value)
                of_value["intervals"] = intervals(job, split.labels[members], predicted[members])
    scores["worst"] = worst_slices(scores["slices"])
    scores["decided"] = decided(job, split, logits, decision)
    scores["baselines"] = score_baselines(job, split)
    if split.is_near is not None and split.is_near.any():
        far = ~split.is_near
        others = metrics.score(split.labels[far], logits[far], job.positive)
        kept = {name: others[name] for name in ("examples", *F1_SCORES)}
        kept["intervals"] = intervals(job, split.labels[far], predicted[far])
        scores["near_duplicates"] = {"texts": int(split.is_near.sum()), "without": kept}
    return scores


def intervals(job: Job, labels: np.ndarray, predicted: np.ndarray) -> dict[str, list[float] | None]:
    """Score -> 95 % interval over some examples, (N,); None where there is none."""
    found: dict[str, list[float] | None] = dict.fromkeys(F1_SCORES)
    classes = len(job.corpus.label_names)
    if len(np.unique(labels)) < classes:
        return found
    for name in F1_SCORES:
        within = bootstrap.told_interval(labels, predicted, classes, name, job.positive)
        found[name] = list(within) if within else None
    return found


def worst_slices(slices: Mapping[str, Mapping[str, Mapping]]) -> dict[str, dict[str, object]]:
    """Column -> the value of the lowest F1 macro, with it; only where two have one."""
    worst = {}
    for column, values in slices.items():
        scored = {v: s["f1_macro"] for v, s in values.items() if s["f1_macro"] is not None}
        if len(scored) > 1:
            value = min(scored, key=scored.get)
            worst[column] = {"value": value, "f1_macro": scored[value]}
    return worst


def decided(
    job: Job, split: TokenisedSplit, logits: np.ndarray, decision: Decision
) -> dict[str, object]:
    """What threshold and temperature, fitted elsewhere, give on a split."""
    found: dict[str, object] = {
        "temperature": decision.temperature,
        "threshold": decision.threshold,
    }
    if not np.isfinite(logits).all():
        return found
    probability = decision.probabilities(logits)
    predicted = decision.predict(probability)
    found["calibration_error"] = metrics.calibration_error(probability, split.labels)
    found["accuracy"] = float((predicted == split.labels).mean())
    if decision.threshold is None:
        return found
    has_all = len(np.unique(split.labels)) == logits.shape[1]
    for name in F1_SCORES:
        scorer = bootstrap.scorer(name, decision.positive)
        value = bootstrap.value(split.labels, predicted, logits.shape[1], scorer)
        found[name] = value if has_all else None
    return found | {"intervals": intervals(job, split.labels, predicted)}


def split_lines(name: str, scores: Mapping[str, object]) -> list[str]:
    """The final scores of a split for the terminal."""
    told = [_line(name, scores) + _baselines(scores)]
    for column, worst in scores["worst"].items():
        within = scores["slices"][column][worst["value"]].get("intervals") or {}
        interval = in_brackets(within.get("f1_macro"))
        told.append(f"  worst {column}: '{worst['value']}' {worst['f1_macro']:.3f}{interval}")
    near = scores.get("near_duplicates")
    if near:
        told.append(
            f"  without {near['texts']:,} near duplicates of training texts: "
            f"{figure(near['without'], 'f1_macro')}"
        )
    told += [f"  {line}" for line in _decided_lines(scores)]
    return told


def _line(name: str, scores: Mapping[str, object]) -> str:
    within = scores["intervals"]
    line = f"{name} macro-F1 {figure(scores, 'f1_macro')}{in_brackets(within['f1_macro'])}"
    if scores["f1_positive"] is not None:
        positive = f"{scores['f1_positive']:.3f}{in_brackets(within['f1_positive'])}"
        line += f" (positive {positive})"
    return line


def _baselines(scores: Mapping[str, object]) -> str:
    return "".join(
        f", {label} {figure(row, 'f1_macro')}"
        + (f" (positive {row['f1_positive']:.3f})" if row["f1_positive"] is not None else "")
        for label, row in scores["baselines"].items()
    )


def _decided_lines(scores: Mapping[str, object]) -> list[str]:
    decided = scores["decided"]
    lines = []
    if number(decided.get("f1_macro")) is not None:
        words = f"with the threshold {decided['threshold']:.3f}, fitted on validation"
        lines.append(_line(words + ":", decided))
    elif decided["threshold"] is None and len(scores["confusion"] or ()) == 2:
        lines.append("no threshold: validation does not tell a better one than argmax")
    if number(decided.get("calibration_error")) is not None:
        lines.append(
            f"calibration error {scores['calibration_error']:.3f}, "
            f"{decided['calibration_error']:.3f} at temperature {decided['temperature']:.2f}"
            + (", so probabilities tell next to nothing" if decided["temperature"] > BLUNT else "")
        )
    return lines


def in_brackets(within: object) -> str:
    """An interval behind a score; nothing for none."""
    return f" [{within[0]:.3f}, {within[1]:.3f}]" if within else ""


def figure(scores: object, name: str) -> str:
    """A score to three places."""
    value = number(scores.get(name)) if isinstance(scores, dict) else None
    return "n/a" if value is None else f"{value:.3f}"
