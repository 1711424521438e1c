"""Scores equal scikit-learn's; a slice that lacks a class has none; the deciding metric by name."""

import math

import numpy as np
import pytest
from sklearn import metrics as sk
from torch.utils.data import DistributedSampler

from metrics import calibration_error, parse_metric, score, score_slices, select, softmax

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("positive", [0, 1])
def test_binary_scores_equal_scikit_learns(positive):
    labels, logits = RNG.integers(0, 2, 200), RNG.normal(size=(200, 2)).astype(np.float32)
    ours, predicted = score(labels, logits, positive), logits.argmax(1)
    p = softmax(logits)
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "f1_macro": sk.f1_score(labels, predicted, average="macro"),
        "f1_weighted": sk.f1_score(labels, predicted, average="weighted"),
        "f1_positive": sk.f1_score(labels, predicted, pos_label=positive),
        "precision": sk.precision_score(labels, predicted, pos_label=positive),
        "recall": sk.recall_score(labels, predicted, pos_label=positive),
        "mcc": sk.matthews_corrcoef(labels, predicted),
        "roc_auc": sk.roc_auc_score(labels == positive, p[:, positive]),
        "average_precision": sk.average_precision_score(labels == positive, p[:, positive]),
        "loss": sk.log_loss(labels, p),
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert ours["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    assert ours["predicted_share"] == pytest.approx([(predicted == c).mean() for c in (0, 1)])


def test_scores_of_several_classes_equal_scikit_learns():
    labels, logits = RNG.integers(0, 4, 300), RNG.normal(size=(300, 4))
    ours, predicted = score(labels, logits, None), logits.argmax(1)
    assert ours["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert ours["recall"] == pytest.approx(sk.recall_score(labels, predicted, average="macro"))
    auc = sk.roc_auc_score(labels, softmax(logits), multi_class="ovr")
    assert ours["roc_auc"] == pytest.approx(auc) and ours["f1_positive"] is None


def test_control_counting_some_texts_twice_changes_the_scores():
    labels, logits = RNG.integers(0, 2, 7), RNG.normal(size=(7, 2))
    rows = [i for r in range(4) for i in DistributedSampler(range(7), 4, r, shuffle=False)]
    assert len(rows) == 8
    assert score(labels, logits, 1)["accuracy"] != score(labels[rows], logits[rows], 1)["accuracy"]


def test_calibration_error_of_known_cases():
    always = np.tile([0.75, 0.25], (100, 1))
    assert calibration_error(always, np.repeat([0, 1], [75, 25])) == pytest.approx(0)
    assert calibration_error(always, np.repeat([0, 1], [50, 50])) == pytest.approx(0.25)


def test_a_slice_without_a_class_has_no_scores_that_need_it():
    labels, logits = np.array([0, 1, 0, 0]), np.eye(2)[[0, 1, 1, 0]]
    slices = score_slices(labels, logits, 1, {"lang": (np.array([0, 0, 1, 1]), ["en", "pt"])})
    assert slices["lang"]["en"]["f1_macro"] == 1.0
    assert slices["lang"]["pt"]["f1_macro"] is None and slices["lang"]["pt"]["roc_auc"] is None
    assert slices["lang"]["pt"]["accuracy"] == 0.5 and slices["lang"]["pt"]["examples"] == 2


@pytest.mark.parametrize("logits", [np.zeros((0, 2)), np.array([[np.nan, 1.0], [0.0, 1.0]])])
def test_no_texts_or_broken_logits_give_no_scores(logits):
    scores = score(np.zeros(len(logits), dtype=int), logits, 1)
    assert scores["f1_macro"] is None and scores["loss"] is None


def test_the_deciding_value_by_name():
    by_lang = {"en": {"f1_macro": 0.9, "loss": 0.1}, "pt": {"f1_macro": 0.5, "loss": 0.4}}
    scores = {"f1_macro": 0.7, "loss": 0.2, "mcc": None, "slices": {"lang": by_lang}}
    by_lang["xx"] = {"f1_macro": None, "loss": 0.2}  # lacks a label
    assert select("f1_macro", scores) == 0.7 and select("loss", scores) == -0.2
    assert select("f1_macro/worst:lang", scores) == 0.5
    assert select("f1_macro/mean:lang", scores) == pytest.approx(0.7)
    assert select("loss/worst:lang", scores) == -0.4 and select("mcc", scores) == -math.inf
    by_lang["xx"]["loss"] = None  # its logits are not finite
    for how in ("worst", "mean"):
        assert select(f"f1_macro/{how}:lang", scores) == -math.inf


@pytest.mark.parametrize("name", ["f1", "f1_macro/lang", "f1_macro/worst:", "f1_macro/best:lang"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="expected one of"):
        parse_metric(name)
