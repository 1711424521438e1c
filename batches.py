"""Which texts make a step, and how they are cut: the sampler, and the collate that pads or packs.

Shapes: B texts of a micro-batch, L tokens of its longest, T tokens of all of them, with any filler.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from corpus import TokenisedSplit
from packing import Packing, filler_for
from schedule import StepPlan

EVAL_TEXTS, EVAL_TOKENS = 256, {"cpu": 4096, "cuda": 16384}  # of one evaluation batch at most


@dataclass(frozen=True)
class Template:
    """How a tokenizer dresses one text, and how long the whole may be."""

    prefix: list[int]
    suffix: list[int]
    # 1 for XLM-R, not 0: id 0 is <s>, and positions are derived from input_ids != pad_id
    pad_id: int
    max_length: int  # tokens with prefix and suffix
    truncation: str  # head, tail or head_tail

    @property
    def room(self) -> int:
        """Tokens of the text itself that fit."""
        return self.max_length - len(self.prefix) - len(self.suffix)

    def lengths(self, split: TokenisedSplit) -> np.ndarray:
        """Tokens of each text as the model sees it, (N,)."""
        own = np.diff(split.offsets)
        return np.minimum(own, self.room) + self.max_length - self.room

    def dress(self, ids: np.ndarray) -> list[int]:
        """The ids of one text, cut and dressed.

        Humour often sits at the end: head_tail keeps the first quarter of the places and the last
        three quarters.
        """
        if len(ids) > self.room:
            head = {"head": self.room, "tail": 0, "head_tail": self.room // 4}[self.truncation]
            ids = np.concatenate([ids[:head], ids[len(ids) - (self.room - head) :]])
        return [*self.prefix, *ids.tolist(), *self.suffix]


@dataclass(frozen=True)
class MicroBatch:
    """One forward: the model's inputs, each (B, L) or packed (1, T), and labels (B,) int64.

    weights (B,) float32: what each text's loss is multiplied by. A filler holds a text for a rank
    that has none in this step; its loss counts zero times.
    """

    inputs: dict[str, Tensor | Packing]
    labels: Tensor
    weights: Tensor
    tokens: int  # real ones, without padding
    is_filler: bool = False

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`, copied without waiting where memory is pinned."""
        if device.type == "cpu":
            return self
        inputs = {name: t.to(device, non_blocking=True) for name, t in self.inputs.items()}
        labels, weights = (t.to(device, non_blocking=True) for t in (self.labels, self.weights))
        return MicroBatch(inputs, labels, weights, self.tokens, self.is_filler)

    def pin_memory(self) -> "MicroBatch":
        """For DataLoader: the same in page-locked memory."""
        inputs = {name: t.pin_memory() for name, t in self.inputs.items()}
        labels, weights = self.labels.pin_memory(), self.weights.pin_memory()
        return MicroBatch(inputs, labels, weights, self.tokens, self.is_filler)


class Texts(Dataset):
    """A split by index; -1 - i is text i as a filler. weights (N,): of each text in the loss."""

    def __init__(
        self, split: TokenisedSplit, template: Template, weights: np.ndarray | None = None
    ):
        self.split, self.template = split, template
        self.weights = np.ones(len(split), dtype=np.float32) if weights is None else weights

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[list[int], int, float, bool]:
        is_filler = index < 0
        i = -1 - index if is_filler else index
        start, end = self.split.offsets[i : i + 2]
        ids = self.template.dress(self.split.ids[start:end])
        return ids, int(self.split.labels[i]), float(self.weights[i]), is_filler


@dataclass(frozen=True)
class Collate:
    """Pads texts to the longest of their batch or to max_length, or packs them in one row.

    `padding`: batch, max or free; `is_rounded` as in Packing.of.
    """

    template: Template
    padding: str = "batch"
    is_rounded: bool = False

    def __call__(self, texts: Sequence[tuple[list[int], int, float, bool]]) -> MicroBatch:
        rows, labels, weights, fillers = zip(*texts, strict=True)
        return MicroBatch(
            inputs=self._pack(rows) if self.padding == "free" else self._pad(rows),
            labels=torch.tensor(labels),
            weights=torch.tensor(weights),
            tokens=sum(map(len, rows)),
            is_filler=fillers[0],
        )

    def cells(self, lengths: np.ndarray) -> int:
        """Tokens that a pass over texts of these lengths computes, padding included."""
        if self.padding == "free":
            total = int(lengths.sum())
            return total + (filler_for(total) if self.is_rounded else 0)
        width = self.template.max_length if self.padding == "max" else int(lengths.max())
        return len(lengths) * width

    def _pad(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        width = self.template.max_length if self.padding == "max" else max(map(len, rows))
        input_ids = np.full((len(rows), width), self.template.pad_id, dtype=np.int64)
        attention_mask = np.zeros((len(rows), width), dtype=np.int64)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        names = {"input_ids": input_ids, "attention_mask": attention_mask}
        return {name: torch.from_numpy(array) for name, array in names.items()}

    def _pack(self, rows: Sequence[list[int]]) -> dict[str, Tensor | Packing]:
        pad_id = self.template.pad_id
        packing = Packing.of([len(ids) for ids in rows], is_rounded=self.is_rounded)
        names = {"input_ids": np.concatenate(rows)}
        names["position_ids"] = pad_id + 1 + packing.positions  # XLM-R counts on from its pad id
        inputs = {
            name: torch.from_numpy(np.pad(array, (0, packing.filler), constant_values=pad_id)[None])
            for name, array in names.items()
        }
        return inputs | {"packing": packing}


class StepSampler(DistributedSampler):
    """The loader's batch sampler: yields this rank's index list of each micro-batch, step by step.

    The order of an epoch is a permutation of all training texts, a pure function of (seed, epoch).
    Its consecutive slices are the global batches, the last one of an epoch shorter: as sets the
    same for any number of ranks and any accumulation. `DistributedSampler` as it comes deals single
    texts round-robin and repeats some to even out the ranks; here no text is repeated.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        steps: StepPlan,
        *,
        rank: int,
        seed: int,
        micro_batch_tokens: int,
        is_packed: bool = False,
        first_step: int = 0,
    ):
        """lengths (N,): tokens of each text, to balance the ranks and to cap a micro-batch."""
        super().__init__(range(len(lengths)), steps.world_size, rank, shuffle=True, seed=seed)
        self.lengths, self.steps = lengths, steps
        self.micro_batch_tokens, self.is_packed = micro_batch_tokens, is_packed
        self.first_step = first_step
        self._order: tuple[int, np.ndarray] | None = None  # the epoch at hand and its permutation
        self.counts: deque[int] = deque()  # micro-batches of each step handed out so far

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps.total_steps):
            batches = self.micro_batches(step)
            self.counts.append(len(batches))
            yield from batches

    def __len__(self) -> int:
        return sum(
            len(self.micro_batches(s)) for s in range(self.first_step, self.steps.total_steps)
        )

    def global_batch(self, step: int) -> np.ndarray:
        """The texts of one step on all ranks, (n,) int64."""
        epoch, place = divmod(step, self.steps.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            permutation = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
            self._order = (epoch, permutation)
        size = self.steps.global_batch_size
        return self._order[1][place * size : (place + 1) * size]

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's texts of one step, cut; a single filler where it has none."""
        batch = self.global_batch(step)
        mine = deal(batch, self.lengths, self.num_replicas)[self.rank]
        if len(mine) == 0:
            return [[-1 - int(batch[0])]]
        return cut(
            mine,
            self.lengths,
            self.steps.micro_batch_size,
            self.micro_batch_tokens,
            is_packed=self.is_packed,
        )


def deal(batch: np.ndarray, lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """The texts of a global batch by rank: equal counts, to one, and nearly equal tokens.

    Longest first, each to the rank with the fewest tokens that has a place left.
    """
    if ranks == 1:
        return [batch]
    places = [len(batch) // ranks + (r < len(batch) % ranks) for r in range(ranks)]
    tokens, hands = [0] * ranks, [[] for _ in range(ranks)]
    for i in batch[np.argsort(-lengths[batch], kind="stable")].tolist():
        r = min((r for r in range(ranks) if len(hands[r]) < places[r]), key=lambda r: tokens[r])
        hands[r].append(i)
        tokens[r] += int(lengths[i])
    return [np.array(hand, dtype=np.int64) for hand in hands]


def cut(
    texts: np.ndarray,
    lengths: np.ndarray,
    micro_batch_size: int,
    micro_batch_tokens: int,
    *,
    is_packed: bool = False,
) -> list[list[int]]:
    """Micro-batches of similar lengths, longest first, of at most so many texts and tokens.

    Tokens count with their padding, if any. A single text over the cap is one of its own.
    """
    batches: list[list[int]] = []
    tokens = 0  # of the last one
    for i in texts[np.argsort(-lengths[texts], kind="stable")].tolist():
        length, last = int(lengths[i]), batches[-1] if batches else []
        tokens += length if is_packed or not last else int(lengths[last[0]])
        if not last or len(last) == micro_batch_size or tokens > micro_batch_tokens:
            batches.append([i])
            tokens = length
        else:
            last.append(i)
    return batches


def evaluation_batches(
    lengths: np.ndarray, *, is_packed: bool = False, device: str = "cpu"
) -> list[list[int]]:
    """All texts once, cut by length and token budget, whatever the number of ranks."""
    caps = (EVAL_TEXTS, EVAL_TOKENS[device])
    return cut(np.arange(len(lengths)), lengths, *caps, is_packed=is_packed)
