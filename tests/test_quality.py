"""Planted faults are named with exactly their rows, and a clean set has none."""

import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

import quality
from data import Finding, Split, Splits

Rows = list[dict[str, str]]
SIZES = {"train": 400, "validation": 120, "test": 120}
WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in ("r", "st", "lo", "ni", "ke")]


def clean(seed: int = 0) -> dict[str, Rows]:
    """Splits of different texts whose label is a matter of chance."""
    rng = random.Random(seed)
    made = {}
    for name, n in SIZES.items():
        made[name] = [
            {
                "text": " ".join(rng.choices(WORDS, k=rng.randint(8, 20))) + rng.choice(".!?"),
                "label": rng.choice("01"),
                "lang": "ab"[i % 2],
                "author": f"{name} {i // 3}",
            }
            for i in range(n)
        ]
    return made


def make_split(rows: Rows, *, grouped: bool = False) -> Split:
    langs = sorted({r["lang"] for r in rows})
    return Split(
        [r["text"] for r in rows],
        np.array([int(r["label"]) for r in rows]),
        np.arange(1, len(rows) + 1),
        {"lang": (np.array([langs.index(r["lang"]) for r in rows]), langs)},
        [r["author"] or f"\0row {i}" for i, r in enumerate(rows)] if grouped else [],
    )


def check(made: dict[str, Rows], *, grouped: bool = False) -> quality.Checked:
    splits = [make_split(made[name], grouped=grouped) for name in SIZES]
    return quality.check(Splits(*splits, ["0", "1"], 1, {}), seed=0)


def told(findings: list[Finding]) -> list[tuple[str, str, list[int]]]:
    assert all(f.message.isprintable() and f.message.startswith(f.split) for f in findings)
    return [(f.kind, f.split, f.rows) for f in findings]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("grouped", [False, True])
def test_a_clean_set_has_no_finding(seed, grouped):
    checked = check(clean(seed), grouped=grouped)
    assert checked.findings == []
    assert not any(near.any() for near in checked.is_near.values())
    assert {name: len(near) for name, near in checked.is_near.items()} == {
        "validation": 120,
        "test": 120,
    }


def put(text: str | Callable[[str], str], *, of=("train", 3), at=("train", 20), label=None):
    """A plant: row `at` gets a text, or one made of that of row `of`; and its label, or the other.

    Rows count from 1; label: 0 for the same as that of row `of`, 1 for the other.
    """

    def plant(made: dict[str, Rows]) -> None:
        source, row = made[of[0]][of[1] - 1], made[at[0]][at[1] - 1]
        row["text"] = text if isinstance(text, str) else text(source["text"])
        if label is not None:
            row["label"] = str(int(source["label"]) ^ label)

    return plant


def word_changed(text: str) -> str:
    words = text.split()
    return " ".join([*words[:4], "other", *words[5:]])


def dressed(text: str) -> str:
    return f"@somebody see HTTPS://t.co/a1B?x=2#y {text}"


def dressed_otherwise(text: str) -> str:
    return text.replace("somebody", "x_1").replace("HTTPS://t.co/a1B?x=2#y", "www.example.com")


ACROSS = {"at": ("test", 7)}
PLANTS = {
    "the same": ([put(str, label=0)], ("equal", "train", [20])),
    "the same in capitals": ([put(str.upper, label=0)], ("equal", "train", [20])),
    "other handles and links": (
        [put(dressed, at=("train", 3)), put(dressed_otherwise, label=0)],
        ("equal", "train", [20]),
    ),
    "the same with the other label": ([put(str, label=1)], ("contradictory", "train", [20])),
    "a word changed": ([put(word_changed, label=0)], ("near", "train", [20])),
    "in capitals without a dot": (
        [put(lambda t: t.upper()[:-1], label=1)],
        ("near", "train", [20]),
    ),
    "in validation and test": (
        [put(str, of=("validation", 9), **ACROSS, label=0)],
        ("equal", "test", [7]),
    ),
    "with two labels in validation and test": (
        [put(str, of=("validation", 9), **ACROSS, label=1)],
        ("contradictory", "test", [7]),
    ),
    "nearly in training": ([put(word_changed, **ACROSS)], ("near", "test", [7])),
    "nearly in validation": (
        [put(word_changed, of=("validation", 9), **ACROSS)],
        ("near", "test", [7]),
    ),
    "punctuation only": ([put("?!..."), put(" - ", at=("train", 9))], ("hollow", "train", [9, 20])),
    "nothing to be seen": ([put("\u200b\u00ad \u2060")], ("hollow", "train", [20])),
    "one character": ([put(" x ", **ACROSS), put("\u7b11")], None),
}


@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_fault_is_named_with_its_row_and_nothing_else_is(what):
    plants, expected = PLANTS[what]
    made = clean()
    for plant in plants:
        plant(made)
    several = [("hollow", "train", [20]), ("hollow", "test", [7])]
    assert told(check(made).findings) == ([expected] if expected else several)


def test_labels_that_differ_in_capitals_are_named_with_the_rows_of_the_rarer():
    split = make_split(clean()["train"][:6])
    labels = np.array([0, 1, 2, 2, 3, 2])
    split = dataclasses.replace(split, labels=labels)
    found = quality.like_labels(split, ["NO", "YES", "no", "yes"])
    assert found.rows == [1, 2] and "('NO' and 'no', 'YES' and 'yes')" in found.message
    assert quality.like_labels(split, ["no", "yes", "maybe", "never"]) is None


def test_rows_and_labels_of_the_other_text_are_told():
    made = clean()
    for plant in (put(word_changed, label=1), put(word_changed, at=("train", 30), label=0)):
        plant(made)
    [near, equal] = check(made).findings[::-1]
    assert near.message == (
        "train: 1 texts nearly equal an earlier one, directly or over others, "
        "1 of them with another label: rows 20 ~ 3"
    )
    assert equal.kind == "contradictory" and equal.message.endswith("rows 30 = 20")
    assert near.details == {"other_split": "train", "other_rows": [3], "other_label": 1}
    assert equal.details | {"exact": 1} == {
        "other_split": "train",
        "other_rows": [20],
        "other_label": 1,
        "exact": 1,
    }


def test_many_rows_are_counted_and_ten_are_listed():
    made = clean()
    for i in range(12):
        put(str if i < 5 else str.upper, at=("train", 100 + i), label=0)(made)
    [found] = check(made).findings
    assert found.count == 12 and found.rows == list(range(100, 112))
    assert found.details["exact"] == 5 and found.message.endswith("109 = 3, ...")


def test_the_texts_that_training_has_are_marked_the_nearly_equal_ones_too():
    made = clean()
    plants = [
        put(str, at=("test", 7)),
        put(word_changed, at=("test", 9)),
        put(str.upper, at=("validation", 2)),
    ]
    plants += [put(str, of=("validation", 50), at=("test", 60))]  # not in training
    for plant in plants:
        plant(made)
    checked = check(made)
    marked = {name: (np.flatnonzero(near) + 1).tolist() for name, near in checked.is_near.items()}
    assert marked == {"validation": [2], "test": [7, 9]}
    assert checked.report["test"] == {"near_training": 2}
    near = [f for f in checked.findings if f.kind == "near" and f.details["other_split"] == "train"]
    assert told(near) == [("near", "test", [9])], "the equal ones are data.leaks"


# --- groups ---------------------------------------------------------------------------------------


def test_a_group_in_two_splits_is_named():
    made = clean()
    made["test"][6]["author"] = made["test"][90]["author"] = made["train"][0]["author"]
    made["validation"][1]["author"] = made["train"][1]["author"] = ""  # of no group
    assert told(check(made, grouped=True).findings) == [("groups", "test", [7, 91])]
    assert "(1: train 0)" in check(made, grouped=True).findings[0].message
    assert check(made).findings == []  # control: without data.group_column


def test_texts_of_one_group_may_be_alike_within_a_split():
    made = clean()
    put(word_changed, of=("train", 1), at=("train", 2), label=1)(made)
    assert made["train"][0]["author"] == made["train"][1]["author"]
    assert check(made, grouped=True).findings == []
    assert told(check(made).findings) == [("near", "train", [2])]  # control
    made = clean()
    put(word_changed, of=("train", 8), at=("test", 7))(made)
    assert told(check(made, grouped=True).findings) == [("near", "test", [7])]  # but not across


# --- encoding -------------------------------------------------------------------------------------

ACCIDENTS = {
    "replacement characters": ["caf\ufffd", "caf\ufffd".encode().decode("latin-1")],
    "HTML entities": ["you &amp; me", "&QUOT;yes&quot;", "it&#39;s", "&#x2019;", "a&nbsp;b"],
    "control characters": ["a\x00b", "\x1b[31mred", "a\x85b", "in\ufeffside"],
    "escapes": [r"one\ntwo", r"caf\u00e9", r"caf\xc3\xa9", r"he said \"no\""],
}
FINE = ["MANH\u00c3", "\u00abIRM\u00c3\u00bb", "\u201eSpa\u00df\u201c", "voil\u00e0\u2026\u201d"]
FINE += ["\u00af\\_(\u30c4)_/\u00af", "AT&T; R&D", "\u00d1and\u00fa", "\u00d8rsted, \u00c2nge"]
FINE += [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 :\\ \\o/",
    "a\tb\r\nc",
    "\u0645\u064e\u0632\u062d",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u00bf\u00a1ya!?",
]
WORDS_DECODED = [
    "caf\u00e9",
    "n\u00e3o",
    "\u00c9t\u00e9",
    "it\u2019s",
    "\u201cyes\u201d",
    "\u0448\u0443\u0442\u043a\u0430",
    "\u0645\u0632\u062d\u0629",
    "\U0001f602",
    "5\u20ac",
    "\u00bfqu\u00e9?",
]
WRONG = [word.encode().decode("latin-1") for word in WORDS_DECODED]
WRONG += [
    word.encode().decode("cp1252")
    for word in WORDS_DECODED
    if word.isalpha() and word[0] < "\u0400"
]


@pytest.mark.parametrize("kind", ACCIDENTS)
def test_each_accident_of_encoding_is_counted_by_its_kind(kind):
    for text in ACCIDENTS[kind]:
        made = clean()
        made["test"][4]["text"] += f" {text}"
        [found] = check(made).findings
        assert (found.kind, found.split, found.rows) == ("encoding", "test", [5]), text
        assert found.details[kind] == 1, text


@pytest.mark.parametrize("text", WRONG)
def test_utf8_read_as_something_else_is_found(text):
    split = make_split([r | {"text": f"so {text} it is"} for r in clean()["test"][:1]])
    found = quality.accidents("test", split)
    assert found and found.details["text decoded wrongly"] == 1


@pytest.mark.parametrize("text", [*FINE, *WORDS_DECODED])
def test_what_people_write_is_no_accident(text):
    split = make_split([r | {"text": text} for r in clean()["test"][:1]])
    assert quality.accidents("test", split) is None
    assert (quality.hollow_texts("test", split) is None) == (len(text) > 1)


# --- what cannot be scored ------------------------------------------------------------------------


def test_labels_with_few_texts_and_slices_that_lack_one_are_named():
    made = clean()
    for i, row in enumerate(made["validation"]):
        row["label"] = "1" if i < 9 else "0"
    for i, row in enumerate(made["test"]):
        row["lang"] = "c" if i in (5, 8) else row["lang"]
        row["label"] = "0" if row["lang"] == "b" else row["label"]
    labels, slices = check(made).findings
    assert told([labels]) == [("few_labels", "validation", list(range(1, 10)))]
    assert labels.message.endswith("1 labels have fewer than 10 texts: '1' has 9")
    assert slices.count == 61 and slices.split == "test" and slices.details == {"slices": 2}
    assert "lang 'b' (59 texts, 1 of 2 labels), lang 'c' (2 texts" in slices.message
    made["train"][0]["lang"] = "d"
    (_, unseen, _) = check(made).findings
    assert unseen.message.endswith("too small to score well: lang 'd' (none, but in training)")
    assert (unseen.split, unseen.count, unseen.details) == ("validation", 0, {"slices": 1})
    made["train"][0]["lang"] = "a"
    made["validation"][9]["label"] = "1"
    assert told(check(made).findings) == told([slices]), "ten are enough"


# --- what tokens tell -----------------------------------------------------------------------------


def test_cut_texts_and_unknown_tokens_are_counted_and_told_where_they_are_many():
    offsets = np.concatenate([[0], np.cumsum([3] * 18 + [9, 10])])
    split = SimpleNamespace(offsets=offsets, ids=np.full(offsets[-1], 7), rows=np.arange(101, 121))
    fine = quality.check_tokens("test", split, room=9, unknown=None)
    assert fine.findings == []
    assert fine.report == {"cut": 1, "cut_share": 0.05, "unknown_share": 0.0}
    assert quality.check_tokens("test", split, room=8, unknown=4).findings == []  # 10 %
    [cut] = quality.check_tokens("test", split, room=2, unknown=4).findings
    assert (cut.kind, cut.count, cut.rows[:2]) == ("cut", 20, [101, 102])
    split.ids[[0, 2, 72]] = 4  # two of the first text, one of the last
    [unknown] = quality.check_tokens("test", split, room=9, unknown=4).findings
    assert (unknown.kind, unknown.count, unknown.rows) == ("unknown", 2, [101, 120])
