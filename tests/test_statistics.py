"""Intervals hold what they say, and are narrow enough to say something."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from snowmelt.errors import UserError
from snowmelt.evaluation import statistics
from snowmelt.evaluation.metrics import METRICS, OF_FEATURES, Figure
from snowmelt.evaluation.statistics import (
    Sets,
    counts,
    measure,
    measure_patches,
    seconds_expected,
    seconds_expected_patches,
)

DRAWS = 6


def normal(rng: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, 8, generator=rng)


def heavy(rng: torch.Generator, count: int) -> Tensor:
    """Student's t with 3 degrees of freedom: now and then a picture is far away."""
    return normal(rng, count) / (torch.randn(count, 3, generator=rng).square().mean(1, keepdim=True)).sqrt()


def clumped(rng: torch.Generator, count: int) -> Tensor:
    """Many near-duplicates, as of a drawing in variants."""
    middles = torch.randn(20, 8, generator=torch.Generator().manual_seed(5))
    return 0.02 * normal(rng, count) + middles[torch.randint(20, (count,), generator=rng)]


def contains_floor(figure: Figure) -> bool:
    assert figure.low is not None and figure.high is not None and figure.floor is not None, figure.reason
    return figure.low <= figure.floor <= figure.high


@pytest.mark.parametrize(("draw", "real", "fake"), [(normal, 50, 50), (heavy, 90, 40), (clumped, 50, 50)])
def test_intervals_of_identical_distributions_contain_the_floor(draw, real, fake):
    """At least 93 % of draws: of 6 at 93 %, fewer than 3 hold it with a chance of 0.04 % (binomial)."""
    held = dict.fromkeys(OF_FEATURES, 0)
    for number in range(DRAWS):
        rng = torch.Generator().manual_seed(number)
        for figure in measure(draw(rng, real), draw(rng, fake), "test", seed=number):
            held[figure.metric] += contains_floor(figure)
    assert min(held.values()) >= 3, held
    assert sum(held.values()) >= 0.93 * len(held) * DRAWS, held


def test_intervals_tell_different_distributions_apart():
    """A shift of half a standard deviation in each of 8 dimensions, 200 pictures a side, is seen in 5 of 5 draws."""
    seen = dict.fromkeys(("frechet", "kid"), 0)
    for number in range(5):
        rng = torch.Generator().manual_seed(number)
        for figure in measure(normal(rng, 200), normal(rng, 200) + 0.5, "test", seed=number, names=tuple(seen)):
            seen[figure.metric] += not contains_floor(figure)
    assert seen == dict.fromkeys(seen, 5)


def test_a_generator_of_one_picture_covers_nothing():
    rng = torch.Generator().manual_seed(0)
    real = normal(rng, 200)
    figures = {figure.metric: figure for figure in measure(real, real[:1].expand(100, 8).clone(), "test", seed=0)}
    for name in ("recall", "coverage"):
        assert figures[name].value < 0.2 < figures[name].floor_low
        assert figures[name].high < figures[name].floor_low


def test_the_error_is_half_the_interval_before_it_was_cut():
    rng = torch.Generator().manual_seed(0)
    real = normal(rng, 200)
    for figure in measure(real, real[:1].expand(100, 8).clone(), "test", seed=0) + measure(real, real, "test", seed=0):
        least, most = METRICS[figure.metric].range
        assert figure.low == max(least, figure.value - figure.error)
        assert figure.high == min(most, figure.value + figure.error)
    assert all(figure.error is None for figure in measure(real[:5], real, "test", seed=0))


def test_the_same_input_gives_the_same_figures():
    rng = torch.Generator().manual_seed(0)
    real, fake = normal(rng, 90), normal(rng, 70)
    first = measure(real, fake, "test", seed=3)
    assert first == measure(real, fake, "test", seed=3)
    assert first != measure(real, fake, "test", seed=4)
    assert [asdict(figure)["metric"] for figure in first] == list(OF_FEATURES)


def test_value_and_floor_are_of_the_same_counts():
    assert counts(1000, 200, 2000) == statistics.Counts(800, 200)
    assert counts(300, 5000, 2000) == statistics.Counts(150, 150)
    assert counts(50_000, 5000, 1000) == statistics.Counts(1000, 1000)
    assert counts(1000, 200, 2000, same=True) == statistics.Counts(200, 200, True)
    sets = Sets(torch.arange(30.0)[:, None], torch.arange(20.0)[:, None], counts(30, 20, 1000), 0)
    for pair in (sets.draw(0), sets.split(0)):
        assert tuple(map(len, pair)) == (15, 15)
    assert not set(sets.split(1)[0].flatten().tolist()) & set(sets.split(1)[1].flatten().tolist())
    (one, _), (two, _) = sets.halves(0)
    assert not set(one.flatten().tolist()) & set(two.flatten().tolist())


@pytest.mark.parametrize(
    ("real", "fake", "words"), [(2, 2, "there are 2 and 2"), (60, 1, "1 and 60"), (0, 0, "0 and 0")]
)
def test_too_few_pictures_give_a_reason(real, fake, words):
    for figure in measure(torch.zeros(real, 8), torch.zeros(fake, 8), "test", seed=0):
        assert figure.value is None and words in figure.reason
    blank = np.zeros((real, 16, 16, 3), np.uint8), np.zeros((fake, 16, 16, 3), np.uint8)
    assert "are needed" in measure_patches(*blank, seed=0)[0].reason


def test_the_frechet_distance_needs_pictures_for_every_dimension():
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(100, 64, generator=rng) for _ in range(2))
    figures = {figure.metric: figure for figure in measure(real, fake, "test", seed=0)}
    assert "128 generated and 256 real pictures are needed in 64 dimensions" in figures["frechet"].reason
    assert figures["kid"].reason == ""


def test_bad_features_give_a_reason():
    rng = torch.Generator().manual_seed(0)
    real, bad = normal(rng, 60), normal(rng, 60)
    bad[3, 2] = float("nan")
    assert all("generated pictures are not finite" in figure.reason for figure in measure(real, bad, "test", seed=0))
    assert all("too large" in figure.reason for figure in measure(real, real * 1e30, "test", seed=0, names=["kid"]))
    with pytest.raises(UserError, match="cannot be compared"):
        measure(real, real[:, :3], "test", seed=0)
    with pytest.raises(UserError, match="no metric"):
        measure(real, real, "test", seed=0, names=["fid"])


def test_pictures_that_are_all_the_same_are_measured():
    for figure in measure(torch.ones(60, 8), torch.ones(60, 8), "test", seed=0):
        assert figure.reason == "" and contains_floor(figure)


def test_patches_have_an_interval_and_a_floor():
    rng = np.random.default_rng(0)
    real, fake, dark = (rng.integers(0, high, (60, 16, 16, 3), dtype=np.uint8) for high in (256, 256, 200))
    (alike,), (other,) = (measure_patches(real, side, seed=0) for side in (fake, dark))
    assert contains_floor(alike)
    assert not contains_floor(other)
    assert (alike.samples, alike.real, alike.space) == (30, 30, "pixels")


def test_cost_grows_with_what_there_is_to_do():
    assert 0 == seconds_expected(4, 4, 64) < seconds_expected(200, 200, 64) < seconds_expected(2000, 2000, 64)
    assert seconds_expected(2000, 2000, 64, ["frechet"]) < seconds_expected(2000, 2000, 64)
    assert 0 < seconds_expected_patches(200, 200, 768) < seconds_expected_patches(2000, 2000, 3072)


def test_patches_of_unequal_sets_are_compared_in_equal_numbers():
    rng = np.random.default_rng(0)
    real, fake = (rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8) for count in (300, 100))
    figure = measure_patches(real, fake, seed=0)[0]
    assert figure.samples == figure.real == 100 and figure.low <= figure.floor <= figure.high
