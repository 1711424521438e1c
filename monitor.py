#!/usr/bin/env python3
"""Show a run from its directory, while it trains or afterwards. Reads only, and needs no torch.

On a terminal a block of lines is redrawn every second until the run has ended; elsewhere the block
is printed once, then a line for each new event.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm
from tqdm.utils import disp_trim

import hardware
from errors import MISSING, OK, USAGE, printable
from files import read_json
from runlog import number

LOG = "metrics.jsonl"
EVERY_S = 1.0
ENDED = ("completed", "preempted", "failed", "dead")
PLAIN_WIDTH = 160  # of lines that go to a file or a pipe
SCORES = ("f1_macro", "f1_positive", "accuracy", "roc_auc", "loss")


class Follower:
    """The events of a log that may grow, as `runlog.read` gives them; reads only what is new."""

    def __init__(self, run: Path):
        self.path = run / LOG
        self.events: list[dict] = []
        self._offset, self._torn = 0, b""

    def poll(self) -> list[dict]:
        """The events appended since the last call; none while there is no log."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self.__init__(self.path.parent)  # another log under the same name
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._torn = (self._torn + data).split(b"\n")
        new = [e for e in map(_parse, whole) if isinstance(e.get("event"), str)]
        for event in new:
            if event["event"] == "resume" and (step := number(event.get("step", 0))) is not None:
                self.events = [e for e in self.events if (number(e.get("step")) or 0) <= step]
            self.events.append(event)
        return new

    def last(self, kind: str, **fields: object) -> dict:
        """The last event of a kind whose `fields` are as given; empty where there is none."""
        wanted = {"event": kind, **fields}
        found = (e for e in reversed(self.events) if all(e.get(k) == v for k, v in wanted.items()))
        return next(found, {})


def _parse(line: bytes) -> dict:
    try:
        value = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _show(record: object, *names: str, form: str | None = None) -> str:
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    if form is not None:
        record = None if (value := number(record)) is None else format(value, form)
    return "n/a" if record is None else str(record)


# --- what is shown --------------------------------------------------------------------------------


def status(run: Path, log: Follower) -> dict:
    """run_state.json, or the log's end where that is newer; a trainer that is gone is "dead"."""
    for _ in range(2):  # a trainer may end between the look at its file and that at its process
        state = read_json(run / "run_state.json") or {}
        end = log.last("end")
        if (number(end.get("time")) or 0) > (number(state.get("time")) or 0):
            state |= end
        state["is_here"] = state.get("host") == socket.gethostname()
        if state.get("status") != "running" or not state["is_here"]:
            return state
        try:
            os.kill(state.get("pid"), 0)  # sends nothing
            return state
        except ProcessLookupError:
            continue
        except (OSError, TypeError, OverflowError):  # another user's, or no process id at all
            return state
    return state | {"status": "dead", "reason": "its process is gone; start it again to go on"}


def block(run: Path, log: Follower, width: int) -> list[str]:
    """All that is shown of a run, as lines that fit; here alone text from it is made harmless."""
    state, start, step = status(run, log), log.last("start"), log.last("step")
    is_running = state.get("status") == "running"
    scratch, why = start.get("from_scratch"), state.get("reason")
    origin = "from scratch" if scratch is True else "pretrained" if scratch is False else "n/a"
    lines = [
        f"run       {run.resolve().name}",
        f"model     {_show(start, 'config', 'model.name')} ({origin})",
        f"status    {_show(state, 'status')} on {_show(state, 'host')}"
        + (f": {why}" if why else ""),
        _bar(start, step, min(width, 79), has_time_left=is_running),
        f"training  loss {_show(step, 'loss', form='.4g')}  lr {_show(step, 'lr', form='.4g')}  "
        f"gradient norm {_show(step, 'grad_norm', form='.4g')}  "
        f"epoch {_show(step, 'epoch', form='.2f')}",
        f"speed     {_show(step, 'examples_per_s', form=',.0f')} examples/s  "
        f"{_show(step, 'tokens_per_s', form=',.0f')} tokens/s  "
        f"padding {_show(step, 'padding_share', form='.0%')}  "
        f"data wait {_show(step, 'data_wait_share', form='.0%')}",
        *_scores(start, log),
        *_machine(run, log, is_live=is_running and state["is_here"]),
    ]
    return [disp_trim(printable(line, width), width) for line in lines]


def _bar(start: dict, step: dict, width: int, *, has_time_left: bool) -> str:
    # No tqdm object: that goes by its own clock, which knows nothing of a run joined late.
    steps = start.get("steps") if isinstance(start.get("steps"), dict) else {}
    values = (step.get("step"), steps.get("total_steps"), step.get("step_s"))
    done, total, step_s = (number(value) or 0 for value in values)
    if not 0 <= done <= total or not 0 < total < 1e12:
        return f"progress  step {_show(step, 'step', form='.0f')} of n/a"
    return tqdm.format_meter(
        int(done),
        int(total),
        elapsed=0,
        rate=1 / step_s if 1e-9 < step_s < 1e9 else None,
        ncols=width,
        bar_format="{l_bar}{bar}| step {n_fmt}/{total_fmt}"
        + (", {remaining} left" if has_time_left else ""),
        ascii=not (sys.stdout.encoding or "").lower().startswith("utf"),
    )


def _scores(start: dict, log: Follower) -> Iterator[str]:
    last = log.last("eval", split="validation")
    best = log.last("eval", split="validation", best=True)
    baselines = start.get("baselines") if isinstance(start.get("baselines"), dict) else {}
    yield f"scores    on validation; best by {_show(start, 'config', 'evaluation.metric')}"
    yield " " * 19 + "".join(name.rjust(12) for name in SCORES)
    for name, row in (
        (f"last, step {_show(last, 'step', form='.0f')}", last),
        (f"best, step {_show(best, 'step', form='.0f')}", best),
        ("majority", baselines.get("majority")),
        ("tfidf", baselines.get("tfidf")),
    ):
        yield f"  {name:17}" + "".join(_show(row, k, form=".4f").rjust(12) for k in SCORES)


def _machine(run: Path, log: Follower, *, is_live: bool) -> Iterator[str]:
    record, why, age = log.last("hardware"), None, "now"
    if is_live:
        gpus, why = hardware.gpus()
        record = {"gpus": gpus, **hardware.system(), "disk_free_gib": hardware.free_gib(run)}
    else:
        logged = number(record.get("time"))
        age = "n/a" if logged is None else f"{(time.time() - logged) / 60:.1f} min ago"
    gpus = record.get("gpus") if isinstance(record.get("gpus"), list) else []
    load, cores = _show(record, "load", form=".2f"), _show(record, "cores", form=".0f")
    count = len(gpus) if record else "n/a"
    disk = _show(record, "disk_free_gib", form=",.1f")
    yield (
        f"machine   load {load} on {cores} cores, {_memory(record)}, disk {disk} GiB free, "
        f"{count} GPUs ({age})"
    )
    if why:
        yield f"  no GPU: {why}"
    for gpu in gpus:
        util, heat, power = (
            _show(gpu, name, form=".0f") for name in ("util_percent", "temperature_c", "power_w")
        )
        yield (
            f"  {_show(gpu, 'uuid')[:12]} {_show(gpu, 'name')[:24]}  {util} %  {_memory(gpu)}  "
            f"{heat} C  {power} W"
        )


def _memory(record: object) -> str:
    used, total = (_show(record, k, form=".1f") for k in ("memory_gib", "memory_total_gib"))
    return f"{used} of {total} GiB"


def plain_line(event: dict) -> str:
    """One event on a line: its name and every single value."""
    shown = (
        f"{k} {_show(event, k, form=None if number(v) is None else '.6g')}"
        for k, v in event.items()
        if k not in ("event", "time") and not isinstance(v, dict | list)
    )
    return printable("  ".join([event["event"], *shown]), PLAIN_WIDTH)


# --- following ------------------------------------------------------------------------------------


def find(asked: Path | None) -> Path | None:
    """The run asked for, else the newest below runs/ by its log; None while there is no log."""
    logs = Path("runs").glob(f"*/{LOG}") if asked is None else [asked / LOG]
    times = {log.parent: os.path.getmtime(log) for log in logs if os.path.isfile(log)}
    return max(times, key=times.get, default=None)


def follow(run: Path, *, once: bool) -> None:
    """Show a run until it has ended or its trainer is dead, or only what is known of it now."""
    is_live = not once and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    log, has_ended = Follower(run), once
    log.poll()
    width = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else PLAIN_WIDTH
    if not is_live:
        print(*block(run, log, width), sep="\n", flush=True)
    try:
        if is_live:
            print("\x1b[?1049h\x1b[?25l", end="")  # the terminal's other screen, without a cursor
        while not has_ended:
            has_ended = status(run, log).get("status") in ENDED
            new = log.poll()  # after that look, so that nothing is missed
            if is_live:
                columns, rows = shutil.get_terminal_size()
                lines = [f"{line}\x1b[K\n" for line in block(run, log, columns - 1)[: rows - 1]]
                print("\x1b[H", *lines, "\x1b[J", sep="", end="", flush=True)
            elif new:
                print(*map(plain_line, new), sep="\n", flush=True)
            time.sleep(0 if has_ended else EVERY_S)
    finally:
        if is_live:
            print("\x1b[?25h\x1b[?1049l", end="", flush=True)
            print(*block(run, log, width), sep="\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the monitor; the exit code of errors.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="default: the newest below runs/")
    parser.add_argument("--once", action="store_true", help="print what is known and leave")
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        return USAGE if end.code else OK
    where = printable((args.run or Path("runs/*")) / LOG, 200)
    is_waiting = False
    try:
        while (run := find(args.run)) is None:
            if args.once:
                print(f"no run: there is no {where}", file=sys.stderr)
                return MISSING
            if not is_waiting:
                print(f"no run yet: waiting for {where}", flush=True)
            is_waiting = True
            time.sleep(EVERY_S)
        follow(run, once=args.once)
    except KeyboardInterrupt:
        pass
    return OK


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # restores the screen
    sys.stdout.reconfigure(errors="backslashreplace")  # names may not fit the terminal's encoding
    sys.exit(main())
