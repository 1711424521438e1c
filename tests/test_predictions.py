"""Predictions are read whole and over the run's own labels, or refused by line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import predictions
from errors import BAD_DATA, MISSING, Refusal

LINES = [
    {"row": 2, "label": "no", "predicted": "yes", "probabilities": [0.25, 0.75], "tokens": 5}
    | {"slices": {"lang": "en"}},
    {"row": 1, "label": "yes", "predicted": "yes", "probabilities": [0.0, 1.0], "tokens": 0}
    | {"slices": {"lang": "\u0639"}},
]


def write(run: Path, *lines: object) -> Path:
    """A run with these lines, JSON or text."""
    path = run / "predictions" / "test.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return run


def read(run: Path, labels: tuple[str, ...] = ("no", "yes")) -> predictions.Predictions:
    return predictions.read(run, "test", labels)


def test_what_was_written(tmp_path):
    found = read(write(tmp_path, *LINES))
    assert len(found) == 2 and found.classes == ["no", "yes"]
    assert found.rows.tolist() == [2, 1] and found.tokens.tolist() == [5, 0]
    assert found.labels.tolist() == [0, 1] and found.predicted.tolist() == [1, 1]
    assert (found.probabilities == np.array([[0.25, 0.75], [0, 1]])).all()
    assert found.slices["lang"].tolist() == ["en", "\u0639"]
    swapped = read(tmp_path, ("yes", "no"))
    assert swapped.labels.tolist() == [1, 0]


def test_an_older_run_has_no_tokens(tmp_path):
    old = {k: v for k, v in LINES[0].items() if k != "tokens"}
    assert read(write(tmp_path, old, LINES[1])).tokens is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"row": "2"}, "no prediction of a row"),
        ({"row": True}, "no prediction of a row"),
        ({"label": "maybe"}, "label 'maybe' is none of"),
        ({"predicted": None}, "predicted 'None' is none of"),
        ({"label": "\x1b[31m"}, r"label '\\x1b\[31m' is none of"),
        ({"probabilities": [0.5, 0.4]}, "2 probabilities that add up to 1"),
        ({"probabilities": [1.0]}, "2 probabilities"),
        ({"probabilities": [1.5, -0.5]}, "2 probabilities"),
        ({"probabilities": [float("nan"), 1.0]}, "2 probabilities"),
        ({"probabilities": "ab"}, "2 probabilities"),
    ],
)
def test_a_line_that_cannot_be_is_refused_by_number(tmp_path, changes, reason):
    write(tmp_path, LINES[0], LINES[1] | changes)
    with pytest.raises(Refusal, match=reason) as caught:
        read(tmp_path)
    assert caught.value.exit_code == BAD_DATA
    assert "predictions/test.jsonl: line 2" in caught.value.message


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{"], "line 1 is not JSON"),
        ([LINES[0], json.dumps(LINES[1])[:-9]], "line 2 is not JSON"),
        (["[" * 100_000], "line 1 is not JSON"),
        (["[]"], "line 1 is no prediction"),
        ([], "has no predictions"),
        ([LINES[0], LINES[0]], "has a row twice"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, lines, reason):
    with pytest.raises(Refusal, match=reason) as caught:
        read(write(tmp_path, *lines))
    assert caught.value.exit_code == BAD_DATA


def test_a_file_that_is_not_there(tmp_path):
    for reason in ("no such file", "is a FIFO"):
        with pytest.raises(Refusal, match=reason) as caught:
            read(tmp_path)
        assert caught.value.exit_code == MISSING
        (tmp_path / "predictions").mkdir(exist_ok=True)
        if reason == "no such file":
            os.mkfifo(tmp_path / "predictions" / "test.jsonl")
