"""The two contracts that every family of models meets: a model draws pictures, a learner improves it.

The training loop, the verbs and the previews know only these, so they have no branch for a family.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.samplers import NoiseSource, Step
from snowmelt.shapes import Labels


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; a family reads what applies to it."""

    sampler: str = "ddim"
    """A name of `SAMPLERS`."""
    steps: int = 50
    """Evaluations of the network for each picture."""
    guidance: float = 1.0
    """Scale of classifier-free guidance: 1 is none."""
    schedule: str | None = None
    """The schedule whose times the levels are spaced by; none: the one of the training."""


class Model(nn.Module, abc.ABC):
    """Draws pictures; a module, whose weights a checkpoint holds.

    Attributes:
        precision: where and in which number format it computes.
    """

    precision: Precision

    @abc.abstractmethod
    def sample(self, noise: NoiseSource, labels: Labels | None, drawing: Drawing) -> Iterator[Step]:
        """From noise to pictures; the `x0` of the last step is the result, in [-1, 1].

        Args:
            noise: by step; its step 0 is where the pictures start.
            labels: a class for each picture, or None to draw without classes.
        """


class Update(NamedTuple):
    """What one step of a learner did."""

    losses: dict[str, float]
    """By name; "loss" is the one that is shown."""
    finite: bool
    """False when a loss or gradient was not finite; the weights were then left as they were."""


@runtime_checkable
class Learner(Protocol):
    """Improves a model by batches."""

    @property
    def model(self) -> Model:
        """The model under training."""
        ...

    @property
    def averaged(self) -> nn.Module:
        """The part of the model whose running average is kept and sampled from."""
        ...

    def update(self, batch: Batch, rng: torch.Generator, learning_rate: float) -> Update:
        """One optimizer step; all chance comes from `rng`."""
        ...

    def held_out(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Errors on pictures never trained on, each a tensor of (batch,) values, by name."""
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, by names that contain the parameters' names."""
        ...

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `optimizer_tensors` gave."""
        ...
