#!/usr/bin/env python3
"""Three ways to a threshold, for logits that are there: argmax, highest F1, expected F1.

usage: thresholds.py NAME=PATH [PATH ...] [NAME=PATH ...]

A PATH is an .npz file of a trial (bench/trials.py keeps them in --out/logits) or a finished run.
Each way is fitted on a random half of the validation texts and scored on the other one, 30 times;
then fitted on all of them and scored on test. Macro-F1 and F1 of the positive class, means of all
trainings of a NAME. The epoch is that of the highest macro-F1 on validation.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import decision
import diagnostics
import predictions
from metrics import softmax

HALVES = 30


def argmax(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """One half."""
    return 0.5


def highest(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """The cut with the most F1 on these texts."""
    cuts = diagnostics.cuts(is_positive, scores)
    return float(cuts.thresholds[cuts.f1_macro.argmax()])


def expected(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """What a run takes."""
    found = decision.fit_threshold(is_positive, scores)
    return 0.5 if found is None else found


WAYS = {"argmax": argmax, "highest F1": highest, "highest expected F1": expected}


def f1(is_positive: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Macro-F1 and F1 of the positive class."""
    each = diagnostics.f1(diagnostics.confusion(is_positive.astype(int), said.astype(int), 2))
    return np.array([each.mean(), each[1]])


def splits(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of validation and test: who is positive, and the probability of it."""
    if path.suffix == ".npz":
        found = np.load(path)
        labels = [found[f"{name}_labels"] == 1 for name in ("validation", "test")]
        epochs = found["validation"]
        best = max(range(len(epochs)), key=lambda e: f1(labels[0], epochs[e].argmax(axis=1))[0])
        return [
            (label, softmax(found[name][best])[:, 1])
            for label, name in zip(labels, ("validation", "test"), strict=True)
        ]
    kept = [predictions.read(path, name, ["0", "1"]) for name in ("validation", "test")]
    return [(p.labels == 1, p.probabilities[:, 1]) for p in kept]


def main() -> None:
    """A table of each NAME."""
    groups: dict[str, list[Path]] = {}
    for word in sys.argv[1:]:
        name, is_named, path = word.rpartition("=")
        groups.setdefault(name if is_named else list(groups)[-1], []).append(Path(path))
    rng = np.random.default_rng(42)
    for name, paths in groups.items():
        halves, tests = ({way: [] for way in WAYS} for _ in range(2))
        for path in paths:
            (labels, scores), (test_labels, test_scores) = splits(path)
            for _ in range(HALVES):
                one, other = np.array_split(rng.permutation(len(labels)), 2)
                for way, fit in WAYS.items():
                    cut = fit(labels[one], scores[one])
                    halves[way].append(f1(labels[other], scores[other] >= cut))
            for way, fit in WAYS.items():
                tests[way].append(f1(test_labels, test_scores >= fit(labels, scores)))
        print(f"\n{name}, {len(paths)} trainings\n")
        print("| | half of validation, other half: macro, positive | test: macro, positive |")
        print("|---|---|---|")
        for way in WAYS:
            cells = (np.mean(found[way], axis=0) for found in (halves, tests))
            print(f"| {way} | " + " | ".join(f"{a:.3f}, {b:.3f}" for a, b in cells) + " |")


if __name__ == "__main__":
    main()
