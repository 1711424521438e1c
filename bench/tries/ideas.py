"""What is said to raise the scores of fine-tuned encoders, each as a change to one training.

Shapes: B texts of a micro-batch, K classes.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trials import Idea

import train
from model import redraw


class NewTopLayer(Idea):
    """The encoder's last layer begins anew (Zhang et al. 2021, arXiv:2006.05987)."""

    def begin(self, job) -> None:
        torch.manual_seed(job.cfg.run.seed)
        layer = job.model.base_model.encoder.layer[-1]
        layer.apply(redraw(job.model.config.initializer_range))
        for module in layer.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()


class RDrop(Idea):
    """Two forwards under other dropout masks are to agree (Liang et al. 2021, arXiv:2106.14448)."""

    alpha = 1.0

    def backward(self, model, micro_batches, n: int, step: int, job, world) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == torch.bfloat16):
            for i, batch in enumerate(micro_batches):
                torch.manual_seed(train.dropout_seed(job.cfg.run.seed, step, 0, i))
                logits = [model(**batch.inputs).logits for _ in range(2)]
                parts = [train.step_loss(z, batch.labels, batch.weights, n) for z in logits]
                (sum(parts) / 2 + self.alpha * divergence(*logits) / n).backward()


def divergence(one: Tensor, two: Tensor) -> Tensor:
    """The mean of both Kullback-Leibler divergences, summed over the texts; logits (B, K)."""
    a, b = (F.log_softmax(z.float(), dim=1) for z in (one, two))
    forth = F.kl_div(a, b, reduction="sum", log_target=True)
    return (forth + F.kl_div(b, a, reduction="sum", log_target=True)) / 2


class AdversarialNoise(Idea):
    """A second gradient where the token embeddings are moved against the model.

    Miyato et al. 2017 (arXiv:1605.07725), with the table moved as a whole, as it is often written.
    """

    size = 0.5

    def backward(self, model, micro_batches, n: int, step: int, job, world) -> None:
        super().backward(model, micro_batches, n, step, job, world)
        table = model.get_input_embeddings().weight
        moved = table.grad * (self.size / (table.grad.norm() + 1e-12))
        with torch.no_grad():
            table.add_(moved)
        super().backward(model, micro_batches, n, step, job, world)
        with torch.no_grad():
            table.sub_(moved)


class Averaging(Idea):
    """What is scored is a running mean of the weights, with the horizon of half an epoch or so."""

    decay = 0.98

    def begin(self, job) -> None:
        self.mean = [p.detach().clone() for p in job.model.parameters()]

    def after(self, model, step: int, total_steps: int) -> None:
        with torch.no_grad():
            for mean, p in zip(self.mean, model.parameters(), strict=True):
                mean.lerp_(p, 1 - min(self.decay, step / (step + 9)))

    @contextlib.contextmanager
    def scored(self, model) -> Iterator[None]:
        kept = [p.detach().clone() for p in model.parameters()]
        self._put(model, self.mean)
        yield
        self._put(model, kept)

    @staticmethod
    def _put(model, values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(model.parameters(), values, strict=True):
                p.copy_(value)
