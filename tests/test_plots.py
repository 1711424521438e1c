"""Figures share a page: colours are its variables, labels are text, no two ids are the same."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import plots
from diagnostics import Reliability
from errors import UNAVAILABLE
from plots import Curve

NAMES = ["$x^2$ and \\frac", "<b>&amp;", "\u6f22\u5b57", "\u0645\u0632\u062d\u0629", "_hidden"]
TABLE = np.array([[5, 1, 0, 0, 0], *([i, 2, 9, 0, 1] for i in range(4))])
SHARES = [0.1, 0.2, *[np.nan] * 3]
EMPTY = np.full(15, np.nan)


def curve(*, name: str = "a", labels=NAMES, n: int = 50) -> str:
    x = np.arange(n)
    curves = [Curve(label, x, np.sin(x) + i, f"class-{i}") for i, label in enumerate(labels)]
    return plots.lines(name, "said", curves, x="step", levels={"level": 0.5}, marks={"b": (3, 1)})


def bins(name: str = "a") -> str:
    counts = np.zeros(15, dtype=int)
    confidence, accuracy = EMPTY.copy(), EMPTY.copy()
    counts[[8, 14]], confidence[[8, 14]], accuracy[[8, 14]] = (3, 90), (0.55, 0.97), (0.3, 0.9)
    return plots.reliability(name, "said", Reliability(counts, confidence, accuracy))


FIGURES = {
    "lines": curve,
    "reliability": bins,
    "confusion": lambda name="a": plots.confusion(name, "said", TABLE, NAMES),
    "bars": lambda name="a": plots.bars(name, "said", NAMES, {"t": SHARES}, x="x"),
}


class Text(HTMLParser):
    """What the <text> elements of a figure say."""

    def __init__(self, svg: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(svg)

    def handle_data(self, data):
        if self.get_starttag_text().startswith("<text"):
            self.found.append(data.strip("\n\u200b"))


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_the_same_figure_has_the_same_bytes_and_another_other_ids(draw):
    ids = {name: re.findall(r' id="([^"]*)"', draw(name=name)) for name in "ab"}
    assert draw(name="a") == draw(name="a") and ids["a"]
    assert len(set(ids["a"])) == len(ids["a"])
    assert not set(ids["a"]) & set(ids["b"])
    for name in "ab":
        used = re.findall(r'(?:href="#|url\(#)([^")]*)', draw(name=name))
        assert used and set(used) <= set(ids[name])


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_colours_are_variables_that_the_page_has_in_light_and_dark(draw):
    svg = draw()
    style = Path(plots.__file__).with_name("report.css").read_text()
    light, dark = style.split("prefers-color-scheme: dark")[:2]
    used = set(re.findall(r"var\(--([^)]*)\)", svg))
    assert {"line", "muted"} <= used
    for name in used:
        assert f"--{name}: #" in light and f"--{name}: #" in dark
    assert not re.findall(r"(?:fill|stroke): #", svg)


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_only_the_drawing_is_left(draw):
    svg = draw()
    assert svg.startswith('<svg class="plot" role="img" aria-label="said" ')
    for unwanted in ("<?xml", "<!DOCTYPE", "http", "<style", "<metadata", "font-family", "<image"):
        assert unwanted not in svg


@pytest.mark.parametrize("kind", ["lines", "confusion", "bars"])
def test_labels_are_text_as_it_is_written(kind):
    found = Text(FIGURES[kind]()).found
    assert set(NAMES) <= set(found)


def test_a_label_that_looks_like_our_output_stays():
    names = ["fill: #010101", "font-family: x; y", 'xlink:href="#a"', '<g id="figure_1"']
    assert set(names) <= set(Text(curve(labels=names)).found)


def test_what_is_said_is_escaped():
    svg = plots.bars("a", '"><script>\x1b\u202e', ["x"], {"y": [0.5]}, x="z")
    assert 'aria-label="&quot;&gt;&lt;script&gt;\\x1b\\u202e"' in svg


def test_a_million_steps_are_thinned():
    rng = np.random.default_rng(0)
    x = np.arange(1_000_000)
    svg = plots.lines("a", "said", [Curve("loss", x, rng.random(len(x)))], x="step")
    longest = max(re.findall(r' d="([^"]*)"', svg), key=len)
    assert 500 < longest.count("L ") <= plots.MAX_POINTS
    assert len(svg) < 100_000


def test_counts_of_a_confusion_matrix_are_shown_and_shaded_by_row():
    svg = plots.confusion("a", "said", np.array([[90, 10], [0, 4]]), ["n", "y"])
    assert [t for t in Text(svg).found if t.isdigit()] == ["90", "10", "0", "4"]
    assert [t for t in Text(svg).found if t.endswith("%")] == ["90%", "10%", "0%", "100%"]
    shades = [float(s) for s in re.findall(r"var\(--accent\); opacity: ([\d.]*)", svg)]
    assert len(shades) == 3 and shades[2] > shades[0] > shades[1]


@pytest.mark.parametrize("k", [2, 7, 30])
def test_as_many_classes_as_are_allowed(k):
    svg = plots.confusion("a", "said", np.eye(k, dtype=int) * 7, [f"class {i}" for i in range(k)])
    assert Text(svg).found.count("7") == k


@pytest.mark.parametrize("value", [0.0, 1e-310, 1e299, -1e299, np.nan])
def test_any_number_can_be_drawn(value):
    assert "</svg>" in plots.lines("a", "said", [Curve("y", [0, 1], [1.0, value])], x="step")


def test_bars_of_few_texts_are_pale():
    opacities = re.findall(r"var\(--accent\); opacity: ([\d.]*)", bins())
    assert {"0.2", "0.6"} <= set(opacities)


def test_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None\nimport errors\n"
    code += "try: import report\n"
    code += "except errors.Refusal as e: print(e.message); sys.exit(e.exit_code)"
    root = Path(plots.__file__).parent
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ended.returncode == UNAVAILABLE and "need matplotlib" in ended.stdout
    assert ended.stdout.count("\n") == 1
