#!/usr/bin/env python3
"""Durable training state: complete or absent, verified by a manifest, never pickled.

usage: checkpoint.py RUN --list | --verify | --prune K
"""

import argparse
import contextlib
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import MISSING, OK, UNAVAILABLE, USAGE, Refusal, printable
from files import hold, open_regular, publish, read_json, sweep, write_json, writing
from history import named
from optimizer import state_tensors

BYTES_PER_PARAMETER = 12  # itself and its two moments, fp32
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name; a tensor that two modules share counts once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            tensors[name] = tensor
        seen.add(tensor.data_ptr())
    return tensors


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step:08d}"


def tensors(
    model: nn.Module, optimizer: torch.optim.AdamW, *, copy: bool
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file, on the CPU; `copy`: apart from what training changes."""
    files = {
        "model.safetensors": model_tensors(model),
        "optimizer.safetensors": dict(state_tensors(model, optimizer)),
    }
    return {
        file: {name: t.detach().to("cpu", copy=copy).contiguous() for name, t in named.items()}
        for file, named in files.items()
    }


def save(root: Path, files: dict[str, dict[str, Tensor]], state: Mapping[str, object]) -> Path:
    """Write `root/step-<state["step"]>`, whole or not at all; Refusal 73 if that cannot be done."""
    folder = folder_of(root, state["step"])
    with writing(root):
        root.mkdir(exist_ok=True)
        sweep(root)
        if shutil.disk_usage(root).free < size_of(files):  # not after minutes of writing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with replacing_folder(folder) as new:
        for name, named in files.items():
            save_file(named, new / name)
        write_json(new / "state.json", state)
    return folder


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder`, sealed and durable, once the block ends well.

    Refusal 73 if it cannot be written; nothing of it is left then.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    with writing(folder, SafetensorError):  # which is raised for a full disk, too
        try:
            temporary.mkdir()
            yield temporary
            seal(temporary)
            if folder.exists():
                delete(folder)
            publish(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def size_of(files: dict[str, dict[str, Tensor]]) -> int:
    """Bytes of what `tensors` gave."""
    return sum(t.numel() * t.element_size() for named in files.values() for t in named.values())


def seal(folder: Path) -> None:
    """Add manifest.json with the size and sha256 of every file, all of them on disk afterwards.

    All get its permissions: safetensors makes its files the user's own.
    """
    write_json(folder / "manifest.json", {})
    permissions, files = (folder / "manifest.json").stat().st_mode & 0o777, {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != "manifest.json"):
        with contextlib.suppress(OSError):  # on a disk where all is somebody else's
            path.chmod(permissions)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    write_json(folder / "manifest.json", files)


def fault(folder: Path, needed: Iterable[str] = ()) -> str | None:
    """What is wrong with a sealed folder, or None: every byte is compared with the manifest.

    `needed`: files that must be there. Whoever made the manifest, no name in it leads elsewhere.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        return "no readable manifest.json"
    lacking = sorted(set(needed) - manifest.keys())
    if lacking or not manifest:
        return f"manifest.json lists no {lacking[0] if lacking else 'file'}"
    for name, expected in manifest.items():
        shown = printable(name)
        if name != Path(name).name or not isinstance(expected, dict):
            return f"manifest.json has an odd entry '{shown}'"
        try:
            with open_regular(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected.get("size"):
                    wanted = printable(expected.get("size"))
                    return f"{shown} has {size:,} bytes instead of {wanted}"
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.get("sha256"):
                    return f"{shown} differs from its sha256"
        except OSError as error:
            return f"{shown}: {error.strerror}"
    return None


def state_of(folder: Path) -> dict[str, object]:
    """The `state` that was given to `save`; empty if it cannot be read."""
    return read_json(folder / "state.json") or {}


def unusable(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint, or None: its own fault, or its best one's."""
    wrong = fault(folder, FILES)
    if wrong:
        return wrong
    step, best = (state_of(folder).get(name) for name in ("step", "best_step"))
    if not isinstance(step, int) or folder_of(folder.parent, step) != folder:
        return f"its state.json is of step {printable(step)}"
    if best and best != step:
        if not isinstance(best, int):
            return f"its state.json has an odd best_step, {printable(best)}"
        wrong = fault(folder_of(folder.parent, best), FILES)
        if wrong:
            return f"its best checkpoint, of step {best}, is damaged: {wrong}"
    return None


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint, None if there is none at all; what was wrong with newer ones.

    Those are renamed to `damaged-...`, so that no pruning takes them for the newest. Raises Refusal
    66 if there are some and none is usable: never a silent start from nothing.
    """
    faults: dict[Path, str] = {}
    for folder in reversed(listed(root)):
        wrong = unusable(folder)
        if wrong is None:
            for damaged in faults:
                _set_aside(damaged)
            return folder, [f"{damaged.name}: {why}" for damaged, why in faults.items()]
        faults[folder] = wrong
    aside = [p.name for p in root.glob("damaged-*")]
    if faults or aside:
        listing = [f"{folder.name}: {why}" for folder, why in faults.items()] + aside
        raise Refusal(
            MISSING,
            f"{printable(root, 300)}: no valid checkpoint ({'; '.join(listing)}); "
            "run.resume=never begins anew beside it",
        )
    return None, []


def _set_aside(damaged: Path) -> None:
    aside = damaged.with_name(f"damaged-{damaged.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with writing(aside):
        damaged.rename(aside)


def listed(root: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir() and not p.is_symlink())


def prune(root: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints, the best, and the best of each that is kept.

    Without its best one a run cannot go on from a checkpoint; see `unusable`.
    """
    kept = {*listed(root)[-keep:], best}
    bests = [state_of(folder).get("best_step") for folder in kept if folder]
    kept |= {folder_of(root, step) for step in bests if isinstance(step, int)}
    for folder in listed(root):
        if folder not in kept:
            delete(folder)


def delete(folder: Path) -> None:
    """A folder of ours; under another name first, so that nobody sees half of one."""
    doomed = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def load_weights(folder: Path, model: nn.Module) -> None:
    """The model's tensors of a checkpoint into `model`; every one of them and no other."""
    _fill(folder / "model.safetensors", model_tensors(model))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, object]:
    """Model, optimizer state and the `state` given to `save`."""
    load_weights(folder, model)
    _fill(folder / "optimizer.safetensors", dict(state_tensors(model, optimizer)))
    return state_of(folder)


def _fill(path: Path, own: dict[str, Tensor]) -> None:
    """The tensors of a file into `own`; Refusal 66 unless names, shapes and types are the same."""
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Refusal(MISSING, f"{printable(path, 300)}: cannot be read: {error}") from None
    odd = sorted(loaded.keys() ^ own.keys()) or [
        name
        for name, tensor in own.items()
        if (loaded[name].shape, loaded[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if odd:
        where = printable(path, 300)
        raise Refusal(MISSING, f"{where}: another model's checkpoint (tensor {printable(odd[0])})")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(loaded[name])


def export(model: nn.Module, tokenizer, folder: Path, beside: Mapping[str, str]) -> None:
    """A transformers folder that `pipeline("text-classification")` loads; whole or absent.

    beside: name -> content of further text files.
    """
    with replacing_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for name, text in beside.items():
            (new / name).write_text(text, encoding="utf-8")


# --- from the command line ------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """List, verify or prune the checkpoints of a run; the exit code of errors.py."""
    parser = argparse.ArgumentParser(description=main.__doc__.split(";")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder, or its name below runs/")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--list", action="store_true", help="step, size, which is the best")
    chosen.add_argument("--verify", action="store_true", help="compare every byte with its hash")
    chosen.add_argument("--prune", type=int, metavar="K", help="keep the newest K and the best")
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        return USAGE if end.code else OK
    try:
        if args.prune is not None and args.prune < 1:
            raise Refusal(USAGE, f"--prune: expected a number of at least 1, found {args.prune}")
        run = named(args.run)
        if not (run / "run_state.json").is_file():
            raise Refusal(MISSING, f"{printable(run, 300)}: no run: it has no run_state.json")
        return _prune_run(run, args.prune) if args.prune else _show(run, args.verify)
    except Refusal as error:
        print(error.message, file=sys.stderr)
        return error.exit_code


def _show(run: Path, verify: bool) -> int:
    """A line for each checkpoint; 66 if one that was verified is damaged."""
    root, best = run / "checkpoints", best_of(run)
    folders = listed(root) + [p for p in sorted(root.glob("damaged-*")) if p.is_dir()]
    folders += [run / "best"] if (run / "best").is_dir() else []
    damaged = 0
    for folder in folders:
        size = sum(p.lstat().st_size for p in folder.iterdir())
        note = "  best so far" if folder == best else ""
        if verify:
            wrong = fault(folder, () if folder.name == "best" else FILES)
            note += f"  {wrong or 'every byte is as it was written'}"
            damaged += wrong is not None
        print(printable(f"{folder.name}  {size / 1e6:,.1f} MB{note}", 300))
    if not folders:
        print("no checkpoint")
    return MISSING if damaged else OK


def _prune_run(run: Path, keep: int) -> int:
    """Delete old checkpoints of a run that nobody trains, damaged ones included."""
    with writing(run):
        lock = hold(run / "lock")
        if lock is None:
            raise Refusal(UNAVAILABLE, f"{printable(run, 300)}: a trainer holds this run directory")
        with lock:
            root = run / "checkpoints"
            before = set(root.glob("*step-*"))
            kept, _ = newest(root)  # sets damaged ones aside, which do not count as kept
            best = state_of(kept).get("best_step") if kept else None
            prune(root, keep, folder_of(root, best) if isinstance(best, int) else None)
            for damaged in root.glob("damaged-*"):
                shutil.rmtree(damaged)
            for gone in sorted(before - set(root.glob("*step-*"))):
                print(f"deleted {printable(gone.name)}")
    return OK


def best_of(run: Path) -> Path | None:
    """The best checkpoint of a run that is not finished, as best.json has it."""
    name = (read_json(run / "best.json") or {}).get("checkpoint")
    return run / "checkpoints" / name if isinstance(name, str) else None


if __name__ == "__main__":
    sys.exit(main())
