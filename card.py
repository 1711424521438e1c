"""The model card of a finished run: what the model is, how good it is, how to use it."""

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

import config
from data import SLICE_WORDS
from errors import printable
from model import Source
from prepare import Job
from quality import MIN_EXAMPLES
from scoring import figure, in_brackets

HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
LANGUAGE = re.compile(r"[a-z]{2,3}")  # a value of a column of languages
MAX_ROWS = 60  # of a table
MANY_LABELS = 20

USE = """\
```
from transformers import pipeline
classify = pipeline("text-classification", "path/to/this/folder")
classify("some text", truncation=True, max_length={max_length})
```

`pipeline` gives the likeliest label. `predict.py` of the program that made this model reads
`inference.json` as well: it cuts long texts as training did ({truncation}, {max_length} tokens),
divides the logits by the temperature and, of two labels, says the positive one from the threshold
on.
"""

LIMITS = """\
- The scores hold for texts like those that were scored. The intervals tell how much they would
  vary over other such texts, not over other training runs or other sources.
- A probability is as good as the calibration error above says, and only on such texts.
- Labels are those of the annotators of the data. What they took for {positive} others may not.
- Texts of languages and kinds that are not in the data were not scored.
"""


def write(job: Job, final: Mapping[str, object]) -> str:
    """The text of README.md; `final`: as results.json has it."""
    sections = {
        "Data": _data(job),
        "Scores": "\n\n".join(_scores(job, final)),
        "How to use it": USE.format(
            max_length=job.cfg.data.max_length,
            truncation=job.cfg.data.truncation,
        ),
        "Limits": LIMITS.format(positive=_positive(job)),
        "How it was trained": _settings(job, final),
    }
    body = "\n\n".join(f"## {title}\n{text.strip()}" for title, text in sections.items())
    return f"{_front(job)}\n# {_title(job)}\n\n{body}\n"


def _title(job: Job) -> str:
    labels = job.corpus.label_names
    named = ", ".join(map(safe, labels[:MANY_LABELS]))
    named += ", ..." if len(labels) > MANY_LABELS else ""
    return f"Text classifier ({named}), {_origin(job.source)}"


def _origin(source: Source) -> str:
    """The weights it began with, by name; of a local folder only its last part."""
    if source.is_scratch:
        return "trained from scratch"
    folder = source.folder.parent if source.folder.name == "best" else source.folder
    name = source.name if _is_of_a_hub(source) else folder.name
    return f"fine-tuned from {safe(name)}"


def _is_of_a_hub(source: Source) -> bool:
    is_named_so = HUB_NAME.fullmatch(source.name) and not Path(source.name).is_dir()
    return bool(is_named_so) and not source.is_scratch


def _positive(job: Job) -> str:
    return "a label" if job.positive is None else f"'{safe(job.corpus.label_names[job.positive])}'"


def _front(job: Job) -> str:
    """What model hubs read."""
    lines = ["library_name: transformers", "pipeline_tag: text-classification", "metrics: [f1]"]
    slices = job.corpus.train.slices.items()
    columns = [found for name, found in slices if name.casefold() in SLICE_WORDS]
    codes, names = columns[0] if columns else (np.zeros(0, int), [])
    counts = np.bincount(codes, minlength=len(names))
    values = [name for name, n in zip(names, counts, strict=True) if n >= MIN_EXAMPLES]
    languages = ", ".join(f'"{v}"' for v in values if LANGUAGE.fullmatch(v))
    if languages:
        lines.append(f"language: [{languages}]")
    if _is_of_a_hub(job.source):
        lines.append(f"base_model: {job.source.name}")
    return "\n".join(["---", *lines, "---", ""])


def _data(job: Job) -> str:
    """Rows by label, and what the data check said."""
    report = job.corpus.report
    names = job.corpus.label_names[:MANY_LABELS]
    rows = []
    for split in ("train", *job.corpus.evaluated()):
        counts = report[split]["labels"]
        each = (f"{counts.get(name, 0):,}" for name in names)
        rows.append([split, f"{report[split]['rows']:,}", *each])
    text = _table(["split", "texts", *(f"'{safe(n)}'" for n in names)], rows)
    files = {name: getattr(job.cfg.data, name) for name in ("train", "validation", "test")}
    named = ", ".join(f"{name} {safe(Path(file).name)}" for name, file in files.items() if file)
    held = "; the validation texts were split off the training file" if report["held_out"] else ""
    found = "\n".join(f"- {safe(f)}" for f in job.corpus.findings[:MAX_ROWS])
    return f"Files: {named}{held}.\n\n{text}\n\nThe data check found" + (
        f":\n\n{found}" if found else " nothing."
    )


def _scores(job: Job, final: Mapping[str, object]) -> Iterator[str]:
    """A table of both splits beside the baselines, one for each slice column, and the decision."""
    head = ["", "macro-F1", f"F1 of {_positive(job)}", "accuracy", "calibration error"]
    rows = []
    for name in job.corpus.evaluated():
        scores = final[name]
        rows.append([f"**{name}**", *_cells(scores), *_plain(scores)])
        decided = scores["decided"]
        if decided.get("calibration_error") is not None:
            threshold = decided["threshold"]
            words = f"{name}, " + ("" if threshold is None else f"threshold {threshold:.3f}, ")
            words += f"temperature {decided['temperature']:.2f}"
            rows.append([words, *_cells(decided), *_plain(decided)])
        rows += [[f"{name}, {n}", *_cells(s), *_plain(s)] for n, s in scores["baselines"].items()]
    has_threshold = final["validation"]["decided"].get("threshold") is not None
    fitted = "Threshold and temperature" if has_threshold else "Temperature"
    yield f"In brackets: 95 % bootstrap intervals. {fitted}: fitted on validation."
    yield _table(head, rows)
    name = "test" if "test" in final else "validation"
    for column, values in final[name]["slices"].items():
        rows = [
            [safe(value), f"{scores['examples']:,}", *_cells(scores)]
            for value, scores in list(values.items())[:MAX_ROWS]
        ]
        left = len(values) - len(rows)
        more = f" ({left} more values are left out)" if left else ""
        worst = final[name]["worst"].get(column)
        more += f"; worst: {safe(worst['value'])}, {worst['f1_macro']:.3f}" if worst else ""
        yield f"By {safe(column)}, {name}{more}:"
        yield _table([safe(column), "texts", *head[1:3]], rows)
    collapse = final["validation"]["collapse"]
    if collapse:
        yield f"**The model predicts one class** for nearly all texts: {safe(collapse)}."
    near = final[name].get("near_duplicates")
    if near:
        yield (
            f"{near['texts']:,} {name} texts are nearly equal to a training text. Macro-F1 without "
            f"them: {_cells(near['without'])[0]}."
        )


def _cells(scores: Mapping[str, object]) -> list[str]:
    within = scores.get("intervals") or {}
    return [
        figure(scores, name) + in_brackets(within.get(name)) for name in ("f1_macro", "f1_positive")
    ]


def _plain(scores: Mapping[str, object]) -> list[str]:
    return [figure(scores, name) for name in ("accuracy", "calibration_error")]


def _settings(job: Job, final: Mapping[str, object]) -> str:
    """The settings that alter the result, and how the run ended."""
    rows = [
        [f"`{name}`", safe(config.written(value))]
        for name, value in sorted(config.altering(job.cfg).items())
    ]
    told = f"{final['steps']:,} steps, the best after {final['best_step']:,} "
    told += f"by {safe(final['metric'])}; ended because: {safe(final['reason'])}."
    return f"{told}\n\n{_table(['setting', 'value'], rows)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def safe(text: object) -> str:
    """Text of data or settings in which Markdown and HTML find nothing to render."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(printable(text, 300), quote=False))
