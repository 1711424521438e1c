#!/usr/bin/env python3
"""Fine-tune a text classifier: one process by itself, or one of many under torchrun.

usage: train.py [--config FILE] [--check] [--strict] [section.key=value ...]

Shapes: B texts of a micro-batch, N examples of a split, K classes.
"""

import signals

if __name__ == "__main__":
    signals.hold()  # the imports take seconds, in which a signal would kill or show a traceback

import argparse
import contextlib
import hashlib
import os
import struct
import sys
import time
import traceback
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import config
import metrics
import results
import scoring
from batches import MicroBatch, StepSampler, Texts
from check import check
from config import Config
from console import Console
from corpus import TokenisedSplit
from ddp import World, process_group, restarts, used_gpus
from errors import BAD_CONFIG, CRASH, NON_FINITE, OK, STOPPED, USAGE, Refusal
from files import writing
from hardware import Machine, Recorder
from meter import Estimate, Meter, in_words
from optimizer import make_optimizer, set_lr, update
from prepare import Job, keep_cut, prepare, workload
from progress import Progress, Saver, load_best, resume, saving
from rundir import RunDir
from runlog import RunLog
from signals import Stopped, StopRequest

# --- the loss and one step ------------------------------------------------------------------------


def step_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, n: int, label_smoothing: float = 0.0
) -> Tensor:
    """This micro-batch's part of the step's loss: sum_i w_i * l_i / n.

    logits (B, K), labels and weights (B,). Not reduction="mean": that divides by the micro-batch's
    own sum of weights, so the update would depend on how the global batch of n examples was cut
    (pytorch issue 72047). A smoothed loss is weighted as a whole.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    per_example = F.cross_entropy(
        logits, labels, reduction="none", label_smoothing=label_smoothing
    )  # (B,)
    return (weights * per_example).sum() / n


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """The generators' seed just before one forward, so that no generator state need be saved."""
    raw = struct.pack("<QQII", seed, step, rank, micro_batch)
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 1


def backward(
    model: nn.Module, micro_batches: list[MicroBatch], n: int, step: int, job: Job, world: World
) -> Tensor:
    """Leave the global batch's gradient in the parameters; return this rank's part of the loss.

    Weights are cast once: autocast is open around all micro-batches.
    """
    cfg = job.cfg
    total = torch.zeros((), device=world.device)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=job.dtype == torch.bfloat16):
        for i, batch in enumerate(micro_batches):
            torch.manual_seed(dropout_seed(cfg.run.seed, step, world.rank, i))
            with world.no_sync(model, unless=i == len(micro_batches) - 1):
                batch = batch.to(world.device)
                logits = model(**batch.inputs).logits
                loss = step_loss(logits, batch.labels, batch.weights, n, cfg.train.label_smoothing)
                if batch.is_filler:
                    loss = loss * 0.0
                (loss * world.size).backward()  # DDP averages over ranks; the step wants the sum
            total += loss.detach()
    return total


# --- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(job: Job, split: TokenisedSplit, world: World) -> np.ndarray:
    """The logits of every text of a split in row order, (N, K) float32, the same on every rank.

    Batches are cut once, whatever the world size; each rank fills its rows of a zero array, and
    adding zeros is exact. The model is left in training mode.
    """
    texts, model = Texts(split, job.template), job.model.eval()
    logits = torch.zeros(len(split), len(job.corpus.label_names))
    batches = job.evaluation_batches(split)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=job.dtype == torch.bfloat16):
        for rows in batches[world.rank :: world.size]:
            batch = job.collate([texts[i] for i in rows]).to(world.device)
            logits[rows] = model(**batch.inputs).logits.float().cpu()
    model.train()
    return world.sum(logits).numpy()


def evaluate_and_judge(job: Job, progress: Progress, world: World) -> dict[str, object]:
    """Score the validation split and note whether it is the best so far; ties go to the earlier."""
    logits = evaluate(job, job.corpus.validation, world)
    scores = world.share(
        scoring.score_split(job, job.corpus.validation, logits) if world.is_main else None
    )
    value = metrics.select(job.cfg.evaluation.metric, scores)
    if progress.best is None or value > progress.best:
        progress.best, progress.best_step, progress.bad_evaluations = value, progress.step, 0
    else:
        progress.bad_evaluations += 1
    return scores


# --- the loop -------------------------------------------------------------------------------------


STOP, SAVE = 2, 1  # what a rank may ask the others for after a step


def batches_by_step(
    job: Job, sampler: StepSampler, device: torch.device
) -> Iterator[tuple[int, list[MicroBatch], float]]:
    """(step, its micro-batches on this rank, seconds waited for them), from the sampler's first."""
    generator = torch.Generator()  # the loader draws from it even when it does not shuffle
    workers = job.cfg.data.workers
    if workers == "auto":  # a GPU must not wait for the next batches; a CPU has no core to spare
        workers = 2 if device.type == "cuda" else 0
    loader = DataLoader(
        job.training_texts,
        batch_sampler=sampler,
        collate_fn=job.collate,
        num_workers=workers,
        worker_init_fn=signals.ignore_in_worker,
        # A server that forks workers, Python 3.14's way, would outlive a killed trainer.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=device.type == "cuda",
        generator=generator,
    )
    with signals.held():  # a worker must not die of one before it has learnt to ignore it
        stream = iter(loader)
    for step in range(sampler.first_step, job.steps.total_steps):
        before = time.perf_counter()
        first = next(stream)  # before it comes, the sampler has counted its step
        rest = [next(stream) for _ in range(sampler.counts.popleft() - 1)]
        yield step, [first, *rest], time.perf_counter() - before


def train(
    job: Job, world: World, saver: Saver, log: RunLog, console: Console
) -> tuple[Progress, str]:
    """Train to the end, to early stopping or to a stop request; (progress, why it ended).

    Begins at the run's newest checkpoint. After each step, in this order: log, evaluate, save,
    stop. What is saved at a step includes its evaluation.
    """
    cfg, total, stop = job.cfg, job.steps.total_steps, world.stop
    stop.is_saving_needed = True
    optimizer = make_optimizer(job.model, cfg.optimizer)
    progress = resume(job, optimizer, world, saver.run, log, console)
    model = world.wrap(job.model.train())
    sampler = job.sampler(world.rank, progress.step)
    skipped = torch.zeros((), device=world.device)  # updates, since last read
    meter, estimate = Meter(), Estimate(workload(job, sampler))
    console.start_bar(progress.step, total)
    stream = batches_by_step(job, sampler, world.device)
    ended = progress.is_over(job)
    while not ended:
        began = time.perf_counter()
        step, micro_batches, waited_s = next(stream)
        n = len(sampler.global_batch(step))
        lr = set_lr(optimizer, step, job.steps, cfg.schedule.min_lr_ratio)
        loss = backward(model, micro_batches, n, step, job, world)
        norm, was_skipped = update(optimizer, cfg.train.max_grad_norm)
        skipped += was_skipped
        progress.step += 1
        console.advance()
        cells = sum(b.inputs["input_ids"].numel() for b in micro_batches)
        tokens = sum(b.tokens for b in micro_batches)
        meter.add(examples=n, tokens=tokens, waited_s=waited_s)

        if due(progress.step, cfg.log.every, job):
            progress.skipped += read_and_clear(skipped)
            loss = float(world.sum(loss))
            fields = {"step": progress.step, "epoch": progress.step / job.steps.steps_per_epoch}
            fields |= {"loss": loss, "lr": lr, "grad_norm": float(norm)}
            fields |= {"skipped": progress.skipped}  # updates so far
            fields |= {"padding_share": 1 - tokens / cells}  # of rank 0, in this step
            log.write("step", **fields, **meter.report(world.size, world.device))
            console.show(f"step {progress.step}/{total}  loss {loss:.4f}  lr {lr:.2e}")
            refuse_nonfinite(progress, cfg)
        seconds = estimate.add(cells, time.perf_counter() - began)
        if seconds is not None:
            left = "the rest of the run" if sampler.first_step else "the whole run"
            console.say(f"{left} takes about {in_words(seconds)} if it does not stop early")
        if due(progress.step, cfg.evaluation.every, job):
            scores = evaluate_and_judge(job, progress, world)
            is_best = progress.best_step == progress.step
            fields = {"epoch": progress.step / job.steps.steps_per_epoch}
            fields |= {"best": is_best, "value": scoring.deciding(job, scores)}
            log.write("eval", step=progress.step, split="validation", **fields, **scores)
            console.say(scoring.evaluation_line(job, progress, scores))
            meter.restart()
        asked = STOP if stop.is_set(progress.step) else SAVE * saver.owes(progress.step)
        asked = world.largest(asked)
        ended = progress.is_over(job)
        if not ended and asked == STOP:
            ended = f"stopped by {stop.name or 'a signal on another rank'}"
        improved = progress.best_step == progress.step
        if ended or asked or improved or due(progress.step, cfg.checkpoint.every, job):
            progress.skipped += read_and_clear(skipped)
            refuse_nonfinite(progress, cfg)
            is_last = bool(ended)
            world.one_at_first(lambda: saver.save(optimizer, progress, is_last=is_last))  # noqa: B023
            meter.restart()
    world.one_at_first(saver.wait)
    console.stop_bar()
    return progress, ended


def due(step: int, every: int | str, job: Job) -> bool:
    """Whether something that happens every so many steps, or each epoch, happens after `step`."""
    interval = job.steps.steps_per_epoch if every == "epoch" else every
    return step % interval == 0 or step == job.steps.total_steps


def read_and_clear(count: Tensor) -> int:
    """The number in a device tensor, which begins anew at zero."""
    value = int(count.item())
    count.zero_()
    return value


def refuse_nonfinite(progress: Progress, cfg: Config) -> None:
    """End with 76 once more updates were skipped than are allowed."""
    if progress.skipped > cfg.train.max_nonfinite:
        raise Refusal(
            NON_FINITE,
            f"{progress.skipped} of {progress.step} steps had a gradient that is not finite, more "
            f"than train.max_nonfinite={cfg.train.max_nonfinite}; lower optimizer.lr or use fp32",
            is_agreed=True,
        )


# --- from the command line to the exit code -------------------------------------------------------


def run_training(cfg: Config, world: World, console: Console, *, strict: bool) -> int:
    """Prepare, train, finish: the exit code. Ends at once if this run is finished already."""
    world.require_same(BAD_CONFIG, code=results.code_key(), settings=config.shared(cfg))
    job = prepare(cfg, world, console.say, strict=strict)
    run = world.one_at_first(lambda: results.open_directory(job))
    finished = world.share(results.finished_line(run) if run else None)
    if finished:
        console.say(finished)
        return OK
    fitted = world.share(run.fitted_tokens() if run else None)
    if fitted and cfg.train.micro_batch_tokens == "auto":
        job = keep_cut(job, fitted, console.say)
    log = world.one_at_first(lambda: open_log(run)) or RunLog(None)
    recorder = hardware_recorder(job.cfg, world, run, log)
    try:
        world.one_at_first(lambda: results.start(job, run, log, console, world))
        if world.local_rank == 0:
            recorder.start()
        with memory_explained(job.cfg), saving(job, run, log, console, world.device) as saver:
            progress, reason = train(job, world, saver, log, console)
        if progress.is_over(job) is None:
            again, name = "run the same command", world.share(run.path.name if run else None)
            if cfg.run.resume == "never":  # as it is, it would begin another run
                again += f" with run.resume=auto run.name={name}"
            message = f"{reason} after step {progress.step}; {again} to go on"
            raise Refusal(STOPPED, message, is_agreed=True)
        load_best(job, world, run, progress)
        logits = final_logits(job, world)
        world.one_at_first(
            lambda: results.finish(job, run, log, console, progress, reason=reason, logits=logits)
        )
    except BaseException as error:
        if run:
            results.record_failure(run, log, error)
        raise
    finally:
        console.stop_bar()
        recorder.stop()
        log.close()
        if run:
            run.close()
    return OK


def hardware_recorder(cfg: Config, world: World, run: RunDir | None, log: RunLog) -> Recorder:
    """What watches this machine, one on each: rank 0's writes to the log, others' tell it."""
    machine = Machine(run.path if run else None, used_gpus(world.device))
    if not world.is_main:
        return Recorder(machine, cfg.log.hardware_s, world.watch.post)
    others = world.watch.posts if world.watch else list
    return Recorder(machine, cfg.log.hardware_s, lambda r: log.write("hardware", **r), others)


def final_logits(job: Job, world: World) -> dict[str, np.ndarray]:
    """The best model's logits of each split. All is saved: a stop request ends one process here."""
    world.stop.is_saving_needed = world.size > 1
    with world.stop.at_once():
        logits = {name: evaluate(job, s, world) for name, s in job.corpus.evaluated().items()}
    world.stop.is_saving_needed = True
    return logits


@contextlib.contextmanager
def memory_explained(cfg: Config) -> Iterator[None]:
    """Out of memory within is Refusal 70 with the settings that need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch has a type of its own for GPUs only.
        known = (torch.OutOfMemoryError, MemoryError)
        if not (isinstance(error, known) or "can't allocate memory" in str(error)):
            raise
        raise Refusal(
            CRASH,
            f"out of memory; lower train.micro_batch_tokens (now {cfg.train.micro_batch_tokens}), "
            "set speed.gradient_checkpointing=true, or lower data.max_length: "
            f"{str(error).strip().partition(chr(10))[0] or type(error).__name__}",
        ) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Refusal(USAGE, f"{message}; {self.format_usage().strip()}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; Refusal 64 for one that cannot be meant."""
    parser = _Parser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="config.yaml", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="try everything, train nothing")
    parser.add_argument(
        "--strict", action="store_true", help="a warning about the data is an error"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run one process of a training; the exit code of errors.py."""
    console = Console(speaks=int(os.environ.get("RANK", 0)) == 0)
    forget_earlier_end()
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        cfg = config.load(args.config, args.overrides)
        if stop is None:
            stop = StopRequest()
            stop.listen()
        with process_group(cfg.run.device, cfg.run.timeout_s, stop) as world:
            if args.check:
                with stop.at_once():
                    return check(cfg, world, console, strict=args.strict)
            return run_training(cfg, world, console, strict=args.strict)
    except Stopped as stopped:
        return end(Refusal(STOPPED, str(stopped), is_agreed=True), console)
    except Refusal as error:
        return end(error, console)
    except Exception:
        is_first = first_to_end(CRASH)
        console.end(traceback.format_exc().rstrip(), is_shown=is_first)
        return CRASH


def end(error: Refusal, console: Console) -> int:
    """Say why the program ends; the exit code.

    torchrun restarts or reports what ends with an error; an agreed end is none to it, and the
    script has the code. One rank's own must end the others, which wait for it.
    """
    console.end(error.message, is_shown=first_to_end(error.exit_code))
    quiet = error.is_agreed and "EXIT_CODE_FILE" in os.environ
    return OK if quiet else error.exit_code


def forget_earlier_end() -> None:
    """Delete the exit code of the ranks that torchrun has started these instead of."""
    if "EXIT_CODE_FILE" in os.environ and restarts():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{os.environ['EXIT_CODE_FILE']}.{restarts() - 1}")


def open_log(run: RunDir) -> RunLog:
    """The run's log, to be gone on with."""
    with writing(run.path):
        return RunLog(run.path / "metrics.jsonl")


def first_to_end(exit_code: int) -> bool:
    """Leave the exit code in the file that EXIT_CODE_FILE names; whether no other rank had.

    torchrun turns every exit code into 1, so the script that started it reads this instead, of the
    last restart. It is what a link names: that is whole, exclusive, and made on a full disk, too.
    """
    path = os.environ.get("EXIT_CODE_FILE")
    if path is None:  # torchrun without the script: each rank tells its own crash
        return exit_code == CRASH or int(os.environ.get("RANK", 0)) == 0
    try:
        os.symlink(str(exit_code), f"{path}.{restarts()}")
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


if __name__ == "__main__":
    code = main()
    if code != OK and "RANK" in os.environ:
        sys.stderr.flush()
        os._exit(code)  # what is torn down after an error can wait for other ranks for ever
    sys.exit(code)
