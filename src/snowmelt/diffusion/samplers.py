"""Samplers: generators that walk a grid of levels from noise to picture.

    noise_hat = (x - alpha_l x0) / sigma_l
    x' = alpha_m x0 + sigma_m (sqrt(1 - eta^2 c) noise_hat + eta sqrt(c) fresh),     c = 1 - exp(l - m)

One formula for a step from level l to the cleaner m: eta = 1 draws from DDPM's posterior q(x_m | x_l, x0), eta = 0
is DDIM. A sampler yields every step, so that progress, previews, trajectories and stopping early need no parameter.
(Ho et al. 2020; Song et al. 2020, arXiv:2010.02502, equation 12.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import torch

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.shapes import Grid, Images, Level

NoiseSource: TypeAlias = Callable[[int], Images]
"""step -> standard normal noise for the whole batch."""


class Step(NamedTuple):
    """One moment of sampling: the noisy image, its level, and what the clean image is believed to be.

    The `x0` of the last step is the result.
    """

    x: Images
    log_snr: Level
    x0: Images


Sampler: TypeAlias = Callable[[Denoise, Images, Grid, NoiseSource], Iterator[Step]]


def ancestral(
    denoise: Denoise, x: Images, log_snrs: Grid, noise_source: NoiseSource, *, eta: float = 1.0
) -> Iterator[Step]:
    """Walk `log_snrs` from noise to picture; one evaluation of `denoise` for each level.

    Args:
        x: the noisy images at the first level.
        log_snrs: rising levels, one at least.
        noise_source: asked for fresh noise by the number of the step, 1 for the first; not asked when eta is 0.
        eta: 0 (DDIM, no fresh noise) to 1 (DDPM).
    """
    # Levels stay on the CPU in double precision: differences of neighbours are small, and not every device has doubles.
    levels = log_snrs.to("cpu", torch.float64)
    for index, level in enumerate(levels):
        x0 = denoise(x, level.to(x.device, x.dtype))
        yield Step(x, level, x0)
        if index + 1 < len(levels):
            following = levels[index + 1]
            alpha, sigma = alpha_sigma(level, x)
            alpha_next, sigma_next = alpha_sigma(following, x)
            fresh_share = -torch.expm1(level - following) * eta**2
            noise = (1 - fresh_share).sqrt() * ((x - alpha * x0) / sigma)
            if eta:
                noise = noise + fresh_share.sqrt() * noise_source(index + 1)
            x = alpha_next * x0 + sigma_next * noise


SAMPLERS: dict[str, Sampler] = {"ddpm": partial(ancestral, eta=1.0), "ddim": partial(ancestral, eta=0.0)}
