"""What a run knows beside its weights, and how it goes on after an interruption."""

import time
from dataclasses import asdict, dataclass

import torch

import checkpoint
from console import Console
from ddp import World
from errors import MISSING, Refusal
from metrics import natural
from optimizer import state_tensors
from prepare import Job
from rundir import RunDir
from runlog import RunLog


@dataclass
class Progress:
    """All that a run knows beside weights and AdamW's moments; saved with each checkpoint."""

    step: int = 0  # global batches consumed
    skipped: int = 0  # of them without an update, the gradient not being finite
    best: float | None = None  # value of evaluation.metric, higher is better
    best_step: int = 0
    bad_evaluations: int = 0  # since the best one

    def is_over(self, job: Job) -> str | None:
        """Why there is no further step, or None."""
        patience = job.cfg.evaluation.patience
        if patience is not None and self.bad_evaluations >= patience:
            return f"no better {job.cfg.evaluation.metric} in {patience} evaluations"
        return "all steps done" if self.step >= job.steps.total_steps else None


def save(
    job: Job,
    optimizer: torch.optim.AdamW,
    progress: Progress,
    run: RunDir,
    log: RunLog,
) -> None:
    """A checkpoint of this step, the pointer to the best one, and no more old ones than wanted."""
    began = time.perf_counter()
    log.sync()  # what it tells of the steps up to here must be as durable as the checkpoint
    folder = checkpoint.save(run.checkpoints, job.model, optimizer, asdict(progress))
    best = checkpoint.folder_of(run.checkpoints, progress.best_step)
    if progress.best is not None:
        pointer = {"checkpoint": best.name, "metric": job.cfg.evaluation.metric}
        value = natural(job.cfg.evaluation.metric, progress.best)
        checkpoint.write_json(run.path / "best.json", pointer | {"value": value})
    if job.cfg.checkpoint.keep != "all":
        checkpoint.prune(run.checkpoints, job.cfg.checkpoint.keep, best)
    seconds = round(time.perf_counter() - began, 3)
    log.write("checkpoint", step=progress.step, folder=folder.name, seconds=seconds)


def resume(
    job: Job,
    optimizer: torch.optim.AdamW,
    world: World,
    run: RunDir | None,
    log: RunLog,
    console: Console,
) -> Progress:
    """Load the newest checkpoint on rank 0 and give it to all; a new Progress if there is none."""

    def load() -> dict[str, object] | None:
        folder, faults = checkpoint.newest(run.checkpoints)
        for wrong in faults:
            message = f"a damaged checkpoint is set aside: {wrong}"
            log.write("warning", code="damaged_checkpoint", message=message)
            console.say(message)
        return checkpoint.load(folder, job.model, optimizer) if folder else None

    saved = world.share(world.one_at_first(load))
    if saved is None:
        if log.continues:
            log.write("resume", step=0)  # it was ended before its first checkpoint
        return Progress()
    for tensor in checkpoint.model_tensors(job.model).values():
        world.broadcast(tensor)
    for _, tensor in state_tensors(job.model, optimizer):
        world.broadcast(tensor)
    progress = Progress(**saved)
    log.write("resume", step=progress.step, world_size=world.size)
    console.say(f"going on after step {progress.step} of {job.steps.total_steps}")
    return progress


def load_best(job: Job, world: World, run: RunDir | None, progress: Progress) -> None:
    """The weights of the best checkpoint into the model, on every rank."""

    def load() -> None:
        folder = checkpoint.folder_of(run.checkpoints, progress.best_step)
        wrong = checkpoint.fault(folder)  # long ago written, and safetensors sees no flipped bit
        if wrong:
            raise Refusal(MISSING, f"{folder}: the best checkpoint is damaged: {wrong}")
        checkpoint.load_weights(folder, job.model)

    world.one_at_first(load)
    for tensor in checkpoint.model_tensors(job.model).values():
        world.broadcast(tensor)
