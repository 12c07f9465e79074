"""The options of `snowmelt train`, and the configuration that they and the presets make."""

from __future__ import annotations

import dataclasses
import tomllib
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from snowmelt import __version__
from snowmelt.config import FAMILIES, Config, DataConfig, config_tables
from snowmelt.data.source import resolved
from snowmelt.errors import UserError, choose, nearest, option_of
from snowmelt.presets import DEFAULT_SECONDS, EXPORTED, changed_for, preset, shown_for
from snowmelt.tables import from_table, to_tables
from snowmelt.terminal import seconds_of


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a generator on pictures; the same command again, or --resume RUN, continues an interrupted run."""

    source: tyro.conf.Positional[str | None] = None
    """A folder, zip or tar of images, a dataset that `snowmelt prepare` made, or builtin:digits."""
    out: Path | None = None
    """The run directory; runs/NAME when not given."""
    resume: Path | None = None
    """Continue this run, with the settings it was started with."""
    steps: int | None = None
    """How many optimizer steps to train."""
    duration: Annotated[str | None, tyro.conf.arg(name="for")] = None
    """How long the whole run may take, final pictures and report included: 90s, 20m, 1h30m, 8h. 10m when neither
    this nor --steps is given."""
    model: str = "diffusion"
    """diffusion, vae or gan: the family of models."""
    size: int | None = None
    """Height and width of the pictures; chosen from the images when not given."""
    color: Literal["auto", "rgb", "grey"] = "auto"
    """Colour or grey; auto looks at the images."""
    background: str = "white"
    """What transparent and padded parts show: a name or #rrggbb."""
    fit: Literal["crop", "pad"] = "crop"
    """How an image that is not square becomes one."""
    classes: Literal["auto", "none"] = "auto"
    """auto takes sub-folders as classes where every image lies in one."""
    schedule: str | None = None
    """Noise schedule: linear, scaled_linear, cosine, sigmoid, laplace, flow or edm."""
    predicts: str | None = None
    """What the network predicts: noise, image, v, velocity or edm."""
    levels: str | None = None
    """How training levels are drawn: stratified, uniform, lognormal, logitnormal or importance."""
    weight: str | None = None
    """Weight of the loss by noise level: constant, simple, bound, min_snr, edm, sigmoid, p2 or learned."""
    variance: str | None = None
    """fixed, or learned: the network also learns the variance of DDPM's steps."""
    augment: float | None = None
    """Probability of each change to the training pictures (moved, turned, ...), which the network is told, so that it
    draws none; 0 for none. Chosen by how often each picture is going to be seen when not given."""
    batch: int | None = None
    """Pictures in each step."""
    optimizer: str | None = None
    """muon (for matrices and kernels, with AdamW for the rest) or adamw (for all)."""
    learning_rate: float | None = None
    """Highest learning rate."""
    flip: bool = False
    """Mirror half of the pictures: for things that have no left and right."""
    seed: int | None = None
    """Decides the first weights, the order of the pictures, the noise and what is held out; 0 when not given."""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """auto measures which is faster here; of two alike it takes bf16 if the processor is known to multiply that."""
    config: Path | None = None
    """A TOML file with any settings of a run's config.toml; they override what is chosen for you."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""
    workers: int = 0
    """Threads that gather batches ahead; any number gives the same result. On a CPU they only take time from the
    arithmetic."""
    save_every: float = 60.0
    """Seconds between checkpoints."""
    plan: bool = False
    """Say what would be done with these pictures on this machine, and stop."""


PROCESS_OPTIONS = ("out", "resume", "device", "workers", "save_every", "plan")
"""What may differ when a command continues a run."""


def overrides_of(options: TrainOptions) -> dict[str, dict[str, Any]]:
    """The settings a person gave, as tables over the preset: those of --config, then those of the options."""
    tables: dict[str, Any] = {}
    if options.config is not None:
        try:
            tables = tomllib.loads(_settings_text(options.config))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--config {options.config} is not readable as TOML ({error}).") from error
    sections = (*choose(FAMILIES, options.model, "model"), "training")
    for name, table in tables.items():
        if name not in sections:
            raise UserError(f"--config {options.config} has an unknown section {name!r}; {nearest(name, sections)}.")
        if not isinstance(table, dict):
            raise UserError(f"--config {options.config}: {name!r} must be a section, [{name}].")
    given = {
        "diffusion": {
            name: getattr(options, name) for name in ("schedule", "predicts", "levels", "weight", "variance", "augment")
        },
        "training": {
            "batch": options.batch,
            "optimizer": options.optimizer,
            "learning_rate": options.learning_rate,
            "flip": options.flip or None,
            "seed": options.seed,
            "precision": None if options.precision == "auto" else options.precision,
            "steps": options.steps,
            "seconds": None if options.duration is None else seconds_of(options.duration),
        },
    }
    known = {
        section: {name: value for name, value in values.items() if value is not None}
        for section, values in given.items()
    }
    for section in known.keys() - set(sections):
        if known[section]:
            option = option_of(next(iter(known[section])))
            raise UserError(f"{option} says how a diffusion model learns; leave it away, or leave --model away.")
    overrides = {section: {**tables.get(section, {}), **known.get(section, {})} for section in sections}
    if overrides["training"].get("precision") == "auto":
        del overrides["training"]["precision"]
    return overrides


def resolve(
    data: DataConfig,
    options: TrainOptions,
    overrides: dict[str, dict[str, Any]],
    *,
    images: int | None = None,
    gpu: bool = False,
    large: bool = False,
    width: float = 1.0,
) -> Config:
    """The whole configuration: the preset for these pictures, overridden by what the person gave.

    Args:
        images: how many the machine can train on in the time given; None where that is not known.
        gpu, large, width: see `preset`; of a network of which the person has given anything the rest is the usual
            one's.

    Raises:
        UserError: an override has an unknown key or a value that does not fit.
    """
    own_network = bool(overrides.get("network"))
    choice = partial(preset, data, options.model, gpu=gpu, large=large and not own_network)
    usual, chosen = choice(), choice(images=images, width=width)
    if own_network:
        chosen = dataclasses.replace(chosen, network=usual.network)
    tables = config_tables(dataclasses.replace(chosen, version=__version__))
    if overrides.get("diffusion", {}).get("predicts") in EXPORTED:
        tables["diffusion"] |= {"linear": 0, "censored": False}
    for section, values in overrides.items():
        tables[section] = {**tables[section], **values}
    training = tables["training"]
    unusual = own_network or training["optimizer"] != "muon"
    if unusual and "learning_rate" not in overrides.get("training", {}):
        # That of brief runs was found with Muon on the preset's network.
        training["learning_rate"] = usual.training.learning_rate
    if "steps" in training and "seconds" in training:
        raise UserError("The training is given by steps and by time; leave one of them away.")
    if "steps" not in training:
        training.setdefault("seconds", DEFAULT_SECONDS)
    tables = to_tables(tables)
    config = from_table(Config, tables, str(options.config or "the options"))
    if config.training.steps is not None:
        # No time to fit anything to, but how many images are going to be seen is known.
        seen, shown = config.training.steps * config.training.batch, config.diffusion.linear
        known = {"augment": changed_for(data, seen), "linear": min(shown, shown_for(data, seen))}
        kept = {name: value for name, value in known.items() if name not in overrides.get("diffusion", {})}
        config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, **kept))
    return dataclasses.replace(config, data=data, request=request_of(options))


def request_of(options: TrainOptions) -> dict[str, Any]:
    """The options that make the run what it is, as config.toml keeps them."""
    given = vars(options) | {"seed": options.seed or 0}
    asked = {name: value for name, value in given.items() if name not in PROCESS_OPTIONS and value is not None}
    if options.source is not None:
        asked["source"] = resolved(options.source)
    return asked | ({"config": _settings_text(options.config)} if options.config else {})


def _settings_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({error}).") from error
