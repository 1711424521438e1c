"""A gradient is written where the last one was, and accumulates as any other."""

import torch

from gradients import memory, release


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, x):
        ctx.parameter, ctx.x = parameter, x
        return parameter * x

    @staticmethod
    def backward(ctx, grad):
        return memory(ctx.parameter).copy_(grad * ctx.x), None


def test_memory_is_used_again_and_gradients_add_up():
    parameter = torch.nn.Parameter(torch.ones(1000))
    places = []
    for step in range(4):
        for x in (2.0, 3.0, 4.0):
            Times.apply(parameter, x + step).sum().backward()
        assert torch.equal(parameter.grad, torch.full((1000,), 9.0 + 3 * step))
        places.append(parameter.grad.data_ptr())
        release([parameter])
        assert parameter.grad is None
    assert len(set(places)) == 1


def test_control_without_release_the_memory_is_not_used_again():
    parameter = torch.nn.Parameter(torch.ones(1000))
    Times.apply(parameter, 2.0).sum().backward()
    first, parameter.grad = parameter.grad, None
    Times.apply(parameter, 3.0).sum().backward()
    assert first.data_ptr() != parameter.grad.data_ptr() and first[0] == 2.0


def test_other_gradients_are_dropped():
    parameter = torch.nn.Parameter(torch.ones(3))
    (parameter * 2).sum().backward()
    release([parameter])
    assert parameter.grad is None and not hasattr(parameter, "spare")
