#!/usr/bin/env python3
"""Our trainer beside others on the same texts and weights: seconds a step, memory, bytes sent.

usage: peers.py --model FOLDER --data FOLDER --out FILE [--rounds N] [--steps N] [--texts N]
                [--precision bf16|fp32] [--only NAME ...]

FOLDER of the data holds train.csv and dev.csv with text and label. Each trial is a process of its
own and a line of --out; trials of a round follow one another, so that a machine that slows down
does so for all. All train on the same batches in the same order, but those that group by length;
dropout is as in the model's configuration. The others' packages are in bench/requirements.txt.
"""

import argparse
import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WARM_UP = 3  # steps not counted: they allocate, and compile
SEED, MAX_LENGTH = 42, 128
LR, DECAY, MAX_NORM = 2e-5, 0.01, 1.0

# What is switched off in ours, by row of the table.
PLAIN = {
    "speed.padding": "batch",
    "speed.active_vocabulary": "false",
    "speed.first_position": "false",
}
OURS = {
    "ours": {},
    "ours, no saving": PLAIN,
    "ours, padded to 128": PLAIN | {"speed.padding": "max"},
    "ours, padding-free alone": PLAIN | {"speed.padding": "free"},
    "ours, active vocabulary alone": PLAIN | {"speed.active_vocabulary": "true"},
    "ours, first position alone": PLAIN | {"speed.first_position": "true"},
}


class Timer:
    """Seconds between the ends of steps; a step's end is when its device is idle again."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def tick(self) -> None:
        """A step has ended."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


# --- the contenders: each returns the timer of its steps and what they computed -------------------


def make_job(args: argparse.Namespace, settings: dict[str, object], world=None):
    """Our trainer's job on these texts, as train.py prepares it."""
    import torch

    import config
    from ddp import World
    from prepare import prepare

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    values = {
        "data.train": args.data / "train.csv",
        "data.validation": args.data / "dev.csv",
        "data.test": "",
        "data.leaks": "keep",
        "data.truncation": "head",
        "data.max_length": MAX_LENGTH,
        "data.cache_dir": args.cache,
        "model.name": args.model,
        "train.precision": args.precision,
        "train.global_batch_size": args.texts,
        "train.max_steps": WARM_UP + args.steps + 1,
        "train.class_weights": "none",
        "optimizer.lr": LR,
        "optimizer.weight_decay": DECAY,
    } | settings
    cfg = config.load(None, [f"{name}={value}" for name, value in values.items()])
    return prepare(cfg, world or World(0, 0, 1, device), lambda line: None)


def ours(args: argparse.Namespace, settings: dict[str, object]) -> dict[str, object]:
    """The steps of train.py: its loader, backward and update."""
    import train
    from ddp import World
    from optimizer import make_optimizer, set_lr, update

    job = make_job(args, settings)
    world = World(0, 0, 1, next(job.model.parameters()).device)
    optimizer = make_optimizer(job.model, job.cfg.optimizer)
    sampler, timer, cells, tokens = job.sampler(0), Timer(), 0, 0
    for step, micro_batches, _ in train.batches_by_step(job, sampler, world.device):
        n = len(sampler.global_batch(step))
        set_lr(optimizer, step, job.steps, job.cfg.schedule.min_lr_ratio)
        train.backward(job.model, micro_batches, n, step, job, world)
        update(optimizer, job.cfg.train.max_grad_norm)
        timer.tick()
        if step > WARM_UP:
            cells += sum(b.inputs["input_ids"].numel() for b in micro_batches)
            tokens += sum(b.tokens for b in micro_batches)
    trained = sum(p.numel() for p in job.model.parameters())
    layers = sum(p.numel() for p in job.model.base_model.encoder.layer.parameters())
    sizes = {"trained": trained, "encoder": layers}
    return {"seconds": timer.seconds[WARM_UP:], "cells": cells, "tokens": tokens} | sizes


def rows_in_order(args: argparse.Namespace) -> list[dict[str, object]]:
    """The texts as Trainer and Lightning take them, in the order in which ours trains on them."""
    from transformers import AutoTokenizer

    job = make_job(args, PLAIN)
    sampler = job.sampler(0)
    order = [i for s in range(job.steps.total_steps) for i in sampler.global_batch(s)]
    with open(args.data / "train.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoded = tokenizer([rows[i]["text"] for i in order], truncation=True, max_length=MAX_LENGTH)
    labels = [job.corpus.label_names.index(rows[i]["label"]) for i in order]
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in zip(encoded["input_ids"], labels, strict=True)
    ]


def load_peer(args: argparse.Namespace):
    """The same weights as transformers loads them."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    tf.set_seed(SEED)
    return tf.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)


def collator(args: argparse.Namespace, width: int | None, counts: list[tuple[int, int]]):
    """transformers' padding collator, noting (cells, tokens) of each batch."""
    import transformers as tf

    tokenizer = tf.AutoTokenizer.from_pretrained(args.model)
    how = {"padding": "max_length", "max_length": width} if width else {}
    pad = tf.DataCollatorWithPadding(tokenizer, **how)

    def collate(rows):
        batch = pad(rows)
        counts.append((batch["input_ids"].numel(), int(batch["attention_mask"].sum())))
        return batch

    return collate


def counted(timer: Timer, counts: list[tuple[int, int]]) -> dict[str, object]:
    """A trial's result, without its warm-up."""
    done = counts[WARM_UP + 1 :][: len(timer.seconds) - WARM_UP]
    cells, tokens = (sum(c[i] for c in done) for i in (0, 1))
    return {"seconds": timer.seconds[WARM_UP:], "cells": cells, "tokens": tokens}


def trainer(
    args: argparse.Namespace, width: int | None = None, strategy: str = "sequential"
) -> dict[str, object]:
    """Hugging Face Trainer."""
    import transformers as tf

    rows, model, timer, counts = rows_in_order(args), load_peer(args), Timer(), []

    class Clock(tf.TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            timer.tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            folder,
            **trainer_arguments(args),
            max_steps=WARM_UP + args.steps + 1,
            learning_rate=LR,
            weight_decay=DECAY,
            max_grad_norm=MAX_NORM,
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_steps=10,
            train_sampling_strategy=strategy,
        )
        tf.Trainer(
            model,
            arguments,
            data_collator=collator(args, width, counts),
            train_dataset=rows,
            callbacks=[Clock()],
        ).train()
    return counted(timer, counts)


def trainer_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What training and evaluation share."""
    import torch

    return {
        "per_device_train_batch_size": args.texts,
        "per_device_eval_batch_size": 32,
        "bf16": args.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": SEED,
        "report_to": [],
        "disable_tqdm": True,
    }


def lightning(args: argparse.Namespace, fused: bool) -> dict[str, object]:
    """Lightning, padded per batch; AdamW as its users write it, or fused."""
    import torch
    from torch.utils.data import DataLoader

    from lightning import LightningModule, Trainer  # isort: skip

    rows, timer, counts = rows_in_order(args), Timer(), []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = load_peer(args)

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def on_train_batch_end(self, *_) -> None:
            timer.tick()

        def configure_optimizers(self):
            how = {"fused": True} if fused else {}
            return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=DECAY, **how)

    module = Module()
    module.model.train()
    clipping = {} if fused else {"gradient_clip_val": MAX_NORM}  # Lightning refuses both together
    loader = DataLoader(rows, batch_size=args.texts, collate_fn=collator(args, None, counts))
    Trainer(
        max_steps=WARM_UP + args.steps + 1,
        precision="bf16-mixed" if args.precision == "bf16" else "32-true",
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **clipping,
    ).fit(module, loader)
    return counted(timer, counts)


# --- evaluation and prediction: texts a second ----------------------------------------------------


def evaluate_ours(args: argparse.Namespace) -> dict[str, object]:
    """train.evaluate over dev.csv, twice; the first is warm-up."""
    import train
    from ddp import World

    job = make_job(args, {})
    world = World(0, 0, 1, next(job.model.parameters()).device)
    return timed(lambda: train.evaluate(job, job.corpus.validation, world), job.corpus.validation)


def evaluate_trainer(args: argparse.Namespace) -> dict[str, object]:
    """Trainer.predict over the same texts, padded per batch of 32, as Trainer.evaluate does."""
    import transformers as tf

    job, model = make_job(args, PLAIN), load_peer(args)
    tokenizer = tf.AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(args.data / "dev.csv")
    encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in encoded["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(folder, **trainer_arguments(args))
        peer = tf.Trainer(model, arguments, data_collator=collator(args, None, []))
        return timed(lambda: peer.predict(rows), job.corpus.validation)


def predict_ours(args: argparse.Namespace) -> dict[str, object]:
    """From strings to logits: tokenised, and through train.evaluate."""
    import numpy as np

    import train
    from corpus import TokenisedSplit
    from ddp import World

    job, texts = make_job(args, {}), read_texts(args.data / "dev.csv")
    world = World(0, 0, 1, next(job.model.parameters()).device)

    def predict() -> None:
        ids = [
            e.ids
            for e in job.tokenizer._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
        offsets = np.cumsum([0, *map(len, ids)])
        zeros = np.zeros(len(texts), dtype=np.int64)
        train.evaluate(
            job, TokenisedSplit(np.concatenate(ids), offsets, zeros, zeros, {}, None), world
        )

    return timed(predict, job.corpus.validation)


def predict_pipeline(args: argparse.Namespace) -> dict[str, object]:
    """transformers' pipeline(batch_size=32) with the same precision."""
    import torch
    import transformers as tf

    job, texts = make_job(args, PLAIN), read_texts(args.data / "dev.csv")
    device = 0 if torch.cuda.is_available() else -1
    pipe = tf.pipeline(
        "text-classification",
        model=load_peer(args),
        tokenizer=tf.AutoTokenizer.from_pretrained(args.model),
        device=device,
    )
    kind = "cuda" if torch.cuda.is_available() else "cpu"

    def predict() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=args.precision == "bf16"):
            pipe(texts, batch_size=32, truncation=True, max_length=MAX_LENGTH)

    return timed(predict, job.corpus.validation)


def read_texts(path: Path) -> list[str]:
    """Column text."""
    with open(path, encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def timed(action: Callable[[], object], split) -> dict[str, object]:
    """Seconds of each of two runs over a split after one that is not counted."""
    action()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "examples": len(split)}


# --- two processes --------------------------------------------------------------------------------


def two_ranks(args: argparse.Namespace, settings: dict[str, object]) -> dict[str, object]:
    """Our steps in two gloo processes of half the cores each; bytes are those of the loopback."""
    import torch

    import train
    from ddp import process_group
    from optimizer import make_optimizer, set_lr, update

    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"OMP_NUM_THREADS": threads}
        ranks = [
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for r in (0, 1)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
        return json.loads(outputs[0].splitlines()[-1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with process_group("cpu") as world:
        job = make_job(args, settings | {"run.device": "cpu"}, world)
        optimizer = make_optimizer(job.model, job.cfg.optimizer)
        model, sampler = world.wrap(job.model), job.sampler(world.rank)
        timer, before = Timer(), 0
        for step, micro_batches, _ in train.batches_by_step(job, sampler, world.device):
            n = len(sampler.global_batch(step))
            set_lr(optimizer, step, job.steps, job.cfg.schedule.min_lr_ratio)
            train.backward(model, micro_batches, n, step, job, world)
            update(optimizer, job.cfg.train.max_grad_norm)
            timer.tick()
            if step == WARM_UP:
                before = loopback_bytes()
        sent = (loopback_bytes() - before) / args.steps
    return {"seconds": timer.seconds[WARM_UP:], "bytes": sent}


def loopback_bytes() -> int:
    """Bytes received through lo since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(
        int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")
    )


# --- what the machine could do --------------------------------------------------------------------


def machine(args: argparse.Namespace) -> dict[str, object]:
    """The best rate of a large product in FLOP/s, and of an AdamW pass in bytes a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    rates = []
    for rows in (2048, 2304, 3072):
        x = torch.randn(rows, 768, dtype=dtype, device=device)
        w = torch.randn(3072, 768, dtype=dtype, device=device)
        seconds = best(lambda x=x, w=w: torch.nn.functional.linear(x, w))
        rates.append(2 * rows * 768 * 3072 / seconds)
    p = torch.nn.Parameter(torch.randn(64 << 20, device=device))
    p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW([p], fused=True)
    bandwidth = 28 * p.numel() / best(optimizer.step)  # p, m, v read and written, the gradient read
    return {"seconds": [0.0], "flops": max(rates), "bandwidth": bandwidth}


def best(action: Callable[[], object], times: int = 12) -> float:
    """The shortest of some runs, in seconds."""
    timer = Timer()
    for _ in range(times + 3):
        action()
        timer.tick()
    return min(timer.seconds[2:])


CONTENDERS: dict[str, Callable[[argparse.Namespace], dict[str, object]]] = (
    {"machine": machine}
    | {name: (lambda args, s=settings: ours(args, s)) for name, settings in OURS.items()}
    | {
        "Trainer, padded per batch": trainer,
        "Trainer, padded to 128": lambda args: trainer(args, width=MAX_LENGTH),
        "Trainer, grouped by length": lambda args: trainer(args, strategy="group_by_length"),
        "Lightning, AdamW as written": lambda args: lightning(args, fused=False),
        "Lightning, fused AdamW": lambda args: lightning(args, fused=True),
        "evaluation: ours": evaluate_ours,
        "evaluation: Trainer": evaluate_trainer,
        "prediction: ours": predict_ours,
        "prediction: pipeline": predict_pipeline,
        "two processes: ours": lambda args: two_ranks(args, {}),
        "two processes: plain DDP": lambda args: two_ranks(args, PLAIN),
    }
)


# --- the table ------------------------------------------------------------------------------------


def summary(rows: list[dict], args: argparse.Namespace) -> None:
    """Medians over all steps of all rounds, with the range of the rounds' medians."""
    by: dict[str, list[dict]] = {}
    for row in rows:
        by.setdefault(row["name"], []).append(row)
    medians = {
        name: [statistics.median(r["seconds"]) for r in trials] for name, trials in by.items()
    }
    flops = bandwidth = None
    if "machine" in by:
        flops = max(r["flops"] for r in by["machine"])
        bandwidth = max(r["bandwidth"] for r in by["machine"])
        print(
            f"machine: products {flops / 1e12:.2f} TFLOP/s, AdamW pass {bandwidth / 1e9:.0f} GB/s"
        )
    print(
        "| | s | range of rounds | ratio to ours | texts/s | real tokens/s | padding | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, trials in by.items():
        if name == "machine":
            continue
        base = "evaluation: ours" if name.startswith("eval") else "ours"
        base = "prediction: ours" if name.startswith("pred") else base
        base = "two processes: ours" if name.startswith("two") else base
        middle = statistics.median(s for r in trials for s in r["seconds"])
        reference = medians.get(base)
        ratio = f"{middle / statistics.median(reference):.2f}" if reference else ""
        examples = trials[0].get("examples", args.texts)
        tokens = sum(r.get("tokens", 0) for r in trials)
        cells = sum(r.get("cells", 0) for r in trials)
        seconds = sum(s for r in trials for s in r["seconds"])
        shown = [f"{middle:.3f}", f"{min(medians[name]):.3f} to {max(medians[name]):.3f}", ratio]
        shown += [f"{examples / middle:.1f}"]
        shown += [f"{tokens / seconds:,.0f}" if tokens else ""]
        shown += [f"{1 - tokens / cells:.0%}" if cells else ""]
        shown += [f"{max(r['peak_memory_gib'] for r in trials):.2f}"]
        print(f"| {name} | {' | '.join(shown)} |")
        if "bytes" in trials[0]:
            print(
                f"  bytes received a step, both ranks together: {trials[0]['bytes'] / 1e6:.0f} MB"
            )
    if flops and "ours" in by:
        steps = by["ours"]
        tokens = sum(r["tokens"] for r in steps) / sum(len(r["seconds"]) for r in steps)
        trained, encoder = steps[0]["trained"], steps[0]["encoder"]
        products = 6 * encoder * tokens / flops
        traffic = 28 * trained / bandwidth
        share = (products + traffic) / statistics.median(medians["ours"])
        print(
            f"floor: products {products:.3f} s + AdamW pass {traffic:.3f} s = "
            f"{products + traffic:.3f} s, {share:.0%} of which ours reaches"
        )


def trial(args: argparse.Namespace, name: str) -> None:
    """Run one contender here and print its line."""
    import torch

    from meter import peak_memory_gib

    result = CONTENDERS[name](args)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    print(json.dumps({"peak_memory_gib": peak_memory_gib(device)} | result | {"name": name}))


def main() -> None:
    """All rounds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cache = args.out.resolve().parent / "cache"
    if args.trial:
        trial(args, args.trial)
        return
    rows = []
    for number in range(args.rounds):
        for name in args.only:
            command = [sys.executable, __file__, *sys.argv[1:], "--trial", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]) | {"round": number})
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            seconds = statistics.median(rows[-1]["seconds"])
            print(f"round {number + 1} {name}: {seconds:.3f} s", file=sys.stderr, flush=True)
    summary(rows, args)


if __name__ == "__main__":
    main()
