"""Try everything that a run needs without training: `train.py --check`."""

import os
import time

import results
from config import Config
from console import Console
from ddp import World
from errors import OK, USAGE, Refusal
from meter import Estimate, in_words, peak_memory_gib
from prepare import longest_micro_batch, prepare, try_pass, workload


def check(cfg: Config, world: World, console: Console, *, strict: bool) -> int:
    """Try everything that a run needs, change nothing, and say what the run would take."""
    if world.size > 1:
        raise Refusal(USAGE, "--check is for one process; torchrun is not needed")
    job = prepare(cfg, world, console.say, strict=strict)
    is_first = int(os.environ.get("NODE_RANK") or 0) == 0  # the machine that has the run
    probe = results.probe_directory(job) if is_first else "the run is on the first machine"
    texts = longest_micro_batch(job)
    try_pass(job, texts, world.device)  # the first pass allocates; the second is the one to time
    began = time.perf_counter()
    try_pass(job, texts, world.device)
    seconds = time.perf_counter() - began
    sampler = job.sampler(rank=0)
    lengths = job.lengths(job.corpus.train)
    estimate = Estimate(workload(job, sampler))
    estimate.add(0, 0.0)
    estimate.add(job.collate.cells(lengths[texts]), seconds)
    for line in results.told(job, world):
        console.say(f"  {line}")
    console.say(f"  {probe}")
    console.say(
        f"  the longest pass, {len(texts)} texts, takes {peak_memory_gib(world.device):.1f} GiB; "
        f"the whole run in one process about {in_words(estimate.whole())}"
    )
    console.say("check passed")
    return OK
