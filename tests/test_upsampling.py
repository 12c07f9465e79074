"""Upsampling by phases beside the plain way in double precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from snowmelt.networks.layers import Upsample, bias_of
from snowmelt.networks.upsampling import SMALLEST, by_phases, by_phases_pays


def plain(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)


def gradients(answer: torch.Tensor, slope: torch.Tensor, of: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(answer, of, slope))


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 3, 1, 1), (3, 4, 9, 8)])
def test_it_is_the_convolution_of_the_enlarged_map_and_its_gradients(shape):
    torch.manual_seed(0)
    layer = nn.Conv2d(shape[1], 7, 3, padding=1).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mine, reference = by_phases(x, layer.weight, bias_of(layer)), plain(x, layer)
    of, slope = [x, layer.weight, bias_of(layer)], torch.randn_like(reference)
    # Rounding of double precision, over sums of some hundred products.
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)
    for one, other in zip(gradients(mine, slope, of), gradients(reference, slope, of), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_the_layer_takes_it_in_both_formats(dtype, bound):
    """Each of some values is rounded by 2^-24 or 2^-9 before and after the sums; bound is for the largest of them."""
    torch.manual_seed(0)
    layer = Upsample(16).to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, SMALLEST, SMALLEST).to(memory_format=torch.channels_last)
    assert by_phases_pays(x) and not by_phases_pays(x.contiguous()) and not by_phases_pays(x[..., 1:])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        mine = layer(x.requires_grad_())
    assert mine.dtype == dtype and mine.is_contiguous(memory_format=torch.channels_last)
    slope = torch.randn(mine.shape)
    of = [x, layer.conv.weight, bias_of(layer.conv)]
    reference = plain(x, layer.conv)
    found = [mine.float(), *gradients(mine, slope.to(dtype), of)]
    for one, other in zip(found, [reference, *gradients(reference, slope, of)], strict=True):
        assert float((one - other).detach().abs().max() / other.detach().abs().max()) < bound
