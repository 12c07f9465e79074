"""Group normalisation with what usually follows it, a scale and a shift for each picture and SiLU, as one step.

On a CPU convolutions are faster where the channels of a place lie beside each other (`channels_last`), but there
torch's group norm takes up to thirty times longer than in its own layout, which is more than they gain. `group_norm.c`
is compiled where that can be done (`kernels.py`); elsewhere, or on another device or in another layout, torch's own
layers compute the same.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from snowmelt.networks.kernels import BF16, COUNT, GRADIENTS, NUMBER, POINTER, SWITCH, library

FLAGS = {torch.float32: (), torch.bfloat16: BF16}
"""By the type of the maps: what the compiler is told."""

FOR_ANSWERS = (("forward", (*(POINTER,) * 7, *(COUNT,) * 4, NUMBER, SWITCH)),)
FOR_GRADIENTS = (("backward", (*(POINTER,) * 11, *(COUNT,) * 4, SWITCH)),)
"""Functions of the C file, and what each is told."""


def compiled(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The function for answers from maps of this type; None where it cannot be compiled."""
    return library("group_norm", FOR_ANSWERS, FLAGS[dtype]) if dtype in FLAGS else None


def gradients(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The one for gradients, where there is the one for answers."""
    return library("group_norm", FOR_GRADIENTS, (*FLAGS[dtype], *GRADIENTS)) if compiled(dtype) else None


def kernels_for(x: Tensor) -> torch.dtype | None:
    """The type in which our kernels compute with this map; None where torch does it."""
    found = lies_channels_last(x) and (gradients if torch.is_grad_enabled() else compiled)(x.dtype)
    return x.dtype if found else None


def lies_channels_last(x: Tensor) -> bool:
    """Whether the channels of a place lie beside each other, on a CPU, where our own kernels then compute."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def for_compiler() -> bool:
    """Whether a compiler looks on, which wants other words than torch's kernels do; none that only exports."""
    return torch.compiler.is_dynamo_compiling()


def channels_last_pays(device: torch.device) -> bool:
    """Whether maps should lie so on this device without a measurement: seen on every network and in both types, on
    processors of the kind of x86."""
    seen = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return seen and gradients(torch.float32) is not None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, told: Tensor | None, groups: int, epsilon: float, silu: bool
    ) -> Tensor:
        batch, channels, height, width = x.shape
        answer = torch.empty_like(x)
        mean, inverse = torch.empty(2, batch, groups, dtype=torch.float32, device=x.device).unbind()
        kernels = compiled(x.dtype)
        assert kernels is not None
        pointers = map(_pointer, (x, gamma, beta, told, answer, mean, inverse))
        if kernels.forward(*pointers, batch, height * width, channels, groups, epsilon, silu):
            raise MemoryError("no memory for a group norm")
        ctx.save_for_backward(x, gamma, beta, told, mean, inverse)
        ctx.groups, ctx.silu = groups, silu
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gamma, beta, told, mean, inverse = ctx.saved_tensors
        batch, channels, height, width = x.shape
        slope = slopes[0].contiguous(memory_format=torch.channels_last)
        dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
        dtold = None if told is None else torch.empty_like(told)
        kernels = gradients(x.dtype)
        assert kernels is not None
        pointers = map(_pointer, (x, gamma, beta, told, mean, inverse, slope, dx, dgamma, dbeta, dtold))
        if kernels.backward(*pointers, batch, height * width, channels, ctx.groups, ctx.silu):
            raise MemoryError("no memory for the gradient of a group norm")
        return dx, dgamma, dbeta, dtold, None, None, None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, then x (1 + scale) + shift where it is told these, then SiLU if it is asked for.

    Args:
        silu: whether SiLU follows.
    """

    def __init__(self, groups: int, channels: int, *, epsilon: float, silu: bool = True) -> None:
        super().__init__(groups, channels, eps=epsilon)
        self.silu = silu

    def forward(self, input: Tensor, told: Tensor | None = None) -> Tensor:
        """Like `input`, (batch, channels, height, width); it is told (batch, 2 channels), the scales and the shifts."""
        if for_compiler():
            return by_channels(self, input, told)
        if self.weight.dtype != torch.float32 or kernels_for(input) is None:
            hidden = super().forward(input)
            if told is not None:
                scale, shift = told.to(hidden.dtype)[:, :, None, None].chunk(2, dim=1)
                hidden = torch.addcmul(shift, hidden, 1 + scale)
            return F.silu(hidden) if self.silu else hidden
        if told is not None:
            assert told.shape == (len(input), 2 * self.num_channels), "C reads as many"
            told = told.float().contiguous()
        return _Fused.apply(input, self.weight, self.bias, told, self.num_groups, self.eps, self.silu)


def by_channels(norm: GroupNorm, x: Tensor, told: Tensor | None) -> Tensor:
    """The same as one line x a + b for each channel, whose sums are over places only: for a compiler.

    torch's own is written for maps that hold a channel after the other. Where the channels of a place lie beside each
    other, as convolutions on a GPU want them, what a compiler makes of it moves several times as many bytes.
    """
    wide = x.float()
    # Places, then the channels of a group. The difference of squares is as exact as its maps, which come from
    # convolutions in bfloat16 or, on a GPU, in TF32.
    mean, square = (
        one.mean((2, 3)).unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True) for one in (wide, wide * wide)
    )
    inverse = torch.rsqrt((square - mean * mean).clamp(min=0) + norm.eps)
    a = norm.weight.unflatten(0, (norm.num_groups, -1)) * inverse
    b = norm.bias.unflatten(0, (norm.num_groups, -1)) - mean * a
    a, b = a.flatten(1), b.flatten(1)
    if told is not None:
        scale, shift = told.float().chunk(2, dim=1)
        a, b = a * (1 + scale), b * (1 + scale) + shift
    hidden = wide * a[:, :, None, None] + b[:, :, None, None]
    return (F.silu(hidden) if norm.silu else hidden).to(x.dtype)
