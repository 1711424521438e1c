"""Write and read `metrics.jsonl`: one JSON object a line, append-only, flushed. No torch here."""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from files import open_own, open_regular

MAX_UNWRITTEN = 64 << 20  # bytes kept while the disk is full
MAX_LINE = 256 << 20  # bytes; a thousand labels and some slices give tens of MB of confusion


class RunLog:
    """Appends events to a log; `RunLog(None)` takes them and keeps nothing (ranks other than 0).

    On a full disk lines are kept until there is room: training goes on, `sync` fails.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._lock = threading.Lock()  # the hardware thread writes too
        self._file = None
        self._unwritten = b""
        self.continues = path is not None and path.exists() and path.stat().st_size > 0
        if path is not None:
            torn = self.continues and not _ends_with_newline(path)
            self._file = open_own(path, "ab")
            self._unwritten = b"\n" if torn else b""

    def write(self, event: str, **values: object) -> None:
        """One line: the event, the time in unix seconds, and the values; flushed to the system."""
        if self._file is None:
            return
        lost: list[str] = []
        record = {"event": event, "time": round(time.time(), 3)} | finite(values, lost)
        if lost:
            record["nonfinite"] = lost
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._lock:
            if self._file is not None and len(self._unwritten) < MAX_UNWRITTEN:
                self._unwritten += line.encode(errors="backslashreplace")
                with contextlib.suppress(OSError):
                    self._flush()

    def _flush(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def sync(self) -> None:
        """Return once all lines are on disk; OSError if they cannot be written."""
        with self._lock:
            if self._file is not None:
                self._flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; later events are dropped."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def read(path: Path) -> list[dict]:
    """The events that hold: torn or foreign lines and what a resume made void are left out."""
    kept: list[dict] = []
    last = math.inf  # of all later resumes, the earliest step that one of them went on after
    for event in reversed(list(lines(path))):
        if (number(event.get("step")) or 0) <= last:
            kept.append(event)
        if event["event"] == "resume" and (step := number(event.get("step", 0))) is not None:
            last = min(last, step)
    return kept[::-1]


def number(value: object) -> float | None:
    """A finite number of an event, which may hold anything; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # nor NaN, infinite, too long for a float


def part(record: object, name: str) -> dict:
    """The object of that name within an event, which may hold anything; empty for what is none."""
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}


def baseline(scored: object, name: str, score: str) -> float | None:
    """A baseline's score, of the log's start or of a split's results."""
    return number(part(part(scored, "baselines"), name).get(score))


def lines(path: Path) -> Iterator[dict]:
    """Every well-formed event of a log in the order written; none where there is no log."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(MAX_LINE):  # a longer one comes in pieces, none of them whole
            if event := parse(line):
                yield event


def parse(line: bytes) -> dict | None:
    """The event of a line, or None if it holds none."""
    text = line.decode(errors="replace")
    try:
        try:
            event = json.loads(text)
        except json.JSONDecodeError:
            return None
        except ValueError:  # an integer of thousands of digits, which Python does not convert
            event = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("event"), str)
    return event if is_event else None


def worked_s(events: Iterable[dict]) -> float | None:
    """Seconds that a run's processes worked; pauses between them do not count. None: no times."""
    total, previous = 0.0, None
    for event in events:
        moment = number(event.get("time"))
        if moment is None:
            continue
        if previous is not None and event["event"] != "start":
            total += max(0.0, moment - previous)  # a clock may be set back
        previous = moment
    return None if previous is None else total


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def finite(value: object, lost: list[str], name: str = "") -> object:
    """`value` with NaN and infinities as null, their names added to `lost`."""
    if isinstance(value, dict):
        return {k: finite(v, lost, f"{name}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v, lost, name) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(name)
        return None
    return value
