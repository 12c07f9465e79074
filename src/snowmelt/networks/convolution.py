"""The 3 x 3 convolution on a CPU, with the channels of a place beside each other (`channels_last`).

`winograd.h`: tiles of 4 x 4 answers are computed in a space where a convolution is 36 products of matrices, a quarter
of the multiplications (Lavin & Gray 2015, arXiv:1509.09308). The error is some five times that of a direct convolution
in either format: of the spread of an answer 5e-7 in float32, 1 % in bfloat16.

`tiles.h`: directly, in bfloat16 on a processor that multiplies tiles of it (AMX), with an error of 0.2 %.

`convolution.c`, which takes one of them in, is compiled where that can be done (`kernels.py`), under autocast to
bfloat16 only where the processor multiplies that; elsewhere torch computes the same.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snowmelt.networks.group_norm import FLAGS, lies_channels_last
from snowmelt.networks.kernels import COUNT, GRADIENTS, POINTER, SWITCH, library

PANEL = 16
"""What both numbers of channels must divide by."""
SMALLEST = 3
"""Side of the maps from which on what is computed is not mostly margin."""

FOR_ANSWERS = (("ready", ()), ("convolve", (*(POINTER,) * 5, *(COUNT,) * 5, SWITCH)))
FOR_GRADIENTS = (("weight_gradient", (*(POINTER,) * 4, *(COUNT,) * 5)),)
"""Functions of the C file, and what each is told."""


def compiled(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions for answers from maps of this type; None where they cannot be compiled or used."""
    found = library("convolution", FOR_ANSWERS, FLAGS[dtype]) if dtype in FLAGS else None
    return found if found and found.ready() else None


def gradients(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Those for gradients by weights, where there are those for answers."""
    return library("convolution", FOR_GRADIENTS, (*FLAGS[dtype], *GRADIENTS)) if compiled(dtype) else None


def kernels_for(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which our kernels convolve this map with these weights; None where torch does it."""
    if not lies_channels_last(x):
        return None
    out, channels = weight.shape[:2]
    fits = not (out % PANEL or channels % PANEL) and x.shape[1] == channels and min(x.shape[2:]) >= SMALLEST
    if not fits or weight.dtype != torch.float32 or weight.device != x.device or x.dtype not in FLAGS:
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype == weight.dtype:
        dtype = x.dtype
    else:
        return None  # A mistake, which torch refuses.
    return dtype if (gradients if torch.is_grad_enabled() else compiled)(dtype) else None


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None) -> Tensor:  # type: ignore[override]
        weight = weight.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias, added, turned=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        slope = slopes[0].contiguous(memory_format=torch.channels_last)
        dx = _convolve(slope, weight, None, None, turned=True) if ctx.needs_input_grad[0] else None
        dadded = slope if ctx.needs_input_grad[3] else None
        if not any(ctx.needs_input_grad[1:3]):
            return dx, None, None, dadded
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight[:, 0, 0, 0])
        batch, channels, height, width = x.shape
        pointers = map(Tensor.data_ptr, (x, slope, dweight, dbias))
        kernels = gradients(x.dtype)
        assert kernels is not None
        if kernels.weight_gradient(*pointers, batch, height, width, channels, len(weight)):
            raise MemoryError("no memory for the gradient of a convolution")
        return dx, dweight, dbias, dadded


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, *, turned: bool) -> Tensor:
    """The convolution or, with turned weights, its gradient by x, of which `x` is the gradient by the answer."""
    batch, channels, height, width = x.shape
    out = weight.shape[1 if turned else 0]
    answer = torch.empty((batch, out, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tensors = x, weight, bias, added, answer
    pointers = (None if one is None else one.data_ptr() for one in tensors)
    kernels = compiled(x.dtype)
    assert kernels is not None
    if kernels.convolve(*pointers, batch, height, width, channels, out, turned):
        raise MemoryError("no memory for a convolution")
    return answer


class Convolution(nn.Conv2d):
    """`nn.Conv2d` with 3 x 3 taps, padded by one: (batch, channels, height, width) to (batch, out, height, width)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)

    def forward(self, input: Tensor, added: Tensor | None = None) -> Tensor:
        """(batch, out, height, width); `added`, which is like it, is added."""
        dtype = kernels_for(input, self.weight)
        if dtype is None:
            answer = super().forward(input)
            return answer if added is None else added + answer
        if added is not None:
            assert added.shape == (len(input), self.out_channels, *input.shape[2:]), "C reads as many as it writes"
            added = added.to(dtype).contiguous(memory_format=torch.channels_last)
        return _Convolve.apply(input.to(dtype), self.weight, self.bias, added)
