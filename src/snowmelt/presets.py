"""The one dial: from the pictures and the machine to a whole configuration."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from snowmelt.config import Config, DataConfig, DiffusionConfig, GANConfig, TrainingConfig, UNetConfig, VAEConfig
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

PLENTIFUL: tuple[tuple[int, UNetConfig, TrainingConfig], ...] = (
    # up to this size: the network of a GPU that has time for it, and its training (docs/benchmarks.md).
    (
        40,
        UNetConfig(channels=(128, 256, 256), attention=(False, True, True), blocks=2, head_channels=64),
        TrainingConfig(batch=512, learning_rate=1e-3, warmup=500),
    ),
    # Not measured: what is usual for 64 pixels on one GPU.
    (
        80,
        UNetConfig(channels=(96, 192, 288, 384), attention=(False, False, True, True), blocks=2),
        TrainingConfig(batch=256, learning_rate=1e-3, warmup=500),
    ),
)

LEAST_PLENTIFUL = 1_000_000
"""Images that such a network must see in the time, by measurement; else the smaller one is better."""

REPEATED, AUGMENT = 300, 0.15
"""How often each picture must be seen to be changed, lest it be learned by heart; and how (docs/recipe.md)."""

OFTEN, DROPOUT = 500, 0.1
"""How often such a network must see each picture to be trained with dropout, which slows learning at first."""

WIDENED, ROOM, WIDEST = 150_000, 1_500, 4.0
"""On a CPU the network is as many times as wide as the usual one as the fourth root says of the images that the usual
one would see in so many, or the square root of the training pictures in so many where that is less; at most this
(docs/recipe.md)."""

LINEAR, LINEAR_LIMIT = 64, 60_000
"""Directions of the linear estimate that a network is shown, and images from which on it is not if they are of
drawings: there it errs less with it, but draws farther from real ones (docs/recipe.md). Above 40 pixels they are twice
as many, as those of brief runs are, which was not measured. The larger network of a GPU never is."""
FLAT = 0.15
"""The `flat` of pictures from which on they are drawings: of photographs of 32 and 64 pixels it is 0.03 and less, of
emoji and digits a third and more."""

EXPORTED = ("noise", "image", "v")
"""What other libraries' networks predict: whoever asks for that may want to export the run. They are shown no linear
estimate, and are not censored, since not all samplers there cut answers off."""

GPU_BATCHES = 4
"""How many times larger the smaller network's batch is on a GPU, which takes hardly longer for it (docs/recipe.md)."""

GAN_WIDTHS: tuple[tuple[int, tuple[int, ...], int], ...] = (
    # up to this size: widths and patch. The smallest map is one of about 4 x 4 places, where parameters cost least.
    (12, (56, 96), 1),
    (40, (32, 64, 128), 2),
    (80, (24, 48, 96, 192), 2),
    (160, (32, 64, 128, 240), 4),
    (320, (16, 32, 64, 128, 256), 4),
    (640, (16, 32, 64, 64, 128, 256), 4),
    (1024, (16, 32, 64, 64, 64, 128, 256), 4),
)

FEW, PLENTY = 1000, 20_000
"""Training pictures below which the critic sees changed ones most often, and from which on never."""
MOST_AUGMENT = 0.6

SMALL = 40
"""Pixels on a side of pictures that enter as they are, and that are trained on in larger batches."""

SMALLEST_BATCH = 8
"""Pictures of a step, at least."""

BRIEF, BRIEF_LARGE, BRIEF_RATE = 20_000, 40_000, 6e-3
"""Images below which a run is brief, of pictures up to 40 pixels and of larger ones: a narrow network learns most of
them, in large steps (docs/recipe.md)."""

VAES: tuple[tuple[int, VAEConfig], ...] = (
    # up to this size: the network. Most of it works on the smallest map, where pictures pass through fastest.
    (12, VAEConfig(channels=(48, 96), latents=32, narrow=32)),
    (40, VAEConfig(channels=(32, 112), patch=2, latents=32, narrow=64)),
    (80, VAEConfig(channels=(64, 96, 160), patch=2, latents=32, narrow=64)),
    (1024, VAEConfig(channels=(96, 128, 192), patch=4, latents=32, narrow=64)),
)

SHORTEST = 30.0
"""Seconds of training; less leaves no time to train in, next to starting up and drawing the final pictures."""
DEFAULT_SECONDS = 600.0
FLATTEST = 1e-6
"""Standard deviation of pictures that are all of one colour, as far as a model is concerned."""


def facts_of(data: Prepared) -> DataConfig:
    """What a model is told of its training pictures."""
    from snowmelt.data.prepared import flat_share

    counts: tuple[int, ...] = ()
    if data.labels is not None:
        counted = Counter(data.labels[data.train].tolist())
        counts = tuple(counted[label] for label in range(len(data.classes)))
    std = max(FLATTEST, round(data.std, 6))
    return DataConfig(
        data.size,
        data.channels,
        data.classes,
        counts,
        std,
        data.fingerprint,
        len(data.train),
        data.background,
        data.fit,
        round(flat_share(data), 4),
    )


def check_length(steps: int | None, duration: str | None) -> None:
    """Refuse a `--steps` and a `--for` that exclude each other or train nothing."""
    if steps is not None and duration is not None:
        raise UserError("Give --steps or --for, not both.")
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps} trains nothing; give at least 1.")
    check_seconds(None if duration is None else seconds_of(duration), "--for", duration)


def check_seconds(seconds: float | None, option: str, words: str | None = None) -> None:
    """Refuse so short a time that nothing is trained in it."""
    if seconds is not None and seconds < SHORTEST:
        raise UserError(
            f"{option} {words or f'{seconds:g}'} is too short to train anything; give at least {SHORTEST:.0f}s."
        )


def network_for(data: DataConfig) -> UNetConfig:
    """The network for pictures of this size."""
    largest, _ = WIDTHS[-1]
    if data.size > largest:
        raise UserError(f"Pictures of {data.size} pixels are too large; use --size {largest} or less.")
    return next(network for size, network in WIDTHS if data.size <= size)


def vae_for(data: DataConfig) -> VAEConfig:
    """The variational autoencoder for pictures of this size; about as many parameters as `network_for`."""
    network = next((vae for size, vae in VAES if data.size <= size), VAES[-1][1])
    if data.channels == 1:
        return network
    # Colour needs more latents; where they narrow the map as much, the parameters stay as many.
    return dataclasses.replace(network, latents=4 * network.latents, narrow=network.narrow // 4)


def gan_for(data: DataConfig) -> GANConfig:
    """The two networks of a GAN for pictures of this size; about as many parameters as `network_for`."""
    channels, patch = next((channels, patch) for size, channels, patch in GAN_WIDTHS if data.size <= size)
    return GANConfig(channels=channels, patch=patch, augment=augment_for(data.pictures))


def augment_for(pictures: int) -> float:
    """Probability of each change to pictures that a critic sees: none from 20,000 pictures on, most below 1,000.

    >>> [augment_for(count) for count in (0, 200, 1000, 5000, 20000)]
    [0.0, 0.6, 0.6, 0.28, 0.0]
    """
    if not pictures:
        return 0.0
    share = math.log(PLENTY / pictures) / math.log(PLENTY / FEW)
    return round(MOST_AUGMENT * min(1.0, max(0.0, share)), 2)


def changed_for(data: DataConfig, images: int | None) -> float:
    """Probability of each change to pictures that a diffusion model sees: none where each is seen a few times."""
    return AUGMENT if images is not None and images >= REPEATED * data.pictures > 0 else 0.0


def shown_for(data: DataConfig, images: int | None) -> int:
    """Directions of the linear estimate: none where many images are going to be seen, of drawings."""
    limit = LINEAR_LIMIT * (1 if data.size <= SMALL else 2)
    return LINEAR if data.flat < FLAT or images is None or images < limit else 0


def is_brief(data: DataConfig, images: int | None) -> bool:
    """Whether a run is going to see that few."""
    return images is not None and images < (BRIEF if data.size <= SMALL else BRIEF_LARGE)


def narrowed(network: UNetConfig) -> UNetConfig:
    """The network of a brief run: as wide everywhere as on the largest map, and without attention.

    >>> narrowed(UNetConfig(channels=(32, 64, 128))).channels
    (32, 32, 32)
    """
    sizes = len(network.channels)
    return dataclasses.replace(
        network, channels=network.channels[:1] * sizes, attention=(False,) * sizes, middle_attention=False
    )


def width_for(data: DataConfig, images: int) -> float:
    """Times the usual width that a CPU should train that has time for so many images with the usual network, in halves.

    More time is best divided evenly, in proportion, between more images and more operations for each, which go as the
    square of the width; and a wide network soon knows few pictures by heart (docs/recipe.md).

    >>> [width_for(DataConfig(32, 3, pictures=50_000), images) for images in (0, 250_000, 400_000, 12_000_000)]
    [1.0, 1.0, 1.5, 3.0]
    """
    # Of small pictures more are seen in the same time, and there is less to know of each.
    images_of_32 = images * min(1.0, data.size / 32) ** 2
    factor = min((images_of_32 / WIDENED) ** 0.25, (data.pictures / ROOM) ** 0.5, WIDEST)
    return max(1.0, round(2 * factor) / 2)


def widened(network: UNetConfig, factor: float) -> UNetConfig:
    """The network so many times as wide everywhere.

    >>> widened(UNetConfig(channels=(32, 64, 64)), 1.5).channels
    (48, 96, 96)
    """
    return dataclasses.replace(network, channels=tuple(round(factor * width) for width in network.channels))


def _diffusion_training(data: DataConfig, images: int | None, gpu: bool) -> TrainingConfig:
    brief = is_brief(data, images)
    # Updates below which smaller batches are better: docs/recipe.md.
    most, rate, updates = (64, 3e-3, 250 if brief else 150) if data.size <= SMALL else (32, 2e-3, 300)
    return TrainingConfig(
        batch=batch_for(images, most=most * (GPU_BATCHES if gpu else 1), updates=updates),
        learning_rate=BRIEF_RATE if brief else rate,
    )


def batch_for(images: int | None, *, most: int, updates: int) -> int:
    """The largest power of two from `SMALLEST_BATCH` to `most` that leaves so many updates of so many images.

    >>> [batch_for(images, most=64, updates=300) for images in (3_000, 10_000, 20_000, 1_000_000, None)]
    [8, 32, 64, 64, 64]
    """
    batch = most
    while images is not None and batch > SMALLEST_BATCH and images < updates * batch:
        batch //= 2
    return batch


def _vae_training(data: DataConfig, images: int | None, gpu: bool) -> TrainingConfig:
    del images, gpu
    small = data.size <= SMALL
    return TrainingConfig(batch=64 if small else 32, learning_rate=3e-3 if small else 2e-3)


def _gan_training(data: DataConfig, images: int | None, gpu: bool) -> TrainingConfig:
    # Small steps and a long warm-up: else the two networks swing at first, and a class's pictures stay more alike.
    del data, images, gpu
    return TrainingConfig(batch=32, optimizer="adamw", learning_rate=1e-3, warmup=200)


_TRAINING: dict[str, Callable[[DataConfig, int | None, bool], TrainingConfig]] = {
    "diffusion": _diffusion_training,
    "vae": _vae_training,
    "gan": _gan_training,
}


def plentiful(data: DataConfig) -> tuple[UNetConfig, TrainingConfig] | None:
    """The network and training of a GPU with time; None where there is no larger network for pictures of this size.

    Tiny pictures stay with the small network, which has room for all there is to know of them.
    """
    smallest, _ = WIDTHS[0]
    return next((row[1:] for row in PLENTIFUL if smallest < data.size <= row[0]), None)


def preset(
    data: DataConfig,
    model: str,
    *,
    images: int | None = None,
    gpu: bool = False,
    large: bool = False,
    width: float = 1.0,
) -> Config:
    """The whole configuration of a family of models for these pictures.

    Args:
        images: how many the training is going to see; None where that is not known.
        gpu: whether it trains on a GPU.
        large: whether it may be a network that only a GPU is fast enough for.
        width: times the usual width.

    Raises:
        UserError: there is no such family.
    """
    network, training = widened(network_for(data), width), choose(_TRAINING, model, "model")(data, images, gpu)
    if model == "diffusion" and is_brief(data, images):
        network = narrowed(network)
    linear = shown_for(data, images)
    if large and model == "diffusion" and (larger := plentiful(data)) is not None:
        (network, training), linear = larger, 0
        if images is not None and images >= OFTEN * data.pictures > 0:
            network = dataclasses.replace(network, dropout=DROPOUT)
    diffusion = DiffusionConfig(augment=changed_for(data, images), linear=linear, censored=True)
    return Config(data, model, network, diffusion, vae=vae_for(data), gan=gan_for(data), training=training)


def drawn_at_once(config: Config, precision: str = "fp32") -> int:
    """Pictures that a model draws at once: as many as fill 64 maps of 32 x 32 places, but no more than 64 and no fewer
    than 8 (docs/recipe.md).

    >>> [drawn_at_once(preset(DataConfig(size, 3), "diffusion")) for size in (8, 32, 64, 256, 1024)]
    [64, 64, 64, 16, 8]

    In bfloat16 numbers take half as much room, and twice as many are drawn.
    """
    most = 128 if precision == "bf16" else 64
    return max(8, min(most, most * (32 * config.architecture.patch) ** 2 // config.data.size**2))


def check_size(config: Config) -> None:
    """Refuse pictures that the network cannot halve as often as it must."""
    size, divisor = config.data.size, config.architecture.divisor
    if size % divisor:
        below = size // divisor * divisor
        raise UserError(
            f"Pictures of {size} pixels do not divide by {divisor}, as this network needs; "
            f"use --size {below or divisor} or --size {below + divisor}."
        )
