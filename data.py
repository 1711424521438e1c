"""From files to splits: texts, label indices, slices and row numbers; faults named by row."""

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

import tables
from config import DataConfig
from errors import BAD_DATA, Refusal, printable

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 0.1  # of the training rows, where no validation file is given
MAX_LEAK_SHARE = 0.1  # of the training rows equal to evaluation rows: the files are mixed up
MAX_LABELS = 1000  # more, or longer ones, are a column of texts or numbers, not of labels
FEW_LABELS = 50  # that many may have a text each
MAX_WORD = 200  # characters of a label or a slice's value
POSITIVE_WORDS = ("1", "true", "yes")
SLICE_WORDS = ("lang", "language")  # what data.slice_columns=auto looks for
SHOWN = 10  # rows listed of each finding in a message
KEPT = 1000  # in data_report.json
# As far as they are ASCII: Chinese may follow without a blank.
HANDLE = re.compile(r"(?<![\w@])@[a-z0-9_]+")
LINK = re.compile(r"(?:https?://|\bwww\.)[!-~]+")


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

        columns = (self.texts, self.labels, self.groups)
        slices = {name: pick(column) for name, column in self.slices.items()}
        return Table(self.path, *map(pick, columns), slices, pick(self.rows))


@dataclass(frozen=True)
class Finding:
    """A fault in a split: what the user is told, how many rows have it, and the first of them."""

    kind: str
    split: str
    message: str  # one line
    count: int
    rows: list[int]  # KEPT of them, 1 is the first below the header
    details: dict[str, object] = field(default_factory=dict)  # numbers of this kind, for JSON


@dataclass(frozen=True)
class Split:
    """One split: texts, labels (N,) int64 in 0..K-1, rows (N,), column -> (codes, names).

    groups: the values of data.group_column, different ones where a row has none; [] without it.
    """

    texts: list[str]
    labels: np.ndarray
    rows: np.ndarray
    slices: dict[str, tuple[np.ndarray, list[str]]]
    groups: list[str]


@dataclass(frozen=True)
class Splits:
    """All that the files gave. `positive` is the index of the positive label or None."""

    train: Split
    validation: Split
    test: Split | None
    label_names: list[str]
    positive: int | None
    report: dict[str, object]  # counts and "findings", for data_report.json

    @property
    def findings(self) -> list[str]:
        """What was found, a line each."""
        return [finding["message"] for finding in self.report["findings"]]

    def named(self) -> dict[str, Split]:
        """The splits by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}


def read_splits(cfg: DataConfig, *, seed: int) -> Splits:
    """Read, check and split the files of `cfg`; `seed` is for a split or a limit drawn here.

    Raises Refusal 66 for a file that is missing and 65 for one that cannot be trained on.
    """
    findings: list[Finding] = []
    train = _read(cfg.train, cfg, findings)
    _refuse_no_labels(train, cfg.label_column)
    validation = _read(cfg.validation, cfg, findings, "validation") if cfg.validation else None
    test = _read(cfg.test, cfg, findings, "test") if cfg.test else None
    _keep_common_slices([t for t in (train, validation, test) if t])
    if cfg.validation:
        train, validation = (_limit(t, cfg.limit, seed) for t in (train, validation))
    else:
        train = _limit(train, cfg.limit, seed)
        train, validation = _split_off(train, seed)
    test = _limit(test, cfg.limit, seed) if test else None
    names = _label_names(train)
    _check_labels(names, [table for table in (validation, test) if table], train.name)
    others = {"validation": validation} | ({"test": test} if test else {})
    train, leaked = _without_leaks(train, others, cfg.leaks)
    if leaked:
        findings.append(leaked)
    if _label_names(train) != names:
        raise Refusal(BAD_DATA, f"{train.name}: without leaked rows a label has no example left")
    positive = _positive(names, train.labels, cfg.positive_label)
    splits = {"train": train} | others
    report = {name: _counts(table) for name, table in splits.items()}
    report["held_out"] = 0 if cfg.validation else len(validation.rows)
    report["findings"] = [asdict(finding) for finding in findings]
    code = {name: i for i, name in enumerate(names)}
    named = [_encode(splits[name], code) if name in splits else None for name in SPLITS]
    return Splits(*named, names, positive, report)


def texts_by_row(file: str | Path, cfg: DataConfig) -> dict[int, tuple[str, str]]:
    """Row -> (text, label) of a data file that `cfg` describes, as `read_splits` has them.

    Raises Refusal 66 or 65 as that does.
    """
    table = _read(str(file), cfg, [])
    return dict(zip(table.rows, zip(table.texts, table.labels, strict=True), strict=True))


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, or Refusal 66."""
    with tables.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def normalised(text: str) -> str:
    """The form in which two texts count as the same: NFKC, case folded, single blanks.

    Handles are @user and links http, but in a text that has nothing else.
    """
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(text.split())
    if "@" not in text and "http" not in text and "www." not in text:
        return text
    masked = LINK.sub("http", HANDLE.sub("@user", text))
    return masked if set(masked.split()) - {"http", "@user"} else text


def listed(rows: Sequence[object], count: int | None = None) -> str:
    """The first SHOWN of some rows for a message; count: how many there are in all."""
    more = ", ..." if (count or len(rows)) > SHOWN else ""
    return ", ".join(map(str, rows[:SHOWN])) + more


def _read(name: str, cfg: DataConfig, findings: list[Finding], split: str = "train") -> Table:
    """One file as a Table without its bad rows."""
    table = Table(Path(name))
    kind = tables.KINDS.get(table.path.suffix.lower())
    if kind in (None, "text"):
        expected = "expected .csv, .tsv, .jsonl or .parquet"
        raise Refusal(BAD_DATA, f"{table.name}: unknown kind of file; {expected}")
    kind, _, columns, rows = tables.opened_rows(table.path, table.name, kind)
    if kind == "parquet":
        records = chain.from_iterable(tables.batch_records(b, table.name) for b in rows)
    else:
        records = (record for _, record in rows)
    table.slices = {column: [] for column in _slice_columns(table.name, columns, cfg)}
    bad: dict[int, str] = {}
    for row, record in enumerate(records, 1):
        text = tables.text_of(record.get(cfg.text_column))
        label = _word(record.get(cfg.label_column))
        if not text or not label:
            bad[row] = f"row {row} ({'no label' if text else 'empty text'})"
            continue
        table.texts.append(text)
        table.labels.append(label)
        table.rows.append(row)
        if cfg.group_column:
            table.groups.append(_word(record.get(cfg.group_column)) or f"\0row {row}")
        for column, values in table.slices.items():
            values.append(_word(record.get(column)) or "(none)")
    if bad:
        message = f"{len(bad):,} bad rows: {listed(list(bad.values()))}"
        if cfg.bad_rows == "stop":
            mend = "mend them or set data.bad_rows=skip"
            raise Refusal(BAD_DATA, f"{table.name}: {message}; {mend}")
        message = f"{split}: {message}; skipped"
        findings.append(Finding("bad_rows", split, message, len(bad), list(bad)[:KEPT]))
    if not table.rows:
        raise Refusal(BAD_DATA, f"{table.name}: no usable row below the header")
    return table


def _slice_columns(file: str, columns: Sequence[str], cfg: DataConfig) -> Sequence[str]:
    """The file's slice columns; Refusal 65 if it lacks one that is named."""
    slices = cfg.slice_columns
    if slices == "auto":
        slices = [c for c in columns if c.casefold() in SLICE_WORDS]
    named = [("text", cfg.text_column), ("label", cfg.label_column), ("group", cfg.group_column)]
    for key, column in named + [("slice", c) for c in slices]:
        if column in (None, *columns):
            continue
        has = ", ".join(printable(c, 30) for c in columns[:20])
        if len(columns) == 1 and ";" in columns[0]:
            has += "; are its columns parted by ';' where others are expected?"
        where = f"data.{key}_column{'s' * (key == 'slice')}"
        told = f"no column '{printable(column)}' ({where}); the file has: {has}"
        raise Refusal(BAD_DATA, f"{file}: {told}")
    return slices


def _keep_common_slices(tables: list[Table]) -> None:
    """Drop slice columns that some file lacks, which only `auto` lets pass."""
    common = set.intersection(*(set(t.slices) for t in tables))
    for table in tables:
        table.slices = {c: values for c, values in table.slices.items() if c in common}


def _word(cell: object) -> str:
    """A label, group or slice value as text: 1, 1.0 and "1" are the same word; nested ones none."""
    if isinstance(cell, dict | list | bytes):
        return ""
    if isinstance(cell, float) and math.isnan(cell):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if cell is None else str(cell).strip()


def _limit(table: Table, limit: int | None, seed: int) -> Table:
    """At most `limit` rows, drawn without replacement and left in file order."""
    if limit is None or len(table.rows) <= limit:
        return table
    chosen = np.random.default_rng((seed, limit)).choice(len(table.rows), limit, replace=False)
    return table.keep(sorted(chosen.tolist()))


def _split_off(table: Table, seed: int) -> tuple[Table, Table]:
    """(train, validation): a stratified tenth by label, never parting a group.

    Groups (without a group column, equal texts) are shuffled and given to the validation split
    while it lacks rows of the group's most frequent label.
    """
    members: dict[str, list[int]] = {}
    for i in range(len(table.rows)):
        group = table.groups[i] if table.groups else normalised(table.texts[i])
        members.setdefault(group, []).append(i)
    groups, what = list(members.values()), "groups" if table.groups else "different texts"
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
            f"{table.name}: {len(groups)} {what} are too few to hold some out; "
            "give data.validation",
        )
    for part in (rest, held):
        lost = sorted(set(table.labels) - {table.labels[i] for i in part})
        if lost:
            raise Refusal(
                BAD_DATA,
                f"{table.name}: label '{printable(lost[0])}' has too few {what} to be in both "
                "parts when validation is held out; give data.validation",
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


def _refuse_no_labels(train: Table, column: str) -> None:
    """Refusal 65 for a column of names, numbers or texts, in which nearly every row has another."""
    found, rows = len(set(train.labels)), len(train.rows)
    if found > min(MAX_LABELS, max(FEW_LABELS, 0.9 * rows)):
        told = f"{found:,} different labels in {rows:,} rows of '{printable(column)}'"
        raise Refusal(BAD_DATA, f"{train.name}: {told}; is that the label column?")


def _check_labels(names: list[str], others: Iterable[Table], train: str) -> None:
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


def _without_leaks(
    train: Table, others: dict[str, Table], mode: str
) -> tuple[Table, Finding | None]:
    """`train` without the rows that an evaluation split has too, and what to tell the user."""
    seen: dict[str, dict[str, str]] = {}  # text -> label -> where it stands first
    for name, table in others.items():
        for text, label, row in zip(table.texts, table.labels, table.rows, strict=True):
            seen.setdefault(normalised(text), {}).setdefault(label, f"{row} of {name}")
    found = [seen.get(normalised(text)) for text in train.texts]
    leaked = [i for i, labels in enumerate(found) if labels]
    if not leaked:
        return train, None
    rows = [train.rows[i] for i in leaked]
    odd = [i for i in leaked if train.labels[i] not in found[i]]
    pairs = [f"{train.rows[i]} = {next(iter(found[i].values()))}" for i in odd]
    share = len(leaked) / len(train.rows)
    message = (
        f"{len(leaked):,} rows ({share:.1%}) are also in validation or test: "
        f"{listed(rows)}" + (f" ({len(odd):,} with another label: {listed(pairs)})" if odd else "")
    )
    if mode == "stop":
        mend = "mend them or set data.leaks=drop"
        raise Refusal(BAD_DATA, f"{train.name}: {message}; {mend}")
    if mode == "drop" and share > MAX_LEAK_SHARE:
        odd_files = f"over {MAX_LEAK_SHARE:.0%} is a mix-up of files, not an accident"
        raise Refusal(BAD_DATA, f"{train.name}: {message}; {odd_files}")
    end = "kept, so the scores flatter" if mode == "keep" else "left out of training"
    message = f"train: {message}; {end}"
    odd_rows = [train.rows[i] for i in odd[:KEPT]]
    details = {"share": share, "other_label": len(odd), "other_label_rows": odd_rows}
    finding = Finding("leaks", "train", message, len(leaked), rows[:KEPT], details)
    if mode == "keep":
        return train, finding
    return train.keep([i for i, labels in enumerate(found) if not labels]), finding


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


def _counts(table: Table) -> dict[str, object]:
    """How many rows of each label there are, in all and by slice."""
    slices: dict[str, dict[str, Counter]] = {}
    for column, values in table.slices.items():
        of_value = slices[column] = {}
        for (value, label), n in sorted(Counter(zip(values, table.labels, strict=True)).items()):
            of_value.setdefault(value, {})[label] = n
    return {"rows": len(table.rows), "labels": dict(Counter(table.labels)), "slices": slices}


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
        table.groups,
    )
