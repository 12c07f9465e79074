"""The one loss: the squared error of the network in its own space, weighted by level.

    loss = mean  w |F(x, l) - F*|^2,      F* = (x0 - c_skip x) / c_out,      |x0_hat - x0|^2 = c_out^2 |F - F*|^2

With `predicts="noise"` and the constant weight this is L_simple of DDPM; with "edm" it is the loss of EDM. The error
of the noise is SNR times the error of the image, SNR c_out^2 |F - F*|^2. In a censored run there is no error where a
pixel is at an end of [-1, 1] and the estimate beyond it.
(Ho et al. 2020, equation 14; and beside each weight.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from snowmelt.diffusion.denoiser import Denoiser
from snowmelt.diffusion.levels import Drawn
from snowmelt.diffusion.noise import BOUND, add_noise
from snowmelt.diffusion.process import HALF_BIN
from snowmelt.shapes import Answers, Images, Labels, Levels


class Place(NamedTuple):
    """What a weight may depend on; a value for each picture."""

    log_snr: Levels
    density: Levels
    """How often such a level is drawn, per unit of log-SNR."""
    c_out: Levels
    data_std: float


Weight: TypeAlias = Callable[[Place], Levels]
"""Place -> the weight of the network's squared error."""


def constant(place: Place) -> Levels:
    """1: every level counts as the network's own space has it."""
    return torch.ones_like(place.c_out)


def simple(place: Place) -> Levels:
    """The error of the noise, whatever the network predicts (DDPM's L_simple)."""
    return place.log_snr.exp() * place.c_out**2


def bound(place: Place) -> Levels:
    """The variational bound: the error of the noise, every unit of log-SNR alike (Kingma et al. 2021, equation 17).

    Divided by the span of the levels, so that it has the size of the other losses.
    """
    return simple(place) / (2 * BOUND * place.density)


def min_snr(place: Place) -> Levels:
    """min(SNR, 5) times the error of the image (Hang et al. 2023, arXiv:2303.09556)."""
    return place.log_snr.exp().clamp(max=5) * place.c_out**2


def edm(place: Place) -> Levels:
    """1 / data_std^2 + SNR, times the error of the image: constant for predicts="edm" (Karras et al. 2022)."""
    return (place.data_std**-2 + place.log_snr.exp()) * place.c_out**2


def sigmoid(place: Place, bias: float = 2.0) -> Levels:
    """The bound times sigmoid(2 - l): less where the picture is clean (Kingma & Gao 2023, arXiv:2303.00848)."""
    return bound(place) * torch.sigmoid(bias - place.log_snr)


def p2(place: Place) -> Levels:
    """The error of the noise over 1 + SNR: less where the picture is clean (Choi et al. 2022, arXiv:2204.00227)."""
    return simple(place) * torch.sigmoid(-place.log_snr)


def learned(place: Place) -> Levels:
    """Constant; but the model learns how large the loss usually is at each level, and divides by that."""
    return constant(place)


WEIGHTS: dict[str, Weight] = {
    "constant": constant,
    "simple": simple,
    "bound": bound,
    "min_snr": min_snr,
    "edm": edm,
    "sigmoid": sigmoid,
    "p2": p2,
    "learned": learned,
}


def censored(error: Images, x0: Images) -> Images:
    """The error x0_hat - x0, but 0 where `x0` is at an end of [-1, 1] and x0_hat beyond it.

    The end stands for all that is as dark or as bright: for squared errors what the outermost bins of
    `process.data_term` are for likelihoods, and what Tobin 1958 does with data that a limit cuts off. The best estimate
    of a pixel that may also lie inside is still its mean. Of one that is at the end for certain any estimate beyond is
    right, so that the network need not hit the end to draw it.
    """
    return error.masked_fill((x0.abs() > 1 - HALF_BIN) & (error * x0 > 0), 0)


def denoising_losses(
    denoiser: Denoiser, x0: Images, drawn: Drawn, x: Images, answer: Answers, *, weight: Weight
) -> Levels:
    """(batch,) the mean weighted error of each picture; `drawn.correction` is left to whoever takes their mean.

    Args:
        x0: clean images in [-1, 1].
        drawn: the level of each.
        x: the noisy images at those levels.
        answer: what `denoiser.answer` said of them.
    """
    _, c_skip, c_out = denoiser.coefficients(drawn.log_snr, x)
    error = answer[:, : x.shape[1]] - (x0 - c_skip * x) / c_out
    if denoiser.censored:
        error = censored(c_out * error, x0) / c_out
    place = Place(drawn.log_snr, drawn.density, c_out.flatten(), denoiser.data_std)
    return weight(place) * (error**2).flatten(1).mean(1)


def denoising_loss(
    denoiser: Denoiser, x0: Images, log_snr: Levels, noise: Images, *, cond: Labels | None = None, weight: Weight
) -> Tensor:
    """The mean of `denoising_losses` at levels given by hand, drawn evenly in log-SNR: a scalar."""
    even = torch.ones_like(log_snr)
    x = add_noise(x0, noise, log_snr)
    answer = denoiser.answer(x, log_snr, cond)
    drawn = Drawn(log_snr, even / (2 * BOUND), even, even)
    return denoising_losses(denoiser, x0, drawn, x, answer, weight=weight).mean()
