"""Training levels: how a batch's noise levels are drawn.

    stratified    one from each of `count` equal slices of the schedule's time, in random order
    uniform       each at a random time, by itself
    lognormal     ln(sigma / alpha) ~ N(-1.2, 1.2^2), EDM's
    logitnormal   time = sigmoid(N(0, 1)): more from the middle of the schedule
    importance    stratified, more from where the loss is large, each counted so much less

(Karras et al. 2022; Kingma et al. 2021, appendix I.1, for stratified times; Esser et al. 2024, arXiv:2403.03206, for
logit-normal; Nichol & Dhariwal 2021, section 3.3, for importance.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from snowmelt.diffusion.schedules import Schedule, slope
from snowmelt.shapes import Levels

LEVELS_STATE = "levels/"
"""What the names begin with of all that training levels ask a checkpoint to keep."""


class Drawn(NamedTuple):
    """Levels for a batch, a value for each picture."""

    log_snr: Levels
    density: Levels
    """How often the level is drawn, per unit of log-SNR, before any correction."""
    correction: Levels
    """What the loss is to be multiplied by: 1 on average, below 1 where a level was drawn too often on purpose."""
    place: Levels
    """In [0, 1]: the time, or the quantile, that was drawn."""


class TrainingLevels(Protocol):
    """Draws levels; may learn from the losses it is told."""

    def draw(self, count: int, rng: torch.Generator) -> Drawn:
        """Levels for `count` pictures."""
        ...

    def observe(self, drawn: Drawn, losses: Tensor) -> None:
        """Be told the (batch,) losses at the levels drawn."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put it back."""
        ...


def stratified_places(count: int, rng: torch.Generator) -> Levels:
    """One number from each of `count` equal slices of [0, 1], in random order.

    Every batch then sees all levels alike, which leaves less chance in the loss than free draws.
    """
    slices = torch.randperm(count, generator=rng, device=rng.device)
    return (slices + torch.rand(count, generator=rng, device=rng.device)) / count


def free_places(count: int, rng: torch.Generator) -> Levels:
    """`count` numbers from [0, 1), each by itself."""
    return torch.rand(count, generator=rng, device=rng.device)


def _normal_quantile(place: Levels) -> Levels:
    """Of the standard normal distribution; within +-5, where float32 still tells quantiles apart."""
    # Not every device has doubles; one that has need not wait for the CPU.
    inside = (place if place.device.type == "cuda" else place.cpu()).double().clamp(3e-7, 1 - 3e-7)
    return (math.sqrt(2) * torch.erfinv(2 * inside - 1)).to(place)


class Scheduled:
    """Levels of a schedule at random times."""

    def __init__(
        self,
        schedule: Schedule,
        places: Callable[[int, torch.Generator], Levels] = stratified_places,
        time_of: Callable[[Levels], Levels] = lambda place: place,
    ) -> None:
        self.schedule, self.places, self.time_of = schedule, places, time_of

    def draw(self, count: int, rng: torch.Generator) -> Drawn:
        """See `TrainingLevels`."""
        return self.at(self.places(count, rng))

    def at(self, place: Levels) -> Drawn:
        """The levels at given places."""

        def level(at: Tensor) -> Tensor:
            return self.schedule(self.time_of(at))

        return Drawn(level(place), 1 / slope(level, place), torch.ones_like(place), place)

    def observe(self, drawn: Drawn, losses: Tensor) -> None:
        """Learns nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Nothing."""


SLICES = 64
"""Of time, for importance."""
MEMORY = 0.98
"""Of the mean squared losses, for each time a slice is seen."""
SPREAD = 0.1
"""Share of the draws that stays even, so that every level is seen again and again."""


class Importance(Scheduled):
    """Times drawn in proportion to the root of the mean squared loss there; even until every slice was seen."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.squares = torch.zeros(SLICES, dtype=torch.float64)

    def shares(self) -> Tensor:
        """(SLICES,) the chance of each slice of time; sums to 1."""
        if (self.squares == 0).any():
            return torch.full((SLICES,), 1 / SLICES, dtype=torch.float64)
        size = self.squares.sqrt()
        return SPREAD / SLICES + (1 - SPREAD) * size / size.sum()

    def draw(self, count: int, rng: torch.Generator) -> Drawn:
        """See `TrainingLevels`: stratified along the distribution of the slices."""
        shares = self.shares()
        ends = shares.cumsum(0)
        quantile = stratified_places(count, rng).cpu().double()
        inside = torch.searchsorted(ends, quantile.clamp(max=float(ends[-1]) - 1e-12), right=True).clamp(max=SLICES - 1)
        part = (quantile - (ends - shares)[inside]) / shares[inside]
        place = ((inside + part.clamp(0, 1 - 1e-6)) / SLICES).to(rng.device, torch.float32)
        drawn = self.at(place)
        return drawn._replace(correction=(1 / (SLICES * shares[inside])).to(drawn.log_snr))

    def observe(self, drawn: Drawn, losses: Tensor) -> None:
        """Remember the squares of `losses`, slice by slice, in order."""
        inside = (drawn.place * SLICES).long().clamp(max=SLICES - 1).cpu()
        for index, square in zip(inside.tolist(), losses.detach().cpu().double().square(), strict=True):
            old = self.squares[index]
            self.squares[index] = square if old == 0 else MEMORY * old + (1 - MEMORY) * square

    def tensors(self) -> dict[str, Tensor]:
        """The mean squares."""
        return {f"{LEVELS_STATE}squares": self.squares}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        self.squares = tensors[f"{LEVELS_STATE}squares"].clone()


def lognormal(_schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> Scheduled:
    """Levels whose ln(sigma / alpha) is normal, whatever the schedule."""
    return Scheduled(lambda place: -2 * (mean + std * _normal_quantile(place)))


def logitnormal(schedule: Schedule, mean: float = 0.0, std: float = 1.0) -> Scheduled:
    """Levels of the schedule at times whose logit is normal."""
    return Scheduled(schedule, time_of=lambda place: torch.sigmoid(mean + std * _normal_quantile(place)))


LEVELS: dict[str, Callable[[Schedule], TrainingLevels]] = {
    "stratified": Scheduled,
    "uniform": lambda schedule: Scheduled(schedule, free_places),
    "lognormal": lognormal,
    "logitnormal": logitnormal,
    "importance": Importance,
}
