"""The picture of a run on a terminal: rows that fit a window of any size."""

import math
import textwrap
from dataclasses import dataclass
from itertools import pairwise

from tqdm import tqdm
from tqdm.utils import disp_trim

from errors import printable
from history import gpus_of
from runlog import number, part
from view import MISSING, SCORES, View, figure, in_words, memory, reasons

LABEL = 14  # columns
SCORE_LABEL = 19
MAX_ALARM = 500  # characters
MAX_WIDTH = 200  # beyond it lines are too long to be read
STYLES = {"good": "32", "bad": "31", "warn": "33", "dim": "2", "strong": "1"}
STATUS = {"running": "good", "completed": "good", "preempted": "warn", "failed": "bad"}
STATUS |= {"dead": "bad"}
BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII_BLOCKS = " .:-=+*#@"
CURVES = (("loss", "loss", ".4g"), ("lr", "learning rate", ".3g"), ("grad_norm", "gradient", ".3g"))
TALL = 40  # rows of a window that has room for more


@dataclass(frozen=True)
class Row:
    """A line: its label, the rest, and how that is painted. An empty one may be left out."""

    label: str = ""
    text: str = ""
    style: str = ""


def draw(view: View, columns: int, rows: int, *, colour: bool, unicode: bool) -> list[str]:
    """At most `rows` lines of at most `columns` characters; colours are sequences beside them.

    Where all does not fit, empty lines go first, then single GPUs, advice, and what is last but
    for alarms.
    """
    width = min(columns, MAX_WIDTH)
    is_tall = rows >= TALL
    upper = [*_head(view, width, unicode), Row(), *_curves(view, width, is_tall, unicode)]
    upper += [*_speed(view, width), Row(), *_scores(view, width), *_saved(view, is_tall), Row()]
    for brief in ("", "GPUs", "GPUs and alarms"):
        parts = [*upper, *_machines(view, width, is_brief="GPUs" in brief)]
        parts += _alarms(view, width, is_brief="alarms" in brief)
        kept = parts if len(parts) <= rows else [part for part in parts if part != Row()]
        if len(kept) <= rows:
            break
    else:
        hidden = len(kept) - rows + 1
        more = Row("", f"... {hidden} more lines; a taller window shows them", "dim")
        alarms = _alarms(view, width, is_brief=True)[: max(0, rows - 2)]
        kept = [*kept[: rows - 1 - len(alarms)], *alarms, more]
    return [_painted(part, width, colour) for part in kept[:rows]]


def _painted(row: Row, width: int, colour: bool) -> str:
    label = f"{row.label:<{LABEL}}" if row.label or row.text else ""
    text = disp_trim(printable(label + row.text, 4 * width), width)
    if not colour:
        return text.rstrip()
    head, rest = text[: len(label)], text[len(label) :].rstrip()
    head = f"\x1b[2m{head}\x1b[0m" if head.strip() else head
    return head + (f"\x1b[{STYLES[row.style]}m{rest}\x1b[0m" if row.style and rest else rest)


# --- the parts, from top to bottom ----------------------------------------------------------------


def _head(view: View, width: int, unicode: bool) -> list[Row]:
    start, state = view.history.start, view.state
    known = str(state.get("status") or MISSING)
    why = state.get("reason")
    told = f"{known} on {state.get('host') or MISSING}" + (f": {why}" if why else "")
    if view.history.starts > 1:
        told += f" (start {view.history.starts})"
    parameters = number(start.get("parameters"))
    environment, counts = part(start, "environment"), list(part(start, "data").items())
    data = "  ".join(f"{name} {figure(n, ',.0f')}" for name, n in counts[:4])
    labels = start.get("labels")
    classes = f"  {len(labels)} classes" if isinstance(labels, list) else ""
    positive = start.get("positive_label")
    classes += f", positive '{positive}'" if positive is not None else ""
    model = f"{view.history.setting('model.name') or MISSING}, {view.origin}"
    model += f", {parameters / 1e6:.1f} M parameters" if parameters else ""
    model += f", {figure(environment.get('world_size'), '.0f')} x "
    model += str(environment.get("device") or MISSING)
    return [
        Row("run", view.run.resolve().name, "strong"),
        Row("status", told, "bad" if state.get("is_stopped") else STATUS.get(known, "")),
        Row("model", model),
        Row("data", data + classes),
        Row("progress", _bar(view, width - LABEL, unicode)),
    ]


def _bar(view: View, width: int, unicode: bool) -> str:
    done, total = view.history.reached(), view.history.plan("total_steps")
    if done is None or not total or not 0 <= done <= total < 1e12:
        return f"step {figure(done, '.0f')} of {figure(total, '.0f')}"
    left = view.left_s() if view.is_running else None
    tail = f"| {done:.0f}/{total:.0f}  epoch {figure(view.history.epoch(), '.2f')}"
    tail += f"  {in_words(left)} left" if left is not None else ""
    # No tqdm object: that goes by its own clock, which knows nothing of a run joined late.
    return tqdm.format_meter(
        int(done), int(total), 0, ncols=width, bar_format="{l_bar}{bar}" + tail, ascii=not unicode
    )


def _curves(view: View, width: int, is_tall: bool, unicode: bool) -> list[Row]:
    height, room = (4 if is_tall else 1), max(0, width - LABEL - 12)
    rows = []
    for name, label, form in CURVES:
        values = view.history.steps.thinned(name, 4 * room) if room else []
        lines = curve(values, min(room, 100), height, unicode)
        now = figure(view.history.last(name), form)
        rows.append(Row(label, f"{now:<12}{lines[0]}"))
        rows += [Row("", " " * 12 + line) for line in lines[1:]]
    return rows


def curve(values: list[float], width: int, height: int, unicode: bool) -> list[str]:
    """Values as a filled curve of so many characters, from the lowest value to the highest.

    A column is the mean of its share of the values; one that has none is left empty.
    """
    blocks = BLOCKS if unicode else ASCII_BLOCKS
    values = list(values)
    width = min(width, len(values))
    edges = [i * len(values) // width for i in range(width + 1)] if width else [0]
    cells = [values[start:end] for start, end in pairwise(edges)]
    means = [sum(known) / len(known) if (known := _finite(c)) else None for c in cells]
    seen = [m for m in means if m is not None]
    low, span = (min(seen), max(seen) - min(seen)) if seen else (0.0, 0.0)
    top = height * (len(blocks) - 1)
    levels = [
        0 if m is None else 1 + round((top - 1) * ((m - low) / span if span > 0 else 0.5))
        for m in means
    ]
    full = len(blocks) - 1
    return [
        "".join(blocks[min(full, max(0, level - full * floor))] for level in levels)
        for floor in reversed(range(height))
    ]


def _finite(values: list[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def _speed(view: View, width: int) -> list[Row]:
    last = view.history.last
    told = [f"{figure(last(f'{what}_per_s'), ',.0f')} {what}/s" for what in ("examples", "tokens")]
    told += [f"padding {figure(last('padding_share'), '.0%')}"]
    told += [f"data wait {figure(last('data_wait_share'), '.0%')}"]
    told += [f"{figure(last('peak_memory_gib'), '.1f')} GiB"]
    told += [f"{figure(last('step_s'), '.3g')} s a step"]
    return [Row("speed", _fitting(told, width))]


def _fitting(parts: list[str], width: int) -> str:
    """As many of the parts as there is room for: none is cut."""
    text = parts[0]
    for more in parts[1:]:
        if LABEL + len(text) + 2 + len(more) <= width:
            text += f"  {more}"
    return text


def _scores(view: View, width: int) -> list[Row]:
    metric = view.metric
    rows = view.scores()
    # Of the worst or mean of a slice only evaluations know the value.
    names = list(dict.fromkeys([metric if metric in SCORES else "value", *SCORES]))
    names = names[: max(1, (width - SCORE_LABEL) // 12)]
    heads = {"value": metric[-11:], "f1_positive": "f1_pos", "calibration_error": "calibr"}
    heads["average_precision"] = "avg_prec"
    patience = number(view.history.setting("evaluation.patience"))
    title = f"best by {metric}"
    if view.is_running and patience:
        title += f"; {view.bad_evaluations()} of {patience:.0f} evaluations without a better one"
    title += "" if view.history.evaluations() else "; no evaluation yet"
    parts = [Row("validation", title)]
    if rows:
        cells = "".join(heads.get(n, n).rjust(12) for n in names)
        parts.append(Row(" " * SCORE_LABEL, cells, "dim"))
    for name, row in rows:
        cells = "".join(figure(row.get(n), ".4f").rjust(12) for n in names)
        parts.append(Row(f"  {name}".ljust(SCORE_LABEL), cells))
    shares = view.predicted()
    if shares:
        told = "  ".join(f"{name} {share:.0%}" for name, share in shares[:20])
        parts.append(Row("predicts", told))
    return parts


def _saved(view: View, is_tall: bool) -> list[Row]:
    told = view.saved()
    if not told:
        return [Row("checkpoints", "none yet" if view.is_running else "none")]
    if not is_tall:
        return [Row("checkpoints", "; ".join(told))]
    return [Row("" if i else "checkpoints", text) for i, text in enumerate(told[:5])]


def _machines(view: View, width: int, *, is_brief: bool) -> list[Row]:
    rows = []
    for record, age in view.machines():
        cpu = figure(record.get("cpu_percent"), ".0f")
        told = [f"{age}:  CPU {cpu} %", f"memory {memory(record)}"]
        if "disk_free_gib" in record:
            told += [f"disk {figure(record['disk_free_gib'], ',.0f')} GiB free"]
        cores = figure(record.get("cores"), ".0f")
        told += [f"load {figure(record.get('load'), '.1f')} on {cores} cores"]
        host = str(record.get("host") or "machine")
        rows.append(Row(host[: LABEL - 2], _fitting(told, width)))
        gpus = gpus_of(record)
        rows += _together(gpus) if is_brief and len(gpus) > 1 else map(_gpu, gpus)
        if not gpus and record.get("no_gpu"):
            rows.append(Row("  no GPU", str(record["no_gpu"]), "dim"))
    return rows or [Row("machine", "nothing known yet")]


def _gpu(gpu: dict) -> Row:
    util, heat, power = (
        figure(gpu.get(k), ".0f") for k in ("util_percent", "temperature_c", "power_w")
    )
    text = f"{util:>3} %  {memory(gpu)}  {heat} C  {power} W  {gpu.get('name') or ''}"
    why = "; ".join(reasons(gpu))
    return Row(f"  {str(gpu.get('uuid'))[: LABEL - 3]}", text + (f"  n/a {why}" if why else ""))


def _together(gpus: list[dict]) -> list[Row]:
    """Many GPUs in a line: the range of each number."""

    def span(name: str, form: str) -> str:
        known = [v for g in gpus if (v := number(g.get(name))) is not None]
        return f"{min(known):{form}} to {max(known):{form}}" if known else MISSING

    text = f"{span('util_percent', '.0f')} %  {span('memory_gib', '.1f')} GiB  "
    text += f"{span('temperature_c', '.0f')} C  {span('power_w', '.0f')} W"
    return [Row(f"  {len(gpus)} GPUs", text)]


def _alarms(view: View, width: int, *, is_brief: bool) -> list[Row]:
    """Each alarm with what to try, wrapped; if brief, a line each."""
    rows = []
    for alarm in view.alarms:
        told = [("! alarm", f"{alarm.cause}: {alarm.evidence}", "bad")]
        told += [] if is_brief else [("  try", alarm.advice, "warn")]
        for label, text, style in told:
            shown = printable(text, MAX_ALARM)
            lines = textwrap.wrap(shown, max(20, width - LABEL), break_on_hyphens=False)
            rows.append(Row(label, lines[0], style))
            rows += [Row("", line, style) for line in lines[1:] if not is_brief]
    if view.history.warnings:
        message = view.history.warnings[-1].get("message")
        rows.append(Row("last warning", str(message), "dim"))
    return rows if view.alarms else [Row("alarms", "none", "good"), *rows]


def is_unicode(encoding: str | None) -> bool:
    """Whether block characters can be written in an encoding."""
    return (encoding or "").lower().replace("-", "").startswith("utf")


def has_colour(environ: dict[str, str]) -> bool:
    """Whether colours are wanted on a terminal; see no-color.org."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
