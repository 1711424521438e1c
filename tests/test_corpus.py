"""Texts are tokenised once, exactly as the tokenizer does; the cache goes by content."""

import json

import numpy as np
import pytest
import tiny

import corpus as corpora
import model as models
import quality
from errors import Refusal


@pytest.fixture
def load(small, tmp_path):
    """A corpus of `small` with some data settings, and what was said meanwhile."""
    source = models.find_source(str(small / "model"))
    tokenizer = models.load_tokenizer(source, list, small)

    def load(**changes):
        cfg = tiny.make_config(*tiny.settings(small), data__cache_dir=tmp_path, **changes).data
        said = []
        return corpora.load_corpus(cfg, tokenizer, seed=42, say=said.append), said, tokenizer

    return load


def test_ids_are_the_tokenizers_and_untruncated(load, small):
    corpus, _, tokenizer = load()
    texts = [r["text"] for r in tiny.rows(43)][:33]
    for i, text in enumerate(texts):
        start, end = corpus.train.offsets[i : i + 2]
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert corpus.train.ids[start:end].tolist() == expected
    assert corpus.train.rows.tolist() == list(range(1, 34))
    codes, names = corpus.train.slices["lang"]
    assert [names[c] for c in codes] == [r["lang"] for r in tiny.rows(43)][:33]
    assert isinstance(corpus.train.ids, np.memmap)


def test_a_second_start_reads_the_cache_and_a_change_does_not(load, small, tmp_path):
    first, said, _ = load()
    second, quiet, _ = load()
    assert said and not quiet and first.key == second.key
    assert (first.train.ids == second.train.ids).all()
    for change in ({"data__limit": 5}, {"data__positive_label": "0"}, {"data__test": "train"}):
        if "data__test" in change:
            change = {"data__test": small / "validation.csv"}
        other, said, _ = load(**change)
        assert said and other.key != first.key


def test_max_length_and_truncation_share_one_cache(load):
    load()
    assert load(data__max_length=16, data__truncation="tail")[1] == []


def test_a_damaged_cache_is_named_and_made_anew(load, tmp_path):
    path = tmp_path / "corpus" / load()[0].key / "train.ids.npy"
    before = path.read_bytes()
    path.write_bytes(b"broken")
    assert "is damaged (ValueError: train.ids.npy was changed): it is made anew" in load()[1][0]
    assert path.read_bytes() == before and load()[1] == []


def test_nothing_is_left_of_a_build_that_failed(load, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpora.np, "save", fail)
    with pytest.raises(Refusal, match="No space left") as refusal:
        load()
    assert refusal.value.exit_code == 73 and not list(tmp_path.rglob("*train*"))


def test_the_longest_texts_are_bounded(load, small, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "MAX_TOKENS", 3)
    assert np.diff(load()[0].train.offsets).max() == 3


# --- the data check -------------------------------------------------------------------------------


@pytest.fixture
def planted(small, tmp_path):
    """A corpus whose validation row 3 is nearly training row 5, and whose row 9 is it."""
    train, validation = tiny.rows(60, seed=1), tiny.rows(100, seed=2)[60:]
    texts = [f"why does my aunt always argue with the goose about ticket number {i}" for i in "ab"]
    train[4]["text"], validation[2]["text"] = texts[0], texts[1]
    validation[8]["text"] = texts[0].upper()
    files = {"train": train, "validation": validation}
    changes = {
        f"data__{name}": tiny.write_csv(tmp_path / f"{name}.csv", records)
        for name, records in files.items()
    }
    return changes | {"data__leaks": "keep"}


def test_what_was_found_is_told_again_from_the_cache_without_checking_again(
    load, planted, monkeypatch
):
    first, _, _ = load(**planted)
    checks = []
    monkeypatch.setattr(quality, "check", lambda *_, **__: checks.append(1))
    second, quiet, _ = load(**planted)
    assert not checks and not quiet and second.report == first.report
    assert second.findings == first.findings == [f["message"] for f in first.report["findings"]]
    kinds = [
        (f["kind"], f["split"], f["rows"]) for f in json.loads(json.dumps(first.report))["findings"]
    ]
    assert kinds[0] == ("leaks", "train", [5]) and ("near", "validation", [3]) in kinds


def test_texts_like_those_of_training_are_marked_and_their_number_is_reported(load, planted):
    corpus, _, _ = load(**planted)
    assert corpus.train.is_near is None
    assert corpus.validation.is_near.dtype == bool and len(corpus.validation.is_near) == 40
    assert corpus.validation.rows[corpus.validation.is_near].tolist() == [3, 9]
    assert corpus.report["validation"]["near_training"] == 2
    plain, _, _ = load()
    assert not plain.validation.is_near.any()  # control


def test_another_array_of_marks_is_a_damaged_cache(load, tmp_path):
    path = tmp_path / "corpus" / load()[0].key / "validation.is_near.npy"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert "validation.is_near.npy was changed): it is made anew" in load()[1][0]
    assert path.read_bytes() == before


def test_what_is_cut_follows_max_length(load):
    whole, cut = (load(data__max_length=n)[0] for n in (64, 5))
    assert whole.report["train"]["cut"] == 0
    room = 5 - 2  # <s> and </s>
    n = int((np.diff(cut.train.offsets) > room).sum())
    assert cut.report["train"]["cut"] == n > 0
    told = [f for f in cut.report["findings"] if f["kind"] == "cut" and f["split"] == "train"]
    assert told[0]["count"] == n and f"train: {n} texts" in told[0]["message"]
    assert "the 3 tokens that data.max_length has room for" in told[0]["message"]
    assert not [f for f in whole.report["findings"] if f["kind"] == "cut"]  # control


def test_the_texts_for_a_tokenizer_are_read_without_the_check(small, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "check", None)
    cfg = tiny.make_config(*tiny.settings(small), data__cache_dir=tmp_path).data
    assert len(corpora.training_texts(cfg, seed=42)) == 33
