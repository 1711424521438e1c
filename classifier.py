"""A finished model put to use: texts in, logits out, as `train.evaluate` computes them.

Shapes: N texts, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import config
import decision
import encoder
import model as models
from batches import EVAL_TEXTS, EVAL_TOKENS, Collate, cut
from corpus import encode
from ddp import pick_device
from decision import PLAIN, Decision
from errors import MISSING, Refusal, printable
from prepare import pick_precision, set_determinism

MAX_LENGTH = 512  # tokens of a text at most, where no run says so


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode, with all that stands between a text and its label."""

    model: nn.Module
    tokenizer: object
    collate: Collate
    labels: list[str]
    decision: Decision
    dtype: torch.dtype  # of matrix products
    batch_tokens: int  # of a pass at most, padding included

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """What `logits` computes in; open it around many calls, so that weights are cast once."""
        is_bf16 = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """The logits of non-empty texts in their order, (N, K) float32.

        Which texts are scored together alters them by no more than rounding. Raises Refusal 66 for
        a tokenizer that fails on a text.
        """
        found = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        if not len(texts):
            return found
        dress = self.collate.template.dress
        parts = encode(texts, self.tokenizer)
        rows = [dress(np.array(ids, dtype=np.int64)) for part in parts for ids in part]
        batches = self._cut(np.array([len(row) for row in rows]))
        outs = []
        with self.autocast():
            for batch in batches:
                made = self.collate([(rows[i], 0, 1.0, False) for i in batch]).to(self.device)
                outs.append(self.model(**made.inputs).logits.float())
        found[np.concatenate(batches)] = torch.cat(outs).cpu().numpy()  # a GPU is waited for once
        return found

    def _cut(self, lengths: np.ndarray) -> list[list[int]]:
        """The texts of each pass."""
        is_packed = self.collate.padding == "free"
        can_pad = getattr(self.model.config, "pad_token_id", None) is not None
        size = EVAL_TEXTS if can_pad else 1  # some decoders have no token to pad with
        return cut(np.arange(len(lengths)), lengths, size, self.batch_tokens, is_packed=is_packed)


def load(
    name: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_tokens: int | None = None,
    is_argmax: bool = False,
) -> Classifier:
    """The classifier in a folder or of a hub name, with what inference.json has on its use.

    `precision` auto is what training scored with, but bf16 only where the hardware multiplies it
    natively. `is_argmax`: without the threshold. Raises Refusal 66 for what is no trained
    classifier and 69 for a GPU that cannot be used.
    """
    place = pick_device(device, 0)
    set_determinism(config.replace(config.Config(), run__deterministic=False), place)
    try:
        source = models.find_source(name)
        if source.is_scratch:
            raise Refusal(MISSING, f"{name}: no trained model")
        tokenizer = models.load_tokenizer(source, list, source.folder)
        model = models.load_trained(source, tokenizer)
        known = decision.read(source.folder)
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        if known and known.labels != labels:
            reason = f"{decision.FILE} and config.json name other labels"
            raise Refusal(MISSING, f"{printable(source.folder, 200)}: {reason}")
        longest, truncation = (
            (known.max_length, known.truncation) if known else (MAX_LENGTH, "head")
        )
        longest = min(longest, models.positions_of(model.config) or longest)
        template = models.template(tokenizer, longest, truncation)
    except Refusal as refusal:  # the user of a trained model has no settings
        message = refusal.message.removeprefix("model.name: ")
        raise Refusal(refusal.exit_code, message) from None
    is_packed = encoder.is_known(model, template.pad_id)
    if is_packed:
        encoder.install(model, packed=True, first_position=True)
    if precision == "auto" and known and known.precision == "fp32":
        precision = "fp32"
    precision = pick_precision(config.replace(config.Config(), train__precision=precision), place)
    decided = known.decision if known else PLAIN
    return Classifier(
        model=model.to(place).eval(),  # last: what `install` adds is in training mode
        tokenizer=tokenizer,
        collate=Collate(template, "free" if is_packed else "batch", place.type == "cpu"),
        labels=labels,
        decision=Decision(decided.temperature) if is_argmax else decided,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        batch_tokens=batch_tokens or EVAL_TOKENS[place.type],
    )
