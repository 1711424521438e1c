"""One self-contained page of a run: what it is, whether to believe it, how to repeat it.

No network, no script; a section whose source is missing says so. No torch here.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import config
import data
import datasheet
import findings
import groups
import predictions
import provenance
import timelines
from bootstrap import F1_SCORES, told_interval
from errors import MISSING, Refusal
from files import read_json, write_text, writing
from findings import Splits, with_interval
from history import LOG, Follower
from markup import Html, absent, document, facts, join, note, short, table, tag
from runlog import baseline, number, part
from timelines import BASELINES
from view import View, figure, in_words

NAME = "report.html"
SPLITS = ("test", "validation")
STATUS = {"completed": "finished", "preempted": "stopped, can go on", "dead": "its process is gone"}
MAX_LISTED = 200  # warnings


def write_report(run: Path) -> Path:
    """Write `report.html` into a run; its path. Refusal 66 for no run, 73 where it cannot be."""
    text = page(run)
    path = run / NAME
    with writing(path):
        write_text(path, text)
    return path


def page(run: Path, now: float | None = None) -> str:
    """The page as HTML; now: unix s, by which a running trainer may be stalled."""
    follower = Follower(run)
    if not follower.poll():
        raise Refusal(MISSING, f"no run: there is no event in {run / LOG}")
    subject = Subject(View(run, follower.history, time.time() if now is None else now))
    history, splits, positive = subject.view.history, subject.splits, subject.positive
    sections = [
        ("alarms", "Alarms", alarms(subject)),
        ("data", "Data", datasheet.data(subject.checked)),
        ("curves", "Training", timelines.curves(history)),
        ("confusion", "Confusion", findings.confusion(splits)),
        ("precision", "Precision and recall", findings.precision_recall(splits, positive)),
        ("calibration", "Calibration", findings.calibration(splits)),
        ("threshold", "Threshold", findings.threshold(splits, subject.results, positive)),
        ("slices", "Slices", groups.slices(splits, subject.results, positive)),
        ("length", "Length", groups.lengths(splits, number(history.setting("data.max_length")))),
        ("errors", "Most confident errors", groups.errors(splits, subject.texts)),
        ("hardware", "Hardware", timelines.hardware(subject.view)),
        ("configuration", "Configuration", provenance.configuration(subject.view)),
        ("repeat", "Repeat", provenance.repeat(subject.view)),
    ]
    heard = f"As of the log's last event, {moment(history.heard_at)}. "
    foot = note(f"{heard}Written from the files in {run.resolve().name}/ alone, but for the texts.")
    return document(f"{subject.name}: report", head(subject), sections, foot)


@dataclass(frozen=True)
class Subject:
    """The run that a report is about, and what its files hold."""

    view: View

    @property
    def name(self) -> str:
        """The run's name, that of its folder."""
        return self.view.run.resolve().name

    @cached_property
    def results(self) -> dict:
        """results.json; empty before the end."""
        return read_json(self.view.run / "results.json") or {}

    @cached_property
    def checked(self) -> dict:
        """data_report.json."""
        return read_json(self.view.run / "data_report.json") or {}

    @cached_property
    def labels(self) -> list[str]:
        """The label names in their order; empty if the log has none."""
        names = self.view.history.start.get("labels")
        is_list = isinstance(names, list) and all(isinstance(n, str) for n in names)
        return names if is_list and len(set(names)) == len(names) > 1 else []

    @property
    def positive(self) -> int | None:
        """The place of the positive label."""
        label = self.view.history.start.get("positive_label")
        return self.labels.index(label) if label in self.labels else None

    @cached_property
    def splits(self) -> Splits:
        """The predictions by split, or why there are none; test only where the run has one."""
        return {
            name: self._predictions(name)
            for name in SPLITS
            if name == "validation"
            or name in self.results
            or part(self.view.history.start, "data").get(name)
        }

    def _predictions(self, split: str) -> predictions.Predictions | str:
        if not self.labels:
            return "the log does not name the labels, so predictions cannot be read"
        try:
            return predictions.read(self.view.run, split, self.labels)
        except Refusal as error:
            is_early = error.exit_code == MISSING and not self.results
            return "no predictions yet: the run has not finished" if is_early else error.message

    @cached_property
    def intervals(self) -> dict[tuple[str, str], tuple[float, float] | None]:
        """The 95 % interval of each split's scores, by both names."""
        return {
            (name, s): told_interval(p.labels, p.predicted, len(p.classes), s, self.positive)
            for name, p in findings.known(self.splits).items()
            for s in F1_SCORES
        }

    @cached_property
    def texts(self) -> dict[int, tuple[str, str]] | str:
        """The validation file's texts and labels by row, or why they cannot be had."""
        file = part(self.checked, "validation").get("file")
        if not isinstance(file, str):
            return "data_report.json does not name the validation file."
        try:
            settings = config.load(self.view.run / "config.yaml").data
            return data.texts_by_row(file, settings)
        except Refusal as error:
            return error.message


def moment(unix_s: object) -> str:
    """A point in time to the minute."""
    known = number(unix_s)
    try:
        return datetime.fromtimestamp(known or "", UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return "at an unknown time"


# --- the head -------------------------------------------------------------------------------------


def head(subject: Subject) -> Html:
    """Name, state, the scores beside what they have to beat, and what was trained on what."""
    view = subject.view
    status = str(view.state.get("status") or "status unknown")
    kind = {"completed": "good", "running": "good"}.get(status, "bad")
    badges = [tag("span", STATUS.get(status, status), class_=f"badge {kind}")]
    if view.history.start.get("from_scratch") is True:
        badges.append(tag("span", "FROM SCRATCH, no pretrained weights", class_="badge bad"))
    return join(
        [
            tag("p", "Report of a run", class_="eyebrow"),
            tag("h1", subject.name, dir="auto"),
            tag("div", *badges, class_="badges"),
            headline(subject),
            facts(_what(subject)),
        ]
    )


def headline(subject: Subject) -> Html:
    """The final scores with their intervals and baselines; before the end, the best so far."""
    scored = [name for name in SPLITS if isinstance(subject.results.get(name), dict)]
    if not scored:
        return _so_far(subject)
    scores = {name: subject.results[name] for name in scored}
    main = scored[0]
    words = {"f1_macro": "macro-F1", "f1_positive": f"F1 of '{_positive(subject)}'"}
    shown = [s for s in F1_SCORES if any(number(scores[n].get(s)) is not None for n in scored)]
    large = [
        tag(
            "p",
            tag("b", figure(scores[main].get(s), ".3f")),
            tag("span", f"{main} {words[s]}"),
            tag("span", _range(subject, main, s)),
            class_="score",
        )
        for s in shown
    ]
    rows = [
        [
            f"{name} {words[s]}",
            with_interval(scores[name].get(s), subject.intervals.get((name, s))),
            *(figure(baseline(scores[name], key, s), ".3f") for key in BASELINES),
        ]
        for name in scored
        for s in shown
    ]
    listed = table(["", "this model", *BASELINES.values()], rows)
    why = note(
        "Intervals are of the bootstrap over the texts: how the scores of this one model would "
        "vary over other texts of the same source, not over other training runs."
    )
    has_any = any(subject.intervals.values())
    large = tag("div", *large, class_="headline")
    parts = [large, _verdict(subject, main), listed, _without_near(scores[main], main)]
    return join([*parts, *([why] if has_any else [])])


def _positive(subject: Subject) -> str:
    return "" if subject.positive is None else short(subject.labels[subject.positive])


def _range(subject: Subject, split: str, score: str) -> str:
    within = subject.intervals.get((split, score))
    return "" if within is None else f"95 % interval {within[0]:.3f} to {within[1]:.3f}"


def _verdict(subject: Subject, split: str) -> Html:
    """Where the model stands to each baseline, in a sentence."""
    value = number(subject.results[split].get("f1_macro"))
    within = subject.intervals.get((split, "f1_macro"))
    told = []
    for key, label in BASELINES.items():
        other = baseline(subject.results[split], key, "f1_macro")
        if value is None or other is None:
            continue
        side = "above" if value > other else "below" if value < other else "equal to"
        unsure = within and within[0] <= other <= within[1]
        told.append(f"{side} {label} ({other:.3f}{', inside the interval' if unsure else ''})")
    if not told:
        return absent(f"There is no baseline to compare macro-F1 on {split} with.")
    return tag("p", f"On {split}, macro-F1 of this model is {' and '.join(told)}.")


def _without_near(scores: Mapping[str, object], split: str) -> Html:
    """The score without texts that are nearly those of training, where there are any."""
    near = part(scores, "near_duplicates")
    if number(near.get("texts")) is None:
        return join([])
    value = part(near, "without").get("f1_macro")
    words = f"{near['texts']:,.0f} texts of {split} are nearly equal to a training text; without "
    words += f"them, macro-F1 is {figure(value, '.3f')}."
    return tag("p", words)


def _so_far(subject: Subject) -> Html:
    best = subject.view.history.best()
    why = absent("No final scores: the run has no results.json, so it has not finished.")
    if not best:
        return join([why, absent("No evaluation has been logged yet.")])
    value = tag("b", figure(best.get("f1_macro"), ".3f"))
    others = ", ".join(
        f"{label} {figure(baseline(subject.view.history.start, key, 'f1_macro'), '.3f')}"
        for key, label in BASELINES.items()
    )
    words = tag("span", f"best validation macro-F1 so far, at step {best['step']:.0f}; {others}")
    return join([tag("div", tag("p", value, words, class_="score"), class_="headline"), why])


def _what(subject: Subject) -> Iterator[tuple[str, object]]:
    view, environment = subject.view, part(subject.view.history.start, "environment")
    history = view.history
    size = number(history.start.get("parameters"))
    millions = "" if size is None else f", {size / 1e6:.1f} M parameters"
    yield "Model", f"{history.setting('model.name') or 'n/a'}, {view.origin}{millions}"
    counts = part(subject.view.history.start, "data").items()
    yield "Texts", ", ".join(f"{name} {figure(n, ',.0f')}" for name, n in counts) or "n/a"
    told = f"; positive is '{_positive(subject)}'" if subject.positive is not None else ""
    yield "Labels", (", ".join(map(short, subject.labels[:10])) or "n/a") + told
    done, total = history.reached(), history.plan("total_steps")
    steps = f"{figure(done, ',.0f')} of {figure(total, ',.0f')}"
    yield "Steps", f"{steps}, epoch {figure(history.epoch(), '.2f')}"
    yield "Best", f"step {figure(history.best().get('step'), ',.0f')} by {view.metric}"
    yield "Ended", view.state.get("reason") or "not yet"
    seconds = number(history.end.get("seconds"))
    yield "Time", "n/a" if seconds is None else in_words(seconds)
    world = figure(environment.get("world_size"), ".0f")
    yield "Device", f"{world} x {environment.get('device') or 'n/a'}"
    yield "Begun", moment(history.begun_at)


# --- alarms ---------------------------------------------------------------------------------------


def alarms(subject: Subject) -> Html:
    """What seems wrong with the run."""
    parts = [
        tag(
            "div",
            tag("p", tag("strong", f"{a.cause[:1].upper()}{a.cause[1:]}.")),
            tag("p", f"Seen: {a.evidence}."),
            tag("p", f"Try: {a.advice}."),
            class_="alarm",
        )
        for a in subject.view.alarms
    ] or [tag("p", "None: no rule of the monitor finds fault with this run.")]
    told = [f"Log: {w.get('message') or w.get('code')}" for w in subject.view.history.warnings]
    return join([*parts, tag("ul", *(tag("li", t, dir="auto") for t in told[:MAX_LISTED]))])
