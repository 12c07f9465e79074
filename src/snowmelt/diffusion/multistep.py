"""Steps that remember: the exact solution between two levels, with what the network said before put between them.

With L = log_snr / 2 both forms of the process are linear in x, and what remains is an integral over the step:

    x_m = decay x_l + sum_j w_j f_j + fresh noise,         w_j = integral of kernel(L) ell_j(L) over the step

where f_j are earlier answers and ell_j their Lagrange polynomials. The form says what f is, and with it the kernel:

    data    f = x0,       decay = sigma_m / sigma_l e^(-tau h),   kernel = alpha_m (1 + tau) e^(-(1 + tau) (L_m - L))
    noise   f = noise,    decay = alpha_m / alpha_l,              kernel = -alpha_m e^(-L)

tau is how much fresh noise a step draws: 0 none, 1 as DDPM does, more up to all of it; up to 1 it is eta of DDIM,
e^(-2 tau h) = 1 - eta^2 (1 - e^(-2h)).
One answer gives DDPM, DDIM and Euler; more give DPM-Solver++ (data), its SDE variants (data, tau = 1), DEIS (noise),
UniPC (data, with the new answer among the f), iPNDM (noise, levels counted instead of measured).
(Lu et al. 2022, arXiv:2211.01095; Zhang & Chen 2022, arXiv:2204.13902; Zhao et al. 2023, arXiv:2302.04867;
Xue et al. 2023, "SA-Solver", arXiv:2305.05267, for tau.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64

from snowmelt.diffusion.walk import Step
from snowmelt.shapes import Images

Array: TypeAlias = Float64[np.ndarray, " points"]

# Exact for polynomials up to degree 63: the kernels, exponentials over at most 20 units, come out to 1e-14.
_POINTS, _SHARES = np.polynomial.legendre.leggauss(32)


class Weights(NamedTuple):
    """x_m = decay x_l + sum_j parts[j] f_j."""

    decay: float
    parts: list[float]


class Form(NamedTuple):
    """What is put between the levels, and how much of each answer a step takes."""

    linear: Callable[[float], tuple[float, float]]
    """log-SNR -> how much of x and of x0 the value is."""
    weights: Callable[[Sequence[float], float, float, float], Weights]
    """(levels of the answers, l, m, tau) -> weights of the step from l to m."""

    def value(self, step: Step) -> Images:
        """What the answer of a step says."""
        of_x, of_x0 = self.linear(float(step.log_snr))
        return of_x0 * step.x0 if not of_x else of_x * step.x + of_x0 * step.x0


def lagrange(nodes: Sequence[float], at: Array) -> list[Array]:
    """The polynomials that are 1 at one of `nodes` and 0 at the others, at the points `at`."""
    ones = np.ones_like(at)
    return [
        math.prod(((at - other) / (node - other) for other in nodes if other != node), start=ones) for node in nodes
    ]


def integrals(kernel: Callable[[Array], Array], nodes: Sequence[float], start: float, stop: float) -> list[float]:
    """The integral of kernel times each Lagrange polynomial from `start` to `stop`, by Gauss and Legendre."""
    half = (stop - start) / 2
    points = start + half * (1 + _POINTS)
    measure = half * _SHARES * kernel(points)
    return [float(measure @ polynomial) for polynomial in lagrange(nodes, points)]


def _scales(log_snr: float) -> tuple[float, float]:
    """alpha and sigma as plain numbers."""
    return math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))


def _data_weights(levels: Sequence[float], level: float, following: float, tau: float) -> Weights:
    (_, sigma), (alpha, sigma_next) = _scales(level), _scales(following)
    start, stop, rate = level / 2, following / 2, 1 + tau
    decay = sigma_next / sigma * math.exp(-tau * (stop - start))
    nodes = [node / 2 for node in levels]
    if len(nodes) <= 2:
        # Between two answers DPM-Solver++ and UniPC take the value half-way instead of the integral: as exact in order.
        whole = -alpha * math.expm1(-rate * (stop - start))
        return Weights(decay, [whole * float(part[0]) for part in lagrange(nodes, np.array([(start + stop) / 2]))])
    return Weights(decay, integrals(lambda at: alpha * rate * np.exp(rate * (at - stop)), nodes, start, stop))


def _noise_weights(levels: Sequence[float], level: float, following: float, tau: float) -> Weights:
    (alpha, _), (alpha_next, _) = _scales(level), _scales(following)
    nodes = [node / 2 for node in levels]
    parts = integrals(lambda at: -alpha_next * np.exp(-at), nodes, level / 2, following / 2)
    return Weights(alpha_next / alpha, parts)


def _counted_weights(levels: Sequence[float], level: float, following: float, tau: float) -> Weights:
    (alpha, _), (alpha_next, _) = _scales(level), _scales(following)
    change = alpha_next * (math.exp(-following / 2) - math.exp(-level / 2))
    adams_bashforth = integrals(np.ones_like, [-float(index) for index in range(len(levels))], 0.0, 1.0)
    return Weights(alpha_next / alpha, [change * part for part in adams_bashforth])


def _noise(log_snr: float) -> tuple[float, float]:
    """The noise that was seen in the image, (x - alpha x0) / sigma."""
    alpha, sigma = _scales(log_snr)
    return 1 / sigma, -alpha / sigma


def _image(log_snr: float) -> tuple[float, float]:
    """The picture that was believed in."""
    del log_snr
    return 0.0, 1.0


DATA = Form(_image, _data_weights)
NOISE = Form(_noise, _noise_weights)
COUNTED = Form(_noise, _counted_weights)


def tau_of(eta: float, level: float, following: float) -> float:
    """How much fresh noise, from DDIM's eta; 1 gives 1 and 0 gives 0 at any step."""
    if eta in (0, 1):
        return float(eta)
    return -math.log1p(eta**2 * math.expm1(level - following)) / (following - level)


def combined(weights: Weights, x: Images, values: Sequence[Images]) -> Images:
    """decay x + sum_j w_j f_j."""
    x = weights.decay * x
    for weight, value in zip(weights.parts, values, strict=True):
        x = x + weight * value
    return x


def fresh_scale(level: float, following: float, tau: float) -> float:
    """The standard deviation of the fresh noise of a step."""
    return _scales(following)[1] * math.sqrt(-math.expm1(-tau * (following - level)))
