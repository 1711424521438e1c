#!/usr/bin/env python3
"""Start a training: one process by itself, or torchrun with one process for each GPU.

usage: run_xlm_roberta_v2.sh [config.yaml] [--check] [--strict] [section.key=value ...]

  config.yaml        the settings; without one, config.yaml of this folder
  --check            look at data, settings, weights and memory, and train nothing
  --strict           what the data check finds ends the run
  section.key=value  a setting in place of the file's, such as optimizer.lr=1e-5

From the environment: NPROC (processes on this machine; default: one for each visible GPU),
MAX_RESTARTS (of all processes after one was lost; default 3), and for several machines NNODES,
NODE_RANK and RDZV_ENDPOINT (host:port of the first, the same on all).
"""

# No torch here: this process stays beside the ranks and must hold no memory of theirs.

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import config
import hardware
import signals
from errors import CRASH, OK, STOPPED, USAGE, Refusal, printable

ROOT = Path(__file__).resolve().parent
TRAIN = str(ROOT / "train.py")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # train.py saves and stops at these
SHUTDOWN_S = 300  # from a signal to a durable checkpoint: one step, and GBs on a slow disk
# Of a launcher around us.
LEFT_OVER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "EXIT_CODE_FILE", "CHECK_WORLD_SIZE")
LEFT_OVER += ("LAUNCHER_PID", "TORCHELASTIC_RESTART_COUNT")
ASK_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[g.name, g.total_memory] for g in gpus]))
"""


@dataclass(frozen=True)
class Plan:
    """How many processes, on how many machines, of which this is number `node`."""

    processes: int  # on this machine
    nodes: int = 1
    node: int = 0
    endpoint: str = ""
    restarts: int = 3  # of the processes, each from the newest checkpoint


def parse(argv: list[str]) -> tuple[str, list[str], list[str]]:
    """(configuration file, flags, settings) of a command line; Refusal 64 for an unknown flag."""
    named = [a for a in argv if re.search(r"^[^-].*\.ya?ml$", a, re.DOTALL) and "=" not in a]
    if len(named) > 1:
        told = f"'{printable(named[0])}' and '{printable(named[1])}'"
        raise Refusal(USAGE, f"expected one settings file, found {told}")
    rest = [a for a in argv if a not in named]
    flags = [a for a in rest if a.startswith("-")]
    unknown = [a for a in flags if a not in ("--check", "--strict")]
    if unknown:
        usage = __doc__.split("\n")[2]
        raise Refusal(USAGE, f"unknown option '{printable(unknown[0])}'; {usage}")
    return named[0] if named else "config.yaml", flags, [a for a in rest if a not in flags]


def make_plan(environ: dict[str, str], gpus: int) -> Plan:
    """What NPROC and the others say; Refusal 64 for what they cannot mean."""

    def number(name: str, default: int, low: int) -> int:
        text = environ.get(name) or str(default)
        if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < low:
            wanted = f"a whole number of at least {low}"
            raise Refusal(USAGE, f"{name}: expected {wanted}, found '{printable(text)}'")
        return int(text)

    plan = Plan(
        processes=number("NPROC", max(1, gpus), 1),
        nodes=number("NNODES", 1, 1),
        node=number("NODE_RANK", 0, 0),
        endpoint=environ.get("RDZV_ENDPOINT", ""),
        restarts=number("MAX_RESTARTS", Plan.restarts, 0),
    )
    if plan.node >= plan.nodes:
        raise Refusal(USAGE, f"NODE_RANK: {plan.node} is not below NNODES, which is {plan.nodes}")
    if plan.processes > gpus > 0:
        wanted = "lower it or set run.device=cpu"
        raise Refusal(
            USAGE, f"NPROC: {plan.processes} need a GPU each, {gpus} are visible; {wanted}"
        )
    if plan.nodes > 1 and not re.fullmatch(r"[\w.:\[\]-]+:[0-9]{1,5}", plan.endpoint, re.ASCII):
        found = printable(plan.endpoint)
        raise Refusal(USAGE, f"RDZV_ENDPOINT: expected host:port of node 0, found '{found}'")
    if plan.nodes > 1 and not 0 < (port := int(plan.endpoint.rpartition(":")[2])) < 1 << 16:
        raise Refusal(USAGE, f"RDZV_ENDPOINT: expected a port of 1 to 65535, found {port}")
    return plan


def visible_gpus() -> list[tuple[str, int]]:
    """(name, bytes of memory) of each GPU that torch sees, asked in a process of its own.

    Importing torch takes seconds, so it is not asked where no driver is (kfd is AMD's).
    """
    if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))):
        return []
    asked = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True)
    with contextlib.suppress(ValueError, IndexError):  # a warning may stand before the answer
        return [(name, size) for name, size in json.loads(asked.stdout.splitlines()[-1])]
    return []  # train.py says what is wrong with a GPU that torch cannot use


def describe(gpus: list[tuple[str, int]]) -> str:
    """The hardware that training will use, in a line."""
    if gpus:
        kinds = Counter((name, round(size / hardware.GIB)) for name, size in gpus)
        return ", ".join(f"{n} x {name} with {gib} GiB" for (name, gib), n in kinds.items())
    memory = hardware.system()["memory_total_gib"]
    cores = hardware.usable_cores()
    return f"CPU, {cores} usable cores" + (f", {memory:.0f} GiB of memory" if memory else "")


def children(pid: int) -> list[int]:
    """The processes that `pid` started, from /proc or, where there is none, from ps."""
    if Path("/proc/self/stat").exists():
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
                found += [int(stat.parent.name)] * (int(parent) == pid)
        return found
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = (map(int, line.split()) for line in table.splitlines())
    return [child for child, parent in pairs if parent == pid]


class Supervisor:
    """Runs one child after another in a session of its own, and stands between it and signals.

    So a terminal's Ctrl-C reaches only us. `stopped_by` names the last signal that came.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self.killed = False
        self._process: subprocess.Popen | None = None
        self._told: set[int] = set()  # ranks that know of the stop
        self._is_torchrun = False
        for number in (*SIGNALS, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._note)

    def run(self, command: list[str], *, is_torchrun: bool = False, **extra: str) -> int:
        """The return code of `command`, with `extra` in its environment. It does not outlive us."""
        self._is_torchrun = is_torchrun
        self._process = subprocess.Popen(
            command, env={**os.environ, **extra}, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._told = set()
        try:
            if self.stopped_by:  # it came before there was a process to tell
                self._stop(signal.SIGTERM)
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._process.wait(timeout=1)
                if self.stopped_by and is_torchrun:  # ranks that have started since know nothing
                    self._tell(set(children(self._process.pid)) - self._told, signal.SIGTERM)
        except BaseException:
            self._kill()
            raise

    def _note(self, number: int, frame: object) -> None:
        again = number == signal.SIGINT and self.stopped_by == "SIGINT"
        self.stopped_by = signal.Signals(number).name
        if again or number == signal.SIGQUIT:
            self._kill()
        else:  # a closed terminal is no reason to lose the steps since the last checkpoint
            self._stop(signal.SIGTERM if number == signal.SIGHUP else number)

    def _stop(self, number: int) -> None:
        """Pass a signal to the ranks; a check is ended at once, having nothing to save.

        Not to torchrun while there are ranks: it would end with a traceback of its own and leave
        the agents of other machines waiting. Ranks that were told leave by themselves.
        """
        if not self._is_torchrun:
            self._kill()
        elif self._process is not None and self._process.returncode is None:
            self._tell(children(self._process.pid) or [self._process.pid], number)

    def _tell(self, pids: Iterable[int], number: int) -> None:
        for pid in pids:
            self._told.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _kill(self) -> None:
        """End all at once. torchrun gives each rank a session, and so a group, of its own."""
        if self._process is not None and self._process.returncode is None:
            self.killed = True
            # torchrun first, which would start anew what it sees ending.
            for pid in (self._process.pid, *children(self._process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


def torchrun(plan: Plan) -> list[str]:
    """The command up to the program that it is to start.

    The signals concern schedulers that send theirs to every process of a job, torchrun included.
    """
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(plan.processes)]
    if plan.nodes > 1:
        # Not the c10d rendezvous: it numbers machines as they arrive, so that rank 0, which alone
        # has the run's directory, could be elsewhere after a restart.
        host, _, port = plan.endpoint.rpartition(":")
        command += ["--nnodes", str(plan.nodes), "--node-rank", str(plan.node)]
        command += ["--master-addr", host.strip("[]"), "--master-port", port]
    else:
        command += ["--standalone"]
    command += ["--max-restarts", str(plan.restarts)]
    # Newer than some torch that we run on. Its text is read, as importing it takes seconds.
    source = Path(find_spec("torch").submodule_search_locations[0], "distributed", "run.py")
    known = source.read_text(encoding="utf-8")
    if '"--signals-to-handle"' in known:
        command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    if '"--shutdown-timeout"' in known:
        command += ["--shutdown-timeout", str(SHUTDOWN_S)]
    return command


def launch_ranks(plan: Plan, arguments: list[str]) -> int:
    """Check once in one process, then train in many: the exit code of the first rank to end."""
    print(f"checking once before {plan.processes} processes start", file=sys.stderr, flush=True)
    supervisor = Supervisor()
    ranks = str(plan.processes * plan.nodes)
    command = [sys.executable, TRAIN, *arguments, "--check"]
    code = supervisor.run(command, CHECK_WORLD_SIZE=ranks)
    if supervisor.stopped_by:
        raise Refusal(STOPPED, f"stopped by {supervisor.stopped_by} before training began")
    if code != OK:
        return code if code > 0 else CRASH
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        told = Path(folder, "exit_code")
        code = supervisor.run(
            [*torchrun(plan), TRAIN, *arguments],
            is_torchrun=True,
            EXIT_CODE_FILE=str(told),
            LAUNCHER_PID=str(os.getpid()),
            HF_HUB_OFFLINE="1",  # the check has fetched everything
        )
        if supervisor.killed:
            raise Refusal(128 + signal.SIGINT, "ended at once; the last checkpoint stands")
        for end in Path(folder).iterdir():  # of the last start; the one before is deleted by it
            return int(os.readlink(end))
    if code != OK and supervisor.stopped_by:  # before a rank could listen
        raise Refusal(STOPPED, f"stopped by {supervisor.stopped_by}; run the same command to go on")
    return OK if code == OK else CRASH


def main(argv: list[str]) -> int:
    """Launch; the exit code of errors.py. Does not return where one process is enough."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return OK
    try:
        path, flags, overrides = parse(argv)
        cfg = config.load(path, overrides)
        gpus = visible_gpus() if cfg.run.device != "cpu" else []
        plan = make_plan(os.environ, len(gpus))
        if cfg.run.resume == "never":  # a restart would begin another run beside it
            plan = dataclasses.replace(plan, restarts=0)
        print(f"hardware: {describe(gpus)}", file=sys.stderr, flush=True)
        for name in LEFT_OVER:
            os.environ.pop(name, None)
        # torchrun alone would set 1, and one process would take all cores for each rank.
        threads = max(1, hardware.usable_cores() // plan.processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        hardware.share_cores()
        arguments = ["--config", path, *flags, *overrides]
        if "--check" in flags or plan.processes * plan.nodes == 1:
            if "--check" in flags:  # of the run that the same command would start
                os.environ["CHECK_WORLD_SIZE"] = str(plan.processes * plan.nodes)
            signals.hold()  # train.py takes what comes meanwhile, as what is held stays so
            os.execv(sys.executable, [sys.executable, TRAIN, *arguments])
        return launch_ranks(plan, arguments)
    except Refusal as error:
        print(error.message, file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
