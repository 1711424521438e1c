"""The page says what a run's files say and what they lack, and takes no word of them for markup."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import finished
import pytest
from logs import EVENTS, NOW, START, as_lines, contents, make_run, step

import markup
import plots
import report
from errors import CANNOT_WRITE, MISSING, Refusal, printable

HOSTILE = "</style></script></svg><script>a()</script><img src=x onerror=a()>\"'`{}%s&amp;${1}$"
HOSTILE += "$\\frac{1}{0}$]]>--><!--\x1b[31m\x07\u202e\u2066\u200b" + "y" * 300
LONG = "x" * 100_000
TEXT = re.compile(r"<[^>]*>")


class Outline(HTMLParser):
    """The elements of a page with the names of their attributes; addresses; text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, name, attributes):
        placed = ("x", "y", "transform")  # which of them a text has depends on how long it is
        self.elements.append((name, *(key for key, _ in attributes if key not in placed)))
        for key, value in attributes:
            if key in ("src", "href", "action", "data", "srcset"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finished.make(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def page(run) -> str:
    return report.page(run, now=NOW)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Neither figures nor intervals, for tests of what is told in words."""
    monkeypatch.setattr(plots, "_svg", lambda *_: "<svg></svg>")
    monkeypatch.setattr(report, "told_interval", lambda *_, **__: None)


def words(text: str) -> str:
    """A page's text."""
    return html.unescape(TEXT.sub(" ", text))


def section(text: str, anchor: str) -> str:
    """The text of one section."""
    return words(text.partition(f'<section id="{anchor}">')[2].partition("</section>")[0])


def copy(run: Path, folder: Path) -> Path:
    """A run that may be spoilt."""
    return Path(shutil.copytree(run, folder / "copy"))


# --- what is shown --------------------------------------------------------------------------------


def numbers(text: str) -> list[str]:
    """The numbers of three places in the head, intervals apart."""
    head = text.partition("<header>")[2].partition("</header>")[0]
    head = re.sub(r'<span class="interval">.*?</span>|95 % interval [^<]*', "", head)
    return re.findall(r"(?<=>)\d\.\d{3}(?=<)", head)


def test_the_headline_is_that_of_the_results(run, page, tmp_path):
    def expected(results: dict) -> list[str]:
        large = [results["test"][s] for s in ("f1_macro", "f1_positive")]
        rows = []
        for split in ("test", "validation"):
            for s in ("f1_macro", "f1_positive"):
                baselines = results[split]["baselines"]
                rows += [results[split][s], baselines["tfidf"][s], baselines["majority"][s]]
        return [f"{v:.3f}" for v in large + rows]

    results = json.loads((run / "results.json").read_text())
    assert numbers(page) == expected(results)

    other = copy(run, tmp_path)
    results["test"]["f1_positive"] += 0.01
    (other / "results.json").write_text(json.dumps(results))
    assert numbers(report.page(other)) == expected(results) != numbers(page)


def test_the_intervals_are_those_of_the_predictions(run, page):
    import bootstrap
    import predictions

    found = predictions.read(run, "test", ["word 0", "word 1"])
    scorer = bootstrap.scorer("f1_positive", 1)
    low, high = bootstrap.interval(found.labels, found.predicted, 2, scorer)
    assert f"95 % interval {low:.3f} to {high:.3f}" in page


def test_every_section_has_its_figures_and_tables(page):
    figures = {"curves": 4, "confusion": 2, "precision": 2, "calibration": 2, "threshold": 1}
    figures |= {"length": 1, "hardware": 5}
    for anchor, count in figures.items():
        body = page.partition(f'<section id="{anchor}">')[2].partition("</section>")[0]
        assert body.count("<figure>") == count, anchor
    assert "rare" in section(page, "slices") and "n/a" in section(page, "slices")
    assert "optimizer.lr 0.001 2e-05" in " ".join(section(page, "configuration").split())
    assert "split off the training file" in section(page, "data")


def test_the_stored_decision_is_told_beside_argmax(run, page, tmp_path, quick):
    def row(page: str, label: str) -> list[str]:
        body = page.partition('<section id="threshold">')[2].partition("</section>")[0]
        rows = re.findall("<tr.*?</tr>", body)
        return words(next(r for r in rows if words(r).strip().startswith(label))).split()

    results = json.loads((run / "results.json").read_text())
    decided = results["test"]["decided"]
    stored = row(page, "test, threshold")
    assert stored[2] == f"{decided['threshold']:.3f}" and f"{decided['f1_macro']:.3f}" in stored
    assert "0.70–0.90" in stored
    assert f"{results['test']['calibration_error']:.3f}" in row(page, "test, argmax")

    other = copy(run, tmp_path)
    results["test"]["decided"] |= {"threshold": 0.123, "f1_macro": 0.987}
    (other / "results.json").write_text(json.dumps(results))
    assert {"0.123", "0.987"} <= set(row(report.page(other), "test, threshold"))


def test_the_score_without_near_duplicates_is_told(run, page, tmp_path, quick):
    assert "nearly equal to a training text" not in page
    other = copy(run, tmp_path)
    results = json.loads((run / "results.json").read_text())
    results["test"]["near_duplicates"] = {"texts": 1234, "without": {"f1_macro": 0.4567}}
    (other / "results.json").write_text(json.dumps(results))
    assert "1,234 texts of test are nearly equal" in report.page(other)
    assert "without them, macro-F1 is 0.457." in report.page(other)


def test_the_data_section_says_what_the_check_found(run, tmp_path, quick):
    other = copy(run, tmp_path)
    counts = {"rows": 1234, "labels": {"a": 1200, "<b>": 34}, "cut_share": 0.051}
    counts |= {"unknown_share": 0.002, "near_training": 7}
    finding = {"kind": "near", "message": "test: 3 texts <i>nearly</i> equal", "rows": [1, 2, 3]}
    surface = {"balanced_accuracy": 0.612, "chance": 0.5}
    other_counts = counts | {"labels": {"a": 99}}
    checked = {"train": counts, "test": other_counts, "findings": [finding], "surface": surface}
    (other / "data_report.json").write_text(json.dumps(checked))
    page = report.page(other)
    text = " ".join(section(page, "data").split())
    assert "train 1,234 1,200 34 5.1% 0.20% 7 test 1,234 99 0 5.1%" in " ".join(text.split())
    assert "validation" not in text.split("Cut")[0]
    assert "test: 3 texts <i>nearly</i> equal" in text and "<i>nearly" not in page
    assert "balanced accuracy of 0.61 on validation; chance is 0.50" in text
    checked |= {"findings": []}
    (other / "data_report.json").write_text(json.dumps(checked))
    assert "The data check found nothing wrong." in section(report.page(other), "data")


def test_the_errors_are_the_most_confident_ones_with_their_texts(run, page):
    lines = (run / "predictions" / "validation.jsonl").read_text().splitlines()
    wrong = [r for r in map(json.loads, lines) if r["label"] != r["predicted"]]
    wrong.sort(key=lambda r: -max(r["probabilities"]))
    body = page.partition('<section id="errors">')[2].partition("</section>")[0]
    shown = [words(row).split() for row in re.findall("<tr>(.*?)</tr>", body)[1:]]
    assert [row[0] for row in shown] == [str(r["row"]) for r in wrong[:20]]
    assert [row[-2:] for row in shown] == [["word", str(r["row"] - 1)] for r in wrong[:20]]


def test_a_slice_and_its_worst_are_marked(run, page):
    rows = re.findall(r'<tr class="marked">.*?</tr>', page)
    slices = json.loads((run / "results.json").read_text())["test"]["slices"]["word lang"]
    scored = {name: s["f1_macro"] for name, s in slices.items() if s["f1_macro"] is not None}
    assert words(rows[0]).split()[:2] == min(scored, key=scored.get).split()


def test_intervals_of_slices_are_those_of_the_results(run, tmp_path, quick):
    other = copy(run, tmp_path)
    results = json.loads((run / "results.json").read_text())
    slices = results["test"]["slices"]["word lang"]
    assert "0.11–0.99" not in section(report.page(other), "slices")
    next(iter(slices.values()))["intervals"] = {"f1_macro": [0.11, 0.99], "f1_positive": None}
    (other / "results.json").write_text(json.dumps(results))
    assert "0.11–0.99" in section(report.page(other), "slices")


@pytest.mark.parametrize("classes", [3, 12])
def test_of_more_than_two_classes(tmp_path, classes):
    text = report.page(finished.make(tmp_path, classes=classes))
    assert "there is no single threshold" in section(text, "threshold")
    assert "Each label against the rest" in section(text, "precision")
    assert ("4 rarer labels are left out" in section(text, "precision")) == (classes == 12)


def test_the_command_is_quoted(tmp_path, quick):
    text = report.page(finished.make(tmp_path, name="a b;$(c)'"))
    quoted = f"'{tmp_path}/runs/a b;$(c)'\"'\"'/config.yaml' run.resume=never"
    assert f"./run_xlm_roberta_v2.sh {quoted}" in section(text, "repeat")


# --- what is not there ----------------------------------------------------------------------------


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path):
    run = make_run(tmp_path, as_lines(START))
    text = report.page(run, now=NOW)
    assert "No final scores" in words(text) and "No evaluation has been logged" in words(text)
    assert "No step has been logged yet" in section(text, "curves")
    for anchor in ("confusion", "precision", "calibration", "threshold", "length", "errors"):
        assert "no predictions yet: the run has not finished" in section(text, anchor), anchor
    assert "No slices" in section(text, "slices")
    assert "no record of the machine" in section(text, "hardware")
    assert "<figure>" not in text


def test_a_test_set_without_a_label_leaves_validation_its_scores(run, tmp_path, quick):
    other = copy(run, tmp_path)
    results = json.loads((run / "results.json").read_text())
    results["test"] |= dict.fromkeys(("f1_macro", "f1_positive"))
    (other / "results.json").write_text(json.dumps(results))
    assert f"{results['validation']['f1_macro']:.3f}" in numbers(report.page(other))


def test_an_unfinished_run_shows_its_best(tmp_path):
    text = report.page(make_run(tmp_path, as_lines(*EVENTS), status="preempted"), now=NOW)
    assert "0.732" in text and "best validation macro-F1 so far, at step 10" in words(text)
    assert "stopped, can go on" in text
    assert numbers(text) == ["0.732"]


def test_what_cannot_be_read_is_named(run, tmp_path, quick):
    other = copy(run, tmp_path)
    predictions = other / "predictions" / "test.jsonl"
    predictions.write_bytes(predictions.read_bytes()[:-30])
    (other / "data_report.json").write_text("[")
    text = report.page(other)
    assert "Test: predictions/test.jsonl: line 60 is not JSON" in section(text, "confusion")
    assert "validation" in section(text, "calibration").lower()
    assert "data_report.json does not name the validation file" in section(text, "errors")


def test_tokens_that_an_older_run_lacks(run, tmp_path, quick):
    other = copy(run, tmp_path)
    for split in ("test", "validation"):
        path = other / "predictions" / f"{split}.jsonl"
        path.write_text(re.sub(r'"tokens": \d+, ', "", path.read_text()))
    text = section(report.page(other), "length")
    assert "Test: this run's predictions tell no token counts" in text


def test_texts_only_of_the_file_that_was_scored(run, tmp_path, quick):
    other = copy(run, tmp_path)
    report_file = json.loads((other / "data_report.json").read_text())
    table = Path(report_file["validation"]["file"]).read_text().splitlines()
    for spoilt, reason in (
        ([table[0], *reversed(table[1:])], "another label in row"),
        (table[:-3], "no row 58"),
        (["a,b", "c,d"], "no column"),
        (None, "no such data file"),
    ):
        file = tmp_path / "validation.csv"
        file.unlink(missing_ok=True)
        if spoilt:
            file.write_text("\n".join(spoilt) + "\n")
        report_file["validation"]["file"] = str(file)
        (other / "data_report.json").write_text(json.dumps(report_file))
        text = section(report.page(other), "errors")
        assert "Rows only, no texts" in text and reason in text
        assert "word 7" not in text


def test_alarms_are_shown(tmp_path, quick):
    events = [START, *(step(i, nonfinite=["loss"], loss=None) for i in range(1, 9))]
    run = make_run(tmp_path, as_lines(*events), status="failed", reason="out of <memory>")
    text = section(report.page(run, now=NOW), "alarms")
    assert "The loss or the gradient was not finite." in text
    assert "out of <memory>" in text and "Try: " in text


# --- what others wrote ----------------------------------------------------------------------------


@pytest.mark.parametrize("word", [HOSTILE, LONG], ids=["hostile", "long"])
def test_no_word_of_a_run_is_markup(tmp_path, page, word):
    name = '<img src=x>"&$x$\u202e' if word is HOSTILE else "some"
    text = report.page(finished.make(tmp_path, word, name=name), now=NOW)
    assert Outline(text).elements == Outline(page).elements
    unprintable = {c for c in text if not c.isprintable()} - {"\n", "\u200b"}
    assert not unprintable
    assert len(text) < 1 << 20
    if word is HOSTILE:
        assert printable(HOSTILE, 60)[:50] in words(text)  # shown as what it is


def test_unless_it_is_not_escaped(tmp_path, page, monkeypatch):
    monkeypatch.setattr(markup, "safe", lambda value, limit=0: markup.Html(value))
    text = report.page(finished.make(tmp_path, "<b>bold</b>"), now=NOW)
    assert Outline(text).elements != Outline(page).elements


def test_the_page_refers_to_nothing_and_runs_nothing(page):
    outline = Outline(page)
    anchors = set(re.findall(r' id="([^"]*)"', page))
    assert outline.addresses
    assert {a[:1] for a in outline.addresses} == {"#"}
    assert {a[1:] for a in outline.addresses} <= anchors
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert not {"script", "link", "iframe", "object", "img", "base", "form"} & {
        e[0] for e in outline.elements
    }
    assert not [a for e in outline.elements for a in e[1:] if a.startswith("on")]
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page
    assert "@import" not in page


def test_ids_are_there_once(page):
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(set(ids)) == len(ids) > 12


JUNK = [None, -1, 1e299, "x", [], {}, [[1, 2], [3]], {"a": {"b": 1}}, 10**400]


@pytest.mark.parametrize("file", ["results.json", "run_state.json", "data_report.json"])
def test_values_of_another_kind(run, tmp_path, file, quick):
    other = copy(run, tmp_path)
    known = json.loads((run / file).read_text())
    for junk in JUNK[::3]:
        spoilt = {
            k: {n: junk for n in v} if isinstance(v, dict) else junk for k, v in known.items()
        }
        (other / file).write_text(json.dumps(spoilt))
        assert "</html>" in report.page(other)


def test_events_of_another_kind(tmp_path):
    kinds = ("start", "step", "eval", "hardware", "warning", "end", "checkpoint")
    names = {k for e in EVENTS for k in e} | {"gpus", "host", "config", "environment", "message"}
    events = []
    for i, junk in enumerate(JUNK):
        fields = {name: junk for name in sorted(names - {"event", "time"})}
        events += [{"event": kind} | fields for kind in kinds[i % 2 :]]
    run = make_run(tmp_path, as_lines(*events, *EVENTS[1:], {"event": "start"} | fields))
    assert "</html>" in report.page(run, now=NOW)


# --- the file -------------------------------------------------------------------------------------


def test_only_the_report_is_written_and_the_same_again(run, tmp_path):
    other = copy(run, tmp_path)
    (other / "best" / "link").symlink_to("/nowhere")
    before = contents(other)
    path = report.write_report(other)
    first = path.read_bytes()
    assert path == other / "report.html" and first.startswith(b"<!DOCTYPE html>")
    assert report.write_report(other).read_bytes() == first
    assert contents(other) == before | {"report.html": first}


def test_a_link_in_its_place_is_replaced_not_followed(run, tmp_path, quick):
    other, elsewhere = copy(run, tmp_path), tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (other / "report.html").symlink_to(elsewhere)
    report.write_report(other)
    assert elsewhere.read_text() == "mine" and not (other / "report.html").is_symlink()


def test_refusals(run, tmp_path, quick):
    for nothing in (tmp_path / "none", tmp_path):
        with pytest.raises(Refusal) as caught:
            report.write_report(nothing)
        assert caught.value.exit_code == MISSING and "no run" in caught.value.message
    other = copy(run, tmp_path)
    (other / "report.html").mkdir()
    with pytest.raises(Refusal) as caught:
        report.write_report(other)
    assert caught.value.exit_code == CANNOT_WRITE and "report.html" in caught.value.message


def test_a_long_log_makes_no_long_page(tmp_path):
    line = '{{"event": "step", "time": {0}, "step": {0}, "loss": 0.{1}, "lr": 0.{1}}}\n'
    rows = (line.format(i, i * 7919 % 1000) for i in range(1, 200_001))
    log = as_lines(START) + "".join(rows).encode()
    text = report.page(make_run(tmp_path, log), now=NOW)
    assert "200,000" in words(text)
    assert text.count("<figure>") == 2 and len(text) < 300_000


def test_without_torch():
    code = "import sys, report; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    root = Path(report.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
