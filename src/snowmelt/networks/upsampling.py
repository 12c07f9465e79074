"""Twice the size and a 3 x 3 convolution, in 4/9 of the arithmetic.

Where each value stands four times, three neighbours in a row are only two values, one of them twice. So each of the
four phases (even or odd row, even or odd column) of the larger map is a 2 x 2 convolution of the smaller one, whose
taps are sums of the nine weights (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?").
The answer is the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from snowmelt.networks.group_norm import lies_channels_last

SMALLEST = 8
"""Side of the map from which on less arithmetic outweighs the taps' sums and the phases' copies (docs/recipe.md)."""


def by_phases_pays(x: Tensor) -> bool:
    """Whether `by_phases` is the faster way for this map."""
    return min(x.shape[2:]) >= SMALLEST and lies_channels_last(x)


def by_phases(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The 3 x 3 convolution, padded by one, of the map enlarged twice by repeating its values.

    Args:
        x: (batch, channels, height, width).
        weight: (out, channels, 3, 3).
        bias: (out,).

    Returns:
        (batch, out, 2 height, 2 width).
    """
    out, channels = weight.shape[:2]
    # (out, channels, row phase, row tap, column phase, column tap), then phases outermost.
    taps = _two_taps(_two_taps(weight, 2), 3).reshape(out, channels, 2, 2, 2, 2)
    kernels = taps.permute(2, 4, 0, 1, 3, 5).reshape(4 * out, channels, 2, 2)
    return _Interleave.apply(F.conv2d(x, kernels, bias.repeat(4), padding=1))


def _two_taps(weight: Tensor, dim: int) -> Tensor:
    """Three taps become two for even places and two for odd ones, four in all."""
    first, middle, final = weight.unbind(dim)
    return torch.stack((first, middle + final, first + middle, final), dim)


def _parts(four: Tensor, larger: Tensor) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Each phase in the map of phases, with its margin; where it goes; and its first row and column that count."""
    out = larger.shape[1]
    for phase in range(4):
        row, column = divmod(phase, 2)
        yield four[:, phase * out : (phase + 1) * out], larger[:, :, row::2, column::2], row, column


class _Interleave(torch.autograd.Function):
    """(batch, 4 out, height + 1, width + 1) to (batch, out, 2 height, 2 width)."""

    @staticmethod
    def forward(ctx: Any, four: Tensor) -> Tensor:  # type: ignore[override]
        del ctx
        batch, out, height, width = four.shape[0], four.shape[1] // 4, four.shape[2] - 1, four.shape[3] - 1
        larger = torch.empty((batch, out, 2 * height, 2 * width), dtype=four.dtype, memory_format=torch.channels_last)
        for part, places, row, column in _parts(four, larger):
            places.copy_(part[:, :, row : row + height, column : column + width])
        return larger

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        slope = slopes[0]
        batch, out, height, width = slope.shape[0], slope.shape[1], slope.shape[2] // 2, slope.shape[3] // 2
        four = torch.empty(
            (batch, 4 * out, height + 1, width + 1), dtype=slope.dtype, memory_format=torch.channels_last
        )
        for part, places, row, column in _parts(four, slope):
            part[:, :, row : row + height, column : column + width] = places
            # The margin, which the larger map has no place for: below and right of even phases, else above and left.
            part[:, :, -1 if row == 0 else 0] = 0
            part[:, :, :, -1 if column == 0 else 0] = 0
        return four
