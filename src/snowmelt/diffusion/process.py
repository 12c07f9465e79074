"""The diffusion process as DDPM writes it: T small steps of Gaussian noise, in the paper's symbols.

    q(x_t | x_t-1)      = N(sqrt(1 - beta_t) x_t-1, beta_t I)
    q(x_t | x_0)        = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I),   alpha_bar_t = prod_s<=t (1 - beta_s)
    q(x_t-1 | x_t, x_0) = N(mu_tilde, beta_tilde_t I)

A reader who knows the textbook starts here. The rest of Snowmelt says the same with one number for a level,
log_snr = log(alpha_bar / (1 - alpha_bar)); the tests tie the two together. (Ho et al. 2020, arXiv:2006.11239.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """DDPM's table of betas: `steps` values rising linearly; float64, shape (steps,)."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def alpha_bars(betas: Tensor) -> Tensor:
    """alpha_bar_t = prod_s<=t (1 - beta_s): the share of the picture's variance left at each step."""
    return torch.cumprod(1 - betas, dim=0)


def log_snr_table(betas: Tensor) -> Tensor:
    """The log-SNR of every step of a table of betas, falling: log alpha_bar_t - log(1 - alpha_bar_t)."""
    alpha_bar = alpha_bars(betas)
    return torch.log(alpha_bar) - torch.log1p(-alpha_bar)


def forward_step(x: Tensor, beta: float | Tensor, noise: Tensor) -> Tensor:
    """x_t from x_t-1: a draw of q(x_t | x_t-1), equation 2 of the paper."""
    beta = torch.as_tensor(beta, dtype=x.dtype)
    return (1 - beta).sqrt() * x + beta.sqrt() * noise


def forward_jump(x0: Tensor, alpha_bar: float | Tensor, noise: Tensor) -> Tensor:
    """x_t from x_0 in one jump: a draw of q(x_t | x_0), equation 4."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=x0.dtype)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def x0_from_noise(x: Tensor, alpha_bar: float | Tensor, noise: Tensor) -> Tensor:
    """x_0 from x_t and the noise that was added: the jump solved for x_0."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=x.dtype)
    return (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


def posterior(
    x0: Tensor, x: Tensor, *, beta: float | Tensor, alpha_bar: float | Tensor, alpha_bar_previous: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_t-1 | x_t, x_0), equations 6 and 7; the variance is beta_tilde_t."""
    beta, alpha_bar, previous = (torch.as_tensor(a, dtype=x.dtype) for a in (beta, alpha_bar, alpha_bar_previous))
    mean = (previous.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - previous) * x) / (1 - alpha_bar)
    return mean, (1 - previous) / (1 - alpha_bar) * beta


def reverse_mean(x: Tensor, noise: Tensor, *, beta: float | Tensor, alpha_bar: float | Tensor) -> Tensor:
    """Mean of p(x_t-1 | x_t) for a predicted `noise`, equation 11."""
    beta, alpha_bar = (torch.as_tensor(a, dtype=x.dtype) for a in (beta, alpha_bar))
    return (x - beta / (1 - alpha_bar).sqrt() * noise) / (1 - beta).sqrt()
