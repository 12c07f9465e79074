"""Denoisers that are exact, for data whose answer is known: oracles for tests, and a look at the ideal.

Gaussian data N(mean, std^2):  E[x0 | x] = (std^2 alpha x + sigma^2 mean) / (alpha^2 std^2 + sigma^2)
a finite set of images:        E[x0 | x] = sum_i softmax_i(-|x - alpha x_i|^2 / (2 sigma^2)) x_i
"""

from __future__ import annotations

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
