#!/usr/bin/env python3
"""How long a million texts take to the first step, cold and from the cache, and in what memory.

usage: million.py --tokenizer FOLDER --work FOLDER [--rows N]

Texts of 3 to 40 words are drawn from the bundled sample's words. The model is tiny but has the
tokenizer's whole vocabulary, so what is measured is reading, checking, tokenising, the baseline and
the order of texts. Peak memory is that of the process, less what it takes for a thousand texts.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_texts(path: Path, rows: int, seed: int = 42) -> None:
    """A CSV file of different texts; about a quarter is positive."""
    rng = random.Random(seed)
    with open(ROOT / "examples/train.csv", encoding="utf-8", newline="") as file:
        words = sorted({w for row in csv.DictReader(file) for w in row["text"].split()})
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(rows):
            chosen = rng.choices(words, k=min(40, 3 + int(rng.expovariate(1 / 14))))
            writer.writerow([f"{' '.join(chosen)} {i}", int(rng.random() < 0.25)])


def write_model(folder: Path, tokenizer_folder: str) -> None:
    """A classifier 16 wide with the tokenizer's vocabulary."""
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=130,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)


def start(work: Path, name: str, rows: int) -> dict[str, float]:
    """Seconds from the start of train.py to the end of its first step, and its peak memory."""
    settings = {
        "run.dir": work / "runs",
        "run.name": name,
        "run.device": "cpu",
        "data.cache_dir": work / "cache",
        "data.train": work / f"train-{rows}.csv",
        "data.validation": work / "validation.csv",
        "data.test": "",
        "model.name": work / "model",
        "train.max_steps": 1,
        "train.precision": "fp32",
        "log.every": 1,
    }
    command = [sys.executable, str(ROOT / "train.py"), "--config", os.devnull]
    began = time.time()
    subprocess.run(
        [*command, *(f"{k}={v}" for k, v in settings.items())], check=True, capture_output=True
    )
    log = (work / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    step = next(e for e in map(json.loads, log) if e["event"] == "step")
    return {"seconds": step["time"] - began, "memory_gib": step["peak_memory_gib"]}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for folder in ("runs", "cache"):
        shutil.rmtree(args.work / folder, ignore_errors=True)
    write_model(args.work / "model", args.tokenizer)
    write_texts(args.work / "validation.csv", 2000, seed=7)
    for rows in (1000, args.rows):
        write_texts(args.work / f"train-{rows}.csv", rows)
    few = start(args.work, "few", 1000)
    for name in ("cold", "cached"):
        many = start(args.work, name, args.rows)
        print(
            f"{name}: {args.rows:,} texts, {many['seconds']:.1f} s to the first step, peak "
            f"{many['memory_gib']:.2f} GiB, {many['memory_gib'] - few['memory_gib']:.2f} GiB more "
            f"than for 1,000 texts",
            flush=True,
        )


if __name__ == "__main__":
    main()
