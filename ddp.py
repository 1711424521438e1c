"""The processes of a run: their group, sums over them, and how they agree."""

import contextlib
import datetime
import hashlib
import inspect
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from errors import CRASH, STOPPED, UNAVAILABLE, Refusal
from signals import Stopped, StopRequest
from watch import Watch


@dataclass(frozen=True)
class World:
    """This process among all: rank 0 to size - 1; local_rank counts within this machine."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    watch: Watch | None = None  # of many ranks

    @property
    def is_main(self) -> bool:
        """Whether this rank does the writing and speaking."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, in place, on its own device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's `tensor` on every rank, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
            torch.autograd.graph.increment_version(tensor)  # which broadcast does not do
        return tensor

    def largest(self, value: int) -> int:
        """The largest `value` of any rank: how ranks agree. Over CPU: no device is waited for."""
        if self.size == 1:
            return value
        number = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def share(self, value: object) -> object:
        """Rank 0's `value`, which JSON can hold, on every rank."""
        if self.size == 1:
            return value
        raw = json.dumps(value).encode() if self.is_main else b""
        size = self.largest(len(raw))
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.is_main:
            buffer[:] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return json.loads(bytes(self.broadcast(buffer).tolist()))

    def one_at_first(self, action: Callable[[], object], *, every_host: bool = False) -> object:
        """`action()` on rank 0 (`every_host`: on each machine's first rank) before anyone goes on.

        Returns what it returned there and None elsewhere. A Refusal is raised on every rank alike,
        so that none waits for another that has left.
        """
        acts = self.rank == 0 or (every_host and self.local_rank == 0)
        return self.together(action if acts else lambda: None)

    def together(self, action: Callable[[], object]) -> object:
        """`action()` on every rank; if any refuses, all do. Before training a signal ends it."""
        result, refusal = None, None
        try:
            with self.stop.at_once():
                result = action()
        except Refusal as error:
            refusal = error
        except Stopped as stopped:
            refusal = Refusal(STOPPED, str(stopped))
        self.agree(refusal)
        return result

    def require_same(self, exit_code: int, **values: object) -> None:
        """Refusal if some rank has another value than rank 0; None on a rank is not compared.

        Machines that differ in code, settings or data would train on without a word.
        """
        if self.size == 1:
            return
        ours = {name: _digest(value) for name, value in values.items()}
        theirs = self.share(ours)

        def compare() -> None:
            for name, value in values.items():
                if value is not None and theirs[name] != ours[name]:
                    raise Refusal(
                        exit_code,
                        f"rank {self.rank} on {socket.gethostname()} has other {name} than rank 0: "
                        f"hash {ours[name]}, not {theirs[name]}; they must be the same everywhere",
                    )

        self.together(compare)

    def agree(self, refusal: Refusal | None) -> None:
        """Raise on every rank if any rank refuses, with the message of the first that does."""
        if self.size == 1:
            if refusal:
                raise refusal
            return
        first = self.size - self.largest(self.size - self.rank if refusal else 0)
        if first == self.size:
            return
        raw = f"{refusal.exit_code} {refusal.message}".encode() if refusal else b""
        buffer = torch.zeros(self.largest(len(raw)), dtype=torch.uint8)
        if self.rank == first:
            buffer[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        dist.broadcast(buffer, src=first)
        code, _, message = bytes(buffer.tolist()).rstrip(b"\0").decode().partition(" ")
        raise Refusal(int(code), message, is_agreed=True)

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with its gradients averaged over the ranks at each synchronised backward."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # The models' buffers are constants, or change alike on every rank. torch 2.13 renamed the
        # option that sends them.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, **{option: False}
        )

    def no_sync(self, model: nn.Module, *, unless: bool) -> contextlib.AbstractContextManager:
        """Keep this backward's gradients local, unless it is the last of the step."""
        return contextlib.nullcontext() if unless or self.size == 1 else model.no_sync()


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of one process; Refusal 69 for a GPU that is asked for or present but unusable."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        count, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if max(local_rank, ranks - 1) < count:  # the same answer on all ranks of a machine
            return torch.device("cuda", local_rank)
        message = f"{ranks} processes need a GPU each, but {count} are visible"
        raise Refusal(UNAVAILABLE, f"{message}; lower NPROC or set run.device=cpu")
    driver = nvidia_driver()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    if wanted == "cuda" or (driver and not hidden):
        seen = f"driver {driver} is installed" if driver else "no NVIDIA driver is installed"
        message = f"torch {torch.__version__} sees no usable GPU; {seen}"
        raise Refusal(UNAVAILABLE, f"{message}; set run.device=cpu to train on the CPU")
    return torch.device("cpu")


def used_gpus(device: torch.device) -> str | None:
    """The UUIDs of this machine's GPUs that the ranks train on, as CUDA_VISIBLE_DEVICES has them.

    Empty if they train on the CPU; where torch does not tell, that variable's own value.
    """
    if device.type != "cuda":
        return ""
    try:
        ranks = range(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in ranks]
    except (AttributeError, AssertionError, RuntimeError):
        return os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(f"GPU-{uuid.removeprefix('GPU-')}" for uuid in uuids)


def restarts() -> int:
    """How often torchrun has started these ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def nvidia_driver() -> str | None:
    """The version of the loaded NVIDIA kernel driver, or None where there is none."""
    try:
        with open("/proc/driver/nvidia/version", encoding="ascii", errors="replace") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((w for w in words if w[:1].isdigit() and "." in w), "of unknown version")


def _digest(value: object) -> str:
    raw = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(raw).hexdigest()[:12]


@contextlib.contextmanager
def process_group(
    device: str = "auto", timeout_s: int = 1800, stop: StopRequest | None = None
) -> Iterator[World]:
    """The World of this process, from torchrun's environment; alone if there is none.

    The group is torn down after success and agreed ends only: after an error that can hang and
    hide the cause. If the error is that others do not answer, Refusal 70 names them.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    place = pick_device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    stop = stop or StopRequest()
    if size == 1:
        yield World(rank, local_rank, size, place, stop)
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    # torchrun's store outlives the ranks; a restarted one would find its peers' old addresses.
    store = dist.PrefixStore(f"start {restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    watch = Watch(store, rank, size, stop)
    watch.start()
    world = World(rank, local_rank, size, place, stop, watch)
    try:
        yield world
        world.largest(0)  # all are done; over CPU, as NCCL's barrier takes GPU memory
    except Refusal as error:
        if not error.is_agreed:
            watch.tell_failure()
            raise
        dist.destroy_process_group()
        raise
    except Exception as error:
        watch.tell_failure()
        silent = watch.silent() if _is_of_a_peer(error) else []
        if silent:
            raise Refusal(
                CRASH,
                f"no sign of life from {', '.join(silent)}: stopped, killed or cut off; the others "
                f"waited at most run.timeout_s={timeout_s} s",
            ) from error
        raise
    finally:
        watch.close()
    dist.destroy_process_group()


def _is_of_a_peer(error: Exception) -> bool:
    """Whether a collective failed, which is another rank's fault; gloo has no type for that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
