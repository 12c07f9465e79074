"""The diffusion process as DDPM writes it: T small steps of Gaussian noise, and the bound that training lowers.

    q(x_t | x_t-1)      = N(sqrt(1 - beta_t) x_t-1, beta_t I)
    q(x_t | x_0)        = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I),   alpha_bar_t = prod_s<=t (1 - beta_s)
    q(x_t-1 | x_t, x_0) = N(mu_tilde, beta_tilde_t I)
    p(x_t-1 | x_t)      = N(mu(x_t, noise_hat), variance)
    -log p(x_0)        <= L_T + sum_t>1 L_t-1 + L_0,   L_t-1 = KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t))

A reader who knows the textbook starts here. The rest of Snowmelt says the same with one number for a level,
log_snr = log(alpha_bar / (1 - alpha_bar)); the tests tie the two together. (Ho et al. 2020, arXiv:2006.11239.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from snowmelt.errors import UserError

COLOURS = 256
"""Values a stored pixel can take, evenly spaced over [-1, 1]."""
HALF_BIN = 1 / (COLOURS - 1)
"""Half of the distance between two of them, and so of the bin of each."""


def check_betas(betas: Tensor) -> Tensor:
    """The table itself, when it is one.

    Raises:
        UserError: fewer than two steps; a beta outside (0, 1), but for a last one of 1, which leaves pure noise.
    """
    if betas.ndim != 1 or len(betas) < 2:
        raise UserError(f"A table of betas has shape {tuple(betas.shape)}; give at least 2 in a row.")
    fine = (betas > 0) & (betas < 1)
    fine[-1] |= betas[-1] == 1
    if not fine.all():
        step = int((~fine).nonzero()[0])
        raise UserError(
            f"Step {step + 1} of {len(betas)} has beta {betas[step].item():g}; give numbers between 0 and 1, "
            "of which the last may be 1."
        )
    return betas


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """DDPM's table of betas: `steps` values rising linearly; float64, shape (steps,)."""
    return check_betas(torch.linspace(first, last, steps, dtype=torch.float64))


def scaled_linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Betas whose square roots rise linearly (Rombach et al. 2022, arXiv:2112.10752: from 0.00085 to 0.012)."""
    return check_betas(torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64) ** 2)


def cosine_betas(steps: int = 1000, largest: float = 0.999) -> Tensor:
    """Betas for an alpha_bar that is cos^2 of an evenly growing angle, cut off at `largest`.

    (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17; "squaredcos_cap_v2" elsewhere.)
    """
    angle = torch.linspace(0, 1, steps + 1, dtype=torch.float64).add(0.008).mul(math.pi / 2 / 1.008)
    alpha_bar = torch.cos(angle) ** 2
    return check_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest))


def sigmoid_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Betas along a logistic curve from -6 to 6 (Xu et al. 2022, "GeoDiff", arXiv:2203.02923)."""
    rise = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64))
    return check_betas(first + (last - first) * rise)


BETAS: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}
"""Tables by name: steps -> betas."""


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The table stretched so that nothing of the picture is left at the end: its last beta is 1.

    sqrt(alpha_bar) is shifted to end at 0 and scaled to begin where it did (Lin et al. 2023, arXiv:2305.08891,
    algorithm 1). From pure noise no picture follows by `x0_from_noise` or `reverse_mean`: predict the picture or v.
    """
    root = alpha_bars(check_betas(betas)).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    ratio = root[1:] / root[:-1]
    return torch.cat([1 - root[:1] ** 2, 1 - ratio**2])


def alpha_bars(betas: Tensor) -> Tensor:
    """alpha_bar_t = prod_s<=t (1 - beta_s): the share of the picture's variance left at each step."""
    return torch.cumprod(1 - betas, dim=0)


def log_snr_table(betas: Tensor) -> Tensor:
    """The log-SNR of every step of a table of betas, falling: log alpha_bar_t - log(1 - alpha_bar_t)."""
    alpha_bar = alpha_bars(betas)
    return torch.log(alpha_bar) - torch.log1p(-alpha_bar)


class Moment(NamedTuple):
    """What the process knows of step t; each a number, or a tensor that broadcasts over x."""

    beta: Tensor
    alpha_bar: Tensor
    alpha_bar_previous: Tensor
    """alpha_bar_t-1; 1 before the first step."""


def moment(betas: Tensor, t: int) -> Moment:
    """Step `t` of a table, counted from 1 as in the paper."""
    alpha_bar = alpha_bars(betas)
    return Moment(betas[t - 1], alpha_bar[t - 1], alpha_bar[t - 2] if t > 1 else torch.ones_like(alpha_bar[0]))


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


def forward_variance(at: Moment) -> Tensor:
    """beta_t: the variance of p(x_t-1 | x_t) that is right when the data are standard normal (section 3.2)."""
    return at.beta


def posterior_variance(at: Moment) -> Tensor:
    """beta_tilde_t: the variance that is right when the data are one picture (section 3.2)."""
    return (1 - at.alpha_bar_previous) / (1 - at.alpha_bar) * at.beta


def analytic_variance(at: Moment, x0_variance: Tensor) -> Tensor:
    """The variance with the smallest bound: beta_tilde_t and what is not known of the mean.

    Args:
        x0_variance: Var(x_0 | x_t), or its average over x_t (Bao et al. 2022, arXiv:2201.06503, equation 6).
    """
    share = at.alpha_bar_previous.sqrt() * at.beta / (1 - at.alpha_bar)
    return posterior_variance(at) + share**2 * x0_variance


def learned_variance(at: Moment, share: Tensor) -> Tensor:
    """exp(v log beta_t + (1 - v) log beta_tilde_t) for the network's `share` v of each pixel, in [0, 1].

    (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15.) At the first step beta_tilde is 0: see `data_term`.
    """
    return at.beta**share * posterior_variance(at) ** (1 - share)


def gaussian_kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)) of each pixel, in nats."""
    ratio = variance / other_variance
    return (ratio - 1 - ratio.log() + (mean - other_mean) ** 2 / other_variance) / 2


def prior_term(x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, 1)) of each pixel, in nats."""
    zero = torch.zeros_like(x0)
    return gaussian_kl(alpha_bar.sqrt() * x0, 1 - alpha_bar, zero, zero + 1)


def step_term(x0: Tensor, x: Tensor, noise: Tensor, at: Moment, variance: Tensor) -> Tensor:
    """L_t-1 = KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)) of each pixel, in nats, for t > 1.

    Args:
        noise: what was predicted to be in `x`.
        variance: of p(x_t-1 | x_t): one of the four above.
    """
    beta, alpha_bar, previous = at
    mean, true_variance = posterior(x0, x, beta=beta, alpha_bar=alpha_bar, alpha_bar_previous=previous)
    # This is `reverse_mean`, in the form whose roundings cancel against those of the posterior's mean.
    x0_hat = x0_from_noise(x, alpha_bar, noise)
    guessed, _ = posterior(x0_hat, x, beta=beta, alpha_bar=alpha_bar, alpha_bar_previous=previous)
    return gaussian_kl(mean, true_variance, guessed, variance)


def data_term(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """L_0 = -log p(x_0 | x_1) of each pixel, in nats: the Gaussian of `mean` and `std` in the bin of x_0, equation 13.

    The bins of the 256 values of [-1, 1] are 2/255 wide, and the outermost go on without end, so they share out all
    of the probability. Exact in the tails too, where a difference of two distribution functions would be 0.
    """
    low = torch.where(x0 < HALF_BIN - 1, -torch.inf, (x0 - HALF_BIN - mean) / std)
    high = torch.where(x0 > 1 - HALF_BIN, torch.inf, (x0 + HALF_BIN - mean) / std)
    # Seen from the other side when the bin is above the mean: the left tail is the one with digits to spare.
    above = low + high > 0
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    upper = torch.special.log_ndtr(high)
    return -upper - torch.log(-torch.expm1(torch.special.log_ndtr(low) - upper))


def noise_weight(at: Moment, variance: Tensor) -> Tensor:
    """beta^2 / (2 variance (1 - beta) (1 - alpha_bar)): what turns the squared error of the noise into L_t-1.

    Up to a constant that the prediction cannot change, and which is 0 for the variance beta_tilde_t (equation 12).
    """
    return at.beta**2 / (2 * variance * (1 - at.beta) * (1 - at.alpha_bar))


def simple_loss(noise: Tensor, predicted: Tensor) -> Tensor:
    """L_simple, equation 14: the bound's noise error with every weight 1; the mean over all pixels, a scalar."""
    return ((noise - predicted) ** 2).mean()
