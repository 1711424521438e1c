"""Padding-free batches: texts one after another in one row, and attention that keeps them apart.

The attention is a function of transformers' AttentionInterface. On CUDA a variable-length flash
kernel serves it. Elsewhere q, k and v are padded inside it, in groups of texts of similar length.

Shapes: B texts, T tokens of all of them, A heads, D entries of a head, L tokens of a group's
longest text, C cells of all groups: tokens and their padding.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dropout import keep_mask

NAME = "packed"  # of the attention, among transformers' implementations
SIMILAR = 0.7  # a text of a group has at least this share of the longest one's tokens


@dataclass(frozen=True)
class Group:
    """Consecutive texts of similar length, padded to the longest one inside the attention."""

    texts: int
    length: int  # L
    mask: (
        Tensor | None
    )  # (texts, 1, 1, L) float32: 0 for a token, -inf for padding; None: no padding


@dataclass(frozen=True)
class Packing:
    """Where each text of a packed row lies; texts should be sorted by length."""

    lengths: tuple[int, ...]
    filler: int  # rows after the texts, which no text sees
    cu_seqlens: Tensor  # (B + 1,) int32: text i has the tokens from [i] up to [i + 1]

    @staticmethod
    def of(lengths: list[int], *, is_rounded: bool) -> "Packing":
        """The packing of texts with these numbers of tokens; `is_rounded`: with filler."""
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        filler = filler_for(sum(lengths)) if is_rounded else 0
        return Packing(tuple(lengths), filler, torch.from_numpy(ends))

    def to(self, device: torch.device) -> "Packing":
        """The same on `device`, copied without waiting where memory is pinned."""
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=True))

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
    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The row of each cell (C,), the cell of each row (T,) and the cells that are padding.

        Of padding, the row is the text's first.
        """
        rows, cells, row, cell, first = [], [], 0, 0, 0
        for group in self.groups:
            for length in self.lengths[first : first + group.texts]:
                rows += [np.arange(row, row + length), np.full(group.length - length, row)]
                cells.append(np.arange(cell, cell + length))
                row, cell = row + length, cell + group.length
            first += group.texts
        real = np.concatenate(cells)
        padding = np.setdiff1d(np.arange(cell), real)
        return tuple(torch.from_numpy(x) for x in (np.concatenate(rows), real, padding))


def filler_for(tokens: int) -> int:
    """Rows to add, at most 5 %, so that few different numbers of rows occur.

    oneDNN generates code for each number that is new, which takes longer than to run it.
    """
    return -tokens % (1 << max(0, (tokens // 20).bit_length() - 1))


def _group(lengths: list[int]) -> Group:
    longest = lengths[0]
    if longest == lengths[-1] == min(lengths):
        return Group(len(lengths), longest, None)
    is_padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(is_padding.shape).masked_fill_(is_padding, -math.inf)
    return Group(len(lengths), longest, mask[:, None, None])


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Softmax attention inside each text, for transformers' AttentionInterface.

    key, value (1, A, T, D); query the same, or (1, A, B, D): one for each text. Returns
    (1, T or B, A, D) and no weights.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, A, D)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        out = _flash(query, key, value, packing, scaling, dropout)
    else:
        with torch.autocast(query.device.type, enabled=False):  # it would make bf16 of fp32
            out = _Grouped.apply(query, key, value, packing, scaling, dropout)
    return out[None], None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, dropout: float
) -> Tensor:
    """The variable-length flash kernel (Dao 2023, arXiv:2307.08691) with dropout.

    torch.nn.attention.varlen has no dropout; the operator below it does, and has a derivative.
    """
    ends, longest = packing.cu_seqlens, packing.max_length
    if len(query) == len(key):
        query_ends, longest_query = ends, longest
    else:
        query_ends, longest_query = (
            torch.arange(len(ends), dtype=torch.int32, device=ends.device),
            1,
        )
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        query_ends,
        ends,
        longest_query,
        longest,
        dropout,
        False,
        False,
        scale=scaling,
    )[0]


class _Grouped(torch.autograd.Function):
    """Attention with q, k and v padded by group, in fp32; nothing else is ever padded."""

    @staticmethod
    def forward(ctx, query, key, value, packing, scaling, dropout):  # (T or B, A, D), (T, A, D)
        one_each = len(query) != len(key)
        layout = _Layout(packing, one_each=False)
        query_layout = _Layout(packing, one_each=True) if one_each else layout
        qs, ks, vs = query_layout.pad(query), layout.pad(key), layout.pad(value)
        outs, saved = [], []
        for group, q, k, v in zip(packing.groups, qs, ks, vs, strict=True):
            scores = q.mul_(scaling).bmm(k.transpose(1, 2))  # (texts * A, L or 1, L)
            if group.mask is not None:
                scores.view(group.texts, -1, *scores.shape[1:]).add_(group.mask)
            weights = torch._softmax(scores, -1, False)
            mask = None
            if dropout:
                mask = keep_mask(weights.shape, dropout, weights.dtype, weights.device)
            outs.append((weights if mask is None else weights * mask).bmm(v))
            saved += [q, k, v, weights, mask]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.query_layout, ctx.scaling, ctx.like = (
            layout,
            query_layout,
            scaling,
            query[:0],
        )
        return query_layout.unpad(outs, query)

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return _Grouped._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        saved = ctx.saved_tensors
        grads = ctx.query_layout.pad(grad, is_gradient=True)
        dqs, dks, dvs = [], [], []
        for i, g in enumerate(grads):
            q, k, v, weights, mask = saved[5 * i : 5 * i + 5]
            kept = weights if mask is None else weights * mask
            dvs.append(kept.transpose(1, 2).bmm(g))
            dkept = g.bmm(v.transpose(1, 2))
            if mask is not None:
                dkept.mul_(mask)
            dscores = torch._softmax_backward_data(dkept, weights, -1, weights.dtype)
            dqs.append(dscores.bmm(k).mul_(ctx.scaling))
            dks.append(dscores.transpose(1, 2).bmm(q))
        dq = ctx.query_layout.unpad(dqs, ctx.like)
        dk, dv = (ctx.layout.unpad(x, ctx.like) for x in (dks, dvs))
        return dq, dk, dv, None, None, None


class _Layout:
    """Between the rows of a packing and one batch of matrices (texts * A, L, D) for each group."""

    def __init__(self, packing: Packing, *, one_each: bool):
        """`one_each`: a row for each text, so that L is 1 and nothing is padded."""
        self.packing, self.one_each = packing, one_each
        self.sizes = [g.texts * (1 if one_each else g.length) for g in packing.groups]

    def pad(self, x: Tensor, *, is_gradient: bool = False) -> list[Tensor]:
        """x (T or B, A, D) by group in fp32; cells of padding are zero in gradients."""
        if not self.one_each:
            rows, _, padding = self.packing.padded
            x = x.index_select(0, rows)
            if is_gradient:
                x.index_fill_(0, padding, 0.0)
        heads, size = x.shape[1:]
        dtype = torch.promote_types(x.dtype, torch.float32)
        batches = []
        for group, part in zip(self.packing.groups, x.split(self.sizes), strict=True):
            part = part.view(group.texts, -1, heads, size).transpose(1, 2)
            batch = torch.empty(part.shape, dtype=dtype, device=x.device).copy_(part)
            batches.append(batch.view(group.texts * heads, -1, size))
        return batches

    def unpad(self, batches: list[Tensor], like: Tensor) -> Tensor:
        """The way back, to (T or B, A, D) of the type of `like`; zero in rows of filler."""
        heads, size = like.shape[1:]
        out = like.new_empty(sum(self.sizes), heads, size)
        for group, part, batch in zip(
            self.packing.groups, out.split(self.sizes), batches, strict=True
        ):
            part = part.view(group.texts, -1, heads, size).transpose(1, 2)
            part.copy_(batch.view(part.shape))
        if self.one_each:
            return out
        _, cells, _ = self.packing.padded
        rows = out.new_empty(len(cells) + self.packing.filler, heads, size)
        torch.index_select(out, 0, cells, out=rows[: len(cells)])
        rows[len(cells) :] = 0
        return rows
