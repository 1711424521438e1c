"""The page's building blocks: HTML in which text from data, names and logs cannot become markup.

Whatever is no `Html` is text: on one line, cut, control and bidirectional marks shown as escapes.
"""

import html
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from errors import printable

STYLE = Path(__file__).with_name("report.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MAX_TEXT = 300  # characters of a text from outside
MAX_ATTRIBUTE = 1000
MAX_NAME = 40
JOINERS = "\u200c\u200d"  # not printable, but emoji and several scripts are not right without


class Html(str):
    """Markup that is ours."""


def short(name: object, limit: int = MAX_NAME) -> str:
    """A name within a sentence or a figure, printable; of a long one only the beginning is read."""
    return printable(str(name)[: limit + 1], limit)


def safe(value: object, limit: int = MAX_TEXT) -> Html:
    """`value` as it is if it is markup, else as text."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(short(value, limit)))


def quoted(text: str, limit: int = MAX_TEXT) -> Html:
    """A text of the data: its blanks and line ends as single blanks, its joiners kept."""
    line = " ".join(text[: 4 * limit].split())
    line = line if len(line) <= limit else line[:limit] + "..."
    return Html(html.escape("".join(c if c in JOINERS else printable(c, 10) for c in line)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; `class_` is class, an attribute of None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(value, MAX_ATTRIBUTE)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{''.join(map(safe, children))}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Pieces of markup or text, one after the other."""
    return Html("\n".join(map(safe, parts)))


def absent(why: object) -> Html:
    """What is said in the place of something that there is no source for."""
    return tag("p", why, class_="absent")


def note(*children: object) -> Html:
    """A paragraph in a smaller voice."""
    return tag("p", *children, class_="note")


def figures(*plates: Html | None, is_wide: bool = False) -> Html:
    """Figures beside each other as the width allows; wide ones below each other."""
    kind = "figures wide" if is_wide else "figures"
    return tag("div", *(plate for plate in plates if plate), class_=kind)


def plate(title: str, drawing: str, *words: object) -> Html:
    """A figure with its title and what is to be known of it. drawing: an <svg> of plots.py."""
    caption = tag("figcaption", tag("strong", title), *(w for word in words for w in (" ", word)))
    return tag("figure", caption, Html(drawing))


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    words: Collection[int] = (0,),
    marked: Collection[int] = (),
    caption: object = None,
    stacked: bool = False,
) -> Html:
    """A table. words: the columns that hold no numbers; marked: rows to be seen first.

    stacked: where the page is narrow, the cells of a row stand below each other, named.
    """
    sides = ["word" if i in words else "number" for i in range(len(head))]
    titles = [tag("th", h, class_=s, scope="col") for h, s in zip(head, sides, strict=True)]
    body = []
    for place, row in enumerate(rows):
        cells = [
            tag("td", cell, class_=side, dir="auto", data_name=name if stacked else None)
            for cell, side, name in zip(row, sides, head, strict=True)
        ]
        body.append(tag("tr", *cells, class_="marked" if place in marked else None))
    parts = [tag("caption", caption)] if caption else []
    parts += [tag("thead", tag("tr", *titles)), tag("tbody", *body)]
    return tag("div", tag("table", *parts, class_="stacked" if stacked else None), class_="scroll")


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and their values."""
    return tag("dl", *(tag("div", tag("dt", n), tag("dd", v, dir="auto")) for n, v in pairs))


def span_bar(low: float, value: float, high: float) -> Html:
    """An interval and its point on a line from 0 to 1, as high as a line of text."""
    a, b, c = (f"{100 * min(1.0, max(0.0, v)):.1f}" for v in (low, value, high))
    return Html(
        f'<svg class="span" role="img" aria-label="{low:.2f} to {high:.2f}" viewBox="0 0 100 10">'
        f'<path class="rail" d="M0 5H100"/><path class="reach" d="M{a} 5H{c}"/>'
        f'<circle cx="{b}" cy="5" r="2.6"/></svg>'
    )


def document(title: str, head: Html, sections: Sequence[tuple[str, str, Html]], foot: Html) -> str:
    """The whole document; sections: (anchor, title, body)."""
    links = [tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name, _ in sections]
    bodies = [tag("section", tag("h2", n), body, id=a) for a, n, body in sections]
    style = STYLE.read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{safe(title)}</title>
<style>
{style}</style>
</head>
<body>
{tag("nav", tag("ol", *links), aria_label="Contents")}
<main>
{tag("header", head)}
{join(bodies)}
{tag("footer", foot)}
</main>
</body>
</html>
"""
