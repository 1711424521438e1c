"""A save that fails is tried again, the last one ends with 73; damage is found; nothing is lost."""

import errno
import json
import os
import resource
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from harness import (
    KILL,
    arguments,
    assert_clean,
    assert_goes_on,
    assert_same,
    at,
    fire,
    run,
    warnings,
)

import checkpoint
import progress
import runlog
from errors import CANNOT_WRITE, MISSING

pytestmark = pytest.mark.fault

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def failing(target: str, first: int, last: int, number: int) -> None:
    """Calls `first` to `last` of something fail with an error number."""
    module, _, name = target.partition(":")
    owner = __import__(module)
    original, calls = getattr(owner, name), []

    def fail(*arguments: object, **options: object) -> object:
        calls.append(name)
        if first <= len(calls) <= last:
            fire(lambda: None)
            raise OSError(number, os.strerror(number))
        return original(*arguments, **options)

    setattr(owner, name, fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("target", "first", "last"),
    [
        ("checkpoint:save_file", 1, 1),  # the best so far, at step 2
        ("checkpoint:save_file", 3, 3),  # at step 3, which is no best
        ("checkpoint:save_file", 5, 8),  # the best at step 4, and its retries
        ("checkpoint:seal", 2, 2),
        ("progress:write_json", 1, 1),  # best.json
    ],
)
def test_a_failed_save_is_tried_again(small, plain, tmp_path, name, target, first, last, number):
    ended = run(tmp_path, arguments(small, name), partial(failing, target, first, last, number))
    assert ended.process.exitcode == 0, ended.said()
    assert ended.said().count("is not saved and will be tried again") == 1
    assert os.strerror(number) in ended.said() and "could be written" in ended.said()
    assert warnings(small / "runs" / name) == ["checkpoint_failed"]
    assert_same(small / "runs" / name, plain)
    assert_clean(small, ended)


def test_the_next_try_is_after_the_next_step_and_the_best_is_not_forgotten(
    small, plain, tmp_path, name
):
    """The save of step 4, the best until 8, fails: 5 is saved out of turn, and 4 with it."""
    command = arguments(small, name)
    run(tmp_path, command, partial(failing, "checkpoint:save_file", 5, 5, errno.ENOSPC))
    root = small / "runs" / name / "checkpoints"
    assert [int(p.name[-2:]) for p in checkpoint.listed(root)] == [2, 3, 4, 5, 6, 8, 9, 10]
    for file in FILES[:2]:
        ours, theirs = (r / "step-00000004" / file for r in (root, plain / "checkpoints"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_save_that_keeps_failing_ends_with_73_and_leaves_the_one_before(
    small, plain, tmp_path, name
):
    command = arguments(small, name)
    ended = run(tmp_path, command, partial(failing, "checkpoint:save_file", 5, 999, errno.ENOSPC))
    assert ended.process.exitcode == CANNOT_WRITE
    assert "No space left on device" in ended.said().splitlines()[-1]
    kept = checkpoint.listed(small / "runs" / name / "checkpoints")
    assert [folder.name for folder in kept] == ["step-00000002", "step-00000003"]
    assert_goes_on(small, name, command, plain)


@pytest.mark.parametrize("size", [16384, 60_000, 120_000])
def test_a_limit_on_the_size_of_files(small, plain, tmp_path, name, size):
    """The system itself refuses: the log grows too large, or a file of a checkpoint is."""
    command = arguments(small, name)
    ended = run(tmp_path, command, partial(_limit_files, size))
    assert ended.process.exitcode == CANNOT_WRITE, ended.said()
    assert "File too large" in ended.said() and "Traceback" not in ended.said()
    assert_goes_on(small, name, command, plain)


def _limit_files(size: int) -> None:
    fire(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def test_a_log_without_room_keeps_its_lines_until_there_is_some(tmp_path):
    """Cut anywhere, as the system takes what still fits; what cannot be made durable is said."""
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    log = runlog.RunLog(path)
    log.write("step", step=0)
    for step in range(1, 9):
        size = path.stat().st_size + 4 * step
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            log.write("step", step=step)
            assert path.stat().st_size == size, "a part of the line is there"
            with pytest.raises(OSError, match="File too large"):
                log.sync()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.sync()
    log.close()
    assert [e["step"] for e in runlog.lines(path)] == list(range(9))


def test_no_room_is_found_before_a_checkpoint_is_written(small, plain, tmp_path, name):
    """Nothing of it is written; what is free comes from the system, here from a stand-in."""
    command = arguments(small, name)
    ended = run(tmp_path, command, partial(_fill_the_disk, free=10_000))
    assert ended.process.exitcode == CANNOT_WRITE
    assert checkpoint.listed(small / "runs" / name / "checkpoints") == []
    early = run(tmp_path, command, partial(_fill_the_disk, free=10_000, from_start=True))
    assert early.process.exitcode == CANNOT_WRITE
    assert "GB free, but checkpoints need" in early.said()
    kept = plain / "checkpoints" / "step-00000010"
    enough = int(1.5 * sum(p.stat().st_size for p in kept.glob("*.safetensors")))
    low = run(tmp_path, command, partial(_fill_the_disk, free=enough))
    assert low.process.exitcode == 0 and low.said().count("the disk runs low") == 1
    assert warnings(small / "runs" / name)[-1] == "disk_low"
    assert_same(small / "runs" / name, plain)


def _fill_the_disk(free: int, *, from_start: bool = False) -> None:
    def usage(path: object) -> mock.Mock:
        return mock.Mock(free=free)

    save = progress.Saver._try

    def filled(*given: object) -> None:
        fire(lambda: setattr(shutil, "disk_usage", usage))
        save(*given)

    progress.Saver._try = filled
    if from_start:
        fire(lambda: setattr(shutil, "disk_usage", usage))


def test_a_run_whose_directory_vanishes_says_so(small, plain, tmp_path, name):
    command = arguments(small, name)
    folder = small / "runs" / name
    ended = run(tmp_path, command, partial(_remove, str(folder)))
    assert ended.process.exitcode == CANNOT_WRITE and "Traceback" not in ended.said()
    assert "No such file or directory" in ended.said() and not folder.exists()
    assert_goes_on(small, name, command, plain)


def _remove(folder: str) -> None:
    save, calls = progress.Saver._try, []

    def gone(*given: object) -> None:
        calls.append(given)
        if len(calls) == 2:
            fire(lambda: shutil.rmtree(folder))
        save(*given)

    progress.Saver._try = gone


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # a manifest without its last newline is whole


def swap(path: Path) -> None:
    """The file of another step in its place."""
    shutil.copy(path.parent.parent / "step-00000003" / path.name, path)


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, swap, to_fifo])
def test_a_damaged_newest_checkpoint_is_set_aside(
    small, plain, stopped, tmp_path, name, file, damage
):
    root = small / "runs" / name / "checkpoints"
    damage(root / "step-00000006" / file)
    again = run(tmp_path, stopped)
    assert again.process.exitcode == 0, again.said()
    assert "a damaged checkpoint is set aside: step-00000006: " in again.said()
    assert "going on after step 4 of 10" in again.said()
    assert (root / "damaged-step-00000006").is_dir()
    assert warnings(root.parent) == ["settings", "damaged_checkpoint"]  # the first: another name
    assert_same(root.parent, plain)


@pytest.mark.parametrize("manifest", ["{}", "[]", '{"state.json": 1}', '{"../x": {}}', "x" * 99])
def test_a_manifest_that_proves_nothing_is_no_proof(
    small, plain, stopped, tmp_path, name, manifest
):
    root = small / "runs" / name / "checkpoints"
    (root / "step-00000006" / "manifest.json").write_text(manifest)
    again = run(tmp_path, stopped)
    assert again.process.exitcode == 0 and "is set aside: step-00000006" in again.said()
    assert_same(root.parent, plain)


def test_a_checkpoint_whose_best_is_damaged_is_passed_over(small, plain, stopped, tmp_path, name):
    """Going on from it would end without the best model."""
    root = small / "runs" / name / "checkpoints"
    flip(root / "step-00000004" / "model.safetensors")
    again = run(tmp_path, stopped)
    assert again.process.exitcode == 0, again.said()
    assert "its best checkpoint, of step 4, is damaged" in again.said()
    assert "going on after step 3 of 10" in again.said()
    assert_same(root.parent, plain)


def test_each_checkpoint_that_is_kept_can_be_gone_on_from(small, plain, tmp_path, name):
    """With two kept, 6 and 8, a new best: that of 6 was not deleted with the older ones."""
    command = arguments(small, name, checkpoint__keep=2)
    run(tmp_path, command, partial(at, "train:update", KILL, call=8))
    root = small / "runs" / name / "checkpoints"
    assert [p.name[-1] for p in checkpoint.listed(root)] == ["4", "6"]
    more = partial(at, "train:update", KILL, call=3, after=True)
    run(tmp_path, command, more)
    assert [p.name[-1] for p in checkpoint.listed(root)] == ["4", "6", "8"], "4 is the best of 6"
    flip(root / "step-00000008" / "model.safetensors")
    again = run(tmp_path, arguments(small, name))
    assert again.process.exitcode == 0 and "going on after step 6" in again.said(), again.said()
    assert_same(root.parent, plain)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_without_a_valid_checkpoint_nothing_is_begun(small, stopped, tmp_path, name, damage):
    root = small / "runs" / name / "checkpoints"
    for folder in checkpoint.listed(root):
        damage(folder / "state.json")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    again = run(tmp_path, stopped)
    assert again.process.exitcode == MISSING
    assert "no valid checkpoint (step-00000006: " in again.said().splitlines()[-1]
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("lost", ["checkpoints", "all of them"])
def test_checkpoints_that_are_gone_are_not_taken_for_a_beginning(
    small, stopped, tmp_path, name, lost
):
    root = small / "runs" / name / "checkpoints"
    if lost == "checkpoints":
        root.rename(tmp_path / "moved")
    else:
        for folder in checkpoint.listed(root):
            shutil.rmtree(folder)
    again = run(tmp_path, stopped)
    assert again.process.exitcode == MISSING
    assert "the checkpoints that the run's log tells of are gone" in again.said()
    assert not (small / "runs" / name / "best").exists()


def test_a_finished_run_that_cannot_delete_its_checkpoints_is_finished(
    small, tmp_path, name, capsys
):
    """And one whose scores are lost is not trained again."""
    command = arguments(small, name, checkpoint__keep=1)
    ended = run(tmp_path, command, partial(_never_delete, str(small / "runs" / name)))
    assert ended.process.exitcode == 0, ended.said()
    again = run(tmp_path, command)
    assert again.process.exitcode == 0 and "is finished: " in again.said()
    (small / "runs" / name / "results.json").write_text("{")
    again = run(tmp_path, command)
    assert again.process.exitcode == MISSING
    assert "results.json cannot be read" in again.said()


def _never_delete(folder: str) -> None:
    delete = checkpoint.delete

    def fail(path: Path) -> None:
        if path == Path(folder) / "checkpoints":
            fire(lambda: path.rename(path.with_name(f".checkpoints.{os.getpid()}")))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        delete(path)

    checkpoint.delete = fail


def test_the_state_of_a_run_that_took_the_directory_is_left_alone(small, plain, tmp_path, name):
    """As when somebody removes a run that still trains and starts it again."""
    folder, command = small / "runs" / name, arguments(small, name)
    ended = run(tmp_path, command, partial(_replace, str(folder), str(plain)))
    assert ended.process.exitcode == CANNOT_WRITE, ended.said()
    assert "another directory has taken its place" in ended.said()
    for file in ("run_state.json", "metrics.jsonl"):
        assert (folder / file).read_bytes() == (plain / file).read_bytes()


def _replace(folder: str, other: str) -> None:
    save, calls = progress.Saver._try, []

    def replaced(*given: object) -> None:
        calls.append(given)
        if len(calls) == 2:
            fire(lambda: shutil.rmtree(folder))
            shutil.copytree(other, folder)
        save(*given)

    progress.Saver._try = replaced


HOSTILE = [
    {"step": 6, "run": None},
    {"step": "6"},
    {"best": [1]},
    {"skipped": -1},
    {"best_step": 10**30},
    {"odd": 1},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_a_sealed_state_that_is_not_ours_is_refused_in_a_line(
    small, stopped, tmp_path, name, change
):
    root = small / "runs" / name / "checkpoints"
    for folder in checkpoint.listed(root):
        state = json.loads((folder / "state.json").read_text()) | change
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "manifest.json").unlink()
        checkpoint.seal(folder)
    again = run(tmp_path, stopped)
    assert again.process.exitcode in (MISSING, 78) and "Traceback" not in again.said()


def test_tensors_of_other_names_shapes_or_types_are_refused(small, stopped, tmp_path, name):
    from safetensors.torch import load_file, save_file

    changes = [
        lambda t: t | {"extra": t[next(iter(t))].clone()},
        lambda t: {k: v for k, v in t.items() if "dense" not in k},
        lambda t: t | {k: v[:1].clone() for k, v in t.items() if v.ndim},
        lambda t: {k: v.double() for k, v in t.items()},
    ]
    for i, change in enumerate(changes):
        copy = shutil.copytree(small / "runs" / name, small / "runs" / f"{name}-{i}")
        root = copy / "checkpoints"
        for folder in checkpoint.listed(root):
            path = folder / "model.safetensors"
            save_file(change(load_file(path)), path)
            (folder / "manifest.json").unlink()
            checkpoint.seal(folder)
        again = run(tmp_path, [*stopped, f"run.name={copy.name}"])
        assert again.process.exitcode == MISSING, again.said()
        assert "another model's checkpoint (tensor " in again.said().splitlines()[-1]
