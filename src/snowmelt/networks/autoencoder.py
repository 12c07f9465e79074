"""The two networks of an autoencoder, picture -> latents and back, and a critic of patches.

Both are residual blocks at falling and rising sizes that are told the class; between them is either one vector for
the whole picture or a map with latents at each of its places. Neither knows what the latents mean.
(Kingma & Welling 2013, arXiv:1312.6114; the map and the critic as in Rombach et al. 2022, arXiv:2112.10752.)
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from snowmelt.config import VAEConfig
from snowmelt.networks.group_norm import GroupNorm
from snowmelt.networks.layers import Attention, Downsample, ResnetBlock, Upsample
from snowmelt.shapes import Answers, Features, Images, Labels

EPSILON = 1e-5
"""Added to the variance in every group normalization."""
HEAD = 32
"""Channels of an attention head."""


class Told(nn.Module):
    """Layers in a row, of which the residual blocks are told the embedding."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, embedding: Features) -> Tensor:
        embedding = F.silu(embedding)
        for layer in self.layers:
            x = layer(x, embedding) if isinstance(layer, ResnetBlock) else layer(x)
        return x


class Encoder(nn.Module):
    """Pictures to `out` values: a vector of them, or as many at each place of the smallest map."""

    def __init__(self, config: VAEConfig, *, channels: int, side: int, out: int) -> None:
        super().__init__()
        self.patch, widths = config.patch, config.channels
        self.conv_in = nn.Conv2d(channels * config.patch**2, widths[0], 3, padding=1)
        self.body = Told(*_down(config), *_middle(config))
        self.norm = GroupNorm(config.groups, widths[-1], epsilon=EPSILON)
        self.head = _vector_head(config, side, out) if config.is_vector else nn.Conv2d(widths[-1], out, 1)

    def forward(self, images: Images, embedding: Features) -> Tensor:
        """(batch, out) or (batch, out, height, width)."""
        x = self.conv_in(F.pixel_unshuffle(images, self.patch) if self.patch > 1 else images)
        return self.head(self.norm(self.body(x, embedding)))


class Decoder(nn.Module):
    """Latents to an image-shaped answer of `out` channels."""

    def __init__(self, config: VAEConfig, *, side: int, out: int) -> None:
        super().__init__()
        self.patch, widths = config.patch, config.channels
        self.tail = _vector_tail(config, side) if config.is_vector else nn.Conv2d(config.latents, widths[-1], 1)
        self.body = Told(*_middle(config), *_up(config))
        self.norm = GroupNorm(config.groups, widths[0], epsilon=EPSILON)
        self.conv_out = nn.Conv2d(widths[0], out * config.patch**2, 3, padding=1)

    def forward(self, latents: Tensor, embedding: Features) -> Answers:
        x = self.conv_out(self.norm(self.body(self.tail(latents), embedding)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class Autoencoder(nn.Module):
    """An encoder, which says two numbers of each latent, a decoder, and what both are told of the class.

    Args:
        size: of the pictures, a multiple of `config.divisor`.
        channels: of the pictures.
        classes: how many; 0 for none, and then both are told a constant.
        answers: numbers that the decoder says of each value of a picture.
    """

    def __init__(self, config: VAEConfig, *, size: int, channels: int, classes: int, answers: int = 1) -> None:
        super().__init__()
        side = size // config.divisor
        self.classes = classes
        self.encoder = Encoder(config, channels=channels, side=side, out=2 * config.latents)
        self.decoder = Decoder(config, side=side, out=answers * channels)
        self.class_embedding = nn.Embedding(max(1, classes), _told(config))

    def embed(self, labels: Labels | None, count: int) -> Features:
        """(count, width) what the two are told of `count` pictures of these classes."""
        assert (labels is None) == (not self.classes), "labels are for a network with classes, and it needs them"
        device = self.class_embedding.weight.device
        return self.class_embedding(torch.zeros(count, dtype=torch.long, device=device) if labels is None else labels)


class PatchCritic(nn.Module):
    """A number for every patch of a picture, high where it looks real (Isola et al. 2016, arXiv:1611.07004)."""

    def __init__(self, channels: int, *, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def forward(self, images: Images) -> Float[Tensor, "batch 1 down across"]:
        return self.layers(images)


def _told(config: VAEConfig) -> int:
    """Width of the embedding."""
    return 2 * config.channels[0]


def _resnet(config: VAEConfig) -> partial[ResnetBlock]:
    return partial(
        ResnetBlock, embedding=_told(config), enters="scale_shift", groups=config.groups, epsilon=EPSILON, dropout=0.0
    )


def _down(config: VAEConfig) -> list[nn.Module]:
    """At each size residual blocks, then half the size."""
    layers: list[nn.Module] = []
    before = config.channels[0]
    for level, width in enumerate(config.channels):
        for _ in range(config.blocks):
            layers.append(_resnet(config)(before, width))
            before = width
        if level + 1 < len(config.channels):
            layers.append(Downsample(width, halving="centered"))
    return layers


def _up(config: VAEConfig) -> list[nn.Module]:
    """The same the other way; a width is left before the size grows, since convolutions on large maps are dear."""
    layers: list[nn.Module] = []
    for level in reversed(range(len(config.channels))):
        width, following = config.channels[level], config.channels[max(level - 1, 0)]
        outs = [width] * (config.blocks - 1) + [following]
        layers += [_resnet(config)(width, out) for out in outs]
        if level:
            layers.append(Upsample(following))
    return layers


def _middle(config: VAEConfig) -> list[nn.Module]:
    """At the smallest size: a residual block, and attention where it is wanted."""
    width = config.channels[-1]
    layers: list[nn.Module] = [_resnet(config)(width, width)]
    if config.attention:
        layers.append(Attention(width, head_channels=HEAD, groups=config.groups, epsilon=EPSILON))
    return layers


def _vector_head(config: VAEConfig, side: int, out: int) -> nn.Module:
    """The smallest map to a vector; a large one is first averaged down to `config.most` places a side."""
    kept = min(side, config.most)
    return nn.Sequential(
        nn.Identity() if kept == side else nn.AdaptiveAvgPool2d(kept),
        nn.Conv2d(config.channels[-1], config.narrow, 1),
        nn.Flatten(),
        nn.Linear(config.narrow * kept**2, out),
    )


def _vector_tail(config: VAEConfig, side: int) -> nn.Module:
    """A vector to the smallest map."""
    kept = min(side, config.most)
    return nn.Sequential(
        nn.Linear(config.latents, config.narrow * kept**2),
        nn.Unflatten(1, (config.narrow, kept, kept)),
        nn.Identity() if kept == side else nn.Upsample((side, side), mode="bilinear"),
        nn.Conv2d(config.narrow, config.channels[-1], 1),
    )
