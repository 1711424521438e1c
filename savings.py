"""The exact savings of section `speed`: which of them a model can have, on, and off for export."""

import dataclasses
from collections.abc import Callable

import numpy as np
from torch import nn

import encoder
from batches import Template
from config import SpeedConfig
from corpus import Corpus, TokenisedSplit
from subwords import fold
from vocabulary import ActiveEmbedding, is_reducible


def install(
    model: nn.Module,
    wanted: SpeedConfig,
    corpus: Corpus,
    template: Template,
    say: Callable[[str], None],
) -> SpeedConfig:
    """Switch on in `model` what it can have of what is wanted, and say so.

    Returns `wanted` with the padding and first position that it has.
    """
    speed = wanted
    if not encoder.is_known(model, template.pad_id):
        padding = "batch" if wanted.padding == "free" else wanted.padding
        speed = dataclasses.replace(speed, padding=padding, first_position=False)
        if speed != wanted:
            known = ", ".join(encoder.ARCHITECTURES)
            say(f"  {model.config.model_type}: texts are padded; without padding: {known}")
    if speed.active_vocabulary and is_reducible(model):
        dressing = [*template.prefix, *template.suffix, template.pad_id]
        active = np.union1d(_tokens(corpus.train), dressing)
        evaluated = [_tokens(split) for split in corpus.evaluated().values()]
        table = model.get_input_embeddings()
        model.set_input_embeddings(ActiveEmbedding(table, active, np.concatenate(evaluated)))
        for parameter in model.parameters():  # while one is mapped from the file, all of it is
            parameter.data = parameter.data.clone()
        total = table.num_embeddings
        say(f"  {len(active):,} of {total:,} token embeddings are trained, the others only decay")
    packed, checkpointing = speed.padding == "free", speed.gradient_checkpointing
    if checkpointing and not packed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    encoder.install(
        model, packed=packed, first_position=speed.first_position, checkpointing=checkpointing
    )
    return speed


def _tokens(split: TokenisedSplit) -> np.ndarray:
    """The ids that a split uses, each once."""
    parts = np.array_split(split.ids, 1 + len(split.ids) // 10_000_000)
    return np.unique(np.concatenate([np.unique(part) for part in parts]))


def idle_parameters(model: nn.Module) -> int:
    """Parameters of the whole model that are not kept while training."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, ActiveEmbedding):
        return 0
    return (len(embedding.places) - len(embedding.weight)) * embedding.weight.shape[1]


def restore(model: nn.Module, base: Callable[[], nn.Module]) -> None:
    """Give `model` its whole table of token embeddings; `base()` is the model it started from."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, ActiveEmbedding):
        table = base().get_input_embeddings()
        embedding.fill(table)
        model.set_input_embeddings(table)
    fold(model)
