"""A run's log for other programs: one flat CSV, or TensorBoard events. No torch here.

Both have what `runlog.read` has: what a resume made void is left out.
"""

import contextlib
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import runlog
from errors import MISSING, UNAVAILABLE, USAGE, Refusal, printable
from files import replacing, writing
from history import LOG, gpus_of
from runlog import number

FIRST = ("event", "time", "step", "epoch", "split")  # columns
FORMULA = ("=", "+", "-", "@")  # a text that begins so is run by a spreadsheet
MAX_DEPTH = 8  # of an event; ours has 5: slices, column, value, predicted_share, class
MAX_COLUMNS = 16_384  # as many as a spreadsheet takes
MAX_TEXT = 1000  # characters
MAX_STEP = 1 << 62
MAX_FLOAT = 3.4e38  # of 32 bits, as TensorBoard keeps them
UNTOLD = ("event", "time", "step", "split", "gpus", "posted")  # of an event's numbers
SUFFIX = ".export"  # of our event files, so that a second export replaces the first


def read(run: Path) -> list[dict]:
    """The events of a run that hold; Refusal 66 if it has no log."""
    if not os.path.isfile(run / LOG):
        raise Refusal(MISSING, f"{printable(run, 300)}: there is no {LOG} in it")
    try:
        return runlog.read(run / LOG)
    except OSError as error:
        raise Refusal(MISSING, f"{printable(run / LOG, 300)}: {error.strerror}") from None


def scalars(value: object, *path: str) -> Iterator[tuple[tuple[str, ...], object]]:
    """Each number, text and truth value in an event, with where it is; no confusion matrices."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, below in items if len(path) < MAX_DEPTH else ():
            if not (name == "confusion" and isinstance(below, list)):
                yield from scalars(below, *path, str(name))
    elif value is not None:
        yield path, value


# --- CSV ------------------------------------------------------------------------------------------


def export_csv(run: Path, out: TextIO) -> None:
    """Write the step and eval events as a table, a row for each; null and not finite are empty.

    Nested fields are columns such as slices.lang.ar.f1_macro and predicted_share.0.
    """
    events = [e for e in read(run) if e["event"] in ("step", "eval")]
    names = dict.fromkeys((name,) for name in FIRST)  # first pass: which columns there are
    for event in events:
        names |= dict.fromkeys(path for path, _ in scalars(event))
    columns = list(names)[:MAX_COLUMNS]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_text(".".join(path)) for path in columns)
    for event in events:
        row = dict(scalars(event))
        writer.writerow(_cell(row.get(path)) for path in columns)


def write_csv(run: Path, path: Path) -> None:
    """`export_csv` to a file, whole or not at all."""
    _refuse_within_run(path)
    with writing(path), replacing(path) as file:
        export_csv(run, file)


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    return "" if number(value) is None else value


def _text(text: str) -> str:
    """On one line, and told from a formula by an apostrophe (OWASP, CSV injection)."""
    shown = printable(text, MAX_TEXT)
    return f"'{shown}" if shown.startswith(FORMULA) else shown


# --- TensorBoard ----------------------------------------------------------------------------------


def export_tensorboard(run: Path, folder: Path) -> int:
    """Write the numbers of the log as TensorBoard events, with their times; how many there are.

    Tags: train/loss, validation/f1_macro, validation/lang/ar/f1_macro, hardware/<uuid>/power_w.
    What an earlier export left in `folder` is replaced. Raises Refusal 64 if that lies in a run,
    66 without a log, 69 without the tensorboard package, 73 if it cannot be written.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise Refusal(UNAVAILABLE, f"{error}; pip install tensorboard") from None
    events = read(run)
    _refuse_within_run(folder)
    count = 0
    with writing(folder):
        earlier = list(folder.glob(f"events.out.tfevents.*{SUFFIX}"))
        with contextlib.closing(EventFileWriter(str(folder), filename_suffix=SUFFIX)) as writer:
            for step, time, values in _tagged(events):
                summary = Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values])
                writer.add_event(Event(wall_time=time, step=step, summary=summary))
                count += len(values)
        for path in earlier:
            path.unlink()
    return count


def _tagged(events: list[dict]) -> Iterator[tuple[int, float, list[tuple[str, float]]]]:
    """Step, time, and tags with numbers of each event; hardware has the step that was reached."""
    reached = 0
    for event in events:
        step, time = (number(event.get(name)) for name in ("step", "time"))
        if step is not None and 0 <= step < MAX_STEP:
            reached = int(step)
        values = [
            ("/".join(printable(part, MAX_TEXT) for part in path), known)
            for path, value in _numbers(event)
            if (known := number(value)) is not None and abs(known) < MAX_FLOAT
        ]
        if time is not None and values:
            yield reached, time, values


def _numbers(event: dict) -> Iterator[tuple[tuple[str, ...], object]]:
    """The numbers of an event below what it is about."""
    kept = {k: v for k, v in event.items() if k not in UNTOLD}
    if event["event"] == "step":
        yield from scalars(kept, "train")
    elif event["event"] == "eval":
        split = str(event.get("split") or "validation")
        slices = kept.pop("slices", None)
        yield from scalars(kept, split)
        yield from scalars(slices, split)
    elif event["event"] == "hardware":
        yield from scalars(kept, "hardware", str(event.get("host") or "machine"))
        for gpu in gpus_of(event):
            yield from scalars(gpu, "hardware", str(gpu.get("uuid")))


def _refuse_within_run(path: Path) -> None:
    """Refusal 64 for a place within a run: nothing but its trainer writes there."""
    place = path.resolve()
    for folder in (place, *place.parents):
        if os.path.isfile(folder / LOG):
            told = f"lies in the run {printable(folder.name, 200)}; choose another place"
            raise Refusal(USAGE, f"{printable(path, 300)}: {told}")
