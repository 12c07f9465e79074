"""The families of models, by name: the one registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from snowmelt.config import Config
from snowmelt.device import Precision
from snowmelt.diffusion.denoiser import PREDICTS
from snowmelt.diffusion.loss import WEIGHTS
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.diffusion.schedules import SCHEDULES
from snowmelt.errors import choose
from snowmelt.models.base import Drawing, Learner, Model
from snowmelt.models.diffusion import DiffusionLearner, DiffusionModel
from snowmelt.models.optimizer import OPTIMIZERS
from snowmelt.seeds import generator


@dataclass(frozen=True)
class Family:
    """How to build the model of a configuration, and the learner of that model."""

    model: Callable[[Config, Precision], Model]
    learner: Callable[[Any], Learner]


MODELS: dict[str, Family] = {"diffusion": Family(DiffusionModel, DiffusionLearner)}


def build_model(config: Config, precision: Precision) -> Model:
    """The model of a configuration, its first weights drawn from the run's seed, on the device of `precision`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.training.seed, "weights").initial_seed())
        return choose(MODELS, config.model, "model").model(config, precision).to(precision.device)


def build_learner(config: Config, precision: Precision) -> Learner:
    """A learner with a fresh model."""
    return choose(MODELS, config.model, "model").learner(build_model(config, precision))


def check_names(config: Config) -> None:
    """Refuse a configuration whose model, schedule, prediction, weight or optimizer is not one of the known ones."""
    choose(MODELS, config.model, "model")
    choose(SCHEDULES, config.diffusion.schedule, "schedule")
    choose(PREDICTS, config.diffusion.predicts, "prediction")
    choose(WEIGHTS, config.diffusion.weight, "weight")
    choose(OPTIMIZERS, config.training.optimizer, "optimizer")


def check_drawing(drawing: Drawing) -> None:
    """Refuse an unknown sampler or schedule."""
    choose(SAMPLERS, drawing.sampler, "sampler")
    if drawing.schedule is not None:
        choose(SCHEDULES, drawing.schedule, "schedule")
