#!/usr/bin/env python3
"""What might raise scores, each beside the same training without it.

usage: run.py --model FOLDER --data FOLDER [FOLDER ...] --out FOLDER [--lang en] [--jobs N]
              [--seeds 42 43 ...] [--epochs E] [--lr LR] [--precision bf16|fp32]
              [--only NAME ...] [--table]

Paired over seeds, on each set; the best epoch is chosen by F1 macro on validation. What FOLDER of
--out has is not run again.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trials
from claims import by_f1, difference, mean_of, on_test
from trials import SEEDS, Trial

BASE = {"train.class_weights": "balanced"}
BASELINE = "as it is"
TRIES = {
    BASELINE: {"idea": "Averaging"},  # which changes nothing, but scores means beside it
    "layer decay 0.9": {"optimizer.layer_decay": 0.9},
    "layer decay 0.75": {"optimizer.layer_decay": 0.75},
    "a new top layer": {"idea": "NewTopLayer"},
    "R-Drop": {"idea": "RDrop"},
    "adversarial noise on the embeddings": {"idea": "AdversarialNoise"},
    "label smoothing 0.1": {"train.label_smoothing": 0.1},
    "twice the rate": {"rate": 2.0},
    "twice the epochs": {"epochs": 2.0},
    "cut to 32 tokens: head_tail": {"data.max_length": 32},
    "cut to 32 tokens: head": {"data.max_length": 32, "data.truncation": "head"},
    "cut to 32 tokens: tail": {"data.max_length": 32, "data.truncation": "tail"},
    "no class weights": {"train.class_weights": "none"},
}


def trial(args: argparse.Namespace, name: str, data: str, seed: int) -> Trial:
    """One training with one of TRIES."""
    import ideas

    change = dict(TRIES[name])
    idea, longer = change.pop("idea", None), change.pop("epochs", 1.0)
    rate = {"optimizer.lr": args.lr * change.pop("rate", 1.0)}
    settings = BASE | {"train.precision": args.precision} | rate | change
    idea = getattr(ideas, idea) if idea else None
    label = f"try-{name}-lr{args.lr:g}-epochs{args.epochs:g}".replace(" ", "-").replace(":", "")
    return Trial(data, label, seed, settings, idea, epochs=args.epochs * longer)


MEANS = {
    f"mean of the weights, {what}": f"-mean-of-{n}"
    for what, n in (
        ("20 steps", 20),
        ("50 steps", 50),
        ("100 steps", 100),
        ("from a third on", "most"),
    )
}


def table(args: argparse.Namespace, data: str) -> None:
    """Each try that has all seeds, with its difference to the baseline."""
    done = trials.outcomes(args.out)

    def rows(name: str) -> list[dict]:
        keys = [trial(args, name, data, s).key for s in args.seeds]
        return [done[k] for k in keys] if all(k in done for k in keys) else []

    base = rows(BASELINE)
    found = {name: rows(name) for name in args.only or TRIES}
    for name, other in MEANS.items():
        keys = [trial(args, BASELINE, data, s) for s in args.seeds]
        keys = [replace(t, name=t.name + other).key for t in keys]
        found[name] = [done[k] for k in keys] if all(k in done for k in keys) else []
    print(f"\n{data}: rate {args.lr:g}, {args.epochs:g} epochs, {len(args.seeds)} seeds\n")
    print("| | validation macro-F1 | difference | test macro-F1 | difference | F1 positive |")
    print("|---|---|---|---|---|---|")
    for name, some in found.items():
        if not some or not base:
            continue
        cells = []
        for split, score in (("validation", "f1_macro"), ("test", "f1_macro")):
            values, before = (on_test(r, by_f1, score, split=split) for r in (some, base))
            cells += [mean_of(values), "" if name == BASELINE else difference(values, before)]
        values, before = (on_test(r, by_f1, "f1_positive") for r in (some, base))
        cells.append("" if name == BASELINE else difference(values, before))
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing, then print a table for each set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--lang", default="en")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", choices=TRIES)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    names = trials.prepare_data(args.data, args.out, args.lang)
    if not args.table:
        wanted = [
            trial(args, n, d, s) for n in args.only or TRIES for s in args.seeds for d in names
        ]
        trials.run(wanted, args.out, args.model, args.epochs, args.jobs)
    for data in names:
        table(args, data)


if __name__ == "__main__":
    main()
