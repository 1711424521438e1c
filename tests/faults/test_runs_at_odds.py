"""One trainer a run, numbers that are not finite, changes between starts, hostile run folders."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from harness import (
    KILL,
    LIMIT_S,
    ROOT,
    Trainer,
    arguments,
    assert_clean,
    assert_goes_on,
    assert_same,
    at,
    code_of,
    ranks,
    run,
    wait_until,
    warnings,
)

import checkpoint
import files
import history
import rundir
import runlog
from errors import (
    BAD_CONFIG,
    CANNOT_WRITE,
    MISSING,
    NON_FINITE,
    OK,
    UNAVAILABLE,
    USAGE,
    Refusal,
)

pytestmark = pytest.mark.fault


# --- one trainer ----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_trainer_gets_69_and_changes_nothing(small, plain, tmp_path, name):
    """The first one waits in a step meanwhile; then it is killed, and its lock with it."""
    command = arguments(small, name, data__workers=2)
    first = Trainer(tmp_path, command, partial(at, "train:update", _wait_for_ever, call=4))
    wait_until(first.fired, "the fourth step")
    before = contents(small / "runs" / name)
    second = run(tmp_path, command)
    assert second.process.exitcode == UNAVAILABLE
    assert "another trainer holds this run directory" in second.said()
    prune = subprocess.run(
        [sys.executable, ROOT / "checkpoint.py", small / "runs" / name, "--prune", "1"],
        capture_output=True,
        text=True,
    )
    assert prune.returncode == UNAVAILABLE and "a trainer holds" in prune.stderr
    assert contents(small / "runs" / name) == before
    first.process.kill()
    first.wait()
    assert_goes_on(small, name, command, plain)
    assert_clean(small, first)


def _wait_for_ever() -> None:
    import time

    time.sleep(LIMIT_S)


@pytest.mark.parametrize("again", range(3))
def test_of_two_that_start_at_once_one_trains(small, plain, tmp_path, name, again):
    command = arguments(small, name)
    both = [Trainer(tmp_path, command) for _ in range(2)]
    codes = sorted(trainer.wait() for trainer in both)
    assert codes in ([OK, OK], [OK, UNAVAILABLE]), "or it found the other's run finished"
    assert_same(small / "runs" / name, plain)
    assert_clean(small, *both)


def test_a_check_never_removes_what_a_trainer_has_begun(small, plain, tmp_path, name):
    """It makes the directory to try it, and removes it while it holds it."""
    command = arguments(small, name)
    checks = [Trainer(tmp_path, [*command, "--check"]) for _ in range(3)]
    trainer = Trainer(tmp_path, command)
    while trainer.wait() == UNAVAILABLE:  # a check held the directory for a moment
        trainer = Trainer(tmp_path, command)
    codes = {check.wait() for check in checks}
    assert trainer.process.exitcode == OK and codes <= {OK, UNAVAILABLE}, trainer.said()
    assert_same(small / "runs" / name, plain)


def test_a_lock_file_that_nobody_holds_is_no_lock(small, plain, tmp_path, name):
    (small / "runs" / name).mkdir(parents=True)
    (small / "runs" / name / "lock").write_text("4711\n")
    assert_goes_on(small, name, arguments(small, name), plain)


def test_a_lock_whose_file_is_unlinked_meanwhile_is_not_held(tmp_path, monkeypatch):
    """A check removes its directory while another waits for the lock: that would be nobody's."""
    path, lock, calls = tmp_path / "lock", files.fcntl.lockf, []

    def unlinked_first(file, how):
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "lockf", unlinked_first)
    with files.hold(path) as held:
        assert len(calls) == 2 and os.path.samestat(os.fstat(held.fileno()), os.stat(path))


def test_a_check_deletes_nothing_but_a_lock(tmp_path):
    """Whatever the directory came to hold since it was opened."""
    for held in ([], ["precious"]):
        run_dir = rundir.open_run(tiny.make_config(run__name="x", run__dir=tmp_path), {"a": 1})
        for file in held:
            (run_dir.path / file).touch()
        run_dir.remove_if_new()
        assert run_dir.path.exists() == bool(held)


# --- numbers --------------------------------------------------------------------------------------


def _spoil(value: float) -> None:
    """From now on the gradient that the next backward leaves has this in one place."""
    import train

    backward = train.backward

    def spoilt(model, *rest):
        total = backward(model, *rest)
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        train.backward = backward
        return total

    train.backward = spoilt


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_update_that_is_not_finite_is_skipped_and_counted(small, tmp_path, name, value):
    spoil = partial(at, "train:update", partial(_spoil, value), call=2, after=True)
    ended = run(tmp_path, arguments(small, name), spoil)
    assert ended.process.exitcode == OK, ended.said()
    folder = small / "runs" / name
    assert json.loads((folder / "results.json").read_text())["skipped_steps"] == 1
    events = [e for e in runlog.read(folder / "metrics.jsonl") if e["event"] == "step"]
    assert [e["step"] for e in events if "nonfinite" in e] == [3]
    states = [
        checkpoint.load_file(p / "model.safetensors")
        for p in checkpoint.listed(folder / "checkpoints")
    ]
    assert all(torch.isfinite(t).all() for state in states for t in state.values())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), "step 3 changed nothing"


@pytest.mark.dist
def test_nan_on_one_rank_is_skipped_by_all(small, tmp_path, name):
    """Before the reduction, so that it comes to every rank with it."""
    poison = partial(at, "train:backward", _poison_loss, call=3)
    started = ranks(tmp_path, arguments(small, name), {1: poison})
    assert code_of(started) == OK, started[1].said()
    folder = small / "runs" / name
    assert json.loads((folder / "results.json").read_text())["skipped_steps"] == 1
    assert_clean(small, *started)


def _poison_loss() -> None:
    import train

    step_loss = train.step_loss

    def poisoned(*given):
        train.step_loss = step_loss
        return step_loss(*given) * float("nan")

    train.step_loss = poisoned


def test_too_many_end_with_76_and_leave_the_last_checkpoint(small, plain, tmp_path, name):
    command = arguments(small, name, train__max_nonfinite=1)
    always = partial(at, "train:backward", _poison_all, call=5)
    ended = run(tmp_path, command, always)
    assert ended.process.exitcode == NON_FINITE and "Traceback" not in ended.said()
    assert "2 of 6 steps had a gradient that is not finite" in ended.said()
    folder = small / "runs" / name
    kept = checkpoint.listed(folder / "checkpoints")
    assert kept[-1].name == "step-00000004"
    theirs = plain / "checkpoints" / kept[-1].name / "model.safetensors"
    assert (kept[-1] / "model.safetensors").read_bytes() == theirs.read_bytes()
    again = run(tmp_path, command)
    assert again.process.exitcode == OK and "going on after step 4" in again.said()
    ours, other = tiny.outcome(folder), tiny.outcome(plain)
    assert ours["best"] == other["best"] and ours["events"] == other["events"]


def _poison_all() -> None:
    import train

    step_loss = train.step_loss
    train.step_loss = lambda *given: step_loss(*given) * float("nan")


# --- changes between two starts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optimizer.lr=0.5", "optimizer.lr=0.008, not 0.5"),
        ("train.global_batch_size=4", "train.global_batch_size=8, not 4"),
        ("run.seed=1", "run.seed=42, not 1"),
        ("train.accumulation_steps=3", "train.global_batch_size=8, not 9"),
    ],
)
def test_what_alters_the_run_is_refused_with_the_difference(
    small, stopped, tmp_path, name, change, said
):
    before = contents(small / "runs" / name)
    refused = run(tmp_path, [*stopped, change])
    assert refused.process.exitcode == BAD_CONFIG and said in refused.said()
    assert contents(small / "runs" / name) == before


@pytest.mark.parametrize("changed", ["train", "validation", "model"])
def test_other_data_or_weights_under_the_same_name_are_refused_by_hash(
    small, stopped, tmp_path, name, changed
):
    if changed == "model":
        other = shutil.copytree(small / "model", tmp_path / "model")
        settings = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(settings | {"odd": 1}))
        refused = run(tmp_path, [*stopped, f"model.name={other}"])
        assert "other model (hash " in refused.said()
    else:
        text = (small / f"{changed}.csv").read_text()
        (tmp_path / "other.csv").write_text(text.replace("goose", "geese", 1))
        refused = run(tmp_path, [*stopped, f"data.{changed}={tmp_path / 'other.csv'}"])
        assert "other data (hash " in refused.said()
    assert refused.process.exitcode == BAD_CONFIG
    moved = shutil.copy(small / "train.csv", tmp_path / "moved.csv")
    control = run(tmp_path, [*stopped, f"data.train={moved}"])
    assert control.process.exitcode == OK, "the content counts, not the path"


def test_what_does_not_alter_the_run_is_allowed_and_logged(small, plain, stopped, tmp_path, name):
    again = run(tmp_path, [*stopped, "log.every=2", "data.workers=1"])
    assert again.process.exitcode == OK
    assert "log.every 1 -> 2" in again.said() and "data.workers auto -> 1" in again.said()
    assert warnings(small / "runs" / name) == ["settings"]
    assert tiny.outcome(small / "runs" / name)["best"] == tiny.outcome(plain)["best"]


@pytest.mark.dist
def test_another_number_of_ranks_goes_on_with_the_same_global_batches(small, tmp_path, name):
    """Without dropout, whose masks follow the cut, the weights agree up to rounding."""
    changes = {"model__name": small / "model-without-dropout"}
    command = arguments(small, name, **changes)
    run(tmp_path, command, partial(at, "train:update", KILL, call=5, after=True))
    more = ranks(tmp_path, command)
    assert code_of(more) == OK, more[0].said()
    assert "world_size 1 -> 2" in more[0].said()
    assert run(tmp_path, arguments(small, f"{name}-whole", **changes)).process.exitcode == OK
    ours, theirs = (
        [
            e["loss"]
            for e in runlog.read(small / "runs" / n / "metrics.jsonl")
            if e["event"] == "step"
        ]
        for n in (name, f"{name}-whole")
    )
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 10
    assert ours[:4] == theirs[:4] and ours[5:] != theirs[5:], "control: they were cut otherwise"


@pytest.mark.dist
@pytest.mark.parametrize("what", ["settings", "data", "weights", "code"])
def test_machines_that_differ_are_refused_before_training(small, tmp_path, name, what):
    """Each rank stands for a machine of its own: nothing is shared but the group."""
    command = arguments(small, name)
    differs = partial(at, "train:process_group", partial(_differ, what))
    started = ranks(tmp_path, command, {1: differs})
    expected = {"settings": 78, "data": 65, "weights": 66, "code": 78}[what]
    assert code_of(started) == expected, started[0].said()
    assert f"has other {what} than rank 0" in started[0].said() + started[1].said()
    assert not (small / "runs" / name).exists()


def _differ(what: str) -> None:
    import config
    import prepare
    import results

    if what == "settings":
        config.shared = lambda cfg: {"odd": 1}
    if what == "code":
        results.code_key = lambda: "odd"
    if what == "weights":
        os.environ["LOCAL_RANK"] = "0"
        prepare.models.weights_key = lambda source: "odd"
    if what == "data":
        load = prepare.load_corpus

        def other(*given, **named):
            import dataclasses

            return dataclasses.replace(load(*given, **named), key="odd")

        prepare.load_corpus = other


# --- a hostile run folder -------------------------------------------------------------------------

JUNK = [b"", b"null", b"[]", b'{"identity": 3}', b"{" * 100_000, b"\xff\xfe", b"[1", b'"\\ud800"']
NAMES = ("run_state.json", "config.yaml", "best.json", "data_report.json", "results.json")


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk[:12]))
def test_files_of_the_run_that_hold_anything_cost_nothing(
    small, plain, stopped, tmp_path, name, junk
):
    for file in NAMES:
        (small / "runs" / name / file).write_bytes(junk)
    again = run(tmp_path, stopped)
    assert again.process.exitcode == OK, again.said()
    assert_same(small / "runs" / name, plain)


def test_without_run_state_json_other_settings_are_still_refused(small, stopped, tmp_path, name):
    (small / "runs" / name / "run_state.json").unlink()
    refused = run(tmp_path, [*stopped, "optimizer.lr=0.5"])
    assert refused.process.exitcode == BAD_CONFIG
    assert "are of a run with other settings, data or weights" in refused.said()


LINKED = ("metrics.jsonl", "train.log", "run_state.json", "lock", "best", "checkpoints", "x")


@pytest.mark.parametrize("kind", ["link", "FIFO"])
@pytest.mark.parametrize("file", LINKED)
def test_links_and_fifos_are_not_written_through(small, stopped, tmp_path, name, file, kind):
    victim, path = tmp_path / "victim", small / "runs" / name / file
    victim.write_text("precious")
    if path.is_dir():
        shutil.move(path, tmp_path / "moved")
        victim = tmp_path / "moved"
    path.unlink(missing_ok=True)
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    before = contents(tmp_path / "moved") | {Path("v"): (tmp_path / "victim").read_bytes()}
    refused = run(tmp_path, stopped)
    assert refused.process.exitcode == CANNOT_WRITE, refused.said()
    assert f"is a {kind}" in refused.said() and "Traceback" not in refused.said()
    after = contents(tmp_path / "moved") | {Path("v"): (tmp_path / "victim").read_bytes()}
    assert after == before


def test_a_linked_run_folder_and_names_that_leave_runs_are_refused(small, tmp_path, name):
    (small / "runs").mkdir(exist_ok=True)
    (small / "runs" / name).symlink_to(tmp_path)
    refused = run(tmp_path, arguments(small, name))
    assert refused.process.exitcode == CANNOT_WRITE and "is a link" in refused.said()
    for odd in ("../x", "..", ".hidden", "a/b", "/tmp/x", "a\nb", "$(touch x)", "x" * 101, "-x"):
        cfg = tiny.make_config(run__name=odd, run__dir=tmp_path)
        with pytest.raises(Refusal, match="is no directory name") as refusal:
            rundir.open_run(cfg, {})
        assert refusal.value.exit_code == BAD_CONFIG and refusal.value.message.isprintable()
    assert {p.suffix for p in tmp_path.iterdir()} == {".log"}, "nothing was made"


LINES = (
    b'{"event": "resume", "step": "x"}',
    b'{"event": "start", "config": 3, "environment": [], "time": "x"}',
    b'{"event": "step", "step": {}, "time": null}',
    b'{"event": "eval", "time": 1e999}',
    b"[" * 200_000,
    b"1" * 5000,
    b'{"event": "\x1b[2J"}',
    b"\xff\x00\x1b]0;x\x07",
)


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:20]))
def test_a_log_that_holds_anything_costs_nothing(small, plain, stopped, tmp_path, name, line):
    log = small / "runs" / name / "metrics.jsonl"
    log.write_bytes(line + b"\n" + log.read_bytes() + line + b"\n" + line[: len(line) // 2])
    again = run(tmp_path, stopped)
    assert again.process.exitcode == OK, again.said()
    assert "\x1b" not in again.said()
    ours, theirs = tiny.outcome(log.parent), tiny.outcome(plain)
    assert ours["best"] == theirs["best"]
    ours["events"] = [e for e in ours["events"] if isinstance(e.get("step"), int)]
    assert ours["events"] == theirs["events"]


def test_a_line_torn_at_any_byte_is_closed_and_every_other_line_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"event": "step", "step": 1}\n'
    torn = '{"event": "step", "step": 2, "name": "\u00e9\u4e16"}'.encode()
    for size in range(len(torn) + 1):
        path.write_bytes(whole + torn[:size])
        log = runlog.RunLog(path)
        assert log.continues
        log.write("resume", step=1)
        log.write("step", step=2)
        log.close()
        assert [e["step"] for e in runlog.read(path)] == [1, 1, 2], size
        follower = history.Follower(tmp_path)
        follower.poll()
        assert list(follower.history.steps["step"]) == [1, 2]


def test_labels_from_the_data_cannot_steer_the_terminal(small, tmp_path, name):
    evil = "\x1b[2J\u202ejoke"
    for file in ("train", "validation"):
        text = (small / f"{file}.csv").read_text().replace(",1,", f",{evil},")
        (tmp_path / f"{file}.csv").write_text(text)
    changes = {f"data__{f}": tmp_path / f"{f}.csv" for f in ("train", "validation")}
    ended = run(tmp_path, arguments(small, name, **changes))
    assert ended.process.exitcode == OK, ended.said()
    kept = (small / "runs" / name / "train.log").read_text()
    for said in (ended.said(), kept):
        assert "\\x1b[2J\\u202ejoke" in said and "\x1b" not in said and "\u202e" not in said


# --- checkpoint.py --------------------------------------------------------------------------------


def command(capsys, *words: object) -> tuple[int, str]:
    code = checkpoint.main([*map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_checkpoints_are_listed_verified_and_pruned(small, plain, stopped, name, capsys):
    folder = small / "runs" / name
    code, said = command(capsys, folder, "--list")
    assert code == OK
    kept = [f"step-0000000{n}" for n in (2, 3, 4, 6)]
    assert [line.split()[0] for line in said.splitlines()] == kept
    assert "best so far" in said.splitlines()[2] and "MB" in said
    code, said = command(capsys, folder, "--verify")
    assert code == OK and said.count("every byte is as it was written") == 4
    path = folder / "checkpoints" / "step-00000003" / "state.json"
    path.write_text(path.read_text().replace("3", "4"))
    code, said = command(capsys, folder, "--verify")
    assert code == MISSING and "state.json differs from its sha256" in said.splitlines()[1]
    path.parent.rename(path.parent.with_name("damaged-step-00000003"))
    code, said = command(capsys, folder, "--prune", 1)
    assert code == OK
    assert said.split() == ["deleted", "damaged-step-00000003", "deleted", "step-00000002"]
    assert [p.name for p in checkpoint.listed(folder / "checkpoints")] == kept[2:]
    code, said = command(capsys, plain, "--verify")
    assert code == OK and said.splitlines()[-1].startswith("best  ")


def test_pruning_counts_no_damaged_checkpoint_and_finds_the_best_without_its_pointer(
    small, plain, stopped, tmp_path, name, capsys
):
    """Else the only ones that a run could go on from would be deleted."""
    folder = small / "runs" / name
    (folder / "checkpoints" / "step-00000006" / "state.json").unlink()
    (folder / "best.json").unlink()
    code, said = command(capsys, folder, "--prune", 1)
    assert code == OK and "deleted step-00000006" in said
    assert [p.name for p in checkpoint.listed(folder / "checkpoints")] == ["step-00000004"]
    assert_goes_on(small, name, stopped, plain)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--list", "nowhere"], MISSING),
        (["nowhere"], USAGE),
        (["nowhere", "--prune", "0"], USAGE),
        (["nowhere", "--prune", "x"], USAGE),
        (["nowhere", "--list", "--verify"], USAGE),
        (["; $(touch x)", "--list"], MISSING),
    ],
)
def test_checkpoint_py_refuses_what_cannot_be_meant(words, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(capsys, *words)[0] == code
    assert [*tmp_path.iterdir()] == []


def test_a_fault_that_never_strikes_and_other_bytes_are_noticed(small, plain, tmp_path, name):
    """The suite's own control."""
    with pytest.raises(AssertionError, match="the fault never struck"):
        run(tmp_path, arguments(small, name), partial(at, "train:update", KILL, call=99))
    assert run(tmp_path, arguments(small, f"{name}-x", run__seed=1)).process.exitcode == OK
    with pytest.raises(AssertionError):
        assert_same(small / "runs" / f"{name}-x", plain)
