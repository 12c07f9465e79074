"""Samplers against a mixture of Gaussians whose every answer is known: order of convergence, and moments reached.

    python benchmarks/samplers.py [--write docs/samplers.md]      (about three minutes)

prints two tables, or puts them into the page between its markers. A deterministic sampler is compared with the path
that an adaptive solver of order 8 finds at a tolerance of 1e-12; its order is the slope of the error over the number
of steps. A stochastic one has no path to compare: it must reach mean and covariance of the data, which `moments`
gives in standard errors of the number of draws.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from snowmelt.diffusion.exact import GaussianMixture
from snowmelt.diffusion.grids import GRIDS
from snowmelt.diffusion.noise import alpha_sigma
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import SAMPLED_ON, SCHEDULES
from snowmelt.shapes import Grid, Images

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    torch.tensor([[-0.6, 0.4], [0.5, 0.1], [0.1, -0.7]], dtype=torch.float64).reshape(3, 1, 1, 2),
    torch.tensor([0.35, 0.3, 0.4], dtype=torch.float64),
)
"""Pictures of two pixels, three kinds of them."""
PATHS = [name for name in SCHEDULES if name not in SAMPLED_ON and name != "scaled_linear"]
"""Schedules on which orders are measured; scaled_linear ends long before noise, where no sampler can begin."""


def starts(count: int, seed: int = 0) -> Images:
    """Pure noise to start from."""
    return torch.randn(count, 1, 1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise(number: int) -> Images:
    """For samplers that must not ask."""
    raise AssertionError(f"a deterministic sampler asked for noise {number}")


@cache
def exact_ending(first: float, last: float) -> Images:
    """Where the probability-flow ODE leads `starts(16)` from level `first` to `last`; kept for levels that are equal.

    With L = log_snr / 2:  dx / dL = alpha sigma^2 x0 - sigma alpha^2 noise.
    """
    x = starts(16)

    def change(half: float, flat: Tensor) -> Tensor:
        now, level = torch.as_tensor(flat).reshape(x.shape), torch.tensor(2 * half, dtype=torch.float64)
        alpha, sigma = alpha_sigma(level, now)
        x0 = MIXTURE.denoise(now, level)
        return (alpha * sigma**2 * x0 - alpha**2 * (now - alpha * x0)).flatten()

    solution = solve_ivp(change, (first / 2, last / 2), x.flatten().numpy(), "DOP853", rtol=1e-12, atol=1e-13)
    return torch.as_tensor(solution.y[:, -1]).reshape(x.shape)


def error(sampler: str, grid: Grid) -> float:
    """Largest distance from the exact path at the last level."""
    *_, last = SAMPLERS[sampler](MIXTURE.denoise, starts(16), grid, no_noise)
    return float((last.x - exact_ending(round(float(grid[0]), 12), round(float(grid[-1]), 12))).abs().max())


def slope(sampler: str, schedule: str, spacing: str, steps: Sequence[int]) -> float:
    """The order of convergence over `steps`: minus the slope of log error over log steps, by least squares."""
    errors = [error(sampler, GRIDS[spacing](SCHEDULES[schedule], count)) for count in steps]
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = -torch.tensor(errors, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def moments(sampler: str, grid: Grid, count: int = 20_000) -> float:
    """How far mean and covariance of `count` draws are from those of the data at the last level.

    In standard errors, of the worst of the two means and three covariances.
    """
    *_, last = SAMPLERS[sampler](MIXTURE.denoise, starts(count), grid, lambda number: starts(count, seed=number))
    alpha, sigma = (float(scale) for scale in alpha_sigma(grid[-1], grid))
    drawn, means, weights = last.x.flatten(1), MIXTURE.means.flatten(1), MIXTURE.weights
    mean = weights @ means
    within = torch.eye(2, dtype=torch.float64) * (weights @ MIXTURE.stds**2)
    covariance = alpha**2 * (within + (means - mean).T @ torch.diag(weights) @ (means - mean)) + sigma**2 * torch.eye(2)
    centred = drawn - alpha * mean
    products = (centred[:, :, None] * centred[:, None, :]).flatten(1)
    values = torch.cat([centred, products - covariance.flatten()], dim=1)
    return float((values.mean(0).abs() / values.std(0) * math.sqrt(count)).max())


def orders_table(steps: Sequence[int] = (256, 512)) -> list[str]:
    """Markdown: the measured order of every deterministic sampler on its own grid."""
    paths = [(name, method) for name, method in SAMPLERS.items() if method.order is not None]
    rows = [f"| sampler | order | {' | '.join(PATHS)} |", "|---|---:|" + "---:|" * len(PATHS)]
    for name, method in paths:
        measured = [f"{slope(name, schedule, method.grid, steps):.2f}" for schedule in PATHS]
        rows.append(f"| `{name}` | {method.order} | {' | '.join(measured)} |")
    return rows


def moments_table(steps: int = 400) -> list[str]:
    """Markdown: the deviation of every stochastic sampler on its own grid, in standard errors."""
    rows = [f"| sampler | {' | '.join(PATHS)} |", "|---|" + "---:|" * len(PATHS)]
    for name, method in SAMPLERS.items():
        if method.order is None:
            found = [f"{moments(name, GRIDS[method.grid](SCHEDULES[schedule], steps)):.1f}" for schedule in PATHS]
            rows.append(f"| `{name}` | {' | '.join(found)} |")
    return rows


def put(page: Path, name: str, rows: list[str]) -> None:
    """Write the table between the page's markers of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    page.write_text(before + begin + "\n".join(rows) + "\n" + end + after, encoding="utf-8")


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a page with the markers of the tables")
    page = parser.parse_args().write
    for name, rows in (("orders", orders_table()), ("moments", moments_table())):
        if page is None:
            print("\n".join(rows) + "\n")
        else:
            put(page, name, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
