"""A run in sentences: everything is said, no bar or column is drawn, nothing raw comes through."""

import math
import re

import pytest
from logs import EVENTS, NOW, START, as_lines, evaluation, make_run, read, step
from test_screen import GPU, MACHINE, VALUES, hardware

import words
from view import View

DRAWN = set("\u2581\u2588|\u2502\u2500#=*_") | {"  "}


def tell(tmp_path, *events: dict, live: dict | None = None, **state: object) -> list[str]:
    run = make_run(tmp_path, as_lines(*(events or EVENTS)), **state)
    return words.tell(View(run, read(run), NOW, live))


def test_everything_is_said_in_words(tmp_path):
    lines = tell(tmp_path, *EVENTS, hardware(1))
    text = "\n".join(lines)
    for part in (
        *("Run some", "Status: running on", "some/model, trained from scratch", "train 320"),
        *("Step 20 of 40 (50%)", "Loss 0.5,", "learning rate", "gradient norm 1", "1,000 tokens/s"),
        *("waiting for data 1% of the time", "Last, step 20: f1_macro 0.7123", "0.4118", "0.6116"),
        *("Best, step 10: f1_macro 0.7321", "no 70%, yes 30%", "GPU GPU-0000-5678, NVIDIA H100"),
        *("97 % busy", "CPU 93 %", "No alarms."),
    ):
        assert part in text, part
    said = re.sub(r"[a-z0-9]_[a-z]", "", text)  # names of scores
    assert not [mark for mark in DRAWN if mark in said]


def test_alarms_are_said_with_evidence_and_advice(tmp_path):
    lines = tell(tmp_path, *EVENTS, step(25, lr=0.5))
    (alarm,) = [line for line in lines if line.startswith("ALARM")]
    assert "off its schedule" in alarm and "0.5 at step 25" in alarm and "Try:" in alarm


def test_reasons_of_what_is_not_known_are_said(tmp_path):
    gpu = {"uuid": "GPU-2"} | GPU | {"power_w": None, "unavailable": {"power_w": "Not Supported"}}
    assert "n/a W (n/a power_w: Not Supported)" in "\n".join(
        tell(tmp_path, *EVENTS, live=MACHINE | {"gpus": [gpu]})
    )
    assert "No GPU: why not" in tell(tmp_path / "b", live=MACHINE | {"no_gpu": "why not"})
    assert "no evaluation yet" in "\n".join(tell(tmp_path / "c", START))


def test_a_metric_of_a_slice_is_said_by_its_value(tmp_path):
    start = START | {"config": START["config"] | {"evaluation.metric": "f1_macro/worst:lang"}}
    lines = tell(tmp_path, start, step(10), evaluation(10, 0.7, best=True, value=0.4321))
    assert "value 0.4321" in "\n".join(lines)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_nothing_raw_comes_through(tmp_path, value):
    events = [
        {"event": e["event"]} | dict.fromkeys(e, value) | {"event": e["event"]} for e in EVENTS
    ]
    events += [{"event": "hardware", "gpus": [{"uuid": value, "unavailable": {"x": value}}]}]
    events += [START | {"labels": [value, value], "data": {str(value): value}}]
    events += [{"event": "\x1b]0;title\x07", "a\x1b": value}]
    lines = tell(tmp_path, *events, status=value, reason=value, host=value, live={"host": value})
    lines += [words.event_line(e) for e in events]
    assert all(c.isprintable() for line in lines for c in line)


def test_a_long_value_is_cut_and_a_number_is_short():
    line = words.event_line({"event": "step", "time": 1, "loss": 1 / 3, "note": "x" * 10_000})
    assert line.startswith("step  loss 0.333333  note xxx") and len(line) == words.MAX_LINE
    assert (
        words.event_line({"event": "e", "a": math.nan, "b": [1], "c": None}) == "e  a nan  c None"
    )
