"""Gradients on a CPU, written where the last step's were: fresh memory costs more than writing.

Linux hands out memory page by page at the first write to each, and takes it back when gradients are
dropped. For XLM-R base that costs as much as a third of a step's matrix products (RESULTS.md).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def memory(parameter: nn.Parameter) -> Tensor:
    """A tensor like `parameter` for a backward to fill and return as its gradient."""
    spare, parameter.spare = getattr(parameter, "spare", None), None  # `release` gives it back
    if spare is not None:
        return spare.detach()  # a tensor that nobody else holds is taken by autograd as it is
    return torch.empty_like(parameter)


def release(parameters: Iterable[nn.Parameter]) -> None:
    """Drop the gradients; keep the memory of those that `memory` gave, and of DDP's on CUDA."""
    parameters = list(parameters)
    if torch.distributed.is_initialized() and parameters[0].is_cuda:
        # They are views of DDP's buckets, and new ones would have to be copied there.
        torch._foreach_zero_([p.grad for p in parameters if p.grad is not None])
        return
    for parameter in parameters:
        if hasattr(parameter, "spare"):
            parameter.spare = parameter.grad
        parameter.grad = None
