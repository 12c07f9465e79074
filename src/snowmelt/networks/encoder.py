"""Small convolutional networks that turn a picture into numbers: one that is trained, one that stays random.

The trained one is fully convolutional, so that it learns on crops and measures whole pictures. What it says of a
picture are a narrow code of what is shown, its estimates of blur and noise, and means over places of the logarithm of
what its first two maps answer. The logarithm is for the even places of a picture, where faint noise changes it much;
of plain means noise makes good what blur takes away. In pictures without even places only the estimates tell the two
apart. Batch norm and not group norm: with the latter a picture without contrast looks like any other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from snowmelt.shapes import Features, Images

WIDTHS = (16, 32, 64, 128)
CODE = 32
"""Values that say what a picture shows."""
TOLD = 32
"""Values of the comparison between two views of a picture."""
DAMAGES = 2
"""Blur and noise."""
RANDOM_WIDTHS = (16, 24, 24)
FAINT = 0.1
"""The size of an answer below which its logarithm hardly changes, for maps whose answers are about 1."""


class Said(NamedTuple):
    """What the encoder says about pictures."""

    features: Features
    """(batch, `Encoder.dimension`), not standardised."""
    classes: Float[Tensor, "batch classes"]
    """Log-probabilities of the classes up to a constant; the code itself where there are no classes."""
    view: Float[Tensor, "batch values"]
    """Alike for two views of one picture: unit vectors."""
    damage: Float[Tensor, "batch damages"]
    """Estimated blur and noise, in the units of the training."""


def _convolution(channels: int, out: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Encoder(nn.Module):
    """Four maps, each half as large as the one before, and what can be told from their means.

    Args:
        channels: of the pictures, 1 or 3.
        classes: 0 where there are none.
        stride: of the first convolution; 2 saves three quarters of the work on large pictures.
    """

    dimension = WIDTHS[0] + WIDTHS[1] + CODE + DAMAGES

    def __init__(self, channels: int, classes: int, *, stride: int = 1) -> None:
        super().__init__()
        first, second, third, fourth = WIDTHS
        size = 2 * stride + 1
        self.edges = nn.Sequential(
            nn.Conv2d(channels, first, size, stride, padding=stride, bias=False), nn.BatchNorm2d(first)
        )
        self.texture = nn.Sequential(_convolution(first, second, stride=2), _convolution(second, second))
        self.parts = nn.Sequential(_convolution(second, third, stride=2), _convolution(third, third))
        self.things = nn.Sequential(_convolution(third, fourth, stride=2), _convolution(fourth, fourth))
        self.code = nn.Linear(fourth, CODE)
        self.classes = nn.Linear(CODE, classes) if classes else nn.Identity()
        self.view = nn.Sequential(nn.Linear(CODE, fourth), nn.ReLU(), nn.Linear(fourth, TOLD))
        self.damage = nn.Sequential(nn.Linear(first + second + third, 64), nn.ReLU(), nn.Linear(64, DAMAGES))

    def forward(self, images: Images) -> Said:
        edges = self.edges(images)
        texture = self.texture(F.relu(edges))
        parts = self.parts(texture)
        shallow = torch.cat([_mean_log(edges), _mean_log(texture)], dim=1)
        code = self.code(_mean(self.things(parts)))
        damage = self.damage(torch.cat([shallow, _mean_log(parts)], dim=1))
        return Said(
            features=torch.cat([shallow, code, damage], dim=1),
            classes=self.classes(code),
            view=F.normalize(self.view(F.relu(code)), dim=1),
            damage=damage,
        )


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def _mean_log(x: Tensor) -> Tensor:
    """The mean over places of the logarithm of the answers' sizes."""
    return _mean((x.abs() + FAINT).log())


class RandomEncoder(nn.Module):
    """Convolutions that nobody trained: of each of three maps the mean log-size of its answers, and their log-mean.

    Filters are drawn with one length, half of them without a mean, so that they answer to structure and not to
    brightness; a third of the first ones sees only colour, in which photographs have little fine structure and noise
    has much. Random filters are known to be good features of texture (Ustyuzhaninov et al. 2016, arXiv:1606.00021).

    Args:
        rng: decides the filters.
    """

    dimension = 2 * sum(RANDOM_WIDTHS)

    def __init__(self, channels: int, rng: torch.Generator) -> None:
        super().__init__()
        widths = (channels, *RANDOM_WIDTHS)
        self.filters = nn.ParameterList(
            nn.Parameter(_filters(widths[depth], widths[depth + 1], rng), requires_grad=False)
            for depth in range(len(RANDOM_WIDTHS))
        )

    def forward(self, images: Images) -> Features:
        """(batch, 128), not standardised."""
        found, x = list[Tensor](), images
        for depth, weight in enumerate(self.filters):
            answers = F.conv2d(_reflected(x), weight, stride=1 if depth == 0 else 2)
            x = F.relu(answers)
            found += [_mean_log(answers), (_mean(x) + FAINT).log()]
        return torch.cat(found, dim=1)


def _filters(channels: int, out: int, rng: torch.Generator) -> Tensor:
    """(out, channels, 3, 3), each as long as keeps the power of what comes in."""
    weight = torch.randn(out, channels, 3, 3, generator=rng)
    weight[::2] -= weight[::2].mean(dim=(1, 2, 3), keepdim=True)
    if channels == 3:
        weight[1::3] -= weight[1::3].mean(dim=1, keepdim=True)
    return math.sqrt(2) * F.normalize(weight.flatten(1), dim=1).view_as(weight)


def _reflected(x: Tensor) -> Tensor:
    """One row and column more on each side: zeros there would be an edge that no picture has."""
    return F.pad(x, (1, 1, 1, 1), mode="reflect" if min(x.shape[2:]) > 1 else "replicate")
