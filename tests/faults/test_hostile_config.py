"""Any configuration file or value may be hostile: it is meant, or refused in one line."""

import os
import re

import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_config import SHIPPED
from test_hostile_data import ALIKE, NO_FILES, mutated, no_hang, one_line  # noqa: F401

import config
from config import MAX_BYTES, MAX_EVENTS, Config
from errors import BAD_CONFIG, MISSING, Refusal

pytestmark = pytest.mark.fault


def refusal(path: object, *overrides: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        config.load(path, overrides)
    assert one_line(caught.value)
    return caught.value


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_regular_file_is_66_and_not_waited_for(tmp_path, capsys, what):
    path = tmp_path / ("x" * 300 if what == "long name" else "below") / "c.yaml"
    make, reason = NO_FILES[what]
    if what not in ("long name", "below a file"):
        path.parent.mkdir()
    if make:
        make(path)
    reason = reason.replace("data file", "configuration file")
    assert refusal(path).message.endswith(f": {reason}")
    assert tiny.train.main(["--config", str(path)], tiny.StopAfter()) == MISSING
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\0b", "\x1b[31m", "\udcff", "x" * 5000, "a'\"\n$(id).yaml"])
def test_no_name_of_a_file_is_a_crash(name):
    assert refusal(name).exit_code == MISSING


def test_a_link_to_a_file_is_one_and_the_null_device_is_empty(tmp_path):
    (tmp_path / "link").symlink_to(SHIPPED)
    assert config.load(tmp_path / "link") == config.load(os.devnull) == Config()


MANY = MAX_EVENTS + 1
FILES = {
    "deep list": ("[" * 20_000, "line 1: nested too deeply"),
    "deep map": ("{a: " * 20_000, "line 1: nested too deeply"),
    "deep block": ("\n".join("  " * i + "a:" for i in range(1000)), "line 9: nested too deeply"),
    "deep dashes": ("- " * 20_000, "line 1: nested too deeply"),
    "deep keys": ("? " * 20_000, "line 1: nested too deeply"),
    "billion laughs": (
        "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(99)),
        "line 1: anchors and tags are not accepted",
    ),
    "merge key": ("run:\n  <<: {seed: 1}", "line 2: unknown key run.<<"),
    "merged alias": ("run: &a {seed: 1}\nlog: {<<: *a}", "line 1: anchors and tags are not"),
    "code": ("run: !!python/object/apply:os.abort []", "line 1: anchors and tags are not"),
    "two documents": ("log: {}\n---\nlog: {}", "line 2: a second document begins; expected one"),
    "many documents": ("---\n" * 100_000, "line 2: a second document begins; expected one"),
    "after the end": ("log: {}\n...\nlog: {}", "line 3: expected '<document start>'"),
    "list as section": ("? [a, b]\n: 1", "line 1: a section must be a word"),
    "map as key": ("run:\n  ? {a: b}\n  : 1", "line 2: a key must be a word"),
    "map as label": (
        "train:\n  class_weights: {[a]: 1}",
        "line 2: train.class_weights: expected a",
    ),
    "NUL": ("run:\n  seed: \0", "line 2: special characters are not allowed"),
    "colour": ("run:\n\n  seed: \x1b[31m", "line 3: special characters are not allowed"),
    "C1": ("run: {name: \x9b31m}", "line 1: special characters are not allowed"),
    "5,000 digits": ("run: {seed: " + "9" * 5000 + "}", "run.seed: expected a whole number, found"),
    "5,000 digits of YAML": ("%YAML 1." + "1" * 5000 + "\n---\n", "Exceeds the limit"),
    "no code point": ('run: {name: "\\U00110000"}', "chr() arg not in range"),
    "far beyond": ('run: {name: "\\UFFFFFFFF"}', "Python int too large"),
    "half a pair": (r'data: {train: "\ud83d"}', r"data.train: expected a text, found '\ud83d'"),
    "a byte of Latin-1": (b"run: {name: \xff}", "not UTF-8 at byte 12"),
    "UTF-16": ("run: {seed: 1}".encode("utf-16"), "not UTF-8 at byte 0"),
    "UTF-16 without mark": ("run: {}".encode("utf-16-le"), "line 1: special characters are not"),
    "UTF-32": ("run: {seed: 1}".encode("utf-32"), "not UTF-8 at byte 0"),
    "over 1 MiB": (b"#" * (MAX_BYTES + 1), "has more than 1,048,576 bytes"),
    "many values": (
        f"data: {{slice_columns: [{'a,' * (MAX_BYTES // 2 - 20)}]}}",
        "line 1: more values than a configuration can have",
    ),
    "many keys": (
        "log:\n" + "".join(f"  a{i}: 1\n" for i in range(80_000)),
        "more values than a configuration can have",
    ),
    "a long key": (f"run:\n  {'a' * 1_000_000}: 1", "line 2: mapping values are not allowed here"),
    "a long word": (
        f"run:\n  seed: {'a' * 1_000_000}",
        "line 2: run.seed: expected a whole number",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_hostile_file_is_refused_for_what_it_is(tmp_path, what):
    raw, message = FILES[what]
    path = tmp_path / "c.yaml"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    error = refusal(path)
    assert error.exit_code == BAD_CONFIG and error.message.startswith(str(path))
    assert message in error.message


TWINS = {
    "depth": ("data: {slice_columns: [a]}", ("a",)),
    "many values": (f"data: {{slice_columns: [{'a,' * 9000}]}}", ("a",) * 9000),
    "a document": ("---\ndata: {slice_columns: [b]}\n...\n", ("b",)),
    "a byte order mark": ("\ufeffdata: {slice_columns: [c]}", ("c",)),
    "escapes": (r'data: {slice_columns: ["\x1b\u202e\U0001F602"]}', ("\x1b\u202e\U0001f602",)),
}


@pytest.mark.parametrize("what", TWINS)
def test_the_twins_of_what_is_refused_are_accepted(tmp_path, what):
    raw, expected = TWINS[what]
    (tmp_path / "c.yaml").write_text(raw)
    cfg = config.load(tmp_path / "c.yaml")
    assert cfg.data.slice_columns == expected
    (tmp_path / "again.yaml").write_text(config.dump(cfg))
    assert config.load(tmp_path / "again.yaml") == cfg, "what is loaded can be dumped and loaded"


OVERRIDES = {
    "data.slice_columns=" + "[" * 20_000: "command line line 1: nested too deeply",
    "data.slice_columns=[" + "a," * 60_000 + "]": "more values than a configuration can have",
    "train.class_weights={a: 1}\n---\n{}": "command line line 2: a second document begins",
    "train.class_weights={a: &a 1}": "command line line 1: anchors and tags are not accepted",
    "data.slice_columns=[\0]": "command line line 1: special characters are not allowed",
    "data.train=a\0b": r"data.train: expected a text, found 'a\x00b'",
    "data.train=\udcff": r"data.train: expected a text, found '\udcff'",  # as argv holds byte ff
    "run.seed={a: 1}": "run.seed: expected a whole number, found 'a mapping'",
    "run.seed=" + "9" * 100_000: "run.seed: expected a whole number, found '999",
    "run.seed=1e400": "run.seed: expected a whole number, found '1e400'",
    "run.seed=-0x1": "run.seed: expected a whole number, found '-0x1'",
    "run.timeout_s=1e30": "run.timeout_s: 1000000000000000019884624838656 is not at least 1 and at",
    "train.max_steps=1e30": "is not at least 1 and at most 1000000000",
    "log.hardware_s=1e38": "log.hardware_s: 1e+38 is not above 0 and at most 1000000",
    "a" * 100_000 + "=1": "unknown key aaa",
    "=1": "command line: unknown key ; the sections are run",
    "a.b.c.d=1": "command line: unknown key a.b.c.d",
    "__class__.__init__=1": "command line: unknown key __class__.__init__",
    "\x1b]0;x\x07\u202e=1": r"command line: unknown key \x1b]0;x\x07\u202e",
    "run.seed=\x1b]0;x\x07": r"found '\x1b]0;x\x07'",
    "evaluation.metric= \t": r"evaluation.metric: expected a text, found ' \t'",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda o: re.sub(r"\W+", " ", o[:30]))
def test_a_hostile_setting_on_the_command_line_is_refused_for_what_it_is(override):
    error = refusal(SHIPPED, override)
    assert error.exit_code == BAD_CONFIG and OVERRIDES[override] in error.message


# Settings of the declared type that cannot be used, each with where it is found out.
VALUES = {
    "run.name": ("../../etc", "-rf", "a/b", "\u202e", "x" * 101, "."),
    "run.dir": ("/dev/null", "x" * 5000, "\x1b[31m/" + "y" * 300),
    "data.cache_dir": ("/dev/null", "x" * 5000, "/proc/none"),
    "data.train": ("~nobody/x", "/dev/zero", "/proc/self/mem.csv", "x" * 5000, "\x1b[31m.csv"),
    "data.text_column": ("\x1b[31m", "c" * 100_000),
    "data.positive_label": ("\x1b[31m", "c" * 100_000),
    "data.group_column": ("\u202e",),
    "data.slice_columns": ("\x1b[31m", "lang," * 1000 + "none"),
    "model.name": ("/dev/zero", "x" * 5000, "~nobody/x", "../..", "a/../b", "\x1b[31m", "-x"),
    "evaluation.metric": ("\x1b[31m", "f1_macro/worst:\x1b[31m", "__class__"),
    "train.class_weights": ("{a: 1}", '{"\\e[31m": 1, 0: 1}'),
}
CODES = {"run.dir": 73, "data.cache_dir": 73}  # the disk says so


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in VALUES.items() for v in vs])
def test_no_value_is_a_crash(small, tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.chdir(tmp_path)
    code = tiny.run([*tiny.settings(small, run__name="hostile"), f"{name}={value}"])
    shown = capsys.readouterr().err.rstrip("\n").split("\n")
    assert all(line.isprintable() for line in shown) and "Traceback" not in "".join(shown)
    assert code in (CODES.get(name), 65, MISSING, BAD_CONFIG), shown[-1]


NUMBERS = [n for n, f in config.settings().items() if re.search("int|float", str(f.type))]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1e30", "1e-30", "-1", "nan", "inf", "0", "9" * 5000])
def test_a_number_is_in_its_range_or_refused(name, value):
    try:
        config.load(None, [f"{name}={value}"])
    except Refusal as error:
        assert error.exit_code == BAD_CONFIG and name in one_line(error)


def test_the_largest_numbers_that_are_accepted_are_trained_with(small, tmp_path):
    largest = {name: config.settings()[name].metadata["high"] or 10**30 for name in NUMBERS}
    for name in ("data.max_length", "data.workers", "checkpoint.keep", "train.class_weights"):
        del largest[name]  # tested elsewhere, or refused for the disk
    largest |= {"optimizer.lr": 1e-3, "train.label_smoothing": 0.1, "train.max_nonfinite": 10**30}
    arguments = tiny.settings(small, run__dir=tmp_path, evaluation__patience=1, train__epochs=1)
    given_ = [f"{name}={value}" for name, value in largest.items() if "patience" not in name]
    assert tiny.run([*arguments, *given_, "train.max_steps=2"]) == 0


@settings(ALIKE, max_examples=700)
@given(st.one_of(st.binary(max_size=300), mutated(SHIPPED.read_bytes())))
@example(SHIPPED.read_bytes())
@example(b'"\\UFFFFFFFF"')
def test_any_bytes_are_a_configuration_or_refused(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    try:
        cfg = config.load(path)
    except Refusal as error:
        assert error.exit_code == BAD_CONFIG and one_line(error).startswith(str(path))
        return
    path.write_text(config.dump(cfg))
    assert config.load(path) == cfg


@settings(ALIKE, max_examples=500)
@given(st.sampled_from(list(config.settings())), st.text(max_size=20))
def test_any_text_is_a_setting_or_refused(name, value):
    try:
        cfg = config.load(None, [f"{name}={value}"])
    except Refusal as error:
        assert error.exit_code == BAD_CONFIG and one_line(error)
    else:
        assert config.dump(cfg)
