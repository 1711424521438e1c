"""Figures as inline SVG, right on light and on dark paper: colours are the page's CSS variables.

Text stays text, so the browser sets it in its own fonts; nothing in a label is markup or a formula.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diagnostics import Reliability
from errors import UNAVAILABLE, Refusal
from markup import MAX_ATTRIBUTE, safe, short

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
except ImportError as error:
    raise Refusal(
        UNAVAILABLE, f"figures need matplotlib ({error}); pip install -r requirements.txt"
    ) from None

MAX_POINTS = 2000  # of a curve
MAX_CLASSES = 30  # of a confusion matrix; beyond, no cell could be read
FEW = 10  # texts, whose shares mean little
MAX_LABEL = 20  # characters beside an axis
MAX_NAMED = 32  # in a legend
SCALE = 1.45  # CSS pixels a point: 9 pt are 13 px
SIZE = (4.4, 2.6)  # inches, two beside each other in the page's column

DASHES = ((4, 3), (1, 2), (6, 2, 1, 2), (8, 3))

# What stands in the SVG until the page's variable takes its place.
COLOURS = {
    name: f"#0101{i:02x}"
    for i, name in enumerate(
        ("text", "muted", "line", "accent", "second", *(f"class-{k}" for k in range(8)))
    )
}
NAMES = {value: name for name, value in COLOURS.items()}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "path.simplify": True,
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": COLOURS["muted"],
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "text.color": COLOURS["text"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.2,
}


@dataclass(frozen=True)
class Curve:
    """One line of a figure; `colour` is a name in COLOURS, `form` a style of matplotlib's."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "accent"
    form: str = "-"


def lines(
    name: str,
    said: str,
    curves: Sequence[Curve],
    *,
    x: str,
    levels: Mapping[str, float] | None = None,
    marks: Mapping[str, tuple[float, float]] | None = None,
    shares: str = "",
    floor: float | None = None,
) -> str:
    """Curves over one axis. `name` is the figure's own on its page; `said` tells it in words.

    levels: what to compare with, as horizontal lines. marks: points with a name. shares: "x", "y"
    or "xy", the axes that go from 0 to 1. floor: where the vertical one begins.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for curve in curves:
            stride = max(1, math.ceil(len(curve.x) / MAX_POINTS))
            every = slice((len(curve.x) - 1) % stride, None, stride)  # with the last one
            axes.plot(
                np.asarray(curve.x)[every],
                np.asarray(curve.y)[every],
                curve.form,
                color=COLOURS[curve.colour],
                label=_label(curve.label, MAX_NAMED),
                markersize=3.5,
            )
        for dashes, (label, value) in zip(DASHES, (levels or {}).items(), strict=False):
            style = {"color": COLOURS["muted"], "linewidth": 1.1, "dashes": dashes}
            axes.axhline(value, label=_label(label, MAX_NAMED), **style)
        for shape, (label, point) in zip("oDs^v", (marks or {}).items(), strict=False):
            style = {"color": COLOURS["text"], "markersize": 6, "fillstyle": "none"}
            axes.plot(
                *point, shape, label=_label(label, MAX_NAMED), zorder=4, clip_on=False, **style
            )
        axes.set_xlabel(x)
        _set_axes(axes, shares, floor)
        _legend(axes)

    rows = (len(curves) + len(levels or {}) + len(marks or {})) // 2 if len(curves) > 2 else 2
    return _svg(name, said, (SIZE[0], SIZE[1] + 0.17 * (rows - 2)), paint)


def reliability(name: str, said: str, found: Reliability) -> str:
    """The share that is right, by confidence, against the diagonal; below, how many texts."""

    def paint(figure: Figure) -> None:
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        edges = np.linspace(0, 1, len(found.counts) + 1)
        centres, width = (edges[1:] + edges[:-1]) / 2, edges[1] * 0.86
        fill = {"color": COLOURS["accent"], "width": width, "linewidth": 0}
        for is_drawn, alpha, label in (
            (found.counts >= FEW, 0.6, "share right"),
            ((found.counts > 0) & (found.counts < FEW), 0.2, f"of fewer than {FEW} texts"),
        ):
            if is_drawn.any():
                heights = found.accuracy[is_drawn]
                above.bar(centres[is_drawn], heights, alpha=alpha, label=label, **fill)
        style = {"color": COLOURS["muted"], "dashes": (4, 3), "linewidth": 1.1}
        above.plot([0, 1], [0, 1], label="calibrated", **style)
        drawn = below.bar(centres, found.counts, alpha=0.6, **fill)
        texts = [f"{n:,}" if n else "" for n in found.counts]
        below.bar_label(drawn, texts, padding=1, fontsize=7, color=COLOURS["muted"])
        below.margins(y=0.25)
        _set_axes(above, "xy", None)
        below.set_xlabel("probability of the predicted label")
        first = np.flatnonzero(found.counts)[0]  # a predicted label has at least 1 / K
        below.set(xlim=(edges[first], 1), yticks=[])
        below.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        below.set_ylabel("texts")
        _legend(above)

    return _svg(name, said, (SIZE[0], 3.4), paint)


def bars(
    name: str, said: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], *, x: str
) -> str:
    """Shares by group, one bar for each series beside the other; NaN is no bar."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / len(series)
        for i, (label, values) in enumerate(series.items()):
            places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
            colour = COLOURS["accent" if i == 0 else "second"]
            axes.bar(places, np.nan_to_num(values), width * 0.92, color=colour, label=_label(label))
        axes.set_xticks(range(len(groups)), map(_label, groups))
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.xaxis.grid(False)
        axes.set_xlabel(x)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _legend(axes)

    return _svg(name, said, (1.4 * SIZE[0], SIZE[1]), paint)


def confusion(name: str, said: str, counts: np.ndarray, classes: Sequence[str]) -> str:
    """A confusion matrix of at most MAX_CLASSES: counts, and shaded by the share of their row."""
    k = len(classes)
    has_shares = k <= 6
    names = [_label(c) for c in classes]
    length, side = max(map(len, names)), max(0.62 if has_shares else 0.3, 2.0 / k) * k
    is_turned = k > 6 or length * k > 30
    room = 0.5 + 0.075 * length, 0.5 + (0.075 * length if is_turned else 0.1)  # for the names

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for i, j in np.argwhere(counts):
            fill = {"facecolor": COLOURS["accent"], "alpha": 0.04 + 0.5 * float(shares[i, j])}
            axes.add_patch(matplotlib.patches.Rectangle((j - 0.5, i - 0.5), 1, 1, **fill))
        for i, j in np.ndindex(k, k) if has_shares else np.argwhere(counts):
            text = f"{counts[i, j]:,}" + (f"\n{shares[i, j]:.0%}" if has_shares else "")
            size = 9 if k <= 10 else 6.5 if counts.max() < 1000 else 5
            axes.text(j, i, text, ha="center", va="center", fontsize=size, linespacing=1.4)
        axes.set(xlim=(-0.5, k - 0.5), ylim=(k - 0.5, -0.5), aspect="equal")
        turned = {"rotation": 90} if is_turned else {}
        axes.set_xticks(range(k), names, fontsize=9 if k <= 15 else 7, **turned)
        axes.set_yticks(range(k), names, fontsize=9 if k <= 15 else 7)
        axes.set(xlabel="predicted", ylabel="true")
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(True)

    return _svg(name, said, (side + room[0], side + room[1]), paint)


# --- from matplotlib to the page ------------------------------------------------------------------


def _svg(name: str, said: str, inches: tuple[float, float], paint: Callable[[Figure], None]) -> str:
    """What `paint` draws, as an <svg> for a page that has other figures, too."""
    out = io.StringIO()
    # The salt makes the ids: the same for the same figure, others for another.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own font lacks glyphs that the browser's have
        figure = Figure(figsize=inches, layout="constrained")
        paint(figure)
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=none)
    return _for_page(out.getvalue(), said, inches)


def _for_page(text: str, said: str, inches: tuple[float, float]) -> str:
    """The drawing alone: no prologue, no name spaces, no fonts, no ids that others have."""
    body = text[text.index("<g id=") : text.rindex("</svg>")]
    body = re.sub("<[^>]*>", lambda found: _own(found[0]), body)  # tags alone, never a label
    width, height = (round(72 * side, 2) for side in inches)
    return (
        f'<svg class="plot" role="img" aria-label="{safe(said, MAX_ATTRIBUTE)}" '
        f'width="{width * SCALE:.0f}" height="{height * SCALE:.0f}" '
        f'viewBox="0 0 {width:g} {height:g}">\n{body}</svg>'
    )


def _own(element: str) -> str:
    """A tag of matplotlib's as the page wants it."""
    if element.startswith("<g "):
        return re.sub(' id="[^"]*"', "", element)
    element = re.sub('font-family: [^;"]*;? ?', "", element).replace("xlink:href", "href")
    return re.sub("(?<=fill: |roke: )#0101..", lambda found: f"var(--{NAMES[found[0]]})", element)


def _label(text: object, limit: int = MAX_LABEL) -> str:
    """A name as an axis or a legend has room for it."""
    shown = short(text, limit)
    return "\u200b" + shown if shown.startswith("_") else shown  # which matplotlib would leave out


def _set_axes(axes: Axes, shares: str, floor: float | None) -> None:
    """From 0 to 1 where it is a share, from a floor where there is one; few and short numbers."""
    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        if name in shares:
            axes.set(**{f"{name}lim": (0, 1)})
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if floor is not None:
        axes.set_ylim(bottom=floor)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = 2 if sum(map(len, labels)) > 45 else 4
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1.01),
            ncols=columns,
            fontsize=8.5,
            labelcolor=COLOURS["muted"],
        )
