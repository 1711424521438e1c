"""What the machine is doing: GPUs through NVML, CPU and memory from the system. No torch here."""

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

GIB = 1 << 30


# --- GPUs -----------------------------------------------------------------------------------------


def gpus(visible: str | None = None) -> tuple[list[dict[str, object]], str | None]:
    """A record for each NVIDIA GPU of this machine, and why there are none.

    Fields: uuid, name, util_percent, memory_gib, memory_total_gib, temperature_c, power_w; what a
    GPU does not tell is None, with the reason in "unavailable" by field. `visible`: only these, as
    CUDA_VISIBLE_DEVICES names them, by UUID, its beginning, or index. Indices are NVML's, which
    are CUDA's where all GPUs are of one kind or CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return [], "nvidia-ml-py is not installed"
    except Exception as error:
        return [], _reason(error)
    try:
        names = _all(pynvml) if visible is None else [n.strip() for n in visible.split(",")]
        found = []
        for name in names:
            gpu = _gpu(pynvml, name)
            if gpu is None:  # as CUDA has it: what comes after an entry that is none is hidden
                break
            found.append(gpu)
        return found, None if found else "no GPU" if visible is None else "no visible GPU"
    except Exception as error:
        return [], _reason(error)
    finally:
        _ask(lambda: pynvml.nvmlShutdown())


def _all(nvml) -> list[str]:
    return [str(i) for i in range(nvml.nvmlDeviceGetCount())]


def _gpu(nvml, name: str) -> dict[str, object] | None:
    """The record of a GPU by index or UUID; None if there never was one of that name."""
    unavailable: dict[str, str] = {}

    def ask(fields: str, question: Callable, *arguments: object) -> object | None:
        value, reason = _ask(question, handle, *arguments)
        if reason:
            unavailable.update(dict.fromkeys(fields.split(), reason))
        return value

    handle, reason = _handle(nvml, name)
    if handle is None:
        is_index = name.isdigit() and int(name) < (_ask(nvml.nvmlDeviceGetCount)[0] or 0)
        is_known = is_index or name.startswith(("GPU-", "MIG-"))  # it may be lost
        return _record(name, {"gpu": reason}) if is_known else None
    gpu = _record(ask("uuid", nvml.nvmlDeviceGetUUID) or name, unavailable)
    gpu["name"] = ask("name", nvml.nvmlDeviceGetName)
    if rates := ask("util_percent", nvml.nvmlDeviceGetUtilizationRates):
        gpu["util_percent"] = rates.gpu
    if memory := ask("memory_gib memory_total_gib", nvml.nvmlDeviceGetMemoryInfo):
        gpu["memory_gib"] = round(memory.used / GIB, 2)
        gpu["memory_total_gib"] = round(memory.total / GIB, 2)
    sensor = nvml.NVML_TEMPERATURE_GPU
    gpu["temperature_c"] = ask("temperature_c", nvml.nvmlDeviceGetTemperature, sensor)
    if (power := ask("power_w", nvml.nvmlDeviceGetPowerUsage)) is not None:
        gpu["power_w"] = round(power / 1000, 1)  # milliwatts
    return {k: v for k, v in gpu.items() if k != "unavailable" or v}


def _record(uuid: object, unavailable: dict[str, str]) -> dict[str, object]:
    fields = ("name", "util_percent", "memory_gib", "memory_total_gib", "temperature_c", "power_w")
    return {"uuid": uuid, **dict.fromkeys(fields), "unavailable": unavailable}


def _handle(nvml, name: str) -> tuple[object | None, str | None]:
    """NVML's handle of an index, a UUID, or the beginning of one; or why there is none."""
    if name.isdigit():
        return _ask(nvml.nvmlDeviceGetHandleByIndex, int(name))
    handle, reason = _ask(nvml.nvmlDeviceGetHandleByUUID, name)
    for index in _all(nvml) if handle is None and name.startswith("GPU-") else []:
        other, _ = _ask(nvml.nvmlDeviceGetHandleByIndex, int(index))
        uuid, _ = _ask(nvml.nvmlDeviceGetUUID, other)
        if uuid and str(uuid).startswith(name):
            return other, None
    return handle, reason


def _ask(question: Callable, *arguments: object) -> tuple[object | None, str | None]:
    """An answer, or why there is none: a driver may fail in ways of its own."""
    try:
        value = question(*arguments)
    except Exception as error:
        return None, _reason(error)
    return value.decode(errors="replace") if isinstance(value, bytes) else value, None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


# --- the rest of the machine ----------------------------------------------------------------------


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores() -> None:
    """Have threads of OpenMP that wait for each other sleep soon, unless the environment says how.

    Before torch is imported. GNU's library spins 300,000 times, which is no faster on idle cores,
    and several times slower where another process holds one: see RESULTS.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def system() -> dict[str, object]:
    """Load average over a minute, cores, and memory in use and in all (GiB; None where unknown).

    Memory is what may be used here: a container's limit, where there is one.
    """
    used, total = _memory()
    load, _ = _ask(os.getloadavg)
    return {
        "load": None if load is None else round(load[0], 2),
        "cores": usable_cores(),
        "memory_gib": None if used is None else round(used / GIB, 2),
        "memory_total_gib": None if total is None else round(total / GIB, 2),
    }


def _memory() -> tuple[int | None, int | None]:
    """Bytes used and in all."""
    memory = _table("/proc/meminfo", 1024)
    if not {"MemTotal", "MemAvailable"} <= memory.keys():  # macOS tells the total only
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
        return None, pages * os.sysconf("SC_PAGE_SIZE") or None
    used, total = memory["MemTotal"] - memory["MemAvailable"], memory["MemTotal"]
    group = Path("/sys/fs/cgroup", _text("/proc/self/cgroup").rpartition("::/")[2].strip())
    limit, current = _text(group / "memory.max"), _text(group / "memory.current")
    if limit.strip().isdigit() and current.strip().isdigit() and int(limit) < total:
        cached = _table(group / "memory.stat", 1).get("inactive_file", 0)  # given back when needed
        return int(current) - cached, int(limit)
    return used, total


def _table(path: str | Path, unit: int) -> dict[str, int]:
    """A file of names and numbers, times `unit`; empty where there is none."""
    rows = [line.split() for line in _text(path).splitlines()]
    return {r[0].rstrip(":"): int(r[1]) * unit for r in rows if len(r) > 1 and r[1].isdigit()}


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def free_gib(folder: Path) -> float | None:
    """What may still be written where `folder` is, or None if it is gone."""
    try:
        return round(shutil.disk_usage(folder).free / GIB, 2)
    except OSError:
        return None


class Machine:
    """This machine, of which one look after another is taken.

    `folder`: where the space left is wanted; `visible`: of which GPUs, see `gpus`.
    """

    def __init__(self, folder: Path | None = None, visible: str | None = None):
        self.host = socket.gethostname()
        self._folder, self._visible = folder, visible
        self._cpu = self._cpu_times()

    def look(self) -> dict[str, object]:
        """A record: host, GPUs and why there are none, what the CPU did since the last look."""
        found, no_gpu = gpus(self._visible)
        return {
            "host": self.host,
            "gpus": found,
            **({"no_gpu": no_gpu} if no_gpu else {}),
            "cpu_percent": self._cpu_percent(),
            **system(),
            **({"disk_free_gib": free_gib(self._folder)} if self._folder else {}),
        }

    def _cpu_percent(self) -> float | None:
        before, self._cpu = self._cpu, self._cpu_times()
        busy, every = (now - then for now, then in zip(self._cpu, before, strict=True))
        return round(100 * busy / every, 1) if every > 0 else None

    def _cpu_times(self) -> tuple[int, int]:
        """Ticks that all cores were busy, and all their ticks; zeros where there is no /proc."""
        ticks = [int(t) for t in _text("/proc/stat").partition("\n")[0].split()[1:9]]
        return (sum(ticks) - sum(ticks[3:5]), sum(ticks)) if len(ticks) > 4 else (0, 0)


class Recorder(threading.Thread):
    """Hands a look at `machine` to `write` at once and every `every_s` seconds until `stop`.

    So, too, what `others` gives: looks at other machines.
    """

    def __init__(
        self,
        machine: Machine,
        every_s: float,
        write: Callable[[dict[str, object]], None],
        others: Callable[[], Iterable[dict[str, object]]] = list,
    ):
        super().__init__(daemon=True, name="hardware")
        self._machine, self._every_s, self._write, self._others = machine, every_s, write, others
        self._ended = threading.Event()

    def run(self) -> None:
        """The thread's body."""
        while not self._ended.is_set():
            self._write(self._machine.look())
            for record in self._others():
                self._write(record)
            self._ended.wait(self._every_s)

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._ended.set()
        if self.is_alive():
            self.join(5)  # NVML can hang once a GPU is lost
