"""Sections of the report that run over steps and hours: training, and the machines."""

import math
from collections.abc import Iterable, Mapping, Sequence

from history import History, Series, gpus_of
from markup import Html, absent, facts, figures, join, note, plate
from plots import MAX_POINTS, Curve, lines
from runlog import baseline, number
from view import View, figure, in_words, reasons

BASELINES = {"tfidf": "TF-IDF", "majority": "majority"}
MAX_LINES = 8  # GPUs or machines in one figure
MAX_DOTS = 60  # evaluations that have one each
SCORES = {"f1_macro": "macro-F1", "f1_positive": "F1 of the positive"}


def curves(history: History) -> Html:
    """Loss, scores, learning rate and gradient norm over the steps."""
    if not len(history.steps) and not history.evaluations():
        return absent("No step has been logged yet.")
    losses = [_over_steps(history, "loss", "training", "second"), _evaluated(history, "loss")]
    rates = [_over_steps(history, "lr", "learning rate")]
    plates = [
        _plate("Loss", "loss", losses, "training and validation loss"),
        _scores(history),
        _plate("Learning rate", "lr", rates, "learning rate", floor=0),
        _norms(history),
    ]
    told = [
        "The training loss is that of the update: weighted by class and smoothed, as the settings "
        "have it, with dropout. The validation loss is none of these."
    ]
    if history.nonfinite:
        told.append(f" {len(history.nonfinite):,} logged steps were not finite; they are gaps.")
    return join([note(*told), figures(*plates)])


def _scores(history: History) -> Html | None:
    best = history.best()
    drawn, marks, levels = [], {}, {}
    for name, colour in zip(SCORES, ("accent", "second"), strict=True):
        drawn.append(_evaluated(history, name, SCORES[name], colour))
    if (value := number(best.get("f1_macro"))) is not None:
        marks[f"best, step {best['step']:.0f}"] = (best["step"], value)
    for key, words in BASELINES.items():
        if (value := baseline(history.start, key, "f1_macro")) is not None:
            levels[f"{words}, {value:.2f}"] = value
    metric = history.setting("evaluation.metric") or "evaluation.metric"
    words = f"Horizontal: macro-F1 of the baselines. The best is that of {metric}."
    return _plate(
        "Scores on validation",
        "scores",
        drawn,
        "macro-F1 and F1 of the positive label",
        words=words,
        levels=levels,
        marks=marks,
    )


def _norms(history: History) -> Html | None:
    drawn = [_over_steps(history, "grad_norm", "gradient norm")]
    limit = number(history.setting("train.max_grad_norm"))
    levels = {} if limit is None else {f"clipped above {limit:g}": limit}
    title = "Gradient norm before clipping"
    return _plate(title, "grad-norm", drawn, "gradient norm", levels=levels, floor=0)


def _over_steps(history: History, name: str, label: str, colour: str = "accent") -> Curve:
    x, y = (history.steps.thinned(column, MAX_POINTS) for column in ("step", name))
    return Curve(label, x, y, colour)


def _evaluated(
    history: History, name: str, label: str = "validation", colour: str = "accent"
) -> Curve:
    """A score of every evaluation that has it."""
    found = [(e["step"], number(e.get(name))) for e in history.evaluations()]
    found = [(step, value) for step, value in found if value is not None]
    form = "o-" if len(found) <= MAX_DOTS else "-"
    return Curve(label, [s for s, _ in found], [v for _, v in found], colour, form)


def _plate(
    title: str,
    name: str,
    drawn: Sequence[Curve],
    said: str,
    *,
    words: object = "",
    **options: object,
) -> Html | None:
    """A figure of what of these curves was logged; None if nothing was."""
    shown = [curve for curve in drawn if any(map(math.isfinite, curve.y))]
    if not shown:
        return None
    ends = (f"{c.label} from {_ends(c.y)}" for c in shown)
    said = f"{said.capitalize()} over the steps: {'; '.join(ends)}"
    return plate(title, lines(name, said, shown, x="step", **options), words)


def _ends(values: Iterable[float]) -> str:
    known = [v for v in values if math.isfinite(v)]
    return f"{known[0]:.3g} to {known[-1]:.3g}"


# --- the machines ---------------------------------------------------------------------------------


def hardware(view: View) -> Html:
    """What the run took, and what its machines did meanwhile."""
    history = view.history
    told = facts(_taken(history))
    if not history.hardware:
        return join([told, absent("The log has no record of the machine.")])
    speeds = [_over_steps(history, "tokens_per_s", "tokens/s")]
    waits = [_over_steps(history, "data_wait_share", "waiting for data")]
    waits.append(_over_steps(history, "padding_share", "padding", "second"))
    title = "Share of time waiting for data, and of padding"
    gpus = {f"GPU {uuid[:12]}": series for uuid, series in history.gpus.items()}
    hosts = {host or "machine": series for host, series in history.machines.items()}
    plates = [
        _plate("Tokens a second", "speed", speeds, "tokens a second", floor=0),
        _plate(title, "waits", waits, title, floor=0),
        _over_time("GPU utilisation, %", "gpu-util", gpus, "util_percent"),
        _over_time("GPU memory, GiB", "gpu-memory", gpus, "memory_gib"),
        _over_time("CPU, % of all cores", "cpu", hosts, "cpu_percent"),
        _over_time("Memory of the machine, GiB", "memory", hosts, "memory_gib"),
    ]
    return join([told, _no_gpu(history), figures(*plates)])


def _taken(history: History) -> Iterable[tuple[str, str]]:
    peaks = [v for v in history.steps["peak_memory_gib"] if math.isfinite(v)]
    speeds = sorted(v for v in history.steps["tokens_per_s"] if math.isfinite(v))
    seconds = number(history.end.get("seconds"))
    yield "Time taken", "n/a" if seconds is None else in_words(seconds)
    yield "Peak memory of rank 0", f"{max(peaks):.2f} GiB" if peaks else "n/a"
    yield "Median speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s" if speeds else "n/a"
    for host, record in list(history.hardware.items())[:MAX_LINES]:
        cores = figure(record.get("cores"), ".0f")
        total = figure(record.get("memory_total_gib"), ".1f")
        names = sorted({str(g.get("name")) for g in gpus_of(record)})
        told = f"{cores} cores, {total} GiB"
        told += f", {len(gpus_of(record))} x {', '.join(names)}" if names else ""
        yield f"Machine {host}".strip(), told


def _no_gpu(history: History) -> Html:
    if history.gpus:
        why = [
            reason for r in history.hardware.values() for g in gpus_of(r) for reason in reasons(g)
        ]
        return note(f"Not told by the driver: {'; '.join(sorted(set(why)))}.") if why else Html("")
    known = (r.get("no_gpu") for r in history.hardware.values())
    reason = next((r for r in known if r), None)
    return absent("No GPU: " + (str(reason) if reason else "the log has none."))


def _over_time(title: str, name: str, named: Mapping[str, Series], column: str) -> Html | None:
    """One column of several series, from the first record on."""
    known = {label: s for label, s in named.items() if any(map(math.isfinite, s[column]))}
    times = [t for s in known.values() for t in s["time"] if math.isfinite(t)]
    if not times:
        return None
    unit, seconds = ("minutes", 60) if max(times) - min(times) < 7200 else ("hours", 3600)
    drawn = []
    for place, (label, series) in enumerate(list(known.items())[:MAX_LINES]):
        x = [(t - min(times)) / seconds for t in series.thinned("time", MAX_POINTS)]
        colour = "accent" if len(known) == 1 else f"class-{place}"
        form = "-" if len(x) > 1 else "o"
        drawn.append(Curve(label, x, series.thinned(column, MAX_POINTS), colour, form))
    left = len(known) - len(drawn)
    said = f"{title} over time: " + "; ".join(f"{c.label} from {_ends(c.y)}" for c in drawn)
    words = f"{left} more are left out." if left else ""
    drawing = lines(name, said, drawn, x=f"{unit} since the first record", floor=0)
    return plate(title, drawing, words)
