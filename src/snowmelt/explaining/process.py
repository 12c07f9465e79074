"""A photo under the process: its table of betas, one noise for all moments, and three walks that can be checked.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise          at(t), in one jump
    x_t = sqrt(1 - beta_t) x_t-1 + sqrt(beta_t) noise_t                walk_forward, in T steps
    x_t-1 ~ q(x_t-1 | x_t, x_0)                                        walk_back, by one who knows the photo

Every picture is made by `snowmelt.diffusion.process`; nothing is computed here a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from snowmelt.diffusion.process import (
    Moment,
    alpha_bars,
    check_betas,
    forward_jump,
    forward_step,
    posterior,
    prior_term,
)
from snowmelt.diffusion.schedules import Schedule
from snowmelt.seeds import generator, noise_source
from snowmelt.shapes import Images

ENOUGH = 150_000
"""Pixel values that a measurement of the noise takes; a small photo is walked in many copies."""


def betas_of(schedule: Schedule, steps: int) -> Tensor:
    """The table of a schedule: its levels at `steps` even times are those of alpha_bar_1 ... alpha_bar_T; float64.

    `betas_of(linear, 1000)` is DDPM's own table.
    """
    log_alpha_bar = torch.nn.functional.logsigmoid(schedule(torch.linspace(0, 1, steps, dtype=torch.float64)))
    return check_betas(-torch.expm1(log_alpha_bar.diff(prepend=torch.zeros(1, dtype=torch.float64))))


@dataclass(frozen=True)
class Process:
    """One photo and its noise."""

    x0: Images
    """(1, channels, size, size)."""
    noise: Images
    betas: Tensor
    """(T,); that of step t is `beta(t)`."""
    alpha_bars: Tensor
    """(T + 1,): alpha_bar_t at t, and 1 at 0."""

    @staticmethod
    def of(x0: Images, schedule: Schedule, steps: int, seed: int) -> Process:
        """The process of a photo; its noise is that of picture 0 of `seed` in `snowmelt sample`."""
        betas = betas_of(schedule, steps)
        bars = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars(betas)])
        return Process(x0, noise_source([seed], [0], tuple(x0.shape[1:]))(0), betas, bars)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    def at(self, t: int) -> Images:
        """x_t by the jump; x_0 is the photo."""
        return forward_jump(self.x0, self.alpha_bars[t], self.noise)

    def moment(self, t: int) -> Moment:
        """beta_t, alpha_bar_t and alpha_bar_t-1, for t from 1."""
        return Moment(self.betas[t - 1], self.alpha_bars[t], self.alpha_bars[t - 1])

    def beta(self, t: int) -> float:
        """beta_t; 0 at the photo."""
        return self.betas[t - 1].item() if t else 0.0

    def alpha_bar(self, t: int) -> float:
        """alpha_bar_t."""
        return self.alpha_bars[t].item()

    def log_snr(self, t: int) -> float:
        """log(alpha_bar_t / (1 - alpha_bar_t)); infinite at the photo."""
        bar = self.alpha_bars[t]
        return (torch.log(bar) - torch.log1p(-bar)).item()

    def prior_bits(self) -> float:
        """What x_T still tells of the photo: KL(q(x_T | x_0) || N(0, I)), in bits for each value."""
        return prior_term(self.x0.double(), self.alpha_bars[-1]).mean().item() / math.log(2)


class Stride(NamedTuple):
    """One step of the walk: where it came from, the noise drawn, where it led."""

    t: int
    before: Images
    noise: Images
    x: Images


def walk_forward(process: Process, seed: int, copies: int = 1) -> Iterator[Stride]:
    """The process as it is defined: T steps, each with noise of its own."""
    x = process.x0.expand(copies, -1, -1, -1)
    for t in range(1, process.steps + 1):
        noise = torch.randn(x.shape, generator=generator(seed, "explain: forward", t))
        before, x = x, forward_step(x, process.betas[t - 1], noise)
        yield Stride(t, before, noise, x)


def walk_back(process: Process, seed: int) -> Iterator[Stride]:
    """From noise that never saw the photo back to it, by draws of q(x_t-1 | x_t, x_0); `Stride.t` is where it led."""
    # In double precision: the weights of the last steps divide by numbers near 0.
    x0 = process.x0.double()
    x = torch.randn(x0.shape, generator=generator(seed, "explain: back", process.steps + 1)).double()
    for t in range(process.steps, 0, -1):
        noise = torch.randn(x.shape, generator=generator(seed, "explain: back", t)).double()
        beta, bar, previous = process.moment(t)
        mean, variance = posterior(x0, x, beta=beta, alpha_bar=bar, alpha_bar_previous=previous)
        before, x = x, mean + variance.sqrt() * noise
        yield Stride(t - 1, before, noise, x)


class Measured(NamedTuple):
    """What is measured in pictures x_t of one photo: x_t = signal x_0 + noise of this size."""

    signal: float
    noise: float


def measured(x: Images, x0: Tensor) -> Measured:
    """By least squares over all pixel values; `x0` is one photo for all of `x`."""
    signal = (x * x0).sum() / (x0**2).sum().mul(len(x)).clamp_min(1e-12)
    return Measured(signal.item(), (x - signal * x0).std(correction=0).item())


class Agreement(NamedTuple):
    """The walk and the jump at one moment, beside what the equation says."""

    t: int
    equation: Measured
    walked: Measured
    jumped: Measured


@dataclass(frozen=True)
class Forward:
    """The walk forward at the moments asked for."""

    strides: dict[int, Stride]
    """Its first copy, for looking at."""
    agreement: list[Agreement]
    copies: int

    @property
    def values(self) -> int:
        """Pixel values in every measurement."""
        return self.copies * next(iter(self.strides.values())).x.numel()


def walked(process: Process, moments: list[int], seed: int) -> Forward:
    """Walk forward, and measure walk and jump at `moments` (from 1)."""
    copies = math.ceil(ENOUGH / process.x0.numel())
    strides: dict[int, Stride] = {}
    agreement: list[Agreement] = []
    for stride in walk_forward(process, seed, copies):
        t = stride.t
        if t in moments:
            strides[t] = Stride(t, stride.before[:1], stride.noise[:1], stride.x[:1])
            fresh = torch.randn(stride.x.shape, generator=generator(seed, "explain: jump", t))
            jumped = forward_jump(process.x0, process.alpha_bars[t], fresh)
            bar = process.alpha_bar(t)
            equation = Measured(math.sqrt(bar), math.sqrt(1 - bar))
            agreement.append(Agreement(t, equation, measured(stride.x, process.x0), measured(jumped, process.x0)))
    return Forward(strides, agreement, copies)


class Histogram(NamedTuple):
    """Shares of pixel values per unit of value, and what the equation says of them."""

    places: Tensor
    """Middles of the bins."""
    counted: Tensor
    expected: Tensor
    """The density of x_t for this photo, q(x_t | x_0) averaged over its values; zeros where it is a row of spikes."""


REACH = 3.5
"""Histograms run from -REACH to REACH; what lies outside is counted in the outermost bins."""


def histogram(process: Process, t: int) -> Histogram:
    """Of the pixel values of x_t; wider bins for a photo of few pixels."""
    bins = 70 if process.x0.numel() >= 2000 else 28
    width = 2 * REACH / bins
    values = process.at(t).double().clamp(-REACH, REACH)
    counted = torch.histc(values, bins, -REACH, REACH) / values.numel() / width
    places = torch.linspace(-REACH + width / 2, REACH - width / 2, bins, dtype=torch.float64)
    levels, counts = process.x0.double().unique(return_counts=True)
    bar = process.alpha_bars[t]
    spread = (1 - bar).sqrt()
    if spread < width / 2:
        return Histogram(places, counted, torch.zeros_like(places))
    distance = (places[:, None] - bar.sqrt() * levels) / spread
    bells = torch.exp(-(distance**2) / 2) / (spread * math.sqrt(2 * math.pi))
    return Histogram(places, counted, bells @ (counts / counts.sum()).double())


def bell(places: Tensor) -> Tensor:
    """The density of N(0, 1)."""
    return torch.exp(-(places**2) / 2) / math.sqrt(2 * math.pi)
