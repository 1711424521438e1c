"""Other programs get every number of a log that holds, at its step, and nothing that they run."""

import csv
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
from logs import EVENTS, as_lines, contents, evaluation, make_run, step
from test_history import JUNK, LONG

import export
import runlog
from errors import Refusal
from history import LOG

SLICES = {"lang": {"ar": {"f1_macro": 0.5, "confusion": [[1, 2], [3, 4]]}}}
GPU = {"uuid": "GPU-1", "name": "some", "util_percent": 93, "power_w": None}
HARDWARE = {"event": "hardware", "host": "here", "load": 1.5, "gpus": [GPU]}
NESTED = evaluation(30, 0.8, best=True, slices=SLICES, confusion=[[5, 6], [7, 8]])
LOST = {"event": "step", "step": 30, "loss": None, "nonfinite": ["loss"]}
ALL = [*EVENTS, {"event": "resume", "step": 15}, step(20), LOST, NESTED, HARDWARE]


def table(run: Path) -> list[dict[str, str]]:
    out = io.StringIO()
    export.export_csv(run, out)
    return list(csv.DictReader(io.StringIO(out.getvalue())))


def test_csv_has_a_row_for_each_step_and_eval_that_holds(tmp_path):
    run = make_run(tmp_path, as_lines(*ALL))
    rows = table(run)
    expected = [e for e in runlog.read(run / LOG) if e["event"] in ("step", "eval")]
    assert [(r["event"], float(r["step"])) for r in rows] == [
        (e["event"], e["step"]) for e in expected
    ]
    assert list(rows[0])[:5] == ["event", "time", "step", "epoch", "split"]
    assert [r["f1_macro"] for r in rows] == ["", "", "0.7321", "", "", "", "0.8"]  # 0.7123 is void
    assert all(
        float(r["loss"]) == e["loss"] for r, e in zip(rows, expected, strict=True) if r["loss"]
    )
    assert rows[-2]["loss"] == "" and rows[-2]["nonfinite.0"] == "loss"
    last = rows[-1]
    assert (last["slices.lang.ar.f1_macro"], last["predicted_share.0"]) == ("0.5", "0.7")
    assert last["best"] == "true" and not any("confusion" in name for name in last)
    assert not any("util" in name for name in last)


def test_csv_cells_are_no_formulas_and_stay_on_their_line(tmp_path):
    hostile = {"=1+1": 3, "note": "=HYPERLINK(1)", "b": "@x", "c": "+1", "d": "-1", "e": -1.5}
    hostile |= {"f": "a\r\n=b\u202e\x1b[2J", "g": "\ud800", "deep": [[[[[[[[[[1]]]]]]]]]]}
    log = JUNK + as_lines(step(3, **hostile)) + LONG.encode()
    run = make_run(tmp_path, log, "\u202e=name")
    first = next(row for row in table(run) if row["step"] == "3")
    told = [first[n] for n in ("'=1+1", "note", "b", "c", "d", "e")]
    assert told == ["3", "'=HYPERLINK(1)", "'@x", "'+1", "'-1", "-1.5"]
    assert not any(name.startswith("deep") for name in first)
    out = io.StringIO()
    export.export_csv(run, out)
    assert all(c.isprintable() or c == "\n" for c in out.getvalue())
    assert out.getvalue().count("\n") == 1 + len(table(run))
    assert any(row["loss"] == "" for row in table(run))  # of a number with thousands of digits


def test_a_file_is_written_whole_and_never_into_a_run(tmp_path):
    run = make_run(tmp_path, as_lines(*ALL))
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to(run)
    for place in (run / "a.csv", run / "best" / "a.csv", tmp_path / "link" / "a.csv"):
        with pytest.raises(Refusal, match="lies in the run some") as caught:
            export.write_csv(run, place)
        assert caught.value.exit_code == 64
    for place in (run, run / "tb", tmp_path / "link" / "x" / "y"):
        with pytest.raises(Refusal, match="lies in the run some") as caught:
            export.export_tensorboard(run, place)
        assert caught.value.exit_code == 64
    assert contents(tmp_path) == before
    export.write_csv(run, tmp_path / "a.csv")
    out = io.StringIO()
    export.export_csv(run, out)
    assert (tmp_path / "a.csv").read_text() == out.getvalue()
    with pytest.raises(Refusal) as caught:
        export.write_csv(run, tmp_path / "nowhere" / "a.csv")
    assert caught.value.exit_code == 73


def test_without_a_log_there_is_nothing_to_export(tmp_path):
    for act in (
        lambda: table(tmp_path),
        lambda: export.export_tensorboard(tmp_path, tmp_path / "t"),
    ):
        with pytest.raises(Refusal, match=r"there is no metrics\.jsonl") as caught:
            act()
        assert caught.value.exit_code == 66
    assert not list(tmp_path.iterdir())


def read_back(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_tensorboard_reads_every_number_at_its_time_and_step(tmp_path):
    run = make_run(tmp_path, as_lines(*ALL))
    count = export.export_tensorboard(run, tmp_path / "tb")
    shown = read_back(tmp_path / "tb")
    tags = shown.Tags()["scalars"]
    assert count == sum(len(shown.Scalars(tag)) for tag in tags)
    for tag, event, field in (
        ("train/loss", "step", "loss"),
        ("validation/f1_macro", "eval", "f1_macro"),
    ):
        expected = [
            (e["step"], e["time"], pytest.approx(e[field]))
            for e in runlog.read(run / LOG)
            if e["event"] == event and e[field] is not None
        ]
        assert [(s.step, s.wall_time, s.value) for s in shown.Scalars(tag)] == expected
    assert [s.step for s in shown.Scalars("validation/lang/ar/f1_macro")] == [30]
    assert [s.value for s in shown.Scalars("hardware/GPU-1/util_percent")] == [93]
    assert [s.step for s in shown.Scalars("hardware/here/load")] == [30]  # which was reached
    assert not any("confusion" in tag or "power_w" in tag or "best" in tag for tag in tags)


def test_a_second_export_replaces_the_first_and_nothing_else(tmp_path):
    run, folder = make_run(tmp_path, as_lines(*ALL)), tmp_path / "tb"
    folder.mkdir()
    (folder / "events.out.tfevents.1.others").touch()
    counts = [export.export_tensorboard(run, folder) for _ in range(2)]
    assert len(list(folder.iterdir())) == 2
    assert len(read_back(folder).Scalars("train/loss")) == 4 and counts[0] == counts[1]


def test_tensorboard_takes_what_a_hostile_log_holds(tmp_path):
    big = step(10**40, loss=1e39, grad_norm=-1e200, lr=0.5)
    odd = [{"event": "eval", "split": "\ud800\x1b", "slices": 7}, {"event": "hardware", "gpus": 3}]
    odd += [step(3, time="soon"), step(-4), evaluation(9, 0.1, best=True, slices=[[1]])]
    run = make_run(tmp_path, JUNK + as_lines(big, *odd) + LONG.encode())
    assert export.export_tensorboard(run, tmp_path / "tb") > 10
    shown = read_back(tmp_path / "tb")
    assert all(tag.isprintable() for tag in shown.Tags()["scalars"])
    values = [s.value for tag in shown.Tags()["scalars"] for s in shown.Scalars(tag)]
    assert all(map(math.isfinite, values))
    steps = {s.step for s in shown.Scalars("train/lr")}
    assert steps == {0, 3}  # a step that is none counts as the last that was reached


def test_no_torch_and_one_line_where_tensorboard_is_missing(tmp_path):
    run, out = make_run(tmp_path, as_lines(*ALL)), tmp_path / "tb"
    code = "import sys, io, export; from pathlib import Path\n"
    code += f"export.export_csv(Path({str(run)!r}), io.StringIO())\n"
    code += "light = set(sys.modules)\n"
    code += f"export.export_tensorboard(Path({str(run)!r}), Path({str(out)!r}))\n"
    code += "print(*{'torch', 'tensorboard', 'numpy'} & light, '/', 'torch' in sys.modules)\n"
    code += "sys.modules['tensorboard.compat.proto.event_pb2'] = None\n"
    code += f"try: export.export_tensorboard(Path({str(run)!r}), Path({str(out)!r}))\n"
    code += "except export.Refusal as error: print(error.exit_code, error)"
    root = Path(export.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=root)
    first, last = done.stdout.splitlines()
    assert first.strip() == "/ False" and not done.stderr
    assert last.startswith("69 ") and last.endswith("pip install tensorboard")
