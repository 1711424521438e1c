"""How a label may be told without reading: from length and punctuation, or from a single word.

Gururangan et al. 2018, "Annotation Artifacts in Natural Language Inference Data"
(arXiv:1803.02324): a model that scores well on such data need not have learnt the task.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from data import KEPT, Finding, Split, listed, normalised
from errors import printable

SAMPLE = 20_000  # texts looked at of a split at most, drawn by the seed
# Of the way from chance to certainty: where length and punctuation alone lead further, a finding.
# Half means a balanced accuracy of 0.75 for two labels; honest sets have up to 0.7.
MAX_SURFACE = 0.5
DEVIATIONS = 3  # that a balanced accuracy must be above chance, too
FEWEST = 30  # texts of a split or slice that can show it
MIN_TEXTS = 10  # of a label that have a word, before it can give the label away
# A word gives a label away if this share of the label's texts have it, and so many times fewer of
# all others; the label's own words and hashtags need less.
SHARE, RATIO = 0.2, 20
OWN_SHARE, OWN_RATIO = 0.05, 10

MARKS = "!?.,;:'\"()-#@&*\u2026\u201c\u201d\u060c\u061f\u0964\u3002\uff0c\uff01\uff1f"
ENDS = ("!", "?", ".", "\u2026", '"', "\u201d", "\u3002", "\uff01", "\uff1f")
EMOJI = re.compile("[\u2600-\u27bf\U0001f300-\U0001faff]")
STRIPPED = (string.punctuation + MARKS).replace("#", "")


def seen(text: str) -> list[int]:
    """What can be seen of a text without reading it, as numbers."""
    end = text.rstrip()
    return [
        len(text),
        len(text.split()),
        *(text.count(mark) for mark in MARKS),
        *(end.endswith(mark) for mark in ENDS),
        sum(map(str.isupper, text)),
        text[:1].isupper(),
        sum(map(str.isdigit, text)),
        len(EMOJI.findall(text)),
        "http" in text or "www." in text,
        "\n" in text,
    ]


def surface(
    train: Split, validation: Split, label_names: list[str], *, seed: int
) -> tuple[dict[str, object], Finding | None]:
    """How well a small decision tree on `seen` tells the validation labels: report and finding.

    The score is balanced accuracy, the mean recall of the labels there are, whose chance is 1 / K.
    """
    from sklearn.tree import DecisionTreeClassifier

    learnt, scored = _sample(train, seed), _sample(validation, seed)
    classes = len(label_names)
    tree = DecisionTreeClassifier(
        max_leaf_nodes=2 * classes + 12,
        min_samples_leaf=0.01,
        class_weight="balanced",
        random_state=0,
    )
    tree.fit([seen(train.texts[i]) for i in learnt], train.labels[learnt])
    predicted = tree.predict([seen(validation.texts[i]) for i in scored])
    labels = validation.labels[scored]
    score, _ = _balanced_accuracy(labels, predicted, classes)
    report: dict[str, object] = {"balanced_accuracy": score, "chance": 1 / classes}
    report |= {"texts": len(scored), "learnt_from": len(learnt)}
    told = []
    for where, is_in in _wholes(validation, scored):
        value, is_clear = _balanced_accuracy(labels[is_in], predicted[is_in], classes)
        if is_clear:
            told.append(f"{value:.2f}{where}")
            if not where:
                break  # its slices are no news
    if not told:
        return report, None
    message = "validation: length and punctuation alone tell the label with a balanced accuracy of "
    message += f"{listed(told)} (chance {1 / classes:.2f})"
    return report, Finding("surface", "validation", message, len(scored), [], report)


def _wholes(split: Split, places: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """All of some texts, then each slice of them: how it is called, and which."""
    yield "", np.ones(len(places), dtype=bool)
    for column, (codes, values) in split.slices.items():
        for k, value in enumerate(values):
            yield f" where {printable(column, 30)} is '{printable(value, 30)}'", codes[places] == k


def _balanced_accuracy(
    labels: np.ndarray, predicted: np.ndarray, classes: int
) -> tuple[float | None, bool]:
    """Balanced accuracy, None without two labels, and whether it is far above chance."""
    counts = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[labels == predicted], minlength=classes)
    there = counts > 0
    if there.sum() < 2:
        return None, False
    score, chance = float((right[there] / counts[there]).mean()), 1 / classes
    deviation = np.sqrt((chance * (1 - chance) / counts[there]).sum()) / there.sum()
    is_far = score - chance > max(MAX_SURFACE * (1 - chance), DEVIATIONS * deviation)
    return score, bool(is_far) and len(labels) >= FEWEST


def giveaways(train: Split, label_names: list[str], *, seed: int) -> Finding | None:
    """Words of training texts that nearly give a label away, the label's own words among them.

    Words are what stands between blanks, so that in Chinese few are found.
    """
    places = _sample(train, seed)
    words = [_words(train.texts[i]) for i in places]
    labels = train.labels[places]
    totals, counts = np.bincount(labels, minlength=len(label_names)), defaultdict(Counter)
    for label, of_text in zip(labels.tolist(), words, strict=True):
        counts[label].update(of_text)
    everywhere = sum(counts.values(), Counter())
    found: dict[tuple[str, int], float] = {}
    for label, of_label in counts.items():
        own = _words(label_names[label])
        rest = len(labels) - totals[label]
        for word, n in of_label.items():
            is_own = word.startswith("#") or word in own
            share, ratio = (OWN_SHARE, OWN_RATIO) if is_own else (SHARE, RATIO)
            here, elsewhere = n / totals[label], (everywhere[word] - n + 1) / (rest + 1)
            if n >= MIN_TEXTS and here >= share and here >= ratio * elsewhere:
                found[word, label] = here
    if not found:
        return None
    told = [
        f"'{printable(word, 30)}' ({here:.0%} of '{printable(label_names[label], 30)}')"
        for (word, label), here in sorted(found.items(), key=lambda item: (-item[1], item[0]))
    ]
    given = {word for word, _ in found}
    rows = train.rows[[i for i, text in enumerate(train.texts) if given & _words(text)]]
    message = f"train: {len(found):,} words nearly give a label away: {listed(told)}: "
    shown = rows[:KEPT].tolist()
    message += f"rows {listed(shown, len(rows))}"
    return Finding("giveaways", "train", message, len(rows), shown, {"words": sorted(given)[:KEPT]})


def _words(text: str) -> set[str]:
    return {word.strip(STRIPPED) for word in normalised(text).split()} - {""}


def _sample(split: Split, seed: int) -> np.ndarray:
    """Places of at most SAMPLE texts, in order."""
    n = len(split.texts)
    if n <= SAMPLE:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, SAMPLE, replace=False))
