"""What a run knows beside its weights, and how it goes on after an interruption."""

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

import checkpoint
from console import Console
from ddp import World
from errors import BAD_CONFIG, CANNOT_WRITE, MISSING, Refusal, printable
from files import write_json, writing
from metrics import natural
from optimizer import state_tensors
from prepare import Job
from rundir import RunDir
from runlog import RunLog, lines

MAX_RETRY_STEPS = 64  # between two tries of a save that failed


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

    A save that fails is said and tried again after later steps; only the last one's failure ends
    the run. A best checkpoint that could not be written is kept in memory until it can.
    `run` is None on every rank but 0, which never saves.
    """

    def __init__(
        self, job: Job, run: RunDir | None, log: RunLog, console: Console, *, in_background: bool
    ):
        self.job, self.run, self.log, self.console = job, run, log, console
        self.in_background = in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._unsaved_best: tuple[dict, Progress] | None = None
        self._failures, self._retry_at = 0, 0
        self._is_low = False

    def owes(self, step: int) -> bool:
        """Whether a failed save is to be tried again after `step`."""
        return self._failures > 0 and step >= self._retry_at

    def save(
        self, optimizer: torch.optim.AdamW, progress: Progress, *, is_last: bool = False
    ) -> None:
        """Save this step, or begin to. Refusal 73 if it is the last one and cannot be written."""
        self.wait()
        began = time.perf_counter()
        files = checkpoint.tensors(self.job.model, optimizer, copy=self.in_background)
        state = dataclasses.replace(progress)
        paused = time.perf_counter() - began if self.in_background else None
        arguments = (files, state, began, paused, is_last)
        if self.in_background:
            self._thread = threading.Thread(target=self._catch, args=arguments)
            self._thread.start()
        else:
            self._try(*arguments)

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def _catch(self, *arguments: object) -> None:
        try:
            self._try(*arguments)
        except BaseException as error:
            self._error = error

    def _try(
        self, files: dict, state: Progress, began: float, paused_s: float | None, is_last: bool
    ) -> None:
        try:
            with writing(self.run.path):
                self.run.check_held()
                self.log.sync()  # what it tells of the steps so far must be as durable as they are
                if self._unsaved_best:
                    self._write(*self._unsaved_best)
                    self._unsaved_best = None
                self._write(files, state)
        except Refusal as error:
            if is_last or error.exit_code != CANNOT_WRITE:
                raise
            self._put_off(error, files, state)
            return
        if self._failures:
            self.console.say(f"the checkpoint of step {state.step} could be written")
        self._failures = 0
        seconds = time.perf_counter() - began
        times = {"seconds": seconds, "paused_s": seconds if paused_s is None else paused_s}
        rounded = {name: round(value, 3) for name, value in times.items()}
        folder = checkpoint.folder_of(self.run.checkpoints, state.step).name
        size = checkpoint.size_of(files)
        self.log.write("checkpoint", step=state.step, folder=folder, bytes=size, **rounded)
        self._warn_if_low(size)

    def _write(self, files: dict, state: Progress) -> None:
        run, metric = self.run, self.job.cfg.evaluation.metric
        checkpoint.save(run.checkpoints, files, asdict(state) | {"run": run.key})
        best = checkpoint.folder_of(run.checkpoints, state.best_step)
        if state.best is not None:
            pointer = {"checkpoint": best.name, "metric": metric}
            pointer["value"] = natural(metric, state.best)
            write_json(run.path / "best.json", pointer)
        if self.job.cfg.checkpoint.keep != "all":
            checkpoint.prune(run.checkpoints, self.job.cfg.checkpoint.keep, best)

    def _put_off(self, error: Refusal, files: dict, state: Progress) -> None:
        if state.best_step == state.step:
            self._unsaved_best = (files if self.in_background else _copied(files), state)
        if not self._failures:
            message = f"step {state.step} is not saved and will be tried again: {error.message}"
            self.console.say(f"warning: {message}")
            self.log.write("warning", code="checkpoint_failed", message=message)
        self._failures += 1
        self._retry_at = state.step + min(2 ** (self._failures - 1), MAX_RETRY_STEPS)

    def _warn_if_low(self, size: int) -> None:
        free = shutil.disk_usage(self.run.path).free
        if free < 2 * size and not self._is_low:
            message = f"the disk runs low: {free / 1e9:.1f} GB free, a checkpoint has "
            message += f"{size / 1e9:.1f} GB"
            self.console.say(f"warning: {message}")
            self.log.write("warning", code="disk_low", message=message)
        self._is_low = free < 2 * size


def _copied(files: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    return {file: {name: t.clone() for name, t in named.items()} for file, named in files.items()}


@contextlib.contextmanager
def saving(
    job: Job, run: RunDir | None, log: RunLog, console: Console, device: torch.device
) -> Iterator[Saver]:
    """A Saver; nothing is still being written afterwards."""
    saver = Saver(job, run, log, console, in_background=writes_in_background(device))
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
        if folder is None and any(e["event"] == "checkpoint" for e in lines(log.path)):
            raise Refusal(
                MISSING,
                f"{printable(run.checkpoints, 300)}: the checkpoints that the run's log tells of "
                "are gone; put them back, or begin anew beside it with run.resume=never",
            )
        saved = _checked(checkpoint.load(folder, job.model, optimizer), run) if folder else None
        run.begin_at(saved["step"] if saved else 0)
        return saved

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


def _checked(state: dict[str, object], run: RunDir) -> dict[str, object]:
    """A checkpoint's state as fields of Progress; Refusal 66, or 78 if it is of another run."""
    of_run, wanted = state.pop("run", None), asdict(Progress())
    odd = state.keys() ^ wanted.keys()
    odd |= {n for n in state.keys() & wanted.keys() if not _is_number(state[n], n == "best")}
    if odd:
        where = printable(run.checkpoints, 300)
        raise Refusal(MISSING, f"{where}: a state.json is odd at '{printable(sorted(odd)[0])}'")
    if of_run != run.key:  # run_state.json, which would have told the difference, was lost
        raise Refusal(
            BAD_CONFIG,
            f"run.name: the checkpoints in {printable(run.path, 300)} are of a run with other "
            "settings, data or weights; choose another name or set run.resume=never",
        )
    return state


def _is_number(value: object, is_float: bool) -> bool:
    if is_float:
        return value is None or type(value) in (int, float)
    return type(value) is int and 0 <= value < 1 << 62


def load_best(job: Job, world: World, run: RunDir | None, progress: Progress) -> None:
    """The weights of the best checkpoint into the model, on every rank."""

    def load() -> None:
        folder = checkpoint.folder_of(run.checkpoints, progress.best_step)
        # Long ago written, and safetensors sees no flipped bit.
        wrong = checkpoint.fault(folder, checkpoint.FILES)
        if wrong:
            raise Refusal(MISSING, f"{folder}: the best checkpoint is damaged: {wrong}")
        checkpoint.load_weights(folder, job.model)

    world.one_at_first(load)
    for tensor in checkpoint.model_tensors(job.model).values():
        world.broadcast(tensor)
