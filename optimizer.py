"""AdamW: its groups, its rate at each step, its clipped and guarded update, its state by name."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from config import OptimizerConfig
from gradients import release
from schedule import StepPlan, lr_factor
from vocabulary import ActiveEmbedding

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def make_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW with zero moments; each group remembers its `peak_lr`."""
    groups = parameter_groups(model, cfg)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    create_state(optimizer)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, ActiveEmbedding):
        embedding.follow(optimizer)
    return optimizer


def parameter_groups(model: nn.Module, cfg: OptimizerConfig) -> list[dict[str, object]]:
    """AdamW groups, each with `params`, `lr` (its peak, also `peak_lr`) and `weight_decay`.

    Biases and normalisation weights, all one-dimensional, are not decayed (Devlin et al. 2019,
    arXiv:1810.04805). A group's rate is lr * layer_decay ** depth below the head; the head has
    depth 0, the top layer 1, the embeddings most (Clark et al. 2020, arXiv:2003.10555).
    """
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    depths = layer_depths(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((depths[name], parameter.ndim > 1), []).append(parameter)
    made = []
    for (depth, is_decayed), parameters in groups.items():
        lr = cfg.lr * cfg.layer_decay**depth
        decay = cfg.weight_decay if is_decayed else 0.0
        made.append({"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return made


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Parameter name -> layers below the head, from 1 for the top layer; 0 in the head."""
    prefix = model.base_model_prefix + "."
    number = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
    places = {name: number.search(name) for name, _ in model.named_parameters()}
    layers = 1 + max((int(m[1]) for m in places.values() if m), default=-1)
    depths = {}
    for name, match in places.items():
        if not name.startswith(prefix):
            depths[name] = 0
        elif match:
            depths[name] = layers - int(match[1])
        else:
            depths[name] = layers + 1 if "embed" in name else 1
    return depths


def set_lr(optimizer: torch.optim.AdamW, step: int, steps: StepPlan, min_lr_ratio: float) -> float:
    """Set every group's learning rate for `step`; returns the head's."""
    factor = lr_factor(
        step,
        warmup_steps=steps.warmup_steps,
        total_steps=steps.total_steps,
        min_lr_ratio=min_lr_ratio,
    )
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.defaults["lr"] * factor


def update(optimizer: torch.optim.AdamW, max_grad_norm: float | None) -> tuple[Tensor, Tensor]:
    """Clip by the global norm and step; (norm, 1.0 if the update was skipped), both on the device.

    The norm of the reduced gradient is the same on every rank, so it is also their agreement on
    non-finite values; AdamW skips on `found_inf` without the host reading it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(grads)
    skipped = (~torch.isfinite(norm)).float()
    if max_grad_norm is not None:  # AdamW divides by it as it reads the gradient
        optimizer.grad_scale = torch.clamp((norm + 1e-6) / max_grad_norm, min=1.0)
    optimizer.found_inf = skipped
    optimizer.step()
    torch.autograd.graph.increment_version(parameters)  # which fused AdamW does not do
    release(parameters)
    return norm, skipped


def global_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients together; on a CPU by rows, which is twice as fast."""
    if grads[0].device.type == "cpu":
        grads = [torch.linalg.vector_norm(g, dim=-1) for g in grads]
    return torch.nn.utils.get_total_norm(grads)


def create_state(optimizer: torch.optim.AdamW) -> None:
    """Zero moments for every parameter, as AdamW's first step would make them."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }


def state_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of AdamW's state with its name, in the model's order."""
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            if parameter in optimizer.state:
                yield f"{moment}.{name}", optimizer.state[parameter][moment]
