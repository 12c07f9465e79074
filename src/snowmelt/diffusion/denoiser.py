"""The denoiser: a backbone F and one row of coefficients make the estimate of the clean image.

    x0 = c_skip(l) x + c_out(l) F(c_in(l) x, time(l), cond)

What a network "predicts" is a row of this table and nothing else. The target of F follows by solving for it:
F* = (x0 - c_skip x) / c_out, which is the noise for "noise", alpha noise - sigma x0 for "v", noise - x0 for "velocity".
Beside c_in x the backbone may be shown a first estimate of x0, in channels of its own.
(Karras et al. 2022, arXiv:2206.00364, table 1; Salimans & Ho 2022, arXiv:2202.00512, for v.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from snowmelt.diffusion.linear import LinearEstimate
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.diffusion.schedules import ddpm_time
from snowmelt.errors import choose
from snowmelt.shapes import Answers, Features, Images, Labels

Denoise: TypeAlias = Callable[[Images, Tensor], Images]
"""(x, log_snr) -> x0: a denoiser with its conditioning bound."""


class Coefficients(NamedTuple):
    """One row of the table at one level; each broadcasts over images."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor


def _noise(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    return Coefficients(torch.ones_like(alpha), 1 / alpha, -sigma / alpha)


def _image(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    return Coefficients(torch.ones_like(alpha), torch.zeros_like(alpha), torch.ones_like(alpha))


def _v(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    return Coefficients(torch.ones_like(alpha), alpha, -sigma)


def _velocity(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    return Coefficients(torch.ones_like(alpha), 1 / (alpha + sigma), -sigma / (alpha + sigma))


def _edm(alpha: Tensor, sigma: Tensor, data_std: float) -> Coefficients:
    scale = (sigma**2 + (alpha * data_std) ** 2).sqrt()
    return Coefficients(1 / scale, alpha * data_std**2 / scale**2, sigma * data_std / scale)


PREDICTS: dict[str, Callable[[Tensor, Tensor, float], Coefficients]] = {
    "noise": _noise,
    "image": _image,
    "v": _v,
    "velocity": _velocity,
    "edm": _edm,
}


class Denoiser(nn.Module):
    """Estimates the clean image in a noisy one.

    Args:
        backbone: `net(x, time, cond)`, an x-shaped function, or one with twice the channels: the others then say how
            sure it is (see `share`).
        first: (x, log_snr, cond) -> an estimate of x0 that the backbone is shown after x, where there is one.
        censored: whether estimates are cut off at the ends of [-1, 1], which in training stand for all beyond them
            (`loss.censored`).
        predicts: a name of `PREDICTS`.
        data_std: standard deviation of the training images in [-1, 1] units; only the "edm" row reads it.
        time_of: log_snr -> the number the backbone is told; the equivalent DDPM step, 0..999.
    """

    def __init__(
        self,
        backbone: nn.Module,
        predicts: str,
        data_std: float = 0.5,
        *,
        first: LinearEstimate | None = None,
        censored: bool = False,
        time_of: Callable[[Tensor], Tensor] = ddpm_time,
    ) -> None:
        super().__init__()
        self.backbone, self.first = backbone, first
        self.row = choose(PREDICTS, predicts, "prediction")
        self.censored, self.data_std, self.time_of = censored, data_std, time_of

    def coefficients(self, log_snr: Tensor, like: Images) -> Coefficients:
        """The row at `log_snr`, shaped to multiply `like`."""
        return self.row(*alpha_sigma(log_snr, like), self.data_std)

    def answer(self, x: Images, log_snr: Tensor, cond: Labels | None = None, told: Features | None = None) -> Answers:
        """All that the backbone says about `x`; where images were changed it is told how."""
        time = self.time_of(log_snr.float()).expand(x.shape[0])
        changed = () if told is None else (told,)
        shown = self.coefficients(log_snr, x).c_in * x
        if self.first is not None:
            # As much of it as there is noise: where there is little it says less than x itself.
            _, sigma = alpha_sigma(log_snr, x)
            shown = torch.cat([shown, (sigma**2 * self.first(x, log_snr, cond)).to(shown.dtype)], dim=1)
        return self.backbone(shown, time, cond, *changed).to(x.dtype)

    def network(self, x: Images, log_snr: Tensor, cond: Labels | None = None) -> Images:
        """F: the x-shaped part of it, before the row turns it into an image."""
        return self.answer(x, log_snr, cond)[:, : x.shape[1]]

    def image(self, x: Images, log_snr: Tensor, answer: Answers) -> Images:
        """x0 from an answer."""
        _, c_skip, c_out = self.coefficients(log_snr, x)
        x0 = c_skip * x + c_out * answer[:, : x.shape[1]]
        return x0.clamp(-1, 1) if self.censored else x0

    def forward(self, x: Images, log_snr: Tensor, cond: Labels | None = None) -> Images:
        """x0: the expected clean image, given `x` at `log_snr` (one level, or one for each image)."""
        return self.image(x, log_snr, self.answer(x, log_snr, cond))


def beginning_with(mean: Images, denoise: Denoise) -> Denoise:
    """`denoise` for one walk, but that its first answer is the mean of the pictures.

    A walk begins with nothing but noise, which says nothing of the picture: the mean is all that can be expected, and
    the network need not be asked for it. (The analytical first step of Dockhorn et al. 2022, arXiv:2210.05475, whose
    mean is 0.)
    """
    first = iter([mean])

    def answer(x: Images, log_snr: Tensor) -> Images:
        known = next(first, None)
        return denoise(x, log_snr) if known is None else known.to(x).expand_as(x)

    return answer


def share(x: Images, answer: Answers) -> Images:
    """How far the variance of a step is from its smaller bound to its larger one, for each pixel: in [0, 1], or beyond.

    Of the second half of the channels of a backbone that learns variances; it says -1 for the smaller bound, 1 for the
    larger. Nothing stops it there in training, where a limit would leave it no way back.
    """
    return answer[:, x.shape[1] :] / 2 + 0.5
