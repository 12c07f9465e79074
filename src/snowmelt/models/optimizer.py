"""An optimizer for a module's weights, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from snowmelt.config import TrainingConfig


def adamw(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and kernels only, fused because it is the fastest on every device."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def optimizer_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], *, learning_rate: float, clip: float
) -> bool:
    """Clip the gradients and step; if their norm is not finite leave every weight as it is and return False."""
    norm = nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
    finite = bool(torch.isfinite(norm))
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


def state_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state of every parameter of `module`, as `<parameter>/<quantity>`."""
    return {
        f"{name}/{quantity}": value
        for name, parameter in module.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, quantity = key.rsplit("/", 1)
        device = parameters[name].device
        optimizer.state.setdefault(parameters[name], {})[quantity] = value.to(device, copy=True)
