"""The one dial: from the pictures and the machine to a whole configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from snowmelt.config import Config, DataConfig, GANConfig, TrainingConfig, UNetConfig, VAEConfig
from snowmelt.errors import UserError, choose
from snowmelt.terminal import seconds_of

if TYPE_CHECKING:
    from snowmelt.data.prepared import Prepared

WIDTHS: tuple[tuple[int, UNetConfig], ...] = (
    # up to this size: the network. Small maps are cheap, so small pictures can afford more channels.
    (12, UNetConfig(channels=(32, 64), attention=(False, True))),
    (40, UNetConfig(channels=(32, 64, 64), attention=(False, False, True))),
    # Larger ones enter in squares of pixels, so that the widest map stays about as large as those above.
    (80, UNetConfig(channels=(32, 64, 128), attention=(False, False, True), patch=2)),
    (1024, UNetConfig(channels=(64, 96, 128), attention=(False, False, True), patch=4)),
)

SHORTEST = 30.0
"""Seconds of training; less leaves no time to train in, next to starting up and drawing the final pictures."""
DEFAULT_SECONDS = 600.0
FLATTEST = 1e-6
"""Standard deviation of pictures that are all of one colour, as far as a model is concerned."""


def facts_of(data: Prepared) -> DataConfig:
    """What a model is told of its training pictures."""
    counts: tuple[int, ...] = ()
    if data.labels is not None:
        labels = data.labels[data.train].tolist()
        counts = tuple(labels.count(label) for label in range(len(data.classes)))
    std = max(FLATTEST, round(data.std, 6))
    return DataConfig(data.size, data.channels, data.classes, counts, std, data.fingerprint)


def check_length(steps: int | None, duration: str | None) -> None:
    """Refuse a `--steps` and a `--for` that exclude each other or train nothing."""
    if steps is not None and duration is not None:
        raise UserError("Give --steps or --for, not both.")
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps} trains nothing; give at least 1.")
    if duration is not None and seconds_of(duration) < SHORTEST:
        raise UserError(f"--for {duration} is too short to train anything; give at least {SHORTEST:.0f}s.")


def network_for(data: DataConfig) -> UNetConfig:
    """The network for pictures of this size."""
    largest, _ = WIDTHS[-1]
    if data.size > largest:
        raise UserError(f"Pictures of {data.size} pixels are too large; use --size {largest} or less.")
    return next(network for size, network in WIDTHS if data.size <= size)


def vae_for(data: DataConfig) -> VAEConfig:
    """The variational autoencoder for pictures of this size; about as many parameters as `network_for`."""
    del data
    return VAEConfig()


def gan_for(data: DataConfig) -> GANConfig:
    """The two networks of a GAN for pictures of this size; about as many parameters as `network_for`."""
    del data
    return GANConfig()


def _diffusion_training(data: DataConfig) -> TrainingConfig:
    small = data.size <= 40
    return TrainingConfig(batch=64 if small else 32, learning_rate=3e-3 if small else 2e-3)


def _vae_training(data: DataConfig) -> TrainingConfig:
    return TrainingConfig(batch=64 if data.size <= 40 else 32)


def _gan_training(data: DataConfig) -> TrainingConfig:
    return TrainingConfig(batch=64 if data.size <= 40 else 32, optimizer="adamw")


_TRAINING: dict[str, Callable[[DataConfig], TrainingConfig]] = {
    "diffusion": _diffusion_training,
    "vae": _vae_training,
    "gan": _gan_training,
}


def preset(data: DataConfig, model: str) -> Config:
    """The whole configuration of a family of models for these pictures.

    Raises:
        UserError: there is no such family.
    """
    training = choose(_TRAINING, model, "model")(data)
    return Config(data, model, network_for(data), vae=vae_for(data), gan=gan_for(data), training=training)


def threads_for(data: DataConfig, available: int) -> int:
    """CPU threads: one for tiny pictures, whose operations are too small to share.

    At 8 pixels two threads were no faster than one on a quiet machine, and seven times slower next to another
    process, since each operation waits for the slower of the two. OMP_NUM_THREADS, where it is set, is the most.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = min(available, int(asked)) if asked.isdecimal() and int(asked) else available
    return 1 if data.size <= 12 else most


def check_size(config: Config) -> None:
    """Refuse pictures that the network cannot halve as often as it must."""
    size, divisor = config.data.size, config.architecture.divisor
    if size % divisor:
        below = size // divisor * divisor
        raise UserError(
            f"Pictures of {size} pixels do not divide by {divisor}, as this network needs; "
            f"use --size {below or divisor} or --size {below + divisor}."
        )
