"""The optimizer of a module's weights: Muon for matrices and kernels, AdamW for everything else; or AdamW for all.

Muon replaces the momentum of a matrix by the nearest orthogonal one: no direction of the weights is left behind.
On MNIST (28 px, 40,000 images seen, one seed each) the held-out loss was 0.342 with it and 0.353 with AdamW, at the
same speed. The share of digits that a classifier was sure of, 92.5 % and 91.3 % of 400, is too few to tell them apart.
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Loshchilov & Hutter 2017, arXiv:1711.05101.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from snowmelt.config import TrainingConfig
from snowmelt.device import is_gpu
from snowmelt.errors import UserError, choose
from snowmelt.models.muon import MOMENTUM, Muon
from snowmelt.recording import Replayed

LEAST = 16
"""A matrix with fewer rows or columns (the layers next to the pixels) is left to AdamW."""


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of inner linear and convolutional layers, by name."""
    inner = {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    weights = {name: p for name, p in module.named_parameters() if name.removesuffix(".weight") in inner}
    return {name: weight for name, weight in weights.items() if min(weight.flatten(1).shape) >= LEAST}


def matrix_of(kernel: Tensor, like: Tensor) -> Tensor:
    """(rows, columns) of a kernel, its columns in the order in which those of `like` lie in memory.

    Another order of the columns changes nothing about the nearest orthogonal matrix but the order of its columns.
    """
    last = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return (kernel.permute(0, 2, 3, 1) if last else kernel).flatten(1)


OPTIMIZERS: dict[str, Callable[[nn.Module], dict[str, nn.Parameter]]] = {
    "muon": _matrices,
    "adamw": lambda _module: {},
}
"""By name: which weights of a module go to Muon."""


class Optimizer:
    """Updates the weights of a module, and gives its own state as tensors named after them.

    Args:
        dtype: of Muon's products, where the device leaves a choice.
        betas: of AdamW.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        *,
        dtype: torch.dtype = torch.float32,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        self.module, self.clip = module, config.clip
        self.sources = choose(OPTIMIZERS, config.optimizer, "optimizer")(module)
        # Muon takes matrices only: it is given views of the kernels that share their memory.
        flat = {name: nn.Parameter(matrix_of(weight.data, weight)) for name, weight in self.sources.items()}
        assert all(flat[name].data_ptr() == weight.data_ptr() for name, weight in self.sources.items())
        rest = {name: weight for name, weight in module.named_parameters() if name not in flat}
        self.updated = {**flat, **rest}
        decay = config.weight_decay
        groups = [
            {"params": [weight for weight in rest.values() if weight.ndim > 1], "weight_decay": decay},
            {"params": [weight for weight in rest.values() if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        # Fused, because it is the fastest on every device.
        gpu = is_gpu(next(iter(self.updated.values())).device)
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=betas, fused=True, capturable=gpu)]
        if flat:
            self.parts.append(Muon(flat.values(), weight_decay=decay, dtype=dtype))
        self.replayed: Replayed | None = None
        """`_step_unseen`, which a GPU records; a new one as soon as momenta lie elsewhere."""

    def step(self, learning_rate: float) -> bool:
        """Clip the gradients and step; if their norm is not finite leave every weight as it is and return False."""
        return step_together([self], learning_rate)

    def step_unseen(self, learning_rate: float, loss: Tensor) -> Tensor:
        """The same, without waiting for the device: it finds out itself whether `loss` and gradients are finite."""
        gradients = [weight.grad for weight in self.module.parameters() if weight.grad is not None]
        self.replayed = self.replayed or Replayed(self._step_unseen)
        finite = self.replayed(torch.full_like(loss, learning_rate), loss.detach(), *gradients)
        self.module.zero_grad(set_to_none=True)
        return finite

    def _step_unseen(self, learning_rate: Tensor, loss: Tensor, *gradients: Tensor) -> Tensor:
        moved = [weight for weight in self.module.parameters() if weight.grad is not None]
        for weight, gradient in zip(moved, gradients, strict=True):
            weight.grad = gradient
        norm = self._norm()
        self._clip(norm)
        finite = torch.isfinite(norm + loss)
        self.move(learning_rate, found_inf=(~finite).float())
        return finite

    def _norm(self) -> Tensor:
        gradients = [weight.grad for weight in self.module.parameters() if weight.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _clip(self, norm: Tensor) -> None:
        nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip, norm)

    def clip_gradients(self) -> bool:
        """Clip the gradients; whether their norm is finite."""
        norm = self._norm()
        # A processor need not multiply by 1; a device would be waited for once more.
        if norm.device.type != "cpu" or norm > self.clip:
            self._clip(norm)
        return bool(torch.isfinite(norm))

    def move(self, learning_rate: float | Tensor, *, found_inf: Tensor | None = None) -> None:
        """Update the weights by the gradients as they are.

        Args:
            found_inf: on the device, 1 to change nothing.
        """
        for name, source in self.sources.items():
            self.updated[name].grad = None if source.grad is None else matrix_of(source.grad, source)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            # The name by which torch's fused optimizers, and our Muon, are told.
            part.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state of every weight, as `<weight>/<quantity>`."""
        return {
            f"{name}/{quantity}": value
            for name, weight in self.updated.items()
            for part in self.parts
            for quantity, value in part.state.get(weight, {}).items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave.

        Raises:
            UserError: they are another optimizer's, because the run's config.toml was altered.
        """
        homes = {weight: part for part in self.parts for group in part.param_groups for weight in group["params"]}
        self.replayed = None
        for part in self.parts:
            part.state.clear()
        for key, value in tensors.items():
            name, quantity = key.rsplit("/", 1)
            weight = self.updated.get(name)
            if weight is None or isinstance(homes[weight], Muon) != (quantity == MOMENTUM):
                raise UserError(
                    "The checkpoint is of another optimizer than the run's config.toml names; put config.toml back as "
                    "it was."
                )
            # Momenta lie in memory as their weights do: fused steps walk through both alike.
            like = weight.detach() if value.shape == weight.shape else value
            kept = torch.empty_like(like, device=weight.device, dtype=value.dtype)
            homes[weight].state.setdefault(weight, {})[quantity] = kept.copy_(value)


def step_together(optimizers: Iterable[Optimizer], learning_rate: float) -> bool:
    """Step all or, if the gradients of any are not finite, none; in the end there are no gradients."""
    chosen = list(optimizers)
    finite = all(optimizer.clip_gradients() for optimizer in chosen)
    for optimizer in chosen:
        if finite:
            optimizer.move(learning_rate)
        optimizer.module.zero_grad(set_to_none=True)
    return finite


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
