"""Any file of a model's folder may be hostile: it is loaded, or refused in one line; none runs."""

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hostile_data import ALIKE, EVIL, a_socket, mutated, no_hang, one_line  # noqa: F401

import model as models
from errors import BAD_CONFIG, MISSING, Refusal

pytestmark = pytest.mark.fault
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
INDEX, SETTINGS = "model.safetensors.index.json", "tokenizer_config.json"


@pytest.fixture
def folder(small, tmp_path) -> Path:
    """A copy of the tiny checkpoint, and beside it what code of its own would touch."""
    return shutil.copytree(small / "model", tmp_path / "model")


def start(small: Path, folder: Path, capsys, **changes: object) -> tuple[int, str]:
    """Exit code and last line of a run of one step; no code of the folder was executed."""
    changes = {"train__max_steps": 1, "run__dir": folder.parent / "runs"} | changes
    code = tiny.run(tiny.settings(small, model__name=folder, **changes))
    shown = capsys.readouterr().err.rstrip("\n").split("\n")
    assert all(line.isprintable() for line in shown) and "Traceback" not in "".join(shown)
    assert not (folder.parent / "canary").exists()
    return code, shown[-1]


Damage = Callable[[Path], object]


def put(name: str, raw: bytes | str) -> Damage:
    """Other content of a file."""
    return lambda folder: (folder / name).write_bytes(
        raw if isinstance(raw, bytes) else raw.encode()
    )


def with_(name: str, **changes: object) -> Damage:
    """Other values in a JSON file."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / name).read_bytes()) | changes
        (folder / name).write_text(json.dumps(found))

    return damage


def made(name: str, make: Callable[[Path], None]) -> Damage:
    """Something else of this name."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def sparse(name: str, size: int) -> Damage:
    """A file that is as large as that and takes no place."""

    def damage(folder: Path) -> None:
        with open(folder / name, "ab") as file:
            file.truncate(size)

    return damage


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Canary(folder.parent / "canary")))


def only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(Canary(folder.parent / "canary"), folder / "pytorch_model.bin")


def header(length: int, body: bytes = b"{}") -> Damage:
    return put(WEIGHTS, struct.pack("<Q", length) + body)


def tensors(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        found = {name: change(name, t) for name, t in load_file(folder / WEIGHTS).items()}
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def sharded(names: object) -> Damage:
    """The weights in a shard, and an index that says where."""

    def damage(folder: Path) -> None:
        shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        keys = load_file(folder / "part.safetensors")
        shards = dict.fromkeys(keys, names) if isinstance(names, str) else names
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))

    return damage


def inside(change: Callable[[dict], object]) -> Damage:
    """Another tokenizer.json."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / TOKENIZER).read_bytes())
        change(found)
        (folder / TOKENIZER).write_text(json.dumps(found))

    return damage


def more_pieces(found: dict) -> None:
    found["model"]["vocab"] += [[f"piece{i}", -1.0] for i in range(9)]


def no_unknown(found: dict) -> None:
    pieces = ("<s>", "<pad>", "\u2581", "a", "\u2581a")
    found["model"] |= {"unk_id": None, "vocab": [[piece, -1.0] for piece in pieces]}
    found["added_tokens"], found["post_processor"] = [], None


def id_beyond(found: dict) -> None:
    found["post_processor"]["special_tokens"]["<s>"]["ids"] = [99_999]


def unheard_token(found: dict) -> None:
    found["post_processor"]["special_tokens"] = {}


WEIGHTS_DAMAGED = {
    "a pickle": (pickled, "cannot be loaded: SafetensorError"),
    "a pickle alone": (only_pickled, "pickled weights (.bin) are not loaded"),
    "nothing": (put(WEIGHTS, b""), "SafetensorError: Error while deserializing header: header too"),
    "no header": (header(0), "cannot be loaded: SafetensorError"),
    "a short header": (header(1 << 20), "invalid header length"),
    "a huge header": (header(1 << 40), "header too large"),
    "the hugest header": (header((1 << 64) - 1), "header too large"),
    "a deep header": (header(500_000, b'{"a":' * 100_000), "recursion limit exceeded"),
    "cut off": (
        lambda f: put(WEIGHTS, (f / WEIGHTS).read_bytes()[:-1000])(f),
        "file not fully covered",
    ),
    "longer": (sparse(WEIGHTS, 1 << 40), "file not fully covered"),
    "misshapen": (tensors(lambda n, t: t[..., :-1].contiguous()), "has in another shape"),
    "not finite": (tensors(lambda n, t: t * torch.nan), "what it computes is not finite"),
    "other names": (
        lambda f: save_file({EVIL: torch.zeros(1)}, f / WEIGHTS, metadata={"format": "pt"}),
        "lacks the tensor roberta.",
    ),
    "shard outside": (sharded("../outside.safetensors"), "names '../outside.safetensors', no .saf"),
    "absolute shard": (sharded("/etc/passwd"), "names '/etc/passwd', no .safetensors file"),
    "pickled shard": (sharded("part.bin"), "names 'part.bin', no .safetensors file of this folder"),
    "shard of a list": (sharded({"a": ["x"]}), "names '['x']', no .safetensors file"),
    "odd shards": (sharded([1]), "names '[1]', no .safetensors file"),
    "escaped shard": (sharded("\x1b[31m"), r"names '\x1b[31m', no .safetensors file"),
    "index of a list": (put(INDEX, "[]"), "index.json: expected an object in braces"),
    "deep index": (put(INDEX, "[" * 100_000), "index.json: maximum recursion depth"),
}
CONFIG_DAMAGED = {
    "10**12 labels": (with_(CONFIG, num_labels=10**12), "num_labels: 1000000000000 is no count up"),
    "10**12 layers": (with_(CONFIG, num_hidden_layers=10**12), "is no count up to 10,000"),
    "hidden layers": (with_(CONFIG, a={"n_layers": 10**12}), "n_layers: 1000000000000 is no count"),
    "10,000 layers": (with_(CONFIG, num_hidden_layers=10_000), "many more parameters than its"),
    "no layer": (with_(CONFIG, num_hidden_layers=0), "num_hidden_layers: 0 is no count up to"),
    "hidden size -1": (with_(CONFIG, hidden_size=-1), "Trying to create tensor with negative"),
    "hidden size 10**9": (
        with_(CONFIG, hidden_size=10**9),
        "many more parameters than its weights",
    ),
    "10**9 tokens": (with_(CONFIG, vocab_size=10**9), "many more parameters than its weights have"),
    "10**12 positions": (
        with_(CONFIG, max_position_embeddings=10**12),
        "many more parameters than",
    ),
    "10**10 wide": (
        with_(CONFIG, intermediate_size=10**10),
        "many more parameters than its weights",
    ),
    "4000 digits": (with_(CONFIG, hidden_size=10**4000), "cannot be loaded: "),
    "no head": (with_(CONFIG, num_attention_heads=0), "cannot be loaded: ZeroDivisionError"),
    "id2label a list": (with_(CONFIG, id2label=["a"]), "AttributeError: 'list' object has no"),
    "words as ids": (with_(CONFIG, id2label={"\x1b": "a"}), "invalid literal for int()"),
    "certain dropout": (
        with_(CONFIG, hidden_dropout_prob=1.0),
        "hidden_dropout_prob: 1.0 is not at",
    ),
    "no number": (
        with_(CONFIG, attention_probs_dropout_prob=float("nan")),
        "nan is not at least 0",
    ),
    "no spread": (with_(CONFIG, initializer_range=-1.0), "normal expects std >= 0.0"),
    "pad beyond": (with_(CONFIG, pad_token_id=10**9), "Padding_idx must be within"),
    "no pad": (with_(CONFIG, pad_token_id=None), "cannot be loaded: TypeError"),
    "a word for a number": (with_(CONFIG, layer_norm_eps="\x1b"), "expected float, got str"),
    "unheard activation": (with_(CONFIG, hidden_act="eval"), "cannot be loaded: KeyError: 'eval'"),
    "a kernel of others": (with_(CONFIG, attn_implementation="evil/kernel"), "cannot be loaded: "),
    "quantised": (with_(CONFIG, quantization_config={"a": 1}), "quantization_config is not"),
    "elsewhere": (with_(CONFIG, transformers_weights="../x.safetensors"), "is not supported"),
    "odd dtype": (with_(CONFIG, dtype="hub"), "model: TypeError: "),
    "unheard type": (
        with_(CONFIG, model_type="\x1b[31m"),
        r"model type `\x1b[31m` but Transformers",
    ),
    "type of a list": (with_(CONFIG, model_type=[1]), "TypeError: unhashable type"),
    "own code": (
        with_(CONFIG, model_type="unheard", auto_map={"AutoConfig": "canary.Thing"}),
        "custom code",
    ),
    "deep": (put(CONFIG, '{"a":' * 100_000), "config.json: maximum recursion depth exceeded"),
    "a list": (put(CONFIG, "[]"), "config.json: expected an object in braces"),
    "not UTF-8": (put(CONFIG, b'{"a": "\xff"}'), "config.json: 'utf-8' codec can't decode byte"),
    "NUL": (put(CONFIG, bytes(99)), "config.json: Expecting value: line 1 column 1"),
    "5000 digits": (put(CONFIG, '{"a": ' + "1" * 5000 + "}"), "config.json: Exceeds the limit"),
    "20 MB": (sparse(CONFIG, 20 << 20), "config.json: has 20,971,520 bytes; expected at most"),
}
TOKENIZER_DAMAGED = {
    "broken": (put(TOKENIZER, "{"), "no tokenizer: JSONDecodeError"),
    "deep": (put(TOKENIZER, '{"a":' * 100_000), "no tokenizer: RecursionError"),
    "a list": (put(TOKENIZER, "[]"), "no tokenizer: TypeError"),
    "1 GB": (
        sparse(TOKENIZER, 1 << 30),
        "tokenizer.json: has 1,073,741,824 bytes; expected at most",
    ),
    "no pieces": (inside(lambda t: t["model"].update(vocab=[])), "no tokenizer: Exception: "),
    "of no kind": (
        inside(lambda t: t["model"].update(type="\x1b[31m")),
        "no tokenizer: Exception: ",
    ),
    "more ids than weights": (
        inside(more_pieces),
        "the tokenizer has ids up to 1",
    ),
    "an id beyond": (inside(id_beyond), "the tokenizer has ids up to 99999, the weights"),
    "an unheard token": (inside(unheard_token), "no tokenizer: PanicException: no entry found"),
    "nothing for the unknown": (
        inside(no_unknown),
        "its tokenizer fails on the data: Encountered an",
    ),
    "settings of a list": (put(SETTINGS, "[]"), "no tokenizer: AttributeError: 'list' object has"),
    "deep settings": (put(SETTINGS, "[" * 100_000), "no tokenizer: RecursionError"),
    "20 MB of settings": (
        sparse(SETTINGS, 20 << 20),
        "tokenizer_config.json: has 20,971,520 bytes",
    ),
    "an unheard pad": (with_(SETTINGS, pad_token="\x1b[31m"), "the tokenizer has ids up to 1"),
    "a number for a token": (with_(SETTINGS, pad_token=3), "Special token pad_token has to be"),
    "words for a length": (with_(SETTINGS, model_max_length="x"), "no tokenizer: TypeError"),
    "odd tokens": (with_(SETTINGS, added_tokens_decoder={"x": {}}), "no tokenizer: "),
    "odd files": (
        with_(SETTINGS, fast_tokenizer_files=["tokenizer.1/../../x.json"]),
        "no tokenizer:",
    ),
}
DAMAGE = {
    f"{what}: {name}": damage
    for what, table in [
        ("weights", WEIGHTS_DAMAGED),
        ("config", CONFIG_DAMAGED),
        ("tokenizer", TOKENIZER_DAMAGED),
    ]
    for name, damage in table.items()
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_hostile_model_is_66_in_one_line_that_says_why(small, folder, capfd, what):
    damage, message = DAMAGE[what]
    (folder / "canary.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'x')\n")
    damage(folder)
    code = tiny.run(tiny.settings(small, model__name=folder))
    line = capfd.readouterr().err.rstrip("\n").split("\n")[-1]
    assert code == MISSING and line.startswith("model.name: ") and line.isprintable(), line
    assert message in line, line
    assert not (folder.parent / "canary").exists()


READ = (WEIGHTS, CONFIG, TOKENIZER, SETTINGS, INDEX, "special_tokens_map.json", "vocab.txt")
READ += ("added_tokens.json", "sentencepiece.bpe.model", "chat_template.jinja", "x.safetensors")
KINDS = {
    "FIFO": (os.mkfifo, "is a FIFO; expected a regular file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is a device; expected a regular file"),
    "folder": (Path.mkdir, "is a folder; expected a regular file"),
    "socket": (a_socket, "No such device or address"),
    "link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "No such file or directory"),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_66_and_not_waited_for(folder, monkeypatch, name, kind):
    make, reason = KINDS[kind]
    monkeypatch.chdir(folder)  # a socket's path has at most 100 characters
    Path(name).unlink(missing_ok=True)
    make(Path(name))
    with pytest.raises(Refusal) as caught:
        models.find_source(str(folder))
    assert caught.value.exit_code == MISSING
    assert one_line(caught.value) == f"model.name: {folder / name}: {reason}"


# --- what is harmless -----------------------------------------------------------------------------


def linked(folder: Path) -> None:
    """As the hub's cache lays its files out."""
    (folder.parent / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder.parent / "blobs" / str(i))
        path.symlink_to(f"../blobs/{i}")


def with_code(folder: Path) -> None:
    """Python files that somebody's code would be in, named wherever it can be."""
    classes = ("AutoConfig", "AutoModelForSequenceClassification", "AutoTokenizer")
    (folder / "canary.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'x')\n")
    (folder / "tokenization_canary.py").symlink_to("canary.py")
    with_(CONFIG, auto_map=dict.fromkeys(classes, "canary.Thing"))(folder)
    with_(SETTINGS, auto_map={"AutoTokenizer": ["canary.Thing", "canary.Thing"]})(folder)


def with_pickles(folder: Path) -> None:
    """Pickles beside the weights, where older formats have theirs."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        with open(folder / name, "wb") as file:
            pickle.dump(Canary(folder.parent / "canary"), file)


HARMLESS = {
    "as it is": lambda folder: None,
    "links": linked,
    "code of its own": with_code,
    "pickles beside": with_pickles,
    "shards": sharded("part.safetensors"),
    "an index of others": put("pytorch_model.bin.index.json", '{"weight_map": {"a": "../b"}}'),
    "a folder beside": lambda folder: (folder / "onnx.d").mkdir(),
    "a FIFO that is not read": made("README.md", os.mkfifo),
    "files elsewhere": with_(SETTINGS, vocab_file="/dev/zero", tokenizer_file="/dev/zero"),
    "an evil class": with_(SETTINGS, tokenizer_class="os.system"),
    "templates elsewhere": with_(SETTINGS, chat_template={"../../../canary": "x", "a": 1}),
    "outputs": with_(CONFIG, return_dict=False, output_attentions=True, output_hidden_states=True),
    "chunks": with_(CONFIG, chunk_size_feed_forward=7),
    "evil labels": with_(CONFIG, id2label={"0": EVIL, "1": "x" * 100_000}),
    "evil names": with_(
        CONFIG, _name_or_path=EVIL, architectures=[EVIL], rope_parameters={EVIL: 1}
    ),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_harmless_is_trained_and_no_code_runs(small, folder, capsys, what):
    HARMLESS[what](folder)
    code, last = start(small, folder, capsys)
    assert code == 0, last
    assert not list(folder.parent.rglob("*.jinja"))


def test_the_canary_sings(folder):
    pickled(folder)
    pickle.loads((folder / WEIGHTS).read_bytes())  # control
    assert (folder.parent / "canary").exists()
    with_code(folder)
    (folder.parent / "canary").rmdir()
    exec((folder / "canary.py").read_text())
    assert (folder.parent / "canary").exists()


def test_a_length_beyond_the_positions_is_a_matter_of_the_configuration(small, folder, capsys):
    with_(CONFIG, max_position_embeddings=20)(folder)
    code, line = start(small, folder, capsys)
    assert code == BAD_CONFIG and "data.max_length: 64 is beyond the model's 18 positions" in line


# --- whatever the bytes ---------------------------------------------------------------------------


def load_or_refused(folder: Path) -> str:
    try:
        source = models.find_source(str(folder))
        models.check_positions(source, 64)
        tokenizer = models.load_tokenizer(source, list, folder)
        models.template(tokenizer, 64, "head")
        models.load_model(source, ["a", "b"], tokenizer, max_length=64, seed=0)
    except Refusal as error:
        return re.sub(r"\d+", "", one_line(error))
    return "loaded"


@pytest.mark.parametrize("name", [CONFIG, SETTINGS, TOKENIZER, WEIGHTS])
def test_any_bytes_are_loaded_or_refused(folder, name):
    valid, seen = (folder / name).read_bytes(), set()
    start_of = valid[:3000]  # of the weights, the header and some numbers

    @settings(ALIKE, max_examples=200)
    @given(st.one_of(mutated(start_of), st.binary(max_size=200)))
    def attempt(raw: bytes) -> None:
        (folder / name).write_bytes(raw + valid[3000:])
        seen.add(load_or_refused(folder))

    attempt()
    assert "loaded" in seen and len(seen) > 5  # control: it met many ends


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 10**19) | st.floats() | st.just(EVIL),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("a"), inner),
    max_leaves=3,
)


def test_any_value_of_a_configuration_is_loaded_or_refused(folder):
    valid, seen = json.loads((folder / CONFIG).read_bytes()), set()

    @settings(ALIKE, max_examples=400)
    @given(st.sampled_from(sorted(valid)), JSON)
    def attempt(key: str, value: object) -> None:
        (folder / CONFIG).write_text(json.dumps(valid | {key: value}))
        seen.add(load_or_refused(folder))

    attempt()
    assert "loaded" in seen and len(seen) > 20
