"""A setting is what was written, default < YAML < command line; nonsense is refused by name."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import config
from config import ELSEWHERE, Config, flatten
from errors import BAD_CONFIG, MISSING, Refusal

SHIPPED = Path(config.__file__).with_name("config.yaml")


def read(folder: Path, text: str | bytes, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.load(path, overrides)


def refusal(path: Path | None, *overrides: str) -> Refusal:
    """The refusal of a load: one line that a terminal shows as it stands."""
    with pytest.raises(Refusal) as caught:
        config.load(path, overrides)
    assert caught.value.message.isprintable(), repr(caught.value.message)
    return caught.value


def refused(folder: Path, text: str | bytes) -> str:
    """The message that refuses a file with exit code 78, without the file's name in front."""
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    error = refusal(path)
    assert error.exit_code == BAD_CONFIG and error.message.startswith(str(path))
    return error.message.removeprefix(str(path)).lstrip(" :")


# --- what is accepted -----------------------------------------------------------------------------


def test_config_yaml_equals_the_defaults_and_explains_every_key():
    assert config.load(SHIPPED) == config.load(None) == Config()
    text = SHIPPED.read_text(encoding="ascii")
    written = {f"{s}.{k}" for s, body in yaml.safe_load(text).items() for k in body}
    assert written == set(config.settings()), "a key without a line is a key nobody finds"
    lines = [re.fullmatch(r"  [a-z_]+: [^#]*(#.*)?", line) for line in text.splitlines()]
    bare = [m[0].strip() for m in lines if m and not m[1]]
    assert bare == [f"name: {Config().model.name}"], "its comment is above it"


def test_a_changed_default_does_not_pass_as_the_shipped_file(tmp_path):
    text = SHIPPED.read_text(encoding="ascii").replace("lr: 2e-5", "lr: 3e-5")
    assert read(tmp_path, text) != Config()


ODD = {
    "run.name": "null",
    "data.positive_label": "yes",
    "data.text_column": "a: b # c\n\td \u0645\u0632\u062d\u0629 \U0001f602",
    "data.validation": None,
    "data.slice_columns": ("lang", "no", "1"),
    "train.class_weights": {"yes": 1.5, "1": 2.0, "~": 1e-7},
    "train.micro_batch_size": 3,
    "train.max_grad_norm": None,
    "optimizer.lr": 1.2345678901234567e-05,
    "checkpoint.keep": "all",
}


@pytest.mark.parametrize("changes", [{}, ODD, *({k: v} for k, v in ODD.items())], ids=str)
def test_dump_and_load_give_the_same_config(tmp_path, changes):
    cfg = config.build(changes)
    assert {k: v for k, v in flatten(cfg).items() if k in changes} == changes
    assert read(tmp_path, config.dump(cfg)) == cfg


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(tmp_path):
    text = "train: {epochs: 7, max_steps: 8}"
    cfg = read(tmp_path, text, "train.epochs=9", "optimizer.lr=1", "optimizer.lr=3e-5")
    assert (cfg.train.epochs, cfg.train.max_steps, cfg.optimizer.lr) == (9.0, 8, 3e-5)
    assert dataclasses.replace(cfg, train=Config().train, optimizer=Config().optimizer) == Config()
    assert config.load(None, ["train.epochs=9"]).train.epochs == 9.0
    assert config.replace(cfg, train__epochs=2.0).train.max_steps == 8


READ = [
    ("optimizer.lr", "2e-5", 2e-5),
    ("optimizer.lr", "1", 1.0),
    ("run.seed", "1_000", 1000),
    ("train.micro_batch_size", "8", 8),
    ("train.micro_batch_size", "auto", "auto"),
    ("train.max_grad_norm", "null", None),
    ("train.class_weights", "balanced:lang", "balanced:lang"),
    ("train.class_weights", "{yes: 2, 1: 1e0, no: .5}", {"yes": 2.0, "1": 1.0, "no": 0.5}),
    ("data.slice_columns", "[yes, 1]", ("yes", "1")),
    ("data.slice_columns", "lang, topic", ("lang", "topic")),
    ("data.slice_columns", "[]", ()),
    ("data.slice_columns", "auto", "auto"),
    ("data.positive_label", "yes", "yes"),
    ("data.positive_label", "1", "1"),
    ("data.positive_label", "True", "True"),
    ("data.positive_label", "0x1F", "0x1F"),
    ("data.label_column", "null", "null"),
    ("data.test", "", None),
    ("run.deterministic", "no", False),
]


@pytest.mark.parametrize("name, text, value", READ)
def test_text_becomes_the_declared_type_and_words_stay_as_written(tmp_path, name, text, value):
    section, _, key = name.partition(".")
    from_file = flatten(read(tmp_path, f"{section}:\n  {key}: {text}\n"))[name]
    from_line = flatten(config.load(None, [f"{name}={text}"]))[name]
    assert from_file == from_line == value and type(from_file) is type(from_line) is type(value)


def test_a_path_below_home_is_not_a_folder_called_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["run.dir=~/runs", "data.test=~/t.csv", "data.validation=null", "data.text_column=~/x"]
    cfg = config.load(None, words)
    assert (cfg.run.dir, cfg.data.test) == ("/home/me/runs", "/home/me/t.csv")
    assert cfg.data.validation is None and cfg.data.text_column == "~/x"


def test_plain_yaml_would_have_changed_the_words():
    assert yaml.safe_load("[2e-5, yes, 1, 0x1F]") == ["2e-5", True, 1, 31]  # control


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "\ufefftrain: {epochs: 5}\n"])
def test_an_empty_file_section_or_byte_order_mark_is_no_fault(tmp_path, text):
    assert read(tmp_path, text) == Config()


# --- what is refused ------------------------------------------------------------------------------

UNKNOWN = [
    ("train:\n  learning_rate: 1e-5\n", "line 2: unknown key train.learning_rate", "optimizer.lr"),
    ("learning_rate: 1e-5\n", "line 1: unknown key learning_rate", "optimizer.lr"),
    ("train: {lr: 1e-5}\n", "line 1: unknown key train.lr", "optimizer.lr"),
    ("data:\n  limit: 3\n  leeks: drop\n", "line 3: unknown key data.leeks", "data.leaks"),
    ("log:\n  evry: 3\n", "line 2: unknown key log.evry", "log.every"),
    ("trian:\n  epochs: 3\n", "line 1: unknown key trian", "train"),
    ("\noptimiser:\n  lr: 1\n", "line 2: unknown key optimiser", "optimizer"),
]


@pytest.mark.parametrize("text, message, meant", UNKNOWN)
def test_an_unknown_key_is_named_with_its_line_and_the_key_meant(tmp_path, text, message, meant):
    assert refused(tmp_path, text) == f"{message}; did you mean {meant}?"


@pytest.mark.parametrize("theirs", ELSEWHERE)
def test_another_trainers_key_leads_to_a_key_that_exists(tmp_path, theirs):
    ours = ELSEWHERE[theirs]
    assert ours in config.settings() and theirs not in {k.split(".")[1] for k in config.settings()}
    message = refused(tmp_path, f"\ntrain:\n  {theirs}: 1\n")
    assert message == f"line 3: unknown key train.{theirs}; did you mean {ours}?"


REFUSED = {
    "nothing near": ("zzzz: 1", "line 1: unknown key zzzz; the sections are run, data, model,"),
    "dotted key": ("train.epochs: 3", "write 'epochs:' on a line of its own below 'train:'"),
    "twice": ("log:\n  every: 1\n  every: 2", "line 3: duplicate key log.every, first on line 2"),
    "section twice": ("log:\ndata:\nlog:\n", "line 3: duplicate key log, first on line 1"),
    "label twice": (
        "train:\n  class_weights: {a: 1, a: 2}",
        "line 2: train.class_weights: a label",
    ),
    "word for a number": (
        "run:\n  seed: x",
        "line 2: run.seed: expected a whole number, found 'x'",
    ),
    "list for a number": ("run: {seed: [1]}", "run.seed: expected a whole number, found 'a seq"),
    "fraction": ("run: {seed: 1.5}", "line 1: run.seed: expected a whole number, found '1.5'"),
    "hexadecimal": ("run: {seed: 0x10}", "run.seed: expected a whole number, found '0x10'"),
    "null": ("run: {seed: null}", "line 1: run.seed: expected a whole number, found 'null'"),
    "no truth": ("run: {deterministic: 2}", "run.deterministic: expected true or false, found '2'"),
    "empty text": ("data:\n  train:", "line 2: data.train: expected a text, found ''"),
    "NUL": ('data: {train: "a\\0b"}', r"data.train: expected a text, found 'a\x00b'"),
    "choice": ("data: {leaks: no}", "data.leaks: expected drop or stop or keep, found 'no'"),
    "word or number": (
        "log: {}\ncheckpoint: {keep: x}",
        "line 2: checkpoint.keep: expected a whole",
    ),
    "no such padding": (
        "speed: {padding: none}",
        "speed.padding: expected free or batch or max, found 'none'",
    ),
    "not yet": ("speed: {compile: true}", "speed.compile: expected false, found 'true'"),
    "no column": (
        "train: {class_weights: 'balanced:'}",
        "or balanced or none or balanced:COLUMN, found 'balanced:'",
    ),
    "weights": ("train: {class_weights: {a: x}}", "train.class_weights: expected a number, found"),
    "weight of 0": ("train: {class_weights: {a: 0}}", "train.class_weights: 0.0 is not above 0"),
    "too low": ("run: {seed: -1}", "run.seed: -1 is not at least 0 and at most 4294967295"),
    "too high": ("optimizer: {lr: 1.5}", "optimizer.lr: 1.5 is not above 0 and at most 1"),
    "at the bound": ("optimizer: {lr: 0}", "line 1: optimizer.lr: 0.0 is not above 0"),
    "not a number": ("log: {hardware_s: .nan}", "log.hardware_s: expected a number, found '.nan'"),
    "infinite": ("log: {hardware_s: 1e999}", "log.hardware_s: expected a number, found '1e999'"),
    "infinite word": ("log: {hardware_s: inf}", "log.hardware_s: expected a number, found 'inf'"),
    "infinite weight": ("train: {class_weights: {a: 1e999}}", "expected a finite number, found"),
    "anchor": ("run:\n  name: &a x", "line 2: anchors and tags are not accepted"),
    "alias": ("run:\n  name: *a", "line 2: anchors and tags are not accepted"),
    "tag": ("run:\n  seed: !!int 3", "line 2: anchors and tags are not accepted"),
    "object tag": (
        "run: !!python/object:os.system {}",
        "line 1: anchors and tags are not accepted",
    ),
    "over 1 MiB": ("#" * ((1 << 20) + 1), "has more than 1,048,576 bytes"),
    "Latin-1": (b"run:\n  name: caf\xe9\n", "not UTF-8 at byte 16"),
    "UTF-16": ("run: {seed: 1}".encode("utf-16"), "not UTF-8 at byte 0"),
    "deep": (f"run:\n  name: {'[' * 100_000}", "line 2: nested too deeply"),
    "a list in a list": (
        "data: {slice_columns: [[a]]}",
        "expected a single value, found a sequence",
    ),
    "no section": ("- a\n- b", "line 1: expected a section as 'key: value' lines"),
    "section is a list": ("log:\n  - every", "line 2: expected the keys of log as 'key: value'"),
    "section is a word": ("log: every", "line 1: expected the keys of log as 'key: value' lines"),
    "section no word": ("? [a]\n: 1", "line 1: a section must be a word"),
    "key no word": ("log:\n  ? [a]\n  : 1", "line 2: a key must be a word"),
    "broken YAML": ("log:\n  every: [1\nrun:\n", "line 3: expected ',' or ']', but got ':'"),
    "tab": ("log:\n\tevery: 5", "cannot start any token; indent with blanks"),
    "control character": ("log: \x1b[31m", "special characters are not allowed"),
    "two documents": ("log: {}\n---\nrun: {}", "line 2: a second document begins; expected one"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, text, message):
    assert message in refused(tmp_path, text)


def test_one_mebibyte_is_still_read(tmp_path):
    assert read(tmp_path, "#" * (1 << 20)) == Config()  # control


HOSTILE = r'"\e[31m\r\n\a\u202e\x9b\ud800"'  # escapes of YAML: colour, line ends, bell, bidi, CSI
HOSTILE_PLACES = ["{x}", "{x}: 1", "log:\n  {x}: 1", "log:\n  {x}: 1\n  {x}: 2", "log: {x}"]
HOSTILE_PLACES += ["run:\n  seed: {x}", "train:\n  class_weights: {x}", "data:\n  leaks: {x}"]


@pytest.mark.parametrize("text", HOSTILE_PLACES)
def test_no_control_character_of_the_file_reaches_the_message(tmp_path, text):
    refused(tmp_path, text.format(x=HOSTILE))  # it looks at the message
    assert not yaml.safe_load(HOSTILE.replace("\\ud800", "")).isprintable()  # control


COMMAND_LINE = [
    ("epochs=3", "command line: unknown key epochs; did you mean train.epochs?"),
    ("train.epochs", "command line: expected section.key=value, found 'train.epochs'"),
    ("train.epochs=x", "command line: train.epochs: expected a number, found 'x'"),
    ("run.seed=-1", "command line: run.seed: -1 is not at least 0"),
    ("data.slice_columns=[&a x]", "command line line 1: anchors and tags are not accepted"),
    ("data.slice_columns=[x", "command line line 1: expected ',' or ']'"),
    ("data.slice_columns=[\udcff]", "command line: not UTF-8 at byte 1"),  # as argv holds byte ff
    ("\x1b[31m", r"found '\x1b[31m'"),
    ("\x1b[31m=1", r"unknown key \x1b[31m; the sections are"),
    ("run.seed=\r\n", r"found '\r\n'"),
]


@pytest.mark.parametrize("override, message", COMMAND_LINE)
def test_a_wrong_override_is_refused_by_name(override, message):
    error = refusal(SHIPPED, override)
    assert error.exit_code == BAD_CONFIG and message in error.message


def test_a_missing_file_or_a_folder_is_66_and_its_name_is_shown_on_one_line(tmp_path):
    error = refusal(tmp_path / "a\nb.yaml")
    assert error.exit_code == MISSING and "a\\nb.yaml: no such configuration file" in error.message
    error = refusal(Path("none.yaml"))
    assert error.message.endswith(f"none.yaml: no such configuration file in {Path.cwd()}")
    error = refusal(tmp_path)
    assert error.exit_code == MISSING and "is a folder; expected a regular" in error.message
    (tmp_path / "a\nb.yaml").write_text("x: 1")
    assert refusal(tmp_path / "a\nb.yaml").exit_code == BAD_CONFIG
