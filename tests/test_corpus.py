"""Texts are tokenised once, exactly as the tokenizer does; the cache goes by content."""

import numpy as np
import pytest
import tiny

import corpus as corpora
import model as models
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
