"""The two contracts that every family of models meets: a model draws pictures, a learner improves it.

The training loop, the verbs and the previews know only these, so they have no branch for a family.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from snowmelt.config import DataConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.walk import NoiseSource, Step
from snowmelt.shapes import Features, Images, Labels, Levels


def finished(noise: Images, pictures: Images) -> Step:
    """The only step of a family that draws at once: pictures without any noise left."""
    return Step(noise, torch.tensor(torch.inf), pictures)


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; a family reads what applies to it."""

    sampler: str = "dpmpp_2m_late"
    """A name of `SAMPLERS`."""
    eta: float | None = None
    """How much fresh noise its steps draw, from 0 (none) to 1 (as much as DDPM); none: as the sampler's name says."""
    steps: int = 15
    """Levels at which the network is asked, by most samplers once."""
    schedule: str | None = None
    """The schedule that the levels are taken from; none: the one of the training."""
    spacing: str | None = None
    """A name of `GRIDS`: how they are spaced; none: as the sampler's `Method` says."""
    levels: tuple[float, ...] = ()
    """The levels themselves, as rising log-SNRs, in the place of all that."""
    mean_first: bool = False
    """Whether the answer at the first level, one more, is the mean of the pictures or of the class."""
    variance: str | None = None
    """A name of `VARIANCES`, or "analytic" or "learned": how much fresh noise DDPM's steps draw."""
    guidance: float = 1.0
    """How far to go in the direction of guidance: 1 is none."""
    guide: str = "classifier_free"
    """A name of `GUIDANCES`: how to go there."""
    away_from: str = "no_class"
    """From which estimate: "no_class", or "early": that of an early state of the same run, which needs no classes."""
    guidance_range: tuple[float, float] | None = None
    """The log-SNRs between which guidance is at work; none: everywhere."""
    guidance_rescale: float = 0.0
    """Share by which the contrast that guidance adds is taken back."""
    threshold: str = "clamp"
    """A name of `THRESHOLDS`: what keeps the estimate where pictures are."""

    @staticmethod
    def of(options: object) -> Drawing:
        """The drawing that a verb's options, fields of the same names, ask for; what is None there is as usual."""
        asked = {field.name: getattr(options, field.name) for field in fields(Drawing)}
        return Drawing(**{name: value for name, value in asked.items() if value is not None})

    @property
    def count(self) -> int:
        """Levels that are visited."""
        return len(self.levels) or self.steps + self.mean_first

    @property
    def answers(self) -> int:
        """How often most samplers ask the network: `steps`, or as many as the levels leave."""
        return self.count - self.mean_first

    def as_dict(self) -> dict[str, Any]:
        """What differs from plain drawing, and the sampler and steps, as JSON has it."""
        plain = Drawing()
        chosen: dict[str, Any] = {"sampler": self.sampler} | ({} if self.levels else {"steps": self.steps})
        for field in fields(Drawing):
            value = getattr(self, field.name)
            if value != getattr(plain, field.name):
                chosen[field.name] = list(value) if isinstance(value, tuple) else value
        return chosen


class Model(nn.Module, abc.ABC):
    """Draws pictures; a module, whose weights a checkpoint holds.

    Attributes:
        precision: where and in which number format it computes.
        at_once: whether pictures are made in a single step, so that no setting of a `Drawing` applies.
        foreseen: whether the course of its held-out loss says what longer training would bring.
    """

    precision: Precision
    at_once: ClassVar[bool] = False
    foreseen: ClassVar[bool] = False

    @property
    def compilable(self) -> nn.Module | None:
        """The part that does nearly all of the work in training, where compiling or recording can make it faster."""
        return None

    def study(self, pictures: Iterable[Batch]) -> None:
        """Take from some training pictures, on the CPU, what is to be known of them before training begins: mostly
        nothing, and then they are not asked for."""
        del pictures

    @abc.abstractmethod
    def sample(self, noise: NoiseSource, labels: Labels | None, drawing: Drawing) -> Iterator[Step]:
        """From noise to pictures; the `x0` of the last step is the result, in [-1, 1].

        Args:
            noise: by step; its step 0 is where the pictures start.
            labels: a class for each picture, or None to draw without classes.
        """

    def shows(self, noise: NoiseSource, held_out: Batch) -> dict[str, list[Images]]:
        """What only this family can show, such as reconstructions, by name: the columns of a strip, row by row.

        Args:
            noise: for as many pictures as there are in `held_out`.
        """
        del noise, held_out
        return {}

    def bits(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Bits/dim that the model needs for each picture, (batch,), at most: "bound", and its parts by name.

        Nothing where a family has no likelihood, such as a GAN, or where it takes more than a call (diffusion models:
        `snowmelt.diffusion.likelihood`).
        """
        del batch, rng
        return {}


def latents_of(noise: NoiseSource, count: int) -> Features:
    """(batch, count) standard normal values, from as much of the pictures' own noise as that takes."""
    parts, have = list[Tensor](), 0
    while have < count:
        parts.append(noise(len(parts)).flatten(1))
        have += parts[-1].shape[1]
    return torch.cat(parts, dim=1)[:, :count]


def classes_of(data: DataConfig, normal: Levels) -> Labels:
    """A class for each standard normal number, as often as the training pictures have it.

    A picture of a random class is a picture without a given class, p(x) = sum_c p(c) p(x | c); it is better than what
    a network draws that is told nothing.
    """
    counts = torch.tensor(data.counts or (1,) * len(data.classes), dtype=torch.float64)
    edges = (counts.cumsum(0) / counts.sum()).to(normal)[:-1]
    return torch.bucketize(torch.special.ndtr(normal), edges, right=True)


def count_parameters(*modules: nn.Module) -> int:
    """How many numbers training changes in them."""
    return sum(weight.numel() for module in modules for weight in module.parameters())


class Update(NamedTuple):
    """What one step of a learner did."""

    losses: Mapping[str, float | Tensor]
    """By name; "loss" is the one that is shown. A tensor is on a GPU, which has perhaps not made it yet."""
    finite: bool | Tensor
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

    @property
    def parameters(self) -> int:
        """Numbers that training changes, in all of the networks that it needs."""
        ...

    def update(self, batch: Batch, rng: torch.Generator, learning_rate: float) -> Update:
        """One optimizer step; all chance comes from `rng`."""
        ...

    def held_out(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Errors on pictures never trained on, each a tensor of (batch,) values, by name.

        "held_out_loss" among them is what training makes smaller, and tells whether pictures are learned by heart.
        """
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """All that resuming needs beside the model: the optimizer's state, and networks that only training uses."""
        ...

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `optimizer_tensors` gave."""
        ...
