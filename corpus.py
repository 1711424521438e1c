"""Texts tokenised once into flat memory-mapped arrays, cached under what they came from."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import baselines
import quality
from config import DataConfig
from data import Split, file_hash, read_splits
from errors import MISSING, Refusal, printable
from files import building, read_json, sweep_builders, writing

MAX_TOKENS = 8192  # ids kept of one text, before max_length cuts it
# Texts, and characters of them, tokenised at a time: bounds the memory of their encodings.
CHUNK, CHUNK_CHARACTERS = 8192, 1 << 22
FORMAT = 5  # raise when what is cached changes its meaning


@dataclass(frozen=True)
class TokenisedSplit:
    """One split as arrays: N texts, T tokens without special ones.

    ids (T,) int32, offsets (N + 1,) int64, labels (N,) int64, rows (N,) int64 (1 is the first row
    below the header), slices: column -> (codes (N,), names). Training texts have None of these:
    baseline (N, K) TF-IDF probabilities, is_near (N,) bool, that training has the text or nearly.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    slices: dict[str, tuple[np.ndarray, list[str]]]
    baseline: np.ndarray | None
    is_near: np.ndarray | None = None

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
    report: dict[str, object]  # what data_report.json gets
    key: str

    @property
    def findings(self) -> list[str]:
        """What the data check found, a line each."""
        return [finding["message"] for finding in self.report["findings"]]

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


def texts_hash(texts: list[str]) -> str:
    """A hash of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


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
    corpus = _load(cfg, tokenizer, seed=seed, say=say)
    files = {"train": cfg.train, "validation": cfg.validation or cfg.train, "test": cfg.test}
    room = cfg.max_length - tokenizer.num_special_tokens_to_add()
    for name, split in [("train", corpus.train), *corpus.evaluated().items()]:
        measured = quality.check_tokens(name, split, room=room, unknown=tokenizer.unk_token_id)
        corpus.report[name] |= {"file": files[name]} | measured.report
        corpus.report["findings"] += map(asdict, measured.findings)
    return corpus


def _load(cfg: DataConfig, tokenizer, *, seed: int, say: Callable[[str], None]) -> Corpus:
    key = content_key(cfg, seed, tokenizer_key(tokenizer))
    folder = Path(cfg.cache_dir) / "corpus" / key
    tokens = 1 + max(tokenizer.get_vocab().values())
    sweep_builders(folder.parent)
    if os.path.lexists(folder):
        try:
            return _open(folder, key, tokens)
        except Exception as error:  # what others could write to can raise anything
            reason = printable(f"{type(error).__name__}: {error}", 200)
            say(f"the cache {printable(folder, 200)} is damaged ({reason}): it is made anew")
    build(folder, cfg, tokenizer, seed=seed, say=say)
    return _open(folder, key, tokens)


def build(
    folder: Path, cfg: DataConfig, tokenizer, *, seed: int, say: Callable[[str], None]
) -> None:
    """Fill the cache folder; it appears complete or not at all."""
    say("reading and checking the data")
    splits = read_splits(cfg, seed=seed)
    named, report = splits.named(), splits.report
    checked = quality.check(splits, seed=seed)
    findings = report.pop("findings") + list(map(asdict, checked.findings))
    report |= {name: report.get(name, {}) | more for name, more in checked.report.items()}
    meta = {"label_names": splits.label_names, "positive": splits.positive, "splits": {}}
    meta |= {"findings": findings, "report": report}
    with writing(folder), building(folder) as new:
        say("fitting the TF-IDF baseline")
        evaluated = {name: s.texts for name, s in named.items() if name != "train"}
        train = (splits.train.texts, splits.train.labels)
        fitted = baselines.tfidf(*train, evaluated, classes=len(splits.label_names), seed=seed)
        for name, probability in fitted.items():
            np.save(new / f"{name}.baseline.npy", probability)
            np.save(new / f"{name}.is_near.npy", checked.is_near[name])
        say(f"tokenising {sum(len(s.texts) for s in named.values()):,} texts")
        for name, split in named.items():
            report[name]["texts_sha256"] = texts_hash(split.texts)
            meta["splits"][name] = {c: names for c, (_, names) in split.slices.items()}
            _write_split(new, name, split, tokenizer)
        meta["sha256"] = {path.name: file_hash(path) for path in new.iterdir()}
        (new / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _write_split(folder: Path, name: str, split: Split, tokenizer) -> None:
    lengths = np.zeros(len(split.texts), dtype=np.int64)
    parts, done = [], 0
    for encoded in encode(split.texts, tokenizer):
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


def encode(texts: list[str], tokenizer) -> Iterator[list[list[int]]]:
    """The ids of each text, without special tokens and untruncated, some thousand texts at a time.

    A fast tokenizer works on all cores; RAYON_NUM_THREADS bounds it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    size = max(1, min(CHUNK, CHUNK_CHARACTERS // max(map(len, texts))))
    for start in range(0, len(texts), size):
        chunk = texts[start : start + size]
        try:
            if backend is not None:
                encoded = backend.encode_batch_fast(chunk, add_special_tokens=False)
                ids = [e.ids for e in encoded]
            else:
                ids = tokenizer(chunk, add_special_tokens=False, truncation=False)["input_ids"]
        except Exception as error:  # of a tokenizer without a piece for what it does not know
            reason = f"its tokenizer fails on the data: {printable(error)}"
            raise Refusal(MISSING, f"model.name: {reason}") from None
        yield [i[:MAX_TOKENS] for i in ids]


def _open(folder: Path, key: str, tokens: int) -> Corpus:
    """The corpus in a cache folder; any exception if it is not as `build` leaves it."""
    meta = read_json(folder / "meta.json")
    splits = {name: _open_split(folder, name, meta, tokens) for name in meta["splits"]}
    names, positive, findings = meta["label_names"], meta["positive"], meta["findings"]
    words = [*names, *(finding.get("message") for finding in findings)]
    words += [word for s in splits.values() for _, values in s.slices.values() for word in values]
    if not (
        isinstance(names, list)
        and all(isinstance(word, str) for word in words)
        and len(np.unique(splits["train"].labels)) == len(names) > 1
        and (positive is None or positive in range(len(names)))
        and type(meta["report"]["held_out"]) is int
        and all(isinstance(meta["report"][name], dict) for name in splits)
    ):
        raise ValueError("meta.json does not fit the arrays")
    return Corpus(
        train=splits["train"],
        validation=splits["validation"],
        test=splits.get("test"),
        label_names=names,
        positive=positive,
        report=meta["report"] | {"findings": findings},
        key=key,
    )


def _open_split(folder: Path, name: str, meta: dict, tokens: int) -> TokenisedSplit:
    """One split, its ids below `tokens`; any exception if its arrays do not fit each other."""

    def array(part: str, dtype: type, shape: tuple | None = None, end: float = np.inf):
        path = folder / f"{name}.{part}.npy"
        if file_hash(path) != meta["sha256"][path.name]:
            raise ValueError(f"{path.name} was changed")
        # Mapped, a header that promises more than the file has is refused.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        is_within = not found.size or 0 <= found.min() <= found.max() < end
        if found.dtype != dtype or found.shape != (shape or (found.size,)) or not is_within:
            raise ValueError(f"{path.name} does not fit")
        return found if part == "ids" else np.array(found)

    ids, offsets = array("ids", np.int32, end=tokens), array("offsets", np.int64)
    n, classes = len(offsets) - 1, len(meta["label_names"])
    if n == 0 or offsets[0] != 0 or offsets[-1] != len(ids) or np.diff(offsets).min() < 0:
        raise ValueError(f"{name}.offsets.npy does not fit")
    labels, rows = array("labels", np.int64, (n,), classes), array("rows", np.int64, (n,))
    columns = {
        column: (array(f"slice{i}", np.int32, (n,), len(words)), words)
        for i, (column, words) in enumerate(meta["splits"][name].items())
    }
    if name == "train":
        return TokenisedSplit(ids, offsets, labels, rows, columns, None)
    baseline = array("baseline", np.float32, (n, classes), 1.01)
    return TokenisedSplit(
        ids, offsets, labels, rows, columns, baseline, array("is_near", np.bool_, (n,))
    )
