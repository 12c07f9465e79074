"""The parts a U-Net is built from: x-shaped layers that are told a vector about the level and the class.

The arithmetic and the names of the parts are those of the blocks of `diffusers`' `UNet2DModel`, so that weights can
pass between the two without a change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from snowmelt.networks.convolution import Convolution
from snowmelt.networks.group_norm import GroupNorm, for_compiler


def sinusoids(
    time: Float[Tensor, " batch"], width: int, *, shift: float = 0.0, sines_first: bool = False
) -> Float[Tensor, "batch width"]:
    """Cosines and sines of `time` at geometrically spaced frequencies from 1 to 1/10000 (Vaswani et al. 2017).

    Args:
        shift: 0 stops one frequency before 1/10000, 1 at it.
    """
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / (half - shift)
    angles = time.float()[:, None] * exponents.exp()
    waves = [angles.sin(), angles.cos()] if sines_first else [angles.cos(), angles.sin()]
    return torch.cat(waves, dim=1)


class Linear(nn.Linear):
    """`nn.Linear` of one vector for each picture: under a processor's autocast in the type of its weights, since
    casting them takes longer than it."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.to(self.weight.dtype))


class TimeEmbedding(nn.Module):
    """Two linear layers over the sinusoids of the time."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, out)
        self.linear_2 = Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def bias_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The bias of a layer that has one."""
    assert layer.bias is not None
    return layer.bias


def scale_shift(norm: GroupNorm, x: Tensor, told: Tensor) -> Tensor:
    """The norm of `x`, scaled and shifted by the two halves of what the block was told."""
    return norm(x, told)


def add(norm: GroupNorm, x: Tensor, told: Tensor) -> Tensor:
    """The norm of the sum of `x` and what the block was told."""
    return norm(x + told.to(x.dtype)[:, :, None, None])


EMBEDDINGS: dict[str, tuple[Callable[[GroupNorm, Tensor, Tensor], Tensor], int]] = {
    "scale_shift": (scale_shift, 2),
    "add": (add, 1),
}
"""By name: how the embedding enters a block, and how many values it needs for each channel."""


class ResnetBlock(nn.Module):
    """norm, SiLU, conv; norm told the embedding, SiLU, conv; plus the input.

    Args:
        embedding: width of the embedding, which went through SiLU.
        enters: a name of `EMBEDDINGS`.
    """

    def __init__(
        self, channels: int, out: int, *, embedding: int, enters: str, groups: int, epsilon: float, dropout: float
    ) -> None:
        super().__init__()
        self.tell, values = EMBEDDINGS[enters]
        self.norm1 = GroupNorm(groups, channels, epsilon=epsilon)
        self.conv1 = Convolution(channels, out)
        self.time_emb_proj = Linear(embedding, values * out)
        self.norm2 = GroupNorm(groups, out, epsilon=epsilon)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Convolution(out, out)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        # A block begins as its shortcut: deep networks then learn from the first step on.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(bias_of(self.conv2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv1(self.norm1(x))
        hidden = self.tell(self.norm2, hidden, self.time_emb_proj(embedding))
        return self.conv2(self.dropout(hidden), self.conv_shortcut(x))


def attend(told: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, (batch, places, heads d), of (batch, places, 3, heads, d): q, k and v of each place.

    On a CPU the fused kernel only pays for large maps: forward and backward of 64 maps of 8 x 8 places and two heads
    took 22 ms in it, 5.3 ms written out with gradients of torch's, and 2.9 ms like this (2 cores, bf16).
    """
    if told.device.type != "cpu" or told.shape[1] > 196:
        q, k, v = told.permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Attend.apply(told)
    return _attended(told)[0]


def _attended(told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The answer; q, k and v one after the other, (3, batch heads, places, d); shares (batch heads, places, places)."""
    # Of one head, or one picture, that would be a view.
    parts = told.permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()
    q, k, v = parts
    shares = torch.softmax(torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=q.shape[2] ** -0.5), dim=-1)
    return torch.bmm(shares, v).unflatten(0, (-1, told.shape[3])).transpose(1, 2).flatten(2), parts, shares


class _Attend(torch.autograd.Function):
    """Torch's own gradients would be gathered from three slices and copied head by head. Once differentiable, as our
    kernels are."""

    @staticmethod
    def forward(ctx: Any, told: Tensor) -> Tensor:  # type: ignore[override]
        answer, parts, shares = _attended(told)
        ctx.save_for_backward(parts, shares)
        ctx.heads = told.shape[3]
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts, shares = ctx.saved_tensors
        q, k, v = parts
        slope = slopes[0].unflatten(2, (ctx.heads, -1)).transpose(1, 2).flatten(0, 1)
        slope_by_shares = torch.bmm(slope, v.mT)
        # What torch itself computes it with: shares (slope - sum of shares slope).
        scores = torch._softmax_backward_data(slope_by_shares, shares, -1, shares.dtype)  # pyright: ignore
        scale, dparts = q.shape[2] ** -0.5, torch.empty_like(parts)
        torch.baddbmm(q, scores, k, beta=0, alpha=scale, out=dparts[0])
        torch.baddbmm(k, scores.mT, q, beta=0, alpha=scale, out=dparts[1])
        torch.bmm(shares.mT, slope, out=dparts[2])
        return dparts.unflatten(1, (-1, ctx.heads)).permute(1, 3, 0, 2, 4)


class Attention(nn.Module):
    """Self-attention between all places of the map, plus the input; 0 groups stand for no norm before it."""

    def __init__(self, channels: int, *, head_channels: int, groups: int, epsilon: float) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.group_norm = GroupNorm(groups, channels, epsilon=epsilon, silu=False) if groups else nn.Identity()
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        out = nn.Linear(channels, channels)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(bias_of(out))
        self.to_out = nn.ModuleList([out])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        # One product for all three.
        layers = self.to_q, self.to_k, self.to_v
        weights, biases = torch.cat([one.weight for one in layers]), torch.cat([one.bias for one in layers])
        mixed = attend(F.linear(tokens, weights, biases).unflatten(2, (3, self.heads, -1)))
        return x + self.to_out[0](mixed).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Half the size: a convolution of stride 2, padded on all sides or, from the corner, right and below only."""

    def __init__(self, channels: int, *, halving: str) -> None:
        super().__init__()
        self.corner = halving == "corner"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.corner else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.corner else x)


class Upsample(nn.Module):
    """Twice the size: each value four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(twice(x) if for_compiler() else F.interpolate(x, scale_factor=2.0, mode="nearest"))


def twice(x: Tensor) -> Tensor:
    """`interpolate` for a compiler: channels beside each other, and a sum as its gradient.

    Of torch's own a compiler makes a gradient that adds value by value to memory.
    """
    places = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    return places.expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return slopes[0].clone(memory_format=torch.channels_last)


def join(x: Tensor, bridge: Tensor) -> Tensor:
    """Both maps, the channels of one after those of the other.

    The gradient of a part is a part of the gradient, which every convolution before it would copy for itself; a
    compiler copies it once.
    """
    return torch.cat([_Dense.apply(x) if for_compiler() else x, bridge], dim=1)
