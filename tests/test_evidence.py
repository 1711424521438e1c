"""A paired test is of the same texts or there is none, and intervals are those of the scores."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss
from test_summary import make

import bootstrap
import evidence
from summary import Run, read_run

NAMES = ["no", "yes"]


def simulated(seed: int, *, recall: float = 0.7, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Labels, alike for all seeds, and probabilities (N, 2)."""
    labels = (np.arange(n) % 4 == 0).astype(int)
    rng = np.random.default_rng(seed)
    says_yes = rng.random(n) < np.where(labels, recall, 0.1)
    p = np.where(says_yes, rng.uniform(0.5, 1, n), rng.uniform(0, 0.5, n)).round(7)
    return labels, np.stack([1 - p, p], axis=1)


def lines(
    labels: np.ndarray, p: np.ndarray, names: list[str] = NAMES, first: int = 1
) -> list[dict]:
    """As `results` writes predictions."""
    return [
        {"row": first + i, "label": names[k], "predicted": names[int(q.argmax())]}
        | {"probabilities": [round(float(x), 7) for x in q], "slices": {}}
        for i, (k, q) in enumerate(zip(labels, p, strict=True))
    ]


def write(run: Path, records: list[dict], split: str = "validation") -> Path:
    (run / "predictions").mkdir(exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "predictions" / f"{split}.jsonl").write_text(text)
    return run


def finished(root: Path, name: str, seed: int, *, recall: float = 0.7, **settings: object) -> Path:
    """A completed run with predictions on both splits, and their scores."""
    labels, p = simulated(seed, recall=recall)
    said = p.argmax(axis=1)
    scores = {"f1_macro": f1_score(labels, said, average="macro"), "loss": log_loss(labels, p)}
    scores |= {"f1_positive": f1_score(labels, said), "accuracy": float((labels == said).mean())}
    run = make(root, name, results={"validation": scores, "test": scores}, **settings)
    return write(write(run, lines(labels, p)), lines(labels, p), "test")


def known(*paths: Path) -> tuple[dict[str, Run], evidence.Known]:
    runs = dict(zip("ABC", map(read_run, paths), strict=False))
    return runs, evidence.read(runs, "validation")


def test_intervals_are_those_of_the_predictions(tmp_path):
    runs, predictions = known(finished(tmp_path, "a", 0))
    labels, p = simulated(0)
    rows = dict(evidence.scores(runs, predictions, "validation"))
    for name, about in (("f1_macro", 1), ("f1_positive", 1), ("accuracy", None)):
        score = bootstrap.scorer(name, about)
        low, high = bootstrap.interval(labels, p.argmax(axis=1), 2, score)
        assert rows[name].endswith(f" [{low:.3f}, {high:.3f}]")
    losses = -np.log(p[np.arange(300), labels])
    low, high = bootstrap.mean_interval(losses)
    assert rows["loss"] == f"{losses.mean():.3f} [{low:.3f}, {high:.3f}]"


def test_the_paired_test_is_that_of_rows_not_of_places(tmp_path):
    a, b = (finished(tmp_path, name, seed) for name, seed in (("a", 0), ("b", 1)))
    straight = evidence.paired_tests(*known(a, b))
    labels, p = simulated(1)
    records = lines(labels, p)
    write(a, lines(*simulated(0))[::-1])
    assert evidence.paired_tests(*known(a, b)) == straight
    write(b, records[::-1])
    assert evidence.paired_tests(*known(a, b)) == straight
    d = bootstrap.paired(
        labels, simulated(0)[1].argmax(1), p.argmax(1), 2, bootstrap.scorer("f1_macro")
    )
    assert f"{d.value:+.3f}  [{d.low:+.3f}, {d.high:+.3f}]  p {d.p:.4f}" in straight[1]
    shifted = [
        r | {"row": s["row"]} for r, s in zip(records, records[1:] + records[:1], strict=True)
    ]
    write(b, shifted)  # which by place would pass
    assert "no paired test" in "".join(evidence.paired_tests(*known(a, b)))


def test_other_texts_with_the_same_rows_and_labels_are_not_compared(tmp_path):
    a, b, c = (finished(tmp_path, name, seed) for name, seed in (("a", 0), ("b", 1), ("c", 1)))
    for run, texts in ((a, "x"), (b, "x"), (c, "y")):
        log = (run / "metrics.jsonl").read_text()
        event, *rest = log.splitlines()
        event = json.dumps(json.loads(event) | {"texts_sha256": {"validation": texts}})
        (run / "metrics.jsonl").write_text("\n".join([event, *rest, ""]))
    assert "no paired test" not in "".join(evidence.paired_tests(*known(a, b)))  # control
    assert "their validation texts differ" in "".join(evidence.paired_tests(*known(a, c)))


def test_a_score_that_all_resamples_share_has_no_interval(tmp_path):
    labels = simulated(0)[0]
    right = write(finished(tmp_path, "a", 0), lines(labels, np.eye(2)[labels]))
    rows = dict(evidence.scores(*known(right), "validation"))
    assert "[" not in rows["f1_macro"] and "[" in rows["loss"]


def test_classes_in_another_order_are_the_same_classes(tmp_path):
    a, b = (finished(tmp_path, name, seed) for name, seed in (("a", 0), ("b", 1)))
    straight = evidence.paired_tests(*known(a, b))
    log = (b / "metrics.jsonl").read_text().replace('["no", "yes"]', '["yes", "no"]')
    (b / "metrics.jsonl").write_text(log)
    labels, p = simulated(1)
    write(b, lines(1 - labels, p[:, ::-1], NAMES[::-1]))
    assert evidence.paired_tests(*known(a, b)) == straight
    write(b, lines(labels, p[:, ::-1]))  # taken by place
    assert evidence.paired_tests(*known(a, b)) != straight


def test_a_class_more_makes_another_score(tmp_path):
    a, b = (finished(tmp_path, name, seed) for name, seed in (("a", 0), ("b", 1)))
    log = (b / "metrics.jsonl").read_text().replace('["no", "yes"]', '["no", "yes", "oh"]')
    (b / "metrics.jsonl").write_text(log)
    labels, p = simulated(1)
    write(b, lines(labels, np.pad(p, ((0, 0), (0, 1))), [*NAMES, "oh"]))
    told = evidence.paired_tests(*known(a, b))
    assert told[1:] == ["B - A  no paired test: A has the labels no, yes; B has no, yes, oh"]


@pytest.mark.parametrize(
    "records, reason",
    [
        (
            lines(*simulated(1))[1:],
            "validation texts of A that B does not have: 1, the first is row 1",
        ),
        (lines(*simulated(1), first=2), "validation texts of A that B does not have: 1, .* row 1"),
        (lines(*simulated(1, n=301)), "validation texts of B that A does not have: 1, .* row 301"),
        (lines(1 - simulated(1)[0], simulated(1)[1]), "row 1 has the label 'yes' in A, 'no' in B"),
        ([{"row": 1}], "B has no predictions: .*line 1: label 'None'"),
    ],
)
def test_other_texts_are_named_and_not_tested(tmp_path, records, reason):
    a, b = (finished(tmp_path, name, seed) for name, seed in (("a", 0), ("b", 1)))
    told = evidence.paired_tests(*known(a, write(b, records)))
    assert len(told) == 2 and told[1].startswith("B - A  no paired test: ")
    assert re.search(reason, told[1])


def test_several_comparisons_are_said_not_to_be_corrected(tmp_path):
    runs, predictions = known(*(finished(tmp_path, f"r{i}", i) for i in range(3)))
    told = evidence.paired_tests(runs, predictions)
    assert len(told) == 6 and "not corrected for these 4 comparisons" in told[-1]
    one = predictions | {"C": "none"}
    assert "not corrected for these 2 comparisons" in evidence.paired_tests(runs, one)[-1]
    for run in runs.values():
        run.history.start["positive_label"] = None
    told = evidence.paired_tests(runs, one)
    assert [line[:5] for line in told[1:]] == ["B - A", "C - A"]  # a single test, and why no other


def test_why_there_are_no_intervals_is_said(tmp_path):
    run = finished(tmp_path, "a", 0)
    (run / "predictions" / "validation.jsonl").unlink()
    runs, predictions = known(run)
    assert all("[" not in row[1] for row in evidence.scores(runs, predictions, "validation"))
    told = evidence.remarks(runs, {"validation": predictions})
    why = "A has no intervals on validation: predictions/validation.jsonl: no such file."
    assert told == [why]
