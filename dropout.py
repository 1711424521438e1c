"""Dropout masks that cost little to draw."""

import torch
from torch import Tensor, nn

STEPS = 1 << 16  # a probability is a multiple of 1 / 65,536: 16 random bits decide over one value


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zero with probability `p`, else the factor that keeps the mean at 1, by torch's generator.

    On a CPU bernoulli_ takes most of a dropout's time, as it draws a number for each value. Here a
    number of 64 bits serves four.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device).bernoulli_(1 - p).div_(1 - p)
    dropped = round(p * STEPS)
    bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    values = bits.view(torch.int16)[: shape.numel()].view(shape)
    mask = torch.ge(values, dropped - STEPS // 2, out=torch.empty(shape, dtype=dtype))
    return mask.mul_(STEPS / (STEPS - dropped))


class Dropout(nn.Dropout):
    """nn.Dropout with cheap masks on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """`x`, in training with values dropped and the others scaled."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        return x * keep_mask(x.shape, self.p, x.dtype, x.device)
