"""What twice the time is said to bring, against curves whose next doubling is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from snowmelt.config import TrainingConfig
from snowmelt.ema import power_of
from snowmelt.training.forecast import LEAST, gain_of_doubling, outlook
from snowmelt.training.plan import Plan
from snowmelt.training.watch import PREVIEWS

IMAGES = 20_000
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def curve(loss: Callable[[float], float], shares: list[float] = SHARES) -> list[tuple[int, float]]:
    """The loss at moments of a run."""
    return [(round(share * IMAGES), loss(share * IMAGES)) for share in shares]


def power(exponent: float, floor: float) -> Callable[[float], float]:
    """A power law that is 1 at the end of the run, of which `floor` never goes away."""
    return lambda images: floor + (1 - floor) * (images / IMAGES) ** -exponent


@pytest.mark.parametrize("exponent", [0.05, 0.2, 0.5, 1.0])
def test_a_power_law_gains_as_much_again_at_most(exponent):
    """Each of its doublings takes the same share away: 1 - 2^-exponent."""
    found = gain_of_doubling(curve(power(exponent, 0)))
    assert found is not None and math.isclose(found[1], 1 - 2**-exponent, rel_tol=1e-9)


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.8, 0.95])
@pytest.mark.parametrize("exponent", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("shares", [SHARES, [0.3, 1.0], [0.05, 0.5, 1.0], [0.01, 0.74, 1.0]])
def test_the_next_doubling_of_a_power_law_above_a_floor_is_in_the_range(exponent, floor, shares):
    loss = power(exponent, floor)
    found = gain_of_doubling(curve(loss, shares))
    gain = 1 - loss(2 * IMAGES) / loss(IMAGES)
    # A measurement that is not at half the images makes a bent curve a straight one: off by 2 % of the gain at most.
    assert found is not None and 0.98 * found[0] <= gain <= 1.02 * found[1]


@pytest.mark.parametrize("seed", range(5))
def test_noise_that_is_smaller_than_the_gain_leaves_the_range_alone(seed):
    chance, loss = np.random.default_rng(seed), power(0.3, 0.5)
    found = gain_of_doubling([(images, y * (1 + 0.002 * chance.normal())) for images, y in curve(loss)])
    assert found is not None and found[0] < 1 - loss(2 * IMAGES) < found[1]


def noisy_quadratic(steps: int, bend: float, noise: float, floor: float) -> dict[int, float]:
    """The expected loss of a run's average weights at its previews, on a sum of quadratics with noisy gradients.

    Each direction has a curvature h: its weight w becomes (1 - rate h) w + rate sqrt(noise h) e, with e normal. The
    rate and the average are those of a run; the moments of w and of its average a are exact.
    """
    config = TrainingConfig(learning_rate=0.5, steps=steps)
    plan, exponent = Plan.open(Path(), config), power_of(config.average) + 1
    h = np.arange(1, 61) ** -bend
    ww = wa = aa = np.arange(1, 61) ** -1.2 / (h * np.arange(1, 61) ** -1.2).sum()
    moments = {round(share * steps) for share in PREVIEWS}
    found: dict[int, float] = {}
    for step in range(1, steps + 1):
        rate, beta = plan.learning_rate(step), (1 - 1 / step) ** exponent
        kept = 1 - rate * h
        wa, ww = kept * wa, kept**2 * ww + rate**2 * noise * h
        aa = beta**2 * aa + 2 * beta * (1 - beta) * wa + (1 - beta) ** 2 * ww
        wa = beta * wa + (1 - beta) * ww
        if step in moments:
            found[step] = floor + float(h @ aa)
    return found


@pytest.mark.parametrize("bend", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("noise", [0.003, 0.03])
@pytest.mark.parametrize("floor", [0.05, 0.2])
def test_the_end_of_a_run_twice_as_long_is_in_the_range(bend, noise, floor):
    """A run's own curve falls faster than the ends of ever longer runs do, since its learning rate falls too."""
    short, long = (noisy_quadratic(steps, bend, noise, floor) for steps in (300, 600))
    gain = 1 - long[600] / short[300]
    found = gain_of_doubling(list(short.items()))
    # The range was chosen to hold nine of ten such quadratics; the mildest noise on the gentlest bend is just below.
    assert found is not None and 0.9 * found[0] <= gain <= found[1]


def test_what_is_said():
    assert outlook(curve(power(0.2, 0)), LEAST) == "Twice the time is expected to lower the held-out loss by 5 to 13 %."
    assert (
        outlook(curve(power(0.02, 0)), LEAST) == "Twice the time is expected to lower the held-out loss by about 1 %."
    )
    assert (
        outlook(curve(power(0.002, 0)), LEAST)
        == "Twice the time is expected to lower the held-out loss by less than 1 %."
    )


@pytest.mark.parametrize("loss", [lambda images: 0.5, lambda images: 0.1 + images / IMAGES])
def test_a_loss_that_no_longer_falls_asks_for_pictures(loss):
    """Also one that fell at first, and has risen since pictures were learned by heart."""
    sentence = outlook([(1, 0.9), *curve(loss)], LEAST)
    assert sentence and "bring nothing" in sentence and "More pictures" in sentence


@pytest.mark.parametrize("early", [[], [(100, 0.9)], [(15_500, 0.6)], [(10_000, math.nan)]])
def test_a_run_not_measured_half_way_says_nothing(early):
    points = [*early, (IMAGES, 0.5)]
    assert gain_of_doubling(points) is None and outlook(points, LEAST) is None


def test_a_run_of_few_updates_says_nothing():
    assert outlook(curve(power(0.2, 0)), LEAST - 1) is None
