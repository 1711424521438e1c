#!/usr/bin/env python3
"""Texts a second of predict.py beside transformers' pipeline, and its memory for a million rows.

usage: predicting.py MODEL FILE [--rounds N] [--texts N] [--precision fp32|bf16]
       predicting.py MODEL --million [--rows N] [--work FOLDER]

FILE is a CSV file with a column `text`. Both read it, classify its texts on the same device in the
same precision and write probabilities; loading the model does not count. They take turns. For a
million rows texts of 3 to 40 words are written, and a random model 16 wide with the vocabulary of
MODEL, so that what is measured is everything but the model.
"""

import argparse
import csv
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from million import write_model, write_texts  # noqa: E402

import tables  # noqa: E402
from decision import PLAIN  # noqa: E402
from predict import annotate  # noqa: E402

BATCH = 32  # texts


def compare(args: argparse.Namespace) -> None:
    """Print the texts a second of both, and how far their probabilities are apart."""
    import classifier

    trained = classifier.load(args.model, precision=args.precision)
    trained = dataclasses.replace(trained, decision=PLAIN)  # a pipeline knows no temperature
    work = Path(tempfile.mkdtemp())
    source = work / "texts.csv"
    with open(args.file, encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file) if row["text"].strip()][: args.texts]
    with open(source, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    ways = {"predict.py": lambda out: ours(trained, source, out)}
    ways["pipeline"] = peer(args.model, trained, source)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way(work / f"{name}.jsonl")
            seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        rates = sorted(len(texts) / s for s in taken)
        print(
            f"{name:10}  {statistics.median(rates):7.1f} texts/s, {rates[0]:.1f} to {rates[-1]:.1f}"
            f" over {args.rounds} rounds of {len(texts):,}"
        )
    faster = [b / a for a, b in zip(*seconds.values(), strict=True)]
    first, second = (shares(work / f"{name}.jsonl") for name in ways)
    print(
        f"{statistics.median(faster):.2f} times as fast, {min(faster):.2f} to {max(faster):.2f}; "
        f"probabilities differ by at most {np.abs(first - second).max():.1e}"
    )


def ours(trained, source: Path, out: Path) -> None:
    """A CSV file to JSON Lines, as predict.py does it."""
    with open(out, "w", encoding="utf-8") as file:
        annotate(trained, tables.read(source, "text"), "jsonl", file, lambda rows: None)


def peer(model: str, trained, source: Path) -> Callable[[Path], None]:
    """The same with a pipeline, as its documentation shows it."""
    from transformers import pipeline

    classify = pipeline("text-classification", model, device=trained.device, batch_size=BATCH)
    length = trained.collate.template.max_length

    def run(out: Path) -> None:
        with open(source, encoding="utf-8", newline="") as file:
            texts = [row["text"] for row in csv.DictReader(file)]
        with trained.autocast(), open(out, "w", encoding="utf-8") as file:
            for scores in classify(texts, top_k=None, truncation=True, max_length=length):
                file.write(
                    json.dumps({f"probability_{s['label']}": s["score"] for s in scores}) + "\n"
                )

    return run


def shares(path: Path) -> np.ndarray:
    """The probabilities of a JSON Lines file, their columns in alphabetical order."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = sorted(name for name in rows[0] if name.startswith("probability_"))
    return np.array([[row[name] for name in names] for row in rows])


def measure_memory(args: argparse.Namespace) -> None:
    """Print seconds and peak memory of predict.py for 10,000 and for many rows."""
    args.work.mkdir(parents=True, exist_ok=True)
    write_model(args.work / "model", args.model)
    peaks = []
    for rows in (10_000, args.rows):
        source, out = args.work / f"{rows}.csv", args.work / f"{rows}.out.csv"
        write_texts(source, rows)
        command = [sys.executable, ROOT / "predict.py", args.work / "model", "--file", source]
        began = time.perf_counter()
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # for tensors so small
        child = subprocess.Popen([*command, "--out", out, "--precision", "fp32"], env=one_thread)
        _, status, used = os.wait4(child.pid, 0)
        assert status == 0
        seconds = time.perf_counter() - began
        peaks.append(used.ru_maxrss / 2**20)  # GiB
        print(f"{rows:,} rows: {seconds:.0f} s, peak {peaks[-1]:.2f} GiB", flush=True)
    print(f"{peaks[1] - peaks[0]:.2f} GiB more for {args.rows:,} rows than for 10,000")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, help="of the file, default: all")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "predicting"))
    args = parser.parse_args()
    if args.million == (args.file is not None):
        parser.error("give FILE or --million")
    measure_memory(args) if args.million else compare(args)


if __name__ == "__main__":
    main()
