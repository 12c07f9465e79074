"""The configuration of a run: frozen dataclasses, written to and read from TOML with strict keys."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

from snowmelt.errors import UserError, choose
from snowmelt.tables import from_table, to_tables

FORMAT = 1
"""Of run directories; a run with a higher one was written by a later version."""


MOST_SIZES, MOST_CHANNELS, MOST_BLOCKS, MOST_PATCH = 16, 8192, 64, 64
"""More than any network has that fits into a computer."""


def _require(section: str, values: object, names: tuple[str, ...], *, above: int) -> None:
    """Refuse numbers that are not finite or not above a bound; None is not checked."""
    for name in names:
        value = getattr(values, name)
        if value is not None and not above < value < math.inf:
            raise UserError(f"{section}.{name} is {value}; give a number above {above}.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model knows of the pictures it was trained on."""

    size: int
    """Height and width in pixels."""
    channels: int
    """1 for grey, 3 for colour."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their labels; none for unlabelled pictures."""
    counts: tuple[int, ...] = ()
    """Training pictures of each class."""
    std: float = 0.5
    """Standard deviation of the training pixels in [-1, 1] units."""
    fingerprint: str = ""
    """Of the prepared dataset."""
    pictures: int = 0
    """Training pictures; 0 where that is not known."""
    background: str = "#ffffff"
    """Colour behind transparent parts, as #rrggbb or a name."""
    fit: str = "crop"
    """How they were made square: crop or pad."""
    flat: float = 0.0
    """The share of places that are exactly like their neighbours: small of photographs, large of drawings."""

    def __post_init__(self) -> None:
        _require("data", self, ("size", "std"), above=0)
        if not 0 <= self.flat <= 1:
            raise UserError(f"data.flat is {self.flat}; give a share from 0 to 1.")
        _require("data", self, ("pictures",), above=-1)
        if self.channels not in (1, 3):
            raise UserError(f"data.channels is {self.channels}; give 1 (grey) or 3 (colour).")
        if self.counts and (len(self.counts) != len(self.classes) or min(self.counts) < 0 or not any(self.counts)):
            raise UserError("data.counts must have a number for each of data.classes, none below 0 and one above.")
        if any("\ud800" <= letter <= "\udfff" for name in self.classes for letter in name):
            raise UserError("A name in data.classes holds half a character; give names that are text.")

    def label_of(self, name: str) -> int:
        """The label of a class, 0 for the first.

        Raises:
            UserError: there is none of that name.
        """
        return choose({known: label for label, known in enumerate(self.classes)}, name, "class")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net."""

    channels: tuple[int, ...] = (32, 64, 64)
    """Width at each size, from the full size down; every further entry halves the size."""
    attention: tuple[bool, ...] = (False, False, True)
    """Whether each size has attention."""
    blocks: int = 1
    """Residual blocks at each size."""
    patch: int = 1
    """Squares of patch x patch pixels enter as one place (1: pixels as they are)."""
    groups: int = 8
    """Groups of every group normalization; divides all channels."""
    head_channels: int = 32
    """Channels of one attention head; where a size has fewer channels, they are one head."""
    dropout: float = 0.0
    embedding: str = "scale_shift"
    """How level and class enter a residual block: scale_shift (of its second norm) or add (before that norm)."""
    epsilon: float = 1e-5
    """Added to the variance in every group normalization."""
    halving: str = "centered"
    """Padding of the convolutions that halve the size: centered (on all sides) or corner (right and below only)."""
    sines_first: bool = False
    """Whether the sines of the time come before the cosines."""
    frequency_shift: float = 0.0
    """Makes the lowest frequency of the time lower: 1 ends exactly at 1/10000."""
    middle_attention: bool = True
    """Whether there is attention between the way down and the way up."""
    middle_groups: int | None = None
    """Groups of the normalization before that attention: `groups` when not given, 0 for no normalization."""

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.channels):
            raise UserError(
                f"network.attention has {len(self.attention)} entries and network.channels {len(self.channels)}; "
                "give one for each size."
            )
        if not self.channels or min(self.blocks, self.patch, self.groups, self.head_channels, *self.channels) < 1:
            raise UserError("network.channels, blocks, patch, groups and head_channels must all be at least 1.")
        for value, most, what in (
            (len(self.channels), MOST_SIZES, "sizes"),
            (max(self.channels), MOST_CHANNELS, "channels"),
            (self.blocks, MOST_BLOCKS, "blocks at each size"),
            (self.patch, MOST_PATCH, "pixels to the side of a patch"),
        ):
            if value > most:
                raise UserError(f"A network with {value} {what} is too large to be built; give at most {most:,}.")
        if any(width % self.groups for width in self.channels):
            raise UserError(f"network.channels {self.channels} must all be multiples of network.groups {self.groups}.")
        if any(width >= self.head_channels and width % self.head_channels for width in self.attended):
            raise UserError(
                f"network.channels {self.channels} must be multiples of network.head_channels {self.head_channels} "
                "where there is attention, and at the smallest size."
            )
        _require("network", self, ("epsilon",), above=0)
        if not 0 <= self.dropout < 1:
            raise UserError(f"network.dropout is {self.dropout}; give a share from 0 to less than 1.")
        if not math.isfinite(self.frequency_shift):
            raise UserError(f"network.frequency_shift is {self.frequency_shift}; give a number such as 0 or 1.")
        choose(dict.fromkeys(("scale_shift", "add")), self.embedding, "network.embedding")
        choose(dict.fromkeys(("centered", "corner")), self.halving, "network.halving")
        if self.channels[0] % 2 or self.channels[0] // 2 <= self.frequency_shift:
            raise UserError(
                f"network.channels begins with {self.channels[0]}; give an even number of more than twice "
                f"network.frequency_shift {self.frequency_shift:g}."
            )
        if self.middle_groups is not None and (
            self.middle_groups < 0 or (self.middle_groups and self.channels[-1] % self.middle_groups)
        ):
            raise UserError(
                f"network.middle_groups is {self.middle_groups}; give 0 or a divisor of {self.channels[-1]}, the last "
                "of network.channels."
            )

    @property
    def attended(self) -> tuple[int, ...]:
        """The widths that attention works on; the last is that between the way down and the way up."""
        widths = tuple(width for width, on in zip(self.channels, self.attention, strict=True) if on)
        return widths + self.channels[-1:] * self.middle_attention

    @property
    def divisor(self) -> int:
        """The picture size must be a multiple of this."""
        return self.patch * 2 ** (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """What is learnt: levels, prediction, weight."""

    schedule: str = "cosine"
    betas: tuple[float, ...] = ()
    """A table of betas in the place of `schedule`; the network is then told its step in this table."""
    shift: float = 1.0
    """Factor on sigma / alpha at every level: more noise for larger pictures."""
    predicts: str = "velocity"
    levels: str = "stratified"
    """How training levels are drawn."""
    weight: str = "constant"
    variance: str = "fixed"
    """"learned": the network also learns the variance of DDPM's steps, for each pixel."""
    label_dropout: float = 0.1
    """Share of training labels hidden from the network, so that it also learns to draw without a class."""
    augment: float = 0.0
    """Probability of each change to training pictures, half of which are mirrored then too; the network is told of all
    changes, so that it draws none. 0: pictures stay as they are."""
    linear: int = 0
    """Directions in which pictures differ most, whose variances make the linear estimate that the network is shown
    beside the noisy picture; 0: it is shown the noisy picture alone."""
    censored: bool = False
    """Whether a pixel at an end of the range, black or white, stands for all beyond it too: an answer that passes it
    there is no error, and answers are cut off at both ends."""

    def __post_init__(self) -> None:
        _require("diffusion", self, ("linear",), above=-1)
        if not 0 <= self.augment < 1:
            raise UserError(
                f"diffusion.augment is {self.augment}; give a probability from 0 to less than 1, such as 0.15."
            )
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"diffusion.label_dropout is {self.label_dropout}; give a share from 0 to 1.")
        _require("diffusion", self, ("shift",), above=0)
        if self.variance not in ("fixed", "learned"):
            raise UserError(f"diffusion.variance is {self.variance!r}; choose fixed or learned.")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The shape of a variational autoencoder and what it learns."""

    channels: tuple[int, ...] = (32, 64, 64)
    """Width at each size, from the full size down; every further entry halves the size."""
    blocks: int = 1
    """Residual blocks at each size, on either side."""
    patch: int = 1
    """Squares of patch x patch pixels enter and leave as one place (1: pixels as they are)."""
    groups: int = 8
    """Groups of every group normalization; divides all channels."""
    attention: bool = False
    """Whether there is attention at the smallest size."""
    bottleneck: str = "vector"
    """What describes a picture: a vector, or a map with latents at each place of the smallest size (a codec)."""
    latents: int = 64
    """Values that describe a picture (of a vector), or each place of the smallest map (of a map)."""
    narrow: int = 32
    """Channels of the smallest map where it becomes a vector, or is made from one."""
    most: int = 8
    """Places a side of that map; a larger one is averaged."""
    variance: str = "told"
    """Of the decoder: optimal (one: the mean squared error), learned (one for each place) or told (by the decoder)."""
    free_bits: float = 0.05
    """Bits that each latent may hold at no cost, so that none is given up for good."""
    adversarial: float = 0.0
    """Weight of a critic of patches, which makes reconstructions sharper."""
    patch_term: float = 0.0
    """Weight of the distance between the patches of a picture and those of its reconstruction."""

    def __post_init__(self) -> None:
        counts = (self.blocks, self.patch, self.groups, self.latents, self.narrow, self.most, *self.channels)
        if not self.channels or min(counts) < 1:
            raise UserError("vae.channels, blocks, patch, groups, latents, narrow and most must all be at least 1.")
        if len(self.channels) > MOST_SIZES or max(counts) > MOST_CHANNELS or self.blocks > MOST_BLOCKS:
            raise UserError("The numbers of [vae] make a network that is too large to be built; give smaller ones.")
        if any(width % self.groups for width in self.channels):
            raise UserError(f"vae.channels {self.channels} must all be multiples of vae.groups {self.groups}.")
        if self.attention and self.channels[-1] > 32 and self.channels[-1] % 32:
            raise UserError(f"vae.channels {self.channels} must end with a multiple of 32 where there is attention.")
        choose(dict.fromkeys(("vector", "map")), self.bottleneck, "vae.bottleneck")
        choose(dict.fromkeys(("optimal", "learned", "told")), self.variance, "vae.variance")
        _require("vae", self, ("free_bits", "adversarial", "patch_term"), above=-1)
        if min(self.free_bits, self.adversarial, self.patch_term) < 0:
            raise UserError("vae.free_bits, adversarial and patch_term must all be at least 0.")

    @property
    def is_vector(self) -> bool:
        """Whether one vector describes the picture."""
        return self.bottleneck == "vector"

    @property
    def divisor(self) -> int:
        """The picture size must be a multiple of this."""
        return self.patch * 2 ** (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True)
class GANConfig:
    """The shape of the two networks of a GAN, and how they compete."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Width at each size, from the full size down; every further entry halves the size, rounded up."""
    blocks: int = 1
    """Residual blocks at each size."""
    patch: int = 1
    """Squares of patch x patch pixels are one place of the largest map (1: pixels as they are)."""
    latents: int = 64
    """Random values that a picture is made from."""
    gamma: float = 0.2
    """Weight of the penalties on the critic's slope, at real and at generated pictures, over the distance from one
    picture to another, at first: with more the networks are calmer and the pictures more varied..."""
    gamma_last: float = 0.02
    """...and from `burn_in` images on: with less the critic sees finer details, and so come details."""
    burn_in: int = 15_000
    """Images seen during which the one turns into the other, by equal factors."""
    augment: float = 0.0
    """Probability of each change made to all pictures that the critic sees, so that it cannot learn a few by heart."""

    def __post_init__(self) -> None:
        numbers = (self.blocks, self.patch, self.latents, *self.channels)
        if not self.channels or min(numbers) < 1:
            raise UserError("gan.channels, blocks, patch and latents must all be at least 1.")
        for value, most, what in (
            (len(self.channels), MOST_SIZES, "sizes"),
            (max(self.latents, *self.channels), MOST_CHANNELS, "channels or latents"),
            (self.blocks, MOST_BLOCKS, "blocks at each size"),
            (self.patch, MOST_PATCH, "pixels to the side of a patch"),
        ):
            if value > most:
                raise UserError(f"A GAN with {value} {what} is too large to be built; give at most {most:,}.")
        for name in ("gamma", "gamma_last"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"gan.{name} is {getattr(self, name)}; give a number of at least 0, such as 0.2.")
        if (self.gamma == 0) != (self.gamma_last == 0):
            raise UserError(
                "gan.gamma and gan.gamma_last turn into each other by factors; give 0 for both, or neither."
            )
        if self.burn_in < 0:
            raise UserError(f"gan.burn_in is {self.burn_in}; give a number of images, such as 15000, or 0 for none.")
        if not 0 <= self.augment < 1:
            raise UserError(f"gan.augment is {self.augment}; give a probability from 0 to less than 1, such as 0.5.")

    @property
    def divisor(self) -> int:
        """The picture size must be a multiple of this."""
        return self.patch


def check_average(share: float) -> None:
    """Refuse a length of the running average that no power of time has (0.289 is that of the 0th)."""
    if not 0 < share < 0.28:
        raise UserError(f"training.average is {share}; give a share between 0 and 0.28, such as 0.1.")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How it is learnt."""

    steps: int | None = None
    """Optimizer updates; or none, when `seconds` decides."""
    seconds: float | None = None
    """Wall-clock time for the whole run, final pictures and report included."""
    batch: int = 64
    optimizer: str = "muon"
    """muon (for matrices and kernels, with AdamW for the rest) or adamw (for all)."""
    learning_rate: float = 1e-3
    warmup: int = 100
    """Steps in which the learning rate rises from 0."""
    decay: float = 0.6
    """Share of the run, at its end, in which the learning rate falls to 0."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient."""
    average: float = 0.1
    """Length of the running average of the weights, as a share of the run so far (its sigma_rel)."""
    flip: bool = False
    """Mirror half of the pictures."""
    seed: int = 0
    precision: str = "fp32"
    layout: str = "default"
    """Of pictures and kernels in memory: default (a channel after the other) or channels_last."""
    compile: bool = False
    """Whether a GPU computes the network compiled while it trains."""
    record: bool = False
    """Whether a GPU records the network's operations once and replays them while it trains."""
    threads: int = 1
    """CPU threads of the arithmetic; part of the run, since other counts round differently."""

    def __post_init__(self) -> None:
        positive = ("steps", "seconds", "batch", "threads", "learning_rate", "decay", "clip")
        _require("training", self, positive, above=0)
        _require("training", self, ("warmup", "weight_decay"), above=-1)
        check_average(self.average)
        choose(dict.fromkeys(("default", "channels_last")), self.layout, "training.layout")

    @property
    def ways(self) -> tuple[str, ...]:
        """How it computes, in words: its precision, and all that is not as usual."""
        unusual = {"channels_last": self.layout != "default", "compiled": self.compile, "recorded": self.record}
        return self.precision, *(word for word, chosen in unusual.items() if chosen)


FAMILIES: dict[str, tuple[str, ...]] = {"diffusion": ("network", "diffusion"), "vae": ("vae",), "gan": ("gan",)}
"""By family of models: the sections of a configuration that it reads, that of its network first."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is made of; with the prepared dataset it determines every weight.

    The sections of other families than `model` hold what nobody reads, and are not written.
    """

    data: DataConfig
    model: str = "diffusion"
    network: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    gan: GANConfig = dataclasses.field(default_factory=GANConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    request: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """The options the run was asked for with; the same ones again continue it."""
    format: int = FORMAT
    version: str = ""
    """Of the Snowmelt that wrote the run."""

    def __post_init__(self) -> None:
        choose(FAMILIES, self.model, "model")

    @property
    def architecture(self) -> UNetConfig | VAEConfig | GANConfig:
        """The shape of the family's network."""
        return getattr(self, FAMILIES[self.model][0])


def config_tables(config: Config) -> dict[str, Any]:
    """A configuration as tables, without the sections that its family does not read."""
    unread = {name for sections in FAMILIES.values() for name in sections} - set(FAMILIES[config.model])
    return {name: table for name, table in to_tables(config).items() if name not in unread}


def to_toml(config: Config) -> str:
    """A configuration as TOML text."""
    import tomli_w

    return tomli_w.dumps(config_tables(config))


def read_config(path: Path) -> Config:
    """The configuration in a TOML file.

    Raises:
        UserError: not there, not TOML, from a later version, or with keys and values that do not fit.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as TOML ({error}).") from error
    later = table.get("format", FORMAT)
    if isinstance(later, int) and later > FORMAT:
        raise UserError(f"{path} was written by a later Snowmelt ({table.get('version')}); upgrade to read it.")
    return from_table(Config, table, str(path))
