"""From files to splits: texts, label indices, slices and row numbers; faults named by row."""

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from config import DataConfig
from errors import BAD_DATA, MISSING, Refusal, printable
from files import open_regular

VALIDATION_SHARE = 0.1  # of the training rows, where no validation file is given
MAX_LEAK_SHARE = (
    0.1  # more training rows than this equal to evaluation rows: the files are mixed up
)
MAX_FIELD = 1 << 24  # characters of one cell or line; a longer one is broken quoting
# Characters kept of a text: 8 for each of the 8,192 ids kept of it. A million take TF-IDF half a
# minute, and the trainer of a Unigram tokenizer dies of them.
MAX_TEXT = 1 << 16
MAX_LABELS = 1000  # more, or longer ones, are a column of texts or numbers, not of labels
MAX_WORD = 200  # characters of a label or a slice's value
POSITIVE_WORDS = ("1", "true", "yes")
SLICE_WORDS = ("lang", "language")  # what data.slice_columns=auto looks for
SHOWN = 10  # rows listed of each finding


@dataclass
class Table:
    """The cells of one file that are needed, by column; `rows` count from 1 below the header."""

    path: Path
    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    slices: dict[str, list[str]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The file's path for a message."""
        return printable(self.path, 200)

    def keep(self, wanted: Sequence[int]) -> "Table":
        """The table of some of its places, in the order given."""

        def pick(column: list) -> list:
            return [column[i] for i in wanted] if column else []

        slices = {name: pick(column) for name, column in self.slices.items()}
        return Table(
            self.path,
            pick(self.texts),
            pick(self.labels),
            pick(self.groups),
            slices,
            pick(self.rows),
        )


@dataclass(frozen=True)
class Split:
    """One split: texts, labels (N,) int64 in 0..K-1, rows (N,), column -> (codes, names)."""

    texts: list[str]
    labels: np.ndarray
    rows: np.ndarray
    slices: dict[str, tuple[np.ndarray, list[str]]]


@dataclass(frozen=True)
class Splits:
    """All that the files gave. `positive` is the index of the positive label or None."""

    train: Split
    validation: Split
    test: Split | None
    label_names: list[str]
    positive: int | None
    findings: list[str]  # a line each, for the user
    report: dict[str, object]  # counts, for data_report.json


def read_splits(cfg: DataConfig, *, seed: int) -> Splits:
    """Read, check and split the files of `cfg`; `seed` is for a split or a limit drawn here.

    Raises Refusal 66 for a file that is missing and 65 for one that cannot be trained on.
    """
    findings: list[str] = []
    train = _read(cfg.train, cfg, findings)
    validation = _read(cfg.validation, cfg, findings) if cfg.validation else None
    test = _read(cfg.test, cfg, findings) if cfg.test else None
    _keep_common_slices([t for t in (train, validation, test) if t])
    if cfg.validation:
        train, validation = (_limit(t, cfg.limit, seed) for t in (train, validation))
    else:
        train = _limit(train, cfg.limit, seed)
        train, validation = _split_off(train, seed)
    test = _limit(test, cfg.limit, seed) if test else None
    names = _label_names(train)
    _check_labels(names, cfg, [validation, *([test] if test else [])], train.name)
    train, leaked = _without_leaks(train, [validation, *([test] if test else [])], cfg.leaks)
    if leaked:
        findings.append(leaked)
    if _label_names(train) != names:
        raise Refusal(BAD_DATA, f"{train.name}: without leaked rows a label has no example left")
    positive = _positive(names, train.labels, cfg.positive_label)
    splits = {"train": train, "validation": validation} | ({"test": test} if test else {})
    report = {
        name: {"file": str(t.path), "rows": len(t.rows), "labels": dict(Counter(t.labels))}
        for name, t in splits.items()
    }
    report["held_out"] = 0 if cfg.validation else len(validation.rows)
    report["findings"] = findings
    code = {name: i for i, name in enumerate(names)}
    encoded = {name: _encode(table, code) for name, table in splits.items()}
    return Splits(
        encoded["train"],
        encoded["validation"],
        encoded.get("test"),
        names,
        positive,
        findings,
        report,
    )


def texts_by_row(file: str | Path, cfg: DataConfig) -> dict[int, tuple[str, str]]:
    """Row -> (text, label) of a data file that `cfg` describes, as `read_splits` has them.

    Raises Refusal 66 or 65 as that does.
    """
    table = _read(str(file), cfg, [])
    return dict(zip(table.rows, zip(table.texts, table.labels, strict=True), strict=True))


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, or Refusal 66."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """A data file to be read; Refusal 66 for one that cannot be."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise Refusal(MISSING, f"{printable(path, 200)}: no such data file") from None
    except OSError as error:
        raise Refusal(MISSING, f"{printable(path, 200)}: {error.strerror}") from None


def normalised(text: str) -> str:
    """The form in which two texts count as the same: NFKC, case folded, single blanks."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _read(name: str, cfg: DataConfig, findings: list[str]) -> Table:
    """One file as a Table without its bad rows."""
    table = Table(Path(name))
    records = _records(table.path, table.name)
    columns = next(records, None)
    if columns is None:
        raise Refusal(BAD_DATA, f"{table.name}: the file is empty")
    twice = [c for c, n in Counter(columns).items() if n > 1]
    if twice:
        raise Refusal(BAD_DATA, f"{table.name}: two columns are called '{printable(twice[0])}'")
    wanted = _wanted_columns(table.name, columns, cfg)
    table.slices = {column: [] for column in wanted["slices"]}
    bad: list[str] = []
    for row, record in enumerate(records, 1):
        text, label = record[wanted["text"]], record[wanted["label"]]
        text = text if isinstance(text, str) else "" if text is None else str(text)
        label = _word(label)
        if not text.strip() or not label:
            bad.append(f"row {row} ({'empty text' if not text.strip() else 'no label'})")
            continue
        table.texts.append(text if len(text) <= MAX_TEXT else text.lstrip()[:MAX_TEXT])
        table.labels.append(label)
        table.rows.append(row)
        if wanted["group"] is not None:
            table.groups.append(_word(record[wanted["group"]]) or f"\0row {row}")
        for column, place in wanted["slices"].items():
            table.slices[column].append(_word(record[place]) or "(none)")
    if bad:
        message = f"{table.name}: {len(bad):,} bad rows: {', '.join(bad[:SHOWN])}" + (
            ", ..." if len(bad) > SHOWN else ""
        )
        if cfg.bad_rows == "stop":
            raise Refusal(BAD_DATA, f"{message}; mend them or set data.bad_rows=skip")
        findings.append(f"{message}; skipped")
    if not table.rows:
        raise Refusal(BAD_DATA, f"{table.name}: no usable row below the header")
    return table


def _wanted_columns(file: str, columns: Sequence[str], cfg: DataConfig) -> dict[str, object]:
    """Where in a record the text, label, group and slices are; Refusal 65 if not there."""

    def place(key: str, column: str) -> int:
        if column in columns:
            return columns.index(column)
        has = ", ".join(printable(c, 30) for c in columns[:20])
        raise Refusal(
            BAD_DATA, f"{file}: no column '{printable(column)}' ({key}); the file has: {has}"
        )

    slice_columns = cfg.slice_columns
    if slice_columns == "auto":
        slice_columns = tuple(c for c in columns if c in SLICE_WORDS)
    return {
        "text": place("data.text_column", cfg.text_column),
        "label": place("data.label_column", cfg.label_column),
        "group": place("data.group_column", cfg.group_column) if cfg.group_column else None,
        "slices": {c: place("data.slice_columns", c) for c in slice_columns},
    }


def _keep_common_slices(tables: list[Table]) -> None:
    """Drop slice columns that some file lacks, which only `auto` lets pass."""
    common = set.intersection(*(set(t.slices) for t in tables))
    for table in tables:
        table.slices = {c: values for c, values in table.slices.items() if c in common}


def _word(cell: object) -> str:
    """A label, group or slice value as text: 1, 1.0 and "1" are the same word."""
    if isinstance(cell, float) and math.isnan(cell):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if cell is None else str(cell).strip()


def _records(path: Path, name: str) -> Iterator[Sequence]:
    """The column names of a file, then its rows as sequences in that order; `name` is shown."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _csv_records(path, name, "," if suffix == ".csv" else "\t")
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_records(path, name)
    if suffix == ".parquet":
        return _parquet_records(path, name)
    raise Refusal(
        BAD_DATA, f"{name}: unknown kind of file; expected .csv, .tsv, .jsonl or .parquet"
    )


def _lines(path: Path, name: str) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without BOM; line ends inside quotes stay as they are."""
    number = 0
    try:
        with (
            _opened(path) as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file,
        ):
            while line := file.readline(MAX_FIELD + 1):
                number += 1
                if len(line) > MAX_FIELD:
                    more = f"more than {MAX_FIELD:,} characters"
                    raise Refusal(BAD_DATA, f"{name}: line {number} has {more}")
                yield line
    except UnicodeDecodeError:
        raise Refusal(
            BAD_DATA, f"{name}: not UTF-8: {_bad_byte(path)}; save the file as UTF-8"
        ) from None


def _bad_byte(path: Path) -> str:
    """The first byte that is not UTF-8, and where it is."""
    with _opened(path) as file:
        raw = file.read()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte 0x{raw[error.start]:02x} at offset {error.start:,}"
    return "it changed while it was read"


def _csv_records(path: Path, name: str, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(_lines(path, name), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        header = [column.strip() for column in header]
        yield header
        row = 0
        for record in reader:
            if not record:
                continue  # a blank line, as the csv module reads it
            row += 1
            if len(record) != len(header):
                raise Refusal(
                    BAD_DATA,
                    f"{name}: row {row} (line {reader.line_num}) has {len(record)} fields, "
                    f"the header has {len(header)}",
                )
            yield record
    except csv.Error as error:
        raise Refusal(
            BAD_DATA, f"{name}: line {reader.line_num}: broken quoting: {printable(error)}"
        ) from None


def _jsonl_records(path: Path, name: str) -> Iterator[list]:
    columns: list[str] | None = None
    for number, line in enumerate(_lines(path, name), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "\\ud" in line.lower():  # half of a surrogate pair is no character; tokenizers crash
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise Refusal(
                BAD_DATA, f"{name}: line {number}: not JSON: {printable(error)}"
            ) from None
        if not isinstance(record, dict):
            raise Refusal(BAD_DATA, f"{name}: line {number}: expected an object in braces")
        if columns is None:
            columns = list(record)
            yield columns
        yield [_single(record.get(k)) for k in columns]


def _single(cell: object) -> object:
    """A cell, None where it is nested or binary: a bad row only where its column is needed."""
    return None if isinstance(cell, dict | list | bytes) else cell


def _parquet_records(path: Path, name: str) -> Iterator[list]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise Refusal(
            BAD_DATA, f"{name}: reading Parquet needs pyarrow: pip install pyarrow"
        ) from None
    with _opened(path) as raw:
        try:
            file = parquet.ParquetFile(raw)
            yield list(file.schema_arrow.names)
            for batch in file.iter_batches():
                columns = [column.to_pylist() for column in batch.columns]
                yield from ([_single(c) for c in row] for row in zip(*columns, strict=True))
        except Exception as error:  # pyarrow's have no common class
            raise Refusal(BAD_DATA, f"{name}: not Parquet: {printable(error)}") from None


def _limit(table: Table, limit: int | None, seed: int) -> Table:
    """At most `limit` rows, drawn without replacement and left in file order."""
    if limit is None or len(table.rows) <= limit:
        return table
    chosen = np.random.default_rng((seed, limit)).choice(len(table.rows), limit, replace=False)
    return table.keep(sorted(chosen.tolist()))


def _split_off(table: Table, seed: int) -> tuple[Table, Table]:
    """(train, validation): a stratified tenth by label, never parting a group.

    Groups (single rows without a group column) are shuffled and given to the validation split
    while it lacks rows of the group's most frequent label.
    """
    members: dict[str, list[int]] = {}
    for i in range(len(table.rows)):
        members.setdefault(table.groups[i] if table.groups else str(i), []).append(i)
    groups = list(members.values())
    missing = {
        label: max(1, round(n * VALIDATION_SHARE)) for label, n in Counter(table.labels).items()
    }
    held: list[int] = []
    for g in np.random.default_rng(seed).permutation(len(groups)).tolist():
        labels = Counter(table.labels[i] for i in groups[g])
        label = max(labels, key=lambda name: (labels[name], name))
        if missing[label] >= len(groups[g]) / 2:  # the half keeps large groups from overshooting
            held += groups[g]
            for name, n in labels.items():
                missing[name] -= n
    chosen = set(held)
    rest = [i for i in range(len(table.rows)) if i not in chosen]
    if not held or not rest:
        raise Refusal(
            BAD_DATA,
            f"{table.name}: {len(groups)} groups are too few to hold some out; "
            "give data.validation",
        )
    for part in (rest, held):
        lost = sorted(set(table.labels) - {table.labels[i] for i in part})
        if lost:
            raise Refusal(
                BAD_DATA,
                f"{table.name}: label '{printable(lost[0])}' has too few rows or groups to be in "
                "both parts when validation is held out; give data.validation",
            )
    return table.keep(rest), table.keep(sorted(held))


def _label_names(train: Table) -> list[str]:
    """The labels in order: by value if all are numbers, else by alphabet; 65 for one."""
    names = sorted(set(train.labels))
    if len(names) < 2:
        raise Refusal(BAD_DATA, f"{train.name}: only one label, '{printable(names[0])}'")
    if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names):
        names.sort(key=lambda name: (float(name), name))
    return names


def _check_labels(names: list[str], cfg: DataConfig, others: Iterable[Table], train: str) -> None:
    if len(names) > MAX_LABELS:
        raise Refusal(
            BAD_DATA,
            f"{train}: {len(names):,} different labels in '{printable(cfg.label_column)}'; "
            "is that the label column?",
        )
    _refuse_long(max(names, key=len), f"{train}: data.label_column")
    for table in others:
        for label, row in zip(table.labels, table.rows, strict=True):
            if label not in names:
                known = ", ".join(printable(n, 30) for n in names[:SHOWN])
                raise Refusal(
                    BAD_DATA,
                    f"{table.name}: row {row} has label '{printable(label)}', "
                    f"which {train} lacks; it has: {known}",
                )


def _refuse_long(word: str, where: str) -> None:
    if len(word) > MAX_WORD:
        found = f"'{printable(word[:MAX_WORD])}' has {len(word):,} characters"
        raise Refusal(BAD_DATA, f"{where}: {found}; expected at most {MAX_WORD}")


def _without_leaks(train: Table, others: list[Table], mode: str) -> tuple[Table, str | None]:
    """`train` without the rows that an evaluation split has too, and what to tell the user."""
    seen = {normalised(text) for table in others for text in table.texts}
    leaked = [i for i, text in enumerate(train.texts) if normalised(text) in seen]
    if not leaked:
        return train, None
    listed = ", ".join(str(train.rows[i]) for i in leaked[:SHOWN])
    more = ", ..." if len(leaked) > SHOWN else ""
    share = len(leaked) / len(train.rows)
    message = (
        f"{train.name}: {len(leaked):,} rows ({share:.1%}) are also in validation or test: "
        f"{listed}{more}"
    )
    if mode == "keep":
        return train, f"{message}; kept, so the scores flatter"
    if mode == "stop":
        raise Refusal(BAD_DATA, f"{message}; mend them or set data.leaks=drop")
    if share > MAX_LEAK_SHARE:
        raise Refusal(
            BAD_DATA, f"{message}; over {MAX_LEAK_SHARE:.0%} is a mix-up of files, not an accident"
        )
    dropped = set(leaked)
    kept = train.keep([i for i in range(len(train.rows)) if i not in dropped])
    return kept, f"{message}; left out of training"


def _positive(names: list[str], train_labels: list[str], wanted: str) -> int | None:
    """The index of the positive label: as named, else 1/true/yes, else the rarer of two."""
    if wanted != "auto":
        if wanted not in names:
            known = ", ".join(printable(n, 30) for n in names[:SHOWN])
            raise Refusal(
                BAD_DATA, f"data.positive_label: no label '{printable(wanted)}'; there are: {known}"
            )
        return names.index(wanted)
    if len(names) != 2:
        return None
    words = [i for i, name in enumerate(names) if name.lower() in POSITIVE_WORDS]
    if len(words) == 1:
        return words[0]
    counts = Counter(train_labels)
    return min((0, 1), key=lambda i: (counts[names[i]], -i))


def _encode(table: Table, code: dict[str, int]) -> Split:
    slices = {}
    for column, values in table.slices.items():
        names = sorted(set(values))
        where = f"{table.name}: data.slice_columns: '{printable(column)}'"
        if len(names) > MAX_LABELS:
            found = f"{len(names):,} different values"
            raise Refusal(BAD_DATA, f"{where} has {found}; expected at most {MAX_LABELS:,}")
        _refuse_long(max(names, key=len), where)
        place = {name: i for i, name in enumerate(names)}
        slices[column] = (np.array([place[v] for v in values], dtype=np.int32), names)
    return Split(
        table.texts,
        np.array([code[label] for label in table.labels], dtype=np.int64),
        np.array(table.rows, dtype=np.int64),
        slices,
    )
