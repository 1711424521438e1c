"""What the stored predictions of runs say of their scores: intervals, and paired tests. No torch.

Runs are called by letters here, as `compare` shows them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

import bootstrap
import predictions
from bootstrap import F1_SCORES
from errors import Refusal, printable
from predictions import Predictions
from runlog import part
from summary import Run
from view import figure

SCORES = ("f1_macro", "f1_positive", "accuracy", "loss")
TINY = 5e-8  # half the last place of a stored probability; zero has no logarithm
INTERVALS = (
    "In brackets: 95 % intervals, of the loss by its standard error, else by bootstrap. They tell "
    "how these models would score on other texts, not what other seeds would give."
)

Known = Mapping[str, Predictions | str]  # a run's letter -> its predictions, or why it has none


def read(runs: Mapping[str, Run], split: str) -> Known:
    """The predictions of each run on a split."""
    return {letter: _read(run, split) for letter, run in runs.items()}


def _read(run: Run, split: str) -> Predictions | str:
    labels = run.history.start.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return "the log does not name the labels"
    try:
        return predictions.read(run.path, split, labels)
    except Refusal as error:
        return error.message


def positive(run: Run, classes: Sequence[str]) -> int | None:
    """The index of the positive label, if there is one."""
    name = run.history.start.get("positive_label")
    return classes.index(name) if name in classes else None


# --- intervals ------------------------------------------------------------------------------------


def scores(runs: Mapping[str, Run], known: Known, split: str) -> list[list[str]]:
    """A row for each score and in it a cell for each run, with an interval where that is known."""
    return [
        [name, *(_cell(run, known[x], split, name) for x, run in runs.items())] for name in SCORES
    ]


def _cell(run: Run, p: Predictions | str, split: str, name: str) -> str:
    point = run.score(name, split)
    within = None if point is None or isinstance(p, str) else _interval(run, p, name)
    shown = figure(point, ".3f")
    return shown if within is None else f"{shown} [{within[0]:.3f}, {within[1]:.3f}]"


def _interval(run: Run, p: Predictions, name: str) -> tuple[float, float] | None:
    if name == "loss":
        likelihood = p.probabilities[np.arange(len(p)), p.labels]
        return bootstrap.mean_interval(-np.log(np.maximum(likelihood, TINY)))
    about = positive(run, p.classes)
    return bootstrap.told_interval(p.labels, p.predicted, len(p.classes), name, about)


def remarks(runs: Mapping[str, Run], known: Mapping[str, Known]) -> list[str]:
    """What the intervals mean, and why a run that has scores has none."""
    lines, has_any = [], False
    for split, of_runs in known.items():
        for x, p in of_runs.items():
            has_any |= not isinstance(p, str)
            if isinstance(p, str) and runs[x].score("loss", split) is not None:
                lines.append(f"{x} has no intervals on {split}: {p}.")
    return [INTERVALS, *lines] if has_any else lines


# --- the paired test ------------------------------------------------------------------------------


def paired_tests(runs: Mapping[str, Run], known: Known) -> list[str]:
    """Each later run less the first, on the same texts: a line for each score."""
    first, *others = runs
    texts = {
        x: part(run.history.start, "texts_sha256").get("validation") for x, run in runs.items()
    }
    lines, count = [f"validation, paired bootstrap of {bootstrap.REPLICATES:,} resamples:"], 0
    for x in others:
        reason = mismatch(known, first, x)
        if not reason and None not in (texts[first], texts[x]) and texts[first] != texts[x]:
            reason = "their validation texts differ, though rows and labels are the same"
        if reason:
            lines.append(f"{x} - {first}  no paired test: {reason}")
            continue
        about, other = (positive(runs[y], known[first].classes) for y in (first, x))
        for name in F1_SCORES if about is not None and about == other else F1_SCORES[:1]:
            lines.append(f"{x} - {first}  {name:<11}  {_tested(known, first, x, name, about)}")
            count += 1
    if count > 1:
        lines.append(
            f"p is not corrected for these {count} comparisons: by chance alone each falls below "
            "0.05 in one case of twenty."
        )
    return lines


def mismatch(known: Known, x: str, y: str) -> str | None:
    """Why predictions of two runs are not of the same examples; None if they are."""
    for name in (x, y):
        if isinstance(known[name], str):
            return f"{name} has no predictions: {known[name]}"
    a, b = known[x], known[y]
    if sorted(a.classes) != sorted(b.classes):
        told = [printable(", ".join(p.classes)) for p in (a, b)]
        return f"{x} has the labels {told[0]}; {y} has {told[1]}"
    of_a, of_b = _labels(a), _labels(b)
    for here, there, one, other in ((of_a, of_b, x, y), (of_b, of_a, y, x)):
        if alone := here.keys() - there.keys():
            told = f"{len(alone):,}, the first is row {min(alone)}"
            return f"validation texts of {one} that {other} does not have: {told}"
    for row, label in of_a.items():
        if label != of_b[row]:
            return f"row {row} has the label {label!r} in {x}, {of_b[row]!r} in {y}"
    return None


def _labels(p: Predictions) -> dict[int, str]:
    return {row: p.classes[k] for row, k in zip(p.rows.tolist(), p.labels, strict=True)}


def _tested(known: Known, x: str, y: str, name: str, about: int | None) -> str:
    """The difference of run y to x in a score, its interval and p; of other orders of classes."""
    a, b = known[x], known[y]
    code = np.array([a.classes.index(label) for label in b.classes])
    of_a, of_b = np.argsort(a.rows), np.argsort(b.rows)
    d = bootstrap.paired(
        a.labels[of_a],
        a.predicted[of_a],
        code[b.predicted[of_b]],
        len(a.classes),
        bootstrap.scorer(name, about),
    )
    return f"{d.value:+.3f}  [{d.low:+.3f}, {d.high:+.3f}]  p {d.p:.4f}"
