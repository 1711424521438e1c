#!/usr/bin/env python3
"""How a step's time grows with the texts of a step, and with their length.

usage: growth.py --model FOLDER --data FOLDER [--precision bf16|fp32] [--steps N]

The data's own lengths are scaled to each mean; tokens are drawn from those that the data uses.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peers
import torch
from peers import ROOT

sys.path.insert(0, str(ROOT))

import train
from batches import cut
from ddp import World
from optimizer import make_optimizer, update

TEXTS, MEAN = (8, 16, 32, 64, 128, 256, 512), 24
LENGTHS = (12, 24, 48, 96)


def measure(job, optimizer, world: World, *, texts: int, mean: float, steps: int) -> float:
    """Median seconds of some steps; the first two are not counted."""
    rng = np.random.default_rng(0)
    own = job.lengths(job.corpus.train)
    active = job.model.get_input_embeddings().active.cpu().numpy()
    seconds = []
    for step in range(steps + 2):
        lengths = np.clip(rng.choice(own, texts) * mean / own.mean(), 3, 512).round().astype(int)
        rows = [(rng.choice(active, n).tolist(), int(rng.integers(2)), 1.0, False) for n in lengths]
        tokens = job.cfg.train.micro_batch_tokens
        passes = cut(np.arange(texts), lengths, texts, tokens, is_packed=job.is_packed)
        batches = [job.collate([rows[i] for i in part]) for part in passes]
        began = time.perf_counter()
        train.backward(job.model, batches, texts, step, job, world)
        update(optimizer, job.cfg.train.max_grad_norm)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def main() -> None:
    """Two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    args.texts = 32
    with tempfile.TemporaryDirectory() as args.cache:
        job = peers.make_job(args, {})
        world = World(0, 0, 1, next(job.model.parameters()).device)
        optimizer = make_optimizer(job.model, job.cfg.optimizer)
        print("| texts a step | mean tokens a text | s a step | tokens/s |\n|---|---|---|---|")
        cases = [(n, MEAN) for n in TEXTS] + [(32, n) for n in LENGTHS]
        for texts, mean in cases:
            s = measure(job, optimizer, world, texts=texts, mean=mean, steps=args.steps)
            print(f"| {texts} | {mean} | {s:.3f} | {texts * mean / s:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
