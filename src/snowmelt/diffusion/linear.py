"""The best linear estimate of a clean image: all that the mean and the covariance of the pictures say of a noisy one.

    x0 = m + sum_i b_i (c_i + alpha v_i / (alpha^2 v_i + sigma^2) (b_i . (x - alpha m) - alpha c_i))

Were pictures spread as a bell curve is, with mean m, c_i farther along b_i where their class is known, and variance
v_i, this would be the expected picture itself (Wiener's filter). They are not, but where there is much noise hardly
anything else can be known of them, and a network of few updates is worse there than this formula: linear statistics
are what it learns first (Wang & Vastola 2024, arXiv:2412.09726). So it is shown the estimate beside the noisy
picture; how good that is changes how soon something is learned, and not what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.shapes import Images, Labels

FINEST = 32
"""Places on a side of the pictures whose covariance is measured; larger ones are averaged over squares before."""
PICTURES = 16
"""Pictures for each direction, at least: of fewer the variances would be those of these pictures and of no others."""
LEAST = 1e-6
"""A variance that stands for none at all."""


def square_of(size: int) -> int:
    """The side of the squares of pixels that are averaged: the least divisor that leaves at most `FINEST` places.

    >>> [square_of(size) for size in (8, 28, 32, 40, 64, 96, 256)]
    [1, 1, 1, 2, 2, 3, 8]
    """
    return next(square for square in range(1, size + 1) if size % square == 0 and size // square <= FINEST)


class LinearEstimate(nn.Module):
    """Estimates clean images from their mean (of each class, too) and covariance along so many `directions`, those in
    which pictures differ most; along all others one variance stands for all.

    All that it knows are buffers, so that weights that are saved hold them: `fit` measures them once.

    Args:
        directions: at most; no more than there are places.
    """

    mean: Tensor
    """(channels, height, width)."""
    basis: Tensor
    """(places, directions), in coarse pixels: orthonormal; columns of zeros where pictures were too few for them."""
    centre: Tensor
    """(classes + 1, directions): what the mean of each class adds along each direction; the last row is of all."""
    variance: Tensor
    """(classes + 1, directions): the variance within classes, and in the last row that of all."""
    rest: Tensor
    """The variance of a pixel along any other direction."""

    def __init__(self, *, channels: int, size: int, classes: int, directions: int) -> None:
        super().__init__()
        self.square = square_of(size)
        self.coarse = (channels, size // self.square, size // self.square)
        places, rows = math.prod(self.coarse), classes + 1
        directions = min(directions, places)
        self.register_buffer("mean", torch.zeros(channels, size, size))
        self.register_buffer("basis", torch.zeros(places, directions))
        self.register_buffer("centre", torch.zeros(rows, directions))
        self.register_buffer("variance", torch.zeros(rows, directions))
        self.register_buffer("rest", torch.ones(()))

    def _coarsened(self, x: Images) -> Tensor:
        """(batch, places): along the directions of length 1 that squares of pixels are."""
        return (F.avg_pool2d(x, self.square) * self.square if self.square > 1 else x).flatten(1)

    def _refined(self, coarse: Tensor) -> Images:
        """The images that lie there along those directions."""
        images = coarse.reshape(-1, *self.coarse)
        if self.square == 1:
            return images
        return F.interpolate(images, scale_factor=float(self.square), mode="nearest") / self.square

    @torch.no_grad()
    def fit(self, pictures: Iterable[tuple[Images, Labels | None]]) -> None:
        """Measure all of it, in batches of pictures in [-1, 1] and their labels."""
        parts, kinds = list[Tensor](), list[Tensor]()
        total = squares = torch.zeros((), dtype=torch.float64)
        for images, labels in pictures:
            parts.append(self._coarsened(images))
            kinds += [] if labels is None else [labels]
            total, squares = total + images.sum(0).double(), squares + images.square().sum(0).double()
        coarse = torch.cat(parts)
        count, mean = len(coarse), total / len(coarse)
        spread = float((squares / count - mean**2).sum())
        coarse -= self._coarsened(mean.float()[None])
        directions = min(self.basis.shape[1], count // PICTURES)
        basis, values = _principal(coarse, directions)
        along = coarse @ basis
        centre, variance = values.new_zeros(len(self.centre), directions), values.repeat(len(self.centre), 1)
        if kinds:
            centre[:-1], variance[:-1] = _by_class(along, torch.cat(kinds), len(self.centre) - 1)
        for name, value in (("basis", basis), ("centre", centre), ("variance", variance)):
            buffer = getattr(self, name)
            buffer.zero_()
            buffer[:, :directions] = value
        self.mean.copy_(mean)
        self.rest.fill_(max(LEAST, (spread - float(values.sum())) / max(1, mean.numel() - directions)))

    def forward(self, x: Images, log_snr: Tensor, cond: Labels | None = None) -> Images:
        """x0 as far as linear statistics know it, of noisy images at one level or one for each; never in bfloat16.

        Args:
            cond: (batch,) labels; None, or the number of classes, for no class.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            mean, basis = self.mean.to(x.dtype), self.basis.to(x.dtype)
            rows = slice(-1, None) if cond is None else cond
            centre, variance = self.centre[rows].to(x.dtype), self.variance[rows].to(x.dtype)
            alpha, sigma = alpha_sigma(log_snr.to(x.dtype), x)
            centred = x - alpha * mean
            others = alpha * self.rest / (alpha**2 * self.rest + sigma**2)
            a, s, rest = (value.reshape(-1, 1) for value in (alpha, sigma, others))
            along = self._coarsened(centred) @ basis
            found = centre + a * variance / (a**2 * variance + s**2) * (along - a * centre)
            return mean + others * centred + self._refined((found - rest * along) @ basis.T)


def _principal(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` directions in which rows differ most, as columns, and the variance along each."""
    if count == 0:
        return centred.new_zeros(centred.shape[1], 0), centred.new_zeros(0)
    with torch.random.fork_rng(devices=[]):
        # It begins with random directions; the same ones every time.
        torch.manual_seed(0)
        _, values, basis = torch.pca_lowrank(centred, q=min(count + 8, *centred.shape), center=False, niter=4)
    return basis[:, :count], values[:count] ** 2 / len(centred)


def _by_class(along: Tensor, labels: Labels, classes: int) -> tuple[Tensor, Tensor]:
    """The mean of each class along each direction, (classes, directions), and the mean variance around it.

    A mean of few pictures is mostly chance: it counts by how far its square is beyond that (James & Stein 1961). Where
    no class has two pictures nothing is known of that, and classes say nothing.
    """
    counts = torch.bincount(labels, minlength=classes)[:, None]
    if counts.max() < 2:
        return along.new_zeros(classes, along.shape[1]), along.square().mean(0)
    means = torch.zeros(classes, along.shape[1]).index_add_(0, labels, along) / counts.clamp(min=1)
    within = (along - means[labels]).square().sum(0) / (len(along) - int((counts > 0).sum()))
    centre = means * (1 - within / (counts * means.square()).clamp(min=LEAST)).clamp(min=0)
    return centre, (along - centre[labels]).square().mean(0)
