"""Tables of texts, read in chunks: CSV, TSV, JSON Lines, Parquet, or a text a line.

Each row is had twice: as it stands in its file, which writers.py passes on, and as its cells.
"""

import contextlib
import csv
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from errors import BAD_DATA, MISSING, USAGE, Refusal, printable
from files import open_regular

KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
KINDS |= {".parquet": "parquet", ".txt": "text"}
# "csv;" is a .csv file whose header has semicolons: so Excel writes it where numbers have a comma.
DELIMITERS = {"csv": ",", "tsv": "\t", "csv;": ";"}
MAX_FIELD = 1 << 24  # characters of one cell or line; a longer one is broken quoting
# Characters kept of a text: 8 for each of the 8,192 ids kept of it. A million take TF-IDF half a
# minute, and the trainer of a Unigram tokenizer dies of them.
MAX_TEXT = 1 << 16
CHUNK, CHUNK_CHARACTERS = 8192, 1 << 23  # rows held at a time, and about how many characters


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a table.

    texts: "" where a row has none. raw: the rows as they stand in their file; of Parquet, a
    RecordBatch. records(): the same as column -> cell.
    """

    texts: list[str]
    raw: Sequence[str]
    records: Callable[[], list[dict[str, object]]]


@dataclass(frozen=True)
class Table:
    """A file being read. `head`: the header of CSV as it stands, the schema of Parquet."""

    name: str
    kind: str
    columns: list[str]
    head: object
    chunks: Iterator[Chunk]


def kind_of(path: Path) -> str:
    """The kind of a file by its name; Refusal 64 for an unknown one."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(KINDS)
        raise Refusal(USAGE, f"{printable(path, 200)}: unknown kind of file; expected {known}")
    return kind


def text_of(cell: object) -> str:
    """A cell as a text, of which the first MAX_TEXT characters are kept; "" for one that is none.

    What is nested, binary or not a number (NaN) is none, as is white space alone.
    """
    if cell is None or isinstance(cell, dict | list | bytes) or cell != cell:  # NaN
        return ""
    text = str(cell)
    if len(text) > MAX_TEXT:
        text = text.lstrip()[:MAX_TEXT]
    return text if text.strip() else ""


# --- reading --------------------------------------------------------------------------------------


def read(path: Path, text_column: str) -> Table:
    """The table in a file, of which no more than a chunk is held; `-` is standard input, as lines.

    Raises Refusal 66 for a file that cannot be read, 64 for one of an unknown kind and 65 for one
    that is not what it should be: at once, or when the chunk with the first faulty row is taken.
    """
    if str(path) == "-":
        if sys.stdin is None:
            raise Refusal(USAGE, "standard input is closed")
        return of_texts(_texts(lines(sys.stdin.buffer, "standard input")))
    name, kind = printable(path, 200), kind_of(path)
    if kind == "text":
        return of_texts(_texts(lines_of(path, name)))
    kind, head, columns, rows = opened_rows(path, name, kind)
    if kind == "parquet":
        chunks = (_of_batch(batch, text_column, name) for batch in rows)
    else:
        chunks = _chunked(rows, text_column)
    if text_column not in columns:
        has = ", ".join(printable(c, 30) for c in columns[:20])
        told = f"no column '{printable(text_column)}' (--text-column); the file has: {has}"
        raise Refusal(BAD_DATA, f"{name}: {told}")
    return Table(name, kind, columns, head, chunks)


def opened_rows(path: Path, name: str, kind: str) -> tuple[str, object, list[str], Iterator]:
    """Kind, head and columns of a file, and its rows, raw and as records; of Parquet, batches."""
    csv.field_size_limit(MAX_FIELD)
    if kind == "csv":
        kind = _csv_kind(next((line for line in lines_of(path, name) if line.strip()), ""))
    if kind == "parquet":
        rows = parquet_batches(path, name)
        head = next(rows)
        columns = list(head.names)
    else:
        rows = _json_objects(path, name) if kind == "jsonl" else _csv_records(path, name, kind)
        head, columns = next(rows, (None, None))
        if columns is None:
            raise Refusal(BAD_DATA, f"{name}: the file is empty")
    for column, n in Counter(columns).items():
        if n > 1:
            raise Refusal(BAD_DATA, f"{name}: two columns are called '{printable(column)}'")
    return kind, head, columns, rows


def _csv_kind(header: str) -> str:
    bare = re.sub('"[^"]*"', "", header)
    return "csv;" if ";" in bare and "," not in bare else "csv"


def of_texts(texts: Iterable[str]) -> Table:
    """The table of a single column that some texts are."""
    rows = ((text, {"text": text}) for text in texts)
    return Table("texts", "text", ["text"], None, _chunked(rows, "text"))


def _texts(stream: Iterator[str]) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in stream)


def _csv_records(path: Path, name: str, kind: str) -> Iterator[tuple[str, object]]:
    """The header of a CSV file, raw and as names; then its rows, raw and as records."""
    rows = csv_rows(lines_of(path, name), name, DELIMITERS[kind])
    for head, columns in itertools.islice(rows, 1):
        yield head, columns
        for raw, cells in rows:
            yield raw, dict(zip(columns, cells, strict=True))


def _json_objects(path: Path, name: str) -> Iterator[tuple[str, object]]:
    """The keys of the first object of a JSON Lines file; then all objects, raw and as records."""
    rows = json_rows(lines_of(path, name), name)
    for first in itertools.islice(rows, 1):
        yield "", list(first[1])
        yield first
        yield from rows


def _chunked(rows: Iterator[tuple[str, dict]], column: str) -> Iterator[Chunk]:
    part, size = [], 0
    for row in rows:
        part.append(row)
        size += len(row[0])
        if len(part) == CHUNK or size >= CHUNK_CHARACTERS:
            yield _of_rows(part, column)
            part, size = [], 0
    if part:
        yield _of_rows(part, column)


def _of_rows(rows: list[tuple[str, dict]], column: str) -> Chunk:
    texts = [text_of(record.get(column)) for _, record in rows]
    return Chunk(texts, [raw for raw, _ in rows], lambda: [record for _, record in rows])


def _of_batch(batch, column: str, name: str) -> Chunk:
    texts = [text_of(cell) for cell in cells_of(batch, column, name)]
    return Chunk(texts, batch, lambda: batch_records(batch, name))


def batch_records(batch, name: str) -> list[dict[str, object]]:
    """The rows of a RecordBatch of the file `name` as column -> cell."""
    names = batch.schema.names
    columns = [cells_of(batch, column, name) for column in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def cells_of(batch, column: str, name: str) -> list[object]:
    """The cells of a column of a RecordBatch of the file `name`; Refusal 65 if Python has none."""
    cells = batch.column(column)
    try:
        try:
            return cells.to_pylist()
        except (ValueError, OverflowError):  # nanoseconds, which Python's times do not have
            return cells.cast("string").to_pylist()
    except Exception as error:  # pyarrow's have no common class
        told = f"column '{printable(column)}' of {printable(cells.type)} cannot be read"
        raise Refusal(BAD_DATA, f"{name}: {told}: {printable(error)}") from None


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A data file to be read; Refusal 66 for one that cannot be."""
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise Refusal(MISSING, f"{printable(path, 200)}: no such data file") from None
    except OSError as error:
        raise Refusal(MISSING, f"{printable(path, 200)}: {error.strerror}") from None


def lines_of(path: Path, name: str) -> Iterator[str]:
    """The `lines` of a file that is opened for it; Refusal 66 if it cannot be."""
    with opened(path) as raw:
        yield from lines(raw, name)


def lines(raw: BinaryIO, name: str) -> Iterator[str]:
    """The lines of UTF-8, with or without BOM; line ends, those inside quotes too, stay.

    Raises Refusal 65 for another encoding, and for a line of more than MAX_FIELD characters.
    """
    file, number = io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), 0
    try:
        while line := file.readline(MAX_FIELD + 1):
            number += 1
            if len(line) > MAX_FIELD:
                more = f"more than {MAX_FIELD:,} characters"
                raise Refusal(BAD_DATA, f"{name}: line {number} has {more}")
            yield line
    except OSError as error:
        raise Refusal(MISSING, f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = number + 1 + error.object[: error.start].count(b"\n")  # of those read ahead
        byte = error.object[error.start]
        guess = "UTF-16" if (line, error.start) == (1, 0) and byte >= 0xFE else "Windows-1252"
        told = f"line {line:,} has byte 0x{byte:02x}; is it {guess}? Save it as UTF-8"
        if error.reason == "unexpected end of data":
            told = "it ends within a character, so it was cut off"
        raise Refusal(BAD_DATA, f"{name}: not UTF-8: {told}") from None


def csv_rows(stream: Iterable[str], name: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The header, then the rows of a CSV file: as they stand, and their cells.

    Raises Refusal 65 for broken quoting and for a row that has not as many cells as the header.
    """
    taken: list[str] = []  # lines of the row at hand

    def take() -> Iterator[str]:
        for line in stream:
            taken.append(line)
            yield line

    reader = csv.reader(take(), delimiter=delimiter, strict=True)
    header, row = None, 0
    try:
        for cells in reader:
            raw = "".join(taken)
            taken.clear()
            if not cells:
                continue  # a blank line, as the csv module reads it
            if header is None:
                header = [column.strip() for column in cells]
                yield raw, header
                continue
            row += 1
            if len(cells) != len(header):
                raise Refusal(
                    BAD_DATA,
                    f"{name}: row {row} (line {reader.line_num}) has {len(cells)} fields, "
                    f"the header has {len(header)}",
                )
            yield raw, cells
    except csv.Error as error:
        raise Refusal(
            BAD_DATA, f"{name}: line {reader.line_num}: broken quoting: {printable(error)}"
        ) from None


def json_rows(stream: Iterable[str], name: str) -> Iterator[tuple[str, dict[str, object]]]:
    """The objects of a JSON Lines file, as they stand and as Python has them; Refusal 65."""
    for number, line in enumerate(stream, 1):
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
        yield line, record


def parquet_batches(path: Path, name: str) -> Iterator:
    """The schema of a Parquet file, then its rows as RecordBatches; Refusal 65."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise Refusal(
            BAD_DATA, f"{name}: reading Parquet needs pyarrow: pip install pyarrow"
        ) from None
    with opened(path) as raw:
        try:
            file = parquet.ParquetFile(raw)
            yield file.schema_arrow
            yield from file.iter_batches(_rows_at_once(file.metadata))
        except Exception as error:  # pyarrow's have no common class
            raise Refusal(BAD_DATA, f"{name}: not Parquet: {printable(error)}") from None


def _rows_at_once(metadata) -> int:
    """Rows of a Parquet file that make a chunk, by the mean size of a row in its largest group."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    size = max((g.total_byte_size // max(1, g.num_rows) for g in groups), default=0)
    return max(1, min(CHUNK, CHUNK_CHARACTERS // max(1, size)))
