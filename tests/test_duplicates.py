"""Equal and nearly equal texts are found in any script, in linear work, however alike they are."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import duplicates
from data import normalised
from duplicates import GRAM, SIMILAR, Grams, alike

N = 100_000


def random_texts(n: int, seed: int, words: int = 20) -> list[list[str]]:
    """Texts as lists of words, from a vocabulary of 5,000."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(5000)]
    return [[vocabulary[i] for i in row] for row in rng.integers(5000, size=(n, words)).tolist()]


def linked_pairs(near: np.ndarray) -> int:
    """Links that make the clusters."""
    return len(near) - len(np.unique(near))


def a_word_changed(words: list[str], rng: random.Random) -> list[str]:
    at = rng.randrange(len(words))
    return [*words[:at], "changed", *words[at + 1 :]]


def a_few_characters(words: list[str], rng: random.Random) -> list[str]:
    text = list(" ".join(words))
    for _ in range(3):
        text[rng.randrange(len(text))] = "q"
    return ["".join(text)]


def a_word_more(words: list[str], rng: random.Random) -> list[str]:
    return [*words, "lol"]


def punctuation(words: list[str], rng: random.Random) -> list[str]:
    return [word + rng.choice(["", ",", "!", "..."]) for word in words]


CHANGES = (a_word_changed, a_few_characters, a_word_more, punctuation)


def test_planted_pairs_are_found_among_a_hundred_thousand_texts_and_no_others():
    texts, rng = random_texts(N, 0), random.Random(0)
    planted = [(i, CHANGES[k % 4]) for k, i in enumerate(rng.sample(range(N), 2000))]
    changed = [change(texts[i], rng) for i, change in planted]
    found = alike(" ".join(words) for words in [*texts, *changed])
    is_found = np.array([found.near[i] == found.near[N + k] for k, (i, _) in enumerate(planted)])
    for k, change in enumerate(CHANGES):
        assert is_found[k::4].mean() > 0.99, change
    assert linked_pairs(found.near) == is_found.sum(), "no false pair"
    assert found.comparisons < N
    assert linked_pairs(found.same) <= (is_found[3::4]).sum() * 0.01  # control: they are not equal


PILES = {
    "a number changes": lambda i, words: f"the same template whose number {i} changes for each one",
    "a few characters": lambda i, words: (
        f"{'all work and no play makes jack a dull boy ' * 2}{i:x}"
    ),
    "equal but for punctuation": lambda i, words: "dull boy" + "." * (i % 300) + "!" * (i // 300),
}


@pytest.mark.parametrize("pile", PILES)
def test_a_pile_of_texts_alike_is_one_cluster_and_linear_work(pile):
    found = alike(PILES[pile](i, None) for i in range(N))
    assert len(np.unique(found.near)) == 1
    assert found.comparisons < 3 * N  # all pairs would be 5,000,000,000


def test_texts_that_are_half_alike_are_no_pairs_and_linear_work():
    texts = [
        "what all of these have in common is a long beginning which " + " ".join(words)
        for words in random_texts(20_000, 1, words=10)
    ]
    found = alike(texts)
    assert linked_pairs(found.near) < 20
    assert (
        len(texts) < found.comparisons <= 2 * duplicates.BANDS * len(texts)
    )  # control: it was tempted


SCRIPTS = {"Latin": "az", "Cyrillic": "\u0430\u044f", "Arabic": "\u0628\u064a"}
SCRIPTS |= {"Devanagari": "\u0905\u0939", "Han": "\u4e00\u5000"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_word_changed_is_found_in_any_script(script):
    first, last = map(ord, SCRIPTS[script])
    rng, size = random.Random(0), 2 if script == "Han" else 5
    for _ in range(50):
        one, other = (
            ["".join(chr(rng.randint(first, last)) for _ in range(size)) for _ in range(15)]
            for _ in "ab"
        )
        changed = [*one[:7], other[7], *one[8:]]
        texts = [("" if script == "Han" else " ").join(words) for words in (one, changed, other)]
        found = alike(texts)
        assert found.near[0] == found.near[1] != found.near[2] and found.same[0] != found.same[1]


def test_texts_alike_only_far_from_both_ends_are_compared_by_their_ends():
    words = random_texts(3, 2, words=2000)
    head, middle, tail = (" ".join(w) for w in words)
    found = alike([head + middle + tail, head + tail, tail + middle + head, middle, head + middle])
    assert found.near[0] == found.near[1] and len(np.unique(found.near)) == 4


def test_what_is_too_short_for_an_n_gram_is_like_nothing_but_its_equals():
    found = alike(["", "!", "?", "abcd", "ABCD ", "abce", "", "a b", "ab"])
    assert found.near.tolist()[3] == found.near[4] and found.near[0] == found.near[6]
    assert len(np.unique(found.near)) == 7


# --- exactness ------------------------------------------------------------------------------------

LETTERS = st.text("ab\u0645\u4e00", min_size=GRAM, max_size=40)


@settings(max_examples=50, deadline=None)
@given(st.lists(LETTERS, min_size=2, max_size=8))
def test_similarity_is_that_of_the_sets(texts):
    raw = [text.encode() for text in texts]
    sets = [{b[i : i + GRAM] for i in range(len(b) - GRAM + 1)} for b in raw]
    lengths = np.array([len(b) for b in raw])
    stored = np.frombuffer(b"".join(raw), np.uint8)
    grams = Grams(stored, np.cumsum(lengths) - lengths, lengths - GRAM + 1)
    a, b = np.triu_indices(len(texts), 1)
    expected = [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in zip(a, b, strict=True)]
    assert grams.similarity(a, b).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("aA \uff21@b!\u4e00", max_size=8), max_size=12))
def test_equal_is_what_normalised_says_and_equal_texts_are_near(texts):
    found = alike(texts)
    for i, one in enumerate(texts):
        for j, other in enumerate(texts):
            is_same = normalised(one) == normalised(other)
            assert (found.same[i] == found.same[j]) == is_same
            assert found.near[i] == found.near[j] or not is_same


def test_the_chunks_change_nothing(monkeypatch):
    texts = [" ".join(words) for words in random_texts(300, 3)]
    texts += [f"{text[:-4]} or so" for text in texts[::3]]
    whole = alike(texts)
    monkeypatch.setattr(duplicates, "CHUNK", 150)
    cut = alike(texts)
    assert linked_pairs(whole.near) == 100 and whole.near.tolist() == cut.near.tolist()


def test_a_pair_is_found_if_its_similarity_is_high_enough():
    one, other = ("".join(words)[:104] for words in random_texts(2, 4, words=40))
    seen = set()
    for n in range(10, 100):  # characters in common
        texts = [one, one[:n] + other[n:]]
        sets = [{t[i : i + GRAM] for i in range(100)} for t in texts]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        if not SIMILAR <= jaccard < SIMILAR + 0.15:  # where the bands may miss a pair
            near = alike(texts).near
            assert (near[0] == near[1]) == (jaccard >= SIMILAR), jaccard
            seen.add(round(jaccard - SIMILAR, 1))
    assert {-0.1, 0.2} <= seen
