"""Denoisers that are exact, for data whose answer is known: oracles for tests, and a look at the ideal.

Gaussian data N(mean, std^2):  E[x0 | x] = (std^2 alpha x + sigma^2 mean) / (alpha^2 std^2 + sigma^2)
a finite set of images:        E[x0 | x] = sum_i softmax_i(-|x - alpha x_i|^2 / (2 sigma^2)) x_i
a mixture of Gaussians:        E[x0 | x] = sum_k p(k | x) E[x0 | x, k],
                               p(k | x) proportional to w_k N(x; alpha m_k, alpha^2 s_k^2 + sigma^2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.shapes import Images


def gaussian_denoiser(mean: Tensor, std: Tensor) -> Denoise:
    """The exact denoiser of independent Gaussian pixels; `mean` and `std` broadcast over images."""

    def denoise(x: Images, log_snr: Tensor) -> Images:
        alpha, sigma = alpha_sigma(log_snr, x)
        return (std**2 * alpha * x + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)

    return denoise


def dataset_denoiser(images: Images) -> Denoise:
    """The exact denoiser of a finite set of images, at one level for the whole batch: what memorizing them tends to."""

    def denoise(x: Images, log_snr: Tensor) -> Images:
        alpha, sigma = alpha_sigma(log_snr, x)
        distance = torch.cdist(x.flatten(1), alpha * images.flatten(1))
        share = torch.softmax(-(distance**2) / (2 * sigma**2), dim=1)
        return torch.einsum("bi,ichw->bchw", share, images)

    return denoise


@dataclass(frozen=True)
class GaussianMixture:
    """Data drawn from a mixture of Gaussians with independent pixels: everything about it is known at every level.

    Computes in the precision of the images it is asked about, so float64 images give float64 answers.
    """

    weights: Tensor
    """(components,) the share of each; they sum to 1."""
    means: Tensor
    """(components, channels, height, width), or any other shape of image."""
    stds: Tensor
    """Above 0: (components,) one for all pixels of a component, or as `means` one for each pixel."""

    def denoise(self, x: Images, log_snr: Tensor) -> Images:
        """E[x0 | x] at `log_snr` (one level, or one for each image): a `Denoise`."""
        share, each, _ = self._components(x, log_snr)
        return (share.reshape(*share.shape, *[1] * (x.ndim - 1)) * each).sum(1)

    def log_density(self, x: Images, log_snr: Tensor) -> Tensor:
        """log p(x) at `log_snr` in nats, (batch,); at a level of infinity that of the clean images."""
        return self._components(x, log_snr)[2]

    def sample(self, count: int, rng: torch.Generator) -> Images:
        """Clean images, on the device of `rng`, in the precision of `means`."""
        means, stds = self._parameters(self.means.to(rng.device))
        number = torch.multinomial(self.weights.to(rng.device), count, replacement=True, generator=rng)
        noise = torch.randn(means[number].shape, generator=rng, device=rng.device, dtype=means.dtype)
        return means[number] + stds[number] * noise

    def _parameters(self, like: Tensor) -> tuple[Tensor, Tensor]:
        means, stds = self.means.to(like), self.stds.to(like)
        return means, stds.reshape(-1, *[1] * (means.ndim - 1)) if stds.ndim == 1 else stds

    def _components(self, x: Images, log_snr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(k | x), (batch, components); E[x0 | x, k], (batch, components, ...); and log p(x), (batch,)."""
        alpha, sigma = alpha_sigma(log_snr.to(x).reshape(-1), x[:, None])
        means, stds = self._parameters(x)
        centred, variance = x[:, None] - alpha * means, alpha**2 * stds**2 + sigma**2
        # One logarithm stands for all pixels that have the same variance.
        logs = torch.log(2 * math.pi * variance).flatten(2)
        log_determinant = logs.sum(2) * (means[0].numel() / logs.shape[2])
        log_joint = self.weights.to(x).log() - ((centred**2 / variance).flatten(2).sum(2) + log_determinant) / 2
        each = means + alpha * stds**2 / variance * centred
        return torch.softmax(log_joint, 1), each, torch.logsumexp(log_joint, 1)
