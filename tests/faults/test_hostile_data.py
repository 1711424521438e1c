"""Any cell, file or cache folder may be hostile: it is trained on, or refused in one line."""

import json
import os
import pickle
import shutil
import signal
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import write

import corpus as corpora
import files
import model as models
from config import DataConfig
from data import file_hash, read_splits
from errors import BAD_CONFIG, BAD_DATA, MISSING, USAGE, Refusal, printable
from tables import MAX_FIELD, MAX_TEXT

pytestmark = pytest.mark.fault
LIMIT_S = 60  # whatever takes longer hangs: its test fails
EVIL = "\x1b]0;owned\x07\x1b[31m\u202e\u2028\r\n'\"$(id)\u0645\u0632\u062d\u0629"
ALIKE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def no_hang():
    """What waits for ever fails its test instead of blocking all."""

    def fail(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_line(error: Refusal) -> str:
    """The message of a refusal of bad input, which must be what a terminal may see."""
    assert error.exit_code in (USAGE, BAD_DATA, MISSING, BAD_CONFIG), error.exit_code
    assert error.message.isprintable() and error.message, repr(error.message)
    return error.message


def refusal(code: int, *files: object, **options: object) -> str:
    """The line that refuses train, validation and test files; the last two may be left out."""
    names = [str(file) for file in files] + [None] * (3 - len(files))
    with pytest.raises(Refusal) as caught:
        read_splits(DataConfig(*names, **options), seed=0)
    assert caught.value.exit_code == code, caught.value.message
    return one_line(caught.value)


@pytest.fixture
def good(tmp_path) -> Path:
    return tiny.write_csv(tmp_path / "good.csv", tiny.rows(40))


# --- what is no file ------------------------------------------------------------------------------


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


NO_FILES = {
    "FIFO": (os.mkfifo, "is a FIFO; expected a regular file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is a device; expected a regular file"),
    "folder": (Path.mkdir, "is a folder; expected a regular file"),
    "socket": (a_socket, "No such device or address"),
    "link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "no such data file"),
    "below a file": (lambda path: path.parent.write_text(""), "Not a directory"),
    "long name": (None, "File name too long"),
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_regular_file_is_66_and_not_waited_for(tmp_path, good, what, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.ModuleType("pyarrow.parquet"))
    path = tmp_path / ("x" * 300 if what == "long name" else "below") / f"odd.{kind}"
    make, reason = NO_FILES[what]
    if what not in ("long name", "below a file"):
        path.parent.mkdir()
    if make:
        make(path)
    for given_files in [(path,), (good, path), (good, good, path)]:
        assert refusal(MISSING, *given_files, leaks="keep").endswith(f": {reason}")
    with pytest.raises(Refusal, match=reason) as caught:
        file_hash(path)
    assert caught.value.exit_code == MISSING and one_line(caught.value)


def test_a_link_to_a_file_is_one_and_the_null_device_is_empty(tmp_path, good):
    (tmp_path / "link.csv").symlink_to(good)
    (tmp_path / "null.csv").symlink_to(os.devnull)
    splits = read_splits(
        DataConfig(str(tmp_path / "link.csv"), str(good), None, leaks="keep"), seed=0
    )
    assert len(splits.train.texts) == 40
    assert refusal(BAD_DATA, tmp_path / "null.csv").endswith("null.csv: the file is empty")


class Vague(Exception):
    """As pyarrow's, whose classes have nothing in common."""


def test_parquet_is_read_from_the_file_that_was_looked_at(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")

    def read(file: object) -> None:
        raise Vague(f"\x1b[31m{file.read()}")

    fake = types.SimpleNamespace(ParquetFile=read)
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=fake))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake)
    assert refusal(BAD_DATA, path) == rf"{path}: not Parquet: \x1b[31mb'PAR1'"


# --- what is in it --------------------------------------------------------------------------------

DEEP = 100_000
JOKE = '{"text": "%s", "label": %s}\n'
BAD_CELLS = {
    "deep list": ("jsonl", JOKE % ("x", "[" * DEEP), "line 1: not JSON: maximum recursion depth"),
    "deep map": ("jsonl", '{"a":' * DEEP, "line 1: not JSON: maximum recursion depth"),
    "deep beside": (
        "jsonl",
        '{"text": "x", "label": 1, "z": ' + "[" * DEEP + "]" * DEEP + "}",
        "line 1: not JSON: maximum recursion depth",
    ),
    "5,000 digits": ("jsonl", JOKE % ("x", "9" * 5000), "line 1: not JSON: Exceeds the limit"),
    "4,000 digits": (
        "jsonl",
        JOKE % ("x", "9" * 4000) + JOKE % ("y", "1"),
        "data.label_column: '" + "9" * 77 + "...' has 4,000 characters; expected at most 200",
    ),
    "half a pair": ("jsonl", JOKE % (r"\ud83d", 1), "line 1: not JSON: 'utf-8' codec can't encode"),
    "half a pair in UTF-8": (
        "csv",
        b"text,label\n\xed\xa0\xbd,1\n",
        "line 2 has byte 0xed",
    ),
    "NUL not escaped": ("jsonl", JOKE % ("x\0", 1), "line 1: not JSON: Invalid control character"),
    "long label": (
        "csv",
        f"text,label\nx,{'L' * 1_000_000}\ny,1\n",
        "data.label_column: '" + "L" * 77 + "...' has 1,000,000 characters; expected at most 200",
    ),
    "long name of a column": ("csv", f"{'c' * 1_000_000},label\nx,1\n", "the file has: cccccc"),
    "long line": (
        "csv",
        f"text,label\n{'x' * (MAX_FIELD + 1)},1\n",
        "line 2 has more than 16,777,216 characters",
    ),
    "long cell": ("tsv", 'text\tlabel\n"' + "x\t1\n" * (5 << 20), "field larger than field limit"),
    "no row": ("csv", "text,label\n", "no usable row below the header"),
    "one row": ("csv", "text,label\nx,1\n", "only one label, '1'"),
    "200,000 columns": (
        "csv",
        f"text,{','.join(f'c{i}' for i in range(200_000))}\n",
        "no column 'label' (data.label_column); the file has: text, c0, c1,",
    ),
    "200,000 columns of one name": ("csv", f"text{',c' * 200_000}\n", "two columns are called 'c'"),
    "control characters": ("csv", f"text,label\nx,1\ny,{chr(27)}[1m\n", "only one label, '1'"),
}


@pytest.mark.parametrize("what", BAD_CELLS)
def test_what_cannot_be_trained_on_is_refused_for_what_it_is(tmp_path, what):
    kind, raw, message = BAD_CELLS[what]
    path = tmp_path / f"odd.{kind}"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    good = write(tmp_path / "v.csv", [{"text": "t", "label": 1}])
    if what == "control characters":
        message = r"row 1 has label '1', which"
        path.write_text("text,label\nx,\x1b[1m\ny,\u202e\n")
    line = refusal(BAD_DATA, path, good)
    assert line.startswith(f"{path}: ") or what == "control characters"
    assert message in line


@pytest.mark.parametrize("words", [["x" * 200, "y"], ["-1", "1"], ["\x1b[1m", "\0"]], ids=str)
def test_the_twins_of_what_is_refused_are_accepted(tmp_path, words):
    records = [{"text": f"t {i}", "label": words[i % 2]} for i in range(40)]
    read = read_splits(DataConfig(write(tmp_path / "a.jsonl", records), None, None), seed=0)
    assert sorted(read.label_names) == sorted(words)


def test_a_slice_column_of_texts_is_refused_and_one_of_many_words_is_not(tmp_path):
    records = [{"text": f"t {i}", "label": i % 2, "s": f"\x1b{i}"} for i in range(1001)]
    path = write(tmp_path / "a.csv", records)
    line = refusal(BAD_DATA, path, path, leaks="keep", slice_columns=("s",))
    assert "data.slice_columns: 's' has 1,001 different values; expected at most 1,000" in line
    long = write(tmp_path / "long.csv", [r | {"s": "\x1b" * 201} for r in records])
    line = refusal(BAD_DATA, long, long, leaks="keep", slice_columns=("s",))
    assert r"data.slice_columns: 's': '\x1b\x1b" in line and "has 201 characters; expected" in line
    few = write(tmp_path / "few.csv", records[:1000])
    cfg = DataConfig(few, few, None, leaks="keep", slice_columns=("s",))
    assert len(read_splits(cfg, seed=0).train.slices["s"][1]) == 1000


NAMES = ["a'b\"c$(id).csv", "\x1b[31m\r\n\u202e.csv", "\u0645\u0632\u062d\u0629 \U0001f602.csv"]
FAULTS = {
    "": "the file is empty",
    "text,label\n": "no usable row below the header",
    "text,text\n": "two columns are called 'text'",
    "a,label\n": "no column 'text'",
    "text,label\nx\n": "row 1 (line 2) has 1 fields",
    'text,label\n"x"y,1\n': "line 2: broken quoting",
    "text,label\nx,1\ny,1\n": "only one label",
    "text,label\n,1\nx,0\n": "1 bad rows: row 1 (empty text)",
    "text,label\nx,0\ny,1\n": "2 rows (100.0%) are also in validation or test",
    "text,label\n" + "".join(f"x,{i}\n" for i in range(1001)): "1,001 different labels",
    "\udcff": "not UTF-8: line 1 has byte 0xff",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("raw", FAULTS, ids=FAULTS.values())
def test_a_message_shows_the_name_of_a_file_escaped(tmp_path, name, raw):
    path = tmp_path / name
    path.write_bytes(raw.encode(errors="surrogateescape"))
    line = refusal(BAD_DATA, path, path)
    assert line.startswith(f"{printable(path, 200)}: ") and FAULTS[raw] in line


@pytest.mark.parametrize("name", ["a\0b.csv", "\x1b[31m", "\udcff.csv", "x" * 5000 + ".csv"])
def test_no_name_of_a_file_is_a_crash(name):
    with pytest.raises(Refusal) as caught:
        read_splits(DataConfig(name, None, None), seed=0)
    assert one_line(caught.value)


# --- what is trained on ---------------------------------------------------------------------------

ODD_TEXTS = [
    "x\0y",
    "\0",
    "\u200b\u200d\ufeff",
    "\u202e\u05d0\u05d1\u202c",
    "\u0645\u0632\u062d\u0629",
]
ODD_TEXTS += [
    EVIL,
    "e" + "\u0301" * 500,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ufdfa" * 50,
]
ODD_TEXTS += ["\ud83d\ude02".encode("utf-16", "surrogatepass").decode("utf-16"), "\uffff\U0010ffff"]


def run(folder: Path, capsys, **changes: object) -> tuple[int, str]:
    """Exit code of a training on files of `folder`, and what a terminal saw of it."""
    code = tiny.run(tiny.settings(folder, **{"train__epochs": 1} | changes))
    shown = capsys.readouterr()
    for line in (shown.out + shown.err).split("\n"):
        assert line.isprintable(), repr(line)
        assert "Traceback" not in line, shown.err
    return code, shown.err


@pytest.mark.parametrize("name", ["model", "scratch"])
def test_odd_texts_and_labels_are_trained_on_and_never_steer_a_terminal(
    small, tmp_path, capsys, name
):
    records = tiny.rows(40)
    for record, text in zip(records, ODD_TEXTS, strict=False):
        record["text"] = text
    for record in records:
        record |= {"label": f"{EVIL}{record['label']}", "lang": EVIL * int(record["label"])}
    for part, some in {"train": records, "validation": records[::2]}.items():
        write(tmp_path / f"{part}.jsonl", some)
    changes = {f"data__{p}": tmp_path / f"{p}.jsonl" for p in ("train", "validation")}
    changes |= {"model__name": small / "model"} if name == "model" else {"model__name": "scratch"}
    code, shown = run(tmp_path, capsys, data__leaks="keep", train__max_steps=2, **changes)
    assert code == 0 and r"\x1b]0;owned\x07\x1b[31m\u202e\u2028\r\n" in shown
    written = json.loads(next(tmp_path.glob("runs/*/best/config.json")).read_bytes())
    assert list(written["id2label"].values()) == [f"{EVIL}{i}" for i in (0, 1)], "unchanged inside"


def test_a_million_characters_are_trained_on(small, tmp_path, capsys):
    records = tiny.rows(43)
    records[0]["text"] = " " * MAX_TEXT + "my aunt " * 125_000
    records[1]["text"] = "\u4e00" * 1_000_000
    records[2]["text"] = "x" * (MAX_FIELD - 10)
    records[40]["text"] = "tram" * 250_000
    tiny.write_csv(tmp_path / "train.csv", records[:33])
    tiny.write_csv(tmp_path / "validation.csv", records[33:])
    job = tiny.make_job(tiny.settings(tmp_path, model__name=small / "model"))
    lengths = np.diff(job.corpus.train.offsets)
    assert lengths[0] == corpora.MAX_TOKENS == lengths.max(), "what is kept of a long text"
    assert run(tmp_path, capsys, model__name=small / "model")[0] == 0
    split = read_splits(job.cfg.data, seed=0).train
    assert split.texts[0].startswith("my aunt") and max(map(len, split.texts)) == MAX_TEXT


def test_a_text_that_cannot_be_too_long_is_kept_as_it_is(tmp_path):
    text = " " + "y" * (MAX_TEXT - 2) + " "
    records = [{"text": f"t {i}", "label": i % 2} for i in range(40)]
    path = write(tmp_path / "a.csv", [{"text": text, "label": 0}, *records])
    cfg = DataConfig(path, path, None, leaks="keep")
    assert read_splits(cfg, seed=0).train.texts[0] == text  # control


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_200_000_columns_are_read(tmp_path, kind):
    extra = {f"c{i}": "" for i in range(200_000)}
    records = [{"text": f"t {i}", "label": i % 2} | extra for i in range(4)]
    path = write(tmp_path / f"a.{kind}", records)
    assert len(read_splits(DataConfig(path, path, None, leaks="keep"), seed=0).train.texts) == 4


def test_a_tokenizer_of_our_own_is_trained_on_a_million_nuls(tmp_path):
    """Of so many in one text its trainer dies, which no exception tells."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "\0" * 1_000_000 + ",0\ny,1\n")
    texts = read_splits(DataConfig(str(path), str(path), None, leaks="keep"), seed=0).train.texts
    assert end(start(lambda: models._train_tokenizer(texts, tmp_path / "tokenizer"))) == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def start(action: Callable[[], None]) -> int:
    """A process that does `action`."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S)
        try:
            action()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return child


def end(child: int) -> int:
    """The exit code of a process that was started, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- whatever the bytes ---------------------------------------------------------------------------

VALID = {
    kind: b"".join(line.encode() for line in [*head, *(row % (i, i % 2) for i in range(24))])
    for kind, head, row in [
        ("csv", ["text,label\r\n"], '"goose, ""%d""\r\n \u00e9",%d\r\n'),
        ("tsv", ["text\tlabel\n"], "soup %d \U0001f602\t%d\n"),
        ("jsonl", [], '{"text": "\\u0645 \\ud83d\\ude02 %d", "label": %d}\n'),
    ]
}


@st.composite
def mutated(draw, valid: bytes) -> bytes:
    """A valid file with a few bytes flipped, deleted, put in or doubled."""
    raw = bytearray(valid)
    for _ in range(draw(st.integers(0, 4))):
        at, n = draw(st.integers(0, len(raw))), draw(st.integers(1, 16))
        part = raw[at : at + n]
        new = {"delete": b"", "double": part * 2, "flip": bytes(b ^ (1 << n % 8) for b in part)}
        new["insert"] = draw(st.binary(max_size=8)) + part
        raw[at : at + n] = new[draw(st.sampled_from(sorted(new)))]
    return bytes(raw)


def read_or_refused(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    try:
        splits = read_splits(DataConfig(str(path), None, None, bad_rows="skip"), seed=0)
    except Refusal as error:
        return one_line(error)
    assert len(splits.label_names) >= 2 and set(splits.train.labels) <= set(range(1000))
    assert all(text.encode() and text.strip() for text in splits.train.texts)
    assert all(finding.isprintable() for finding in splits.findings)
    return "read"


@pytest.mark.parametrize("kind", VALID)
def test_any_bytes_are_read_or_refused(tmp_path, kind):
    seen = set()

    @settings(ALIKE, max_examples=1500)
    @given(st.one_of(st.binary(max_size=400), mutated(VALID[kind])))
    def attempt(raw: bytes) -> None:
        seen.add(read_or_refused(tmp_path / f"a.{kind}", raw))

    attempt()
    assert "read" in seen and len(seen) > 10  # control: it met many ends


def test_any_bytes_are_trained_on_or_refused(small, tmp_path, capsys):
    codes = []

    @settings(ALIKE, max_examples=25)
    @given(mutated(VALID["jsonl"]))
    def attempt(raw: bytes) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(raw)
        changes = {"data__train": path, "data__validation": "", "model__name": small / "model"}
        codes.append(run(tmp_path, capsys, train__max_steps=1, data__bad_rows="skip", **changes)[0])

    attempt()
    assert 0 in codes and set(codes) <= {0, BAD_DATA}


# --- a cache that others could write to -----------------------------------------------------------


@pytest.fixture
def load(small, tmp_path):
    """The corpus of `small` in a cache of the test's own, its folder, and what was said."""
    source = models.find_source(str(small / "model"))
    tokenizer = models.load_tokenizer(source, list, small)
    cfg = tiny.make_config(*tiny.settings(small), data__cache_dir=tmp_path / "cache").data

    def load() -> tuple[corpora.Corpus, Path, list[str]]:
        said: list[str] = []
        corpus = corpora.load_corpus(cfg, tokenizer, seed=42, say=said.append)
        return corpus, tmp_path / "cache" / "corpus" / corpus.key, said

    return load


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def put(name: str, make: Callable[[np.ndarray], object], *, allow_pickle: bool = False):
    """A forgery: an array that was changed, with the hash that goes with it."""

    def forge(folder: Path) -> None:
        path = folder / f"{name}.npy"
        before = np.load(path)
        path.unlink()
        np.save(path, make(before), allow_pickle=allow_pickle)
        sign(folder)

    return forge


def sign(folder: Path, **changes: object) -> None:
    """Put the hashes of the files as they are, and changes by key, into meta.json."""
    meta = json.loads((folder / "meta.json").read_bytes()) | changes
    meta["sha256"] = {p.name: file_hash(p) for p in folder.glob("*.npy")}
    (folder / "meta.json").write_text(json.dumps(meta))


def change(name: str, make: Callable[[bytes], bytes]):
    """Damage: other bytes in a file."""

    def damage(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(make(raw))

    return damage


def replaced(name: str, make: Callable[[Path], None]):
    """Another kind of file in the place of one."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def zeroed(at: int):
    def zero(array: np.ndarray) -> np.ndarray:
        array[at] = 0
        return array

    return zero


HUGE = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (10**15,), }"
HUGE = HUGE.replace(b"10**15", b"1" + b"0" * 15).ljust(127) + b"\n"
DAMAGE = {
    "a flipped bit": (
        change("train.labels.npy", lambda raw: raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:]),
        "train.labels.npy was changed",
    ),
    "cut off": (change("train.ids.npy", lambda raw: raw[:-4]), "train.ids.npy was changed"),
    "empty": (change("train.rows.npy", lambda raw: b""), "train.rows.npy was changed"),
    "cut off and signed": (
        lambda f: (change("train.ids.npy", lambda raw: raw[:-4])(f), sign(f)),
        "mmap length is greater than file size",
    ),
    "a huge header": (
        lambda f: (change("train.rows.npy", lambda raw: HUGE)(f), sign(f)),
        "mmap length is greater than file size",
    ),
    "missing": (replaced("train.offsets.npy", lambda path: None), "no such data file"),
    "FIFO": (replaced("validation.labels.npy", os.mkfifo), "is a FIFO; expected"),
    "endless": (replaced("train.ids.npy", lambda p: p.symlink_to("/dev/zero")), "is a device"),
    "objects": (
        lambda f: put(
            "train.labels", lambda a: np.array([Canary(f.parents[2] / "canary")]), allow_pickle=True
        )(f),
        "Array can't be memory-mapped: Python objects in dtype",
    ),
    "a pickle": (
        lambda f: (
            change("train.labels.npy", lambda _: pickle.dumps(Canary(f.parents[2] / "canary")))(f),
            sign(f),
        ),
        "This file contains pickled (object) data",
    ),
    "an archive": (
        lambda f: (
            change("train.rows.npy", lambda _: b"PK\x05\x06" + bytes(18))(f),
            sign(f),
        ),
        "has no attribute",
    ),
    "another type": (put("train.labels", lambda a: a.astype(float)), "train.labels.npy does not"),
    "another shape": (put("train.rows", lambda a: a[:, None]), "train.rows.npy does not fit"),
    "fewer labels": (put("train.labels", lambda a: a[:-1]), "train.labels.npy does not fit"),
    "a label of no class": (put("train.labels", lambda a: a + 1), "train.labels.npy does not fit"),
    "one class": (put("train.labels", lambda a: a * 0), "meta.json does not fit the arrays"),
    "ids of no token": (put("train.ids", lambda a: a + 10_000), "train.ids.npy does not fit"),
    "negative ids": (put("validation.ids", lambda a: a - 10_000), "validation.ids.npy does not"),
    "offsets beyond": (put("train.offsets", lambda a: a + 10), "train.offsets.npy does not fit"),
    "offsets that fall": (put("train.offsets", zeroed(5)), "train.offsets.npy does not fit"),
    "no rows": (put("train.offsets", lambda a: a[:1]), "train.offsets.npy does not fit"),
    "codes of no word": (put("train.slice0", lambda a: a + 9), "train.slice0.npy does not fit"),
    "not finite": (
        put("validation.baseline", lambda a: a * np.nan),
        "validation.baseline.npy does",
    ),
    "no JSON": (change("meta.json", lambda raw: b"{"), "NoneType"),
    "deep JSON": (change("meta.json", lambda raw: b"[" * 100_000), "NoneType"),
    "a list": (change("meta.json", lambda raw: b"[]"), "NoneType"),
    "an empty object": (change("meta.json", lambda raw: b"{}"), "KeyError"),
    "names no list": (lambda f: sign(f, label_names="01"), "meta.json does not fit"),
    "names no words": (lambda f: sign(f, label_names=[0, 1]), "meta.json does not fit"),
    "another number": (lambda f: sign(f, label_names=["0", "1", "2"]), "does not fit"),
    "no such positive": (lambda f: sign(f, positive=2), "meta.json does not fit"),
    "odd findings": (lambda f: sign(f, findings=[{}]), "meta.json does not fit"),
    "odd report": (lambda f: sign(f, report={"held_out": "x"}), "meta.json does not fit"),
    "no split": (lambda f: sign(f, splits={}), "KeyError: 'train'"),
    "splits elsewhere": (lambda f: sign(f, splits={"../../x": {}}), "no such data file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_cache_is_made_anew_and_nothing_is_unpickled(load, tmp_path, what):
    corpus, folder, _ = load()
    expected = {p.name: p.read_bytes() for p in folder.iterdir()}
    damage, reason = DAMAGE[what]
    del corpus  # which has mapped what is changed
    damage(folder)
    _, _, said = load()
    assert said[0].startswith(f"the cache {folder} is damaged (") and reason in said[0], said[0]
    assert said[0].isprintable() and said[0].endswith("): it is made anew")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == expected
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "nothing is left"
    assert load()[2] == [], "and it serves"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda p: p.symlink_to(p)], ids=str)
def test_whatever_is_in_the_place_of_a_cache_gives_way(load, make):
    _, folder, _ = load()
    folder.rename(folder.with_name("elsewhere"))
    make(folder)
    assert "it is made anew" in load()[2][0] and load()[2] == []


def test_a_signed_cache_is_not_damaged_and_the_canary_sings(load, tmp_path):
    _, folder, _ = load()
    sign(folder)
    assert load()[2] == []  # controls
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


# --- what killed builders leave -------------------------------------------------------------------


def killed(folder: Path, *, after: bool = False) -> None:
    """Die while a folder is being built, or when it has just been published."""
    if after:
        shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    with files.building(folder) as new:
        (new / "half").touch()
        if not after:
            os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_builder_leaves_is_swept_and_nothing_else_is(tmp_path):
    keys = [letter * 24 for letter in "abcdef"]
    assert end(start(lambda: killed(tmp_path / keys[0]))) == -signal.SIGKILL
    assert end(start(lambda: killed(tmp_path / keys[1], after=True))) == -signal.SIGKILL
    assert len(names(tmp_path)) == 3 and names(tmp_path)[0].startswith(f".{keys[0]}.")
    (tmp_path / f".{keys[2]}.4711").mkdir()  # as releases before the lock left them
    kept = [".git", keys[3], f".{keys[4]}.file", f".{keys[5]}.link"]
    for name in kept[:2]:
        (tmp_path / name).mkdir()
    (tmp_path / kept[2]).touch()
    (tmp_path / kept[3]).symlink_to(tmp_path / ".git")
    files.sweep_builders(tmp_path)
    assert names(tmp_path) == sorted([*kept, keys[1]]) and names(tmp_path / keys[1]) == ["half"]
    assert names(tmp_path / ".git") == []


def test_every_start_sweeps_what_a_killed_one_left(load, tmp_path):
    _, folder, _ = load()
    tokenizer = tmp_path / "tokenizer" / ("a" * 24)
    source, texts = models.find_source("scratch"), [r["text"] for r in tiny.rows(40)]
    models.load_tokenizer(source, lambda: texts, tokenizer)
    for place in (folder, tokenizer):
        other = place.with_name("b" * 24)
        assert end(start(lambda other=other: killed(other))) == -signal.SIGKILL
        assert len(names(place.parent)) == 2
    load(), models.load_tokenizer(source, None, tokenizer)  # from their caches
    assert names(folder.parent) == [folder.name] and names(tokenizer.parent) == [tokenizer.name]


def test_what_a_living_builder_fills_is_left_alone(tmp_path):
    ready, done = os.pipe(), os.pipe()

    def build() -> None:
        with files.building(tmp_path / ("a" * 24)) as new:
            (new / "slow").touch()
            os.write(ready[1], b"x")
            os.read(done[0], 1)

    child = start(build)
    os.read(ready[0], 1)
    for key in "ab":  # of the same content, and of another
        files.sweep_builders(tmp_path)
        with files.building(tmp_path / (key * 24)) as new:
            (new / "quick").touch()
    assert len(names(tmp_path)) == 3
    os.write(done[1], b"x")
    assert end(child) == 0
    assert names(tmp_path) == ["a" * 24, "b" * 24], "the first of the same content stays"
    assert names(tmp_path / ("a" * 24)) == ["quick"]


def test_builders_at_the_same_time_do_not_disturb_each_other(tmp_path):
    def build() -> None:
        for i in range(40):
            files.sweep_builders(tmp_path)
            with files.building(tmp_path / (f"{i % 4:x}" * 24)) as new:
                (new / "a").write_text("whole")

    children = [start(build) for _ in range(3)]
    assert [end(child) for child in children] == [0, 0, 0]
    assert names(tmp_path) == [f"{i:x}" * 24 for i in range(4)]
    assert all((folder / "a").read_text() == "whole" for folder in tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), None], ids=repr)
def test_a_disk_without_locks_serves(tmp_path, monkeypatch, error):
    def fail(path: Path) -> None:
        if error:
            raise error

    monkeypatch.setattr(files, "hold", fail)
    for _ in range(2):
        with files.building(tmp_path / ("a" * 24)) as new:
            (new / "whole").touch()
    assert names(tmp_path / ("a" * 24)) == ["whole"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 100_000, b"FIFO"], ids=lambda raw: raw[:9])
def test_a_damaged_tokenizer_of_our_own_is_made_anew(tmp_path, raw):
    texts = [r["text"] for r in tiny.rows(40)]
    source, cache = models.find_source("scratch"), tmp_path / ("a" * 24)
    models.load_tokenizer(source, lambda: texts, cache)
    before = {p.name: p.read_bytes() for p in cache.iterdir()}
    assert "lock" not in before and models.load_tokenizer(source, None, cache)  # not trained again
    (cache / "tokenizer.json").unlink()
    if raw == b"FIFO":
        os.mkfifo(cache / "tokenizer.json")
    else:
        (cache / "tokenizer.json").write_bytes(raw)
    models.load_tokenizer(source, lambda: texts, cache)
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == before
    assert names(tmp_path) == [cache.name]
