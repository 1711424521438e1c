"""Configuration: frozen dataclasses, read from YAML and `section.key=value`, checked by name.

Dataclass default < YAML < command line. Scalars are read as text and converted by the declared
type, so `2e-5` is a number and `yes` as a label stays the word that was written.
"""

import dataclasses
import difflib
import errno
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import ge, gt, le
from pathlib import Path

import yaml

from errors import BAD_CONFIG, MISSING, Refusal, printable
from files import read_bytes

MAX_BYTES = 1 << 20  # a configuration of over 1 MiB is a mistake or an attack
# Whose ~ is the user's home, as the shell has it only where it stands alone.
PATHS = ("run.dir", "data.cache_dir", "data.train", "data.validation", "data.test")
MAX_DEPTH = 8  # of YAML, ours needs 3; thousands of levels hang PyYAML, or exhaust the stack
MAX_EVENTS = 10_000  # of YAML, ours has 250; half a million values take PyYAML a minute


def key(default, *, low=None, high=None, above=None, choices=None, alters=True):
    """A setting. low <= value <= high, value > above; `alters`: it can change a run's result."""
    check = {"low": low, "high": high, "above": above, "choices": choices, "alters": alters}
    return field(default=default, metadata=check)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it repeats."""

    name: str | None = key(None, alters=False)
    dir: str = key("runs", alters=False)
    seed: int = key(42, low=0, high=2**32 - 1)
    deterministic: bool = key(True)
    device: str = key("auto", choices=("auto", "cpu", "cuda"), alters=False)
    resume: str = key("auto", choices=("auto", "never"), alters=False)
    timeout_s: int = key(1800, low=1, high=10**7, alters=False)


@dataclass(frozen=True)
class DataConfig:
    """Which texts, and how they are read and cut."""

    train: str = key("examples/train.csv", alters=False)  # the content counts, not the path
    validation: str | None = key("examples/validation.csv", alters=False)
    test: str | None = key("examples/test.csv", alters=False)
    text_column: str = key("text")
    label_column: str = key("label")
    slice_columns: str | tuple[str, ...] = key("auto")
    group_column: str | None = key(None)
    positive_label: str = key("auto")
    max_length: int = key(128, low=4, high=8192)
    truncation: str = key("head_tail", choices=("head", "tail", "head_tail"))
    limit: int | None = key(None, low=1)
    bad_rows: str = key("stop", choices=("stop", "skip"))
    leaks: str = key("drop", choices=("drop", "stop", "keep"))
    cache_dir: str = key(".cache", alters=False)
    workers: int | str = key("auto", low=0, high=64, choices=("auto",), alters=False)


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    name: str = key("FacebookAI/xlm-roberta-base", alters=False)  # the weights count, not the name


@dataclass(frozen=True)
class TrainConfig:
    """One update and how many of them."""

    epochs: float = key(5.0, above=0, high=10_000)
    max_steps: int | None = key(None, low=1, high=10**9)
    global_batch_size: int = key(32, low=1, high=1 << 20)
    micro_batch_size: int | str = key("auto", low=1, choices=("auto",), alters=False)
    micro_batch_tokens: int | str = key("auto", low=8, choices=("auto",), alters=False)
    accumulation_steps: int | str = key("auto", low=1, choices=("auto",), alters=False)
    precision: str = key("auto", choices=("auto", "fp32", "bf16"))
    class_weights: str | dict[str, float] = key(  # noqa: RUF009  a str by default
        "balanced", choices=("balanced", "none", "balanced:COLUMN"), above=0
    )
    label_smoothing: float = key(0.0, low=0, high=0.9)
    max_grad_norm: float | None = key(1.0, above=0)
    max_nonfinite: int = key(10, low=0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = key(2e-5, above=0, high=1)
    weight_decay: float = key(0.01, low=0, high=1)
    layer_decay: float = key(1.0, above=0, high=1)


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine."""

    warmup_ratio: float = key(0.1, low=0, high=1)
    min_lr_ratio: float = key(0.0, low=0, high=1)


@dataclass(frozen=True)
class EvaluationConfig:
    """When the validation set is scored, and which score decides."""

    every: int | str = key("epoch", low=1, choices=("epoch",))
    metric: str = key("f1_macro")
    patience: int | None = key(3, low=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and how many are kept."""

    every: int | str = key("epoch", low=1, choices=("epoch",), alters=False)
    keep: int | str = key(1, low=1, choices=("all",), alters=False)


@dataclass(frozen=True)
class LogConfig:
    """How often the log gets a line."""

    every: int = key(10, low=1, alters=False)
    hardware_s: float = key(10.0, above=0, high=10**6, alters=False)


@dataclass(frozen=True)
class SpeedConfig:
    """Savings that do not change what is computed."""

    padding: str = key("free", choices=("free", "batch", "max"), alters=False)
    active_vocabulary: bool = key(True)  # other tensors in a checkpoint, other last bits
    first_position: bool = key(True, alters=False)
    gradient_checkpointing: bool = key(False, alters=False)
    compile: bool = key(False, choices=(False,), alters=False)


@dataclass(frozen=True)
class Config:
    """Every setting of a run, by section."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)


SECTIONS = [s.name for s in fields(Config)]
BOUNDS = (("at least", ge, "low"), ("above", gt, "above"), ("at most", le, "high"))
OF_A_MACHINE = ("data.train", "data.validation", "data.test", "data.cache_dir", "data.workers")
OF_A_MACHINE += ("model.name", "run.dir", "log.hardware_s")  # the content counts, not the path

# Settings as other trainers call them (transformers' TrainingArguments, Lightning).
TOLD = {
    "optimizer.lr": "learning_rate",
    "train.epochs": "num_train_epochs num_epochs max_epochs",
    "train.micro_batch_size": "per_device_train_batch_size auto_find_batch_size",
    "train.global_batch_size": "batch_size train_batch_size",
    "train.accumulation_steps": "gradient_accumulation_steps accumulate_grad_batches",
    "train.max_grad_norm": "gradient_clip_val clip_grad_norm",
    "train.label_smoothing": "label_smoothing_factor",
    "train.precision": "fp16 bf16 mixed_precision",
    "train.class_weights": "class_weight",
    "schedule.warmup_ratio": "warmup_steps num_warmup_steps",
    "schedule.min_lr_ratio": "lr_scheduler_type",
    "evaluation.patience": "early_stopping_patience",
    "evaluation.metric": "metric_for_best_model",
    "evaluation.every": "eval_steps eval_strategy evaluation_strategy",
    "checkpoint.every": "save_steps save_strategy",
    "checkpoint.keep": "save_total_limit",
    "log.every": "logging_steps",
    "run.dir": "output_dir",
    "run.name": "run_name",
    "run.resume": "resume_from_checkpoint",
    "run.device": "use_cpu no_cuda",
    "data.max_length": "max_seq_length max_seq_len",
    "model.name": "model_name_or_path model_name",
    "data.train": "train_file",
    "data.validation": "validation_file",
    "data.test": "test_file",
    "data.text_column": "text_column_name",
    "data.label_column": "label_column_name",
    "data.workers": "dataloader_num_workers",
    "speed.compile": "torch_compile",
}
ELSEWHERE = {word: ours for ours, words in TOLD.items() for word in words.split()}


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration from a YAML file (None: the defaults) with `section.key=value` on top.

    Raises Refusal 66 for a missing file and 78 for whatever in it cannot be meant.
    """
    found: dict[str, tuple[yaml.Node, str]] = dict(_read_yaml(Path(path))) if path else {}
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator:
            raise Refusal(
                BAD_CONFIG,
                f"command line: expected section.key=value, found '{printable(override)}'",
            )
        found[name] = (_override_node(value), "command line")
    values = {name: _convert(name, node, where) for name, (node, where) in found.items()}
    return build(values)


def build(values: Mapping[str, object]) -> Config:
    """A Config from full keys to values of the declared types, defaults elsewhere."""
    sections = {}
    for section in fields(Config):
        given = {
            f.name: values[f"{section.name}.{f.name}"]
            for f in fields(section.type)
            if f"{section.name}.{f.name}" in values
        }
        sections[section.name] = section.type(**given)
    return Config(**sections)


def replace(cfg: Config, **changes: object) -> Config:
    """`cfg` with some settings changed, named `section__key` because a dot is no identifier."""
    flat = flatten(cfg) | {name.replace("__", "."): value for name, value in changes.items()}
    return build(flat)


def flatten(cfg: Config) -> dict[str, object]:
    """Full key to value, in the order of the dataclasses."""
    return {
        f"{section.name}.{f.name}": getattr(getattr(cfg, section.name), f.name)
        for section in fields(Config)
        for f in fields(section.type)
    }


def settings() -> dict[str, dataclasses.Field]:
    """Full key to its dataclass field."""
    return {f"{s.name}.{f.name}": f for s in fields(Config) for f in fields(s.type)}


def altering(cfg: Config) -> dict[str, object]:
    """The settings that can change the result, by full key; see `key`."""
    known = settings()
    return {name: v for name, v in flatten(cfg).items() if known[name].metadata["alters"]}


def shared(cfg: Config) -> dict[str, object]:
    """The settings that every rank must have alike: all but what a machine has for itself."""
    return {name: v for name, v in flatten(cfg).items() if name not in OF_A_MACHINE}


def dump(cfg: Config) -> str:
    """YAML that `load` reads back to an equal Config."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(cfg))), sort_keys=False)


def written(value: object) -> str:
    """A setting as it is written in config.yaml."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_yaml(path: Path) -> Iterator[tuple[str, tuple[yaml.Node, str]]]:
    """Full key -> (node, where it stands) of a YAML file of two levels."""
    shown = printable(path, 200)
    try:
        raw = read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        where = "" if Path(path).is_absolute() else f" in {printable(Path.cwd(), 200)}"
        raise Refusal(MISSING, f"{shown}: no such configuration file{where}") from None
    except OSError as error:
        code = BAD_CONFIG if error.errno == errno.EFBIG else MISSING
        raise Refusal(code, f"{shown}: {error.strerror}") from None
    root = _compose(raw, shown)
    if root is None:
        return
    seen: dict[str, int] = {}
    for section, body in _pairs(root, shown, "a section"):
        where = f"{shown} line {section.start_mark.line + 1}"
        if not isinstance(section, yaml.ScalarNode):
            raise Refusal(BAD_CONFIG, f"{where}: a section must be a word")
        if section.value not in SECTIONS:
            raise _unknown(section.value, where)
        _refuse_second(section.value, section, seen, where)
        if isinstance(body, yaml.ScalarNode) and body.value == "":
            continue
        for name, value in _pairs(body, shown, f"the keys of {section.value}"):
            where = f"{shown} line {name.start_mark.line + 1}"
            if not isinstance(name, yaml.ScalarNode):
                raise Refusal(BAD_CONFIG, f"{where}: a key must be a word")
            full = f"{section.value}.{name.value}"
            _refuse_second(full, name, seen, where)
            yield full, (value, where)


def _refuse_second(name: str, node: yaml.Node, seen: dict[str, int], where: str) -> None:
    """Note on which line `name` stands; Refusal 78 if it stood on an earlier one."""
    if name in seen:
        first = f"first on line {seen[name]}"
        raise Refusal(BAD_CONFIG, f"{where}: duplicate key {printable(name)}, {first}")
    seen[name] = node.start_mark.line + 1


def _compose(raw: bytes, where: str) -> yaml.Node | None:
    """The node tree of one YAML document without anchors, aliases or tags."""
    try:
        text = raw.decode("utf-8-sig")
        depth = documents = 0
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            documents += isinstance(event, yaml.DocumentStartEvent)
            is_shared = getattr(event, "anchor", None) or getattr(event, "tag", None)
            faults = {
                "nested too deeply": depth > MAX_DEPTH,
                "anchors and tags are not accepted": is_shared,
                "a second document begins; expected one": documents > 1,
                "more values than a configuration can have": number > MAX_EVENTS,
            }
            for fault in (words for words, is_so in faults.items() if is_so):
                line = event.start_mark.line + 1
                raise Refusal(BAD_CONFIG, f"{where} line {line}: {fault}")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise Refusal(BAD_CONFIG, f"{where}: not UTF-8 at byte {error.start}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Refusal(BAD_CONFIG, f"{where} line {line}: {printable(error.reason)}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # not its own for "\UFFFFFFFF"
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        problem = f"{problem}; indent with blanks" if "'\\t'" in str(problem) else problem
        raise Refusal(BAD_CONFIG, f"{where}{line}: {printable(problem)}") from None


def _pairs(node: yaml.Node, path: str, what: str) -> list[tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise Refusal(BAD_CONFIG, f"{path} line {line}: expected {what} as 'key: value' lines")
    return node.value


def _override_node(value: str) -> yaml.Node:
    """A command-line value: YAML where it is a list or a map, otherwise the text as it stands."""
    if re.match(r"\s*[\[{]", value):
        node = _compose(value.encode(errors="surrogateescape"), "command line")
        if node is not None:
            return node
    return yaml.ScalarNode("tag:yaml.org,2002:str", value)


def _unknown(name: str, where: str) -> Refusal:
    full, word = [*settings()], name.rpartition(".")[2]
    words = {k.rpartition(".")[2]: k for k in reversed(full)}
    guess = ELSEWHERE.get(word) or words.get(word)
    if guess is None:
        if "." not in name:  # it may be a section that is meant
            words |= {s: s for s in SECTIONS if s != name}
        near = [words[w] for w in difflib.get_close_matches(word, words, n=1)]
        near_full = difflib.get_close_matches(name, full, n=1)
        guess = next(iter(near_full + near if "." in name else near + near_full), None)
    hint = f"; did you mean {guess}?" if guess else f"; the sections are {', '.join(SECTIONS)}"
    if guess == name:  # at the top level of a file
        hint = f"; write '{word}:' on a line of its own below '{name.partition('.')[0]}:'"
    return Refusal(BAD_CONFIG, f"{where}: unknown key {printable(name)}{hint}")


def _convert(name: str, node: yaml.Node, where: str) -> object:
    """The value of one setting in its declared type and range, or Refusal 78."""
    known = settings()
    if name not in known:
        raise _unknown(name, where)
    setting = known[name]
    types_ = _members(setting.type)
    check = setting.metadata
    try:
        value = _parse(node, types_, check["choices"])
    except ValueError as error:
        raise Refusal(BAD_CONFIG, f"{where}: {name}: {error}") from None
    if name in PATHS and value:
        value = os.path.expanduser(value)
    bounds = [(words, fits, check[b]) for words, fits, b in BOUNDS if check[b] is not None]
    for number in value.values() if isinstance(value, dict) else [value]:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if is_number and not all(fits(number, limit) for _, fits, limit in bounds):
            wanted = " and ".join(f"{words} {limit}" for words, _, limit in bounds)
            raise Refusal(BAD_CONFIG, f"{where}: {name}: {number} is not {wanted}")
    return value


def _members(annotation: object) -> list[object]:
    """The alternatives of a type such as `int | str | None`, the most specific first."""
    union = isinstance(annotation, types.UnionType)
    members = list(typing.get_args(annotation)) if union else [annotation]
    return sorted(members, key=lambda t: t is str)


def _parse(node: yaml.Node, members: list[object], choices: tuple | None) -> object:
    """The node as the first of `members` that it can be; `choices` bind words and booleans."""
    for member in members:
        origin = typing.get_origin(member)
        if origin is tuple and isinstance(node, yaml.SequenceNode):
            return tuple(_scalar(item, str) for item in node.value)
        if origin is dict and isinstance(node, yaml.MappingNode):
            weights = {_scalar(k, str): _scalar(v, float) for k, v in node.value}
            if len(weights) < len(node.value):
                raise ValueError("a label is named twice")
            return weights
        if not isinstance(node, yaml.ScalarNode):
            continue
        if member is types.NoneType and node.style is None and node.value in ("", "~", "null"):
            return None
        if member in (int, float, bool, str):
            try:
                value = _scalar(node, member)
            except ValueError:
                continue
            bound = member in (str, bool) and choices
            if bound and not _is_choice(value, choices):
                break
            if member is str and not value.strip():
                break
            if member is str and any(typing.get_origin(m) is tuple for m in members):
                return value if value == "auto" else tuple(v.strip() for v in value.split(","))
            return value
    found = node.value if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
    raise ValueError(f"expected {_expected(members, choices)}, found '{printable(found)}'")


def _is_choice(value: object, choices: tuple) -> bool:
    """Whether a word is one of `choices`; that of balanced:COLUMN stands for any column."""
    if value in choices:
        return True
    prefixes = [c.removesuffix("COLUMN") for c in choices if str(c).endswith(":COLUMN")]
    return any(value.startswith(p) and value.removeprefix(p).strip() for p in prefixes)


def _scalar(node: yaml.Node, kind: type) -> object:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"expected a single value, found a {node.id}")
    text = node.value
    if kind is str:
        if "\0" in text:  # no file name, and a crash where one is opened
            raise ValueError("expected a text without NUL")
        text.encode()  # ValueError for half a surrogate pair, which no log and no YAML can hold
        return text
    if kind is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        if text.lower() not in words:
            raise ValueError(f"expected true or false, found '{printable(text)}'")
        return words[text.lower()]
    if not re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?", text) or len(text) > 40:
        raise ValueError(f"expected a number, found '{printable(text)}'")
    number = float(text.replace("_", ""))
    if not math.isfinite(number):  # 1e999
        raise ValueError(f"expected a finite number, found '{printable(text)}'")
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError(f"expected a whole number, found '{printable(text)}'")
    return int(number)


def _expected(members: list[object], choices: tuple | None) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    words = []
    for member in members:
        if member is types.NoneType:
            words.append("nothing")
        elif member in (str, bool) and choices:
            words += [str(c).lower() if isinstance(c, bool) else c for c in choices]
        elif typing.get_origin(member) is tuple:
            words.append("a list such as [lang, source]")
        elif typing.get_origin(member) is dict:
            words.append("a map such as {joke: 2.0, other: 1.0}")
        else:
            words.append(names[member])
    return " or ".join(words)
