"""The running average of the weights, by a power of time: its length is a fixed share of the run so far.

    average_t = average_(t-1) + (1 - beta_t) (weights_t - average_(t-1)),     beta_t = (1 - 1/t)^(gamma + 1)

An exponential average has one length, wrong for most runs; this one suits 500 steps and 500,000 alike. gamma follows
from the wanted relative width sigma_rel: (gamma + 1) = sigma_rel^2 (gamma + 2)^2 (gamma + 3).
(Karras et al. 2023, arXiv:2312.02696, section 3.1.)
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from snowmelt.config import check_average

# torch's fused operations over lists of tensors are its documented building blocks, but bear private names.
_lerp = torch._foreach_lerp_  # pyright: ignore
_copy = torch._foreach_copy_  # pyright: ignore


def power_of(sigma_rel: float) -> float:
    """gamma for the relative width `sigma_rel`, in (0, 0.28).

    >>> round(power_of(0.1), 2), round(power_of(0.05), 2)
    (6.94, 16.97)
    """
    check_average(sigma_rel)
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Average:
    """Averages all weights of a module, in float32."""

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        self.exponent = power_of(sigma_rel) + 1
        self.names = list(module.state_dict())
        self.weights = [weight.detach() for weight in module.state_dict().values()]
        self.tensors = [weight.clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step` (1 for the first)."""
        beta = (1 - 1 / step) ** self.exponent
        _lerp(self.tensors, self.weights, 1 - beta)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Within it the module has its average weights; after it, its own again, bit for bit."""
        own = [weight.clone() for weight in self.weights]
        _copy(self.weights, self.tensors)
        try:
            yield
        finally:
            _copy(self.weights, own)

    def state(self) -> dict[str, Tensor]:
        """The averages by the weights' names; what the module would load."""
        return dict(zip(self.names, self.tensors, strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, tensor in zip(self.names, self.tensors, strict=True):
            tensor.copy_(state[name])
