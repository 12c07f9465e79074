"""How often does the interval of a number hold its floor, where real and generated pictures are of one distribution?

    python benchmarks/intervals.py --counts 50 200 1000 5000 --draws 200

The judged share is 93 % of the draws, for every number, count and distribution. A draw is a fresh pair of sets and a
whole measurement of it with the default draws, as `snowmelt evaluate` takes it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from snowmelt.data.workers import cores
from snowmelt.evaluation.metrics import OF_FEATURES
from snowmelt.evaluation.statistics import measure
from snowmelt.seeds import generator

AXES, CLUSTERS = 64, 10
JUDGED = 0.93


def gaussian(rng: torch.Generator, count: int, dimension: int) -> Tensor:
    """Axes of unequal lengths, from 1 down to 0.1."""
    return torch.randn(count, dimension, generator=rng) * torch.linspace(1, 0.1, dimension)


def clusters(rng: torch.Generator, count: int, dimension: int) -> Tensor:
    """Ten classes, each a Gaussian of its own."""
    middles = 2 * torch.randn(CLUSTERS, dimension, generator=generator(0, "middles", dimension))
    return middles[torch.randint(CLUSTERS, (count,), generator=rng)] + gaussian(rng, count, dimension)


def heavy(rng: torch.Generator, count: int, dimension: int) -> Tensor:
    """Student's t with 3 degrees of freedom: now and then a picture is far away."""
    scale = torch.randn(count, 3, generator=rng).square().mean(1, keepdim=True).sqrt()
    return torch.randn(count, dimension, generator=rng) / scale


def rectified(rng: torch.Generator, count: int, dimension: int) -> Tensor:
    """Features as networks give them: many exactly 0."""
    return (clusters(rng, count, dimension) - 0.5).relu()


DISTRIBUTIONS: dict[str, Callable[[torch.Generator, int, int], Tensor]] = {
    "gaussian": gaussian,
    "clusters": clusters,
    "heavy": heavy,
    "rectified": rectified,
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    counts: tuple[int, ...] = (50, 200, 1000, 5000)
    """Pictures a side."""
    distributions: tuple[str, ...] = tuple(DISTRIBUTIONS)
    dimension: int = AXES
    draws: int = 200
    processes: int = 0
    """0 for as many as there are cores."""


def holds(name: str, count: int, dimension: int, number: int) -> dict[str, bool | None]:
    """Whether each number's interval holds its floor in one draw; None where there is no number."""
    torch.set_num_threads(1)
    rng = generator(number, f"intervals, {name}", count)
    real, other = (DISTRIBUTIONS[name](rng, count, dimension) for _ in range(2))
    figures = measure(real, other, "benchmark", seed=number)
    return {
        one.metric: None
        if one.low is None or one.high is None or one.floor is None
        else one.low <= one.floor <= one.high
        for one in figures
    }


def main(options: Options) -> None:
    """Measure every cell and print the shares."""
    names = tuple(OF_FEATURES)
    table = Table("distribution", "a side", *names, "seconds", title=f"{options.draws} draws, {options.dimension} axes")
    screen, known = Console(width=140), list[float]()
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes or cores()) as pool:
        for name in options.distributions:
            for count in options.counts:
                begin = time.monotonic()
                found = pool.map(partial(holds, name, count, options.dimension), range(options.draws), chunksize=1)
                shares = [share([draw[metric] for draw in found]) for metric in names]
                known += [one for one in shares if one is not None]
                words = ["too few" if one is None else f"{one:.1%}" for one in shares]
                row = [name, f"{count:,}", *words, f"{time.monotonic() - begin:.0f}"]
                table.add_row(*row)
                screen.print(" · ".join(row))
    screen.print(table)
    below = sum(one < JUDGED for one in known)
    screen.print(f"{len(known)} shares, the lowest {min(known, default=0):.1%}; {below} below the judged {JUDGED:.0%}")


def share(held: list[bool | None]) -> float | None:
    """The share of draws; None where there is no number in any."""
    known = [one for one in held if one is not None]
    return sum(known) / len(known) if known else None


if __name__ == "__main__":
    main(tyro.cli(Options))
