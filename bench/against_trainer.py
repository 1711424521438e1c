#!/usr/bin/env python3
"""Scores of train.py beside Hugging Face Trainer's: same data, weights, epochs, batch and rate.

usage: against_trainer.py --model FOLDER --data FOLDER --out FILE [--seeds 42 43 ...] [--jobs N]
                          [--epochs E] [--lr LR]

FOLDER of the data holds train.csv, dev.csv and test.csv with text and label. Each trial is a
process of one thread and a line of FILE; what FILE has already is not run again. Trainer is used
as its documentation shows: padding per batch, class weights by CrossEntropyLoss(weight=...). It
needs bench/requirements.txt.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BATCH, MAX_LENGTH, WARMUP, DECAY = 32, 128, 0.1, 0.01
SCORES = ("f1_positive", "f1_macro")


def ours(args: argparse.Namespace, seed: int, weights: str) -> dict[str, float]:
    """Test scores of one run of train.py."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.dir": folder,
            "run.name": "trial",
            "run.seed": seed,
            "run.device": "cpu",
            "data.cache_dir": Path(args.out).resolve().parent / "cache",
            "data.train": args.data / "train.csv",
            "data.validation": args.data / "dev.csv",
            "data.test": args.data / "test.csv",
            "data.max_length": MAX_LENGTH,
            "data.truncation": "head",
            "data.leaks": "keep",
            "model.name": args.model,
            "train.epochs": args.epochs,
            "train.global_batch_size": BATCH,
            "train.micro_batch_size": 8,
            "train.precision": "fp32",
            "train.class_weights": weights,
            "optimizer.lr": args.lr,
            "optimizer.weight_decay": DECAY,
            "schedule.warmup_ratio": WARMUP,
            "evaluation.patience": "",
        }
        command = [sys.executable, str(ROOT / "train.py"), "--config", os.devnull]
        command += [f"{name}={value}" for name, value in settings.items()]
        subprocess.run(command, check=True, capture_output=True)
        final = json.loads((Path(folder) / "trial" / "results.json").read_text())
    return {name: final["test"][name] for name in SCORES}


def trainer(args: argparse.Namespace, seed: int, weights: str) -> dict[str, float]:
    """Test scores of one run of Hugging Face Trainer."""
    import csv

    import torch
    import transformers as tf
    from sklearn.metrics import f1_score

    tf.set_seed(seed)
    tokenizer = tf.AutoTokenizer.from_pretrained(args.model)
    model = tf.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    model.classifier.apply(model._init_weights)  # a head of this seed, as ours is

    def read(name: str) -> list[dict[str, object]]:
        with open(args.data / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        encoded = tokenizer([r["text"] for r in rows], truncation=True, max_length=MAX_LENGTH)
        keys = ("input_ids", "attention_mask")
        return [
            {k: encoded[k][i] for k in keys} | {"labels": int(r["label"])}
            for i, r in enumerate(rows)
        ]

    train, dev, test = read("train"), read("dev"), read("test")
    counts = np.bincount([r["labels"] for r in train])
    balanced = torch.tensor(len(train) / (2 * counts), dtype=torch.float)

    class WeightedTrainer(tf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=balanced)
            return (loss, outputs) if return_outputs else loss

    def scores(prediction) -> dict[str, float]:
        predicted = prediction.predictions.argmax(1)
        labels = prediction.label_ids
        macro = f1_score(labels, predicted, average="macro")
        return {"f1_macro": macro, "f1_positive": f1_score(labels, predicted, zero_division=0)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            weight_decay=DECAY,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="f1_macro",
            seed=seed,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        kind = WeightedTrainer if weights == "balanced" else tf.Trainer
        peer = kind(
            model,
            arguments,
            data_collator=tf.DataCollatorWithPadding(tokenizer),
            train_dataset=train,
            eval_dataset=dev,
            compute_metrics=scores,
        )
        peer.train()
        final = peer.predict(test).metrics
    return {name: float(final[f"test_{name}"]) for name in SCORES}


def trial(args: argparse.Namespace, who: str, seed: int, weights: str) -> None:
    """Run one trial in a process of its own, which appends its line to the file."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", who, str(seed), weights]
    began = time.time()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{who} seed {seed} weights {weights}: {time.time() - began:.0f} s", flush=True)


def summary(rows: list[dict]) -> None:
    """Means by trainer and the paired difference with its 95 % interval (Student's t)."""
    from scipy.stats import t

    for weights in ("none", "balanced"):
        for name in SCORES:
            by = {(r["who"], r["seed"]): r[name] for r in rows if r["weights"] == weights}
            seeds = sorted({s for _, s in by if ("ours", s) in by and ("trainer", s) in by})
            if len(seeds) < 2:
                continue
            a = np.array([by["ours", s] for s in seeds])
            b = np.array([by["trainer", s] for s in seeds])
            half = t.ppf(0.975, len(seeds) - 1) * (a - b).std(ddof=1) / len(seeds) ** 0.5
            gap = (a - b).mean()
            print(
                f"weights {weights:8} {name:11} n={len(seeds)}  ours {a.mean():.4f} "
                f"(sd {a.std(ddof=1):.4f})  Trainer {b.mean():.4f} (sd {b.std(ddof=1):.4f})  "
                f"difference {gap:+.4f} [{gap - half:+.4f}, {gap + half:+.4f}]"
            )


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44, 45, 46])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        who, seed, weights = args.one[0], int(args.one[1]), args.one[2]
        scores = (ours if who == "ours" else trainer)(args, seed, weights)
        row = {"who": who, "seed": seed, "weights": weights, **scores}
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return
    out = Path(args.out)

    def rows() -> list[dict]:
        return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    done = {(r["who"], r["seed"], r["weights"]) for r in rows()}
    missing = [
        (who, seed, weights)
        for seed in args.seeds
        for weights in ("balanced", "none")
        for who in ("ours", "trainer")
        if (who, seed, weights) not in done
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda t: trial(args, *t), missing))
    summary(rows())


if __name__ == "__main__":
    main()
