"""Likelihood: how many bits a model needs for each value of a picture it has not seen, by two roads.

Both begin with z = alpha x0 + sigma noise at the cleanest level and end with the discretized decoder p(x0 | z), a
Gaussian around x0_hat(z) of std sigma / alpha in the bins of the 256 values. Between them they need -log p(z):

    bound   KL(q(x_l | x0) || N(0, I)) + sum of KL(q(x_m | x_l, x0) || p(x_m | x_l)) over the steps l < m of a grid
    ode     -log N(x; 0, I) at the noisiest level + integral of div v dl,    - log q(z | x0) taken off
            v = dx/dl = (alpha x0_hat(x, l) - alpha^2 x) / 2,                the probability-flow ODE in log-SNR

Every answer is an unbiased estimate for each picture, in bits per value ("bits/dim"), so that the mean over pictures
has the standard error std / sqrt(pictures), the chance of noise, steps and probes included. `denoise` must be the
model's own, without a threshold around it. A device with float64 is needed. (Ho et al. 2020, arXiv:2006.11239; Kingma
et al. 2021, "Variational Diffusion Models", arXiv:2107.00630, for the decoder; Song et al. 2020, arXiv:2011.13456,
equation 39, for the ODE.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.noise import add_noise, alpha_sigma, fresh_share, shaped
from snowmelt.diffusion.process import data_term, gaussian_kl
from snowmelt.diffusion.variance import Variance, posterior
from snowmelt.diffusion.walk import NoiseSource
from snowmelt.shapes import Grid, Images, Level, Levels

Trace: TypeAlias = Callable[[Denoise, Images, Level, int], tuple[Images, Levels]]
"""(denoise, x, log_snr, number of the evaluation) -> x0_hat and the trace of its derivative by x, for each image."""


class Terms(NamedTuple):
    """The terms of the bound of each picture, bits/dim."""

    prior: Levels
    steps: Levels
    data: Levels

    @property
    def total(self) -> Levels:
        """At least the bits/dim of the model, on average."""
        return self.prior + self.steps + self.data


def bound(
    denoise: Denoise,
    x0: Images,
    log_snrs: Grid,
    noise_source: NoiseSource,
    *,
    variance: Variance = posterior,
    terms: int | None = None,
) -> Terms:
    """The variational bound of pictures in [-1, 1] whose values are 256 even ones.

    Args:
        log_snrs: rising levels, two at least; n of them are n - 1 steps and the decoder, n evaluations.
        noise_source: asked for 0 (the cleanest level), 1, 2, ... (the terms) and -1, -2, ... (which steps those are).
        variance: of a reverse step.
        terms: estimate the sum from so many steps, for each picture another one from each of as many equal parts of
            the grid; every step, in order, when not given.
    """
    levels = log_snrs.to("cpu", torch.float64)
    dims = x0[0].numel() * math.log(2)
    alpha, sigma = alpha_sigma(levels[0], x0)
    prior = gaussian_kl(alpha * x0.double(), sigma**2, torch.zeros(()), torch.ones(())).flatten(1).sum(1)
    steps = torch.zeros_like(prior)
    for number, (first, end) in enumerate(_parts(len(levels) - 1, terms), 1):
        # A part of one step has one level for all pictures.
        step = torch.tensor(first)
        if end - first > 1:
            step = step + ((end - first) * _uniform(noise_source(-number)).cpu()).long().clamp(max=end - first - 1)
        level, following = levels[step].to(x0.device), levels[step + 1].to(x0.device)
        steps += (end - first) * _step_term(denoise, x0, level, following, noise_source(number), variance)
    _, data = _decoded(denoise, x0, levels[-1], noise_source(0))
    return Terms(prior / dims, steps / dims, data / dims)


def ode_bits(denoise: Denoise, x0: Images, log_snrs: Grid, noise_source: NoiseSource, *, trace: Trace) -> Levels:
    """Bits/dim of pictures in [-1, 1] whose values are 256 even ones, by the probability-flow ODE; (batch,).

    Args:
        log_snrs: rising levels; between neighbours one step of Runge and Kutta's method of order 4, four evaluations
            with their derivatives. Evenly spaced ones are best.
        noise_source: asked for 0 only, the noise of the cleanest level: the same z as that of the bound.
        trace: `hutchinson(...)`, or `exact_trace` for tiny pictures.
    """
    levels = log_snrs.to("cpu", torch.float64)
    dims = x0[0].numel() * math.log(2)
    noise = noise_source(0)
    x, bits = _decoded(denoise, x0, levels[-1], noise)
    # log q(z | x0), and at the end log N(x; 0, I): what both have of log(2 pi) cancels.
    _, sigma = alpha_sigma(levels[-1], x0)
    bits = bits - (noise.double() ** 2 / 2 + sigma.log()).flatten(1).sum(1)
    for step, (level, noisier) in enumerate(pairwise(levels.flip(0))):
        x, growth = _runge_kutta(denoise, x, level, noisier, trace, 4 * step)
        bits = bits - growth
    return (bits + (x.double() ** 2 / 2).flatten(1).sum(1)) / dims


def hutchinson(noise_source: NoiseSource, probes: int = 1) -> Trace:
    """An unbiased trace from `probes` random signs v: the mean of v . (J v).

    Every evaluation has signs of its own, for the path does not depend on them and their errors then average out.
    (Hutchinson 1989; `noise_source` is asked for 0, 1, 2, ...)
    """

    def trace(denoise: Denoise, x: Images, log_snr: Level, number: int) -> tuple[Images, Levels]:
        signs = (torch.where(noise_source(number * probes + probe) < 0, -1.0, 1.0).to(x) for probe in range(probes))
        return _traced(denoise, x, log_snr, signs, probes)

    return trace


def exact_trace(denoise: Denoise, x: Images, log_snr: Level, number: int) -> tuple[Images, Levels]:
    """The trace itself, pixel by pixel: as many derivatives as a picture has values."""
    pixels = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
    return _traced(denoise, x, log_snr, iter(pixels.unbind()), 1)


def _traced(
    denoise: Denoise, x: Images, log_snr: Level, directions: Iterator[Tensor], share: int
) -> tuple[Images, Levels]:
    """x0_hat, and the sum of v . (J v) over `directions` divided by `share`."""
    trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, log_snr)
        for direction in directions:
            (slope,) = torch.autograd.grad((x0 * direction).sum(), x, retain_graph=True)
            trace += (slope * direction).double().flatten(1).sum(1)
    return x0.detach(), trace / share


def _runge_kutta(
    denoise: Denoise, x: Images, level: Level, noisier: Level, trace: Trace, number: int
) -> tuple[Images, Levels]:
    """x at `noisier`, and the integral of div v from `level` down to there."""
    length = noisier - level
    velocities: list[Images] = []
    divergences: list[Levels] = []
    for stage, place in enumerate((0.0, 0.5, 0.5, 1.0)):
        here = x + place * length.to(x.dtype) * velocities[-1] if velocities else x
        log_snr = level + place * length
        alpha, _ = alpha_sigma(log_snr, x)
        x0, along = trace(denoise, here, log_snr.to(x.device, x.dtype), number + stage)
        velocities.append(((alpha * x0 - alpha**2 * here) / 2).to(x.dtype))
        divergences.append((alpha * along - alpha**2 * x[0].numel()) / 2)
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    velocity = sum(weight * part for weight, part in zip(weights, velocities, strict=True))
    divergence = sum(weight * part for weight, part in zip(weights, divergences, strict=True))
    return x + length.to(x.dtype) * velocity, length * divergence


def _decoded(denoise: Denoise, x0: Images, log_snr: Level, noise: Images) -> tuple[Images, Levels]:
    """z, a draw of q(z | x0) at the cleanest level, and -log p(x0 | z) of each picture in nats."""
    alpha, sigma = alpha_sigma(log_snr, x0)
    level = log_snr.to(x0.device, x0.dtype)
    with torch.no_grad():
        z = add_noise(x0, noise, level)
        mean = denoise(z, level)
    return z, data_term(x0.double(), mean.double(), sigma / alpha).flatten(1).sum(1)


def _step_term(
    denoise: Denoise, x0: Images, log_snr: Tensor, following: Tensor, noise: Images, variance: Variance
) -> Levels:
    """KL(q(x_m | x_l, x0) || p(x_m | x_l)) of each picture at a draw of x_l, in nats."""
    level = log_snr.to(x0.dtype)
    with torch.no_grad():
        x = add_noise(x0, noise, level)
        error = (denoise(x, level) - x0).double()
        alpha_next, _ = alpha_sigma(following, x)
        share = shaped(fresh_share(log_snr, following), x)
        mean = alpha_next * share * error
        wanted, given = posterior(x, log_snr, following), variance(x, log_snr, following)
        return gaussian_kl(mean, wanted, torch.zeros_like(mean), given.double()).flatten(1).sum(1)


def _parts(steps: int, terms: int | None) -> list[tuple[int, int]]:
    """As even a division of `steps` steps as there is into `terms` parts, each from its first to before its end."""
    count = min(steps, terms or steps)
    return list(pairwise(index * steps // count for index in range(count + 1)))


def _uniform(noise: Images) -> Levels:
    """A number between 0 and 1 for each picture: where its first normal value stands in their distribution."""
    return torch.special.ndtr(noise.flatten(1)[:, 0].double())
