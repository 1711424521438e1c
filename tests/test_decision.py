"""Temperature and threshold: the best of their kind on validation, and blind to the test set."""

import json

import numpy as np
import pytest
import tiny
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

import bootstrap
import decision
import diagnostics
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


AVERAGES = {"f1_macro": "macro", "f1_positive": "binary"}


def drawn(rng, n: int, share: float = 0.25, gap: float = 1.0, lift: float = 0.0):
    """Labels, and probabilities that are `gap` apart in log-odds, both moved by `lift`."""
    is_positive = rng.random(n) < share
    is_positive[:2] = False, True
    odds = rng.normal(size=n) + gap * (is_positive - 0.5) + lift
    return is_positive, 1 / (1 + np.exp(-odds))


def f1_at(is_positive, scores, cut: float, score: str = "f1_macro", weights=None) -> float:
    options = {"average": AVERAGES[score], "zero_division": 0, "sample_weight": weights}
    return f1_score(is_positive, scores >= cut, **options)


def highest(is_positive, scores) -> float:
    """The cut with the most F1 on these texts."""
    cuts = diagnostics.cuts(is_positive, scores)
    return cuts.thresholds[cuts.f1_macro.argmax()]


@pytest.mark.parametrize("score", AVERAGES)
def test_no_other_threshold_has_a_higher_expected_f1(score):
    """Each text as a positive and a negative one, weighted by scikit-learn's own probabilities."""
    is_positive, scores = drawn(np.random.default_rng(0), 200, gap=2.0, lift=-1.5)
    scores = np.round(scores, 2) + 0.005  # with ties
    n, positives = len(scores), is_positive.sum()
    target = np.where(is_positive, (positives + 1) / (positives + 2), 1 / (n - positives + 2))
    odds = np.log(scores / (1 - scores))[:, None]
    both, weights = np.tile(odds, (2, 1)), np.concatenate([target, 1 - target])
    labels = np.repeat([True, False], n)
    platt = LogisticRegression(C=1e9, tol=1e-9, max_iter=1000).fit(both, labels, weights)
    p = platt.predict_proba(odds)[:, 1]

    def expected(cut: float) -> float:
        return f1_at(labels, np.tile(scores, 2), cut, score, np.concatenate([p, 1 - p]))

    found = fit_threshold(is_positive, scores, score)
    assert expected(found) == pytest.approx(max(map(expected, np.unique(scores))), abs=1e-9)
    assert expected(0.5) < expected(found) - 0.01, "control: one half is not the best here"


@pytest.mark.parametrize("score", AVERAGES)
def test_of_many_texts_it_is_the_best_threshold(score):
    is_positive, scores = drawn(np.random.default_rng(1), 20_000, gap=2.0, lift=-3.0)
    some = np.quantile(scores, np.linspace(0.01, 0.99, 99))
    best = max(f1_at(is_positive, scores, cut, score) for cut in some)
    found = fit_threshold(is_positive, scores, score)
    assert f1_at(is_positive, scores, found, score) > best - 0.003
    assert f1_at(is_positive, scores, 0.5, score) < best - 0.1, "control"


def f1_of_all(cut: float, share: float = 0.25, gap: float = 1.0) -> float:
    """Macro-F1 over all texts that `drawn` may draw."""
    odds = np.log(cut / (1 - cut))
    called = np.array([norm.sf(odds + gap / 2), norm.sf(odds - gap / 2)])
    negative, positive = np.array([1 - share, share]) * called
    missed, kept = share - positive, 1 - share - negative
    return positive / (2 * positive + negative + missed) + kept / (2 * kept + negative + missed)


def test_of_few_texts_it_is_better_for_others_than_the_highest_f1():
    rng, gained = np.random.default_rng(2), []
    for _ in range(200):
        few = drawn(rng, 100)
        gained.append(f1_of_all(fit_threshold(*few) or 0.5) - f1_of_all(highest(*few)))
    error = np.std(gained) / np.sqrt(len(gained))
    assert np.mean(gained) > 0.005 and np.mean(gained) > 5 * error
    many, scores = drawn(rng, 200_000)
    assert f1_of_all(0.4) == pytest.approx(f1_at(many, scores, 0.4), abs=0.01), "control"


def test_it_lies_between_labels_that_the_scores_part():
    is_positive = np.arange(20) >= 12
    scores = np.where(is_positive, 0.7, 0.1) + np.arange(20) / 100
    assert 0.21 < fit_threshold(is_positive, scores) < 0.82
    probability = decision._platt(is_positive, scores)
    assert probability.min() > 0.005 and probability.max() < 0.995, "not infinitely sure"
    logits = np.log(np.stack([1 - scores, scores], axis=1))
    assert fit(is_positive.astype(int), logits, 1).threshold is None, "argmax is right already"


def test_scores_of_0_and_1_are_taken():
    is_positive, scores = drawn(np.random.default_rng(8), 300, gap=3.0, lift=-1.0)
    edge = np.where(scores < 0.04, 0.0, np.where(scores > 0.96, 1.0, scores))
    assert (edge == 0).any() and (edge == 1).any()
    assert fit_threshold(is_positive, edge) == pytest.approx(
        fit_threshold(is_positive, scores), abs=0.1
    )


def test_where_the_model_of_the_probability_is_wrong_the_counts_decide(monkeypatch):
    """3 % sure errors flatten the logistic curve until it finds no positive worth saying."""
    rng = np.random.default_rng(9)

    def some() -> tuple[np.ndarray, np.ndarray]:
        is_positive = rng.random(1000) < 0.05
        odds = np.where(is_positive, 4, -4) + rng.normal(size=1000)
        odds[(rng.random(1000) < 0.03) & ~is_positive] = 15
        return is_positive, 1 / (1 + np.exp(-odds))

    few, others = some(), some()
    assert f1_at(*others, fit_threshold(*few)) > f1_at(*others, 0.5) - 0.01
    no_difference = bootstrap.Difference(0.0, 0.0, 0.0, 1.0)
    monkeypatch.setattr(bootstrap, "paired", lambda *given: no_difference)
    assert f1_at(*others, fit_threshold(*few)) < 0.6, "control: without the counts"


def test_where_scores_do_not_rise_with_the_label_there_is_none():
    is_positive, scores = drawn(np.random.default_rng(3), 200, gap=-2.0, lift=-1.0)
    assert fit_threshold(is_positive, scores) is None
    assert fit_threshold(is_positive, np.full(200, 0.3)) is None
    assert fit_threshold(is_positive, 1 - scores) is not None, "control: the other way round"


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


def test_where_the_scores_tell_nothing_it_is_argmax():
    """Macro-F1 of coin flips is above that of one class, so any cut of noise would be taken."""
    rng, moved, draws = np.random.default_rng(5), {}, 300
    kinds = {
        "constant": lambda noise, labels: np.full(60, -1.0),
        "tied": lambda noise, labels: np.where(noise > 0, 0.5, -0.5),
        "flat": lambda noise, labels: -1 + 0.01 * noise,
        "reversed": lambda noise, labels: noise - 2.0 * labels,
        "told": lambda noise, labels: noise + 2.0 * labels - 2,
    }
    for name, margin_of in kinds.items():
        moved[name] = 0
        for _ in range(draws):
            labels = (rng.random(60) < 0.3).astype(np.int64)
            labels[:2] = 0, 1
            margin = margin_of(rng.normal(size=60), labels)
            found = fit(labels, np.stack([-margin, margin], axis=1), 1)
            assert np.isfinite(found.temperature)
            moved[name] += found.threshold is not None
    assert moved.pop("told") > 0.95 * draws, "control"
    assert moved["constant"] == moved["reversed"] == 0
    assert max(moved.values()) <= 0.04 * draws, "of 2.5 % at most"


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
