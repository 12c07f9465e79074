"""The average: the weighted sum its definition says, of the width it is asked for, and harmless to the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from snowmelt.ema import Average, power_of
from snowmelt.errors import UserError

WIDTHS = [0.01, 0.05, 0.1, 0.2]


class Weights(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))


def averaged(values: torch.Tensor, sigma_rel: float) -> torch.Tensor:
    """The average after weights have taken the rows of `values`, one at each step."""
    module = Weights(*[1e6] * values.shape[1])
    average = Average(module, sigma_rel)
    for step, row in enumerate(values, 1):
        with torch.no_grad():
            module.values.copy_(row)
        average.update(step)
    return average.state()["values"]


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_it_is_the_weighted_sum(sigma_rel):
    """Step k of t weighs (k^p - (k - 1)^p) / t^p with p = gamma + 1: a power density, cut into steps."""
    steps, power = 300, power_of(sigma_rel) + 1
    values = torch.randn(steps, 5, generator=torch.Generator().manual_seed(0))
    k = torch.arange(steps + 1, dtype=torch.float64)
    share = ((k / steps) ** power).diff()
    assert math.isclose(share.sum(), 1, rel_tol=1e-12)
    # float32 sums of values of order 1; errors shrink as fast as the weights they came with.
    torch.testing.assert_close(averaged(values, sigma_rel), (share @ values.double()).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_it_has_the_width_asked_for(sigma_rel):
    """The standard deviation of the step numbers it averages, as a share of the steps, is sigma_rel."""
    steps = 2000
    time = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    mean, square = averaged(torch.stack([time - 1, (time - 1) ** 2], dim=1).float(), sigma_rel).double()
    # Steps are 1/2000 wide; values of order sigma_rel in float32.
    assert abs((square - mean**2).sqrt() - sigma_rel) < 1 / steps


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_power_solves_its_equation(sigma_rel):
    """A power density t^gamma on [0, 1] has the variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    gamma = power_of(sigma_rel)
    # Roots of a cubic with coefficients of up to 1e4.
    assert math.isclose((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)), sigma_rel**2, rel_tol=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.28, 1.0, -0.1])
def test_a_width_that_cannot_be_is_refused(sigma_rel):
    with pytest.raises(UserError, match="between 0 and 0\\.28"):
        power_of(sigma_rel)


def test_the_first_weights_are_forgotten():
    """beta_1 = 0: what the weights were before the first update never counts."""
    assert averaged(torch.tensor([[3.0]]), 0.1) == 3.0


def test_applied_gives_the_own_weights_back_bit_for_bit():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    average = Average(module, 0.1)
    average.update(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1 / 3)
    own = {name: weight.clone() for name, weight in module.state_dict().items()}
    with pytest.raises(KeyError), average.applied():
        assert all(torch.equal(weight, average.state()[name]) for name, weight in module.state_dict().items())
        assert not torch.equal(module[0].weight, own["0.weight"])
        raise KeyError
    assert all(torch.equal(weight, own[name]) for name, weight in module.state_dict().items())


def test_state_and_load_are_inverse():
    values = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    module = Weights(0.0, 0.0, 0.0)
    one, other = Average(module, 0.1), Average(Weights(9.0, 9.0, 9.0), 0.1)
    for step, row in enumerate(values, 1):
        with torch.no_grad():
            module.values.copy_(row)
        one.update(step)
    other.load({name: tensor.clone() for name, tensor in one.state().items()})
    assert torch.equal(other.state()["values"], one.state()["values"])
