"""What a run knows beside its weights, and how it goes on after an interruption."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
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


def writes_in_background(device: torch.device) -> bool:
    """Whether training goes on while a checkpoint is written, from a copy in the CPU's memory.

    On a CPU that copy would be as large as what is saved, and writing takes a core from training.
    """
    return device.type != "cpu"


class Saver:
    """Saves checkpoints with the pointer to the best one, and keeps no more old ones than wanted.

    `run` is None on every rank but 0, which never saves.
    """

    def __init__(self, job: Job, run: RunDir | None, log: RunLog, *, in_background: bool):
        self.job, self.run, self.log, self.in_background = job, run, log, in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, optimizer: torch.optim.AdamW, progress: Progress) -> None:
        """Save this step, or begin to; what went wrong in the background before is raised here."""
        self.wait()
        began = time.perf_counter()
        self.log.sync()  # what it tells of the steps so far must be as durable as the checkpoint
        files = checkpoint.tensors(self.job.model, optimizer, copy=self.in_background)
        state = dataclasses.replace(progress)
        paused = time.perf_counter() - began
        if not self.in_background:
            self._write(files, state, began, None)
            return
        self._thread = threading.Thread(target=self._try, args=(files, state, began, paused))
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def _try(self, *arguments: object) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:
            self._error = error

    def _write(self, files: dict, state: Progress, began: float, paused_s: float | None) -> None:
        run, metric = self.run, self.job.cfg.evaluation.metric
        folder = checkpoint.save(run.checkpoints, files, asdict(state))
        best = checkpoint.folder_of(run.checkpoints, state.best_step)
        if state.best is not None:
            pointer = {"checkpoint": best.name, "metric": metric}
            pointer["value"] = natural(metric, state.best)
            checkpoint.write_json(run.path / "best.json", pointer)
        if self.job.cfg.checkpoint.keep != "all":
            checkpoint.prune(run.checkpoints, self.job.cfg.checkpoint.keep, best)
        seconds = time.perf_counter() - began
        times = {"seconds": seconds, "paused_s": seconds if paused_s is None else paused_s}
        rounded = {name: round(value, 3) for name, value in times.items()}
        self.log.write("checkpoint", step=state.step, folder=folder.name, **rounded)


@contextlib.contextmanager
def saving(job: Job, run: RunDir | None, log: RunLog, device: torch.device) -> Iterator[Saver]:
    """A Saver; nothing is still being written afterwards."""
    saver = Saver(job, run, log, in_background=writes_in_background(device))
    try:
        yield saver
    except BaseException:
        with contextlib.suppress(BaseException):  # the first error is the one to show
            saver.wait()
        raise
    saver.wait()


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
