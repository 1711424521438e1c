"""Same seed, same bytes: whatever is logged or saved, and however often a run is interrupted."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from transformers import pipeline

import batches
import checkpoint
import evidence
import prepare
import progress
import results
import runlog
import train
from ddp import process_group
from errors import CANNOT_WRITE, Refusal
from summary import read_run

PROGRAM = Path(train.__file__).resolve()


def weights(folder: Path) -> bytes:
    """The model after the last step."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return (last / "model.safetensors").read_bytes()


def arguments(folder: Path, name: str, **changes: object) -> list[str]:
    changes = {"run__name": name, "checkpoint__keep": "all", "evaluation__patience": ""} | changes
    return tiny.settings(folder, **changes)


@pytest.fixture(scope="module")
def plain(small) -> Path:
    """An undisturbed run: 5 steps an epoch, 10 in all."""
    assert tiny.run(arguments(small, "plain")) == 0
    return small / "runs" / "plain"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"log__every": 3, "checkpoint__every": 2},
        {"data__workers": 2},
        {"log__hardware_s": 0.05},
    ],
)
def test_what_does_not_alter_the_result_does_not(small, plain, changes, request):
    name = "same-" + str(abs(hash(request.node.name)))
    assert tiny.run(arguments(small, name, **changes)) == 0
    ours, theirs = tiny.outcome(small / "runs" / name), tiny.outcome(plain)
    if "log__every" in changes:
        steps = {e["step"] for e in ours["events"] if e["event"] == "step"}
        theirs["events"] = [
            e for e in theirs["events"] if e["event"] == "eval" or e["step"] in steps
        ]
    assert ours == theirs


def test_hash_seed_and_working_directory_do_not_alter_the_result(small, plain, tmp_path):
    command = [sys.executable, PROGRAM, "--config", os.devnull, *arguments(small, "elsewhere")]
    environment = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert tiny.outcome(small / "runs" / "elsewhere") == tiny.outcome(plain)


def test_control_another_seed_gives_other_bytes(small, plain):
    assert tiny.run(arguments(small, "other", run__seed=43)) == 0
    assert weights(small / "runs" / "other") != weights(plain)


def test_the_evaluation_interval_does_not_alter_the_weights(small, plain):
    assert tiny.run(arguments(small, "often", evaluation__every=1)) == 0
    assert weights(small / "runs" / "often") == weights(plain)


def test_best_has_the_bytes_of_the_step_that_the_log_names(small):
    assert tiny.run(arguments(small, "named", evaluation__every=1, checkpoint__every=1)) == 0
    folder = small / "runs" / "named"
    events = runlog.read(folder / "metrics.jsonl")
    scores = {e["step"]: e["f1_macro"] for e in events if e["event"] == "eval"}
    named = events[-1]["best_step"]
    assert named == max(scores, key=lambda step: (scores[step], -step)), "ties go to the earlier"
    from safetensors.torch import load_file

    best = load_file(folder / "best" / "model.safetensors")  # with the whole table of embeddings
    table = "roberta.embeddings.word_embeddings"
    same = [
        step
        for step in scores
        if all(
            name.startswith(table) or torch.equal(best[name], tensor)
            for name, tensor in load_file(
                folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
            ).items()
        )
    ]
    assert same == [named]


INTERRUPTED = [(1,), (4,), (5,), (7,), (1, 2, 3, 8, 9)]


@pytest.mark.parametrize("stops", INTERRUPTED, ids=str)
def test_stopped_and_resumed_gives_the_same_bytes(small, plain, stops):
    name = "stopped-" + "-".join(map(str, stops))
    for _ in stops:
        assert tiny.run(arguments(small, name), *stops) == 75
        stops = stops[1:]
    assert tiny.run(arguments(small, name)) == 0
    assert tiny.outcome(small / "runs" / name) == tiny.outcome(plain)
    kept = (small / "runs" / name / "train.log").read_text()
    assert "run the same command to go on" in kept and "Traceback" not in kept
    assert kept.count("  positive label '1'\n") == len(
        re.findall("^run .*(?:new|going on)", kept, re.M)
    )


def test_what_never_goes_on_is_told_how_it_would(small, capfd):
    given = [*arguments(small, "never"), "run.resume=never"]
    assert tiny.run(given, 1) == tiny.run(given, 2) == 75
    told = "run the same command with run.resume=auto run.name=never-2 to go on"
    assert told in capfd.readouterr().err + (small / "runs" / "never-2" / "train.log").read_text()
    assert tiny.run([*given, "run.resume=auto", "run.name=never-2"]) == 0
    kept = (small / "runs" / "never-2" / "train.log").read_text()
    assert "(going on)" in kept


@pytest.mark.parametrize("saving", [name for name in tiny.SAVINGS if name != "all"])
def test_stopped_and_resumed_with_each_saving_alone(small, saving):
    names = [f"{saving}-whole".replace(" ", "-"), f"{saving}-stopped".replace(" ", "-")]
    for name, stops in zip(names, ([], [4]), strict=True):
        for stop in [*stops, 0]:
            assert tiny.run(arguments(small, name, **tiny.SAVINGS[saving]), stop) == 75 * bool(stop)
    assert tiny.outcome(small / "runs" / names[0]) == tiny.outcome(small / "runs" / names[1])


def test_bf16_stopped_and_resumed_gives_the_same_bytes(small):
    for name, stops in (("bf16", []), ("bf16-stopped", [3])):
        for stop in [*stops, 0]:
            changes = {"train__precision": "bf16", "log__every": 2}
            assert tiny.run(arguments(small, name, **changes), stop) == (75 if stop else 0)
    assert tiny.outcome(small / "runs" / "bf16-stopped") == tiny.outcome(small / "runs" / "bf16")


def test_a_resume_keeps_the_cut_that_was_fitted(small, monkeypatch):
    for name, stops in (("fitted", [0]), ("fitted-stopped", [4, 0])):
        for number, stop in enumerate(stops):
            monkeypatch.setitem(prepare.AUTO_TOKENS, "cpu", 8192 if number else 64)
            tiny.run(arguments(small, name), stop)
    assert tiny.outcome(small / "runs" / "fitted-stopped") == tiny.outcome(
        small / "runs" / "fitted"
    )
    assert tiny.run(arguments(small, "uncut")) == 0
    uncut = weights(small / "runs" / "uncut")
    assert uncut != weights(small / "runs" / "fitted"), "control: another cut, other masks"


def test_control_dropout_seeded_once_a_process_does_not_survive_a_stop(small, plain, monkeypatch):
    monkeypatch.setattr(train, "dropout_seed", lambda seed, step, rank, micro: seed)
    seeded = []

    def once(seed: int) -> None:
        if not seeded:
            torch.random.default_generator.manual_seed(seed)
        seeded.append(seed)

    monkeypatch.setattr(train.torch, "manual_seed", once)
    assert tiny.run(arguments(small, "once")) == 0
    for stop in ([3], []):
        seeded.clear()
        tiny.run(arguments(small, "once-stopped"), *stop)
    assert weights(small / "runs" / "once-stopped") != weights(small / "runs" / "once")


@pytest.mark.dist
def test_two_processes_stopped_and_resumed_give_the_same_bytes(small):
    undisturbed = arguments(small, "two", evaluation__every=2)
    stopped = arguments(small, "two-stopped", evaluation__every=2)
    assert tiny.run_ranks(2, tiny.run, undisturbed) == [0, 0]
    for stop in (1, 6):
        assert tiny.run_ranks(2, tiny.run, stopped, stop) == [75, 75]
    assert tiny.run_ranks(2, tiny.run, stopped) == [0, 0]
    runs = small / "runs"
    assert tiny.outcome(runs / "two-stopped") == tiny.outcome(runs / "two")


@pytest.mark.dist
def test_every_rank_tells_how_a_run_that_never_goes_on_would(small):
    """The script shows what the first rank to end says."""
    given = [*arguments(small, "never-two"), "run.resume=never"]
    told = tiny.run_ranks(2, told_at_the_end, given, 1)
    assert told[0] == told[1] and len(told[0]) == 1
    assert told[0][0].endswith(" with run.resume=auto run.name=never-two to go on")


def told_at_the_end(given: list[str], stop: int) -> list[str]:
    """What a rank says when it is stopped."""
    told, end = [], train.end

    def noted(error, console) -> int:
        told.append(error.message)
        return end(error, console)

    train.end = noted
    tiny.run(given, stop)
    return told


def test_patience_and_best_score_survive_a_stop(small):
    changes = {"evaluation__every": 1, "evaluation__patience": 2, "optimizer__lr": 1e-9}
    assert tiny.run(arguments(small, "patient", **changes)) == 0
    whole = small / "runs" / "patient"
    ended = runlog.read(whole / "metrics.jsonl")[-1]
    assert ended["best_step"] == 1 and ended["results"]["steps"] == 3, "nothing is learnt at 1e-9"
    assert tiny.run(arguments(small, "patient-stopped", **changes), 2) == 75
    assert tiny.run(arguments(small, "patient-stopped", **changes)) == 0
    assert tiny.outcome(small / "runs" / "patient-stopped") == tiny.outcome(whole)


def test_the_same_command_again_says_that_the_run_is_finished(small, plain, capsys):
    before = {p: p.stat().st_mtime_ns for p in plain.rglob("*")}
    assert tiny.run(arguments(small, "plain")) == 0
    assert "is finished: validation macro-F1" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in plain.rglob("*")} == before


def test_a_finished_run_keeps_only_the_best(small):
    assert tiny.run(arguments(small, "kept", checkpoint__keep=1)) == 0
    folder = small / "runs" / "kept"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *("config.yaml", "metrics.jsonl", "train.log", "run_state.json", "results.json"),
        *("data_report.json", "predictions", "best", "lock"),
    }
    assert json.loads((folder / "run_state.json").read_text())["status"] == "completed"


def test_a_run_begun_with_other_settings_is_refused_with_the_difference(small, plain, capsys):
    assert tiny.run(arguments(small, "plain", optimizer__lr=5e-4)) == 78
    assert "optimizer.lr=0.001, not 0.0005" in capsys.readouterr().err
    assert tiny.run(arguments(small, "plain", log__every=7)) == 0, "control: harmless changes pass"


def test_a_model_overfits_sixteen_texts_and_the_pipeline_gives_its_logits(tmp_path, small):
    records = tiny.rows(16, seed=5, positives=0.5)
    tiny.write_csv(tmp_path / "train.csv", records)
    shutil.copytree(small / "model-without-dropout", tmp_path / "model")
    changes = {"train__epochs": 40, "optimizer__lr": 3e-3, "data__leaks": "keep"}
    changes |= {"data__validation": tmp_path / "train.csv", "run__name": "fit"}
    assert tiny.run(tiny.settings(tmp_path, evaluation__patience="", **changes)) == 0
    folder = tmp_path / "runs" / "fit"
    assert json.loads((folder / "results.json").read_text())["validation"]["f1_macro"] == 1.0
    classify = pipeline("text-classification", str(folder / "best"), top_k=None)
    lines = (folder / "predictions" / "validation.jsonl").read_text().splitlines()
    for record, line in zip(records, lines, strict=True):
        scores = {s["label"]: s["score"] for s in classify([record["text"]])[0]}
        ours = json.loads(line)
        assert ours["predicted"] == max(scores, key=scores.get) == record["label"]
        assert [scores["0"], scores["1"]] == pytest.approx(ours["probabilities"], abs=1e-5)


@pytest.mark.dist
def test_evaluation_counts_every_text_once_for_any_number_of_ranks(small):
    one = logits(small, 256)
    for size in (2, 4):
        for theirs in tiny.run_ranks(size, logits, small, 4):
            for name, array in theirs.items():
                assert np.abs(array - one[name]).max() < 1e-5, name
                assert len(array) == len(one[name])


def logits(folder: Path, texts: int) -> dict[str, np.ndarray]:
    """Logits in batches of so many texts, with each saving; and of fewer texts than ranks."""
    found = {}
    with mock.patch.object(batches, "EVAL_TEXTS", texts), process_group("cpu") as world:
        for name, speed in tiny.SAVINGS.items():
            job = tiny.make_job(tiny.settings(folder, **speed), world)
            found[name] = train.evaluate(job, job.corpus.train, world)
        few = tiny.make_job(tiny.settings(folder, data__limit=3, data__leaks="keep"), world)
        found["few"] = train.evaluate(few, few.corpus.validation, world)
    return found


def test_training_goes_on_while_a_checkpoint_is_written(small, plain, monkeypatch):
    """Each writing waits until the next step is done: in step with training it would never end."""
    monkeypatch.setattr(progress, "writes_in_background", lambda device: True)
    updated, waited = threading.Event(), []
    tensors, save, update = checkpoint.tensors, checkpoint.save, train.update

    def copied(*arguments, **options):
        updated.clear()
        return tensors(*arguments, **options)

    def slow(root, files, state):
        if state["step"] < 10:  # no step follows the last one
            waited.append(updated.wait(timeout=20))
        return save(root, files, state)

    def step(*arguments):
        result = update(*arguments)
        updated.set()
        return result

    monkeypatch.setattr(checkpoint, "tensors", copied)
    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(train, "update", step)
    assert tiny.run(arguments(small, "behind", checkpoint__every=4)) == 0
    assert waited and all(waited)
    assert tiny.outcome(small / "runs" / "behind") == tiny.outcome(plain)
    # What was written after step 6 is the state of step 5, not what training made of it.
    assert weights_at(small / "runs" / "behind", 5) == weights_at(plain, 5)


def weights_at(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()


def test_a_checkpoint_that_cannot_be_written_in_the_background_ends_with_73(small, monkeypatch):
    monkeypatch.setattr(progress, "writes_in_background", lambda device: True)

    def full(root, files, state):
        raise Refusal(CANNOT_WRITE, f"{root}: cannot be written: No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    assert tiny.run(arguments(small, "full")) == 73
    assert "No space left" in (small / "runs" / "full" / "train.log").read_text()


def logits_after_a_broadcast(folder) -> tuple[np.ndarray, np.ndarray]:
    """Logits before and after rank 0 has changed its weights and given them to all ranks."""
    some_for_each = mock.patch.object(batches, "EVAL_TEXTS", 4)
    with some_for_each, process_group("cpu") as world:
        job = tiny.make_job(tiny.settings(folder, train__precision="bf16"), world)
        before = train.evaluate(job, job.corpus.train, world)
        if world.is_main:
            with torch.no_grad():
                for tensor in checkpoint.model_tensors(job.model).values():
                    tensor.mul_(1.5)
        for tensor in checkpoint.model_tensors(job.model).values():
            world.broadcast(tensor)
        return before, train.evaluate(job, job.corpus.train, world)


@pytest.mark.dist
def test_weights_that_are_broadcast_are_cast_anew_on_every_rank(small):
    before, alone = logits_after_a_broadcast(small)
    for _, after in tiny.run_ranks(2, logits_after_a_broadcast, small):
        assert np.abs(after - alone).max() < 1e-2 < np.abs(before - alone).max()


def test_weights_that_change_while_a_run_goes_on_are_refused_at_its_end(small, monkeypatch, capsys):
    keys = iter(["one", "another"])
    monkeypatch.setattr(results, "weights_key", lambda source: next(keys))
    assert tiny.run(arguments(small, "moved")) == 66
    assert "has other weights than when the run began" in capsys.readouterr().err
    keys = iter(["one", "one"])
    assert tiny.run(arguments(small, "moved")) == 0


def test_a_resume_with_another_padding_or_cut_is_said(small, capsys):
    before = {"speed__padding": "batch", "train__micro_batch_tokens": 64, "log__every": 2}
    assert tiny.run(arguments(small, "padded", **before), 3) == 75
    assert tiny.run(arguments(small, "padded", train__micro_batch_tokens=128)) == 0
    said = capsys.readouterr().err.splitlines()
    otherwise = next(line for line in said if "so the bytes may differ" in line)
    assert (
        "speed.padding batch -> free" in otherwise and "micro_batch_tokens 64 -> 128" in otherwise
    )
    same = next(line for line in said if "same result" in line)
    assert "log.every 2 -> 1" in same and "micro_batch" not in same
    refused = arguments(small, "padded", speed__active_vocabulary="false", run__name="padded")
    assert tiny.run(refused) == 78


def test_stopping_early_does_not_go_round_the_count_of_skipped_steps(small, monkeypatch, capsys):
    few = {"log__every": 100, "evaluation__every": 1, "evaluation__patience": 1}
    command = arguments(small, "skipped", train__max_nonfinite=0, **few)
    assert tiny.run([*command, "run.name=control"]) == 0
    loss = train.step_loss
    monkeypatch.setattr(train, "step_loss", lambda *given: loss(*given) * float("nan"))
    assert tiny.run(command) == 76
    assert "steps had a gradient that is not finite" in capsys.readouterr().err


def test_a_model_whose_logits_are_not_finite_is_no_finished_run(small, monkeypatch, capsys):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *given: evaluate(*given) * float("nan"))
    assert tiny.run(arguments(small, "nan")) == 76
    assert "logits on validation are not finite" in capsys.readouterr().err
    assert not (small / "runs" / "nan" / "results.json").exists()


def test_runs_on_other_texts_with_the_same_labels_are_not_compared(small, plain, tmp_path):
    with open(small / "validation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    told = []
    for name, more in (("same", ""), ("other", " indeed")):
        path = tiny.write_csv(
            tmp_path / f"{name}.csv", [r | {"text": r["text"] + more} for r in rows]
        )
        assert tiny.run(arguments(small, f"{name}-texts", data__validation=path)) == 0
        runs = dict(
            zip("AB", map(read_run, (plain, small / "runs" / f"{name}-texts")), strict=True)
        )
        told.append(evidence.paired_tests(runs, evidence.read(runs, "validation"))[1])
    assert "no paired test" not in told[0] and "validation texts differ" in told[1]


def test_a_slice_column_that_the_files_lack_is_refused_once_they_are_read(small, capsys):
    metric = {"evaluation__metric": "f1_macro/worst:language"}
    assert tiny.run(arguments(small, "lacks", **metric)) == 78
    assert "'language' is not among data.slice_columns (lang)" in capsys.readouterr().err


def test_the_deciding_value_is_logged_of_evaluations_and_baselines(small):
    assert tiny.run(arguments(small, "worst", evaluation__metric="f1_macro/worst:lang")) == 0
    events = runlog.read(small / "runs" / "worst" / "metrics.jsonl")
    start = next(e for e in events if e["event"] == "start")
    scored = [e for e in events if e["event"] == "eval"] + list(start["baselines"].values())
    assert len(scored) > 3
    for scores in scored:
        by_language = [s["f1_macro"] for s in scores["slices"]["lang"].values()]
        assert scores["value"] == min(f1 for f1 in by_language if f1 is not None)
