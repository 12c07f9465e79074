"""The vision transformer of DINOv2 (Oquab et al. 2023, arXiv:2304.07193): one vector for a picture.

The parts bear the names in Meta's files `dinov2_vits14_pretrain.pth` and its larger kin, from whose shapes the size of
the network is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snowmelt.shapes import Features, Images

SIDE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's pictures in [0, 1]; what the network was trained on had these taken off."""
HEAD = 64
"""Channels of an attention head in every size of the network."""


@dataclass(frozen=True)
class Extents:
    """The size of a network."""

    width: int
    depth: int
    heads: int
    patch: int
    places: int
    """Patches on each side of the pictures it was trained on."""
    hidden: int


def extents_of(shapes: Mapping[str, tuple[int, ...]]) -> Extents:
    """The size of the network whose weights have these shapes; a `KeyError` or `ValueError` when it is none."""
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    places = math.isqrt(shapes["pos_embed"][1] - 1)
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    if width % HEAD or not depth or not patch or places**2 + 1 != shapes["pos_embed"][1]:
        raise ValueError("not the shapes of a DINOv2 network")
    return Extents(width, depth, width // HEAD, patch, places, hidden)


class Attention(nn.Module):
    """Self-attention between all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers for each token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and two layers, each behind a norm, scaled and added."""

    def __init__(self, extents: Extents) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(extents.width, eps=1e-6)
        self.attn = Attention(extents.width, extents.heads)
        self.ls1 = Scale(extents.width)
        self.norm2 = nn.LayerNorm(extents.width, eps=1e-6)
        self.mlp = Mlp(extents.width, extents.hidden)
        self.ls2 = Scale(extents.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A token for each patch."""

    def __init__(self, extents: Extents) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, extents.width, extents.patch, stride=extents.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DINOv2's network; the feature of a picture is its normed class token."""

    mean: Tensor
    std: Tensor

    def __init__(self, extents: Extents) -> None:
        super().__init__()
        self.extents = extents
        self.dimension = extents.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, extents.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, extents.places**2 + 1, extents.width))
        self.mask_token = nn.Parameter(torch.zeros(1, extents.width))
        self.patch_embed = PatchEmbed(extents)
        self.blocks = nn.ModuleList(Block(extents) for _ in range(extents.depth))
        self.norm = nn.LayerNorm(extents.width, eps=1e-6)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, images: Images) -> Features:
        """(batch, width) of colour or grey pictures in [-1, 1] of any size, made 224 x 224 with antialiasing."""
        side = (SIDE, SIDE)
        x = images.expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=side, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        return self.tokens(((x + 1) / 2 - self.mean) / self.std)[:, 0]

    def tokens(self, x: Images) -> Tensor:
        """(batch, 1 + patches, width): the normed tokens of square normalised pictures of a whole number of patches."""
        places = x.shape[3] // self.extents.patch
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        x = x + positions(self.pos_embed, places)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def positions(embedding: Tensor, places: int) -> Tensor:
    """The position embedding (1, 1 + n^2, width) for pictures of `places` x `places` patches, (1, 1 + places^2, width).

    The tenth of a patch that is added to the scale is how Meta computes it, and what its published figures rest on.
    """
    trained = math.isqrt(embedding.shape[1] - 1)
    if places == trained:
        return embedding
    grid = embedding[:, 1:].transpose(1, 2).unflatten(2, (trained, trained))
    scale = (places + 0.1) / trained
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
