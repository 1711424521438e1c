"""A run as its log tells it, folded small: what monitor, alarms and report read. No torch here."""

import contextlib
import math
import os
import socket
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path

from files import open_regular, read_json
from runlog import MAX_LINE, number, parse, part

LOG = "metrics.jsonl"
RUNS = Path("runs")  # where runs are if run.dir says nothing else
STEP = (
    *("time", "step", "epoch", "loss", "lr", "grad_norm", "padding_share", "step_s"),
    *("examples_per_s", "tokens_per_s", "data_wait_share", "peak_memory_gib", "skipped"),
)
SYSTEM = ("time", "cpu_percent", "load", "memory_gib", "disk_free_gib")
GPU = ("time", "util_percent", "memory_gib", "temperature_c", "power_w")
MAX_MACHINES = 256  # a log may name as many machines and GPUs as it likes
MAX_WARNINGS = 100
COLLAPSE = ("collapse", "predicted_share")
CHUNK = 1 << 22  # bytes
# Of what is waiting to be read, so many bytes of lines are parsed at once; of more, only every so
# many step lines. A parse takes 4 us, a million of them would be waited for.
MAX_PARSED = 1 << 23
STEP_LINE = b'{"event": "step"'  # how runlog writes one


def named(run: Path) -> Path:
    """The run's folder, given as a path or, if there is no run at that, by its name below runs/."""
    below = RUNS / run
    return below if ".." not in run.parts and _is_run(below) and not _is_run(run) else run


def _is_run(folder: Path) -> bool:
    return any(os.path.isfile(folder / file) for file in (LOG, "run_state.json"))


class Series:
    """Rows of numbers by column; NaN where an event has none."""

    def __init__(self, *names: str):
        self._columns = {name: array("d") for name in names}
        self._key = self._columns["step" if "step" in names else "time"]
        self._is_ascending, self._top = True, -math.inf

    def __len__(self) -> int:
        return len(self._key)

    def __getitem__(self, name: str) -> array:
        return self._columns[name]

    def add(self, event: dict) -> None:
        """A row of an event's numbers."""
        for name, column in self._columns.items():
            value = number(event.get(name))
            column.append(math.nan if value is None else value)
        if not self._key[-1] >= self._top:  # nor NaN
            self._is_ascending = False
        else:
            self._top = self._key[-1]

    def forget_after(self, last: float) -> None:
        """Drop the rows whose step is greater."""
        if self._is_ascending:
            if self._top > last:
                end = bisect_right(self._key, last)
                for column in self._columns.values():
                    del column[end:]
                self._top = self._key[-1] if self._key else -math.inf
            return
        kept = [not step > last for step in self._key]
        for column in self._columns.values():
            column[:] = array("d", compress(column, kept))

    def thinned(self, name: str, most: int) -> array:
        """At most about `most` values of a column, evenly spaced, the last one among them."""
        column = self._columns[name]
        stride = max(1, math.ceil(len(column) / most))
        return column[(len(column) - 1) % stride :: stride] if column else column


class History:
    """What the events of a log amount to; those that a resume made void are left out.

    start, end, hardware: the last such event, of each machine for hardware; of the end's results
    the test scores and what says whether validation got one class. steps, machines, gpus: numbers
    over time. evals, checkpoints: events, without their tables. nonfinite: the steps whose loss or
    gradient norm was not finite. begun_at: the first start, heard_at, moved_at: when anything, and
    when training, was last told of, unix s; longest_s: the longest that training has taken to get
    on; has_begun: whether a step was logged since the last start.
    """

    def __init__(self) -> None:
        self.start: dict = {}
        self.end: dict = {}
        self.starts, self.begun_at = 0, None
        self.steps = Series(*STEP)
        self.evals: list[dict] = []
        self.checkpoints: list[dict] = []
        self.hardware: dict[str, dict] = {}
        self.machines: dict[str, Series] = {}
        self.gpus: dict[str, Series] = {}
        self.warnings: deque[dict] = deque(maxlen=MAX_WARNINGS)
        self.nonfinite: list[float] = []
        self.heard_at = self.moved_at = None
        self.longest_s, self.has_begun = 0.0, False

    @classmethod
    def of(cls, events: Iterable[dict]) -> "History":
        """The history that these events make."""
        history = cls()
        for event in events:
            history.add(event)
        return history

    def add(self, event: dict) -> None:
        """Fold in one event."""
        kind, step = event["event"], number(event.get("step")) or 0.0
        self._note_time(kind, number(event.get("time")))
        if kind == "step":
            self.steps.add(event | {"step": step})
            self.has_begun = True
            if event.get("nonfinite"):
                self.nonfinite.append(step)
        elif kind == "eval":
            kept = {k: v for k, v in event.items() if k not in ("slices", "confusion")}
            self.evals.append(kept | {"step": step})
        elif kind == "checkpoint":
            self.checkpoints.append(event | {"step": step})
        elif kind == "hardware":
            self._add_hardware(event)
        elif kind == "warning":
            self.warnings.append(event)
        elif kind == "start":
            self.start, self.end, self.starts = event, {}, self.starts + 1
            self.begun_at = self.begun_at or number(event.get("time"))
            self.hardware, self.has_begun = {}, False  # it may be on other machines now
        elif kind == "end":
            self.end = {k: v for k, v in event.items() if k != "results"}
            scores = part(part(event, "results"), "test").items()
            self.end["test"] = {k: v for k, v in scores if not isinstance(v, dict | list)}
            found = part(part(event, "results"), "validation")
            self.end["validation"] = {k: found[k] for k in COLLAPSE if k in found}
        elif kind == "resume" and number(event.get("step", 0)) is not None:
            self._forget_after(step)

    def _note_time(self, kind: str, time: float | None) -> None:
        if time is None:
            return
        self.heard_at = time
        if kind in ("step", "eval", "checkpoint") and self.moved_at is not None:
            self.longest_s = max(self.longest_s, time - self.moved_at)
        if kind != "hardware":
            self.moved_at = time

    def _forget_after(self, step: float) -> None:
        self.steps.forget_after(step)
        for events in (self.evals, self.checkpoints):
            events[:] = [e for e in events if e["step"] <= step]
        self.nonfinite = [s for s in self.nonfinite if s <= step]

    def _add_hardware(self, event: dict) -> None:
        host = str(event.get("host") or self.start.get("host") or "")
        if host not in self.hardware and len(self.hardware) >= MAX_MACHINES:
            return
        self.hardware[host] = event
        self.machines.setdefault(host, Series(*SYSTEM)).add(event)
        for gpu in gpus_of(event):
            uuid = str(gpu.get("uuid"))
            if uuid in self.gpus or len(self.gpus) < MAX_MACHINES:
                row = gpu | {"time": event.get("time")}
                self.gpus.setdefault(uuid, Series(*GPU)).add(row)

    def last(self, name: str) -> float | None:
        """The last value of a column of the steps; None if there is none or it was not finite."""
        value = self.steps[name][-1] if len(self.steps) else math.nan
        return None if math.isnan(value) else value

    def reached(self) -> float | None:
        """The furthest step that the log tells of; not every one is logged."""
        told = [self.last("step"), *(e["step"] for e in (*self.evals[-1:], *self.checkpoints[-1:]))]
        return max((step for step in told if step is not None), default=None)

    def epoch(self) -> float | None:
        """How many times the training texts were seen by then."""
        done, length = self.reached(), self.plan("steps_per_epoch")
        return done / length if done is not None and length else self.last("epoch")

    def evaluations(self, split: str = "validation") -> list[dict]:
        """The evaluations of a split."""
        return [e for e in self.evals if e.get("split") == split]

    def best(self) -> dict:
        """The evaluation of the best checkpoint so far; empty before the first."""
        return next((e for e in reversed(self.evaluations()) if e.get("best") is True), {})

    def setting(self, name: str) -> object:
        """A setting's value by full key, None where the log has none."""
        return part(self.start, "config").get(name)

    def plan(self, name: str) -> float | None:
        """A number of the step arithmetic, such as total_steps."""
        return number(part(self.start, "steps").get(name))


def gpus_of(event: dict) -> list[dict]:
    """The GPUs of a hardware event."""
    gpus = event.get("gpus")
    return [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []


class Follower:
    """The history of a log that may come late, grow, be torn, cut off, moved away or begun anew."""

    def __init__(self, run: Path):
        self.path = run / LOG
        self.history = History()
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset, self._tail = 0, b""  # bytes read, and the last few of them
        self._torn: list[bytes] = []  # of a line without its end
        self._is_fresh = False  # another file of this name, of which no event was read yet
        self._passed = 0

    def poll(self) -> int:
        """Take in what is new; the number of events that were read."""
        return sum(1 for _ in self.new())

    def new(self) -> Iterator[dict]:
        """Take in what is new, giving each event that was read; nothing while there is no log."""
        with contextlib.suppress(OSError), open_regular(self.path) as file:
            found = os.fstat(file.fileno())
            self._begin_anew_unless_same(file, (found.st_dev, found.st_ino), found.st_size)
            stride = math.ceil((found.st_size - self._offset) / MAX_PARSED)
            file.seek(self._offset)
            while chunk := file.read(CHUNK):
                self._offset += len(chunk)
                self._tail = (self._tail + chunk)[-64:]
                for line in self._thinned(self._lines(chunk), stride):
                    if event := parse(line):
                        if self._is_fresh and event["event"] == "start":
                            self.history = History()  # else its earlier part was moved away
                        self._is_fresh = False
                        self.history.add(event)
                        yield event

    def _begin_anew_unless_same(self, file, identity: tuple[int, int], size: int) -> None:
        file.seek(max(0, self._offset - len(self._tail)))
        if (
            self._file not in (None, identity)
            or size < self._offset
            or file.read(len(self._tail)) != self._tail
        ):
            self._offset, self._tail, self._torn, self._is_fresh = 0, b"", [], True
        self._file = identity

    def _lines(self, chunk: bytes) -> list[bytes]:
        *whole, rest = chunk.split(b"\n")
        if whole:
            whole[0] = b"".join([*self._torn, whole[0]])
            self._torn = []
        if sum(map(len, self._torn)) < MAX_LINE:
            self._torn.append(rest)
        return whole

    def _thinned(self, lines: list[bytes], stride: int) -> Iterator[bytes]:
        """Not all step lines: every so many, the last, any before another event or not finite."""
        skipped = None
        for line in lines:
            if stride > 1 and line.startswith(STEP_LINE) and b'"nonfinite"' not in line:
                self._passed += 1
                if self._passed % stride:
                    skipped = line
                    continue
            elif skipped:
                yield skipped
            skipped = None
            yield line
        if skipped:
            yield skipped


def status(run: Path, history: History) -> dict:
    """run_state.json, or the log's end where that is newer, with `is_here` and `is_stopped`.

    A trainer of this machine whose process is gone is "dead"; one that is stopped has said nothing
    of it, so the system is asked.
    """
    for _ in range(2):  # a trainer may end between the look at its file and that at its process
        state = read_json(run / "run_state.json") or {}
        if (number(history.end.get("time")) or 0) > (number(state.get("time")) or 0):
            state |= history.end
        state["is_here"] = state.get("host") == socket.gethostname()
        state["is_stopped"] = False
        if state.get("status") != "running" or not state["is_here"]:
            return state
        try:
            os.kill(state.get("pid"), 0)  # sends nothing
            return state | {"is_stopped": _is_stopped(state.get("pid"))}
        except ProcessLookupError:
            continue
        except (OSError, TypeError, OverflowError):  # another user's, or no process id at all
            return state
    return state | {"status": "dead", "reason": "its process is gone; start it again to go on"}


def _is_stopped(pid: int) -> bool:
    """Whether a process is held by SIGSTOP or Ctrl-Z; False where there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
