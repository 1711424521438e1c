"""Only the embedding rows that a run's texts use are trained, kept in optimizer state and sent.

XLM-R's table is 192 of 278 million parameters, and a corpus uses a tenth of it. A row that no text
uses has no gradient, so AdamW only decays it: w <- w (1 - lr_t * decay), the same for all of them.
The product of these factors is all that need be kept of them while training.

Shapes: V tokens of the whole vocabulary, A active ones, E that only evaluation texts use, H hidden
size.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradients import memory


def is_reducible(model: nn.Module) -> bool:
    """Whether the model's input embeddings are one plain table that nothing else uses."""
    table = model.get_input_embeddings()
    if (
        type(table) is not nn.Embedding
        or table.max_norm
        or table.scale_grad_by_freq
        or table.sparse
    ):
        return False
    users = [m for m in model.modules() for p in m.parameters(recurse=False) if p is table.weight]
    return len(users) == 1


class ActiveEmbedding(nn.Module):
    """Stands in for nn.Embedding(V, H): trains `weight` (A, H), and decays the other rows."""

    def __init__(self, table: nn.Embedding, active: np.ndarray, evaluated: np.ndarray):
        """`active`, `evaluated`: tokens of training and of evaluation texts, ids in any order."""
        super().__init__()
        padding = [] if table.padding_idx is None else [table.padding_idx]
        active = np.union1d(active, padding).astype(np.int64)
        others = np.setdiff1d(evaluated, active).astype(np.int64)
        places = torch.full((table.num_embeddings,), -1)
        places[np.concatenate([active, others])] = torch.arange(len(active) + len(others))
        self.padding_idx = int(places[table.padding_idx]) if padding else None
        self.weight = nn.Parameter(table.weight.detach()[active])
        self.register_buffer("kept", torch.ones((), dtype=torch.float64))  # of an idle row, so far
        # Derived from the texts and the base model, so not part of the state that is saved.
        self.register_buffer("active", torch.from_numpy(active), persistent=False)  # (A,) int64
        self.register_buffer("places", places, persistent=False)  # (V,) int64: in weight and others
        self.register_buffer("others", table.weight.detach()[others], persistent=False)  # (E, H)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Vectors (..., H) of ids (...)."""
        places = self.places[input_ids]
        if not self.training and len(self.others):
            return self._look_up_all(places)
        if places.is_cuda:
            return F.embedding(places, self.weight, self.padding_idx)
        return _CpuLookup.apply(self.weight, places, self.padding_idx)

    def _look_up_all(self, places: Tensor) -> Tensor:
        """Vectors of places in `weight` and, beyond it, in `others`, which decay as idle rows."""
        rows = F.embedding(places.clamp(max=len(self.weight) - 1), self.weight)
        idle = F.embedding((places - len(self.weight)).clamp(min=0), self.others)
        return torch.where((places < len(self.weight))[..., None], rows, self.decayed(idle))

    def decayed(self, rows: Tensor) -> Tensor:
        """What idle rows have become: the base model's times the share that decay has left."""
        return (rows.double() * self.kept).to(rows.dtype)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Decay the idle rows whenever `optimizer` applies an update to the others."""
        group = next(
            g for g in optimizer.param_groups if any(p is self.weight for p in g["params"])
        )

        def advance(*_: object) -> None:
            applied = 1 - optimizer.found_inf.double()  # stays on the device
            self.kept.mul_(1 - group["lr"] * group["weight_decay"] * applied)

        optimizer.register_step_post_hook(advance)

    @torch.no_grad()
    def fill(self, table: nn.Embedding) -> None:
        """Turn the base model's `table`, which may be on another device, into the whole one."""
        kept = self.kept.to(table.weight.device)
        for rows in table.weight.split(8192):  # fp64 takes memory
            rows.copy_((rows.double() * kept).to(rows.dtype))
        table.weight[self.active.to(kept.device)] = self.weight.to(kept.device)


class _CpuLookup(torch.autograd.Function):
    """F.embedding whose gradient is written where the last step's was."""

    @staticmethod
    def forward(ctx, weight, places, padding_idx):
        ctx.weight, ctx.padding_idx = weight, padding_idx
        ctx.save_for_backward(places)
        return F.embedding(places, weight)

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        dweight = memory(ctx.weight).zero_()
        dweight.index_add_(0, places.flatten(), grad.reshape(-1, grad.shape[-1]))
        if ctx.padding_idx is not None:
            dweight[ctx.padding_idx] = 0
        return dweight, None, None
