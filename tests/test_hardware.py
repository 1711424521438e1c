"""What a GPU does not tell is None with its reason; nothing that NVML does ends a look."""

import shutil
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import ddp
import hardware

GIB = 1 << 30
UUIDS = ("GPU-aaaa1111", "GPU-aabb2222", "GPU-cccc3333")
CALLS = {
    "nvmlDeviceGetUUID": "uuid",
    "nvmlDeviceGetName": "name",
    "nvmlDeviceGetUtilizationRates": "util_percent",
    "nvmlDeviceGetMemoryInfo": "memory_gib memory_total_gib",
    "nvmlDeviceGetTemperature": "temperature_c",
    "nvmlDeviceGetPowerUsage": "power_w",
}


class NVMLError(Exception):
    """As nvidia-ml-py's."""


class Nvml(types.ModuleType):
    """nvidia-ml-py with three GPUs; `broken`: call, or call and GPU, to the error it raises."""

    NVMLError, NVML_TEMPERATURE_GPU = NVMLError, 0

    def __init__(self, broken: dict[object, Exception] | None = None, uuids=UUIDS):
        super().__init__("pynvml")
        self.broken, self.uuids, self.open = broken or {}, uuids, 0

    def check(self, call: str, gpu: int | None = None) -> None:
        for key in (call, (call, gpu), gpu):
            if key is not None and key in self.broken:
                raise self.broken[key]
        assert self.open or call == "nvmlInit"

    def nvmlInit(self):
        self.check("nvmlInit")
        self.open += 1

    def nvmlShutdown(self):
        self.check("nvmlShutdown")
        self.open -= 1

    def nvmlDeviceGetCount(self):
        self.check("nvmlDeviceGetCount")
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index):
        self.check("nvmlDeviceGetHandleByIndex", index)
        if index >= len(self.uuids):
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.uuids:
            raise NVMLError("Not Found")
        self.check("nvmlDeviceGetHandleByUUID", self.uuids.index(uuid))
        return self.uuids.index(uuid)

    def __getattr__(self, call):
        answers = {
            "nvmlDeviceGetUUID": lambda gpu: self.uuids[gpu],
            "nvmlDeviceGetName": lambda gpu: b"NVIDIA H100",  # as older versions give it
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=90 + gpu),
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=10 * GIB, total=80 * GIB),
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 60 + gpu,
            "nvmlDeviceGetPowerUsage": lambda gpu: 300_000 + gpu,
        }
        if call not in answers:
            raise AttributeError(call)

        def answer(gpu, *rest):
            self.check(call, gpu)
            return answers[call](gpu, *rest)

        return answer


@pytest.fixture
def nvml(monkeypatch):
    def install(broken=None, **options) -> Nvml:
        module = Nvml(broken, **options)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return install


def test_every_field_of_every_gpu(nvml):
    module = nvml()
    found, why = hardware.gpus()
    assert why is None and module.open == 0 and [g["uuid"] for g in found] == list(UUIDS)
    assert found[1] == {
        **{"uuid": "GPU-aabb2222", "name": "NVIDIA H100", "util_percent": 91, "memory_gib": 10.0},
        **{"memory_total_gib": 80.0, "temperature_c": 61, "power_w": 300.0},
    }


ERRORS = [NVMLError("Not Supported"), NVMLError("GPU is lost"), OSError(5, "I/O"), ValueError()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_costs_its_fields_and_leaves_the_reason(nvml, call, error):
    nvml({(call, 1): error})
    found, why = hardware.gpus()
    fields = CALLS[call].split()
    assert why is None and len(found) == 3
    assert found[1]["unavailable"] == dict.fromkeys(fields, str(error) or type(error).__name__)
    for gpu in (found[0], found[2]):
        assert "unavailable" not in gpu and None not in gpu.values()
    given = {k: v for k, v in found[1].items() if k not in ("unavailable", "uuid")}
    assert {k for k, v in given.items() if v is None} == set(fields) - {"uuid"}
    assert found[1]["uuid"] == ("1" if call == "nvmlDeviceGetUUID" else UUIDS[1])


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlShutdown"])
def test_nvml_that_fails_as_a_whole_is_a_reason(nvml, call):
    nvml({call: NVMLError("Driver Not Loaded")})
    found, why = hardware.gpus()
    if call == "nvmlShutdown":
        assert len(found) == 3 and why is None
    else:
        assert (found, why) == ([], "Driver Not Loaded")
    look = hardware.Machine().look()
    assert look["cores"] > 0 and look.get("no_gpu") == why


def test_a_lost_gpu_is_shown_as_lost_and_the_others_as_they_are(nvml):
    nvml({("nvmlDeviceGetHandleByIndex", 1): NVMLError("GPU is lost")})
    found, _ = hardware.gpus()
    assert found[1]["uuid"] == "1" and found[1]["unavailable"] == {"gpu": "GPU is lost"}
    assert found[0]["util_percent"] == 90 and found[2]["util_percent"] == 92
    nvml(uuids=UUIDS[:2])
    found, _ = hardware.gpus(f"{UUIDS[0]},{UUIDS[2]}")
    assert found[0]["util_percent"] == 90
    assert found[1]["uuid"] == UUIDS[2] and found[1]["unavailable"] == {"gpu": "Not Found"}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("2,0", [2, 0]),
        (" 1 , 0", [1, 0]),
        ("1", [1]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,1", [0]),  # CUDA hides what comes after an entry that is none
        ("0,9,1", [0]),
        ("GPU-cccc3333", [2]),
        ("GPU-cc", [2]),
        ("GPU-aabb2222,0", [1, 0]),
    ],
)
def test_cuda_visible_devices_is_respected(nvml, setting, expected):
    nvml()
    found, why = hardware.gpus(setting)
    assert [g["uuid"] for g in found] == [UUIDS[i] for i in expected]
    assert (why is None) == bool(expected)


def test_without_the_package_that_is_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.gpus() == ([], "nvidia-ml-py is not installed")


FILES = {"/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 40 kB\nOdd\n"}
CGROUP = {"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/memory.max": "51200\n"}
CGROUP |= {"/sys/fs/cgroup/job/memory.current": "30720\n"}
CGROUP |= {"/sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 10240\n"}


@pytest.mark.parametrize(
    ("files", "used", "total"),
    [
        (FILES, 60, 100),
        (FILES | CGROUP, 20, 50),
        (FILES | CGROUP | {"/sys/fs/cgroup/job/memory.max": "max\n"}, 60, 100),
        (FILES | CGROUP | {"/sys/fs/cgroup/job/memory.max": "512000\n"}, 60, 100),
    ],
)
def test_memory_is_what_may_be_used_here(monkeypatch, files, used, total):
    monkeypatch.setattr(hardware, "_text", lambda path: files.get(str(path), ""))
    assert hardware._memory() == (used * 1024, total * 1024)


def test_without_proc_the_total_is_known_and_the_rest_is_not(monkeypatch):
    monkeypatch.setattr(hardware, "_text", lambda path: "")
    used, total = hardware._memory()
    assert used is None and total > GIB / 4
    look = hardware.Machine().look()
    assert look["cpu_percent"] is None and look["memory_gib"] is None and look["load"] >= 0


def test_the_cpu_is_told_of_the_span_between_two_looks(monkeypatch):
    ticks = ["cpu 10 0 10 80 0 0 0 0 0 0\n", "cpu 40 0 10 140 10 0 0 0 99 0\ncpu0 1\n"]
    monkeypatch.setattr(hardware, "_text", lambda p: ticks[0] if "stat" in str(p) else "")
    machine = hardware.Machine()
    assert machine.look()["cpu_percent"] is None  # no tick has passed
    ticks.pop(0)
    assert machine.look()["cpu_percent"] == 30.0  # of 100 ticks 60 were idle, 10 waited for a disk


def test_a_recorder_looks_at_once_and_gives_what_other_machines_told(nvml):
    nvml()
    seen = []
    recorder = hardware.Recorder(hardware.Machine(), 1e6, seen.append, lambda: [{"host": "node2"}])
    recorder.start()
    while len(seen) < 2:
        recorder.join(0.01)
    recorder.stop()
    assert not recorder.is_alive() and [r["host"] for r in seen] == [seen[0]["host"], "node2"]
    assert len(seen[0]["gpus"]) == 3


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no NVIDIA GPU here")
def test_what_is_told_of_real_gpus_is_what_nvidia_smi_tells():
    asked = "uuid,name,memory.total,memory.used,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    told = subprocess.check_output(command, text=True).splitlines()
    rows = [line.split(", ") for line in told]
    found, why = hardware.gpus()
    assert why is None and len(found) == len(rows) > 0
    for gpu, (uuid, name, total_mib, used_mib, heat) in zip(found, rows, strict=True):
        assert (gpu["uuid"], gpu["name"]) == (uuid, name)
        assert gpu["memory_total_gib"] == pytest.approx(float(total_mib) / 1024, abs=0.01)
        assert gpu["memory_gib"] == pytest.approx(float(used_mib) / 1024, abs=1)
        assert abs(gpu["temperature_c"] - float(heat)) <= 10
    assert hardware.gpus(rows[-1][0])[0][0]["uuid"] == rows[-1][0]


@pytest.mark.parametrize(
    ("uuids", "setting", "expected"),
    [
        (["aa-1", "bb-2", "cc-3"], "1,0,2", "GPU-aa-1,GPU-bb-2"),  # of two ranks, torch's order
        (["GPU-aa-1", "bb-2"], None, "GPU-aa-1,GPU-bb-2"),
        ([None, None], "3", "3"),  # a torch that does not tell
        ([None, None], None, None),
    ],
)
def test_the_trainer_names_the_gpus_it_uses_by_uuid(monkeypatch, uuids, setting, expected):
    properties = [SimpleNamespace(uuid=u) if u else SimpleNamespace() for u in uuids]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(ddp.torch.cuda, "get_device_properties", properties.__getitem__)
    if setting is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert ddp.used_gpus(torch.device("cuda", 0)) == expected
    assert ddp.used_gpus(torch.device("cpu")) == "", "control: on the CPU none is the run's"
