"""A process killed at any point of a run, mid-save too, goes on to the undisturbed run's bytes."""

import signal
from functools import partial

import pytest
from harness import (
    KILL,
    arguments,
    assert_clean,
    assert_goes_on,
    assert_same,
    at,
    code_of,
    fail,
    ranks,
    run,
)

import checkpoint

pytestmark = pytest.mark.fault

SIGKILLED = -signal.SIGKILL
SAVING = [  # a checkpoint's files, manifest, renaming, pointer and pruning, of the second save
    ("progress:checkpoint.tensors", 2, False),
    ("checkpoint:save_file", 3, False),
    ("checkpoint:save_file", 3, True),
    ("checkpoint:save_file", 4, True),
    ("checkpoint:seal", 2, False),
    ("checkpoint:seal", 2, True),
    ("checkpoint:publish", 2, True),
    ("files:os.fsync", 9, False),
    ("progress:write_json", 2, False),
    ("progress:write_json", 2, True),
]
TRAINING = [
    ("prepare:load_corpus", 1, False),
    ("results:start", 1, True),
    ("train:update", 1, False),  # before the first checkpoint
    ("train:backward", 5, True),
    ("train:evaluate_and_judge", 3, True),
]
FINISHING = [
    ("train:load_best", 1, True),
    ("checkpoint:export", 1, False),
    ("checkpoint:export", 1, True),
    ("results:_write_predictions", 1, True),
    ("results:write_json", 2, False),
    ("results:write_json", 2, True),
]


@pytest.mark.parametrize(("target", "call", "after"), SAVING + TRAINING + FINISHING)
def test_killed_and_started_again(small, plain, tmp_path, name, target, call, after):
    command = arguments(small, name)
    killed = run(tmp_path, command, partial(at, target, KILL, call=call, after=after))
    assert killed.process.exitcode == SIGKILLED
    assert_goes_on(small, name, command, plain)


@pytest.mark.parametrize("target", ["checkpoint:prune", "checkpoint:delete"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_while_old_checkpoints_are_deleted(small, plain, tmp_path, name, target, after):
    command = arguments(small, name, checkpoint__keep=1)
    run(tmp_path, command, partial(at, target, KILL, call=2, after=after))
    again = run(tmp_path, command)
    assert again.process.exitcode == 0, again.said()
    assert not (small / "runs" / name / "checkpoints").exists()
    best = "best/model.safetensors"
    assert (small / "runs" / name / best).read_bytes() == (plain / best).read_bytes()
    assert_clean(small, again)


def test_control_a_save_that_is_not_whole_would_be_noticed(small, plain, tmp_path, name):
    """Without the temporary folder the killed save would be taken for a checkpoint, or refused."""
    command = arguments(small, name)
    run(tmp_path, command, partial(_in_place, "checkpoint:save_file"))
    again = run(tmp_path, command)
    kept = small / "runs" / name / "checkpoints" / "damaged-step-00000003"
    assert again.process.exitcode == 0 and kept.exists(), again.said()


def _in_place(target: str) -> None:
    at(target, KILL, call=4, after=True)
    folder_of = checkpoint.folder_of

    def save(root, files, state):
        folder = folder_of(root, state["step"])
        folder.mkdir(parents=True)
        for file, tensors in files.items():
            checkpoint.save_file(tensors, folder / file)
        checkpoint.write_json(folder / "state.json", state)
        checkpoint.seal(folder)
        return folder

    checkpoint.save = save


def test_killed_five_times_in_one_run(small, plain, tmp_path, name):
    command = arguments(small, name)
    for call in (1, 1, 2, 2, 3):
        killed = run(tmp_path, command, partial(at, "train:update", KILL, call=call, after=True))
        assert killed.process.exitcode == SIGKILLED
    assert_goes_on(small, name, command, plain)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("rank", "target", "call"),
    [(1, "train:backward", 5), (0, "checkpoint:seal", 2), (0, "train:evaluate_and_judge", 2)],
)
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(
    small, plain_two, tmp_path, name, rank, target, call
):
    command = arguments(small, name)
    started = ranks(tmp_path, command, {rank: partial(at, target, KILL, call=call)})
    code_of(started)
    assert started[rank].fired() and started[rank].process.exitcode == SIGKILLED
    other = started[1 - rank]
    assert other.process.exitcode == 70
    named = f"rank {rank} (process {started[rank].pid} on " if rank else "rank 0 or the torchrun"
    assert f"no sign of life from {named}" in other.said()
    again = ranks(tmp_path, command)
    assert code_of(again) == 0, again[0].said()
    assert_same(small / "runs" / name, plain_two)
    assert_clean(small, *started, *again)


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_shows_its_traceback_and_ends_all(
    small, plain_two, tmp_path, name, rank
):
    command = arguments(small, name)
    broken = partial(fail, ValueError("a planted fault"))
    started = ranks(tmp_path, command, {rank: partial(at, "train:backward", broken, call=5)})
    assert code_of(started) == 70
    assert "ValueError: a planted fault" in started[rank].said()
    assert "Traceback" not in started[1 - rank].said(), "only the first to fail is shown"
    again = ranks(tmp_path, command)
    assert code_of(again) == 0, again[0].said()
    assert_same(small / "runs" / name, plain_two)
    assert_clean(small, *started, *again)


@pytest.mark.dist
def test_of_two_that_fail_at_once_one_traceback_is_shown(small, tmp_path, name):
    broken = partial(at, "train:backward", partial(fail, ValueError("a planted fault")), call=2)
    started = ranks(tmp_path, arguments(small, name), {0: broken, 1: broken})
    assert code_of(started) == 70 and all(trainer.fired() for trainer in started)
    said = "".join(trainer.said() for trainer in started)
    assert said.count("ValueError: a planted fault") == 1


@pytest.mark.parametrize("kind", [MemoryError, "torch.OutOfMemoryError", "allocator"])
def test_out_of_memory_is_70_with_the_settings_that_need_less(small, plain, tmp_path, name, kind):
    command = arguments(small, name)
    run_out = partial(_run_out_of_memory, kind)
    ended = run(tmp_path, command, partial(at, "train:step_loss", run_out, call=4))
    assert ended.process.exitcode == 70
    assert "train.micro_batch_tokens" in ended.said() and "Traceback" not in ended.said()
    assert_goes_on(small, name, command, plain)


def _run_out_of_memory(kind: object) -> None:
    import torch

    if kind == "allocator":
        torch.empty(1 << 60)
    raise torch.OutOfMemoryError("CUDA out of memory") if isinstance(kind, str) else kind()
