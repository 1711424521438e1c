"""Sections of the report about a finished run's predictions: how right it is, and how sure.

Each takes the splits by name, test and validation; one that cannot be read is the reason why.
"""

from collections.abc import Mapping

import numpy as np

import diagnostics
import metrics
import plots
from bootstrap import F1_SCORES
from markup import Html, absent, figures, join, note, plate, safe, short, table, tag
from predictions import Predictions
from runlog import number, part
from view import figure

Splits = Mapping[str, Predictions | str]
MAX_CURVES = 8
MAX_BESIDE = 10  # classes of two matrices beside each other
MAX_PAIRS = 20


def known(splits: Splits) -> dict[str, Predictions]:
    """The splits whose predictions could be read."""
    return {name: p for name, p in splits.items() if isinstance(p, Predictions)}


def reasons(splits: Splits) -> list[Html]:
    """Why the others could not be; once, where it is the same for all."""
    told = {name: p for name, p in splits.items() if isinstance(p, str)}
    if len(told) > 1 and len(set(told.values())) == 1:
        told = {" and ".join(told): next(iter(told.values()))}
    return [absent(f"{name.capitalize()}: {why}.") for name, why in told.items()]


def with_interval(value: object, within: tuple[float, float] | None) -> Html:
    """A score to three places, its interval behind it."""
    shown = figure(value, ".3f")
    if within is None or number(value) is None:
        return safe(shown)
    return Html(f'{shown}<span class="interval">{within[0]:.2f}–{within[1]:.2f}</span>')


# --- confusion ------------------------------------------------------------------------------------


def confusion(splits: Splits) -> Html:
    """What is taken for what."""
    plates, tables = [], []
    for name, p in known(splits).items():
        counts = diagnostics.confusion(p.labels, p.predicted, len(p.classes))
        if len(p.classes) <= plots.MAX_CLASSES:
            plates.append(_matrix(name, p, counts))
        else:
            tables.append(_pairs(name, p, counts))
    words = "A row is a true label, a column a predicted one; shaded by its share of the row."
    is_wide = any(len(p.classes) > MAX_BESIDE for p in known(splits).values())
    shown = [note(words), figures(*plates, is_wide=is_wide)] if plates else []
    return join([*shown, *tables, *reasons(splits)])


def _matrix(name: str, p: Predictions, counts: np.ndarray) -> Html:
    said = f"Confusion matrix on {name}, {len(p):,} texts"
    for true, predicted, n in diagnostics.most_confused(counts, 1):
        said += f"; the most frequent error is '{short(p.classes[true])}' taken for "
        said += f"'{short(p.classes[predicted])}', {n:,} times"
    drawing = plots.confusion(f"confusion-{name}", said, counts, p.classes)
    return plate(name.capitalize(), drawing, f"{len(p):,} texts.")


def _pairs(name: str, p: Predictions, counts: np.ndarray) -> Html:
    rows = [
        (p.classes[true], p.classes[predicted], f"{n:,}", f"{n / counts[true].sum():.1%}")
        for true, predicted, n in diagnostics.most_confused(counts, MAX_PAIRS)
    ]
    head = ("true", "predicted", "texts", "share of the true label")
    why = f"{len(p.classes)} labels are too many for a matrix; the most confused pairs on {name}."
    return table(head, rows, words=(0, 1), caption=why)


# --- precision and recall -------------------------------------------------------------------------


def precision_recall(splits: Splits, positive: int | None) -> Html:
    """What more recall costs in precision."""
    plates = [
        _of_the_positive(name, p, 1 if positive is None else positive)
        if len(p.classes) == 2
        else _of_each(name, p)
        for name, p in known(splits).items()
    ]
    return join([*([figures(*plates)] if plates else []), *reasons(splits)])


def _of_the_positive(name: str, p: Predictions, k: int) -> Html:
    is_k, called = p.labels == k, p.predicted == k
    cuts, share, right = diagnostics.cuts(is_k, p.probabilities[:, k]), is_k.mean(), is_k & called
    at = right.sum() / max(1, is_k.sum()), right.sum() / max(1, called.sum())
    words = f"Average precision {cuts.average_precision:.3f} for '{short(p.classes[k])}'."
    drawing = plots.lines(
        f"precision-recall-{name}",
        f"Precision over recall on {name}. {words} Guessing has {share:.3f}",
        [plots.Curve("by threshold", cuts.recall, cuts.precision)],
        x="recall",
        levels={f"guessing, {share:.2f}": float(share)},
        marks={"argmax": at},
        shares="xy",
    )
    return plate(f"Precision over recall, {name}", drawing, words)


def _of_each(name: str, p: Predictions) -> Html:
    curves, told = [], []
    for place, k in enumerate(_frequent(p)):
        cuts = diagnostics.cuts(p.labels == k, p.probabilities[:, k])
        told.append(f"'{short(p.classes[k])}' {cuts.average_precision:.3f}")
        share = (p.labels == k).mean()
        # The name last: in a script from right to left it would turn what comes after it around.
        label = f"{cuts.average_precision:.2f} / {share:.2f} {short(p.classes[k])}"
        curves.append(plots.Curve(label, cuts.recall, cuts.precision, f"class-{place}"))
    said = f"Precision over recall on {name}; average precision {', '.join(told)}"
    drawing = plots.lines(f"precision-recall-{name}", said, curves, x="recall", shares="xy")
    words = "Each label against the rest. Before its name: its average precision / that of "
    words += "guessing, which is its share of the texts."
    left = len(p.classes) - len(curves)
    words += f" {left:,} rarer labels are left out." if left else ""
    return plate(f"Precision over recall, {name}", drawing, words)


def _frequent(p: Predictions) -> list[int]:
    counts = np.bincount(p.labels, minlength=len(p.classes))
    return np.argsort(-counts, kind="stable")[:MAX_CURVES].tolist()


# --- calibration and threshold --------------------------------------------------------------------


def calibration(splits: Splits) -> Html:
    """Whether probabilities mean what they say."""
    plates = []
    for name, p in known(splits).items():
        found = diagnostics.reliability(p)
        is_high = np.nansum((found.confidence - found.accuracy) * found.counts) > 0
        error = metrics.calibration_error(p.probabilities, p.labels)
        words = f"Expected calibration error {error:.3f}; "
        words += f"on the whole {'over' if is_high else 'under'}confident."
        said = (
            f"Reliability diagram on {name}: accuracy by predicted probability in 15 bins. {words}"
        )
        drawing = plots.reliability(f"reliability-{name}", said, found)
        plates.append(plate(f"Reliability, {name}", drawing, words))
    return join([figures(*plates) if plates else "", *reasons(splits)])


def threshold(splits: Splits, results: Mapping[str, object], positive: int | None) -> Html:
    """What other thresholds than one half do on validation, and the stored one on each split."""
    p = splits.get("validation")
    if not isinstance(p, Predictions):
        return join(reasons({"validation": str(p)}))
    if len(p.classes) != 2:
        why = absent(f"{len(p.classes)} labels: there is no single threshold to choose.")
        return join([why, _decided(results)])
    k = 1 if positive is None else positive
    cuts = diagnostics.cuts(p.labels == k, p.probabilities[:, k])
    curves = [
        plots.Curve("macro-F1", cuts.thresholds, cuts.f1_macro, "accent"),
        plots.Curve(f"F1 of '{short(p.classes[k])}'", cuts.thresholds, cuts.f1_positive, "second"),
    ]
    counts = diagnostics.confusion(p.labels, p.predicted, 2)
    half = diagnostics.f1_macro(counts)
    if half is None:
        return absent("Validation has no text of one label: no threshold can be judged.")
    best, best_positive = int(cuts.f1_macro.argmax()), int(cuts.f1_positive.argmax())
    at, value = float(cuts.thresholds[best]), float(cuts.f1_macro[best])
    marks = {"0.5 (argmax)": (0.5, half), f"best, {at:.2f}": (at, value)}
    said = f"F1 over the threshold on validation: macro-F1 {half:.3f} at 0.5, at best {value:.3f} "
    said += f"at {at:.2f}"
    drawing = plots.lines(
        "threshold",
        said,
        curves,
        x=f"threshold on the probability of '{short(p.classes[k])}'",
        marks=marks,
        shares="xy",
    )
    named = short(p.classes[k])
    words = f"Macro-F1 is {half:.3f} at one half and at best {value:.3f}, at {at:.3f}. "
    words += f"F1 of '{named}' is {diagnostics.f1(counts)[k]:.3f} at one half and at best "
    words += f"{cuts.f1_positive[best_positive]:.3f}, at {cuts.thresholds[best_positive]:.3f}."
    if number(part(part(results, "validation"), "decided").get("threshold")) is not None:
        words += " The figure counts these texts, at probabilities as the model gives them; the "
        words += "stored threshold goes by the F1 to be expected, at probabilities after the "
        words += "temperature."
    elif results:
        words += " None is stored, as these texts do not tell a better one than argmax."
    caution = "A threshold chosen on the validation texts looks better on them than it is: it was "
    caution += "picked because it fits them. All other scores of this page are those of argmax."
    plates = figures(plate("F1 over the threshold", drawing))
    return join([tag("p", words), plates, _decided(results), note(caution)])


def _decided(results: Mapping[str, object]) -> Html:
    """A table of each split by argmax and by what is stored with the model."""
    rows = []
    for name in ("test", "validation"):
        scores, decided = part(results, name), part(part(results, name), "decided")
        if number(decided.get("temperature")) is None:
            continue
        words = f"temperature {decided['temperature']:.2f}"
        if number(decided.get("threshold")) is not None:
            words = f"threshold {decided['threshold']:.3f} at {words}"
        for label, found in (("argmax", scores), (words, decided)):
            cells = [with_interval(found.get(s), stored_interval(found, s)) for s in F1_SCORES]
            rows.append([f"{name}, {label}", *cells, figure(found.get("calibration_error"), ".3f")])
    if not rows:
        return join([])
    head = ["", "macro-F1", "F1 of the positive", "calibration error"]
    return table(head, rows, caption="As predict.py decides, beside argmax")


def stored_interval(scores: Mapping[str, object], name: str) -> tuple[float, float] | None:
    """The interval of a score that results.json has."""
    within = part(scores, "intervals").get(name)
    ends = [number(end) for end in within] if isinstance(within, list) else []
    return tuple(ends) if len(ends) == 2 and None not in ends else None
