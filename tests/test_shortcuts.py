"""A label that can be told without reading is told; one that is only hinted at is a number."""

import random
from dataclasses import replace

import numpy as np
import pytest

import shortcuts
from data import Split
from shortcuts import giveaways, surface

WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in ("r", "st", "lo", "ni", "ke")]
NAMES = ["joke", "other"]


def make_split(n: int, seed: int, change=lambda text, label, i, rng: text, classes: int = 2):
    """A split of random texts; `change` makes a text of one, its label, place and a generator."""
    rng = random.Random(seed)
    labels = [rng.randrange(classes) for _ in range(n)]
    texts = [
        change(" ".join(rng.choices(WORDS, k=rng.randint(6, 20))), label, i, rng)
        for i, label in enumerate(labels)
    ]
    slices = {"lang": (np.arange(n) % 2, ["en", "pt"])}
    return Split(texts, np.array(labels), np.arange(1, n + 1), slices, [])


def measured(change, n: int = 300, classes: int = 2):
    names = [str(k) for k in range(classes)]
    splits = make_split(1000, 0, change, classes), make_split(n, 1, change, classes)
    return surface(*splits, names, seed=0)


# --- length and punctuation -----------------------------------------------------------------------

SHAPES = {
    "mark": lambda t, label, i, rng: f"{t}{'!' if rng.random() < (0.9, 0.1)[label] else '.'}",
    "length": lambda t, label, i, rng: f"{t} {t}" if label else t,
    "capitals": lambda t, label, i, rng: t.capitalize() if label else t,
    "emoji": lambda t, label, i, rng: f"{t} \U0001f602" if label else t,
    "links": lambda t, label, i, rng: f"{t} http://a.b" if label else t,
    "digits": lambda t, label, i, rng: f"{t} 5" if label else t,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_that_tells_the_label_is_found(shape):
    report, found = measured(SHAPES[shape])
    assert report["balanced_accuracy"] > 0.8 and report["chance"] == 0.5
    assert found.kind == "surface" and f"{report['balanced_accuracy']:.2f}" in found.message


def test_a_hint_is_a_number_and_no_finding():
    def hint(text, label, i, rng):
        return f"{text}{'!' if rng.random() < (0.7, 0.3)[label] else '.'}"

    report, found = measured(hint)
    assert 0.63 < report["balanced_accuracy"] < 0.75 and found is None


@pytest.mark.parametrize("n", [3, 10, 30, 300])
def test_chance_is_no_finding_however_few_the_texts(n):
    for seed in range(20):
        train, few = make_split(300, seed), make_split(n, 1000 + seed)
        assert surface(train, few, NAMES, seed=0)[1] is None


def test_a_slice_in_which_it_tells_is_named():
    def change(text, label, i, rng):
        return text + ("!" if label else ".") if i % 2 else text + rng.choice("!.")

    report, found = measured(change)
    assert 0.6 < report["balanced_accuracy"] < 0.75 and found
    assert (
        found.message.endswith(" where lang is 'pt' (chance 0.50)") and "'en'" not in found.message
    )


@pytest.mark.parametrize("few", [20, 40])
def test_a_slice_of_few_texts_tells_nothing(few):
    def change(text, label, i, rng):
        return text + ("!."[label] if i < few else rng.choice("!."))

    held = make_split(300, 1, change)
    held = replace(held, slices={"lang": ((np.arange(300) >= few).astype(int), ["a", "b"])})
    train = make_split(1000, 0, lambda text, label, i, rng: text + "!."[label])
    found = surface(train, held, NAMES, seed=0)[1]
    assert bool(found) == (few == 40), "control: of forty texts it is told"


def test_more_labels_than_two_and_a_split_without_one():
    report, found = measured(lambda t, label, i, rng: t + "?!.,"[label], classes=4)
    assert report["balanced_accuracy"] == 1 and report["chance"] == 0.25 and found
    train, one_sided = make_split(300, 0), make_split(1, 1)
    assert surface(train, one_sided, NAMES, seed=0)[0]["balanced_accuracy"] is None


# --- words ----------------------------------------------------------------------------------------


def told(change, names=NAMES, n: int = 600) -> list[str]:
    found = giveaways(make_split(n, 0, change), names, seed=0)
    return found.details["words"] if found else []


def with_word(word: str, share: float, elsewhere: float = 0.0):
    """Texts of label 0 have a word with probability `share`, others with `elsewhere`."""

    def change(text, label, i, rng):
        return f"{word} {text}" if rng.random() < (share, elsewhere)[label] else text

    return change


LEAKS = [
    ("#sarcasm", 0.10, 0.0, "#sarcasm"),
    ("joke", 0.10, 0.002, "joke"),
    ("(JOKE)", 0.10, 0.0, "joke"),
    ("label: joke", 0.10, 0.0, "joke"),
    ("[laughter]", 0.5, 0.01, "laughter"),
    ("\u7b11\u8bdd\uff1a", 0.5, 0.0, "\u7b11\u8bdd"),
]


@pytest.mark.parametrize("word, share, elsewhere, name", LEAKS)
def test_a_word_that_gives_the_label_away_is_found_with_its_rows(word, share, elsewhere, name):
    train = make_split(600, 0, with_word(word, share, elsewhere))
    found = giveaways(train, NAMES, seed=0)
    assert name in found.details["words"]
    with_it = [i + 1 for i, t in enumerate(train.texts) if t.startswith(word)]
    assert found.count == len(with_it) and found.rows == with_it
    assert f"'{name}'" in found.message and "of 'joke')" in found.message


FAIR = [
    ("#sarcasm", 0.3, 0.1),
    ("joke", 0.3, 0.1),
    ("joke", 0.02, 0.0),
    ("tram", 0.15, 0.0),  # a topic, in few of the texts
    ("tram", 0.9, 0.1),
    ("other", 0.1, 0.0),  # another label's name
]


@pytest.mark.parametrize("word, share, elsewhere", FAIR)
def test_a_word_that_only_hints_is_not_found(word, share, elsewhere):
    assert told(with_word(word, share, elsewhere)) == []


def test_numbers_as_labels_are_looked_for_too():
    def change(text, label, i, rng):
        return f"label: {label} {text}"

    assert told(change, ["0", "1"]) == ["0", "1"]
    assert told(lambda text, *_: text, ["0", "1"]) == []  # control


@pytest.mark.parametrize("n", [20, 60, 2000])
def test_random_words_give_nothing_away(n):
    for seed in range(10):
        assert giveaways(make_split(n, seed), NAMES, seed=0) is None


def one_of_few(jokes: int, with_word: int, others: int):
    """giveaways of a few texts, some of which have a word that no other text has."""
    texts = [f"w{i} {'tram' if i < with_word else 'soup'}" for i in range(jokes)]
    texts += [f"w{i} soup" for i in range(jokes, jokes + others)]
    labels = np.arange(jokes + others) >= jokes
    split = Split(texts, labels.astype(int), np.arange(1, len(texts) + 1), {}, [])
    return giveaways(split, NAMES, seed=0)


def test_few_texts_prove_nothing():
    assert one_of_few(jokes=20, with_word=10, others=60)
    assert one_of_few(jokes=18, with_word=9, others=60) is None
    assert one_of_few(jokes=20, with_word=10, others=30) is None


def test_of_many_texts_a_sample_is_looked_at_and_all_rows_are_counted(monkeypatch):
    train = make_split(600, 0, with_word("#sarcasm", 1.0))
    whole = giveaways(train, NAMES, seed=0)
    looked_at = []
    words = shortcuts._words
    monkeypatch.setattr(shortcuts, "_words", lambda text: looked_at.append(text) or words(text))
    monkeypatch.setattr(shortcuts, "SAMPLE", 200)
    assert giveaways(train, NAMES, seed=0).rows == whole.rows and whole.count > 250
    assert len(looked_at) == 200 + len(NAMES) + 600
    assert surface(train, train, NAMES, seed=0)[0]["texts"] == 200
