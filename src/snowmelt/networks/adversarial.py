"""The two networks of a GAN: one makes a picture from random values, the other says how real a picture looks.

Both are plain residual networks without normalization: what a batch holds then never changes an answer. Their depth
is tamed at the start instead (Zhang et al. 2019, arXiv:1901.09321): the last layer of every block begins at zero and
the first is scaled by blocks^(-1/2). Parameters lie where maps are small and arithmetic on them is cheap.
(Huang et al. 2024, arXiv:2501.05441; the class enters the critic as in Miyato & Koyama 2018, arXiv:1802.05637.)
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snowmelt.config import GANConfig
from snowmelt.networks.layers import bias_of
from snowmelt.shapes import Features, Images, Labels, Levels

SLOPE = 0.2
"""Of the leaky ReLU below zero."""
FINE = 16
"""Channels of the map of all pixels, of which the generator makes the picture."""


def leaky(x: Tensor) -> Tensor:
    """The one nonlinearity of both networks; its second derivative is zero, which makes gradient penalties cheap."""
    return F.leaky_relu(x, SLOPE)


def sizes(config: GANConfig, size: int) -> list[int]:
    """Sides of the maps, the largest first: every further one is half of the one before, rounded up."""
    sides = [size // config.patch]
    for _ in config.channels[1:]:
        sides.append((sides[-1] + 1) // 2)
    return sides


class Residual(nn.Module):
    """x + conv(leaky(conv(leaky(x)))).

    Args:
        depth: blocks in the whole network.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(self.conv1.weight, a=SLOPE)
        with torch.no_grad():
            self.conv1.weight.mul_(depth**-0.5)
        nn.init.zeros_(self.conv2.weight)
        for conv in (self.conv1, self.conv2):
            nn.init.zeros_(bias_of(conv))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(leaky(self.conv1(leaky(x))))


def _blocks(config: GANConfig, channels: int) -> nn.Sequential:
    depth = config.blocks * len(config.channels)
    return nn.Sequential(*(Residual(channels, depth) for _ in range(config.blocks)))


class Generator(nn.Module):
    """`net(latents, labels) -> images`, from the smallest map up to the pictures.

    Args:
        channels: of the pictures; `size`: their height and width.
        classes: how many; 0 for none.
    """

    def __init__(self, config: GANConfig, *, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.patch, self.sides = config.patch, sizes(config, size)[::-1]
        widths = config.channels[::-1]
        self.class_embedding = nn.Embedding(classes, config.latents) if classes else None
        told = config.latents * (2 if classes else 1)
        self.linear_in = nn.Linear(told, widths[0] * self.sides[0] ** 2)
        self.blocks = nn.ModuleList([_blocks(config, width) for width in widths])
        self.widen = nn.ModuleList([nn.Conv2d(width, following, 1) for width, following in pairwise(widths)])
        self.narrow = nn.Conv2d(widths[-1], FINE, 1)
        self.fine = Residual(FINE, config.blocks * len(widths))
        self.conv_out = nn.Conv2d(FINE, channels, 3, padding=1)

    def forward(self, latents: Features, labels: Labels | None = None) -> Images:
        """Pictures, which training brings to [-1, 1]; nothing holds them there.

        A tanh would: but once all is black or white it passes no gradient on, and nothing is learned any more.

        Args:
            latents: (batch, config.latents) standard normal values.
            labels: given exactly when there are classes.
        """
        assert (labels is None) == (self.class_embedding is None), "labels do not fit the network"
        if self.class_embedding is not None:
            latents = torch.cat([latents, self.class_embedding(labels)], dim=1)
        x = self.linear_in(latents).unflatten(1, (-1, self.sides[0], self.sides[0]))
        x = self.blocks[0](x.contiguous(memory_format=torch.channels_last))
        for widen, block, side in zip(self.widen, self.blocks[1:], self.sides[1:], strict=True):
            x = F.interpolate(widen(x), size=(side, side), mode="bilinear", align_corners=False)
            x = block(x)
        # Enlarged smoothly: pixels that come out of a square's channels show as a grid over colour pictures
        # (Odena et al. 2016, https://distill.pub/2016/deconv-checkerboard).
        x = F.interpolate(self.narrow(x), scale_factor=self.patch, mode="bilinear", align_corners=False)
        return self.conv_out(leaky(self.fine(x)))


class Critic(nn.Module):
    """`net(images, labels) -> scores`, the higher the more real; from the pictures down to the smallest map.

    Args:
        channels: of the pictures; `size`: their height and width.
        classes: how many; 0 for none.
    """

    def __init__(self, config: GANConfig, *, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.patch = config.patch
        widths, side = config.channels, sizes(config, size)[-1]
        self.conv_in = nn.Conv2d(channels * config.patch**2, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList([_blocks(config, width) for width in widths])
        self.widen = nn.ModuleList([nn.Conv2d(width, following, 1) for width, following in pairwise(widths)])
        self.features = nn.Linear(widths[-1] * side**2, widths[-1])
        self.score = nn.Linear(widths[-1], 1)
        self.class_embedding = nn.Embedding(classes, widths[-1]) if classes else None

    def forward(self, x: Images, labels: Labels | None = None) -> Levels:
        """One score for each picture: how real it looks, and how much like its class."""
        assert (labels is None) == (self.class_embedding is None), "labels do not fit the network"
        pixels = F.pixel_unshuffle(x, self.patch)
        hidden = self.blocks[0](self.conv_in(pixels.contiguous(memory_format=torch.channels_last)))
        for widen, block in zip(self.widen, self.blocks[1:], strict=True):
            hidden = block(widen(F.avg_pool2d(hidden, 2, ceil_mode=True)))
        seen = leaky(self.features(leaky(hidden).flatten(1)))
        score = self.score(seen).flatten()
        if self.class_embedding is not None:
            score = score + (self.class_embedding(labels) * seen).sum(1) / math.sqrt(seen.shape[1])
        return score
