"""The variance of a reverse step p(x_m | x_l), from level l to the cleaner m: what is left of the choice in DDPM.

    c = 1 - exp(l - m)
    forward    sigma_l^2 c                                beta_t, right when the data are pure noise
    posterior  sigma_m^2 c                                beta_tilde_t, right when the data are one picture
    analytic   posterior + (alpha_m c)^2 Var(x0 | x_l)    the best for a given denoiser
    learned    forward^v posterior^(1 - v)                v from the network, for each pixel

(Ho et al. 2020, section 3.2; Bao et al. 2022, "Analytic-DPM", arXiv:2201.06503; Nichol & Dhariwal 2021,
arXiv:2102.09672, equation 15.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.noise import add_noise, alpha_sigma, fresh_share, shaped
from snowmelt.diffusion.schedules import interpolate
from snowmelt.shapes import Grid, Images

Variance: TypeAlias = Callable[[Images, Tensor, Tensor], Tensor]
"""(x, log_snr, following) -> the variance of the step from `log_snr` to the cleaner `following`, broadcast over x."""


def forward(x: Images, log_snr: Tensor, following: Tensor) -> Tensor:
    """beta_t = 1 - alpha_l^2 / alpha_m^2, the larger bound."""
    return alpha_sigma(log_snr, x)[1] ** 2 * shaped(fresh_share(log_snr, following), x)


def posterior(x: Images, log_snr: Tensor, following: Tensor) -> Tensor:
    """beta_tilde_t, the variance of q(x_m | x_l, x0), the smaller bound."""
    return alpha_sigma(following, x)[1] ** 2 * shaped(fresh_share(log_snr, following), x)


VARIANCES: dict[str, Variance] = {"posterior": posterior, "forward": forward}
"""Those that need neither pictures nor a network that was taught to say more."""


def noise_power(denoise: Denoise, x0: Images, log_snrs: Grid, noise_source: Callable[[int], Images]) -> list[float]:
    """E |noise_hat|^2 per pixel at every level of `log_snrs`, over the pictures `x0`: Gamma of Analytic-DPM.

    A network that knew the noise would have 1; what is missing is what it cannot know. One evaluation a level;
    `noise_source` is asked by the number of the level.
    """
    powers: list[float] = []
    for index, level in enumerate(log_snrs):
        log_snr = level.to(x0.device, x0.dtype)
        alpha, sigma = alpha_sigma(log_snr, x0)
        x = add_noise(x0, noise_source(index), log_snr)
        powers.append((((x - alpha * denoise(x, log_snr)) / sigma) ** 2).mean().item())
    return powers


def analytic(log_snrs: Grid, powers: list[float]) -> Variance:
    """The variance that is best for the denoiser whose `noise_power` at `log_snrs` (rising) is `powers`."""
    known = torch.tensor(powers, dtype=torch.float64)
    levels = log_snrs.to("cpu", torch.float64)

    def variance(x: Images, log_snr: Tensor, following: Tensor) -> Tensor:
        power = interpolate(log_snr.to("cpu", torch.float64).reshape(-1), levels, known).clamp(0, 1)
        alpha_next, _ = alpha_sigma(following, x)
        # Var(x0 | x) = (sigma / alpha)^2 (1 - power); in data of +-1 it is at most 1 (their second theorem).
        unknown = (torch.exp(-log_snr) * (1 - power.reshape(log_snr.shape).to(log_snr))).clamp(max=1.0)
        reach = alpha_next * shaped(fresh_share(log_snr, following), x)
        return posterior(x, log_snr, following) + reach**2 * shaped(unknown, x)

    return variance


def interpolated(share: Images, x: Images, log_snr: Tensor, following: Tensor) -> Tensor:
    """Between the two bounds, geometrically: forward^share posterior^(1 - share), for `share` in [0, 1]."""
    low, high = posterior(x, log_snr, following), forward(x, log_snr, following)
    return torch.exp(share * high.log() + (1 - share) * low.log())
