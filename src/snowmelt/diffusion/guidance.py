"""Guidance: functions from denoise functions to denoise functions.

    classifier-free, autoguidance   x0 = x0_without + scale (x0_with - x0_without),    scale 1 = none, 0 = without
    rescaled                        the standard deviation of each guided x0 brought back towards the unguided one
    projected (APG)                 x0 = x0_with + (scale - 1) (what of the difference does not point along x0_with)
    classifier                      x0 + scale sigma^2 / alpha d log p(y | x) / dx
    thresholds                      x0 kept in [-1, 1], where pictures are

Samplers do not notice any of it, and whatever is a `Denoise` may be guided again.
(Ho & Salimans 2022, arXiv:2207.12598, whose weight w is scale - 1; Karras et al. 2024, arXiv:2406.02507, autoguidance;
Kynkaanniemi et al. 2024, arXiv:2404.07724, intervals; Lin et al. 2023, arXiv:2305.08891, section 3.4, rescaling;
Sadat et al. 2024, arXiv:2410.02416, APG; Dhariwal & Nichol 2021, arXiv:2105.05233, classifiers; Saharia et al. 2022,
arXiv:2205.11487, dynamic thresholds.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.shapes import Images, Levels

LogProb: TypeAlias = Callable[[Images, Tensor], Levels]
"""(x, log_snr) -> log p(y | x) for each image of the batch: a classifier of noisy images with its classes bound."""


# towards and away


def classifier_free(with_class: Denoise, without_class: Denoise, scale: float) -> Denoise:
    """Push the estimate away from the one made without the class; scales of 1 and 0 cost one evaluation, not two."""
    if scale in (0, 1):
        return with_class if scale else without_class

    def denoise(x: Images, log_snr: Tensor) -> Images:
        return without_class(x, log_snr).lerp(with_class(x, log_snr), scale)

    return denoise


def autoguided(denoise: Denoise, weak: Denoise, scale: float) -> Denoise:
    """Push the estimate away from that of a worse model of the same data, such as an earlier checkpoint.

    Needs no classes; where there are some, both know the same one. It is `classifier_free` with another second.
    """
    return classifier_free(denoise, weak, scale)


def projected(
    with_class: Denoise,
    without_class: Denoise,
    scale: float,
    *,
    parallel: float = 0.0,
    norm: float = 0.2,
    momentum: float = -0.5,
) -> Denoise:
    """APG: classifier-free guidance without the part that only adds contrast, so that high scales do not burn.

    Args:
        parallel: how much is kept of the part of the difference that points along the estimate; their eta.
        norm: the difference is cut to this root mean square per value of an image, in [-1, 1] units. (Theirs, r, is a
            length, which grows with the size of the image.)
        momentum: share of the earlier differences that is added; below 0 what repeats itself is weakened; their beta.

    With 1, infinity and 0 it is `classifier_free`, as with a scale of 0 always. The momentum remembers the walk: it
    starts anew where the level falls, and a level asked about twice counts once. So make one for each walk that does
    not begin in noise.
    """
    if scale in (0, 1):
        return classifier_free(with_class, without_class, scale)
    remembered = _Momentum(momentum)

    def denoise(x: Images, log_snr: Tensor) -> Images:
        x0 = with_class(x, log_snr)
        push = x0 - without_class(x, log_snr)
        if momentum:
            push = remembered(push, float(log_snr.max()))
        if math.isfinite(norm):
            push = push * (norm / _rms(push).clamp_min(torch.finfo(x.dtype).tiny)).clamp(max=1.0)
        along = x0 * ((push * x0).mean((1, 2, 3), keepdim=True) / _rms(x0).square().clamp_min(1e-12))
        return x0 + (scale - 1) * (push - (1 - parallel) * along)

    return denoise


class _Momentum:
    """value + momentum * (the same of all earlier levels of this walk)."""

    def __init__(self, momentum: float) -> None:
        self.momentum, self.level = momentum, math.inf
        self.before: Images | None = None
        self.now: Images | None = None

    def __call__(self, value: Images, level: float) -> Images:
        if level != self.level:
            self.before = self.now if level > self.level else None
        self.level = level
        self.now = value if self.before is None else value + self.momentum * self.before
        return self.now


def _rms(images: Images) -> Tensor:
    """Of each image; broadcasts over it."""
    return images.square().mean((1, 2, 3), keepdim=True).sqrt()


# around a guided estimate


def within(guided: Denoise, plain: Denoise, noisiest: float, cleanest: float) -> Denoise:
    """Guide between two log-SNRs only, their own included; elsewhere only `plain` is asked.

    Guidance near pure noise costs variety and near the picture does nothing.
    """

    def denoise(x: Images, log_snr: Tensor) -> Images:
        inside = (log_snr >= noisiest) & (log_snr <= cleanest)
        if inside.all():
            return guided(x, log_snr)
        if not inside.any():
            return plain(x, log_snr)
        return torch.where(inside.reshape(-1, 1, 1, 1), guided(x, log_snr), plain(x, log_snr))

    return denoise


def rescaled(guided: Denoise, plain: Denoise, share: float = 0.7) -> Denoise:
    """Bring the standard deviation of each guided image back to that of the plain one; `share` of the way.

    Here of x0, over all values of an image, which is a picture's contrast (theirs is of what the network predicts).
    `plain` is asked once more; `once` saves that: `rescaled(classifier_free(once_with, without, 4.0), once_with)`.
    """
    if guided is plain or not share:
        return guided

    def denoise(x: Images, log_snr: Tensor) -> Images:
        x0, wanted = guided(x, log_snr), plain(x, log_snr).std((1, 2, 3), keepdim=True)
        factor = wanted / x0.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
        return x0 * (1 - share + share * factor)

    return denoise


def once(denoise: Denoise) -> Denoise:
    """The same; asked about the very same tensors again it answers from memory, without an evaluation."""
    last: list[Tensor] = []

    def remembering(x: Images, log_snr: Tensor) -> Images:
        if not last or last[0] is not x or last[1] is not log_snr:
            last[:] = x, log_snr, denoise(x, log_snr)
        return last[2]

    return remembering


def classifier(denoise: Denoise, log_prob: LogProb, scale: float) -> Denoise:
    """Follow the gradient of a classifier that was trained on noisy images; `scale` 1 is Bayes' rule, 0 is none."""
    if not scale:
        return denoise

    def guided(x: Images, log_snr: Tensor) -> Images:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(leaf, log_snr).sum(), leaf)
        alpha, sigma = alpha_sigma(log_snr, x)
        return denoise(x, log_snr) + scale * sigma**2 / alpha * gradient

    return guided


# thresholds


def clamped(denoise: Denoise) -> Denoise:
    """Keep the estimate of the clean image within [-1, 1], where pictures are."""
    return lambda x, log_snr: denoise(x, log_snr).clamp(-1, 1)


def dynamic(denoise: Denoise, share: float = 0.995) -> Denoise:
    """Bring an image back into [-1, 1] by dividing, when more than 1 - `share` of its values lie outside.

    Each image is cut at the size that `share` of its values do not pass, and divided by it; never by less than 1.
    """

    def denoise_within(x: Images, log_snr: Tensor) -> Images:
        x0 = denoise(x, log_snr)
        sizes = x0.flatten(1).abs()
        rank = max(1, math.ceil(share * sizes.shape[1]))
        limit = sizes.kthvalue(rank, dim=1).values.clamp_min(1.0).reshape(-1, 1, 1, 1)
        return x0.clamp(-limit, limit) / limit

    return denoise_within


def untouched(denoise: Denoise) -> Denoise:
    """`denoise` itself: no threshold."""
    return denoise


# the choices


Guide: TypeAlias = Callable[[Denoise, Denoise, float], Denoise]
"""(with, without, scale) -> guided: the estimate wanted, the one to leave behind, and how far."""

GUIDANCES: dict[str, Guide] = {
    "classifier_free": classifier_free,
    "projected": projected,
}

THRESHOLDS: dict[str, Callable[[Denoise], Denoise]] = {"clamp": clamped, "dynamic": dynamic, "none": untouched}
