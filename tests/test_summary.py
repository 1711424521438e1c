"""A run is told by whatever files it has; alike are runs whose settings and data are."""

import json
import socket
from pathlib import Path

import pytest
from logs import BASELINES, START, as_lines, evaluation, make_run, step

import config
import summary
from summary import differing, find_runs, read_run

FILES = {"data.validation": "validation.csv", "model.name": "some/model"}
SETTINGS = config.flatten(config.Config()) | FILES


def start(**changes: object) -> dict:
    """A start event with all settings; `run__seed=7` changes one of them."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return START | {"config": SETTINGS | changed}


def make(root: Path, name: str, *events: dict, results: dict | None = None, **changes) -> Path:
    """A run that is completed unless `status` is among the changes; the others are settings."""
    status = changes.pop("status", "completed")
    log = as_lines(start(**changes), *events)
    run = make_run(root, log, name, status=status, host="elsewhere")
    if results is not None:
        (run / "results.json").write_text(json.dumps(results))
    return run


def kind(root: Path, name: str, begun: dict) -> str | None:
    return read_run(make_run(root, as_lines(begun), name)).kind


SAME = {"run.seed": 7, "run.dir": "/x", "log.every": 1, "train.micro_batch_size": 4}
OTHER = {"optimizer.lr": 1e-3, "data.validation": "b.csv", "model.name": "b", "data.limit": 9}


@pytest.mark.parametrize("setting", [*SAME, *OTHER, "of.later"])
def test_alike_are_runs_that_differ_in_nothing_that_alters_a_result(tmp_path, setting):
    value = (SAME | OTHER).get(setting, 1)
    kinds = [kind(tmp_path, "a", start()), kind(tmp_path, "b", start(**{setting: value}))]
    assert (kinds[0] == kinds[1]) == (setting in SAME)


def test_other_validation_texts_are_told_by_counts_labels_and_baselines(tmp_path):
    shared = kind(tmp_path, "a", start(run__seed=1))
    assert shared == kind(tmp_path, "b", start(run__seed=2))
    tfidf = BASELINES | {"tfidf": {"f1_macro": 0.6117}}
    for i, change in enumerate(
        ({"data": {"train": 320, "validation": 51}}, {"labels": ["a", "b"]}, {"baselines": tfidf})
    ):
        assert kind(tmp_path, f"c{i}", start(run__seed=2) | change) != shared
    # Of a sample that the seed draws, TF-IDF's score tells nothing of the data.
    large = {"data": {"train": 10**6, "validation": 50}}
    both = [start() | large, start() | large | {"baselines": tfidf}]
    assert len({kind(tmp_path, f"d{i}", begun) for i, begun in enumerate(both)}) == 1


@pytest.mark.parametrize("drawn", [{"data__validation": None}, {"data__limit": 50}])
def test_a_seed_that_draws_the_validation_texts_is_another_kind(tmp_path, drawn):
    kinds = [kind(tmp_path, f"r{s}", start(run__seed=s, **drawn)) for s in (1, 2)]
    assert kinds[0] != kinds[1]


def test_scores_come_from_results_else_from_the_best_evaluation(tmp_path):
    evals = [evaluation(10, 0.7, best=True, value=0.65), evaluation(20, 0.6, best=False, value=0.6)]
    results = {"validation": {"f1_macro": 0.71}, "test": {"f1_macro": 0.5}, "best_step": 11}
    done = read_run(make(tmp_path, "a", *evals, results=results | {"steps": 33, "seconds": 9.5}))
    told = [done.score("f1_macro"), done.score("f1_macro", "test"), done.best_step, done.steps]
    assert told == [0.71, 0.5, "11", "33/40"] and done.seconds == 9.5
    log = [step(5), *evals, step(15)]
    going = read_run(make(tmp_path, "b", *log, status="running"))
    told = [going.score("f1_macro"), going.score("f1_macro", "test"), going.best_step, going.steps]
    assert told == [0.7, None, "10", "20/40"]
    assert going.score("f1_macro/worst:lang") == 0.65


def test_pauses_are_not_time_taken(tmp_path):
    log = as_lines(start(), step(1), began=1000.0) + as_lines(start(), step(2), began=5000.0)
    assert read_run(make_run(tmp_path, log)).seconds == 4.0


def test_without_a_start_event_the_settings_are_those_of_config_yaml(tmp_path):
    run = make_run(tmp_path, as_lines(step(1)), status="running", host=socket.gethostname())
    assert read_run(run).settings == {} and read_run(run).kind is None
    (run / "config.yaml").write_text("run:\n  seed: 5\n")
    assert read_run(run).seed == "5" and read_run(run).kind


def test_what_differs_is_shown_and_where_a_run_lies_is_not(tmp_path):
    runs = [make(tmp_path, "a"), make(tmp_path, "b", run__dir="x", optimizer__lr=0.5, run__seed=1)]
    runs.append(make_run(tmp_path, b"", "c"))  # of which nothing is known
    assert differing(map(read_run, runs)) == ["run.seed", "optimizer.lr"]


def test_runs_are_found_at_any_depth_by_any_of_their_files(tmp_path):
    for file in ("a/metrics.jsonl", "a/best/config.yaml", "b/c/run_state.json", ".d/config.yaml"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert list(find_runs(tmp_path)) == [tmp_path / "a", tmp_path / "b" / "c"]
    assert list(find_runs(tmp_path / "a")) == [tmp_path / "a"]


@pytest.mark.parametrize("value", [None, 3, "x", [[]], {"a": {}}, True, -1e999, 10**400])
def test_whatever_a_file_holds_a_run_is_told(tmp_path, value):
    names = ("config", "data", "labels", "baselines", "from_scratch", "steps", "environment")
    begun = {"event": "start"} | dict.fromkeys(names, value)
    odd = {"event": "eval", "split": "validation", "best": True} | dict.fromkeys(
        ("step", "f1_macro", "value", "time"), value
    )
    files = dict.fromkeys(("validation", "test", "steps", "seconds", "best_step"), value)
    run = make_run(tmp_path, as_lines(begun, odd, step(3)), status=value)
    (run / "results.json").write_text(json.dumps(files))
    told = read_run(run)
    known = [told.name, told.status, told.seed, told.weights, told.best_step, told.steps]
    known += [told.data, *told.settings.values()]
    assert all(isinstance(word, str) and word.isprintable() for word in known)
    assert told.score("f1_macro") is None or isinstance(told.score("f1_macro"), float)
    assert told.kind is None or isinstance(value, dict)
    assert summary.differing([told]) == []
