"""Rows reach training whole and once, whatever the format; what cannot be trained on is named."""

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from config import DataConfig
from data import Splits, file_hash, normalised, read_splits, texts_by_row
from errors import BAD_DATA, MISSING, Refusal

TEXTS = ["null", "NA", "None", " 'n\"a' ", "two\nlines\r\nthree", "a,b\tc"]
TEXTS += ["\u0645\u0632\u062d\u0629", *(f"text {i}" for i in range(13))]
Rows = list[dict[str, object]]


def rows(n: int, *, label="01", prefix: str = "text", **columns) -> Rows:
    """n rows with different texts; a column is a value, or a function of the row's place."""
    columns = {"label": lambda i: label[i % len(label)]} | columns
    return [
        {"text": f"{prefix} {i}"} | {k: v(i) if callable(v) else v for k, v in columns.items()}
        for i in range(n)
    ]


def write(path: Path, records: Rows, encoding: str = "utf-8") -> str:
    """Records as CSV, TSV or JSONL, by the name of the file."""
    with open(path, "w", encoding=encoding, newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        else:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, records[0].keys(), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    return str(path)


def splits(folder: Path, train: Rows, validation: Rows | None = None, **options) -> Splits:
    """What `read_splits` makes of these rows as CSV files; options are settings of section data."""
    seed = options.pop("seed", 0)
    test = options.pop("test", None)
    named = {"train": train, "validation": validation, "test": test}
    files = {n: r and write(folder / f"{n}.csv", r) for n, r in named.items()}
    return read_splits(DataConfig(**files | options), seed=seed)


def refused(code: int, cfg: DataConfig) -> str:
    """The one line that refuses these data."""
    with pytest.raises(Refusal) as caught:
        read_splits(cfg, seed=0)
    assert caught.value.exit_code == code, caught.value.message
    assert caught.value.message.isprintable(), repr(caught.value.message)
    return caught.value.message


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "CSV"])
def test_every_format_gives_the_same_texts_labels_and_rows(tmp_path, kind, encoding):
    records = [{"humor": i % 2 == 0, "id": i, "tweet": t} for i, t in enumerate(TEXTS)]
    train = write(tmp_path / f"train.{kind}", records, encoding)
    validation = write(tmp_path / "v.tsv", [{"humor": k, "tweet": k} for k in (True, False)])
    columns = {"text_column": "tweet", "label_column": "humor"}
    got = read_splits(DataConfig(train, validation, None, **columns), seed=0)
    assert got.train.texts == TEXTS, "null, NA and None are texts, line ends stay as they are"
    assert got.train.rows.tolist() == list(range(1, len(TEXTS) + 1))
    assert got.label_names == ["False", "True"] and got.positive == 1
    assert got.train.labels.tolist() == [1 - i % 2 for i in range(len(TEXTS))]
    assert got.test is None and got.findings == []


def test_blank_lines_count_as_no_row_and_line_ends_may_be_of_any_kind(tmp_path):
    for name, raw in {
        "a.csv": b"text,label\r\n\r\nx,0\r\ny,1\r\n",
        "b.csv": b"text,label\rx,0\ry,1",
        "c.jsonl": b'{"text": "x", "label": 0}\n\n{"text": "y", "label": 1.0}',
    }.items():
        (tmp_path / name).write_bytes(raw)
        path = str(tmp_path / name)
        got = read_splits(DataConfig(path, path, None, leaks="keep"), seed=0)
        assert (got.train.texts, got.train.rows.tolist()) == (["x", "y"], [1, 2])
        assert got.label_names == ["0", "1"]


LABELS = [
    ("-1 1", "-1 1", 1),
    ("True False", "False True", 1),
    ("yes no", "no yes", 1),
    ("10 2 1", "1 2 10", None),  # the alphabet has 10 before 2
    ("0.5 -3 +2", "-3 0.5 +2", None),
    ("joke ad 10", "10 ad joke", None),
    ("joke ad ad", "ad joke", 1),  # the rarer
    ("joke ad joke", "ad joke", 0),
    ("2 3 3", "2 3", 0),
]


@pytest.mark.parametrize("written, order, positive", LABELS)
def test_labels_sort_by_value_and_the_positive_one_follows_the_rule(
    tmp_path, written, order, positive
):
    written, order = written.split(), order.split()
    files = rows(12, label=written), rows(6, label=written, prefix="v")
    got = splits(tmp_path, *files)
    assert got.label_names == order and got.positive == positive
    assert [order[i] for i in got.train.labels] == [written[i % len(written)] for i in range(12)]
    assert splits(tmp_path, *files, positive_label=order[0]).positive == 0


def test_slices_are_found_or_named_and_keep_the_words(tmp_path):
    train = rows(8, lang=lambda i: ["no", "", "1"][i % 3], topic="t")
    valid = rows(4, prefix="other", lang="no", topic=lambda i: f"t{i}")
    got = splits(tmp_path, train, valid)
    codes, names = got.train.slices["lang"]
    assert list(got.train.slices) == ["lang"] and names == ["(none)", "1", "no"]
    assert [names[c] for c in codes[:3]] == ["no", "(none)", "1"]
    other_case = splits(
        *(tmp_path, *([r | {"Language": r["lang"]} for r in t] for t in (train, valid)))
    )
    assert list(other_case.train.slices) == ["lang", "Language"]
    named = splits(tmp_path, train, valid, slice_columns=("topic",))
    assert named.validation.slices["topic"][1] == ["t0", "t1", "t2", "t3"]
    assert splits(tmp_path, train, valid, slice_columns=()).train.slices == {}


def test_rows_are_counted_by_label_and_slice_and_groups_are_kept(tmp_path):
    train = rows(
        8, lang=lambda i: "no"[i % 3 == 0], author=lambda i: "" if i == 1 else f"a{i // 2}"
    )
    got = splits(tmp_path, train, rows(4, prefix="v", lang="n", author="b"), group_column="author")
    assert got.report["train"]["rows"] == 8 and got.report["train"]["labels"] == {"0": 4, "1": 4}
    assert got.report["train"]["slices"] == {"lang": {"n": {"0": 2, "1": 3}, "o": {"0": 2, "1": 1}}}
    assert got.train.groups[2:] == ["a1", "a1", "a2", "a2", "a3", "a3"]
    assert got.train.groups[1] not in ("", "a0") and got.validation.groups == 4 * ["b"]
    assert list(got.named()) == ["train", "validation"]
    assert splits(tmp_path, train, train, leaks="keep").train.groups == []


def test_limit_draws_from_each_file_and_leaves_the_order(tmp_path):
    files = [rows(50), rows(30, prefix="v")]
    got, again, other = (splits(tmp_path, *files, limit=20, seed=s) for s in (0, 0, 1))
    assert len(got.train.rows) == len(got.validation.rows) == 20
    assert got.train.rows.tolist() == sorted(set(got.train.rows.tolist()))
    assert got.train.texts == [f"text {r - 1}" for r in got.train.rows]
    assert got.train.texts == again.train.texts != other.train.texts
    assert len(splits(tmp_path, *files, limit=40).validation.rows) == 30


# --- the validation split -------------------------------------------------------------------------


def test_the_part_held_out_is_stratified_disjoint_and_a_function_of_the_seed(tmp_path):
    train = rows(300, label="0001")
    got, again, other = (splits(tmp_path, train, seed=s) for s in (7, 7, 8))
    assert Counter(got.validation.labels.tolist()) == {0: 22, 1: 8}  # round(0.1 n) of 225 and 75
    parts = [*got.train.rows.tolist(), *got.validation.rows.tolist()]
    assert sorted(parts) == list(range(1, 301))
    assert got.validation.rows.tolist() == sorted(got.validation.rows), "in the file's order"
    assert got.validation.rows.tolist() == again.validation.rows.tolist()
    assert got.validation.rows.tolist() != other.validation.rows.tolist()
    assert got.report["held_out"] == 30 and not got.findings


def shared_groups(train_rows: np.ndarray, held_rows: np.ndarray, group_of: list[str]) -> set[str]:
    return {group_of[r - 1] for r in train_rows} & {group_of[r - 1] for r in held_rows}


def test_no_group_is_parted_when_validation_is_held_out(tmp_path):
    group_of = [f"g{i // 5}" if i < 280 else "" for i in range(300)]
    train = rows(300, label="00101", author=lambda i: group_of[i])
    got = splits(tmp_path, train, group_column="author", slice_columns=())
    assert shared_groups(got.train.rows, got.validation.rows, group_of) <= {""}
    assert 20 <= len(got.validation.rows) <= 40 and set(got.validation.labels) == {0, 1}
    naive = splits(tmp_path, train, slice_columns=())  # control: rows by themselves part groups
    assert len(shared_groups(naive.train.rows, naive.validation.rows, group_of) - {""}) > 5


def test_equal_texts_are_not_parted_when_validation_is_held_out(tmp_path):
    once = rows(100)
    got = splits(tmp_path, [*once, *(r | {"text": r["text"].upper()} for r in once)])
    assert not got.findings and len(got.validation.rows) == 20
    assert not set(map(normalised, got.train.texts)) & set(map(normalised, got.validation.texts))
    parted = {(row - 1) % 100 for row in splits(tmp_path, rows(200)).validation.rows.tolist()}
    assert len(parted) > 10, "control: other texts are drawn one by one"


ONE_SIDED = [
    (30 * "a" + "b", None, 31 * "x", "label 'b' has too few different texts"),
    (
        10 * "b" + 21 * "a",
        "author",
        10 * "x" + "abcdefghijklmnopqrstu",
        "label 'b' has too few groups",
    ),
    (15 * "ab" + "a", "author", 31 * "x", "1 groups are too few"),
]


@pytest.mark.parametrize("label, column, authors, message", ONE_SIDED)
def test_what_cannot_be_on_both_sides_is_named(tmp_path, label, column, authors, message):
    path = write(tmp_path / "t.csv", rows(31, label=label, author=lambda i: authors[i]))
    found = refused(BAD_DATA, DataConfig(path, None, None, group_column=column))
    assert message in found and found.startswith(path) and found.endswith("give data.validation")


# --- leaks and bad rows ---------------------------------------------------------------------------

SAME = ["A  joke!", "\uff21 JOKE!", "a\u00a0joke!", "\u3000a joke!\n", "a jo\uff4be\uff01"]


@pytest.mark.parametrize("text", SAME)
def test_texts_that_differ_in_case_width_or_spaces_are_the_same(text):
    assert normalised(text) == normalised("a joke!")
    assert normalised("STRA\u00dfE") == normalised("strasse")


@pytest.mark.parametrize("text", ["a joke", "ajoke!", "a joke?", "a jok\u00e9!", "a j\u043eke!"])
def test_another_text_stays_another_text(text):
    assert normalised(text) != normalised("a joke!")  # control


MASKED = [
    ("@Bob_1 is late", "@al is late"),
    ("\uff20bob is late", "@al is late"),
    ("look: https://t.co/A1b?x=2#y", "look: http://example.com"),
    ("look: WWW.example.com ...", "look: http ..."),
    ("\u770bhttp://t.cn/x\u7b11", "\u770bhttps://a.b\u7b11"),
    ("@bob http://a.b, yes", "@al http://c.d, yes"),
]


@pytest.mark.parametrize("one, other", MASKED)
def test_handles_and_links_do_not_make_another_text(one, other):
    assert normalised(one) == normalised(other)


NOT_MASKED = [
    ("me@a.b is late", "me@c.b is late"),
    ("5 @ 3 is late", "5 @ 4 is late"),
    ("@\u5c0f\u660e \u7b11", "@\u5c0f\u660e \u54ed"),
    ("see http://a.b/\u7b11", "see http://a.b/\u54ed"),
    ("@bob", "@al"),  # nothing else would be left
    (" @bob http://a.b\n", "@al http://c.d"),
    ("https is late", "http is late"),
]


@pytest.mark.parametrize("one, other", NOT_MASKED)
def test_what_is_no_handle_or_link_or_all_there_is_stays(one, other):
    assert normalised(one) != normalised(other)


def leaking(folder: Path, n: int, leaks: str) -> Splits:
    """40 training rows, of which the last n are in validation or test in capitals."""
    train = rows(40, lang="x")
    copies = [r | {"text": r["text"].upper()} for r in train[40 - n :]]
    valid = rows(4, prefix="v", lang="x") + copies[::2]
    return splits(folder, train, valid, test=rows(4, prefix="t", lang="x") + copies, leaks=leaks)


def test_leaked_training_rows_are_dropped_listed_and_counted(tmp_path):
    got = leaking(tmp_path, 4, "drop")  # exactly 10 % is not over it
    assert got.train.rows.tolist() == list(range(1, 37)) and len(got.train.slices["lang"][0]) == 36
    assert got.train.texts == [f"text {i}" for i in range(36)] and len(got.train.labels) == 36
    assert len(got.validation.rows) == 6 and len(got.test.rows) == 8, "evaluation rows stay"
    assert "4 rows (10.0%)" in got.findings[0] and "37, 38, 39, 40; left out" in got.findings[0]
    assert got.report["train"]["rows"] == 36
    [found] = got.report["findings"]
    assert (found["kind"], found["split"], found["count"]) == ("leaks", "train", 4)
    assert found["rows"] == [37, 38, 39, 40] and found["details"]["other_label"] == 0
    assert leaking(tmp_path, 0, "drop").findings == []  # control


def test_leaked_rows_whose_label_differs_there_are_named(tmp_path):
    train = rows(40)
    copies = [r | {"label": label} for r, label in zip(train[36:39], "011", strict=True)]
    copies.append(copies[2] | {"label": "0"})  # with both labels, one of which agrees
    got = splits(tmp_path, train, rows(8, prefix="v") + copies)
    assert "3 rows (7.5%)" in got.findings[0]
    assert got.findings[0].endswith("37, 38, 39; left out of training")
    copies[0]["label"] = "1"
    got = splits(tmp_path, train, rows(8, prefix="v") + copies)
    assert got.findings[0].endswith(
        "37, 38, 39 (1 with another label: 37 = 9 of validation); left out of training"
    )
    assert got.report["findings"][0]["details"]["other_label_rows"] == [37]


def test_leaks_may_be_kept_or_stop_the_run_and_over_a_tenth_always_does(tmp_path):
    kept = leaking(tmp_path, 9, "keep")
    assert len(kept.train.rows) == 40 and "9 rows (22.5%)" in kept.findings[0]
    for n, mode, reason in [(1, "stop", "set data.leaks=drop"), (5, "drop", "over 10% is a mix")]:
        with pytest.raises(Refusal, match=f"train.csv: {n} rows .*40.*{reason}") as caught:
            leaking(tmp_path, n, mode)
        assert caught.value.exit_code == BAD_DATA


def test_bad_rows_stop_or_are_skipped_and_the_first_ten_are_listed(tmp_path):
    train = rows(40)
    for i in range(0, 24, 2):
        train[i] |= {"text": " \t"} if i % 4 else {"label": ""}
    listed = "12 bad rows: row 1 (no label), row 3 (empty text), row 5 (no label), "
    with pytest.raises(Refusal) as caught:
        splits(tmp_path, train, rows(4, prefix="v"))
    assert caught.value.exit_code == BAD_DATA and f"train.csv: {listed}" in caught.value.message
    assert "row 19 (empty text), ...; mend them" in caught.value.message, "ten are listed"
    got = splits(tmp_path, train, rows(4, prefix="v"), bad_rows="skip")
    assert got.findings[0].startswith(f"train: {listed}")
    assert got.findings[0].endswith("19 (empty text), ...; skipped")
    assert got.train.rows.tolist() == [*range(2, 25, 2), *range(25, 41)]
    [found] = got.report["findings"]
    assert (found["kind"], found["count"], found["rows"]) == ("bad_rows", 12, list(range(1, 24, 2)))


# --- refusals -------------------------------------------------------------------------------------

GOOD = b"text,label\nx,0\ny,1\n"
JSON = b'{"text": "x", "label": 0}\n'
MANY = b"".join(b"x,word%d\n" % i for i in range(1001))
FILES = [
    ("csv", b"", "the file is empty"),
    ("jsonl", b" \n", "the file is empty"),
    ("csv", b"text,label\n\n", "no usable row below the header"),
    ("csv", b"text,label\nx,0\ny,0\n", "only one label, '0'"),
    (
        "csv",
        b"text;label;,\nx;0;z\n",
        "no column 'text' (data.text_column); the file has: text;label;",
    ),
    ("csv", b'\r\ntext;label;"a, b"\nx;0;\ny\n', "row 2 (line 4) has 1 fields, the header has 3"),
    ("jsonl", b'{"text;label": 1}\n', "has: text;label; are its columns parted by ';' where"),
    ("csv", GOOD + b"x\xe2\x82", "not UTF-8: it ends within a character, so it was cut off"),
    ("csv", b"a,label\nx,0\n", "no column 'text' (data.text_column); the file has: a, label"),
    ("tsv", b"text\tl\nx\t0\n", "no column 'label' (data.label_column)"),
    ("tsv", GOOD, "the file has: text,label"),
    ("csv", b"text,label, text\n", "two columns are called 'text'"),
    ("csv", b"text,label\n" + MANY, "1,001 different labels in 1,001 rows of 'label'; is that the"),
    ("csv", GOOD + MANY[:431], "51 different labels in 51 rows of 'label'; is that the label"),
    ("csv", b'text,label\n"x,0\ny,1\n', "line 3: broken quoting: unexpected end of data"),
    ("csv", b'text,label\n"x"y,0\n', "line 2: broken quoting: ',' expected after"),
    ("tsv", b'text\tlabel\n"x"y\t0\n', r"line 2: broken quoting: '\t' expected after"),
    ("csv", b'text,label\n"x\nx",0\n\ny\n', "row 2 (line 5) has 1 fields, the header has 2"),
    ("csv", b"text,label\nx,0\ny, z,1\n", "row 2 (line 3) has 3 fields, the header has 2"),
    (
        "csv",
        GOOD + 5000 * b"x,0\n" + b"\xe9,1\n",
        "not UTF-8: line 5,004 has byte 0xe9; is it Windows-1252?",
    ),
    (
        "csv",
        GOOD.decode().encode("utf-16"),
        "not UTF-8: line 1 has byte 0xff; is it UTF-16? Save",
    ),
    ("csv", GOOD.decode().encode("utf-16-le"), r"no column 'text' (data.text_column)"),
    ("xlsx", b"PK", "unknown kind of file; expected .csv, .tsv, .jsonl or .parquet"),
    ("jsonl", JSON + b"\n{'text'}\n", "line 3: not JSON: Expecting property name"),
    ("jsonl", JSON + b"[" * 200_000, "line 2: not JSON: "),
    ("jsonl", JSON + b'{"text": "\\uD83D", "label": 1}', r"line 2: not JSON: 'utf-8' codec"),
    ("jsonl", JSON + b'["x", 0]\n', "line 2: expected an object in braces"),
    ("jsonl", JSON + b'{"text": "y"}\n', "row 2 (no label)"),
    ("jsonl", b'{"text": ["x"], "label": 0}', "row 1 (empty text)"),
    ("jsonl", JSON + b'{"text": null, "label": 1}', "row 2 (empty text)"),
    ("jsonl", JSON + b'{"text": "y", "label": NaN}', "row 2 (no label)"),
]


@pytest.mark.parametrize("kind, raw, message", FILES, ids=[m[:40] for *_, m in FILES])
def test_a_file_that_cannot_be_trained_on_is_refused_by_name_and_place(
    tmp_path, kind, raw, message
):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(raw)
    found = refused(BAD_DATA, DataConfig(str(path), str(path), None, leaks="keep"))
    assert found.startswith(str(path)) and message in found


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("name", ["no.csv", "no.jsonl", "folder.csv", "folder.jsonl", "a\nb.tsv"])
def test_a_missing_file_or_a_folder_is_66(tmp_path, split, name):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    good = write(tmp_path / "good.csv", rows(4))
    files = {"train": good, "validation": good, "test": good} | {split: str(tmp_path / name)}
    reason = "is a folder; expected a regular file" if "folder" in name else "no such data file"
    assert refused(MISSING, DataConfig(**files, leaks="keep")).endswith(f": {reason}")
    with pytest.raises(Refusal, match=reason) as caught:
        file_hash(tmp_path / name)
    assert caught.value.exit_code == MISSING


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    path = str(tmp_path / "a.parquet")
    assert "pip install pyarrow" in refused(BAD_DATA, DataConfig(path, path, None))


MISFITS = [
    ("2", {}, "validation.csv: row 3 has label '2', which "),
    ("\x1b[31m\u202e\t2", {}, r"has label '\x1b[31m\u202e\t2', which "),
    ("1", {"positive_label": "yes"}, "data.positive_label: no label 'yes'; there are: 0, 1"),
    ("1", {"group_column": "author"}, "train.csv: no column 'author' (data.group_column)"),
    ("1", {"slice_columns": ("lang",)}, "train.csv: no column 'lang' (data.slice_columns)"),
]


@pytest.mark.parametrize("label, options, message", MISFITS)
def test_splits_and_settings_that_do_not_fit_each_other_are_refused(
    tmp_path, label, options, message
):
    valid = rows(4, prefix="v")
    valid[2]["label"] = label
    files = {"train": rows(8), "validation": valid}
    paths = {name: write(tmp_path / f"{name}.csv", r) for name, r in files.items()}
    assert message in refused(BAD_DATA, DataConfig(**paths, test=None, **options))


PUBLIC_SETS = {  # header as published, a row of it, settings of README's "Your data"
    "colbert.csv": ("text,humor", '"t {i}, u",{yes}', {"label_column": "humor"}),
    "hahackathon.csv": (
        "id,text,is_humor,humor_rating,humor_controversy,offense_rating",
        '{i},"T: t {i}",{y},,,0.2',
        {"label_column": "is_humor"},
    ),
    "haha.csv": (
        "id,texto,es_humor",
        '{i},"t {i}",{y}',
        {"text_column": "texto", "label_column": "es_humor"},
    ),
    "puntuguese.jsonl": ("", '{{"id": "{i}.H", "text": "t {i}", "label": {y}, "signs": [1]}}', {}),
    "isarcasm.csv": (
        ",tweet,sarcastic,rephrase,irony",
        '{i},"t {i}",{y},,',
        {"text_column": "tweet", "label_column": "sarcastic"},
    ),
    "urfunny.csv": (
        "id,context,punchline,label",
        '{g},"c","t {i}",{y}',
        {"text_column": "punchline", "group_column": "id"},
    ),
}


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_public_sets_are_read_as_they_are(tmp_path, name):
    header, row, settings = PUBLIC_SETS[name]
    rows = [row.format(i=i, y=i % 2, yes=bool(i % 2), g=i // 4) for i in range(40)]
    path = tmp_path / name
    path.write_text("\n".join([*([header] if header else []), *rows]), encoding="utf-8")
    splits = read_splits(DataConfig(str(path), None, None, **settings), seed=42)
    texts = splits.train.texts + splits.validation.texts
    assert len(texts) == 40 and all(text.split()[-2:] for text in texts)
    assert splits.label_names[splits.positive] in ("1", "True")


def test_texts_by_row_are_those_of_the_splits(tmp_path):
    records = [*rows(40), {"text": " ", "label": "1"}, {"text": "last", "label": "0"}]
    cfg = DataConfig(
        train=write(tmp_path / "train.csv", records), validation=None, test=None, bad_rows="skip"
    )
    found = texts_by_row(cfg.train, cfg)
    validation = read_splits(cfg, seed=0).validation
    assert len(validation.texts) > 2
    for row, text, label in zip(
        validation.rows.tolist(), validation.texts, validation.labels, strict=True
    ):
        assert found[row] == (text, str(label))
    assert 41 not in found and found[42] == ("last", "0")
    with pytest.raises(Refusal) as caught:
        texts_by_row(tmp_path / "none.csv", cfg)
    assert caught.value.exit_code == MISSING
