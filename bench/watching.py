#!/usr/bin/env python3
"""What watching costs: first picture, a log of a million lines, a redraw, the trainer's steps.

usage: bench/watching.py [--rounds N] [--steps N] [--model FOLDER --data FOLDER]

Steps are timed in one process after another: hardware thread as good as off, as it is by default,
and with the monitor on a terminal beside it; the order turns with each round. The model is
bench/base_shape.py's, the data a folder with train.csv and dev.csv; without them a small model from
scratch is trained on the bundled sample.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import history
import runlog
import screen
from view import View

ROOT = Path(history.__file__).resolve().parent
LINES = 1_000_000
LAST = "alarms"  # of a picture


def write_log(run: Path, lines: int) -> None:
    """A run that has logged so many lines, one in two hundred of them about the machine."""
    run.mkdir(parents=True)
    log = runlog.RunLog(run / history.LOG)
    steps = {"total_steps": 10 * lines, "warmup_steps": 10}
    log.write("start", config={"optimizer.lr": 1e-3}, steps=steps, labels=["0", "1"])
    log.close()
    fields = {"epoch": 1.0, "grad_norm": 1.234567, "padding_share": 0.0123, "step_s": 0.7012}
    fields |= {"examples_per_s": 45.12, "tokens_per_s": 1024.1, "data_wait_share": 0.01}
    with open(run / history.LOG, "a") as file:
        for i in range(1, lines):
            event = {
                "event": "step",
                "time": time.time(),
                "step": 10 * i,
                "loss": 1 / i,
                "lr": 1e-3,
            }
            if i % 200 == 0:
                event = {"event": "hardware", "time": time.time(), "load": 1.0, "cores": 2}
            file.write(json.dumps(event | fields) + "\n")


@contextlib.contextmanager
def monitor_on_a_terminal(run: Path):
    """The monitor beside the block, on a terminal of 80 by 24 that nobody has to read."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, ROOT / "monitor.py", run],
        stdout=terminal,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal)
    try:
        yield master
    finally:
        process.kill()
        process.wait()
        os.close(master)


def first_picture_s(run: Path) -> float:
    """Seconds from starting the monitor to all of a picture."""
    began, shown = time.perf_counter(), b""
    with monitor_on_a_terminal(run) as master:
        while LAST.encode() not in shown:
            shown += os.read(master, 1 << 16)
        return time.perf_counter() - began


def peak_mib(run: Path) -> float:
    """Peak resident memory of the monitor that shows a run once."""
    code = f"import resource, sys; sys.path.insert(0, '{ROOT}'); import monitor\n"
    code += "monitor.main(sys.argv[1:])\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    command = [sys.executable, "-c", code, str(run), "--once"]
    return float(subprocess.check_output(command, text=True).splitlines()[-1])


def redraw_ms(run: Path, columns: int, rows: int) -> float:
    """Milliseconds of taking in what is new and drawing it; median of fifty."""
    follower, spent = history.Follower(run), []
    follower.poll()
    for _ in range(50):
        began = time.perf_counter()
        follower.poll()
        view = View(run, follower.history, time.time())
        screen.draw(view, columns, rows, colour=True, unicode=True)
        spent.append(1000 * (time.perf_counter() - began))
    return median(spent)


def step_s(folder: Path, settings: list[str], hardware_s: float, *, is_watched: bool) -> float:
    """Median seconds of a step of a short training, after its first three."""
    run = folder / f"{hardware_s}-{is_watched}-{time.monotonic_ns()}"
    command = [sys.executable, ROOT / "train.py", f"run.dir={run.parent}", f"run.name={run.name}"]
    command += ["log.every=1", f"log.hardware_s={hardware_s}", *settings]
    with contextlib.ExitStack() as stack:
        if is_watched:
            master = stack.enter_context(monitor_on_a_terminal(run))
        trainer = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
        while trainer.poll() is None:
            if is_watched and select.select([master], [], [], 0.1)[0]:
                os.read(master, 1 << 16)
            time.sleep(0 if is_watched else 0.1)
    times = [e["step_s"] for e in runlog.read(run / history.LOG) if e["event"] == "step"]
    return median(times[3:])


def main() -> None:
    """Measure and print, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, lines in (("small", 100), ("huge", LINES)):
            run = folder / kind
            write_log(run, lines)
            first = [first_picture_s(run) for _ in range(5)]
            print(f"log of {lines:,} lines, {(run / history.LOG).stat().st_size / 1e6:.0f} MB")
            print(f"  first picture {median(first):.3f} s ({min(first):.3f} to {max(first):.3f})")
            print(f"  peak memory {peak_mib(run):.0f} MiB")
            for columns, rows in ((80, 24), (160, 50)):
                print(f"  redraw at {columns} x {rows}: {redraw_ms(run, columns, rows):.2f} ms")
        settings = [f"train.max_steps={args.steps}", "evaluation.every=10000", "run.device=cpu"]
        settings += [f"data.cache_dir={folder}/cache", f"model.name={args.model or 'scratch'}"]
        if args.data:
            settings += [
                f"data.train={args.data}/train.csv",
                f"data.validation={args.data}/dev.csv",
            ]
            settings += ["data.test="]
        ways = [("hardware thread off", 1e6, False), ("as by default, 10 s", 10, False)]
        ways += [("a look each second", 1, False), ("as by default, and the monitor", 10, True)]
        seconds: dict[str, list[float]] = {what: [] for what, _, _ in ways}
        for turn in range(args.rounds):
            for what, every, is_watched in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                seconds[what].append(step_s(folder, settings, every, is_watched=is_watched))
        base = median(seconds[ways[0][0]])
        for what, found in seconds.items():
            span = f"{min(found):.4f} to {max(found):.4f}"
            print(
                f"{what}: {median(found):.4f} s a step ({span}), {median(found) / base:.3f} times"
            )


if __name__ == "__main__":
    main()
