#!/usr/bin/env python3
"""Scores beside Hugging Face Trainer's: same data, weights, epochs and batch, five rates for both.

usage: against_trainer.py --model FOLDER --data FOLDER [FOLDER ...] --out FOLDER [--lang en]
                          [--seeds 42 43 ...] [--epochs E] [--jobs N] [--precision bf16|fp32]
                          [--rates-in bf16|fp32] [--table | --check]

Each side takes the rate with the highest F1 macro on validation of the first seed. Trainer's rate
is looked for with our loop and Trainer's settings: the update is the same but for its dropout masks
(and, with class weights, for the weights that Trainer's mean divides by). Then all seeds are
trained at that rate, and at 2e-5; --rates-in: the rates were looked for in another precision.
Trainer is used as its documentation shows: class weights by CrossEntropyLoss(weight=...), best
epoch by F1 macro; but its model has our padding-free forward, without which it takes twice as long:
--check trains both ways without dropout and prints by how much the logits differ. What FOLDER of
--out has is not run again. Ours without weights is also trained with each of TRIED. It needs
bench/requirements.txt.
"""

import argparse
import csv
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import trials
from claims import by_f1, difference, mean_of, on_test
from trials import SEEDS, Trial

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4)
FIXED = 2e-5
SIDES = (("ours", "balanced"), ("ours", "none"), ("trainer", "none"), ("trainer", "balanced"))
AT_FIXED = (("ours", "balanced"), ("ours", "none"), ("trainer", "none"))
TRIED = {
    "layer decay 0.9": {"optimizer.layer_decay": 0.9},
    "label smoothing 0.1": {"train.label_smoothing": 0.1},
}


def trial(
    data: str,
    by: str,
    weights: str,
    lr: float,
    seed: int,
    tried: str = "",
    *,
    precision: str = "bf16",
) -> Trial:
    """One training of a side, with one of TRIED."""
    settings = {"optimizer.lr": lr, "train.class_weights": weights, "train.precision": precision}
    if by == "trainer":
        settings["speed.padding"] = "free"
    name = "-".join([trials.named(weights, lr), *tried.split(), *["fp32"] * (precision == "fp32")])
    return Trial(data, name, seed, settings | TRIED.get(tried, {}), by=by)


def check(args: argparse.Namespace) -> None:
    """Trainer with its own forward and with ours, without dropout: the logits after two epochs."""
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder) / "model", Path(folder) / "data"
        shutil.copytree(args.model, model)
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        settings |= dict.fromkeys(names, 0.0)
        (model / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        data.mkdir()
        for name, texts in (("train", 320), ("dev", 100), ("test", 150)):
            source = args.out / "data" / args.data[0].name / f"{name}.csv"
            with open(source, encoding="utf-8", newline="") as file:
                records = list(csv.reader(file))[: texts + 1]
            with open(data / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(records)
        own = trial(data.name, "trainer", "balanced", 1e-4, 42, "fp32")
        free = trials.of_trainer(own, data, str(model), 2)
        del own.settings["speed.padding"]
        padded = trials.of_trainer(own, data, str(model), 2)
        gap, largest = np.abs(free["test"] - padded["test"]).max(), np.abs(padded["test"]).max()
        print(
            f"the logits of {len(free['test'][0])} texts differ by up to {gap:.1e}, "
            f"where the largest is {largest:.2f}"
        )


def best_rate(done: dict, data: str, weights: str, seed: int, precision: str) -> float:
    """The rate of the highest F1 macro on validation of one seed."""

    def value(lr: float) -> float:
        row = done[trial(data, "ours", weights, lr, seed, precision=precision).key]
        return by_f1(row["epochs"])["validation"]["f1_macro"]

    return max(RATES, key=value)


def compare(args: argparse.Namespace, done: dict, data: str) -> None:
    """The scores of each side at its best rate and at 2e-5, and ours beside Trainer's."""
    seeds = args.seeds

    def rows(by: str, weights: str, lr: float, tried: str = "") -> list[dict]:
        some = [trial(data, by, weights, lr, s, tried, precision=args.precision) for s in seeds]
        return [done[t.key] for t in some] if all(t.key in done for t in some) else []

    weightings = ("balanced", "none")
    rates = {w: best_rate(done, data, w, seeds[0], args.rates_in) for w in weightings}
    print(f"\n{data}, {len(seeds)} seeds\n")
    print("| | rate | F1 positive | macro-F1 | with the threshold: positive | macro |")
    print("|---|---|---|---|---|---|")
    lines = [(*side, lr, "") for side in SIDES for lr in sorted({FIXED, rates[side[1]]})]
    lines += [("ours", "none", rates["none"], tried) for tried in TRIED]
    for by, weights, lr, tried in lines:
        if some := rows(by, weights, lr, tried):
            cells = [
                mean_of(on_test(some, by_f1, score, tuned=tuned))
                for tuned in (False, True)
                for score in ("f1_positive", "f1_macro")
            ]
            what = ", ".join(filter(None, (f"{by}, weights {weights}", tried)))
            print(f"| {what} | {lr:g} | {' | '.join(cells)} |")
    print("\n| ours less Trainer's, argmax of Trainer | F1 positive | macro-F1 |\n|---|---|---|")
    pairs = [
        (w, "", t, at)
        for w in ("balanced", "none")
        for t in ("none", "balanced")
        for at in ("best", "2e-5")
    ]
    pairs += [("none", tried, "none", "best") for tried in TRIED]
    for weights, tried, theirs, at in pairs:
        lr, lr_theirs = (FIXED, FIXED) if at == "2e-5" else (rates[weights], rates[theirs])
        one, two = rows("ours", weights, lr, tried), rows("trainer", theirs, lr_theirs)
        for tuned in (False, True) if one and two else ():
            cells = [
                difference(on_test(one, by_f1, s, tuned=tuned), on_test(two, by_f1, s))
                for s in ("f1_positive", "f1_macro")
            ]
            words = ("ours", f"weights {weights}", tried, "with the threshold" if tuned else "")
            what = f"{', '.join(filter(None, words))}; Trainer, weights {theirs}; rate {at}"
            print(f"| {what} | {' | '.join(cells)} |")


def run(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Train what is missing, a seed of all sides after the other."""

    def train(wanted: Sequence[tuple], precision: str = args.precision) -> None:
        some = [trial(*one, precision=precision) for one in wanted]
        trials.run(some, args.out, args.model, args.epochs, args.jobs)

    first, weightings = args.seeds[0], ("balanced", "none")
    searched = [(d, "ours", w, lr, first) for lr in RATES for d in names for w in weightings]
    train(searched, args.rates_in)
    done = trials.outcomes(args.out)
    rates = {(d, w): best_rate(done, d, w, first, args.rates_in) for d in names for w in weightings}
    for d in names:
        train(
            [(d, *side, rates[d, side[1]], seed) for seed in args.seeds for side in SIDES]
            + [(d, *side, FIXED, seed) for seed in args.seeds for side in AT_FIXED]
            + [(d, "ours", "none", rates[d, "none"], s, t) for s in args.seeds for t in TRIED]
        )


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
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rates-in", choices=("bf16", "fp32"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    args.rates_in = args.rates_in or args.precision
    names = trials.prepare_data(args.data, args.out, args.lang)
    if args.check:
        return check(args)
    if not args.table:
        run(args, names)
    done = trials.outcomes(args.out)
    for data in names:
        compare(args, done, data)


if __name__ == "__main__":
    main()
