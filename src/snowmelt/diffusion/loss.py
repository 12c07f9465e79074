"""The one loss: the squared error of the network in its own space, weighted by level.

    loss = mean  w(l) |F(x, l) - F*|^2,      F* = (x0 - c_skip x) / c_out,      |x0_hat - x0|^2 = c_out^2 |F - F*|^2

With `predicts="noise"` and the constant weight this is L_simple of DDPM; with "edm" it is the loss of EDM.
(Ho et al. 2020, equation 14; Hang et al. 2023, arXiv:2303.09556, for min-SNR.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from snowmelt.diffusion.denoiser import Denoiser
from snowmelt.diffusion.noise import add_noise
from snowmelt.shapes import Images, Labels

Weight: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(log_snr, c_out), broadcast alike -> the weight of the network's squared error."""


def constant(log_snr: Tensor, c_out: Tensor) -> Tensor:
    """1: every level counts as the network's own space has it."""
    return torch.ones_like(c_out)


def simple(log_snr: Tensor, c_out: Tensor) -> Tensor:
    """The error of the noise, whatever the network predicts: SNR times the error of the image (DDPM's L_simple)."""
    return log_snr.exp() * c_out**2


def min_snr(log_snr: Tensor, c_out: Tensor) -> Tensor:
    """min(SNR, 5) times the error of the image."""
    return log_snr.exp().clamp(max=5) * c_out**2


WEIGHTS: dict[str, Weight] = {"constant": constant, "simple": simple, "min_snr": min_snr}


def denoising_loss(
    denoiser: Denoiser, x0: Images, log_snr: Tensor, noise: Images, *, cond: Labels | None = None, weight: Weight
) -> Tensor:
    """The mean weighted error over a batch: a scalar, float32.

    Args:
        x0: clean images in [-1, 1].
        log_snr: (batch,) the level of each.
        noise: standard normal, as `x0`.
    """
    x = add_noise(x0, noise, log_snr)
    _, c_skip, c_out = denoiser.coefficients(log_snr, x)
    error = denoiser.network(x, log_snr, cond) - (x0 - c_skip * x) / c_out
    return (weight(log_snr.reshape(c_out.shape), c_out) * error**2).mean()
