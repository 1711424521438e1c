"""The layers of XLM-R's encoder, computed with less work than transformers' own forward does.

Same parameters, same function. A packed row of texts needs no padding (attention.py); the last
layer computes only the position that the classifier reads. On a CPU in bf16, where casts, masks and
small products take most of a step, a weight is cast once a step and q, k and v are one product.

Shapes: B texts, L tokens of the longest, T rows: B * L of a padded batch or the tokens of a packed
one, H hidden size, A heads, D entries of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import NAME, packed_attention
from dropout import Dropout, keep_mask
from gradients import memory
from packing import Packing

ARCHITECTURES = ("xlm-roberta", "roberta", "camembert")  # the same modules under the same names


def is_known(model: nn.Module, pad_id: int) -> bool:
    """Whether `model` has the layers that this module can compute, and counts from `pad_id`."""
    cfg = model.config
    return (
        cfg.model_type in ARCHITECTURES
        and cfg.pad_token_id == pad_id
        and type(model).__name__.endswith("ForSequenceClassification")
        and not cfg.is_decoder
        and cfg.chunk_size_feed_forward == 0
    )


def install(
    model: nn.Module, *, packed: bool, first_position: bool, checkpointing: bool = False
) -> None:
    """Make `model` take packed rows, or compute only the first position in its last layer.

    A packed model is called with input_ids and position_ids (1, T) and a Packing. `checkpointing`:
    its layers keep their input alone and are computed again in the backward.
    """
    from transformers import AttentionInterface

    if not (packed or first_position):
        return
    layers = model.base_model.encoder.layer
    if packed:
        AttentionInterface.register(NAME, packed_attention)
        model.set_attn_implementation(NAME)
        for module in (model.base_model.embeddings, model.classifier):
            module.dropout = Dropout(module.dropout.p)
    for layer in layers if packed else layers[-1:]:
        is_last = layer is layers[-1]
        keep = "all" if not is_last else "first" if first_position else "first of all"
        layer.forward = partial(_layer, layer, _Products(layer), keep)
        if packed and checkpointing:
            layer.forward = partial(_checkpointed, layer, layer.forward)


def _layer(
    layer: nn.Module,
    products: "_Products",
    keep: str,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    *_: object,
    packing: Packing | None = None,
    **__: object,
) -> Tensor:
    """One layer: hidden (1, T, H) or (B, L, H) to the same; the last one to (B, 1, H).

    `keep`: "first" computes each text's first position alone, "first of all" picks it at the end.
    """
    attention, shape = layer.attention, hidden.shape
    rows = hidden.reshape(-1, shape[-1])  # (T, H)
    if keep == "first":
        first = (
            packing.starts if packing else torch.arange(0, len(rows), shape[1], device=rows.device)
        )
        residual = rows[first]  # (B, H)
        projections = *products.query(residual), *products.key_value(rows)
    else:
        residual = rows
        projections = products.query_key_value(rows)
    context = _attend(attention.self, projections, attention_mask, packing, shape[0])
    rows = _add_norm(attention.output, products.attended(context)[0], residual)
    inner = layer.intermediate.intermediate_act_fn(products.inner(rows)[0])
    rows = _add_norm(layer.output, products.outer(inner)[0], rows)
    if keep == "all":
        return rows.view(shape)
    return (rows[packing.starts] if keep == "first of all" else rows)[:, None]


def _checkpointed(
    layer: nn.Module, forward: Callable, hidden: Tensor, *_: object, packing: Packing, **__: object
) -> Tensor:
    """The layer's forward without what it would keep for the backward (arXiv:1604.06174)."""
    if not layer.training:
        return forward(hidden, packing=packing)
    return checkpoint(forward, hidden, packing=packing, use_reentrant=False)


def _attend(
    attention: nn.Module,
    projections: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    packing: Packing | None,
    batch: int,
) -> Tensor:
    """Attention by the model's implementation of q (T or B, H), k and v (T, H)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, heads = attention.config._attn_implementation, attention.num_attention_heads
    size, p = attention.attention_head_size, attention.dropout.p if attention.training else 0.0
    query, key, value = (x.view(batch, -1, heads, size).transpose(1, 2) for x in projections)
    if packing is None and mask is not None:
        mask = mask[:, :, : query.shape[2]]
    attend = ALL_ATTENTION_FUNCTIONS[name if name in ALL_ATTENTION_FUNCTIONS else "sdpa"]
    options = {"dropout": p, "scaling": attention.scaling, "packing": packing}
    out, _ = attend(attention, query, key, value, mask, **options)
    return out.reshape(-1, query.shape[1] * query.shape[3])


def _add_norm(module: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """LayerNorm of dropout(x) + residual; x (T, H) in bf16 or as residual, which is fp32."""
    norm = module.LayerNorm
    p = module.dropout.p if module.training else 0.0
    if x.device.type != "cpu":
        return norm(F.dropout(x, p) + residual)
    return _AddNorm.apply(x, residual, norm.weight, norm.bias, norm.eps, p)


class _AddNorm(torch.autograd.Function):
    """On a CPU sums of two types are slow, and so is dropout; nothing but the sum is kept."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, p):
        total = x.to(residual.dtype, copy=True)
        mask = keep_mask(x.shape, p, residual.dtype, x.device) if p else None
        if p:
            total.mul_(mask)
        total.add_(residual)
        out, mean, scale = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
        ctx.save_for_backward(total, mean, scale, weight, bias, mask)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        total, mean, scale, weight, bias, mask = ctx.saved_tensors
        grad, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), total, weight.shape, mean, scale, weight, bias, [True, True, True]
        )
        dx = grad if mask is None else grad * mask
        return dx.to(ctx.dtype), grad, dweight, dbias, None, None


# --- products with the weights --------------------------------------------------------------------


class _Products:
    """The products of one layer, each with the linear modules whose weights it takes."""

    def __init__(self, layer: nn.Module):
        attention = layer.attention.self
        self.query_key_value = _Product(attention.query, attention.key, attention.value)
        self.query = _Product(attention.query)
        self.key_value = _Product(attention.key, attention.value)
        self.attended = _Product(layer.attention.output.dense)
        self.inner = _Product(layer.intermediate.dense)
        self.outer = _Product(layer.output.dense)


class _Product:
    """x W^T + b for one or several linear modules of the same input."""

    def __init__(self, *linears: nn.Linear):
        self.linears = linears
        self._versions: tuple[int, ...] = ()
        self._weight = self._bias = None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (T, in) to one (T, out) for each module, in bf16 under autocast."""
        if x.device.type != "cpu":
            if torch.is_autocast_enabled(x.device.type):  # once, not by each
                x = x.to(torch.get_autocast_dtype(x.device.type))
            return tuple(linear(x) for linear in self.linears)
        if not torch.is_autocast_enabled("cpu"):
            pairs = [(linear.weight, linear.bias) for linear in self.linears]
            return tuple(_CpuProduct.apply(x, w, b, w, b) for w, b in pairs)
        parameters = [p for linear in self.linears for p in (linear.weight, linear.bias)]
        weight, bias = self._cast(parameters)
        out = _CpuProduct.apply(x.to(torch.bfloat16), weight, bias, *parameters)
        return out.split([linear.out_features for linear in self.linears], dim=1)

    @torch.no_grad()
    def _cast(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The weights below one another and the biases, in bf16; cast only when they changed."""
        versions = tuple(p._version for p in parameters)
        if self._weight is None:
            self._weight = torch.cat(parameters[0::2]).to(torch.bfloat16)
            self._bias = torch.cat(parameters[1::2]).to(torch.bfloat16)
        elif versions != self._versions:
            for cast, sources in ((self._weight, parameters[0::2]), (self._bias, parameters[1::2])):
                for part, source in zip(
                    cast.split([len(p) for p in sources]), sources, strict=True
                ):
                    part.copy_(source)
        self._versions = versions
        return self._weight, self._bias


class _CpuProduct(torch.autograd.Function):
    """x W^T + b, with gradients for the parameters that W and b are or were cast from."""

    @staticmethod
    def forward(ctx, x, weight, bias, *parameters):
        ctx.save_for_backward(x, weight)
        ctx.parameters = parameters
        out = x.new_empty(len(x), len(weight))
        for part in _parts(x, len(weight)):
            torch.addmm(bias, x[part], weight.t(), out=out[part])
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        for part in _parts(x, weight.shape[1]):
            torch.mm(grad[part], weight, out=dx[part])
        transposed = grad.t()
        if weight.shape[1] > len(weight):  # 1.5 times as fast in oneDNN, the copy included
            transposed = transposed.contiguous()
        weights, biases = ctx.parameters[0::2], ctx.parameters[1::2]
        sizes = [len(p) for p in weights]
        if grad.dtype == weights[0].dtype:  # which is then a single one
            dweight = [torch.mm(transposed, x, out=memory(weights[0]))]
        else:
            parts = transposed.mm(x).split(sizes)
            dweight = [memory(p).copy_(part) for p, part in zip(weights, parts, strict=True)]
        dbias = [part.to(p.dtype) for p, part in zip(biases, grad.sum(0).split(sizes), strict=True)]
        return dx, None, None, *(g for pair in zip(dweight, dbias, strict=True) for g in pair)


def _parts(x: Tensor, columns: int) -> list[slice]:
    """Slices of equal size that the rows of a product are computed in.

    Of two threads oneDNN leaves one idle in bf16 products of 600 to 1,500 rows and few columns,
    such as 768 x 768 by 768 x 768; parts of at most 560 rows keep both at work (RESULTS.md).
    """
    rows = len(x)
    is_bf16 = x.dtype == torch.bfloat16
    is_split = is_bf16 and torch.get_num_threads() == 2 and 560 < rows < 1536 and columns < 2048
    size = -(-rows // -(-rows // 560)) if is_split else rows
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
