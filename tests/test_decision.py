"""Temperature and threshold: the best of their kind on validation, and blind to the test set."""

import json

import numpy as np
import pytest
import tiny
from sklearn.metrics import f1_score, log_loss

import decision
from decision import PLAIN, Decision, Inference, fit, fit_temperature, fit_threshold
from errors import Refusal
from metrics import calibration_error, softmax

RNG = np.random.default_rng(0)


def simulated(n: int, scale: float = 1.0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from softmax(logits), and the logits times `scale`."""
    logits = RNG.normal(size=(n, classes)) * 2
    drawn = np.array([RNG.choice(classes, p=p) for p in softmax(logits)])
    return drawn, logits * scale


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_a_scale_of_calibrated_logits(scale):
    labels, logits = simulated(20_000, scale, classes=3)
    assert fit_temperature(labels, logits) == pytest.approx(scale, rel=0.05)


def test_no_other_temperature_has_less_loss_and_it_lowers_the_calibration_error():
    labels, logits = simulated(500, 3.0)
    found = fit_temperature(labels, logits)
    loss = log_loss(labels, softmax(logits / found))
    others = found * np.exp(np.linspace(-0.5, 0.5, 101))
    assert all(log_loss(labels, softmax(logits / t)) >= loss - 1e-9 for t in others)
    before, after = (calibration_error(softmax(logits / t), labels) for t in (1.0, found))
    assert after < before / 2, "control: 1 is not the best"


@pytest.mark.parametrize("score", ["f1_macro", "f1_positive"])
def test_no_other_threshold_has_a_higher_f1(score):
    is_positive = RNG.random(300) < 0.2
    scores = np.round(np.clip(RNG.normal(0.3 + 0.1 * is_positive, 0.2), 0, 1), 2)  # with ties

    def value(threshold: float) -> float:
        average = {"f1_macro": "macro", "f1_positive": "binary"}[score]
        return f1_score(is_positive, scores >= threshold, average=average, zero_division=0)

    found = fit_threshold(is_positive, scores, score)
    every = np.unique(np.concatenate([scores, [0, 1.1]]))
    assert value(found) == pytest.approx(max(map(value, every)))
    assert value(0.5) < value(found), "control: one half is not the best here"


def test_of_equal_thresholds_the_nearest_to_one_half_is_taken():
    scores = np.array([0.1, 0.2, 0.8, 0.9])
    assert fit_threshold(np.array([False, False, True, True]), scores) == pytest.approx(0.5)


def test_labels_follow_from_threshold_or_argmax():
    logits = np.log(np.array([[0.7, 0.3], [0.55, 0.45], [0.1, 0.9]]))
    assert PLAIN.predict(PLAIN.probabilities(logits)).tolist() == [0, 0, 1]
    low = Decision(1.0, 0.4, positive=1)
    assert low.predict(low.probabilities(logits)).tolist() == [0, 1, 1]
    other_way = Decision(1.0, 0.4, positive=0)
    assert other_way.predict(other_way.probabilities(logits)).tolist() == [0, 0, 1]
    hot = Decision(2.0)
    assert np.allclose(hot.probabilities(logits), softmax(logits / 2))


def test_three_classes_have_no_threshold_and_what_cannot_be_fitted_is_plain():
    labels, logits = simulated(100, 2.0, classes=3)
    assert fit(labels, logits, None).threshold is None
    two = np.zeros((4, 2))
    assert fit(np.array([0, 0, 0, 0]), two, 1) == PLAIN, "no example of a class"
    assert fit(np.array([0, 1, 0, 1]), two + np.nan, 1) == PLAIN


@pytest.mark.parametrize("score", ["f1_macro", "f1_positive"])
def test_on_validation_it_is_never_worse_than_argmax(score):
    """Cuts call some text positive always; where argmax calls none so, that may be better."""
    rng, better = np.random.default_rng(5), 0
    for kind in ("constant", "tied", "flat", "reversed") * 10:
        labels = (rng.random(60) < 0.2).astype(np.int64)
        labels[:2] = 0, 1
        noise = rng.normal(size=60)
        margin = {
            "constant": np.full(60, -1.0),
            "tied": np.where(noise > 0, 0.5, -0.5),
            "flat": -1 + 0.01 * noise,
            "reversed": noise - 2.0 * labels,
        }[kind]
        logits = np.stack([-margin, margin], axis=1)
        found = fit(labels, logits, 1, score)
        assert np.isfinite([found.temperature, found.threshold]).all()
        average = {"f1_macro": "macro", "f1_positive": "binary"}[score]
        by_threshold, by_argmax = (
            f1_score(labels, predicted, average=average, zero_division=0)
            for predicted in (found.predict(found.probabilities(logits)), logits.argmax(1))
        )
        assert by_threshold >= by_argmax - 1e-12, kind
        better += by_threshold > by_argmax
    assert better, "control: here and there it is better"


def test_validation_without_an_error_says_nothing_of_the_temperature():
    labels = np.arange(30) % 2
    logits = np.eye(2)[labels] * RNG.uniform(1, 3, size=(30, 1))
    assert fit_temperature(labels, logits) == 1.0
    logits[0] = logits[0, ::-1]
    assert fit_temperature(labels, logits) != 1.0, "control: one error"


SOUND = Inference(["0", "1"], "1", 128, "head_tail", "fp32", 1.5, 0.4)


def test_what_is_stored_is_read_back(tmp_path):
    assert decision.read(tmp_path) is None
    (tmp_path / decision.FILE).write_text(decision.as_json(SOUND))
    assert decision.read(tmp_path) == SOUND
    assert decision.read(tmp_path).decision == Decision(1.5, 0.4, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["0"]},
        {"labels": "01"},
        {"labels": 3},
        {"labels": ["a", "b", "c"], "positive_label": "a"},
        {"positive_label": "2"},
        {"positive_label": None},
        {"max_length": 0},
        {"max_length": 3},
        {"max_length": True},
        {"truncation": "middle"},
        {"precision": "fp8"},
        {"temperature": 0},
        {"temperature": "1"},
        {"temperature": 1e-320},
        {"threshold": 1.5},
        {"unknown": 1},
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, change):
    whole = json.loads(decision.as_json(SOUND))
    (tmp_path / decision.FILE).write_text(json.dumps(whole | change))
    with pytest.raises(Refusal) as refusal:
        decision.read(tmp_path)
    assert refusal.value.exit_code == 66


def test_a_file_that_the_manifest_lists_is_missed(tmp_path):
    (tmp_path / "manifest.json").write_text('{"config.json": {}}')
    assert decision.read(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"config.json": {}, "inference.json": {}}')
    with pytest.raises(Refusal, match=r"inference\.json: is gone"):
        decision.read(tmp_path)


def test_no_json_is_refused(tmp_path):
    for text in ("", "[]", "{", "3"):
        (tmp_path / decision.FILE).write_text(text)
        with pytest.raises(Refusal):
            decision.read(tmp_path)


# --- the test set ---------------------------------------------------------------------------------


def outcome(small, name: str, test) -> dict[str, object]:
    """What a run decides, and what it reports."""
    changes = {"run__name": name, "data__test": test, "data__leaks": "keep"}
    changes |= {"train__epochs": 12, "optimizer__lr": 3e-3, "evaluation__patience": ""}
    changes |= {"model__name": small / "model-without-dropout"}
    assert tiny.run(tiny.settings(small, **changes)) == 0
    run = small / "runs" / name
    final = json.loads((run / "results.json").read_text())
    decided = {n: v for n, v in final.items() if n not in ("test", "seconds")}
    files = {n: (run / "best" / n).read_bytes() for n in ("model.safetensors", decision.FILE)}
    predicted = (run / "predictions" / "test.jsonl").read_text().splitlines()
    said = [json.loads(line)["predicted"] for line in predicted]
    return {"decided": decided, "files": files, "said": said, "test": final["test"]}


def test_shuffled_test_labels_change_the_test_score_and_nothing_else(small):
    records = tiny.rows(60, seed=5)
    labels = [r["label"] for r in records]
    first = tiny.write_csv(small / "test-1.csv", records)
    moved = [
        r | {"label": label} for r, label in zip(records, labels[7:] + labels[:7], strict=True)
    ]
    second = tiny.write_csv(small / "test-2.csv", moved)
    one, two = outcome(small, "labels-1", first), outcome(small, "labels-2", second)
    assert one["files"] == two["files"] and one["decided"] == two["decided"]
    assert one["said"] == two["said"]
    assert one["test"]["f1_macro"] != two["test"]["f1_macro"], "control: the labels were others"


def test_the_test_set_is_scored_once_and_last(small, monkeypatch):
    import train

    sizes, evaluate = [], train.evaluate

    def counted(job, split, world):
        sizes.append(len(split))
        return evaluate(job, split, world)

    monkeypatch.setattr(train, "evaluate", counted)
    test = tiny.write_csv(small / "test-3.csv", tiny.rows(77, seed=6))
    outcome(small, "scored-once", test)
    assert sizes.count(77) == 1 and sizes[-1] == 77 and len(sizes) > 3
