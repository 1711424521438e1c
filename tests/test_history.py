"""Following a log gives what reading it gives, however it is written, torn, cut off or replaced."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import EVENTS, START, as_lines, evaluation, make_run, step

import history
import runlog
from history import Follower, History, Series

JUNK = b'{"event": "step", "st\n\xff\xfe\n[1]\n{"event": 3}\n\n' + b"[" * 200_000 + b"\n"
JUNK += b'{"a": 1, "a": 2}\n{"event": "step", "loss": NaN\n\x00\x1b[31m\n'
UMLAUT = '{"event": "warning", "code": "a", "message": "\u00fcber \u6f22\u5b57 \U0001f600"}\n'
LONG = '{"event": "step", "step": 12, "loss": ' + "9" * 5000 + "}\n"
RESUME = {"event": "resume", "step": 10}


def facts(h: History) -> object:
    """All that a history holds, so that two can be compared."""
    columns = {name: list(h.steps[name]) for name in history.STEP}
    return repr((columns, h.start, h.end, h.starts, h.evals, h.checkpoints, h.hardware))


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_following_in_pieces_gives_what_reading_the_whole_log_gives(tmp_path, size):
    junk = JUNK if size > 7 else JUNK.replace(b"[" * 200_000, b"[" * 3000)
    data = as_lines(*EVENTS) + junk + UMLAUT.encode() + LONG.encode()
    data += as_lines(RESUME, step(15)) + b'{"event": "st'
    follower, new = Follower(tmp_path), 0
    assert follower.poll() == 0  # there is no log yet
    with open(follower.path, "ab", buffering=0) as file:
        for i in range(0, len(data), size):
            file.write(data[i : i + size])
            new += follower.poll()
    assert follower.poll() == 0 and new == len(EVENTS) + 4
    events = runlog.read(follower.path)
    assert facts(follower.history) == facts(History.of(events))
    assert list(follower.history.steps["step"]) == [5, 10, 15]
    assert follower.history.warnings[-1]["message"] == json.loads(UMLAUT)["message"]
    everything = list(runlog.lines(follower.path))
    assert facts(History.of(e for e in everything if e["event"] != "resume")) != facts(
        follower.history
    ), "control: without the resume, later steps count"


KINDS = st.sampled_from(["step", "eval", "checkpoint", "resume", "start", "hardware", "end"])
EVENT = st.fixed_dictionaries({"event": KINDS, "step": st.integers(0, 9), "time": st.just(1.0)})


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENT, max_size=30))
def test_what_resumes_make_void_is_the_same_in_one_look_and_in_many(events):
    """runlog.read goes backwards, a history forwards; a definition by hand decides."""
    kept = []
    for i, e in enumerate(events):
        later = [r["step"] for r in events[i + 1 :] if r["event"] == "resume"]
        kept += [e] * all(e["step"] <= s for s in later)
    path = Path(os.environ["PYTEST_TMP"]) / "log.jsonl"
    path.write_bytes(b"".join(json.dumps(e).encode() + b"\n" for e in events))
    assert runlog.read(path) == kept
    for kind, found in (("step", "steps"), ("eval", "evals"), ("checkpoint", "checkpoints")):
        whole = getattr(History.of(events), found)
        numbers = list(whole["step"]) if kind == "step" else [e["step"] for e in whole]
        assert numbers == [e["step"] for e in kept if e["event"] == kind]


@pytest.fixture(autouse=True)
def folder_for_hypothesis(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path_factory.mktemp("logs")))


def test_a_line_of_100_mb_is_read_and_what_follows_too(tmp_path):
    follower = Follower(tmp_path)
    long = as_lines(evaluation(10, 0.5, best=True, note="x" * 100_000_000))
    follower.path.write_bytes(long + as_lines(evaluation(20, 0.6, best=False)))
    assert follower.poll() == 2
    assert [len(e.get("note", "")) for e in follower.history.evals] == [100_000_000, 0]


def test_a_line_without_end_is_not_kept_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MAX_LINE", 1000)
    monkeypatch.setattr(history, "CHUNK", 100)
    follower = Follower(tmp_path)
    follower.path.write_bytes(b"x" * 100_000)
    follower.poll()
    assert sum(map(len, follower._torn)) <= 1200
    with open(follower.path, "ab") as file:
        file.write(b"\n" + as_lines(step(5)))
    assert follower.poll() == 1


def test_a_log_that_is_cut_off_replaced_or_moved_away_is_followed(tmp_path):
    follower = Follower(tmp_path)
    follower.path.write_bytes(as_lines(*EVENTS))
    follower.poll()
    follower.path.rename(tmp_path / "metrics.jsonl.1")
    follower.path.write_bytes(as_lines(step(25)))  # it goes on in a new file
    assert follower.poll() == 1
    assert list(follower.history.steps["step"]) == [5, 10, 15, 20, 25]
    follower.path.write_bytes(as_lines(START, step(1)))  # another run under the same name
    follower.poll()
    assert list(follower.history.steps["step"]) == [1]
    size = follower.path.stat().st_size
    other = as_lines(START, step(2), step(3))
    assert len(other) > size
    with open(follower.path, "r+b") as file:  # longer than before, but not the same
        file.write(other)
    follower.poll()
    assert list(follower.history.steps["step"]) == [2, 3]
    follower.path.unlink()
    assert follower.poll() == 0 and len(follower.history.steps) == 2


def test_of_a_huge_log_step_lines_are_thinned_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "CHUNK", 1 << 14)
    steps = [step(n) for n in range(1, 3001)]
    steps[1500] |= {"loss": None, "nonfinite": ["loss"]}
    others = [evaluation(3000, 0.7, best=True)]
    data = as_lines(START, *steps[:2000], {"event": "resume", "step": 1990}, *steps[1990:], *others)
    follower = Follower(tmp_path)
    follower.path.write_bytes(data)
    follower.poll()
    assert len(follower.history.steps) == 3000, "control: a small one is read whole"
    monkeypatch.setattr(history, "MAX_PARSED", len(data) // 10)
    thinned = Follower(tmp_path)
    thinned.poll()
    numbers = list(thinned.history.steps["step"])
    assert 300 < len(numbers) < 900 and numbers == sorted(set(numbers))
    assert numbers[-1] == 3000 and thinned.history.nonfinite == [1501]
    assert thinned.history.evals == follower.history.evals
    last = thinned.history.last("loss")
    with open(thinned.path, "ab") as file:
        file.write(as_lines(*(step(n) for n in range(3001, 3011))))
    assert thinned.poll() == 10 and thinned.history.last("loss") != last


def test_what_is_reached_counts_what_was_evaluated_or_saved_too():
    saved = {"event": "checkpoint", "step": 6}
    h = history.History.of(e | {"time": 5.0 + i} for i, e in enumerate((START, saved, START)))
    assert (h.reached(), h.epoch(), h.last("step")) == (6, 0.6, None)
    assert h.begun_at == 5.0, "not the start that goes on"
    h.add(step(7) | {"time": 9.0})
    assert (h.reached(), h.epoch()) == (7, 0.7)
    assert history.History().reached() is None and history.History().epoch() is None


def test_step_lines_are_known_by_how_runlog_writes_them(tmp_path):
    log = runlog.RunLog(tmp_path / "log")
    log.write("step", step=1)
    log.write("eval", step=1)
    log.close()
    written = (tmp_path / "log").read_bytes().splitlines()
    starts = [line.startswith(history.STEP_LINE) for line in written]
    assert starts == [True, False]


def test_a_series_keeps_its_ends_when_thinned():
    series = Series("step", "loss")
    for n in range(1000):
        series.add({"step": n, "loss": None if n == 5 else n / 7})
    assert math.isnan(series["loss"][5])
    for most in (1, 7, 100, 999, 1000, 5000):
        thinned = series.thinned("step", most)
        assert len(thinned) <= most and thinned[-1] == 999
    assert len(Series("step").thinned("step", 3)) == 0


def test_a_trainer_that_is_gone_is_dead_and_one_that_is_held_is_stopped(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = make_run(tmp_path, as_lines(*EVENTS), pid=child.pid)
    known = history.status(run, History())
    assert (known["status"], known["is_here"], known["is_stopped"]) == ("running", True, False)
    child.send_signal(19)  # SIGSTOP
    os.waitpid(child.pid, os.WUNTRACED)
    assert history.status(run, History())["is_stopped"]
    child.kill()
    child.wait()
    assert history.status(run, History())["status"] == "dead"
    far = make_run(tmp_path, b"", "far", pid=child.pid, host="elsewhere")
    assert history.status(far, History())["status"] == "running"


@pytest.mark.parametrize("pid", [None, "1", 10**30, [], -5, True])
def test_a_process_id_that_is_none_breaks_nothing(tmp_path, pid):
    run = make_run(tmp_path, b"", pid=pid)
    assert history.status(run, History())["status"] in ("running", "dead")


def test_the_logs_end_counts_where_run_state_is_older(tmp_path):
    run = make_run(tmp_path, b"", pid=os.getpid(), time=5.0)
    ended = History.of([{"event": "end", "time": 6.0, "status": "failed", "reason": "why"}])
    assert history.status(run, ended)["status"] == "failed"
    older = History.of([{"event": "end", "time": 4.0, "status": "failed"}])
    assert history.status(run, older)["status"] == "running"
