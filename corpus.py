"""Texts tokenised once into flat memory-mapped arrays, cached under what they came from."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import baselines
from config import DataConfig
from data import Split, file_hash, read_splits
from errors import CANNOT_WRITE, MISSING, Refusal

MAX_TOKENS = 8192  # ids kept of one text, before max_length cuts it
CHUNK = 8192  # texts tokenised at a time: bounds the memory of their encodings
FORMAT = 2  # raise when what is cached changes its meaning


@dataclass(frozen=True)
class TokenisedSplit:
    """One split as arrays: N texts, T tokens without special ones.

    ids (T,) int32, offsets (N + 1,) int64, labels (N,) int64, rows (N,) int64 (1 is the first row
    below the header), slices: column -> (codes (N,), names), baseline (N, K) TF-IDF probabilities
    or None for training texts.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    slices: dict[str, tuple[np.ndarray, list[str]]]
    baseline: np.ndarray | None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Corpus:
    """All splits of a run; `key` names their content: data, settings of section data, tokenizer."""

    train: TokenisedSplit
    validation: TokenisedSplit
    test: TokenisedSplit | None
    label_names: list[str]
    positive: int | None
    findings: list[str]
    report: dict[str, object]
    key: str

    def evaluated(self) -> dict[str, TokenisedSplit]:
        """The splits that are scored, by name."""
        return {"validation": self.validation} | ({"test": self.test} if self.test else {})


def content_key(cfg: DataConfig, *parts: object) -> str:
    """A hash of the data files and of every setting that changes how they are read."""
    files = [file_hash(p) for p in (cfg.train, cfg.validation, cfg.test) if p]
    given = [bool(cfg.validation), bool(cfg.test)]
    settings = [cfg.text_column, cfg.label_column, cfg.slice_columns, cfg.group_column]
    settings += [cfg.positive_label, cfg.limit, cfg.bad_rows, cfg.leaks]
    raw = json.dumps([FORMAT, files, given, settings, parts], default=str)
    return hashlib.sha256(raw.encode()).hexdigest()[:24]


def tokenizer_key(tokenizer) -> str:
    """A hash of all that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    raw = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(raw.encode()).hexdigest()[:24]


def training_texts(cfg: DataConfig, *, seed: int) -> list[str]:
    """The texts that a tokenizer of our own is trained on."""
    return read_splits(cfg, seed=seed).train.texts


def load_corpus(cfg: DataConfig, tokenizer, *, seed: int, say: Callable[[str], None]) -> Corpus:
    """The tokenised data of `cfg`: from the cache, else read, checked, tokenised and cached."""
    key = content_key(cfg, seed, tokenizer_key(tokenizer))
    folder = Path(cfg.cache_dir) / "corpus" / key
    if not (folder / "meta.json").exists():
        build(folder, cfg, tokenizer, seed=seed, say=say)
    return _open(folder, key)


def build(
    folder: Path, cfg: DataConfig, tokenizer, *, seed: int, say: Callable[[str], None]
) -> None:
    """Fill the cache folder; it appears complete or not at all."""
    say("reading and checking the data")
    splits = read_splits(cfg, seed=seed)
    named = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    named = {name: split for name, split in named.items() if split is not None}
    meta = {"label_names": splits.label_names, "positive": splits.positive, "splits": {}}
    meta |= {"findings": splits.findings, "report": splits.report}
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        say("fitting the TF-IDF baseline")
        evaluated = {name: s.texts for name, s in named.items() if name != "train"}
        train = (splits.train.texts, splits.train.labels)
        fitted = baselines.tfidf(*train, evaluated, classes=len(splits.label_names), seed=seed)
        for name, probability in fitted.items():
            np.save(temporary / f"{name}.baseline.npy", probability)
        say(f"tokenising {sum(len(s.texts) for s in named.values()):,} texts")
        for name, split in named.items():
            meta["splits"][name] = {c: names for c, (_, names) in split.slices.items()}
            _write_split(temporary, name, split, tokenizer)
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        _publish(temporary, folder)
    except OSError as error:
        raise Refusal(CANNOT_WRITE, f"{folder}: cannot write the cache: {error.strerror}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Rename a finished folder; another builder of the same content may have been first."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / "meta.json").exists():
            raise


def _write_split(folder: Path, name: str, split: Split, tokenizer) -> None:
    lengths = np.zeros(len(split.texts), dtype=np.int64)
    parts, done = [], 0
    for encoded in _encode(split.texts, tokenizer):
        lengths[done : done + len(encoded)] = [len(ids) for ids in encoded]
        done += len(encoded)
        parts.append(np.fromiter((i for ids in encoded for i in ids), dtype=np.int32))
    _save_parts(folder / f"{name}.ids.npy", parts)
    np.save(folder / f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(folder / f"{name}.labels.npy", split.labels)
    np.save(folder / f"{name}.rows.npy", split.rows)
    for i, (codes, _) in enumerate(split.slices.values()):
        np.save(folder / f"{name}.slice{i}.npy", codes)


def _save_parts(path: Path, parts: list[np.ndarray]) -> None:
    """`np.save` of the parts end to end, without holding them twice."""
    header = np.lib.format.header_data_from_array_1_0(parts[0])
    with open(path, "wb") as file:
        total = sum(len(part) for part in parts)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (total,)})
        for part in parts:
            file.write(part.data)


def _encode(texts: list[str], tokenizer) -> Iterator[list[list[int]]]:
    """The ids of each text, without special tokens and untruncated, some thousand texts at a time.

    A fast tokenizer works on all cores; RAYON_NUM_THREADS bounds it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        if backend is not None:
            encoded = backend.encode_batch_fast(chunk, add_special_tokens=False)
            yield [e.ids[:MAX_TOKENS] for e in encoded]
        else:
            ids = tokenizer(chunk, add_special_tokens=False, truncation=False)["input_ids"]
            yield [i[:MAX_TOKENS] for i in ids]


def _open(folder: Path, key: str) -> Corpus:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        splits = {name: _open_split(folder, name, s) for name, s in meta["splits"].items()}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise Refusal(
            MISSING, f"{folder}: the cache is damaged ({type(error).__name__}); delete this folder"
        ) from None
    return Corpus(
        train=splits["train"],
        validation=splits["validation"],
        test=splits.get("test"),
        label_names=meta["label_names"],
        positive=meta["positive"],
        findings=meta["findings"],
        report=meta["report"],
        key=key,
    )


def _open_split(folder: Path, name: str, slices: dict[str, list[str]]) -> TokenisedSplit:
    def array(part: str, mmap: str | None = None) -> np.ndarray:
        return np.load(folder / f"{name}.{part}.npy", mmap_mode=mmap, allow_pickle=False)

    columns = {c: (array(f"slice{i}"), names) for i, (c, names) in enumerate(slices.items())}
    baseline = None if name == "train" else array("baseline")
    ids = array("ids", "r")
    return TokenisedSplit(ids, array("offsets"), array("labels"), array("rows"), columns, baseline)
