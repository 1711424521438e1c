"""No line is wider than asked for, and what does not fit beside is below, not lost."""

import pytest

from columns import aligned, blocks, fitting, shortened, wrapped

WIDTHS = (None, 120, 40, 20)


def test_columns_are_as_wide_as_their_widest_cell():
    assert aligned([("a", "bb", "c"), ("11", "2", "33")], left=1) == [" a  bb  c", "11   2  33"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("runs", [1, 2, 7])
def test_every_cell_is_shown_once_at_any_width(width, runs):
    rows = [
        ["label", *(f"head{i}" for i in range(runs))],
        ["x", *(f"cell{i}" for i in range(runs))],
    ]
    lines = blocks(rows, width)
    assert width is None or max(map(len, lines)) <= width
    shown = [word for line in lines for word in line.split()]
    assert sorted(set(shown)) == sorted(cell for row in rows for cell in row)
    assert all(shown.count(cell) == 1 for row in rows for cell in row[1:])
    beside = [line.split() for line in lines if line]
    assert [a[1:] for a in beside[::2]] == [
        [f"head{c[4:]}" for c in b[1:]] for b in beside[1::2]
    ]  # each cell stays below its head


def test_a_long_cell_leaves_room_for_its_neighbours():
    lines = blocks([["path", "x" * 90, "y" * 90, "z"]], 80)
    assert len(lines) == 1 and "y" * 8 in lines[0] and lines[0].endswith("z")


def test_the_middle_of_a_name_goes_first():
    assert shortened("a" * 50 + "z" * 50, 10) == "aaaa..zzzz"
    assert [len(shortened("a" * 9, room)) for room in (9, 8, 3, 2)] == [9, 8, 3, 2]
    assert shortened("a" * 500, None) == "a" * 500


def test_words_are_wrapped_and_none_is_lost():
    lines = wrapped("one two three " + "x" * 40, 20, "  ")
    assert max(map(len, lines)) <= 20 and all(line.startswith("  ") for line in lines)
    assert "".join(lines).replace(" ", "") == "onetwothree" + "x" * 40
    assert wrapped("", 20) == [""]


def test_lines_are_cut_in_columns_of_the_terminal_and_send_it_nothing():
    assert fitting(["\u6f22\u5b57\u6f22", "\x1b[2Jx\u202e"], 4) == ["\u6f22\u5b57", "\\x1b"]
    assert fitting(["\x1b[2J"], None) == ["\\x1b[2J"]
