"""Durable training state: complete or absent, verified by a manifest, never pickled."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import CANNOT_WRITE, MISSING, Refusal
from optimizer import state_tensors

BYTES_PER_PARAMETER = 12  # itself and its two moments, fp32


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
    temporary = root / f".{folder.name}.{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(".step-*"):  # of a process that was killed while it saved
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        for name, named in files.items():
            save_file(named, temporary / name)
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        seal(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        publish(temporary, folder)
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise Refusal(CANNOT_WRITE, f"{folder}: cannot be written: {reason}") from None
    return folder


def seal(folder: Path) -> None:
    """Add manifest.json with the size and sha256 of every file, all of them on disk afterwards."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    write_json(folder / "manifest.json", files)


def publish(temporary: Path, folder: Path) -> None:
    """Rename a finished folder to its final name, durably."""
    _fsync_folder(temporary)
    temporary.rename(folder)
    _fsync_folder(folder.parent)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file in one step, so that a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync_folder(path.parent)


def read_json(path: Path) -> dict | None:
    """The object in a JSON file, or None if there is no such file or it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None: every byte is compared with the manifest."""
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        return "no readable manifest.json"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} differs from its sha256"
    return None


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, None if there is none; what was wrong with newer ones.

    Those are renamed to `damaged-...`, so that no pruning takes them for the newest. Raises Refusal
    66 if there are some and none is valid: never a silent start from nothing.
    """
    faults: dict[Path, str] = {}
    for folder in reversed(listed(root)):
        wrong = fault(folder)
        if wrong is None:
            for damaged in faults:
                aside = damaged.with_name(f"damaged-{damaged.name}")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)
            return folder, [f"{damaged.name}: {why}" for damaged, why in faults.items()]
        faults[folder] = wrong
    if faults:
        listing = "; ".join(f"{folder.name}: {why}" for folder, why in faults.items())
        raise Refusal(MISSING, f"{root}: no valid checkpoint ({listing})")
    return None, []


def listed(root: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir())


def prune(root: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    for folder in listed(root)[:-keep]:
        if folder != best:
            shutil.rmtree(folder)


def load_weights(folder: Path, model: nn.Module) -> None:
    """The model's tensors of a checkpoint into `model`; every one of them and no other."""
    loaded = load_file(folder / "model.safetensors")
    own = model_tensors(model)
    if loaded.keys() != own.keys():
        odd = sorted(loaded.keys() ^ own.keys())[0]
        raise Refusal(MISSING, f"{folder}: another model's checkpoint (tensor {odd})")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(loaded[name])


def load(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, object]:
    """Model, optimizer state and the `state` given to `save`."""
    load_weights(folder, model)
    moments = load_file(folder / "optimizer.safetensors")
    for name, tensor in state_tensors(model, optimizer):
        tensor.copy_(moments[name])
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def export(model: nn.Module, tokenizer, folder: Path) -> None:
    """A transformers folder that `pipeline("text-classification")` loads; whole or absent."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        seal(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        publish(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise Refusal(CANNOT_WRITE, f"{folder}: cannot be written: {reason}") from None


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
