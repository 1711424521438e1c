"""A finished model put to use: texts in, logits out, as `train.evaluate` computes them.

Shapes: N texts, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

import decision
import encoder
import model as models
from batches import EVAL_TEXTS, EVAL_TOKENS, Collate, cut
from corpus import encode
from ddp import pick_device
from decision import PLAIN, Decision
from errors import MISSING, Refusal, printable
from prepare import pick_precision, set_determinism

MAX_LENGTH = 512  # tokens of a text at most, where neither a run nor the tokenizer says so
KNOWN_LENGTH = 8192  # what tokenizers say beyond it means that they do not know
PROBES = ("a", "a a a a a a")


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
    batch_texts: int = EVAL_TEXTS

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """What `logits` computes in; open it around many calls, so that weights are cast once."""
        is_bf16 = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    @torch.no_grad()
    def logits(
        self, texts: Sequence[str], progressed: Callable[[int], object] = lambda texts: None
    ) -> np.ndarray:
        """The logits of non-empty texts in their order, (N, K) float32.

        Which texts are scored together alters them by no more than rounding. `progressed` is told
        how many a pass had. Raises Refusal 66 for a tokenizer that fails on a text.
        """
        found = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        if not len(texts):
            return found
        dress = self.collate.template.dress
        parts = encode(texts, self.tokenizer)
        rows = [dress(np.array(ids, dtype=np.int64)) for part in parts for ids in part]
        caps, is_packed = (self.batch_texts, self.batch_tokens), self.collate.padding == "free"
        lengths = np.array([len(row) for row in rows])
        batches = cut(np.arange(len(rows)), lengths, *caps, is_packed=is_packed)
        outs = []
        with self.autocast():
            for batch in batches:
                made = self.collate([(rows[i], 0, 1.0, False) for i in batch]).to(self.device)
                outs.append(self.model(**made.inputs).logits.float())
                progressed(len(batch))
        found[np.concatenate(batches)] = torch.cat(outs).cpu().numpy()  # a GPU is waited for once
        return found


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
    try:
        place = pick_device(device, 0)
        set_determinism(False, place)
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
            (known.max_length, known.truncation) if known else _as_its_tokenizer_says(tokenizer)
        )
        longest = min(longest, models.positions_of(model.config) or longest)
        template = models.template(tokenizer, longest, truncation)
    except Refusal as refusal:  # the user of a trained model has no settings
        message = refusal.message.removeprefix("model.name: ")
        message = message.replace("run.device=cpu to train on the CPU", "--device cpu")
        raise Refusal(refusal.exit_code, message) from None
    is_packed = encoder.is_known(model, template.pad_id)
    if is_packed:
        encoder.install(model, packed=True, first_position=True)
    if precision == "auto" and known and known.precision == "fp32":
        precision = "fp32"
    precision = pick_precision(precision, place)
    decided = known.decision if known else PLAIN
    found = Classifier(
        model=model.to(place).eval(),  # last: what `install` adds is in training mode
        tokenizer=tokenizer,
        collate=Collate(template, "free" if is_packed else "batch", place.type == "cpu"),
        labels=labels,
        decision=Decision(decided.temperature) if is_argmax else decided,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        batch_tokens=batch_tokens or EVAL_TOKENS[place.type],
    )
    return found if is_packed else _probed(found, source)


def _as_its_tokenizer_says(tokenizer) -> tuple[int, str]:
    """How many tokens of a text are kept at most, and which of them."""
    told = tokenizer.model_max_length
    side = {"left": "tail"}.get(tokenizer.truncation_side, "head")
    return (int(told) if told <= KNOWN_LENGTH else MAX_LENGTH), side


def _probed(found: Classifier, source: models.Source) -> Classifier:
    """`found`, of whose architecture nothing is known, with batches as it takes them.

    Some decoders have no token to pad with, or look for another one than their tokenizer's; they
    get a text at a time. Raises Refusal 66 if the logits of a text, dressed as this program does,
    are not those of what its own tokenizer makes of it.
    """
    exact, model = replace(found, dtype=torch.float32, batch_texts=1), found.model
    alone = exact.logits(PROBES)
    scale = 1e-3 * max(1.0, float(np.abs(alone).max()))
    for text, logits in zip(PROBES, alone, strict=True):
        own = found.tokenizer(text, return_tensors="pt").to(found.device)
        with torch.no_grad():
            if np.abs(model(**own).logits.float().cpu().numpy()[0] - logits).max() > scale:
                where, reason = printable(source.folder, 200), "reads more than ids and their mask"
                raise Refusal(MISSING, f"{where}: a model that {reason} cannot be used here")
    try:
        together = replace(exact, batch_texts=len(PROBES)).logits(PROBES)
    except ValueError:  # of transformers, for a model without a token to pad with
        together = np.full_like(alone, np.nan)
    agrees = np.abs(together - alone).max() <= scale
    return found if agrees else replace(found, batch_texts=1)
