"""The machine at odds: small and read-only disks, clocks, locales, paths; hosts that are cut off.

Needs root and, from Debian's packages, iproute2 and util-linux's mount.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from harness import (
    LIMIT_S,
    ROOT,
    Trainer,
    arguments,
    assert_clean,
    assert_same,
    at,
    code_of,
    fire,
    ranks,
    run,
    wait_until,
    warnings,
)

import runlog
from errors import CANNOT_WRITE, OK, UNAVAILABLE

RANK = Path(__file__).resolve().parent / "rank.py"
pytestmark = [pytest.mark.fault, pytest.mark.deep]


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a tmpfs of some size below the test's folder; all go at the end."""
    places = []

    def mount(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_small_disk_fills_while_training_and_is_given_room(small, plain, tmp_path, name, mounted):
    """As large as two checkpoints and a half: with all kept the third does not fit."""
    size = sum(p.stat().st_size for p in (plain / "checkpoints" / "step-00000010").iterdir())
    disk = mounted("disk", f"size={int(2.6 * size)}")
    command = [*arguments(small, name), f"run.dir={disk}"]
    full = run(tmp_path, command, partial(_believe_in_room))
    assert full.process.exitcode == CANNOT_WRITE, full.said()
    assert "No space left on device" in full.said() and "Traceback" not in full.said()
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    again = run(tmp_path, command)
    assert again.process.exitcode == OK, again.said()
    assert_same(disk / name, plain)
    assert [*disk.rglob(".*")] == []


def test_a_disk_that_fills_between_saves_is_given_room_while_training_goes_on(
    small, plain, tmp_path, name, mounted
):
    disk = mounted("disk", "size=100m")
    fill = partial(at, "train:update", partial(_fill, str(disk / "rest"), 100 << 20), call=3)
    free = partial(at, "train:update", partial(os.unlink, str(disk / "rest")), call=6)
    ended = run(tmp_path, [*arguments(small, name), f"run.dir={disk}"], partial(_both, fill, free))
    assert ended.process.exitcode == OK, ended.said()
    assert "No space left on device" in ended.said() and "could be written" in ended.said()
    assert "checkpoint_failed" in warnings(disk / name)
    assert_same(disk / name, plain)


def _both(*faults) -> None:
    for fault in faults:
        fault()


def _fill(path: str, size: int) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _believe_in_room() -> None:
    """The check before training is passed over, as if another had filled the disk after it."""
    import results

    results.checkpoint.BYTES_PER_PARAMETER = 0
    fire(lambda: None)


def test_a_disk_that_becomes_read_only(small, plain, tmp_path, name, mounted):
    disk = mounted("disk", "size=100m")
    command = [*arguments(small, name), f"run.dir={disk}"]
    first = Trainer(tmp_path, command, partial(at, "train:update", partial(time.sleep, 4), call=4))
    wait_until(first.fired, "the fourth step")
    # As a failing disk is: what is open is not asked. A remount would be refused as busy.
    bind = ["mount", "--bind", disk, disk]
    subprocess.run(bind, check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    try:
        assert first.wait() == CANNOT_WRITE, first.said()
        assert "Read-only file system" in first.said() and "Traceback" not in first.said()
        refused = run(tmp_path, command)
        assert refused.process.exitcode == CANNOT_WRITE
        assert "Read-only file system" in refused.said()
    finally:
        subprocess.run(["umount", disk], check=True)
    again = run(tmp_path, command)
    assert again.process.exitcode == OK, again.said()
    assert_same(disk / name, plain)


# --- two starts -----------------------------------------------------------------------------------


def test_two_starts_within_50_ms_twenty_times(small, plain, tmp_path, name):
    for i in range(20):
        command = arguments(small, f"{name}-{i}")
        first = Trainer(tmp_path, command)
        time.sleep(0.05 * i / 20)
        second = Trainer(tmp_path, command)
        codes = sorted([first.wait(), second.wait()])
        assert codes in ([OK, OK], [OK, UNAVAILABLE]), first.said() + second.said()
        assert_same(small / "runs" / f"{name}-{i}", plain)
        assert_clean(small, first, second)


# --- collectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [[], [{"rank": 1}]], ids=["control", "skipped"])
def test_a_skipped_collective_is_found(small, tmp_path, name, faults):
    """gloo says nothing of a rank that leaves one out; with DETAIL both sides are named."""
    skip = {"target": "train:evaluate_and_judge", "call": 2, "action": "skip"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environ |= {"FAULTS": json.dumps([skip | f for f in faults]), "OMP_NUM_THREADS": "1"}
    environ |= {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "FAULT_FIRED": str(tmp_path / "fired")}
    words = [sys.executable, RANK, "--config", os.devnull, *arguments(small, name)]
    both = [
        subprocess.Popen(
            [*map(str, words)],
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = "".join(process.communicate(timeout=LIMIT_S)[0] for process in both)
    codes = [process.returncode for process in both]
    if faults:
        assert (tmp_path / "fired").exists() and OK not in codes
        assert "collectives" in said.lower() and "mismatch" in said.lower(), said
    else:
        assert codes == [OK, OK], said


# --- clocks, locales, paths -----------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-86400 * 365, 86400 * 365])
def test_a_clock_that_jumps_costs_nothing(small, plain, tmp_path, name, jump):
    """Before and after a kill, and while training."""
    command = arguments(small, name)
    killed = partial(at, "train:update", partial(os.kill, 0, signal.SIGKILL), call=7)
    run(tmp_path, command, partial(_both, partial(_jump, jump), killed))
    again = run(tmp_path, command, partial(_jump, -jump))
    assert again.process.exitcode == OK, again.said()
    assert_same(small / "runs" / name, plain)
    end = runlog.read(small / "runs" / name / "metrics.jsonl")[-1]
    assert end["seconds"] >= 0, "a clock set back takes nothing off"


def _jump(by: float) -> None:
    now, calls = time.time, itertools.count()
    time.time = lambda: now() + by * (next(calls) // 3 % 2)
    fire(lambda: None)


ODD_PATHS = (
    "with blanks",
    "quotes ' \" `x`",
    "new\nline",
    "\u00fcn\u00efc\u00f6d\u00e9 \u4e16",
    "$(x); x",
    "-x",
)


@pytest.mark.parametrize("odd", ODD_PATHS, ids=ascii)
@pytest.mark.parametrize("environ", [{}, {"LC_ALL": "C", "PYTHONHASHSEED": "12345"}], ids=["", "C"])
def test_odd_paths_and_locales_through_the_script(small, plain, tmp_path, odd, environ, name):
    folder = tmp_path / odd
    folder.mkdir()
    for file in ("train.csv", "validation.csv", "model"):
        (shutil.copytree if file == "model" else shutil.copy)(small / file, folder / file)
    (folder / "settings.yaml").touch()
    words = [folder / "settings.yaml", *arguments(folder, name)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [ROOT / "run_xlm_roberta_v2.sh", *map(str, words)],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        cwd=folder,
    )
    assert ended.returncode == OK, ended.stderr
    assert b"Traceback" not in ended.stderr
    assert_same(folder / "runs" / name, plain)
    shown = subprocess.run(
        [ROOT / "monitor_xlm_roberta_v2.sh", folder / "runs" / name, "--once"],
        env={**os.environ, "PATH": path, **environ},
        capture_output=True,
    )
    assert shown.returncode == OK, shown.stderr


def test_fewer_texts_than_ranks(small, tmp_path, name):
    changes = {"data__limit": 3, "data__leaks": "keep", "evaluation__every": 1, "train__epochs": 1}
    changes |= {"evaluation__metric": "accuracy"}
    started = ranks(tmp_path, arguments(small, name, **changes), size=4)
    assert code_of(started) == OK, started[0].said()
    assert_clean(small, *started)


# --- two hosts ------------------------------------------------------------------------------------


@pytest.fixture
def hosts(request):
    """Two network namespaces, each a host of its own with an address on a cable between them."""
    tag = f"{os.getpid() % 10_000}"
    names = [f"host{side}x{tag}" for side in (0, 1)]
    ends = [f"v{side}x{tag}" for side in (0, 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for host in names:
        ip("netns", "add", host)
    ip(
        "link",
        "add",
        ends[0],
        "netns",
        names[0],
        "type",
        "veth",
        "peer",
        ends[1],
        "netns",
        names[1],
    )
    for side, (host, end) in enumerate(zip(names, ends, strict=True)):
        ip("-n", host, "addr", "add", f"10.77.0.{side + 1}/24", "dev", end)
        ip("-n", host, "link", "set", end, "up")
        ip("-n", host, "link", "set", "lo", "up")
    yield list(zip(names, ends, strict=True))
    for host in names:
        subprocess.run(["ip", "netns", "delete", host], check=False)


def start_on(hosts, side: int, folder: Path, words: list[str], **environ: str) -> subprocess.Popen:
    """The script on one of two machines; its output goes to a file."""
    host, end = hosts[side]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    nodes = {
        "NNODES": "2",
        "NODE_RANK": str(side),
        "NPROC": "1",
        "RDZV_ENDPOINT": "10.77.0.1:29411",
    }
    nodes |= {"GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1", "PATH": path}
    with open(folder / f"host-{side}.log", "ab") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, ROOT / "run_xlm_roberta_v2.sh", *map(str, words)],
            env={**os.environ, **nodes, **environ},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )


def said(folder: Path) -> str:
    return "".join((folder / f"host-{side}.log").read_text(errors="replace") for side in (0, 1))


def two_machines(small: Path, tmp_path: Path, name: str, **changes: object) -> list[list[str]]:
    """The commands of two machines that share nothing: each has its own files and folders."""
    commands = []
    for side in (0, 1):
        own = tmp_path / f"machine{side}"
        if not own.exists():
            own.mkdir()
            for file in ("train.csv", "validation.csv"):
                shutil.copy(small / file, own / file)
            shutil.copytree(small / "model", own / "model")
            (own / "settings.yaml").touch()
        commands.append([str(own / "settings.yaml"), *arguments(own, name, **changes)])
    return commands


def test_two_hosts_train_together_and_one_is_cut_off_and_comes_back(
    small, plain_two, tmp_path, name, hosts
):
    """For a moment, which costs nothing, and for longer than run.timeout_s, which costs a start."""
    commands = two_machines(small, tmp_path, name, train__epochs=2)
    both = [start_on(hosts, side, tmp_path, commands[side]) for side in (0, 1)]
    assert [p.wait(240) for p in both] == [OK, OK], said(tmp_path)
    assert_same(tmp_path / "machine0" / "runs" / name, plain_two)
    assert not (tmp_path / "machine1" / "runs").exists(), "only the first host has runs/"
    # Long enough to be cut off in the middle.
    changes = {"train__epochs": 80, "run__timeout_s": 15, "checkpoint__every": 20}
    commands = two_machines(small, tmp_path, f"{name}-cut", evaluation__every=50, **changes)
    whole = two_machines(small, tmp_path, f"{name}-whole", evaluation__every=50, **changes)
    both = [start_on(hosts, side, tmp_path, whole[side]) for side in (0, 1)]
    assert [p.wait(240) for p in both] == [OK, OK], said(tmp_path)
    log = tmp_path / "machine0" / "runs" / f"{name}-cut" / "metrics.jsonl"
    both = [start_on(hosts, s, tmp_path, commands[s], MAX_RESTARTS="0") for s in (0, 1)]
    cable = ["ip", "-n", hosts[1][0], "link", "set", hosts[1][1]]
    wait_until(lambda: log.exists() and len(log.read_bytes().splitlines()) > 30, "some steps")
    subprocess.run([*cable, "down"], check=True)
    time.sleep(5)
    before = len(log.read_bytes().splitlines())
    subprocess.run([*cable, "up"], check=True)
    wait_until(lambda: len(log.read_bytes().splitlines()) > before + 20, "steps after it is back")
    subprocess.run([*cable, "down"], check=True)
    codes = [p.wait(240) for p in both]
    assert OK not in codes, said(tmp_path)
    subprocess.run([*cable, "up"], check=True)
    both = [start_on(hosts, side, tmp_path, commands[side]) for side in (0, 1)]
    assert [p.wait(240) for p in both] == [OK, OK], said(tmp_path)
    runs = tmp_path / "machine0" / "runs"
    assert_same(runs / f"{name}-cut", runs / f"{name}-whole")
    assert "going on after step" in said(tmp_path)


def test_hosts_with_other_data_are_refused(small, tmp_path, name, hosts):
    commands = two_machines(small, tmp_path, name)
    train = tmp_path / "machine1" / "train.csv"
    train.write_text(train.read_text().replace("goose", "geese", 1))
    both = [start_on(hosts, side, tmp_path, commands[side]) for side in (0, 1)]
    assert 65 in [p.wait(240) for p in both], said(tmp_path)
    assert "has other data than rank 0: hash " in said(tmp_path)


def test_a_signal_to_one_host_ends_both_in_a_checkpoint(small, tmp_path, name, hosts):
    commands = two_machines(small, tmp_path, name, train__epochs=400, evaluation__every=1000)
    both = [start_on(hosts, side, tmp_path, commands[side]) for side in (0, 1)]
    log = tmp_path / "machine0" / "runs" / name / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_bytes().splitlines()) > 20, "some steps")
    both[1].send_signal(signal.SIGTERM)
    assert [p.wait(240) for p in both] == [75, 75], said(tmp_path)


def test_the_suites_tools_are_there():
    for tool in ("strace", "ip", "mount"):
        assert shutil.which(tool), f"the deep tests need {tool}: apt install strace iproute2 mount"
    assert os.geteuid() == 0, "and they mount and make network namespaces, as root"
