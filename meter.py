"""Throughput between log points, and how long the whole run will take."""

import resource
import sys
import time
from dataclasses import dataclass, field

import torch

GIB = 1 << 30
FIRST_ESTIMATE_S = 10.0  # after this much of steps, if there were at least three
LATEST_ESTIMATE_S = 15.0  # after this much, however few there were


@dataclass
class Meter:
    """Adds up what one rank did since the last `report`."""

    steps: int = 0
    examples: int = 0  # of all ranks
    tokens: int = 0
    waited_s: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def add(self, *, examples: int, tokens: int, waited_s: float) -> None:
        """One step's share."""
        self.steps += 1
        self.examples += examples
        self.tokens += tokens
        self.waited_s += waited_s

    def restart(self) -> None:
        """Begin anew, after something that is not training."""
        self.__init__()

    def report(self, world_size: int, device: torch.device) -> dict[str, float]:
        """The fields of a step event, and a new beginning."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        fields = {
            "step_s": seconds / max(1, self.steps),
            "examples_per_s": self.examples / seconds,
            "tokens_per_s": self.tokens * world_size / seconds,
            "data_wait_share": self.waited_s / seconds,
            "peak_memory_gib": peak_memory_gib(device),
        }
        self.restart()
        return {name: round(value, 4) for name, value in fields.items()}


@dataclass(frozen=True)
class Workload:
    """What is left of a run, on this rank."""

    training_cells: float  # tokens with padding of all steps
    evaluation_cells: float  # of all forwards for scores
    saving_s: float = 0.0

    @property
    def cells(self) -> float:
        """In units of training: a backward computes two products for each of its forward's one."""
        return self.training_cells + self.evaluation_cells / 3


class Estimate:
    """Predicts a run's length from its first steps, whose cost goes with their tokens."""

    def __init__(self, work: Workload):
        self._work = work
        self._cells, self._seconds, self._steps, self._told = 0, 0.0, 0, False

    def add(self, cells: int, seconds: float) -> float | None:
        """Count one step; the seconds of the whole once there is enough to tell, and only once.

        The first step is not counted: it allocates and compiles.
        """
        self._steps += 1
        if self._steps == 1:
            return None
        self._cells += cells
        self._seconds += seconds
        is_steady = self._steps >= 4 and self._seconds >= FIRST_ESTIMATE_S
        if self._told or not (is_steady or self._seconds >= LATEST_ESTIMATE_S):
            return None
        self._told = True
        return self.whole()

    def whole(self) -> float:
        """Seconds for all the work, at the pace so far."""
        return self._work.cells * self._seconds / max(1, self._cells) + self._work.saving_s


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far in GiB: allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def in_words(seconds: float) -> str:
    """A length of time to about two figures, such as 45 s, 2.5 min, 12 min or 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 597:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
