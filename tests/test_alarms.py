"""Each alarm fires on its fault, planted in a real short run, and none on its healthy twin."""

import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from logs import START, as_lines, evaluation, make_run, read, step
from test_hardware import Nvml

import alarms
import batches
import hardware
import history
import optimizer
import train
from history import History

USUAL = {"train__epochs": 12, "evaluation__patience": "", "optimizer__lr": 3e-3}
USUAL |= {"log__hardware_s": 0.01, "data__slice_columns": "[]"}


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory) -> Path:
    """Data and model of `small`, and training texts with shuffled labels."""
    made = tmp_path_factory.mktemp("alarms")
    for name in ("train.csv", "validation.csv", "model"):
        (made / name).symlink_to(small / name)
    rows = tiny.rows(33)
    labels = [r["label"] for r in rows]
    random.Random(1).shuffle(labels)
    shuffled = [r | {"label": label} for r, label in zip(rows, labels, strict=True)]
    tiny.write_csv(made / "shuffled.csv", shuffled)
    return made


def trained(folder: Path, name: str, **changes: object) -> tuple[History, dict]:
    """A real run's history, and its state as it was while it trained."""
    tiny.run(tiny.settings(folder, run__name=name, **(USUAL | changes)))
    run = folder / "runs" / name
    log = read(run)
    return log, history.status(run, log) | {"status": "running", "is_stopped": False}


def codes(log: History, state: dict, now: float | None = None) -> set[str]:
    """The alarms of a run, by default right after its last event."""
    now = log.heard_at if now is None else now
    return {alarm.code for alarm in alarms.check(log, state, now=now)}


@pytest.fixture(scope="module")
def healthy(folder) -> tuple[History, dict]:
    return trained(folder, "healthy")


def test_a_healthy_run_has_no_alarm(healthy):
    log, state = healthy
    assert len(log.steps) == 60 and len(log.evals) == 12 and log.machines
    assert codes(log, state) == set()


SETTINGS = {
    "diverging": {"optimizer__lr": 1, "schedule__min_lr_ratio": 1, "train__max_grad_norm": ""},
    "plateau": {"optimizer__lr": 1e-9},
    "overfitting": {"data__train": "shuffled.csv", "optimizer__lr": 1e-2, "train__epochs": 40},
    "collapsed": {"train__class_weights": "{0: 1.0, 1: 0.000001}"},
}


@pytest.mark.parametrize("code", SETTINGS)
def test_a_fault_of_settings_or_labels_is_named(folder, code):
    changes = {k: folder / v if k == "data__train" else v for k, v in SETTINGS[code].items()}
    assert code in codes(*trained(folder, code, **changes))


def test_a_loss_that_is_not_finite_is_named(folder, monkeypatch):
    loss, calls = train.step_loss, []

    def broken(*arguments: object) -> object:
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) in (20, 21) else 1.0)

    monkeypatch.setattr(train, "step_loss", broken)
    log, state = trained(folder, "broken")
    assert "nonfinite" in codes(log, state) and log.nonfinite == [20, 21]


def test_a_rate_off_its_schedule_is_named(folder, healthy, monkeypatch):
    monkeypatch.setattr(optimizer, "lr_factor", lambda step, **_: 1.0)
    assert "off_schedule" in codes(*trained(folder, "constant"))


def test_waiting_for_data_is_named(folder, monkeypatch):
    get = batches.Texts.__getitem__
    monkeypatch.setattr(batches.Texts, "__getitem__", lambda *a: (time.sleep(0.02), get(*a))[1])
    assert "starved" in codes(*trained(folder, "slow", train__epochs=3))


@pytest.mark.parametrize(("percent", "expected"), [(3, {"idle_gpu"}), (95, set())])
def test_an_idle_gpu_is_named_and_a_busy_one_is_not(folder, monkeypatch, percent, expected):
    nvml = Nvml()
    rates = SimpleNamespace(gpu=percent)
    monkeypatch.setattr(nvml, "nvmlDeviceGetUtilizationRates", lambda gpu: rates, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(train, "used_gpus", lambda device: None)  # as if they were the run's
    log, state = trained(folder, f"gpu-{percent}")
    assert len(log.gpus) == 3 and "idle_gpu" not in codes(log, state)  # it is to be on the CPU
    log.start["config"]["run.device"] = "auto"
    assert codes(log, state) & {"idle_gpu"} == expected


def test_a_nearly_full_disk_is_named(folder, monkeypatch):
    monkeypatch.setattr(hardware, "free_gib", lambda path: 0.4)
    log, state = trained(folder, "full")
    assert codes(log, state) == {"disk_low"}
    assert codes(log, state | {"status": "completed"}) == set()


def test_a_trainer_without_progress_is_stalled(healthy):
    log, state = healthy
    assert codes(log, state, log.moved_at + alarms.STALLED_S - 1) == set()
    assert codes(log, state, log.moved_at + alarms.STALLED_S + 1) == {"stalled"}
    assert codes(log, state | {"is_stopped": True}) == {"stalled"}
    assert codes(log, state | {"status": "completed"}, log.moved_at + 1e6) == set()


def test_a_slow_run_is_not_stalled_before_ten_times_its_longest_pause():
    log = History.of(
        json.loads(e) for e in as_lines(START, step(1), step(2), every_s=300.0).split(b"\n")[:-1]
    )
    state = {"status": "running"}
    assert codes(log, state, log.moved_at + 2900) == set()
    assert codes(log, state, log.moved_at + 3100) == {"stalled"}


def test_a_long_evaluation_is_no_stall():
    start = START | {"data": {"train": 320, "validation": 4000, "test": 4000}}
    lines = as_lines(start, step(1), step(2)).split(b"\n")[:-1]
    log = History.of(json.loads(line) for line in lines)
    state = {"status": "running"}  # 8,000 texts at 16 a second, twice
    assert codes(log, state, log.moved_at + 990) == set()
    assert codes(log, state, log.moved_at + 1010) == {"stalled"}


def test_a_start_may_take_long(tmp_path):
    log = read(make_run(tmp_path, as_lines(START)))
    state = {"status": "running"}
    assert codes(log, state, log.moved_at + 3500) == set()
    assert codes(log, state, log.moved_at + 3700) == {"stalled"}


def test_a_dead_and_a_failed_run_are_named_and_a_preempted_one_is_not(healthy):
    log, state = healthy
    assert codes(log, state | {"status": "dead"}) == {"dead"}
    failed = state | {"status": "failed", "exit_code": 76, "reason": "too hot"}
    (alarm,) = alarms.check(log, failed, now=log.heard_at)
    assert alarm.code == "failed" and "76" in alarm.evidence and "too hot" in alarm.evidence
    assert codes(log, state | {"status": "preempted"}) == set()


def one_class(*numbers: int, shares: tuple[float, float] = (1.0, 0.0)) -> list[dict]:
    return [evaluation(n, 0.41, best=False, predicted_share=list(shares)) for n in numbers]


def test_one_class_at_first_is_how_runs_begin(tmp_path):
    def of(*events: dict, **start: object) -> set[str]:
        text = as_lines(START | start, *(step(n) for n in range(1, 31)), *events)
        lines = [json.loads(line) for line in text.split(b"\n")[:-1]]
        return codes(History.of(lines), {"status": "running"})

    assert of(*one_class(4)) == of(*one_class(3, 20)) == of(*one_class(5, 15)) == set()
    assert of(*one_class(10, 20)) == {"collapsed"}
    assert of(*one_class(10, 20, shares=(0.98, 0.02))) == set()
    assert of(*one_class(10, 20), evaluation(30, 0.6, best=True)) == set()
    end = {"event": "end", "status": "completed"}
    best = {"collapse": "why", "predicted_share": [1.0, 0.0]}
    of_best = end | {"results": {"validation": best}}
    assert of(*one_class(3), of_best) == {"collapsed"}  # however early that was
    of_another = end | {"results": {"validation": best | {"collapse": None}}}
    assert of(*one_class(10, 20), of_another) == set()
    rare = {"baselines": {"majority": {"accuracy": 0.98, "f1_macro": 0.49}}}
    assert of(*one_class(10, 20), **rare) == set()  # nearly all is of that class


def losses(*values: float) -> History:
    events = [START, *(step(i + 1, loss=v, lr=None) for i, v in enumerate(values))]
    return History.of(e | {"time": 1.0} for e in events)


def test_a_loss_that_jumps_once_or_falls_is_not_diverging():
    falling = [0.7 - 0.01 * i for i in range(40)]
    small = [0.05 + 0.03 * (i % 2) for i in range(40)]  # begun from a trained model
    for values in (falling, [*falling[:20], 9.0, *falling[20:]], [0.7] * 40, small):
        assert alarms.diverging(losses(*values)) is None
    for values in ([*falling, *[0.72] * 10], [*falling, *[9.0] * 10]):
        assert alarms.diverging(losses(*values)) is not None


@pytest.mark.parametrize("share", [0.25, 0.05, 0.02])
def test_a_rare_class_of_large_weight_is_no_divergence_at_any_look(share):
    """Each text of a balanced loss costs about the same on average; a rare one comes seldom."""
    rng = random.Random(0)
    for _ in range(5):
        values = []
        for i in range(100):
            level = 0.3 + 0.4 * 0.97**i
            rare = sum(rng.random() < share for _ in range(32))
            weighted = rare * 0.5 / share + (32 - rare) * 0.5 / (1 - share)
            values.append(level * weighted / 32)
        for looked in range(20, 101, 5):
            assert alarms.diverging(losses(*values[:looked])) is None


def test_without_three_evaluations_nothing_is_said_of_learning():
    """One epoch has one evaluation, at its end; until then only the loss is known."""
    steps = [START, *(step(n, loss=0.69) for n in range(1, 31))]
    evals = [evaluation(n, 0.41, best=False) for n in (10, 20, 30)]
    for events, expected in ((steps, None), ([*steps, *evals[:2]], None), ([*steps, *evals], 1)):
        log = History.of(e | {"time": 1.0} for e in events)
        assert (alarms.plateau(log, {"status": "running"}) is None) == (expected is None)


@pytest.mark.parametrize("status", ["completed", "running"])
@pytest.mark.parametrize("best", [0.41, 0.42])
def test_a_finished_run_that_never_beat_one_class_is_named(status, best):
    """However short: one evaluation, one logged step, none of which the other rules judge."""
    log = History.of(e | {"time": 1.0} for e in (START, step(1), evaluation(2, best, best=True)))
    found = {a.code for a in alarms.check(log, {"status": status}, now=2.0)}
    assert ("useless" in found) == (status == "completed" and best < 0.4118)


def test_after_a_resume_loading_is_no_stall_and_other_machines_do_not_count():
    full = {"event": "hardware", "host": "full", "disk_free_gib": 0.5}
    events = [START, step(1), full, START | {"x": 1}]
    log = History.of(json.loads(e) for e in as_lines(*events).split(b"\n")[:-1])
    state = {"status": "running"}
    assert codes(log, state, log.moved_at + 1000) == set()


HOSTILE = (None, "x\x1b[31m", [], {}, [3], True, 10**400, 1e308, -1, 1e999, float("nan"))


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_no_value_breaks_a_rule(value):
    def spoiled(record: dict) -> dict:
        return {k: spoiled(v) if isinstance(v, dict) else value for k, v in record.items()}

    events = [START, *(step(n) for n in range(1, 41)), evaluation(10, 0.5, best=True)]
    events += [evaluation(20, 0.5, best=False), evaluation(30, 0.5, best=False)]
    gpus = [value, {"uuid": value, "util_percent": value}]
    events += [{"event": "hardware", "gpus": gpus}, {"event": "checkpoint", "bytes": value}]
    for keep in (set(), {"step", "time"}, {"loss", "step", "steps"}, {"labels", "baselines"}):
        odd = [
            spoiled(e) | {k: v for k, v in e.items() if k in keep | {"event", "split", "best"}}
            for e in events
        ]
        state = {"status": value, "pid": value, "exit_code": value, "reason": value}
        for known in (state, state | {"status": "running"}, state | {"status": "failed"}):
            alarms.check(History.of(odd), known, now=1.0)


def test_levels_that_overlap_are_noise():
    noisy = [*[0.4] * 6, *[1.6] * 4]
    assert alarms.diverging(losses(*noisy, *[0.75] * 4, *[1.1] * 6)) is None
    assert alarms.diverging(losses(*[0.4] * 10, *[0.75] * 4, *[1.1] * 6)) is not None


def test_sparse_logging_of_slow_steps_is_no_stall():
    start = START | {"config": START["config"] | {"log.every": 100}}
    events = as_lines(start, step(100, step_s=2.0)).split(b"\n")[:-1]
    log = History.of(json.loads(e) for e in events)
    assert codes(log, {"status": "running"}, log.moved_at + 1900) == set()
    assert codes(log, {"status": "running"}, log.moved_at + 2100) == {"stalled"}
