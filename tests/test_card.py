"""The model card says what results.json says, and text from data cannot break it."""

import json
import re
from pathlib import Path

import pytest
import tiny
import yaml

import card
from model import Source

HOSTILE = "1|`x`<b>"


@pytest.fixture(scope="module")
def run(tmp_path_factory, small) -> Path:
    """A run on labels and a language that are hostile to Markdown."""
    folder = tmp_path_factory.mktemp("card")
    names = {"0": "plain", "1": HOSTILE}
    for name, n, seed in (("train", 60, 1), ("validation", 30, 2), ("test", 40, 3)):
        records = tiny.rows(n, seed=seed, positives=0.5)
        records = [r | {"label": names[r["label"]]} for r in records]
        records = [r | {"lang": {"a": "en", "b": "no"}[r["lang"]]} for r in records]
        tiny.write_csv(folder / f"{name}.csv", records)
    changes = {"data__test": folder / "test.csv", "data__leaks": "keep", "run__name": "card"}
    changes |= {"model__name": small / "model", "data__positive_label": HOSTILE}
    assert tiny.run(tiny.settings(folder, **changes)) == 0
    return folder / "runs" / "card"


def test_its_scores_are_those_of_the_results_with_their_intervals(run):
    text = (run / "best" / "README.md").read_text()
    final = json.loads((run / "results.json").read_text())
    for split in ("validation", "test"):
        low, high = final[split]["intervals"]["f1_macro"]
        cell = f"{final[split]['f1_macro']:.3f} [{low:.3f}, {high:.3f}]"
        assert re.search(rf"\| \*\*{split}\*\* \| {re.escape(cell)} \|", text)
        decided = final[split]["decided"]
        last = f"{decided['accuracy']:.3f} | {decided['calibration_error']:.3f} |"
        assert re.search(rf"\| {split}, .*temperature .* \| {re.escape(last)}", text)
    assert "| `run.deterministic` | true |" in text
    for value, scores in final["test"]["slices"]["lang"].items():
        low, high = scores["intervals"]["f1_macro"]
        cells = (
            f"| {value} | {scores['examples']} | {scores['f1_macro']:.3f} [{low:.3f}, {high:.3f}]"
        )
        assert cells in text


def test_a_hub_reads_its_front_matter(run):
    text = (run / "best" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["language"] == ["en", "no"], "no is a language, not false"
    assert front["pipeline_tag"] == "text-classification" and "base_model" not in front


def test_nothing_of_this_machine_is_in_it(run):
    text = (run / "best" / "README.md").read_text()
    assert str(run.parent.parent) not in text and "card/train.csv" not in text


def test_text_from_data_is_text(run):
    text = (run / "best" / "README.md").read_text()
    assert HOSTILE not in text and card.safe(HOSTILE) in text
    tables = [block for block in text.split("\n\n") if block.lstrip().startswith("|")]
    for block in (line for b in tables for line in [b.strip().splitlines()]):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
        assert len(cells) == 1, "every row of a table has as many cells"


def test_control_a_cell_that_is_not_escaped_breaks_the_table():
    line = f"| {HOSTILE} | 1 |"
    assert len(re.findall(r"(?<!\\)\|", line)) == 4
    assert len(re.findall(r"(?<!\\)\|", f"| {card.safe(HOSTILE)} | 1 |")) == 3


@pytest.mark.parametrize(
    "name, folder, expected",
    [
        ("owner/some-model", "cache/snapshots/0a1b", "owner/some-model"),
        ("xlm-roberta-base", "cache/snapshots/0a1b", "xlm-roberta-base"),
        ("/models/mine", "/models/mine", "mine"),
        ("runs/first/best", "runs/first/best", "first"),
    ],
)
def test_where_the_weights_came_from_is_told(name, folder, expected, tmp_path):
    (tmp_path / folder.lstrip("/")).mkdir(parents=True)
    source = Source(name, tmp_path / folder.lstrip("/"))
    assert card._origin(source) == f"fine-tuned from {card.safe(expected)}"


def test_a_model_from_scratch_says_so(tmp_path, small):
    changes = {"model__name": "scratch", "train__max_steps": 2, "run__name": "scratch"}
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_bytes((small / f"{name}.csv").read_bytes())
    assert tiny.run(tiny.settings(tmp_path, **changes)) == 0
    text = (tmp_path / "runs" / "scratch" / "best" / "README.md").read_text()
    assert "trained from scratch" in text and "base_model" not in text


def test_findings_name_no_folder_so_that_others_may_share_the_cache(tmp_path, small):
    train = (small / "train.csv").read_text().splitlines(keepends=True)
    validation = (small / "validation.csv").read_text().splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join([*train, validation[1]]))  # a leak
    (tmp_path / "validation.csv").write_text("".join(validation))
    changes = {"model__name": small / "model", "train__max_steps": 2, "run__name": "leak"}
    assert tiny.run(tiny.settings(tmp_path, **changes)) == 0
    text = (tmp_path / "runs" / "leak" / "best" / "README.md").read_text()
    assert "- train: 1 rows" in text and str(tmp_path) not in text
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train.csv", "validation.csv"):
        (tmp_path / name).rename(other / name)
    again = tiny.settings(other, **changes | {"data__cache_dir": tmp_path / "cache"})
    assert tiny.run(again) == 0
    told = json.loads((other / "runs" / "leak" / "data_report.json").read_text())
    assert [told[name]["file"] for name in ("train", "validation")] == [
        str(other / "train.csv"),
        str(other / "validation.csv"),
    ]
    assert any("1 rows" in f["message"] for f in told["findings"]), "control: from the cache"
