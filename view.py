"""What is known of a run at one moment, and how its numbers are written, for screen and words."""

import contextlib
import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import alarms
from alarms import Alarm
from history import History, status
from runlog import number, part

# In the order in which they are shown as the width allows.
SCORES = (
    *("f1_macro", "f1_positive", "accuracy", "roc_auc", "loss", "average_precision", "mcc"),
    *("precision", "recall", "calibration_error", "f1_weighted"),
)
PACE = 200  # logged steps whose pace tells the time left
NOW_S = 3.0  # a look at the machine is of now; an older one, say of a hanging NVML, is not
MISSING = "n/a"


@dataclass(frozen=True)
class View:
    """A run at a moment. `live`: a look at this machine; it counts while the run trains here."""

    run: Path
    history: History
    now: float  # unix s
    live: dict | None = None

    @cached_property
    def state(self) -> dict:
        """See `history.status`."""
        return status(self.run, self.history)

    @property
    def is_running(self) -> bool:
        """Whether a trainer is at work, as far as can be known from here."""
        return self.state.get("status") == "running"

    @property
    def is_live(self) -> bool:
        """Whether what this machine does now is what the run does."""
        return self.is_running and self.state["is_here"]

    @cached_property
    def alarms(self) -> list[Alarm]:
        """What seems wrong now."""
        machine = self.live if self.is_live else None
        return alarms.check(self.history, self.state, now=self.now, machine=machine)

    @property
    def origin(self) -> str:
        """How the weights began."""
        told = self.history.start.get("from_scratch")
        known = "trained from scratch" if told is True else "origin unknown"
        return "pretrained" if told is False else known

    @property
    def metric(self) -> str:
        """What decides which checkpoint is the best."""
        return str(self.history.setting("evaluation.metric") or MISSING)

    def machines(self) -> list[tuple[dict, str]]:
        """Each machine's last record and how old it is, in words."""
        records = dict(self.history.hardware)
        shown = []
        if self.is_live and self.live:
            # Logs of earlier versions do not name the host: those records are of rank 0's.
            host = self.live.get("host")
            records.pop(host if host in records else "", None)
            shown.append((self.live, self._age(self.live)))
        return shown + [(record, self._age(record)) for record in records.values()]

    def _age(self, record: dict) -> str:
        taken = number(record.get("time"))
        if taken is None:
            return MISSING
        age_s = max(0, self.now - taken)
        return "now" if age_s < NOW_S else f"{in_words(age_s)} ago"

    def scores(self) -> list[tuple[str, dict]]:
        """Rows of validation scores: the last and the best evaluation, and what is to be beaten.

        Then those of the test set, once the run is finished.
        """
        evals, baselines = self.history.evaluations(), part(self.history.start, "baselines")
        last, best = evals[-1] if evals else {}, self.history.best()
        rows = [(f"last, step {figure(last.get('step'), '.0f')}", last)] if last else []
        rows += [(f"best, step {figure(best.get('step'), '.0f')}", best)] if best else []
        named = (("TF-IDF", "tfidf"), ("majority", "majority"))
        rows += [(name, row) for name, k in named if (row := part(baselines, k))]
        return rows + ([("test set", test)] if (test := self.history.end.get("test")) else [])

    def bad_evaluations(self) -> int:
        """Evaluations since the best one."""
        evals = self.history.evaluations()
        best = self.history.best()
        return sum(e["step"] > best["step"] for e in evals) if best else 0

    def left_s(self) -> float | None:
        """Seconds to the last step at the pace of the last ones, evaluations included."""
        steps = self.history.steps
        done, total = self.history.last("step"), self.history.plan("total_steps")
        if done is None or total is None or done >= total:
            return None
        times, numbers = steps["time"], steps["step"]
        began = number(self.history.start.get("time")) or -math.inf
        first = max(len(times) - PACE, bisect_left(times, began))  # not across an interruption
        pace = math.nan
        if first < len(times) - 1 and numbers[-1] > numbers[first]:
            pace = (times[-1] - times[first]) / (numbers[-1] - numbers[first])
        if not pace > 0:
            pace = self.history.last("step_s") or math.nan
        left = (total - done) * pace
        return left if 0 <= left < 1e9 else None

    def predicted(self) -> list[tuple[str, float]]:
        """Labels and their share among the last evaluation's predictions, the largest first."""
        evals, labels = self.history.evaluations(), self.history.start.get("labels")
        shares = alarms.shares_of(evals[-1]) if evals else []
        labels = labels if isinstance(labels, list) and len(labels) == len(shares) else None
        names = map(str, labels or range(len(shares)))
        return sorted(zip(names, shares, strict=True), key=lambda pair: -pair[1])

    def saved(self) -> list[str]:
        """What is saved, in words: the exported model, and the checkpoints, the newest first."""
        best = self.history.best().get("step")
        scores = {e["step"]: e.get("f1_macro") for e in self.history.evaluations()}
        names = [p.name[5:] for p in _below(self.run / "checkpoints", "step-*")]
        there = {int(name) for name in names if name.isdecimal()}
        sizes = {e["step"]: e.get("bytes") for e in self.history.checkpoints if e["step"] in there}
        told = [
            f"step {step:.0f} f1_macro {figure(scores.get(step), '.4f')} {in_bytes(sizes[step])}"
            + (" (best)" if step == best else "")
            for step in sorted(sizes, reverse=True)
        ]
        size = 0
        for path in _below(self.run / "best", "*"):
            with contextlib.suppress(OSError):
                size += path.lstat().st_size
        if size:
            told.insert(0, f"best/ of step {figure(best, '.0f')} {in_bytes(size)}")
        return told


def _below(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError:  # it was deleted meanwhile
        return []


def figure(value: object, form: str) -> str:
    """A number in a format, or n/a."""
    known = number(value)
    return MISSING if known is None else format(known, form)


def in_words(seconds: float) -> str:
    """A length of time in two units at most: 45 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    s = round(seconds)
    if s < 100:
        return f"{s} s"
    if s < 6000:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 360_000:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def in_bytes(count: object) -> str:
    """Bytes in a unit that leaves a few digits."""
    value = number(count)
    if value is None:
        return MISSING
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(value) >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.{0 if units[0] == 'B' else 1}f} {units[0]}"


def memory(record: dict) -> str:
    """Memory in use and in all."""
    used, total = (figure(record.get(k), ".1f") for k in ("memory_gib", "memory_total_gib"))
    return f"{used} of {total} GiB"


def reasons(record: dict) -> list[str]:
    """Why fields of a GPU are n/a: "power_w: Not Supported", alike ones together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in part(record, "unavailable").items():
        by_reason.setdefault(str(reason), []).append(str(name))
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
