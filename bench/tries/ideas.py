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
        redraw(layer, job.model.config.initializer_range)
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
    """Running means of the weights are scored beside the weights, which train on as they do.

    Of horizons of some steps (Tarvainen and Valpola 2017, arXiv:1703.01780), and of all steps since
    the first third (Izmailov et al. 2018, arXiv:1803.05407).
    """

    horizons = (20, 50, 100)  # steps

    def begin(self, job) -> None:
        names = [f"-mean-of-{n}" for n in self.horizons] + ["-mean-of-most"]
        self.means = {name: [p.detach().clone() for p in job.model.parameters()] for name in names}

    def after(self, model, step: int, total_steps: int) -> None:
        since = max(0, step - total_steps // 3)
        shares = [1 / min(n, step) for n in self.horizons] + [1 / max(1, since)]
        with torch.no_grad():
            for share, mean in zip(shares, self.means.values(), strict=True):
                torch._foreach_lerp_(mean, list(model.parameters()), share)

    def others(self, model) -> dict[str, contextlib.AbstractContextManager]:
        return {name: self._put(model, mean) for name, mean in self.means.items()}

    @contextlib.contextmanager
    def _put(self, model, values: list[Tensor]) -> Iterator[None]:
        kept = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), values)
            yield
            torch._foreach_copy_(list(model.parameters()), kept)
