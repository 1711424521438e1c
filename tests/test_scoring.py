"""Final scores: intervals, worst slice, near duplicates left out, and a collapse with its cause."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import f1_score

import bootstrap
import metrics
import scoring
from corpus import TokenisedSplit
from decision import PLAIN, fit
from metrics import collapse_cause, logit_spread, only_class

RNG = np.random.default_rng(1)
N = 240


def split_of(labels: np.ndarray, is_near: np.ndarray | None = None) -> TokenisedSplit:
    n = len(labels)
    codes = (np.arange(n) % 3).astype(np.int32)
    return TokenisedSplit(
        ids=np.zeros(n, np.int32),
        offsets=np.arange(n + 1),
        labels=labels,
        rows=np.arange(1, n + 1),
        slices={"lang": (codes, ["ar", "en", "pt"])},
        baseline=np.full((n, 2), 0.5, np.float32),
        is_near=is_near,
    )


def job_of(split: TokenisedSplit) -> SimpleNamespace:
    corpus = SimpleNamespace(label_names=["0", "1"], train=split, validation=split)
    evaluation = SimpleNamespace(metric="f1_macro")
    return SimpleNamespace(corpus=corpus, positive=1, cfg=SimpleNamespace(evaluation=evaluation))


def data(near: int = 0) -> tuple[TokenisedSplit, np.ndarray]:
    """A split and logits; texts of pt are mostly wrong, the first `near` ones are all right."""
    rng = np.random.default_rng(0)
    labels = (rng.random(N) < 0.3).astype(np.int64)
    margin = np.where(labels == 1, 1.0, -1.0) + rng.normal(size=N)
    margin[2::3] *= -0.5
    margin[:near] = np.where(labels[:near] == 1, 5.0, -5.0)
    split = split_of(labels, np.arange(N) < near)
    return split, np.stack([np.zeros(N), margin], axis=1).astype(np.float32)


def test_intervals_are_the_bootstraps_over_all_and_over_each_slice():
    split, logits = data()
    found = scoring.final_scores(job_of(split), split, logits, PLAIN)
    predicted = logits.argmax(1)
    for name in ("f1_macro", "f1_positive"):
        scorer = bootstrap.scorer(name, 1)
        expected = bootstrap.interval(split.labels, predicted, 2, scorer)
        assert found["intervals"][name] == pytest.approx(expected)
        assert expected[0] < found[name] < expected[1]
        for code, value in enumerate(["ar", "en", "pt"]):
            members = split.slices["lang"][0] == code
            expected = bootstrap.interval(split.labels[members], predicted[members], 2, scorer)
            of_value = found["slices"]["lang"][value]
            assert of_value["intervals"][name] == pytest.approx(expected)


def test_a_score_that_all_resamples_share_has_no_interval():
    split, logits = data()
    job = job_of(split)
    right = scoring.intervals(job, split.labels, split.labels)
    assert set(right.values()) == {None}
    found = scoring.intervals(job, split.labels, logits.argmax(axis=1))
    assert None not in found.values(), "control"


def test_the_worst_slice_is_named_and_is_another_where_another_is_worse():
    split, logits = data()
    found = scoring.final_scores(job_of(split), split, logits, PLAIN)
    worst = found["worst"]["lang"]
    assert worst["value"] == "pt"
    assert worst["f1_macro"] == min(s["f1_macro"] for s in found["slices"]["lang"].values())
    assert any("worst lang: 'pt'" in line for line in scoring.split_lines("test", found))
    logits[:, 1][2::3] *= -1  # mostly right now
    logits[:, 1][0::3] *= -1
    assert (
        scoring.final_scores(job_of(split), split, logits, PLAIN)["worst"]["lang"]["value"] == "ar"
    )


def test_the_score_without_near_duplicates_is_that_of_the_others():
    split, logits = data(near=60)
    found = scoring.final_scores(job_of(split), split, logits, PLAIN)
    near = found["near_duplicates"]
    expected = f1_score(split.labels[60:], logits[60:].argmax(1), average="macro")
    assert near["texts"] == 60 and near["without"]["examples"] == N - 60
    assert near["without"]["f1_macro"] == pytest.approx(expected)
    assert near["without"]["f1_macro"] < found["f1_macro"], "control: they flattered it"
    split, logits = data()
    assert "near_duplicates" not in scoring.final_scores(job_of(split), split, logits, PLAIN)


def test_what_was_fitted_is_reported_beside_argmax():
    split, logits = data()
    logits[:, 1] = 3 * logits[:, 1] - 2
    job = job_of(split)
    decision = fit(split.labels, logits, 1)
    decided = scoring.final_scores(job, split, logits, decision)["decided"]
    predicted = decision.predict(decision.probabilities(logits))
    assert decided["f1_macro"] == pytest.approx(f1_score(split.labels, predicted, average="macro"))
    plain = scoring.score_split(job, split, logits)
    assert decided["f1_macro"] > plain["f1_macro"]
    assert decided["calibration_error"] < plain["calibration_error"]


def test_probabilities_that_tell_nothing_are_said_to():
    split, logits = data()
    for found, is_blunt in ((logits[:, ::-1], True), (logits, False)):
        decision = fit(split.labels, found, 1)
        lines = scoring.split_lines(
            "v", scoring.final_scores(job_of(split), split, found, decision)
        )
        assert any("tell next to nothing" in line for line in lines) == is_blunt


def test_a_split_without_a_label_has_neither_score(tmp_path):
    split, logits = data()
    decision = fit(split.labels, logits, 1)
    split = dataclasses.replace(split, labels=np.zeros_like(split.labels))
    found = scoring.final_scores(job_of(split), split, logits, decision)
    assert decision.threshold is not None
    assert found["f1_macro"] is None and found["decided"]["f1_macro"] is None
    assert not any("with the threshold" in line for line in scoring.split_lines("test", found))


def test_logits_that_are_not_finite_have_no_scores_and_no_crash():
    split, logits = data()
    logits[3] = np.nan
    found = scoring.final_scores(job_of(split), split, logits, fit(split.labels, logits, 1))
    assert found["f1_macro"] is None and "f1_macro" not in found["decided"]
    assert "n/a" in scoring.split_lines("test", found)[0]


# --- one class for all ----------------------------------------------------------------------------


def scores(margin: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    return metrics.score(labels, np.stack([np.zeros_like(margin), margin], axis=1), 1)


LABELS = (np.arange(N) % 4 == 0).astype(np.int64)


def test_one_class_for_all_is_named_with_the_cause_that_the_logits_show():
    flat = scores(-1 + 0.01 * RNG.normal(size=N), LABELS)
    ranking = scores(-4 + LABELS + 0.5 * RNG.normal(size=N), LABELS)
    noise = scores(-4 + RNG.normal(size=N) * 0.5, np.roll(LABELS, 1))
    assert [only_class(s) for s in (flat, ranking, noise)] == [0, 0, 0]
    assert "hardly differ" in collapse_cause(flat)
    assert "class_weights=balanced" in collapse_cause(ranking)
    assert "does not tell the classes apart" in collapse_cause(noise)


def test_no_collapse_where_both_are_predicted_or_nearly_all_texts_are_of_one():
    assert only_class(scores(LABELS - 0.5 + 0.1 * RNG.normal(size=N), LABELS)) is None
    rare = (np.arange(N) < 3).astype(np.int64)
    assert only_class(scores(np.full(N, -1.0), rare)) is None
    few = (np.arange(600) % 50 == 0).astype(np.int64)  # 2 % of the texts, but twelve
    assert only_class(scores(np.full(600, -1.0), few)) == 0
    one_found = np.full(600, -1.0)
    one_found[0] = 1.0
    assert only_class(scores(one_found, few)) is None
    assert only_class(scores(np.full(N, -1.0), LABELS)) == 0, "control"


def test_the_spread_of_logits_is_that_between_texts():
    logits = RNG.normal(size=(50, 3))
    assert logit_spread(logits + 7) == pytest.approx(logit_spread(logits))
    assert logit_spread(logits * 2) == pytest.approx(2 * logit_spread(logits))
    assert logit_spread(np.tile(logits[:1], (50, 1))) == pytest.approx(0)
    shifted = logits + RNG.normal(size=(50, 1))  # the same for all classes of a text: no difference
    assert logit_spread(shifted) == pytest.approx(logit_spread(logits))
