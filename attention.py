"""Attention over a packed row that keeps its texts apart.

A function of transformers' AttentionInterface. On CUDA a variable-length flash kernel serves it, in
bf16. Else q, k and v are padded inside it, in groups of texts of similar length.

Shapes: B texts, T tokens of all of them, A heads, D entries of a head, L tokens of a group's
longest text, C cells of all groups: tokens and their padding.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dropout import keep_mask
from packing import Group, Packing

NAME = "packed"  # among transformers' implementations


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
    if _has_flash(query):
        out = _flash(query, key, value, packing, scaling, dropout)
    elif dropout == 0 and not torch.is_grad_enabled():
        out = _fused(query, key, value, packing, scaling)
    else:
        with torch.autocast(query.device.type, enabled=False):  # it would make bf16 of fp32
            out = _Grouped.apply(query, key, value, packing, scaling, dropout)
    return out[None], None


def _has_flash(query: Tensor) -> bool:
    """Whether torch's flash kernel takes tensors such as `query`, (T, A, D)."""
    size = query.shape[2]
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return (
        size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, dropout: float
) -> Tensor:
    """The variable-length flash kernel (Dao 2023, arXiv:2307.08691) with dropout.

    torch.nn.attention.varlen has no dropout; the operator below it does, and has a derivative.
    """
    assert not packing.filler  # the kernel would leave its rows as they were in memory
    ends, longest = packing.cu_seqlens, packing.max_length
    q_ends, q_longest = ends, longest
    if len(query) != len(key):  # one for each text
        q_ends, q_longest = torch.arange(len(ends), dtype=torch.int32, device=ends.device), 1
    return torch.ops.aten._flash_attention_forward(
        query, key, value, q_ends, ends, q_longest, longest, dropout, False, False, scale=scaling
    )[0]


def _fused(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
    """torch's own attention, group by group; on a CPU its fast kernel knows no dropout."""
    heads, one_each = query.shape[1], len(query) != len(key)
    rows, columns = (_layout(packing, heads, one_each=x) for x in (one_each, False))
    dtype = query.dtype
    q, k, v = rows.pad(query, dtype), columns.pad(key, dtype), columns.pad(value, dtype)
    outs = []
    for (group, q_, k_, _), (_, _, v_, _) in zip(
        rows.by_group(columns, q, k), rows.by_group(columns, q, v), strict=True
    ):
        q_, k_, v_ = (x.view(group.texts, heads, -1, x.shape[-1]) for x in (q_, k_, v_))
        mask = None if group.mask is None else group.mask.to(dtype)
        out = F.scaled_dot_product_attention(q_, k_, v_, mask, scale=scaling)
        outs.append(out.reshape(-1, q.shape[1]))
    return rows.unpad(torch.cat(outs), dtype)


class _Grouped(torch.autograd.Function):
    """Attention with q, k and v padded by group, in fp32; nothing else is ever padded."""

    @staticmethod
    def forward(ctx, query, key, value, packing, scaling, dropout):  # (T or B, A, D), (T, A, D)
        heads, one_each = query.shape[1], len(query) != len(key)
        rows, columns = (_layout(packing, heads, one_each=x) for x in (one_each, False))
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v = rows.pad(query, dtype), columns.pad(key, dtype), columns.pad(value, dtype)
        q.mul_(scaling)
        weights = q.new_empty(sum(rows.areas))
        for group, q_, k_, w_ in rows.by_group(columns, q, k, weights):
            scores = q_.bmm(k_.transpose(1, 2))  # (texts * A, L or 1, L)
            if group.mask is not None:
                scores.view(group.texts, -1, *scores.shape[1:]).add_(group.mask)
            torch.softmax(scores, -1, out=w_)
        mask = keep_mask(weights.shape, dropout, weights.dtype, weights.device) if dropout else None
        kept = weights if mask is None else weights * mask
        out = torch.empty_like(q)
        for _, out_, v_, w_ in rows.by_group(columns, out, v, kept):
            torch.bmm(w_, v_, out=out_)
        ctx.save_for_backward(q, k, v, weights, mask)
        ctx.rows, ctx.columns, ctx.scaling, ctx.dtype = rows, columns, scaling, query.dtype
        return rows.unpad(out, query.dtype)

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            q, k, v, weights, mask = ctx.saved_tensors
            rows, columns = ctx.rows, ctx.columns
            grad = rows.pad(grad, q.dtype, is_gradient=True)
            kept = weights if mask is None else weights * mask
            dq, dk, dv, dweights = (torch.empty_like(x) for x in (q, k, v, weights))
            for (_, g, v_, dw), (_, _, dv_, w) in zip(
                rows.by_group(columns, grad, v, dweights),
                rows.by_group(columns, grad, dv, kept),
                strict=True,
            ):
                torch.bmm(w.transpose(1, 2), g, out=dv_)
                torch.bmm(g, v_.transpose(1, 2), out=dw)
            if mask is not None:
                dweights.mul_(mask)
            for (_, q_, k_, w), (_, dq_, dk_, dw) in zip(
                rows.by_group(columns, q, k, weights),
                rows.by_group(columns, dq, dk, dweights),
                strict=True,
            ):
                dscores = torch._softmax_backward_data(dw, w, -1, w.dtype)
                torch.bmm(dscores, k_, out=dq_)
                torch.bmm(dscores.transpose(1, 2), q_, out=dk_)
            dq = rows.unpad(dq.mul_(ctx.scaling), ctx.dtype)
            dk, dv = columns.unpad(dk, ctx.dtype), columns.unpad(dv, ctx.dtype)
            return dq, dk, dv, None, None, None


def _layout(packing: Packing, heads: int, *, one_each: bool) -> "_Layout":
    """Made once for all layers of a pass."""
    key = (heads, one_each)
    if key not in packing.layouts:
        packing.layouts[key] = _Layout(packing, heads, one_each=one_each)
    return packing.layouts[key]


class _Layout:
    """Between rows (T, A, D) and batches of matrices (texts * A, L, D), one for each group.

    The batches lie one after another in one tensor (C * A, D), so that what is done to single
    values is done to all groups at once.
    """

    def __init__(self, packing: Packing, heads: int, *, one_each: bool):
        """`one_each`: a row for each text, so that L is 1 and nothing is padded."""
        device = packing.cu_seqlens.device
        self.heads = heads
        self.groups = [
            group if group.mask is None else replace(group, mask=group.mask.to(device))
            for group in packing.groups
        ]
        self.lengths = [1 if one_each else group.length for group in packing.groups]
        counts = [g.texts * heads * n for g, n in zip(packing.groups, self.lengths, strict=True)]
        self.counts = counts  # rows of (C * A, D) of each group
        self.areas = [n * g.length for n, g in zip(counts, packing.groups, strict=True)]  # weights
        self.filler = 0 if one_each else packing.filler
        own = [1] * len(packing.lengths) if one_each else packing.lengths
        starts = np.cumsum([0, *own])
        rows, is_padding, heads_, text = [], [], [], 0
        for group, length in zip(packing.groups, self.lengths, strict=True):
            texts = slice(text, text := text + group.texts)
            place = np.arange(length)
            beyond = place >= np.asarray(own[texts])[:, None]  # (texts, L)
            row = starts[:-1][texts][:, None] + np.where(beyond, 0, place)
            shape = (group.texts, heads, length)
            rows.append(np.broadcast_to(row[:, None], shape).ravel())
            is_padding.append(np.broadcast_to(beyond[:, None], shape).ravel())
            heads_.append(np.broadcast_to(np.arange(heads)[:, None], shape).ravel())
        row, padding, head = map(np.concatenate, (rows, is_padding, heads_))
        back = np.empty(starts[-1] * heads, dtype=np.int64)
        real = np.flatnonzero(~padding)
        back[row[real] * heads + head[real]] = real
        self.row, self.head = (torch.from_numpy(x).to(device) for x in (row, head))
        self.back = torch.from_numpy(back).to(device)  # (T * A,)
        self.padding = torch.from_numpy(np.flatnonzero(padding)).to(device)
        self._sources: dict[int, Tensor] = {}

    def pad(self, x: Tensor, dtype: torch.dtype, *, is_gradient: bool = False) -> Tensor:
        """x (T or B, A, D) as (C * A, D) of `dtype`; rows of padding are zero in gradients."""
        size = x.shape[2]
        if x.stride(2) != 1 or x.stride(1) != size or x.stride(0) % size:
            x = x.contiguous()
        apart = x.stride(0) // size  # rows of D from one token to the next: more than A in a slice
        if apart not in self._sources:
            self._sources[apart] = self.row * apart + self.head
        flat = x.as_strided(((len(x) - 1) * apart + self.heads, size), (size, 1))
        batch = flat.index_select(0, self._sources[apart])
        if is_gradient:
            batch.index_fill_(0, self.padding, 0.0)
        return batch.to(dtype)

    def unpad(self, batch: Tensor, dtype: torch.dtype) -> Tensor:
        """The way back, to (T or B, A, D) of `dtype`; zero in rows of filler."""
        size = batch.shape[1]
        count = len(self.back) // self.heads
        out = batch.new_empty(count + self.filler, self.heads, size, dtype=dtype)
        torch.index_select(batch.to(dtype), 0, self.back, out=out[:count].view(-1, size))
        out[count:] = 0
        return out

    def by_group(
        self, columns: "_Layout", of_rows: Tensor, of_columns: Tensor, weights: Tensor | None = None
    ) -> Iterator[tuple[Group, Tensor, Tensor, Tensor | None]]:
        """Each group with its part of q or the like, of k or the like, and of weights."""
        size = of_rows.shape[1]
        r, c = of_rows.split(self.counts), of_columns.split(columns.counts)
        w = [None] * len(r) if weights is None else weights.split(self.areas)
        for i, group in enumerate(self.groups):
            n, m = self.lengths[i], columns.lengths[i]
            part = None if weights is None else w[i].view(-1, n, m)
            yield group, r[i].view(-1, n, size), c[i].view(-1, m, size), part
