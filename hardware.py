"""What the machine is doing: GPUs through NVML, CPU and memory from the system. No torch here."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

GIB = 1 << 30


def gpus() -> tuple[list[dict[str, object]], str | None]:
    """A record for each NVIDIA GPU of this machine, and why there are none.

    Fields: uuid, name, util_percent, memory_gib, memory_total_gib, temperature_c, power_w; a value
    that the GPU does not report is None.
    """
    try:
        import pynvml
    except ImportError:
        return [], "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], str(error)
    try:
        count = pynvml.nvmlDeviceGetCount()
        return [_gpu(pynvml, i) for i in range(count)], None if count else "no GPU"
    except pynvml.NVMLError as error:
        return [], str(error)
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml, index: int) -> dict[str, object]:
    def ask(question: Callable, *arguments: object) -> object | None:
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:
            return None

    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    rates = ask(nvml.nvmlDeviceGetUtilizationRates)
    power = ask(nvml.nvmlDeviceGetPowerUsage)  # milliwatts
    return {
        "uuid": ask(nvml.nvmlDeviceGetUUID),
        "name": ask(nvml.nvmlDeviceGetName),
        "util_percent": rates.gpu if rates else None,
        "memory_gib": round(memory.used / GIB, 2) if memory else None,
        "memory_total_gib": round(memory.total / GIB, 2) if memory else None,
        "temperature_c": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "power_w": round(power / 1000, 1) if power is not None else None,
    }


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def system() -> dict[str, object]:
    """Load average over a minute, cores, and memory in use and in all (GiB; None where unknown)."""
    memory = _meminfo()
    total, free = memory.get("MemTotal"), memory.get("MemAvailable")
    return {
        "load": round(os.getloadavg()[0], 2),
        "cores": usable_cores(),
        "memory_gib": round((total - free) / GIB, 2) if total and free is not None else None,
        "memory_total_gib": round(total / GIB, 2) if total else None,
    }


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            rows = [line.split() for line in file]
    except OSError:
        return {}
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) > 1}


def free_gib(folder: Path) -> float | None:
    """What may still be written where `folder` is, or None if it is gone."""
    try:
        return round(shutil.disk_usage(folder).free / GIB, 2)
    except OSError:
        return None


class Recorder(threading.Thread):
    """Hands what the machine does to `write` every `every_s` seconds until `stop`.

    With the space that is left where `folder` is.
    """

    def __init__(
        self, write: Callable[[dict[str, object]], None], every_s: float, folder: Path | None
    ):
        super().__init__(daemon=True, name="hardware")
        self._write, self._every_s, self._folder = write, every_s, folder
        self._ended = threading.Event()

    def run(self) -> None:
        """The thread's body."""
        while not self._ended.wait(self._every_s):
            self._write({"gpus": gpus()[0], **system(), "disk_free_gib": free_gib(self._folder)})

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._ended.set()
        if self.is_alive():
            self.join(5)  # NVML can hang once a GPU is lost
