"""A composed embedding is a plain table once folded, and shares what is learnt among relatives."""

import pytest
import tiny
import torch

import model as models
import subwords

TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "\u2581late", "\u2581later", "\u2581goose"]


@pytest.fixture
def embedding():
    torch.manual_seed(0)
    return subwords.NgramEmbedding(TOKENS, set(range(5)), width=16, std=1.0)


def test_ngrams_are_all_of_one_to_four_characters():
    assert subwords.ngrams("abcde") == {
        *("a", "b", "c", "d", "e", "ab", "bc", "cd", "de"),
        *("abc", "bcd", "cde", "abcd", "bcde"),
    }


def test_relatives_share_most_of_their_vector_and_others_do_not(embedding):
    late, later, goose = embedding(torch.tensor([5, 6, 7]))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(late, later, dim=0) > 0.5 > abs(cosine(late, goose, dim=0))
    embedding(torch.tensor([5])).sum().backward()
    moved = embedding.weight.grad.abs().sum(1) > 0
    assert moved[embedding.places[6]].float().mean() > 0.3 and not moved[0]
    assert not moved[embedding.places[0]].any(), "control: a special token is its own"


def test_rare_ngrams_weigh_more_and_every_token_has_unit_size(embedding):
    norms = embedding.shares.norm(dim=1)
    assert torch.allclose(norms, torch.ones(len(TOKENS)))
    shares = dict(zip(embedding.places[5].tolist(), embedding.shares[5].tolist(), strict=True))
    in_three, own = embedding.places[7][0].item(), embedding.places[5][embedding.places[5] > 0][-1]
    assert in_three in shares, "the e of late, later and goose"
    assert 0 < shares[in_three] < shares[own.item()] and shares.get(0, 0) == 0


def test_folding_keeps_the_outputs_to_rounding(small, tmp_path):
    settings = {"model__name": "scratch", "data__cache_dir": tmp_path, "speed__padding": "batch"}
    job = tiny.make_job(tiny.settings(small, **settings))
    ids = torch.randint(5, len(job.tokenizer), (4, 12))
    model = job.model.eval()
    before = model(input_ids=ids).logits
    subwords.fold(model)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)
    names = {n for n, _ in model.named_parameters()}
    assert names == {n for n, _ in models_plain(job).named_parameters()}


def models_plain(job):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(job.model.config)


def test_folding_leaves_a_plain_model_alone(small):
    job = tiny.make_job(tiny.settings(small))
    before = job.model.get_input_embeddings()
    subwords.fold(job.model)
    assert job.model.get_input_embeddings() is before and models.SCRATCH == "scratch"
