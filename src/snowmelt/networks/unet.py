"""The U-Net: down to a small map, up again, with a bridge from every layer down to its partner up.

`net(x, time, cond)` is an x-shaped function of an image, a number and a class; it does not know that diffusion
exists. With `patch=1` it is, weight for weight, a `UNet2DModel` of `diffusers`.
(Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020; Dhariwal & Nichol 2021, arXiv:2105.05233.)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snowmelt.config import UNetConfig
from snowmelt.networks.group_norm import GroupNorm
from snowmelt.networks.layers import (
    Attention,
    Downsample,
    Linear,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    bias_of,
    join,
    sinusoids,
)
from snowmelt.shapes import Answers, Features, Images, Labels, Levels


class DownBlock(nn.Module):
    """Residual blocks (with attention) at one size, then half the size."""

    def __init__(self, channels: int, out: int, *, config: UNetConfig, attention: bool, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_resnet(config)(channels if i == 0 else out, out) for i in range(config.blocks)])
        self.attentions = nn.ModuleList([_attention(config, out, config.groups) for _ in self.resnets if attention])
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out, halving=config.halving)])

    def forward(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Every map made on the way; the last of them goes on down."""
        maps: list[Tensor] = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            for attention in self.attentions[index : index + 1]:
                x = attention(x)
            maps.append(x)
        for downsample in self.downsamplers:
            maps.append(downsample(maps[-1]))
        return maps


class MidBlock(nn.Module):
    """At the smallest size: residual block, attention (if any), residual block."""

    def __init__(self, channels: int, *, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_resnet(config)(channels, channels) for _ in range(2)])
        groups = config.groups if config.middle_groups is None else config.middle_groups
        self.attentions = nn.ModuleList([_attention(config, channels, groups)] if config.middle_attention else [])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[0](x, embedding)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, embedding)


class UpBlock(nn.Module):
    """Residual blocks, each joined by a map from the way down, then twice the size."""

    def __init__(
        self, channels: int, bridges: list[int], out: int, *, config: UNetConfig, attention: bool, last: bool
    ) -> None:
        super().__init__()
        widths = [channels] + [out] * (len(bridges) - 1)
        self.resnets = nn.ModuleList([_resnet(config)(w + b, out) for w, b in zip(widths, bridges, strict=True)])
        self.attentions = nn.ModuleList([_attention(config, out, config.groups) for _ in self.resnets if attention])
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out)])

    def forward(self, x: Tensor, maps: list[Tensor], embedding: Tensor) -> Tensor:
        """Takes its bridges from the end of `maps`."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(join(x, maps.pop()), embedding)
            for attention in self.attentions[index : index + 1]:
                x = attention(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class UNet(nn.Module):
    """`net(x, time, cond) -> like x`.

    Args:
        channels: of what it is shown.
        classes: how many; 0 for none. The label `classes` stands for "no class".
        out: channels of the answer; as many when not given.
        told: numbers that say how images were changed; 0 for none.
    """

    def __init__(
        self, config: UNetConfig, *, channels: int, classes: int, out: int | None = None, told: int = 0
    ) -> None:
        super().__init__()
        self.patch, self.classes = config.patch, classes
        widths, pixels = config.channels, channels * config.patch**2
        embedding = 4 * widths[0]
        self.waves = partial(sinusoids, width=widths[0], shift=config.frequency_shift, sines_first=config.sines_first)
        self.time_embedding = TimeEmbedding(widths[0], embedding)
        self.class_embedding = nn.Embedding(classes + 1, embedding) if classes else None
        self.told_embedding = _silent(Linear(told, embedding, bias=False)) if told else None
        self.conv_in = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down_blocks, bridges = self._down(config)
        self.mid_block = MidBlock(widths[-1], config=config)
        self.up_blocks = self._up(config, bridges)
        self.conv_norm_out = GroupNorm(config.groups, widths[0], epsilon=config.epsilon)
        self.conv_out = nn.Conv2d(widths[0], (out or channels) * config.patch**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(bias_of(self.conv_out))

    @staticmethod
    def _down(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
        """The way down, and the widths of the maps it leaves for the way up."""
        widths = config.channels
        blocks, bridges = nn.ModuleList(), [widths[0]]
        for level, width in enumerate(widths):
            last = level + 1 == len(widths)
            before = widths[max(level - 1, 0)]
            blocks.append(DownBlock(before, width, config=config, attention=config.attention[level], last=last))
            bridges += [width] * (config.blocks + (not last))
        return blocks, bridges

    @staticmethod
    def _up(config: UNetConfig, bridges: list[int]) -> nn.ModuleList:
        blocks, before = nn.ModuleList(), config.channels[-1]
        for level in reversed(range(len(config.channels))):
            width, mine = config.channels[level], [bridges.pop() for _ in range(config.blocks + 1)]
            blocks.append(
                UpBlock(before, mine, width, config=config, attention=config.attention[level], last=level == 0)
            )
            before = width
        return blocks

    def forward(self, x: Images, time: Levels, cond: Labels | None = None, told: Features | None = None) -> Answers:
        """An image-shaped answer.

        Args:
            time: (batch,) DDPM steps, 0..999.
            cond: (batch,) labels; None means "no class" for all, and is all that a network without classes takes.
            told: (batch, told) how the images were changed; None for not at all.
        """
        assert cond is None or self.classes, "a network without classes was given labels"
        embedding = self.time_embedding(self.waves(time).to(x.dtype))
        if self.class_embedding is not None:
            labels = torch.full_like(time, self.classes, dtype=torch.long) if cond is None else cond
            embedding = embedding + self.class_embedding(labels)
        if told is not None:
            assert self.told_embedding is not None, "a network that knows of no changes was told of some"
            embedding = embedding + self.told_embedding(told.to(x.dtype))
        embedding = F.silu(embedding)
        maps = [self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)]
        for down in self.down_blocks:
            maps += down(maps[-1], embedding)
        hidden = self.mid_block(maps[-1], embedding)
        for up in self.up_blocks:
            hidden = up(hidden, maps, embedding)
        out = self.conv_out(self.conv_norm_out(hidden))
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out


def _silent(layer: nn.Linear) -> nn.Linear:
    """A layer that says nothing before it has learned."""
    nn.init.zeros_(layer.weight)
    return layer


def _resnet(config: UNetConfig) -> partial[ResnetBlock]:
    return partial(
        ResnetBlock,
        embedding=4 * config.channels[0],
        enters=config.embedding,
        groups=config.groups,
        epsilon=config.epsilon,
        dropout=config.dropout,
    )


def _attention(config: UNetConfig, channels: int, groups: int) -> Attention:
    return Attention(channels, head_channels=config.head_channels, groups=groups, epsilon=config.epsilon)
