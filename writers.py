"""The rows of a table written again with further columns: CSV, TSV, JSON Lines, Parquet.

A row that goes into a file of its own kind is not written anew: what it holds stays as it stood,
with its quotes, numbers, nested values and types, and the new columns follow.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from errors import BAD_DATA, USAGE, Refusal, printable
from runlog import finite
from tables import DELIMITERS, Chunk, Table


def writer(kind: str, file: IO[str], table: Table, columns: Mapping[str, type]) -> "Writer":
    """What writes the rows of `table` into a file of a kind, with further columns of str or float.

    Raises Refusal 65 if the table has one of these already, and 64 for Parquet from something else,
    whose cells have no types.
    """
    writers = dict.fromkeys(DELIMITERS, DelimitedWriter) | {"jsonl": JsonWriter}
    if kind == "parquet" and table.kind != kind:
        raise Refusal(USAGE, f"--out: Parquet is written from Parquet only, {table.name} is not")
    return writers.get(kind, ParquetWriter)(kind, file, table, columns)


class Writer:
    """Rows of one table with further columns; `close` it before the file is."""

    def __init__(self, kind: str, file: IO[str], table: Table, columns: Mapping[str, type]):
        self.kind, self.file, self.table, self.columns = kind, file, table, columns
        self.is_same_kind = table.kind == kind
        self.refuse_own(table.columns)

    def refuse_own(self, names: Iterable[str]) -> None:
        """Refusal 65 if one of the new columns is among `names`."""
        for name in self.columns.keys() & names:
            told = f"has a column '{printable(name)}' already; rename it"
            raise Refusal(BAD_DATA, f"{self.table.name}: {told}")

    def write(self, chunk: Chunk, added: Sequence[Sequence[object]]) -> None:
        """The rows of a chunk, each with a cell of each new column, None for an empty one."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is written last."""


class DelimitedWriter(Writer):
    """CSV, parted by commas or semicolons, and TSV."""

    def __init__(self, kind: str, file: IO[str], table: Table, columns: Mapping[str, type]):
        super().__init__(kind, file, table, columns)
        own = table.head if self.is_same_kind else self._joined(table.columns)
        file.write(self._after(own, columns))

    def write(self, chunk: Chunk, added: Sequence[Sequence[object]]) -> None:
        rows = chunk.raw if self.is_same_kind else map(self._of_record, chunk.records())
        self.file.writelines(map(self._after, rows, added))

    def _of_record(self, record: dict[str, object]) -> str:
        for name in record.keys() - set(self.table.columns):
            told = f"'{printable(name)}' is not in its first object; write JSON Lines"
            raise Refusal(BAD_DATA, f"{self.table.name}: {told}")
        cells = (record.get(name) for name in self.table.columns)
        return self._joined(
            _as_object(c) if isinstance(c, bool | dict | list) else c for c in cells
        )

    def _after(self, row: str, cells: Iterable[object]) -> str:
        """A row with further cells before its line end."""
        body = row.rstrip("\r\n")
        shown = (f"{cell:.7f}" if isinstance(cell, float) else cell for cell in cells)
        return body + DELIMITERS[self.kind] + self._joined(shown) + (row[len(body) :] or "\n")

    def _joined(self, cells: Iterable[object]) -> str:
        row = io.StringIO()
        csv.writer(row, delimiter=DELIMITERS[self.kind]).writerow(cells)
        return row.getvalue().removesuffix("\r\n")


def _as_object(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value, []), ensure_ascii=False, default=str)


class JsonWriter(Writer):
    """JSON Lines."""

    def write(self, chunk: Chunk, added: Sequence[Sequence[object]]) -> None:
        records = chunk.records()
        rows = chunk.raw if self.is_same_kind else map(_as_object, records)
        for row, record, cells in zip(rows, records, added, strict=True):
            self.refuse_own(record)
            new = _as_object(dict(zip(self.columns, cells, strict=True)))
            self.file.write(row.rstrip()[:-1] + (", " if record else "") + new[1:] + "\n")


class ParquetWriter(Writer):
    """Parquet, from Parquet."""

    def __init__(self, kind: str, file: IO[str], table: Table, columns: Mapping[str, type]):
        import pyarrow
        import pyarrow.parquet

        super().__init__(kind, file, table, columns)
        types = {str: pyarrow.string(), float: pyarrow.float64()}
        self.fields = [pyarrow.field(name, types[kind]) for name, kind in columns.items()]
        self.schema = table.head
        for field in self.fields:
            self.schema = self.schema.append(field)
        self.parquet = pyarrow.parquet.ParquetWriter(file.buffer, self.schema)

    def write(self, chunk: Chunk, added: Sequence[Sequence[object]]) -> None:
        import pyarrow

        columns = zip(self.fields, zip(*added, strict=True), strict=True)
        new = [pyarrow.array(values, field.type) for field, values in columns]
        arrays = [*chunk.raw.columns, *new]
        self.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=self.schema))

    def close(self) -> None:
        self.parquet.close()
