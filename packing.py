"""Padding-free batches: where each text lies in a row that holds one after another.

Shapes: B texts, T tokens of all of them, L tokens of a group's longest text.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

SIMILAR = 0.7  # a text of a group has at least this share of the longest one's tokens


@dataclass(frozen=True)
class Group:
    """Consecutive texts of similar length, padded to the longest one inside the attention."""

    texts: int
    length: int  # L
    mask: Tensor | None  # (texts, 1, 1, L): 0 for a token, -inf for padding; None without any


@dataclass(frozen=True)
class Packing:
    """Where each text of a packed row lies; the longest should come first."""

    lengths: tuple[int, ...]
    filler: int  # rows after the texts, which no text sees
    cu_seqlens: Tensor  # (B + 1,) int32: text i has the tokens from [i] up to [i + 1]

    @staticmethod
    def of(lengths: list[int], *, is_rounded: bool) -> "Packing":
        """The packing of texts with these numbers of tokens; `is_rounded`: with filler."""
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        filler = filler_for(sum(lengths)) if is_rounded else 0
        return Packing(tuple(lengths), filler, torch.from_numpy(ends))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Packing":
        """The same on `device`, as Tensor.to."""
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packing":
        """The same in page-locked memory."""
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory())

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths)

    @cached_property
    def starts(self) -> Tensor:
        """The row of each text's first token, (B,) int64."""
        return self.cu_seqlens[:-1].long()

    @cached_property
    def positions(self) -> np.ndarray:
        """The place of each token in its own text, from 0, (T,) int64."""
        ends = np.cumsum(self.lengths)
        return np.arange(ends[-1]) - np.repeat(ends - self.lengths, self.lengths)

    @cached_property
    def groups(self) -> list[Group]:
        """Texts in runs of similar length."""
        runs: list[list[int]] = []
        for length in self.lengths:
            if runs and runs[-1][0] * SIMILAR <= length <= runs[-1][0]:
                runs[-1].append(length)
            else:
                runs.append([length])
        return [_group(run) for run in runs]

    @cached_property
    def layouts(self) -> dict[tuple[int, bool], object]:
        """What attention derives from it, the same for all layers of a pass."""
        return {}


def filler_for(tokens: int) -> int:
    """Rows to add, at most 5 %, so that few different numbers of rows occur.

    oneDNN generates code for each number that is new, which takes longer than to run it.
    """
    return -tokens % (1 << max(0, (tokens // 20).bit_length() - 1))


def _group(lengths: list[int]) -> Group:
    longest = lengths[0]
    if longest == min(lengths):
        return Group(len(lengths), longest, None)
    is_padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(is_padding.shape).masked_fill_(is_padding, -math.inf)
    return Group(len(lengths), longest, mask[:, None, None])
