"""A run's directory: what it is called, who holds it, and whether to begin, go on or be done."""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import config
from config import Config
from ddp import restarts
from errors import BAD_CONFIG, CANNOT_WRITE, CRASH, UNAVAILABLE, Refusal, printable
from files import hold, read_json, refuse_links, sweep, write_json, writing

MAX_STARTS = 2  # after the same checkpoint, once torchrun restarts: a third would crash again
MAX_TOLD = 70  # characters of an automatic name before seed and hash
MAX_NAMED = 3  # settings that an automatic name shows
# Of no interest there: the seed has a place of its own, the others follow from data and machine.
UNNAMED = ("run.seed", "train.precision", "data.text_column", "data.label_column")


@dataclass
class RunDir:
    """A directory held by this process until `close`."""

    path: Path
    identity: dict[str, object]
    _lock: IO

    def __post_init__(self) -> None:
        starts = self.state().get("starts")
        self._starts = starts if isinstance(starts, dict) else {}

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def key(self) -> str:
        """A hash of the identity, for what outlives run_state.json."""
        raw = json.dumps(self.identity, sort_keys=True).encode()
        return hashlib.sha256(raw).hexdigest()[:24]

    def state(self) -> dict[str, object]:
        """run_state.json, empty before the first start."""
        return read_json(self.path / "run_state.json") or {}

    def fitted_tokens(self) -> int | None:
        """The train.micro_batch_tokens of the run's last start, None before the first."""
        try:
            tokens = config.load(self.path / "config.yaml").train.micro_batch_tokens
        except Refusal:  # none yet, or not as we left it
            return None
        return tokens if isinstance(tokens, int) else None

    def set_state(self, status: str, *, exit_code: int | None = None, reason: str = "") -> None:
        """Record running, completed, preempted or failed; OSError if that cannot be written."""
        now, host = round(time.time(), 3), socket.gethostname()
        state = {"status": status, "reason": reason, "pid": os.getpid(), "host": host}
        state |= {"exit_code": exit_code, "time": now, "starts": self._starts}
        write_json(self.path / "run_state.json", state | {"identity": self.identity})

    def begin_at(self, step: int) -> None:
        """Note that training goes on after `step`; Refusal 70 if restarts only repeat a crash."""
        times = self._starts.get("times") if self._starts.get("step") == step else 0
        times = times + 1 if restarts() and isinstance(times, int) else 1
        if times > MAX_STARTS:
            raise Refusal(
                CRASH,
                f"{times - 1} starts crashed without a checkpoint beyond step {step}; not started "
                "again: what is shown above the first time is the cause",
            )
        self._starts = {"step": step, "times": times}
        with writing(self.path):
            self.set_state("running")

    def check_held(self) -> None:
        """OSError if the directory was removed or replaced while this process held it."""
        there = os.stat(self.path / "lock", follow_symlinks=False)
        if not os.path.samestat(there, os.fstat(self._lock.fileno())):
            raise OSError(errno.ESTALE, "another directory has taken its place")

    def remove_if_new(self) -> None:
        """Let go of the directory, and delete it if it holds nothing but the lock."""
        with contextlib.suppress(OSError):
            if [path.name for path in self.path.iterdir()] == ["lock"]:
                (self.path / "lock").unlink()
                self.path.rmdir()
        self.close()

    def close(self) -> None:
        """Let go of the directory."""
        self._lock.close()


def identity(cfg: Config, *, data_key: str, model_key: str) -> dict[str, object]:
    """What decides a run's result, and so whether two starts are the same run."""
    return {"settings": config.altering(cfg), "data": data_key, "model": model_key}


def name_run(cfg: Config, who: dict[str, object]) -> str:
    """run.name, else data, model, some settings that differ from the defaults, seed and a hash."""
    if cfg.run.name:
        return cfg.run.name
    train = Path(cfg.data.train)
    data = train.parent.name if train.stem == "train" and train.parent.name else train.stem
    defaults = config.altering(Config())
    changed = [
        f"{name.rpartition('.')[2].replace('_', '')}{_brief(value)}"
        for name, value in config.altering(cfg).items()
        if value != defaults[name] and name not in UNNAMED
    ]
    digest = hashlib.sha256(json.dumps(who, sort_keys=True).encode()).hexdigest()[:6]
    told = "-".join([data, Path(cfg.model.name).name, *changed[:MAX_NAMED]]).lower()
    told = re.sub(r"[^\w.-]+", "", told, flags=re.ASCII).lstrip("_.-")[:MAX_TOLD]
    return f"{told or 'run'}-s{cfg.run.seed}-{digest}"


def _brief(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:12]


def open_run(cfg: Config, who: dict[str, object]) -> RunDir:
    """The directory of this run, held: a new one, or the one that was begun.

    Raises Refusal 69 if another trainer holds it, 73 if it cannot be written, 78 for a bad name or
    if the run of this name was begun with other settings, data or weights.
    """
    name = name_run(cfg, who)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, flags=re.ASCII):
        raise Refusal(
            BAD_CONFIG,
            f"run.name: '{printable(name)}' is no directory name; use letters, digits, . _ -",
        )
    root = Path(cfg.run.dir)
    if cfg.run.resume == "never":
        name = _free_name(root, name)
    path = root / name
    shown = printable(path, 300)
    if os.path.islink(path):  # False, too, where the name is too long for a path
        raise Refusal(CANNOT_WRITE, f"{shown}: is a link, which is not written through")
    with writing(path):
        lock = None
        while lock is None:
            path.mkdir(parents=True, exist_ok=True)
            try:
                lock = hold(path / "lock")
            except FileNotFoundError:  # a check has just removed what it had made
                continue
            if lock is None:
                raise Refusal(UNAVAILABLE, f"{shown}: another trainer holds this run directory")
    try:
        run = RunDir(path, json.loads(json.dumps(who)), lock)
        begun = run.state().get("identity")
        if isinstance(begun, dict) and begun != run.identity:
            raise Refusal(
                BAD_CONFIG,
                f"run.name: {shown} was begun with {_difference(begun, run.identity)}; "
                "choose another name or set run.resume=never",
            )
        for folder in (path, run.checkpoints, path / "predictions"):
            if folder.exists():
                refuse_links(folder)
                sweep(folder)
    except BaseException:
        lock.close()
        raise
    return run


def _free_name(root: Path, name: str) -> str:
    number = 1
    while os.path.lexists(root / (name if number == 1 else f"{name}-{number}")):
        number += 1
    return name if number == 1 else f"{name}-{number}"


def _as_set(value: object) -> str:
    return printable(config.written(value), 30)


def _difference(begun: dict, now: dict) -> str:
    old, new = begun.get("settings"), now["settings"]
    old = old if isinstance(old, dict) else {}
    changed = [
        f"{name}={_as_set(old.get(name))}, not {_as_set(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    changed += [
        f"other {what} (hash {printable(begun.get(what), 30)}, not {now[what]})"
        for what in ("data", "model")
        if begun.get(what) != now[what]
    ]
    return "; ".join(changed)
