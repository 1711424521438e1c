"""Token embeddings made of character n-grams, for a model that starts without pretrained weights.

A token's vector is a sum of its n-grams' vectors (Bojanowski et al. 2017, arXiv:1607.04606), so
that what is learnt of one word serves its relatives; plain embeddings of as few texts learn each
word for itself. Rare n-grams weigh more, by the logarithm of their inverse frequency in the
vocabulary. `fold` turns the model into a plain one with the same outputs.

Shapes: V tokens, P n-grams of a token at most, H hidden size.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTHS = (1, 2, 3, 4)  # characters, as in the TF-IDF baseline


class NgramEmbedding(nn.Module):
    """Stands in for nn.Embedding(V, H): the vector of a token is composed from `weight` (G, H)."""

    def __init__(self, tokens: list[str], special_ids: set[int], width: int, std: float):
        """`tokens`: the vocabulary by id. Special tokens have a vector of their own alone."""
        super().__init__()
        found = [{token} if i in special_ids else ngrams(token) for i, token in enumerate(tokens)]
        counts = Counter(g for grams in found for g in grams)
        index: dict[str, int] = {}  # from 1; 0 is no n-gram, and its vector stays zero
        rows = []
        for token, grams in zip(tokens, found, strict=True):
            shared = sorted(g for g in grams if counts[g] > 1)
            rows.append([index.setdefault(g, len(index) + 1) for g in [*shared, token + "\0"]])
        places = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            places[i, : len(row)] = torch.tensor(row)
        tokens_with = torch.bincount(places.flatten(), minlength=len(index) + 1)
        rarity = torch.log((len(rows) + 1) / tokens_with.clamp(min=1))
        rarity[0] = 0
        shares = F.normalize(rarity[places])  # a token's vector has unit size, whatever its length
        # Derived from the vocabulary alone, so not part of the state that is saved.
        self.register_buffer("places", places, persistent=False)  # (V, P) int64
        self.register_buffer("shares", shares, persistent=False)  # (V, P) float32
        self.weight = nn.Parameter(torch.randn(len(index) + 1, width) * std)
        with torch.no_grad():
            self.weight[0] = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors (..., H) of ids (...)."""
        ids, where = input_ids.unique(return_inverse=True)  # each token is composed once
        rows = F.embedding_bag(
            self.places[ids], self.weight, mode="sum", per_sample_weights=self.shares[ids]
        )
        return F.embedding(where, rows)

    @torch.no_grad()
    def table(self, padding_idx: int) -> nn.Embedding:
        """The same vectors as a plain table (V, H)."""
        ids = torch.arange(len(self.places), device=self.weight.device)
        rows = torch.cat([self(part) for part in ids.split(1024)])
        return nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=padding_idx)


def ngrams(token: str) -> set[str]:
    """Every n-gram of a token."""
    return {token[i : i + n] for n in LENGTHS for i in range(len(token) - n + 1)}


def compose(model: nn.Module, tokenizer) -> None:
    """Put an NgramEmbedding in the place of the model's token embeddings."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    width, std = model.config.hidden_size, model.config.initializer_range
    model.set_input_embeddings(NgramEmbedding(tokens, set(tokenizer.all_special_ids), width, std))


def fold(model: nn.Module) -> None:
    """Put the plain table back, if the embeddings are composed."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, NgramEmbedding):
        model.set_input_embeddings(embeddings.table(model.config.pad_token_id))
