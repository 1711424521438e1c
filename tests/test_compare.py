"""Runs are ranked by validation alone, seeds are one row, and no folder breaks the list."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from logs import as_lines, contents, evaluation, make_run, step
from test_evidence import finished
from test_history import JUNK, LONG
from test_summary import make

import compare
import metrics
from errors import Refusal
from history import LOG


def scored(root: Path, name: str, value: float, test: float = 0.5, **settings: object) -> Path:
    """A completed run with these macro-F1."""
    scores = {"validation": {"f1_macro": value, "loss": value}, "test": {"f1_macro": test}}
    return make(root, name, results=scores | {"best_step": 10, "steps": 40}, **settings)


def place(lines: list[str], *names: str) -> list[int]:
    """The line of each name."""
    return [next(i for i, line in enumerate(lines) if name in line) for name in names]


def test_the_best_by_validation_is_first_whatever_the_test_says(tmp_path):
    for name, value, test in (("low", 0.6, 0.9), ("high", 0.8, 0.1), ("mid", 0.7, 0.95)):
        scored(tmp_path, name, value, test, optimizer__lr=value)
    make(tmp_path, "none", optimizer__lr=0.9)
    lines = compare.list_runs(tmp_path, None)
    assert place(lines, "high", "mid", "low", "none") == sorted(
        place(lines, "high", "mid", "low", "none")
    )
    row = lines[place(lines, "high")[0] - 1].split()
    assert row == ["0.8000", "1", "0.1000", "10", "40/40", "0", "scratch", "completed"]
    assert lines[place(lines, "high")[0] + 1].strip() == "optimizer.lr=0.8"


@pytest.mark.parametrize("metric", ["loss", "calibration_error", "f1_macro"])
def test_the_shared_metric_ranks_and_a_loss_is_better_low(tmp_path, metric):
    for name, value in (("a", 0.6), ("b", 0.8)):
        scores = {"validation": {metric: value}}
        make(tmp_path, name, results=scores, evaluation__metric=metric, optimizer__lr=value)
    lines = compare.list_runs(tmp_path, None)
    a, b = place(lines, "    a", "    b")
    assert (a < b) == (metric in metrics.LOWER_IS_BETTER)
    assert f"validation {metric}" in lines[0]
    assert set(compare.LOWER_IS_BETTER) == set(metrics.LOWER_IS_BETTER)


def test_where_the_metrics_differ_macro_f1_ranks(tmp_path):
    scored(tmp_path, "a", 0.6, evaluation__metric="loss")
    scored(tmp_path, "b", 0.8, evaluation__metric="accuracy")
    lines = compare.list_runs(tmp_path, None)
    assert "f1_macro at the best step, as their evaluation.metric differs" in lines[0]
    assert place(lines, "    b", "    a") == sorted(place(lines, "    b", "    a"))
    assert sum("evaluation.metric=" in line for line in lines) == 2


def test_a_metric_over_slices_is_read_from_the_log(tmp_path):
    for name, value in (("a", 0.2), ("b", 0.3)):
        event = evaluation(10, 0.9, best=True, value=value)
        metric = {"evaluation__metric": "f1_macro/worst:lang", "optimizer__lr": value}
        make(tmp_path, name, event, results={"validation": {"f1_macro": 0.9}}, **metric)
    lines = compare.list_runs(tmp_path, None)
    assert [line.split()[0] for line in lines if "completed" in line] == ["0.3000", "0.2000"]


def test_seeds_are_one_row_with_mean_and_spread(tmp_path):
    for seed, value in ((1, 0.5), (2, 0.6), (10, 0.7)):
        scored(tmp_path, f"s{seed}", value, value / 2, run__seed=seed, log__every=seed)
    scored(tmp_path, "other", 0.65, train__epochs=1)
    lines = compare.list_runs(tmp_path, None)
    row = lines[place(lines, "seed 1 ")[0] - 1].split()
    assert row[:4] == ["0.6000", "0.1000", "3", "0.3000"]
    assert place(lines, "seed 1 ", "seed 2 ", "seed 10") == [7, 8, 9]  # below the better one
    assert lines[7].split() == ["seed", "1", "0.5000", "test", "0.2500", "best", "10", "s1"]


def test_seeds_count_once_they_are_completed_and_a_repetition_does_not(tmp_path):
    scored(tmp_path, "a", 0.5, run__seed=1)
    scored(tmp_path, "b", 0.69, run__seed=2)
    scored(tmp_path, "c", 0.71, run__seed=2)
    make(tmp_path, "d", evaluation(10, 0.1, best=True), run__seed=3, status="failed")
    lines = compare.list_runs(tmp_path, None)
    row = next(line for line in lines if "of 3" in line)
    assert row.split()[:5] == ["0.6000", "0.1414", "2", "of", "3"]
    assert row.endswith("mixed") and "0.1000  test    n/a  best 10  failed" in lines[-1]


def test_a_folder_of_anything_is_listed(tmp_path):
    scored(tmp_path, "good", 0.8)
    make_run(tmp_path, JUNK + LONG.encode(), "junk \x1b[31m\u202e \n name")
    make_run(tmp_path, b"", "empty")
    make_run(
        tmp_path, as_lines(step(5), {"event": "start", "config": {"=\x1b[2J": "\x9b" * 500}}), "x"
    )
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"status": 9e999, "steps": [' + "9" * 6000)):
        (tmp_path / "broken" / name).mkdir(parents=True)
        for file in ("run_state.json", "results.json", "config.yaml"):
            (tmp_path / "broken" / name / file).write_text(text)
    os.mkfifo(tmp_path / "broken" / "a" / LOG)
    (tmp_path / "broken" / "b" / LOG).mkdir()
    for width in (None, 80, 20, 1):
        lines = compare.list_runs(tmp_path, width)
        assert all(c.isprintable() for line in lines for c in line)
        assert width is None or max(map(len, lines)) <= width
    assert sum("n/a" in line for line in compare.list_runs(tmp_path, None)) >= 6
    first = next(line for line in compare.list_runs(tmp_path, None) if "completed" in line)
    assert first.split()[0] == "0.8000"


def test_a_folder_without_runs_is_66(tmp_path):
    with pytest.raises(Refusal, match="there is no run below it") as caught:
        compare.list_runs(tmp_path, 80)
    assert caught.value.exit_code == 66


def test_the_list_needs_neither_torch_nor_numpy_and_writes_nothing(tmp_path):
    scored(tmp_path, "a", 0.5)
    before = contents(tmp_path)
    code = (
        "import sys; sys.modules['numpy'] = sys.modules['torch'] = None; import compare, pathlib\n"
    )
    code += f"print(*compare.list_runs(pathlib.Path({str(tmp_path)!r}), 80))"
    root = Path(compare.__file__).parent
    shown = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root)
    assert "0.5000" in shown and contents(tmp_path) == before


# --- a few runs -----------------------------------------------------------------------------------


def test_settings_scores_cost_and_the_paired_test_are_side_by_side(tmp_path):
    runs = [finished(tmp_path, "a", 0), finished(tmp_path, "b", 1, recall=0.95, optimizer__lr=0.5)]
    lines = compare.compare_runs(runs, 80)
    cells = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert cells["optimizer.lr"] == ["2e-05", "0.5"] and cells["weights"] == ["scratch"] * 2
    assert sum(line.startswith("f1_macro") for line in lines) == 2  # validation and test
    told = [line.split() for line in lines if line.startswith("B - A")]
    assert [words[3] for words in told] == ["f1_macro", "f1_positive"]
    assert all(float(words[4]) > 0 and float(words[-1]) < 0.05 for words in told)


def test_another_metric_or_origin_is_visible(tmp_path):
    runs = [finished(tmp_path, "a", 0), finished(tmp_path, "b", 1, evaluation__metric="loss")]
    log = (runs[1] / LOG).read_text().replace('"from_scratch": true', '"from_scratch": false')
    (runs[1] / LOG).write_text(log)
    cells = {line.split()[0]: line.split()[1:] for line in compare.compare_runs(runs, 80) if line}
    assert cells["weights"] == ["scratch", "pretrained"]
    assert cells["evaluation.metric"] == ["f1_macro", "loss"]


def test_pace_is_the_median_and_memory_the_peak(tmp_path):
    def paced(name: str, *rates: float) -> Path:
        events = [step(i, tokens_per_s=r, peak_memory_gib=i) for i, r in enumerate(rates)]
        return make(tmp_path, name, *events)

    lines = compare.compare_runs([paced("a", 1, 1000, 1002), paced("b", 5)], None)
    cells = {line.split()[0]: line.split()[-2:] for line in lines if line}
    assert cells["tokens/s"] == ["1,000", "5"] and cells["peak"] == ["2.0", "0.0"]


@pytest.mark.parametrize("width", [None, 80, 40, 10])
def test_many_runs_with_hostile_names_fit_any_width(tmp_path, width):
    runs = [finished(tmp_path, f"\x1b[31m\u202e{i}" + "x" * 90, i) for i in range(5)]
    runs.append(make_run(tmp_path, JUNK + LONG.encode(), "junk"))
    lines = compare.compare_runs(runs, width)
    assert all(c.isprintable() for line in lines for c in line)
    assert width is None or max(map(len, lines)) <= width
    if width == 80:
        heads = [line.split()[1:] for line in lines if line.startswith("validation  ")]
        assert heads == [["A", "B", "C"], ["D", "E", "F"]]


def test_too_few_or_missing_runs_are_refused_by_name(tmp_path):
    run = finished(tmp_path, "a", 0)
    (tmp_path / "bare").mkdir()
    for runs, code, told in (
        ([run], 64, "expected 2 to 26 runs, found 1"),
        ([run] * 27, 64, "found 27"),
        ([run, run.parent / "." / "a"], 64, "a is named twice"),
        ([run, tmp_path / "nowhere"], 66, "nowhere: there is no such folder"),
        ([run, tmp_path / "bare"], 66, "bare: there is no metrics.jsonl in it"),
    ):
        with pytest.raises(Refusal) as caught:
            compare.compare_runs(runs, 80)
        assert caught.value.exit_code == code and caught.value.message.endswith(told)


def test_comparing_needs_no_torch_and_writes_nothing(tmp_path):
    runs = [finished(tmp_path, name, i) for i, name in enumerate("ab")]
    before = contents(tmp_path)
    code = "import sys; sys.modules['torch'] = sys.modules['sklearn'] = None\n"
    code += "import compare; from pathlib import Path\n"
    code += f"print(*compare.compare_runs([Path(p) for p in {[str(r) for r in runs]}], 80))"
    root = Path(compare.__file__).parent
    shown = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root)
    assert "B - A" in shown and contents(tmp_path) == before
