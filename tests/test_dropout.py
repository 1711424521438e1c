"""Masks drop the stated share, keep the mean, and depend on the seed alone."""

import pytest
import torch

from dropout import Dropout, keep_mask


def mask(p, seed=0, shape=(1000, 1001)):
    torch.manual_seed(seed)
    return keep_mask(torch.Size(shape), p, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_share_dropped_and_the_mean(p):
    drawn = mask(p)
    kept = drawn > 0
    spread = (p * (1 - p) / drawn.numel()) ** 0.5
    assert abs((~kept).float().mean().item() - p) < 5 * spread + 1 / 65536
    assert drawn[kept].unique().numel() == 1, "one factor"
    assert drawn[kept][0].item() == pytest.approx(1 / (1 - p), rel=2e-4)


def test_columns_rows_and_neighbours_are_independent():
    kept = (mask(0.5) > 0).float() - 0.5
    n = kept.numel() ** 0.5
    assert kept.mean(0).abs().max() < 0.1 and kept.mean(1).abs().max() < 0.1
    for step in (1, 2, 3, 4, 8):
        flat = kept.flatten()
        assert abs((flat[step:] * flat[:-step]).sum().item()) / (n / 4) < 5, step


def test_the_mask_is_a_function_of_the_seed():
    assert torch.equal(mask(0.3, seed=5), mask(0.3, seed=5))
    assert not torch.equal(mask(0.3, seed=5), mask(0.3, seed=6))


def test_the_module_does_nothing_in_evaluation():
    x, module = torch.ones(50, 50), Dropout(0.5)
    assert torch.equal(module.eval()(x), x) and not torch.equal(module.train()(x), x)
