"""A run's final predictions as arrays: what was true, what was said, how surely. No torch here.

Shapes: N examples, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json import loads
from pathlib import Path

import numpy as np

from errors import BAD_DATA, MISSING, Refusal, printable
from files import open_regular
from runlog import number

MAX_LINE = 1 << 20  # bytes; a thousand probabilities and some slices are 20 kB
ROUNDING = 1e-3  # that the probabilities of a line may add up to more or less than 1


@dataclass(frozen=True)
class Predictions:
    """Those of one split, in the order of its file.

    classes: the K names; labels, predicted: their indices, (N,) int64; rows: of the data file,
    from 1, (N,) int64; probabilities (N, K) float64; tokens: of each text before it is cut, (N,)
    int64, None where a run of an earlier version has none; slices: column -> (N,) words.
    """

    classes: list[str]
    rows: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    tokens: np.ndarray | None
    slices: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)


def read(run: Path, split: str, classes: Sequence[str]) -> Predictions:
    """The predictions of a finished run; `classes`: as the log's start names them, in its order.

    Raises Refusal 66 where there are none and 65 for a file that is not whole.
    """
    path = run / "predictions" / f"{split}.jsonl"
    code = {name: i for i, name in enumerate(classes)}
    records = [_checked(record, code, where) for record, where in _records(path)]
    if not records:
        raise Refusal(BAD_DATA, f"{_shown(path)}: has no predictions")
    if len({record["row"] for record in records}) < len(records):
        raise Refusal(BAD_DATA, f"{_shown(path)}: has a row twice")
    tokens = [record.get("tokens") for record in records]
    columns = records[0]["slices"].keys()
    return Predictions(
        list(classes),
        np.array([record["row"] for record in records]),
        np.array([code[record["label"]] for record in records]),
        np.array([code[record["predicted"]] for record in records]),
        np.array([record["probabilities"] for record in records], dtype=np.float64),
        np.array(tokens) if all(map(_is_count, tokens)) else None,
        {c: np.array([str(r["slices"].get(c)) for r in records]) for c in columns},
    )


def _records(path: Path) -> Iterator[tuple[object, str]]:
    """What each line holds, and where it stands."""
    try:
        with open_regular(path) as file:
            place = 0
            while line := file.readline(MAX_LINE):
                place += 1
                where = f"{_shown(path)}: line {place}"
                try:
                    yield loads(line), where
                except (ValueError, RecursionError):
                    raise Refusal(BAD_DATA, f"{where} is not JSON") from None
    except FileNotFoundError:
        raise Refusal(MISSING, f"{_shown(path)}: no such file") from None
    except OSError as error:
        raise Refusal(MISSING, f"{_shown(path)}: {error.strerror}") from None


def _checked(record: object, code: dict[str, int], where: str) -> dict:
    """The record of a line, if it is a prediction over these classes; else Refusal 65."""
    if not isinstance(record, dict) or not _is_count(record.get("row")):
        raise Refusal(BAD_DATA, f"{where} is no prediction of a row")
    for name in ("label", "predicted"):
        if not isinstance(record.get(name), str) or record[name] not in code:
            found = printable(record.get(name))
            raise Refusal(BAD_DATA, f"{where}: {name} '{found}' is none of the run's labels")
    shares = record.get("probabilities")
    values = [number(p) for p in shares] if isinstance(shares, list) else []
    if (
        len(values) != len(code)
        or any(p is None or not 0 <= p <= 1 for p in values)
        or abs(sum(values) - 1) > ROUNDING
    ):
        raise Refusal(BAD_DATA, f"{where}: expected {len(code)} probabilities that add up to 1")
    slices = record.get("slices")
    return record | {"slices": slices if isinstance(slices, dict) else {}}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _shown(path: Path) -> str:
    return printable("/".join(path.parts[-2:]), 200)
