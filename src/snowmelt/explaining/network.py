"""What a trained network makes of the photo's process: its beliefs, its steps back, and its errors.

x0_hat(x_t)                                              believe
KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)) per value      compare: the terms of the bound, for this photo
x_T -> ... -> x_0 by p(x_t-1 | x_t)                      trail: DDIM or DDPM on a subset of the T steps
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.guidance import clamped
from snowmelt.diffusion.process import (
    data_term,
    forward_variance,
    posterior,
    posterior_variance,
    reverse_mean,
    step_term,
)
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.evaluation.curves import ERROR
from snowmelt.explaining.process import Process
from snowmelt.models.diffusion import DiffusionModel, quietly
from snowmelt.run import Run
from snowmelt.seeds import noise_source
from snowmelt.shapes import Grid, Images

EVALUATIONS = 100
"""Of the network on the way from noise to picture, where the process has as many steps."""
SIDEWAYS = 20
"""The same, from each moment of the photo."""
COMPANIONS = 4
"""Pictures drawn side by side where a measurement needs more than one; the first is that of the page."""
MOST_CLASSES = 50
"""Above so many classes it is not tried which of them fits the photo."""


@dataclass(frozen=True)
class Network:
    """What is asked for the clean pictures."""

    bind: Callable[[int], Denoise]
    """The denoiser for a batch of so many, kept to pictures in [-1, 1] as in drawing."""
    device: torch.device
    label: int | None = None
    """The class it is told; None: it is told none."""

    @staticmethod
    def of(model: DiffusionModel, label: int | None) -> Network:
        """A model with a class, or without one."""
        device = model.precision.device

        def bind(count: int) -> Denoise:
            labels = None if label is None else torch.full((count,), label, device=device)
            return clamped(model.bind(labels))

        return Network(bind, device, label)

    def believe(self, x: Images, log_snr: float) -> Images:
        """What it takes the clean pictures to be; on the CPU."""
        x = x.to(self.device)
        with torch.no_grad():
            return self.bind(len(x))(x, torch.tensor(log_snr).to(x)).float().cpu()


def fitting_label(model: DiffusionModel, process: Process, seed: int) -> int | None:
    """The class that makes the photo's own noise easiest to find; None without classes or with very many.

    At three levels around the middle and over eight draws of noise. ("Your diffusion model is secretly a zero-shot
    classifier", Li et al. 2023, arXiv:2303.16203.)
    """
    classes = len(model.config.data.classes)
    if not classes or classes > MOST_CLASSES:
        return None
    noise = noise_source([seed] * 8, range(8), tuple(process.x0.shape[1:]))(0)
    middle = [min(range(1, process.steps + 1), key=lambda t: abs(process.log_snr(t) - level)) for level in (-2, 0, 2)]

    def missed(label: int) -> float:
        network, total = Network.of(model, label), 0.0
        for t in middle:
            bar = process.alpha_bar(t)
            x = math.sqrt(bar) * process.x0 + math.sqrt(1 - bar) * noise
            error = (network.believe(x, process.log_snr(t)) - process.x0).square().mean().item()
            total += error * bar / (1 - bar)  # the squared error of the noise
        return total

    return min(range(classes), key=missed)


class StepBack(NamedTuple):
    """The true posterior and the learned step from t to t - 1, at x_t of the photo; KL in bits for each value."""

    t: int
    log_snr: float
    belief_error: float
    """Mean of (x0_hat - x_0)^2."""
    mean_gap: float
    """Root mean square of the difference of the two means."""
    true_std: float
    """sqrt(beta_tilde_t): of the true posterior, and of the learned step where it takes that variance."""
    wide_std: float
    """sqrt(beta_t): of the learned step where it takes the other one."""
    kl_true: float
    kl_wide: float


def compare(network: Network, process: Process, t: int) -> StepBack:
    """One step at t > 1; at t = 1 both divergences are -log p(x_0 | x_1), since beta_tilde_1 is 0."""
    x0, x, at = process.x0.double(), process.at(t).double(), process.moment(t)
    belief = network.believe(process.at(t), process.log_snr(t)).double()
    noise = (x - at.alpha_bar.sqrt() * belief) / (1 - at.alpha_bar).sqrt()
    mean, _ = posterior(x0, x, beta=at.beta, alpha_bar=at.alpha_bar, alpha_bar_previous=at.alpha_bar_previous)
    learned = reverse_mean(x, noise, beta=at.beta, alpha_bar=at.alpha_bar)
    narrow, wide = posterior_variance(at), forward_variance(at)

    def bits(nats: torch.Tensor) -> float:
        return nats.mean().item() / math.log(2)

    if t == 1:
        last = bits(data_term(x0, learned, wide.sqrt()))
        divergences = (last, last)
    else:
        term = partial(step_term, x0, x, noise, at)
        divergences = (bits(term(narrow)), bits(term(wide)))
    error, gap = (belief - x0).square().mean().item(), (mean - learned).square().mean().sqrt().item()
    return StepBack(t, process.log_snr(t), error, gap, narrow.sqrt().item(), wide.sqrt().item(), *divergences)


def steps_to_compare(steps: int, count: int = 60) -> list[int]:
    """Evenly spread over 1 ... T and over its logarithm, since the last steps back are the ones that cost."""
    even = {round(1 + i * (steps - 1) / (count - 1)) for i in range(count)}
    return sorted(even | {round(steps ** (i / (count - 1))) for i in range(count)})


def total_bits(steps: list[StepBack]) -> float:
    """The sum of the true-variance terms over every t, those between two compared ones on a straight line."""
    total = steps[0].kl_true
    for one, other in pairwise(steps):
        stretch = other.t - one.t
        # From the first step on: L_0 is of another kind, so the line begins after it.
        first = other.kl_true if one.t == 1 else one.kl_true
        total += sum(first + (other.kl_true - first) * i / stretch for i in range(1, stretch + 1))
    return total


class Trail(NamedTuple):
    """A way back: at each t, falling, the noisy pictures and what the network believed."""

    ts: list[int]
    xs: list[Images]
    beliefs: list[Images]

    @property
    def result(self) -> Images:
        """The last belief."""
        return self.beliefs[-1]


def trail(network: Network, process: Process, sampler: str, x: Images, ts: list[int], seed: int) -> Trail:
    """From `x` at level ts[0] down the steps `ts` with a sampler of `SAMPLERS`."""
    grid: Grid = torch.tensor([process.log_snr(t) for t in ts], dtype=torch.float64)
    fresh = noise_source([seed] * len(x), range(len(x)), tuple(x.shape[1:]), network.device)
    steps = list(quietly(SAMPLERS[sampler](network.bind(len(x)), x.to(network.device), grid, fresh)))
    return Trail(ts, [step.x.float().cpu() for step in steps], [step.x0.float().cpu() for step in steps])


def falling(start: int, count: int) -> list[int]:
    """At most `count` steps from `start` down to 1, evenly spread."""
    count = min(count, start)
    return [round(start - i * (start - 1) / max(1, count - 1)) for i in range(count)]


def companions(process: Process, seed: int) -> Images:
    """The photo's own x_T, then pure noise."""
    others = range(1, COMPANIONS)
    noise = noise_source([seed] * len(others), others, tuple(process.x0.shape[1:]))(0)
    return torch.cat([process.at(process.steps), noise])


def held_out_errors(run: Run) -> dict[float, float]:
    """Log-SNR -> the run's last held-out error; empty when it never measured one."""
    measured = [line for line in run.metrics() if any(key.startswith(ERROR) for key in line)]
    if not measured:
        return {}
    errors = {key.removeprefix(ERROR): value for key, value in measured[-1].items() if key.startswith(ERROR)}
    return dict(sorted((float(level), float(error)) for level, error in errors.items()))
