#!/usr/bin/env python3
"""How long the data check takes for many texts, part by part, and which planted faults it finds.

usage: data_check.py [--rows N]

Texts of 20 to 30 words are drawn from the bundled sample's words, of eight languages; eight tenths
are training texts. Peak memory is that of the process.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import duplicates  # noqa: E402
import quality  # noqa: E402
from config import DataConfig  # noqa: E402
from data import read_splits  # noqa: E402
from meter import peak_memory_gib  # noqa: E402

COPIES = 300  # of each fault
SPLITS = ("train", "validation", "test")
Rows = list[list[str]]
Change = Callable[[list[str]], list[str]]


def make_texts(rows: int, rng: random.Random) -> Rows:
    """Rows of text, label, language."""
    with open(ROOT / "examples/train.csv", encoding="utf-8", newline="") as file:
        words = sorted({w for row in csv.DictReader(file) for w in row["text"].split()})
    return [
        [" ".join(rng.choices(words, k=rng.randint(20, 30))), rng.choice("01"), rng.choice("abc")]
        for _ in range(rows)
    ]


def other_word(text: str, rng: random.Random) -> str:
    """A text with one word changed."""
    words = text.split(" ")
    words[rng.randrange(len(words))] = "otherwise"
    return " ".join(words)


def plant(rows: dict[str, Rows], rng: random.Random) -> Counter:
    """Put faults into `rows`, COPIES of each; how many there are by kind and split."""
    free = {name: rng.sample(range(len(rows[name])), len(rows[name])) for name in SPLITS}
    planted: Counter = Counter()

    def put(kind: str, name: str, change: Change, source: str | None = None, n: int = COPIES):
        """Give n rows of a split a text, made of their own or of another row of `source`."""
        for _ in range(n):
            at = free[name].pop()
            row = rows[source][free[source].pop()] if source else rows[name][at]
            rows[name][at] = change(row)
        planted[kind, name] += n

    def flipped(row: list[str]) -> list[str]:
        return [row[0].upper(), "10"[int(row[1])], row[2]]

    put("equal", "train", lambda row: [f" {row[0].upper()}", *row[1:]], "train")
    put("contradictory", "train", flipped, "train")
    put("contradictory", "test", flipped, "validation")
    put("leaks", "train", list, "test")
    for name in SPLITS:
        put("near", name, lambda row: [other_word(row[0], rng), *row[1:]], "train")
        put("encoding", name, lambda row: [f"{row[0]} caf\u00c3\u00a9 &amp;", *row[1:]])
        put("hollow", name, lambda row: ["".join(rng.choices("?!.,;-", k=12)), *row[1:]])
    tagged = len(rows["train"]) // 20
    put("giveaways", "train", lambda row: [f"{row[0]} #sarcasm", "1", row[2]], n=tagged)
    return planted


def timed(module, name: str, seconds: Counter) -> None:
    """Let a function of a module add the seconds that it takes."""
    function = getattr(module, name)

    def wrapper(*args, **options):
        began = time.perf_counter()
        try:
            found = function(*args, **options)
            return list(found) if hasattr(found, "__next__") else found
        finally:
            seconds[name] += time.perf_counter() - began

    setattr(module, name, wrapper)


def main() -> None:
    """Make the texts, check them, and print seconds and counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    n = parser.parse_args().rows
    rng = random.Random(42)
    texts = make_texts(n, rng)
    cuts = {"train": (0, 8 * n // 10), "validation": (8 * n // 10, 9 * n // 10)}
    rows = {name: texts[slice(*cuts.get(name, (9 * n // 10, n)))] for name in SPLITS}
    planted, seconds = plant(rows, rng), Counter()
    functions = ("equal_texts", "near_texts", "parted_groups", "hollow_texts", "accidents")
    for name in (*functions, "few_labels", "few_in_slices", "surface", "giveaways"):
        timed(quality, name, seconds)
    timed(duplicates, "alike", seconds)
    with tempfile.TemporaryDirectory() as folder:
        for name in SPLITS:
            with open(Path(folder, f"{name}.csv"), "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["text", "label", "lang"], *rows[name]])
        began = time.perf_counter()
        splits = read_splits(DataConfig(*(f"{folder}/{name}.csv" for name in SPLITS)), seed=42)
    seconds["reading, data.leaks included"] = time.perf_counter() - began
    began = time.perf_counter()
    checked = quality.check(splits, seed=42)
    whole = time.perf_counter() - began
    for name, taken in seconds.most_common():
        print(f"{taken:7.2f} s  {name}")
    print(f"{whole:7.2f} s  the check of {n:,} texts, without reading")
    print(f"peak memory {peak_memory_gib(torch.device('cpu')):.2f} GiB")
    found: Counter = Counter()
    for finding in splits.report["findings"]:
        found[finding["kind"], finding["split"]] += finding["count"]
    for finding in checked.findings:
        found[finding.kind, finding.split] += finding.count
    for kind, split in planted | found:
        print(f"{kind} in {split}: {planted[kind, split]:,} planted, {found[kind, split]:,} found")


if __name__ == "__main__":
    main()
