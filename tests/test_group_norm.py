"""The compiled group norm beside torch's own in double precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from snowmelt.networks.group_norm import GroupNorm, compiled, kernels_for

TYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""By type: the largest error for each part of the largest value. bfloat16 rounds what it is given and gives by 2^-9."""


@pytest.fixture
def compiler():
    if compiled(torch.float32) is None:
        pytest.skip("there is no C compiler here that makes group_norm.c")


def last(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    made = 3 + 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(memory_format=torch.channels_last)


def away(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    assert one is not None and other is not None and one.shape == other.shape
    return float((one.double() - other).detach().abs().max() / other.detach().abs().max())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("shape", [(3, 24, 5, 7), (1, 64, 16, 16), (5, 32, 3, 1), (2, 88, 2, 3), (2, 12, 3, 3)])
def test_it_is_torchs_norm_and_its_gradient(compiler, dtype, silu, told, shape):
    groups = 8 if shape[1] % 8 == 0 else 4
    norm = GroupNorm(groups, shape[1], epsilon=1e-5, silu=silu)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = last(*shape, dtype=dtype, seed=0).requires_grad_()
    # What a block is told comes from a linear layer, and may have its type.
    entered = torch.randn(shape[0], 2 * shape[1]).to(dtype).requires_grad_() if told else None
    assert kernels_for(x) is not None
    answer = norm(x, entered)
    assert answer.dtype == dtype and answer.is_contiguous(memory_format=torch.channels_last)
    slope = last(*shape, dtype=dtype, seed=1).contiguous()
    answer.backward(slope)

    given = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    exact, asked = F.group_norm(given[0], groups, given[1], given[2], 1e-5), None
    if entered is not None:
        asked = entered.detach().double().requires_grad_()
        scale, shift = asked[:, :, None, None].chunk(2, dim=1)
        exact = exact * (1 + scale) + shift
    exact = F.silu(exact) if silu else exact
    exact.backward(slope.double())
    bound = TYPES[dtype]
    assert away(answer, exact) < bound
    assert away(x.grad, given[0].grad) < bound
    # Sums over many places: float32 whatever the maps are. Where those are of 16 bits SiLU is computed to 7e-5, of
    # numbers of both signs that are several times as large together as their sum.
    sums = 5e-4 if silu and dtype != torch.float32 else 1e-5
    assert away(norm.weight.grad, given[1].grad) < sums and away(norm.bias.grad, given[2].grad) < sums
    if entered is not None and asked is not None:
        assert away(entered.grad, asked.grad) < bound


def test_its_variance_survives_values_far_from_zero_and_one_that_is_unlike_all_others(compiler):
    """Squares of differences from a typical value are summed: that one must not be lost in the mean, nor misled.

    Values of 1,000 have 6e-5 between two of them, and are multiplied by about 1: 2e-4 of answers of about 1.
    """
    rng = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(2, 16, 16, 16, generator=rng)
    x[1, 3, 8, 0] += 300  # the fourth of the seven places of which the typical value is the mean
    x = x.contiguous(memory_format=torch.channels_last)
    norm = GroupNorm(16, 16, epsilon=1e-5, silu=False)
    assert kernels_for(x) is not None
    torch.testing.assert_close(norm(x), F.group_norm(x.double(), 16).float(), rtol=1e-4, atol=2e-4)


def test_values_that_are_not_numbers_stay_so_and_large_ones_do_not_overflow(compiler):
    """A picture with a NaN is lost, its neighbours are not; SiLU goes to h and to 0 far out."""
    for dtype in TYPES:
        norm = GroupNorm(2, 4, epsilon=1e-5)
        x = last(3, 4, 4, 4, dtype=dtype, seed=2)
        x[1, 0, 0, 0] = float("nan")
        answer = norm(x)
        assert answer[1, :2].isnan().all() and answer[[0, 2]].isfinite().all() and answer[1, 2:].isfinite().all()
        far = torch.tensor([[0.0] * 4 + [-1e4] * 4, [0.0] * 4 + [1e4] * 4])
        told = norm(last(2, 4, 4, 4, dtype=dtype, seed=3), far)
        assert (told[0].abs() < 1e-6).all() and ((told[1] - 1e4).abs() < 100).all()


def test_other_layouts_and_devices_are_left_to_torch():
    x = torch.randn(2, 8, 4, 4)
    assert kernels_for(x) is None
    assert kernels_for(x.to(memory_format=torch.channels_last).double()) is None
    assert kernels_for(x.to(memory_format=torch.channels_last).to("meta")) is None
    # One place or one channel lies in both ways.
    assert kernels_for(torch.randn(2, 8, 1, 1).to(memory_format=torch.channels_last)) is None


def test_weights_of_another_type_are_left_to_torch(compiler):
    """The kernels read float32; a network that somebody made bfloat16 as a whole is torch's."""
    norm = GroupNorm(4, 16, epsilon=1e-5)
    nn.init.normal_(norm.weight)
    half = norm.to(torch.bfloat16)
    x = last(2, 16, 5, 5, dtype=torch.bfloat16, seed=4).requires_grad_()
    theirs = nn.GroupNorm(4, 16, eps=1e-5).double()
    theirs.load_state_dict(half.state_dict())
    found, expected = half(x), F.silu(theirs(x.detach().double()))
    found.sum().backward()
    assert away(found, expected) < TYPES[torch.bfloat16] and half.weight.grad is not None
    assert half.weight.grad.dtype == torch.bfloat16
