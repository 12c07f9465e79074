"""Samplers: generators that walk a path of levels from noise to picture.

    noise_hat = (x - alpha_l x0) / sigma_l
    x_m       = alpha_m x0 + sigma_m sqrt(1 - c) noise_hat + sqrt(variance) fresh,      c = 1 - exp(l - m)

is a step of DDPM from level l to the cleaner m, and its posterior q(x_m | x_l, x0) where the variance is sigma_m^2 c.
Every other way to take the step is a `Form` of `multistep`, which says how earlier answers enter. A sampler yields
every step, so that progress, previews, trajectories and stopping early need no parameter.
(Ho et al. 2020; Song et al. 2020, arXiv:2010.02502; Karras et al. 2022, arXiv:2206.00364; and see `multistep`.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.grids import churned, restarted
from snowmelt.diffusion.multistep import COUNTED, DATA, NOISE, Form, combined, fresh_scale, tau_of
from snowmelt.diffusion.noise import alpha_sigma, fresh_share
from snowmelt.diffusion.variance import Variance, posterior
from snowmelt.diffusion.walk import Advance, Fresh, NoiseSource, Sampler, Step, evaluate, walk
from snowmelt.shapes import Grid, Images, Level, Path


def ancestral(
    denoise: Denoise, x: Images, log_snrs: Path, noise_source: NoiseSource, *, variance: Variance = posterior
) -> Iterator[Step]:
    """DDPM: fresh noise at every step, as much as `variance` says."""
    return walk(denoise, x, log_snrs, noise_source, _posterior_step(variance))


def _posterior_step(variance: Variance) -> Advance:
    def advance(step: Step, following: Level, fresh: Fresh) -> Images:
        alpha, sigma = alpha_sigma(step.log_snr, step.x)
        alpha_next, sigma_next = alpha_sigma(following, step.x)
        kept = (1 - fresh_share(step.log_snr, following)).sqrt()
        mean = alpha_next * step.x0 + sigma_next * kept * ((step.x - alpha * step.x0) / sigma)
        return mean + variance(step.x, step.log_snr, following).sqrt() * fresh()

    return advance


@dataclass(frozen=True)
class Multistep:
    """How a multistep sampler makes its steps."""

    order: int = 1
    """Answers that a step uses."""
    form: Form = DATA
    """What is put between the levels."""
    eta: float = 0.0
    """0 (no fresh noise) to 1 (as much as DDPM)."""
    late: float = 0.0
    """tau, any number, of steps whose middle is at log-SNR 0 or cleaner, in the place of eta's; 0: eta's there too."""
    corrected: bool = False
    """Before each step take the last one again, now knowing the answer at its end (UniPC)."""

    def __post_init__(self) -> None:
        assert self.order >= 1 and 0 <= self.eta <= 1
        assert self.late >= 0 and (not self.draws or self.may_draw), "this way solves the equation without fresh noise"

    @property
    def draws(self) -> bool:
        """Whether any step draws fresh noise."""
        return self.eta > 0 or self.late > 0

    @property
    def may_draw(self) -> bool:
        """Whether steps can draw fresh noise: not of a noise form, and not where steps are taken again."""
        return self.form is DATA and not self.corrected

    def tau(self, level: float, following: float) -> float:
        """How much fresh noise the step draws: see `multistep`."""
        # Grids are as long on either side of 0: a step across it must not depend on the rounding of its ends.
        late = self.late > 0 and level + following > -1e-6
        return self.late if late else tau_of(self.eta, level, following)


def multistep(
    denoise: Denoise, x: Images, log_snrs: Path, noise_source: NoiseSource, how: Multistep = Multistep()
) -> Iterator[Step]:
    """Steps that use the last answers; one evaluation for each level."""
    form, before = how.form, deque[Step](maxlen=how.order)
    expected = math.nan

    def solved(start: Step, answers: list[Step], following: float, tau: float) -> Images:
        weights = form.weights([float(one.log_snr) for one in answers], float(start.log_snr), following, tau)
        return combined(weights, start.x, [form.value(one) for one in answers])

    def advance(step: Step, following: Level, fresh: Fresh) -> Images:
        nonlocal expected
        level, stop = float(step.log_snr), float(following)
        if level != expected:
            # The path fell: these answers were about another noise.
            before.clear()
        if how.corrected and before:
            step = step._replace(x=solved(before[0], [step, *before], level, 0.0))
        before.appendleft(step)
        tau, expected = how.tau(level, stop), stop
        x = solved(step, list(before), stop, tau)
        return x + fresh_scale(level, stop, tau) * fresh() if tau else x

    return walk(denoise, x, log_snrs, noise_source, advance)


def heun(denoise: Denoise, x: Images, log_snrs: Path, noise_source: NoiseSource) -> Iterator[Step]:
    """Euler's step, then the mean of the noise seen at both its ends: two evaluations for each level but the last."""

    def advance(step: Step, following: Level, fresh: Fresh) -> Images:
        level, stop = float(step.log_snr), float(following)
        decay, (change,) = NOISE.weights([level], level, stop, 0.0)
        noise = NOISE.value(step)
        end = evaluate(denoise, decay * step.x + change * noise, following)
        return decay * step.x + change * (noise + NOISE.value(end)) / 2

    return walk(denoise, x, log_snrs, noise_source, advance)


def heun_churn(
    denoise: Denoise, x: Images, log_snrs: Grid, noise_source: NoiseSource, *, churn: float = 40.0
) -> Iterator[Step]:
    """EDM's stochastic sampler: a little noise added before every step of Heun; `churn` is S_churn."""
    return heun(denoise, x, churned(log_snrs, churn), noise_source)


def restart(
    denoise: Denoise, x: Images, log_snrs: Grid, noise_source: NoiseSource, *, times: int = 2
) -> Iterator[Step]:
    """Heun, with the middle of the way taken `times` times more from added noise (Xu et al. 2023, arXiv:2306.14878)."""
    return heun(denoise, x, restarted(log_snrs, times), noise_source)


def predictor_corrector(
    denoise: Denoise, x: Images, log_snrs: Path, noise_source: NoiseSource, *, snr: float = 0.08
) -> Iterator[Step]:
    """A step of DDPM, then one of Langevin at the new level (Song et al. 2020, arXiv:2011.13456, algorithm 3).

    Args:
        snr: their r: Langevin's step is 2 (r sigma)^2, so that a share 4 r^2 of the noise is new. Such a step leaves a
            variance that is too small by up to r^2 where the picture is clean: 0.6 % here, 2.6 % at their 0.16.
    """
    predict = _posterior_step(posterior)

    def advance(step: Step, following: Level, fresh: Fresh) -> Images:
        x, _, x0 = evaluate(denoise, predict(step, following, fresh), following)
        alpha, sigma = alpha_sigma(following, x)
        kept = (1 - 4 * snr**2) ** 0.5
        return alpha * x0 + kept * (x - alpha * x0) + 2 * snr * sigma * fresh()

    return walk(denoise, x, log_snrs, noise_source, advance)


@dataclass(frozen=True)
class Method:
    """A sampler as people choose it by name; called like the sampler itself."""

    sampler: Sampler
    grid: str
    """A name of `GRIDS`: how its levels are spaced when nothing else is asked for."""
    order: int | None
    """With n levels its error is proportional to n^-order; None where fresh noise leaves no path to compare."""
    how: Multistep | None = None
    """Where its steps are those of `multistep`: how it makes them."""

    def __call__(self, denoise: Denoise, x: Images, log_snrs: Path, noise_source: NoiseSource) -> Iterator[Step]:
        """See `walk`."""
        return self.sampler(denoise, x, log_snrs, noise_source)


def _solver(how: Multistep, grid: str, order: int | None) -> Method:
    return Method(partial(multistep, how=how), grid, order, how)


_EULER = Multistep()

SAMPLERS: dict[str, Method] = {
    "ddpm": Method(ancestral, "time", None),
    "ddim": _solver(_EULER, "time", 1),
    # Euler's step on dx = noise d(sigma / alpha) is DDIM's.
    "euler": _solver(_EULER, "karras", 1),
    # Down to less noise than is wanted, then noise: DDPM's.
    "euler_ancestral": Method(ancestral, "karras", None),
    "heun": Method(heun, "karras", 2),
    "heun_churn": Method(heun_churn, "karras", None),
    # Of first order DPM-Solver++ is DDIM.
    "dpmpp_1s": _solver(_EULER, "log_snr", 1),
    "dpmpp_2m": _solver(Multistep(order=2), "log_snr", 2),
    "dpmpp_3m": _solver(Multistep(order=3), "log_snr", 3),
    "dpmpp_2m_sde": _solver(Multistep(order=2, eta=1.0), "log_snr", None),
    # With fresh noise only where the picture outweighs it.
    "dpmpp_2m_late": _solver(Multistep(order=2, late=2.0), "log_snr", None),
    "dpmpp_3m_sde": _solver(Multistep(order=3, eta=1.0), "log_snr", None),
    "unipc": _solver(Multistep(order=3, corrected=True), "log_snr", 4),
    "deis": _solver(Multistep(order=3, form=NOISE), "log_snr", 3),
    "ipndm": _solver(Multistep(order=4, form=COUNTED), "karras", 2),
    "predictor_corrector": Method(predictor_corrector, "time", None),
    "restart": Method(restart, "karras", None),
}
