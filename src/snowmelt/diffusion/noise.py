"""Noise levels: one number, the log-SNR l = log(alpha^2 / sigma^2); a high one is clean, a low one is noise.

    alpha(l) = sqrt(sigmoid(l))     sigma(l) = sqrt(sigmoid(-l))     alpha^2 + sigma^2 = 1
    x = alpha x0 + sigma noise

Everything below a schedule speaks this number, so schedules and step grids can be changed after training.
(Kingma et al. 2021, "Variational Diffusion Models", arXiv:2107.00630.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from snowmelt.shapes import Images

BOUND = 10.0
"""Schedules that are formulas stay within +-10 before any shift: the DDPM table runs from 9.2 to -10.1, and float32 is
exact enough up to there."""


def shaped(values: Tensor, like: Tensor) -> Tensor:
    """One number, or one for each image, shaped to multiply `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values


def alpha_sigma(log_snr: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise scale of `log_snr` (one level, or one for each image), shaped to multiply `like`."""
    level = shaped(log_snr, like)
    return torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()


def add_noise(x0: Images, noise: Images, log_snr: Tensor) -> Images:
    """The noisy image x = alpha x0 + sigma noise: a draw of q(x | x0) at the level `log_snr`."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    return alpha * x0 + sigma * noise


def fresh_share(log_snr: Tensor, following: Tensor) -> Tensor:
    """c = 1 - exp(l - m): the share of the noise that a DDPM step from l to the cleaner m draws anew."""
    return -torch.expm1(log_snr - following)


def renoise(x: Images, log_snr: Tensor, noisier: Tensor, noise: Images) -> Images:
    """Noise added: from `x` at `log_snr` a draw of q(x' | x) at the lower level `noisier`."""
    alpha, _ = alpha_sigma(log_snr, x)
    alpha_after, sigma_after = alpha_sigma(noisier, x)
    share = shaped(fresh_share(noisier, log_snr), x)
    return alpha_after / alpha * x + sigma_after * share.sqrt() * noise
