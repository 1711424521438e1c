"""The section of the report about the data: how much of what there is, and what the check found."""

from collections.abc import Iterator, Mapping

from markup import Html, absent, join, note, short, table, tag
from runlog import number, part
from view import figure

SPLITS = ("train", "validation", "test")
MAX_LABELS = 10  # that have a column
MAX_LISTED = 200  # findings


def data(checked: Mapping[str, object]) -> Html:
    """Counts by split, then the findings. checked: what data_report.json holds."""
    found = checked.get("findings")
    if not isinstance(found, list):
        return absent("The run has no data_report.json that tells what the data check found.")
    messages = [f.get("message") if isinstance(f, dict) else f for f in found[:MAX_LISTED]]
    told = [tag("li", message, dir="auto") for message in messages]
    if held := number(checked.get("held_out")):
        text = f"The {held:,.0f} validation texts were split off the training file."
        told.insert(0, tag("li", text))
    none = [] if found else [tag("p", "The data check found nothing wrong.")]
    return join([*_counts(checked), *none, tag("ul", *told), *_surface(checked)])


def _counts(checked: Mapping[str, object]) -> Iterator[Html]:
    splits = {name: part(checked, name) for name in SPLITS if part(checked, name)}
    labels = list(dict.fromkeys(label for s in splits.values() for label in part(s, "labels")))
    shown = labels[:MAX_LABELS]
    rows = [
        [
            name,
            figure(split.get("rows"), ",.0f"),
            *(figure(part(split, "labels").get(label, 0), ",.0f") for label in shown),
            figure(split.get("cut_share"), ".1%"),
            figure(split.get("unknown_share"), ".2%"),
            figure(split.get("near_training"), ",.0f"),
        ]
        for name, split in splits.items()
    ]
    named = [f"of '{short(label)}'" for label in shown]
    head = ["", "texts", *named, "cut", "unknown tokens", "in training, too"]
    if rows:
        yield table(head, rows)
        left = f" {len(labels) - len(shown):,} more labels are left out." if labels != shown else ""
        yield note(
            "Cut: longer than data.max_length. In training, too: texts that are equal or nearly "
            "equal to one that was trained on, directly or over others. By slice, too, in "
            f"data_report.json.{left}"
        )


def _surface(checked: Mapping[str, object]) -> Iterator[Html]:
    surface = part(checked, "surface")
    score, chance = (figure(surface.get(key), ".2f") for key in ("balanced_accuracy", "chance"))
    if surface:
        yield note(
            f"From length, punctuation, capitals, digits, emoji and links alone, a small decision "
            f"tree has a balanced accuracy of {score} on validation; chance is {chance}. "
            "What a model adds to that it may have from reading."
        )
