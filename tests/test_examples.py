"""The bundled sample is varied and honest: no shared phrases, no tell-tale shape, room to learn."""

import csv
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import baselines

FOLDER = Path(__file__).parent.parent / "examples"
SPLITS = ("train", "validation", "test")
UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")  # Thai, Japanese, Chinese
MARKS = ".,;:!?\"\u2026\u00ab\u00bb\u201c\u201d\u2014-()'"  # and their like elsewhere:
MARKS += "\u0964\u061f\u060c\u3002\uff0c\uff01\uff1f\uff1a"


@pytest.fixture(scope="module")
def sample() -> dict[str, list[dict[str, str]]]:
    result = {}
    for split in SPLITS:
        with open(FOLDER / f"{split}.csv", encoding="utf-8", newline="") as file:
            result[split] = list(csv.DictReader(file))
    return result


def phrases(text: str) -> set[str]:
    """Every five words in a row, or eight characters where words are not spaced."""
    text = text.casefold()
    if len(UNSPACED.findall(text)) > 0.3 * len(text):
        units, n = list(re.sub(r"[\W_]+", "", text)), 8
    else:
        units, n = re.findall(r"[\w\u0900-\u097f']+", text), 5
    return {" ".join(units[i : i + n]) for i in range(len(units) - n + 1)}


def repeated(texts: list[str]) -> list[str]:
    counts = Counter(p for text in texts for p in phrases(text))
    return [p for p, n in counts.items() if n > 1]


def test_it_is_large_varied_and_about_a_third_humorous(sample):
    rows = [r for split in SPLITS for r in sample[split]]
    assert len(rows) >= 1200 and all(set(r) == {"text", "label", "lang"} for r in rows)
    for split in SPLITS:
        languages = Counter(r["lang"] for r in sample[split])
        assert len(languages) >= 8
        for language in languages:
            labels = [r["label"] for r in sample[split] if r["lang"] == language]
            assert 0.25 < labels.count("1") / len(labels) < 0.36, (split, language)
    scripts = {"Latin": r"[a-z]", "Cyrillic": r"[\u0400-\u04ff]", "Arabic": r"[\u0600-\u06ff]"}
    scripts |= {"Devanagari": r"[\u0900-\u097f]", "Han": r"[\u4e00-\u9fff]"}
    for name, letters in scripts.items():
        assert sum(bool(re.search(letters, r["text"])) for r in rows) > 100, name


def test_no_two_texts_share_a_phrase(sample):
    texts = [r["text"] for split in SPLITS for r in sample[split]]
    assert repeated(texts) == []
    control = [*texts, " ".join(texts[0].split()[:6]) + " and so it goes"]
    if len(texts[0].split()) > 5:
        assert repeated(control), "control: a borrowed phrase is found"
    assert repeated([texts[0], texts[0]])


def shape(text: str) -> list[float]:
    """What can be seen without reading: length, words, punctuation, capitals, digits."""
    n = len(text)
    counted = [float(text.count(mark)) for mark in MARKS]
    ratios = [sum(c.isupper() for c in text) / n, sum(c.isdigit() for c in text) / n]
    return [n, len(text.split()), n / len(text.split()), *counted, *ratios]


def test_length_punctuation_and_capitals_do_not_give_the_label_away(sample):
    rows = [r for split in SPLITS for r in sample[split]]
    features = np.array([shape(r["text"]) for r in rows])
    labels = np.array([int(r["label"]) for r in rows])
    model = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(model, features, labels, cv=folds)
    assert f1_score(labels, predicted, average="macro") < 0.65
    told = np.column_stack([features, labels])  # control: a giveaway is noticed
    assert f1_score(labels, cross_val_predict(model, told, labels, cv=folds), average="macro") > 0.9


def test_tfidf_sees_each_label_however_few_of_many_texts_have_it(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_TRAIN", 20)
    labels = (np.arange(1000) < 2).astype(int)
    for seed in range(5):
        fitted = baselines.tfidf(
            [f"text {i}" for i in range(1000)], labels, {"v": ["text"]}, classes=2, seed=seed
        )
        assert fitted["v"].min() > 0


def test_tfidf_learns_something_and_not_everything(sample):
    train, test = sample["train"], sample["test"]
    fitted = baselines.tfidf(
        [r["text"] for r in train],
        np.array([int(r["label"]) for r in train]),
        {"test": [r["text"] for r in test]},
        classes=2,
        seed=42,
    )
    labels = [int(r["label"]) for r in test]
    assert 0.55 < f1_score(labels, fitted["test"].argmax(1), average="macro") < 0.80


def test_lines_are_plain(sample):
    for split in SPLITS:
        for a, b in pairwise(sample[split]):
            assert a["text"] == a["text"].strip() and a["text"].isprintable()
            assert a["text"] != b["text"]
