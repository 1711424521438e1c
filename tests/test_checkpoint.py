"""A checkpoint is whole or absent; damage of any byte is found; the newest valid one is taken."""

import pytest
import tiny
import torch

import checkpoint
from errors import Refusal
from optimizer import make_optimizer, update


def held(job, optimizer):
    return checkpoint.tensors(job.model, optimizer, copy=False)


@pytest.fixture
def saved(small, tmp_path):
    """Two checkpoints of a model that has taken a step, and what they hold."""
    job = tiny.make_job(tiny.settings(small))
    optimizer = make_optimizer(job.model, job.cfg.optimizer)
    for parameter in job.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update(optimizer, 1.0)
    for step in (3, 7):
        checkpoint.save(tmp_path, held(job, optimizer), {"step": step})
    return tmp_path, job, optimizer


def test_a_round_trip_gives_the_same_tensors(saved, small):
    root, job, optimizer = saved
    other = tiny.make_job(tiny.settings(small, run__seed=7))
    theirs = make_optimizer(other.model, other.cfg.optimizer)
    state = checkpoint.load(checkpoint.newest(root)[0], other.model, theirs)
    assert state == {"step": 7}
    for a, b in zip(job.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, moment in optimizer.state[a].items():
            assert torch.equal(moment, theirs.state[b][name])


def test_all_files_have_the_permissions_that_new_files_get(saved):
    root, _, _ = saved
    (root / "plain").touch()
    expected = (root / "plain").stat().st_mode
    files = list(checkpoint.newest(root)[0].iterdir())
    assert len(files) == 4 and {path.stat().st_mode for path in files} == {expected}


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(saved, name, damage):
    path = saved[0] / "step-00000007" / name
    raw = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 0x80  # no JSON survives it, and no hash
        path.write_bytes(raw[:-1] if damage == "cut" else raw)
    newest, faults = checkpoint.newest(saved[0])
    assert newest.name == "step-00000003" and faults[0].startswith("step-00000007: ")
    checkpoint.prune(saved[0], 1, best=None)
    assert checkpoint.newest(saved[0]) == (newest, []), "the damaged one counts no more"


def test_no_valid_checkpoint_is_66_and_none_at_all_is_a_beginning(saved, tmp_path):
    for folder in checkpoint.listed(saved[0]):
        (folder / "state.json").unlink()
    with pytest.raises(Refusal, match=r"state\.json: No such file") as refusal:
        checkpoint.newest(saved[0])
    assert refusal.value.exit_code == 66
    assert checkpoint.newest(tmp_path / "nothing") == (None, [])


def test_pruning_keeps_the_newest_and_the_best(saved):
    root, job, optimizer = saved
    for step in (8, 9):
        checkpoint.save(root, held(job, optimizer), {"step": step})
    checkpoint.prune(root, 1, best=root / "step-00000003")
    assert [p.name for p in checkpoint.listed(root)] == ["step-00000003", "step-00000009"]


def test_a_failed_save_leaves_the_older_ones_and_nothing_else(saved, monkeypatch):
    root, job, optimizer = saved

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "seal", fail)
    with pytest.raises(Refusal, match="No space left") as refusal:
        checkpoint.save(root, held(job, optimizer), {"step": 9})
    assert refusal.value.exit_code == 73
    assert sorted(p.name for p in root.iterdir()) == ["step-00000003", "step-00000007"]


def test_what_is_there_already_is_replaced_whole(saved):
    root, job, optimizer = saved
    old = root / "step-00000007"
    (old / "other").touch()
    checkpoint.save(root, held(job, optimizer), {"step": 7, "new": True})
    assert checkpoint.state_of(old)["new"] and sorted(p.name for p in old.iterdir()) == sorted(
        FILES
    )
    for _ in range(2):
        checkpoint.export(job.base_model(), job.tokenizer, root / "best", {})
    assert checkpoint.fault(root / "best") is None
    assert not [p for p in root.iterdir() if p.name.startswith(".")]


def test_another_models_checkpoint_is_refused(saved, small):
    other = torch.nn.Linear(2, 2)
    with pytest.raises(Refusal, match="another model's checkpoint"):
        checkpoint.load_weights(checkpoint.newest(saved[0])[0], other)
