"""What is wrong with texts and labels: each check names the rows it finds, and changes nothing.

A finding is a line for the user with the first rows; what is normal, such as a label that length
hints at, is a number in the report alone. Shapes: N texts of a split, K labels.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

import duplicates
from data import KEPT, SHOWN, Finding, Split, Splits, listed, normalised
from errors import printable
from shortcuts import giveaways, surface

MIN_EXAMPLES = 10  # of a label or slice, below which its score is mostly chance
MAX_CUT = 0.1  # share of texts longer than data.max_length
MAX_UNKNOWN = 0.01  # share of tokens that the tokenizer does not know

# What UTF-8 becomes when it is read as Windows-1252 or Latin-1: a byte that begins a Cyrillic, an
# Arabic or an accented letter, then what no word has after it (0xBB would end a quotation in
# capitals); or the beginnings of quotation marks and the like, of emoji, of the byte order mark.
AFTER = "\x80-\xba\xbc-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2030\u20ac"
MOJIBAKE = f"[\xc2\xc3\xd0\xd1\xd8\xd9][{AFTER}\u2122]"
MOJIBAKE += "|\xe2[\x80\x82\u20ac\u201a]|\xf0[\x9f\u0178]|\xef\xbb\xbf"
ACCIDENTS = {
    "replacement characters": re.compile("\ufffd|\xef\xbf\xbd"),
    "text decoded wrongly": re.compile(MOJIBAKE),
    "HTML entities": re.compile(
        r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|#\d{2,7}|#x[\da-f]{2,6});", re.I
    ),
    "control characters": re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]"),
    "escapes": re.compile(r"\\(?:[nrt\"']|u[\da-fA-F]{4}|x[\da-fA-F]{2})"),
}


@dataclass(frozen=True)
class Checked:
    """What was found; counts by split for the report; evaluated split -> (N,) bool, see `check`."""

    findings: list[Finding]
    report: dict[str, dict[str, object]]
    is_near: dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """A split with its name and its places in `duplicates.Alike`."""

    name: str
    split: Split
    same: np.ndarray
    near: np.ndarray


def check(splits: Splits, *, seed: int) -> Checked:
    """All that texts and labels tell before they are tokenised; `seed` draws the samples.

    `is_near` of the result marks evaluated texts that training has, too, or nearly, directly or
    over texts of any split.
    """
    named, names = splits.named(), splits.label_names
    parts = _compared(named)
    train, *evaluated = parts
    is_near = {part.name: np.isin(part.near, train.near) for part in evaluated}
    found: list[Finding | None] = []
    for i, part in enumerate(parts):
        for other in parts[: i + 1]:
            found += [*equal_texts(part, other), near_texts(part, other)]
        found += [parted_groups(part, other) for other in parts[:i]]
    for name, split in named.items():
        found += [hollow_texts(name, split), accidents(name, split)]
    found.append(like_labels(splits.train, names))
    for part in evaluated:
        found += [few_labels(part.name, part.split, names), few_in_slices(part, splits.train)]
    report: dict[str, dict[str, object]] = {
        name: {"near_training": int(near.sum())} for name, near in is_near.items()
    }
    report["surface"], told = surface(splits.train, splits.validation, names, seed=seed)
    found += [told, giveaways(splits.train, names, seed=seed)]
    return Checked([f for f in found if f], report, is_near)


def _compared(named: dict[str, Split]) -> list[Part]:
    alike = duplicates.alike(chain.from_iterable(split.texts for split in named.values()))
    parts, end = [], 0
    for name, split in named.items():
        places = slice(end, end := end + len(split.texts))
        parts.append(Part(name, split, alike.same[places], alike.near[places]))
    return parts


def _finding(
    kind: str, name: str, what: str, rows: np.ndarray, told: Sequence[str] = (), **details: object
) -> Finding | None:
    """A finding of some rows, or None of none; `told`: how the first of them are written."""
    if not len(rows):
        return None
    kept = [int(row) for row in rows[:KEPT]]
    message = f"{name}: {len(rows):,} {what}: rows {listed(told or kept, len(rows))}"
    return Finding(kind, name, message, len(rows), kept, details)


# --- duplicates -----------------------------------------------------------------------------------


def _mates(part: Part, other: Part, by: str) -> np.ndarray:
    """The first text of `other` with each text's number, (N,), -1 for none; itself is none."""
    wanted, there = getattr(part, by), getattr(other, by)
    numbers, first = np.unique(there, return_index=True)
    at = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    mates = np.where(numbers[at] == wanted, first[at], -1)
    if other is part:
        mates[mates == np.arange(len(mates))] = -1
    return mates


def _pairs(kind: str, what: str, part: Part, other: Part, mates: np.ndarray) -> Finding | None:
    """A finding of the texts of `part` that have a mate in `other`, with the mates' rows."""
    places = np.flatnonzero(mates >= 0)
    sign = "~" if kind == "near" else "="
    rows, others = part.split.rows[places], other.split.rows[mates[places]]
    told = [f"{a} {sign} {b}" for a, b in zip(rows[:SHOWN], others[:SHOWN], strict=True)]
    details = {"other_split": other.name, "other_rows": others[:KEPT].tolist()}
    odd = int((part.split.labels[places] != other.split.labels[mates[places]]).sum())
    if odd and kind == "near":
        what += f", {odd:,} of them with another label"
    return _finding(kind, part.name, what, rows, told, other_label=odd, **details)


def _earlier(part: Part, other: Part) -> str:
    return "an earlier one" if part is other else f"one in {other.name}"


def equal_texts(part: Part, other: Part) -> Iterator[Finding | None]:
    """Texts that equal one of `other`, or an earlier one of the same part, after normalisation.

    Between training and what is evaluated they are data.leaks, which `data` tells.
    """
    if other is not part and other.name == "train":
        return
    mates = _mates(part, other, "same")
    is_other = part.split.labels != other.split.labels[mates]
    what = f"texts equal {_earlier(part, other)}"
    agreeing = np.where(is_other, -1, mates)
    if found := _pairs("equal", what, part, other, agreeing):
        pairs = ((i, agreeing[i]) for i in np.flatnonzero(agreeing >= 0))
        exact = sum(part.split.texts[i] == other.split.texts[j] for i, j in pairs)
        yield replace(found, details=found.details | {"exact": exact})
    what += ", but not its label"
    yield _pairs("contradictory", what, part, other, np.where(is_other, mates, -1))


def near_texts(part: Part, other: Part) -> Finding | None:
    """Texts that nearly equal one of `other` or an earlier one of theirs, directly or over others.

    Not those that equal one, and in one split not those of one group, which are meant to be alike.
    """
    mates = _mates(part, other, "near")
    mates[_mates(part, other, "same") >= 0] = -1
    groups = part.split.groups
    if other is part and groups:
        mates[[groups[i] == groups[mate] for i, mate in enumerate(mates)]] = -1
    what = f"texts nearly equal {_earlier(part, other)}, directly or over others"
    return _pairs("near", what, part, other, mates)


def parted_groups(part: Part, other: Part) -> Finding | None:
    """Rows of groups that `other` has rows of, too."""
    groups = part.split.groups
    both = {g for g in set(groups) & set(other.split.groups) if not g.startswith("\0")}
    is_found = [g in both for g in groups] or np.zeros(len(part.split.rows), dtype=bool)
    names = listed([printable(g, 30) for g in sorted(both)])
    what = f"rows are of groups that {other.name} has, too ({len(both):,}: {names})"
    rows = part.split.rows[np.array(is_found)]
    return _finding("groups", part.name, what, rows, other_split=other.name, groups=len(both))


# --- texts by themselves --------------------------------------------------------------------------


def hollow_texts(name: str, split: Split) -> Finding | None:
    """Texts of one character, or without any letter, number or symbol."""

    def is_hollow(text: str) -> bool:
        if text[:3].isalnum():  # nearly all
            return False
        return not any(unicodedata.category(c)[0] in "LNS" for c in text)

    places = [i for i, t in enumerate(split.texts) if len(t.strip()) == 1 or is_hollow(t)]
    what = "texts are one character, or have no letter, number or symbol"
    return _finding("hollow", name, what, split.rows[np.array(places, dtype=int)])


def accidents(name: str, split: Split) -> Finding | None:
    """Texts with traces of a wrong decoding, of markup or of escapes."""
    counts: Counter[str] = Counter()
    places = []
    for i, text in enumerate(split.texts):
        if text.isascii() and text.isprintable() and "&" not in text and "\\" not in text:
            continue
        kinds = [kind for kind, pattern in ACCIDENTS.items() if pattern.search(text)]
        counts.update(kinds)
        places += [i] if kinds else []
    told = ", ".join(f"{n:,} {kind}" for kind, n in counts.most_common())
    what = f"texts show accidents of encoding ({told})"
    return _finding("encoding", name, what, split.rows[np.array(places, dtype=int)], **counts)


def like_labels(train: Split, label_names: list[str]) -> Finding | None:
    """Labels that are one word but for capitals, blanks or width; rows of all but the commonest."""
    like: dict[str, list[int]] = {}
    for k, label in enumerate(label_names):
        like.setdefault(normalised(label), []).append(k)
    counts = np.bincount(train.labels, minlength=len(label_names))
    told, rare = [], []
    for several in (group for group in like.values() if len(group) > 1):
        told.append(" and ".join(f"'{printable(label_names[k], 30)}'" for k in several))
        rare += sorted(several, key=lambda k: counts[k])[:-1]
    what = f"texts have labels that are nearly another's name ({listed(told)})"
    return _finding("like_labels", "train", what, train.rows[np.isin(train.labels, rare)])


# --- what cannot be scored ------------------------------------------------------------------------


def few_labels(name: str, split: Split, label_names: list[str]) -> Finding | None:
    """Labels of an evaluated split with fewer than MIN_EXAMPLES texts."""
    counts = np.bincount(split.labels, minlength=len(label_names))
    few = {label_names[k]: int(counts[k]) for k in np.flatnonzero(counts < MIN_EXAMPLES)}
    if not few:
        return None
    told = listed([f"'{printable(label, 30)}' has {n}" for label, n in few.items()])
    message = f"{name}: {len(few):,} labels have fewer than {MIN_EXAMPLES} texts: {told}"
    rows = split.rows[np.isin(split.labels, np.flatnonzero(counts < MIN_EXAMPLES))]
    return Finding("few_labels", name, message, len(rows), rows[:KEPT].tolist(), {"labels": few})


def few_in_slices(part: Part, train: Split) -> Finding | None:
    """Slices of an evaluated split that are small or none, or lack a label that the split has."""
    name, split = part.name, part.split
    present = len(np.unique(split.labels))
    told, is_found = [], np.zeros(len(split.rows), dtype=bool)
    for column, (codes, values) in split.slices.items():
        for k, value in enumerate(values):
            is_here = codes == k
            n, labels = int(is_here.sum()), len(np.unique(split.labels[is_here]))
            if n >= MIN_EXAMPLES and labels == present:
                continue
            is_found |= is_here
            lacks = f", {labels} of {present} labels" if labels < present else ""
            told.append(f"{printable(column, 30)} '{printable(value, 30)}' ({n:,} texts{lacks})")
        known, here = train.slices.get(column, (codes, []))[1], set(values)
        told += [
            f"{printable(column, 30)} '{printable(value, 30)}' (none, but in training)"
            for value in known
            if value not in here
        ]
    if not told:
        return None
    message = f"{name}: {len(told):,} slices are too small to score well: {listed(told)}"
    rows = split.rows[is_found]
    details = {"slices": len(told)}
    return Finding("few_in_slices", name, message, len(rows), rows[:KEPT].tolist(), details)


# --- what tokens tell -----------------------------------------------------------------------------


def check_tokens(name: str, split, *, room: int, unknown: int | None) -> Checked:
    """How much of a `corpus.TokenisedSplit` is cut or unknown, and findings where it is much.

    room: tokens of a text that the model sees. unknown: the id of what the tokenizer lacks.
    """
    is_cut = np.diff(split.offsets) > room
    places = np.flatnonzero(split.ids == unknown) if unknown is not None else np.zeros(0, int)
    texts = np.unique(np.searchsorted(split.offsets, places, side="right") - 1)
    report = {"cut": int(is_cut.sum()), "cut_share": float(is_cut.mean())}
    report["unknown_share"] = len(places) / max(1, len(split.ids))
    found: list[Finding | None] = []
    if is_cut.mean() > MAX_CUT:
        what = f"texts ({is_cut.mean():.0%}) are longer than the {room:,} tokens that "
        what += "data.max_length has room for, and cut"
        found.append(_finding("cut", name, what, split.rows[is_cut]))
    if report["unknown_share"] > MAX_UNKNOWN:
        what = f"texts have what the tokenizer does not know ({report['unknown_share']:.1%} of "
        found.append(_finding("unknown", name, what + "all tokens)", split.rows[texts]))
    return Checked([f for f in found if f], report, {})
