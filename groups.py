"""Sections of the report about groups of texts: slices, lengths, and the worst errors."""

from collections.abc import Mapping, Sequence

import numpy as np

import diagnostics
import plots
from findings import Splits, known, reasons, stored_interval, with_interval
from markup import Html, absent, figures, join, note, plate, quoted, span_bar, table, tag
from predictions import Predictions
from runlog import number
from view import figure

MAX_ERRORS = 20
MAX_SLICES = 60  # values of a column that are listed


# --- slices ---------------------------------------------------------------------------------------


def slices(splits: Splits, results: Mapping[str, object], positive: int | None) -> Html:
    """The scores of each group of texts; `results`: of results.json, by split."""
    parts = []
    for name in splits:
        scores = results.get(name)
        columns = scores.get("slices") if isinstance(scores, dict) else None
        for column, values in columns.items() if isinstance(columns, dict) else ():
            if isinstance(values, dict) and values:
                parts += [_slice_table(name, column, values, positive)]
    if not parts:
        none = "data.slice_columns gave no column that all files have"
        return absent(f"No slices: {none if results else 'the run has no results yet'}.")
    worst = note("In bold: the lowest macro-F1 of its table. n/a: a label has no example there.")
    return join([*parts, worst])


def _slice_table(split: str, column: str, values: Mapping, positive: int | None) -> Html:
    shown = [(v, s) for v, s in values.items() if isinstance(s, dict)][:MAX_SLICES]
    macro = [number(s.get("f1_macro")) for _, s in shown]
    scored = [m for m in macro if m is not None]
    worst = {macro.index(min(scored))} if len(scored) > 1 else set()
    rows = []
    for value, s in shown:
        within = [stored_interval(s, name) for name in ("f1_macro", "f1_positive")]
        row = [value, figure(s.get("examples"), ",.0f")]
        row += [with_interval(s.get("f1_macro"), within[0]), _bar(s, within[0])]
        if positive is not None:
            row.append(with_interval(s.get("f1_positive"), within[1]))
            row.append(_share(s.get("confusion"), positive))
        rows.append(row)
    head = [column, "texts", "macro-F1", "from 0 to 1"]
    head += [] if positive is None else ["F1 of the positive", "positives"]
    left = len(values) - len(shown)
    more = f"; {left:,} more values are left out" if left else ""
    caption = f"{split.capitalize()} by {column}{more}"
    return table(head, rows, words=(0, 3), marked=worst, caption=caption)


def _bar(scores: Mapping, within: tuple[float, float] | None) -> Html | str:
    value = number(scores.get("f1_macro"))
    if value is None:
        return ""
    low, high = within or (value, value)
    return span_bar(low, value, high)


def _share(counts: object, positive: int | None) -> str:
    """The share of the positive label in a confusion matrix as JSON has it."""
    try:
        rows = [sum(int(c) for c in row) for row in counts]
        return f"{rows[positive] / sum(rows):.0%}"
    except (TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError):
        return "n/a"


# --- length ---------------------------------------------------------------------------------------


def lengths(splits: Splits, max_length: float | None) -> Html:
    """Errors by length, and how many texts are cut."""
    parts, rates, groups = reasons(splits), {}, []
    for name, p in known(splits).items():
        if p.tokens is None:
            parts.append(
                absent(f"{name.capitalize()}: this run's predictions tell no token counts.")
            )
        elif max_length is None:
            parts.append(absent("The log does not tell data.max_length."))
        else:
            rows, rates[name] = _length_rows(p, int(max_length) - 2)
            groups = [row[0] for row in rows]
            cut = float((p.tokens > max_length - 2).mean())
            caption = f"{name.capitalize()} by tokens; {cut:.1%} of the texts are cut"
            head = ("tokens", "texts", "share", "wrong", "macro-F1")
            parts.append(table(head, rows, caption=caption))
    if not rates:
        return join(parts)
    said = "Share of wrong predictions by length of the text in tokens, " + " and ".join(rates)
    drawing = plots.bars("lengths", said, groups, rates, x="tokens of the text")
    why = note(
        f"Tokens are the text's own before it is cut; <s> and </s> take two of the "
        f"{max_length:.0f} places. No bar stands for fewer than {plots.FEW} texts."
    )
    tables = tag("div", *parts, class_="figures")
    return join([figures(plate("Share of wrong predictions", drawing)), tables, why])


def _length_rows(p: Predictions, kept: int) -> tuple[list[Sequence[object]], list[float]]:
    rows, rates = [], []
    for words, members in diagnostics.by_length(p, kept):
        labels, predicted = p.labels[members], p.predicted[members]
        n = len(labels)
        rate = float((labels != predicted).mean()) if n else np.nan
        macro = diagnostics.f1_macro(diagnostics.confusion(labels, predicted, len(p.classes)))
        error = f"{rate:.1%}" if n else "n/a"
        rows.append((words, f"{n:,}", f"{n / len(p):.0%}", error, figure(macro, ".3f")))
        rates.append(rate if n >= plots.FEW else np.nan)
    return rows, rates


# --- errors ---------------------------------------------------------------------------------------


def errors(splits: Splits, texts: Mapping[int, tuple[str, str]] | str) -> Html:
    """The wrong predictions on validation that are the surest; texts: by row, or why not."""
    p = splits.get("validation")
    if not isinstance(p, Predictions):
        return join(reasons({"validation": str(p)}))
    places = diagnostics.surest_errors(p, MAX_ERRORS)
    if not len(places):
        return absent("There is no wrong prediction on validation.")
    texts = _of_these_labels(texts, p)
    rows = [_error_row(p, i, texts) for i in places]
    head = ["row", "probability", "true", "predicted", *p.slices, "text"]
    head = head[: None if isinstance(texts, Mapping) else -1]
    why = note(
        "Of the validation texts, not the test texts: whoever reads test texts and then changes "
        "the model has trained on them."
    )
    listed = table(head, rows, words=range(2, len(head)), stacked=True)
    return join([why, listed, *([] if isinstance(texts, Mapping) else [absent(texts)])])


def _of_these_labels(texts, p: Predictions):
    """The texts, if the file has this split's rows with its labels; else what is to be said."""
    if isinstance(texts, str):
        return f"Rows only, no texts: {texts}"
    for row, label in zip(p.rows.tolist(), p.labels, strict=True):
        if row not in texts or texts[row][1] != p.classes[label]:
            found = f"another label in row {row}" if row in texts else f"no row {row}"
            return f"Rows only, no texts: the data file was changed since, it has {found}."
    return texts


def _error_row(p: Predictions, i: int, texts: Mapping[int, tuple[str, str]] | str) -> list[object]:
    row, k = int(p.rows[i]), p.predicted[i]
    cells = [f"{row:,}", f"{p.probabilities[i, k]:.3f}", p.classes[p.labels[i]], p.classes[k]]
    cells += [values[i] for values in p.slices.values()]
    if isinstance(texts, Mapping):
        cells.append(tag("span", quoted(texts[row][0]), class_="text", dir="auto"))
    return cells
