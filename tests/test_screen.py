"""The picture fits any window, has room for alarms, and nothing in it comes raw from data."""

import math
import re

import pytest
from logs import EVENTS, NOW, START, as_lines, evaluation, make_run, read, step
from tqdm.utils import disp_len

import screen
from view import View, in_bytes, in_words

MACHINE = {"host": "node1", "cpu_percent": 93.0, "load": 2.0, "cores": 8, "memory_gib": 3.0}
MACHINE |= {"memory_total_gib": 16.0, "disk_free_gib": 100.0}
GPU = {"name": "NVIDIA H100", "util_percent": 97, "memory_gib": 40.0, "memory_total_gib": 80.0}
GPU |= {"temperature_c": 61, "power_w": 512.0}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def hardware(count: int, **changes: object) -> dict:
    records = [{"uuid": f"GPU-{i:04d}-5678"} | GPU for i in range(count)]
    return {"event": "hardware", **MACHINE, "gpus": records, **changes}


def view(tmp_path, *events: dict, log: bytes | None = None, **state: object) -> View:
    run = make_run(tmp_path, as_lines(*(events or EVENTS)) if log is None else log, **state)
    return View(run, read(run), NOW)


def draw(view: View, columns: int = 80, rows: int = 24, **style: bool) -> list[str]:
    return screen.draw(view, columns, rows, **({"colour": False, "unicode": True} | style))


SIZES = [(80, 24), (160, 50), (20, 5), (40, 12), (200, 100), (500, 8), (1, 1), (79, 25)]


@pytest.mark.parametrize(("columns", "rows"), SIZES)
@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_it_fits_any_window(tmp_path, columns, rows, gpus):
    wide = [evaluation(20, 0.7, best=True, predicted_share=[0.001] * 1000)]
    for name, events in (("usual", EVENTS), ("wide", [*EVENTS, *wide]), ("empty", [])):
        shown = view(tmp_path / name, *events, hardware(gpus), hardware(2, host="node2"))
        for colour in (False, True):
            lines = draw(shown, columns, rows, colour=colour)
            assert len(lines) <= rows
            assert max(disp_len(COLOUR.sub("", line)) for line in lines) <= columns


def test_at_80_by_24_all_of_a_usual_run_is_there(tmp_path):
    text = "\n".join(draw(view(tmp_path, *EVENTS, hardware(1))))
    for part in (
        *("some\n", "running on", "trained from scratch", "3.1 M", "train 320", "positive 'yes'"),
        *("50%", "20/40", "epoch 2.00", " left", "0.5 ", "16 examples/s", "1,000 tokens/s"),
        *("padding 3%", "data wait 1%", "0.7321", "0.7123", "0.4118", "0.6116", "no 70%  yes 30%"),
        *("last, step 20", "best, step 10", "1 of 3 evaluations", "CPU 93 %", "3.0 of 16.0 GiB"),
        *("GPU-0000-56", "97 %", "40.0 of 80.0 GiB", "61 C", "512 W", "disk 100 GiB", "none"),
    ):
        assert part in text, part


def test_alarms_are_there_however_small_the_window_and_many_the_gpus(tmp_path):
    bad = [step(n, lr=0.5, loss=None, nonfinite=["loss"]) for n in range(25, 30)]
    shown = view(tmp_path, *EVENTS, *bad, hardware(8))
    assert {a.code for a in shown.alarms} == {"nonfinite", "off_schedule"}
    for rows in (24, 16, 10):
        lines = draw(shown, 80, rows)
        assert sum(line.startswith("! alarm") for line in lines) == 2, rows
    assert "more lines" in draw(shown, 80, 16)[-1]
    tall = "\n".join(draw(shown, 160, 50))
    assert "more lines" not in tall and all(a.advice[:40] in tall for a in shown.alarms)
    assert sum("GPU-" in line for line in tall.splitlines()) == 8


def test_many_gpus_are_one_line_where_each_has_no_room(tmp_path):
    text = "\n".join(draw(view(tmp_path, *EVENTS, hardware(8)), 80, 24))
    assert "8 GPUs" in text and "97 to 97 %" in text and "GPU-0000" not in text


def test_what_a_gpu_does_not_tell_is_n_a_with_its_reason(tmp_path):
    lost = {"uuid": "GPU-1", "unavailable": {"gpu": "GPU is lost"}}
    part = {"uuid": "GPU-2"} | GPU | {"power_w": None, "unavailable": {"power_w": "Not Supported"}}
    text = "\n".join(draw(view(tmp_path, *EVENTS, hardware(0, gpus=[lost, part])), 160, 50))
    assert "n/a gpu: GPU is lost" in text and "n/a W" in text
    assert "n/a power_w: Not Supported" in text
    none = view(tmp_path / "b", *EVENTS, hardware(0, no_gpu="Driver Not Loaded"))
    assert "Driver Not Loaded" in "\n".join(draw(none))


def test_how_old_a_look_is_and_of_which_machine(tmp_path):
    records = [hardware(0, time=NOW - 7500), hardware(0, host="node2", time=NOW - 5)]
    shown = view(tmp_path, *EVENTS, *records)
    text = "\n".join(draw(shown))
    assert "2 h 05 min ago" in text and "node2" in text and "5 s ago" in text
    look = MACHINE | {"host": "node1", "cpu_percent": 11.0, "time": NOW}
    here = View(shown.run, shown.history, NOW, look)
    text = "\n".join(draw(here))
    assert "now:  CPU 11 %" in text and "2 h 05 min ago" not in text and "node2" in text
    hangs = View(shown.run, shown.history, NOW + 60, look)
    assert "60 s ago:  CPU 11 %" in "\n".join(draw(hangs))


@pytest.mark.parametrize(
    ("state", "part"),
    [
        ({"status": "completed", "reason": "all steps done"}, "completed on"),
        ({"status": "preempted", "reason": "stopped by SIGTERM"}, "stopped by SIGTERM"),
        ({"status": "failed", "reason": "disk full", "exit_code": 73}, "exit code 73: disk full"),
        ({"pid": 2**22 + 1}, "dead on"),
    ],
)
def test_a_run_that_has_ended_is_shown_for_what_it_is(tmp_path, state, part):
    text = "\n".join(draw(view(tmp_path, **state)))
    assert part in text and " left" not in text


def test_colours_only_where_they_are_wanted(tmp_path):
    shown = view(tmp_path)
    assert "\x1b[" in "".join(draw(shown, colour=True))
    assert "\x1b" not in "".join(draw(shown))
    assert [COLOUR.sub("", line) for line in draw(shown, colour=True)] == draw(shown)
    assert screen.has_colour({"TERM": "xterm"}) and not screen.has_colour({"NO_COLOR": "1"})
    assert screen.has_colour({"NO_COLOR": ""}) and not screen.has_colour({"TERM": "dumb"})


def test_without_unicode_it_is_ascii(tmp_path):
    assert all(line.isascii() for line in draw(view(tmp_path), unicode=False))
    assert not all(line.isascii() for line in draw(view(tmp_path / "b")))
    assert screen.is_unicode("UTF-8") and not screen.is_unicode("latin-1")
    assert not screen.is_unicode(None)


VALUES = (None, "x\x1b[31m\n\u202e", [], {}, [3], True, 10**400, 1e308, -1, 1e999, math.nan, "<b>")


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_no_value_breaks_it_or_reaches_the_terminal_raw(tmp_path, value):
    def spoiled(record: dict) -> dict:
        return {k: spoiled(v) if isinstance(v, dict) else value for k, v in record.items()}

    gpus = [value, {"uuid": value, "name": value, "power_w": value, "unavailable": value}]
    gpus += [{"uuid": "GPU-1", "unavailable": {str(value): value}}]
    events = [spoiled(e) | {"event": e["event"], "split": "validation"} for e in EVENTS]
    events += [{"event": "hardware", "host": value, "gpus": gpus, "load": value, "no_gpu": value}]
    events += [{"event": "warning", "message": value}, {"event": "checkpoint", "bytes": value}]
    for start in ({}, {"steps": value}, {"config": value, "labels": value}, {"data": value}):
        events += [START | start | {"event": "start"}, hardware(1, host=str(value))]
        shown = view(
            tmp_path / str(len(events)),
            *events,
            **{"status": value, "reason": value, "pid": value, "time": value, "host": value},
        )
        for columns, rows in ((80, 24), (160, 50)):
            lines = draw(shown, columns, rows)
            assert all(c.isprintable() for line in lines for c in line)
    if isinstance(value, str):
        assert value.encode("unicode_escape").decode()[:6] in "\n".join(lines)


def test_a_curve_goes_from_its_lowest_to_its_highest_value():
    assert screen.curve([0, 1, 2, 3, 4, 5, 6, 7], 8, 1, True) == [screen.BLOCKS[1:]]
    two = screen.curve([0, 1], 2, 2, True)
    assert two == [" \u2588", "\u2581\u2588"]
    assert screen.curve([1.0, math.nan, 1.0], 3, 1, True)[0][1] == " "
    assert screen.curve([], 10, 1, True) == [""]
    assert screen.curve([5.0] * 7, 3, 1, False) == ["***"] or len(screen.curve([5.0], 1, 1, False))
    falling = screen.curve([1 - i / 1000 for i in range(1000)], 50, 4, True)
    assert all(len(line) == 50 for line in falling) and falling[0].strip() < falling[3].strip()


def test_the_time_left_goes_by_the_clock_and_not_across_an_interruption(tmp_path):
    timed = [START | {"time": 0.0}, *(step(n, time=3.0 * n) for n in range(1, 11))]
    assert view(tmp_path, *timed).left_s() == pytest.approx(90)
    resumed = [START | {"time": 5000.0}, *(step(n, time=5000 + 5.0 * n) for n in (11, 12))]
    assert view(tmp_path / "b", *timed, *resumed).left_s() == pytest.approx(28 * 5)
    once = view(tmp_path / "c", START, step(10, time=None, step_s=2.0))
    assert once.left_s() == pytest.approx(60)
    assert view(tmp_path / "d", START).left_s() is None
    assert view(tmp_path / "e", START, step(40)).left_s() is None  # it is scored now


def test_numbers_are_written_for_people():
    assert [in_words(s) for s in (0, 99, 100, 3600, 86400, 400_000)] == [
        *("0 s", "99 s", "1 min 40 s", "60 min 00 s", "24 h 00 min", "4 d 15 h")
    ]
    assert [in_bytes(n) for n in (None, 0, 999, 1500, 1.2e9, 5e15)] == [
        *("n/a", "0 B", "999 B", "1.5 kB", "1.2 GB", "5000.0 TB")
    ]
