"""Text in columns for a terminal or a pipe, where a line may be of any length: width is None."""

import textwrap
from collections.abc import Iterable, Sequence

from tqdm.utils import disp_trim

from errors import printable

MAX_LINE = 2000  # characters, where the width does not say
MIN_CELL = 12
SIDE_BY_SIDE = 3  # columns of long cells that a line has room for


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Rows as lines, columns to the right but for the last `left` ones."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">"] * (len(widths) - left) + ["<"] * left
    forms = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
    return ["  ".join(map(format, row, forms)).rstrip() for row in rows]


def blocks(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Rows of a label and cells as lines; cells that do not fit beside come in a block below."""
    label, cells = max(len(row[0]) for row in rows), len(rows[0]) - 1
    most = width and max(MIN_CELL, (width - label) // min(cells, SIDE_BY_SIDE) - 2)
    cut = [[row[0].ljust(label), *(shortened(cell, most) for cell in row[1:])] for row in rows]
    widest = max(len(cell) for row in cut for cell in row[1:])
    beside = cells if width is None else max(1, (width - label) // (widest + 2))
    lines: list[str] = []
    for first in range(1, cells + 1, beside):
        lines += [""] if lines else []
        for row in cut:
            shown = (f"  {cell:>{widest}}" for cell in row[first : first + beside])
            lines.append(row[0] + "".join(shown))
    return lines


def wrapped(text: str, width: int | None, indent: str = "") -> list[str]:
    """Text as lines that break between words."""
    if width is None or not text:
        return [indent + text]
    room = max(width, len(indent) + 1)
    return textwrap.wrap(
        text, room, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def shortened(text: str, room: int | None) -> str:
    """At most `room` characters: the middle goes, as names differ in how they begin and end."""
    if room is None or len(text) <= room:
        return text
    kept = max(0, room - 2)
    return f"{text[: kept // 2]}..{text[len(text) - (kept - kept // 2) :]}"


def fitting(lines: Iterable[str], width: int | None) -> list[str]:
    """Lines that send nothing to the terminal but text, none of them wider."""
    shown = (printable(line, MAX_LINE) for line in lines)
    return [line if width is None else disp_trim(line, width) for line in shown]
