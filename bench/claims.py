#!/usr/bin/env python3
"""What was claimed of the change to this program, beside what is measured.

usage: claims.py --model FOLDER --data FOLDER [FOLDER ...] --out FOLDER [--lang en] [--jobs N]
                 [--seeds 42 43 ...] [--epochs E] [--table] [--time [--rounds N] [--precision P]]

Claimed: epochs 20 to 35 % faster, 20 to 30 % less memory, 30 to 50 % fewer epochs, 1 to 3 points
of F1 more. The old way: padded to 128, rate 1e-5, constant or linear (the better one on
validation), no class weights, best checkpoint by loss. Both sides train for as many epochs, scored
after each. A folder of the data holds train.csv, dev.csv and test.csv with text and label; of files
with a column lang the rows of --lang are taken. What FOLDER of --out has is not run again. --table
runs nothing; --time measures epochs and memory, for which the machine should be idle, in bf16 or
with --precision fp32.

Scores are of our loop for both sides, without padding, as padding changes no result beyond rounding
and which dropout masks are drawn (tests/test_packing.py); time and memory of the old way are those
of Hugging Face Trainer, padded.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import trials
from trials import SEEDS, Trial

OLD = {"optimizer.lr": 1e-5, "train.class_weights": "none", "train.precision": "bf16"}
NEW = {"optimizer.lr": 2e-5, "train.class_weights": "balanced", "train.precision": "bf16"}
RATE = OLD | {"optimizer.lr": NEW["optimizer.lr"]}
WEIGHTS = OLD | {"train.class_weights": NEW["train.class_weights"]}
SCORES = ("f1_macro", "f1_positive")


def old_way(data: str, seed: int, schedule: str, settings: dict, name: str) -> Trial:
    """A trial with the old settings or one of them changed."""
    return Trial(data, f"{name}-{schedule}", seed, settings | {"schedule": schedule})


def ours(data: str, seed: int) -> Trial:
    """A trial with the settings of config.yaml."""
    return Trial(data, "config", seed, NEW)


# --- what follows from the scores of each epoch ---------------------------------------------------


def by_loss(epochs: Sequence[dict]) -> dict:
    """The epoch of least loss on validation."""
    return min(epochs, key=lambda e: e["validation"]["loss"])


def by_f1(epochs: Sequence[dict]) -> dict:
    """The epoch of the highest F1 macro on validation."""
    return max(epochs, key=lambda e: e["validation"]["f1_macro"])


Choice = Callable[[Sequence[dict]], dict]


def on_test(
    rows: Sequence[dict], choose: Choice, score: str, *, tuned: bool = False, split: str = "test"
) -> np.ndarray:
    """A score on test, or another split, of the epoch that is chosen on validation, by seed."""
    chosen = [choose(row["epochs"])[split] for row in rows]
    return np.array([(c["tuned"] if tuned else c)[score] for c in chosen])


def better_schedule(done: dict, data: str, seeds: Sequence[int]) -> str:
    """Constant or linear, by the mean F1 macro on validation of the epochs of least loss."""

    def value(schedule: str) -> float:
        rows = [done[old_way(data, s, schedule, OLD, "old").key] for s in seeds]
        return statistics.mean(by_loss(r["epochs"])["validation"]["f1_macro"] for r in rows)

    return max(("linear", "constant"), key=value)


def epochs_until(epochs: Sequence[dict], level: float) -> float:
    """The first epoch, from 1, whose F1 macro on validation is as high; NaN if none is."""
    reached = [i for i, e in enumerate(epochs, 1) if e["validation"]["f1_macro"] >= level]
    return reached[0] if reached else np.nan


def mean_of(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds."""
    return f"{values.mean():.3f} ({values.std(ddof=1):.3f})"


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Mean of a - b over paired seeds, and its 95 % interval by Student's t."""
    from scipy.stats import t

    gap = a - b
    half = t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / len(gap) ** 0.5
    return f"{gap.mean():+.3f} [{gap.mean() - half:+.3f}, {gap.mean() + half:+.3f}]"


def table(done: dict, data: str, seeds: Sequence[int]) -> None:
    """The rows of one set: each change alone, all of them, each beside the old way."""
    schedule = better_schedule(done, data, seeds)

    def rows(name: str, settings: dict, way: str = schedule) -> list[dict]:
        return [done[old_way(data, s, way, settings, name).key] for s in seeds]

    old = rows("old", OLD)
    both = {
        "the old way": (old, by_loss),
        "best by F1 alone": (old, by_f1),
        "rate 2e-5 alone": (rows("rate", RATE), by_loss),
        "cosine alone": (rows("old", OLD, "cosine"), by_loss),
        "class weights alone": (rows("weights", WEIGHTS), by_loss),
        "all: config.yaml": ([done[ours(data, s).key] for s in seeds], by_f1),
    }
    print(f"\n{data}, {len(seeds)} seeds; the old way's schedule is {schedule}\n")
    print("| | macro-F1 | difference | F1 positive | difference | epochs to the old best |")
    print("|---|---|---|---|---|---|")
    levels = [by_f1(row["epochs"])["validation"]["f1_macro"] for row in old]
    for name, (some, choose) in both.items():
        cells = []
        for score in SCORES:
            values, before = on_test(some, choose, score), on_test(old, by_loss, score)
            cells += [
                mean_of(values),
                "" if some is old and choose is by_loss else difference(values, before),
            ]
        needed = [epochs_until(r["epochs"], level) for r, level in zip(some, levels, strict=True)]
        reached = np.isfinite(needed).sum()
        told = (
            f"{np.nanmean(needed):.1f} (reached by {reached} of {len(needed)})"
            if reached
            else "never"
        )
        print(f"| {name} | {' | '.join(cells)} | {told} |")
    tuned = [on_test(both["all: config.yaml"][0], by_f1, s, tuned=True) for s in SCORES]
    cells = [
        cell
        for s, values in zip(SCORES, tuned, strict=True)
        for cell in (mean_of(values), difference(values, on_test(old, by_loss, s)))
    ]
    print(f"| all, with the fitted threshold | {' | '.join(cells)} | |")


# --- time and memory ------------------------------------------------------------------------------

TIMED = {
    "the old way: Trainer, padded to 128": ("trainer", {}),
    "padding-free alone": (
        "ours",
        {"speed.active_vocabulary": "false", "speed.first_position": "false"},
    ),
    "config.yaml with speed.padding=max": ("ours", {"speed.padding": "max"}),
    "all: config.yaml": ("ours", {}),
}


def time_all(args: argparse.Namespace, names: Sequence[str]) -> None:
    """One epoch and an evaluation of each, in turn, in processes of their own."""
    path = args.out / "times.jsonl"
    for data in names:
        for _ in range(args.rounds):
            for what in TIMED:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", what, data]
                line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                print(line.strip().splitlines()[-1], flush=True)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(line.strip().splitlines()[-1] + "\n")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line.get("precision", "bf16") == args.precision]
    print("\n| one epoch and an evaluation | set | s | less than the old way | peak GiB | less |")
    print("|---|---|---|---|---|---|")
    for data in names:
        of = {w: [x for x in lines if (x["what"], x["data"]) == (w, data)] for w in TIMED}
        first = of[next(iter(TIMED))]
        old_s, old_gib = (statistics.median(x[k] for x in first) for k in ("seconds", "gib"))
        for what, some in of.items():
            seconds, gib = (statistics.median(x[k] for x in some) for k in ("seconds", "gib"))
            spread = (
                f"{min(x['seconds'] for x in some):.1f} to {max(x['seconds'] for x in some):.1f}"
            )
            print(
                f"| {what} | {data} | {seconds:.1f} ({spread}) | {1 - seconds / old_s:.0%} "
                f"| {gib:.2f} | {1 - gib / old_gib:.0%} |"
            )


def time_one(args: argparse.Namespace, what: str, data: str) -> None:
    """Seconds of training for an epoch with its evaluation, and the peak memory of this process."""
    by, settings = TIMED[what]
    folder = args.out / "data" / data
    seconds = (
        epoch_of_trainer(folder, args) if by == "trainer" else epoch_of_ours(folder, args, settings)
    )
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"what": what, "data": data, "precision": args.precision}
    print(json.dumps(found | {"seconds": seconds, "gib": gib}))


def epoch_of_ours(folder: Path, args: argparse.Namespace, settings: dict) -> float:
    """An epoch of train.py's loop."""
    settings = NEW | settings | {"data.test": "", "train.precision": args.precision}
    trial = Trial(folder.name, "time", 42, settings)
    return trials.of_ours(trial, folder, args.model, 1, time.perf_counter)["cpu_s"]


def epoch_of_trainer(folder: Path, args: argparse.Namespace) -> float:
    """An epoch of Hugging Face Trainer with every text padded to 128."""
    padded = {"schedule": "linear", "padding": "max_length", "train.precision": args.precision}
    trial = Trial(folder.name, "time", 42, OLD | padded)
    return trials.of_trainer(trial, folder, args.model, 1, time.perf_counter)["cpu_s"]


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--lang", default="en")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        time_one(args, *args.one)
        return
    names = trials.prepare_data(args.data, args.out, args.lang)
    if args.time:
        time_all(args, names)
        return

    def run(some: list[Trial]) -> None:
        if not args.table:
            trials.run(some, args.out, args.model, args.epochs, args.jobs)

    pairs = [(data, seed) for seed in args.seeds for data in names]
    run([ours(d, s) for d, s in pairs])
    ways = ("linear", "constant", "cosine")
    run([old_way(d, s, way, OLD, "old") for way in ways for d, s in pairs])
    done = trials.outcomes(args.out)
    chosen = {data: better_schedule(done, data, args.seeds) for data in names}
    changes = {"rate": RATE, "weights": WEIGHTS}
    run([old_way(d, s, chosen[d], c, n) for n, c in changes.items() for d, s in pairs])
    done = trials.outcomes(args.out)
    for data in names:
        table(done, data, args.seeds)


if __name__ == "__main__":
    main()
