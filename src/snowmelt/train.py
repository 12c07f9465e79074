"""`snowmelt train`: a folder of images (or a prepared dataset) becomes a run that anybody can draw from."""

from __future__ import annotations

import dataclasses
import math
import time
import tomllib
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from snowmelt import __version__
from snowmelt.config import FAMILIES, Config, DataConfig, config_tables
from snowmelt.errors import UserError, choose, nearest
from snowmelt.files import make_folder
from snowmelt.presets import (
    DEFAULT_SECONDS,
    EXPORTED,
    changed_for,
    check_length,
    check_seconds,
    check_size,
    facts_of,
    preset,
)
from snowmelt.tables import from_table, to_tables
from snowmelt.terminal import Log, console, seconds_of, words_of

if TYPE_CHECKING:
    from rich.console import Console

    from snowmelt.data.prepared import Prepared
    from snowmelt.run import Run


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
    seed: int = 0
    """Decides the first weights, the order of the pictures, the noise and what is held out."""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """auto measures which is faster here."""
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
DATA_OPTIONS = ("size", "color", "background", "fit", "classes")
"""What only matters while pictures are prepared."""


def train_or_plan(options: TrainOptions) -> None:
    """The verb: `plan` with --plan, else `train`."""
    (plan if options.plan else train)(options)


def plan(options: TrainOptions) -> None:
    """Say what `train` would do with these pictures on this machine, and leave nothing behind.

    Raises:
        UserError: for every mistake in the options.
    """
    from rich.console import Console

    _check(options)
    _check_source(_path(options), options)
    from snowmelt.training.forecast import plan_table

    overrides, say = _refuse_early(options), console()
    out = _path(options).absolute()
    beside = next(parent for parent in out.parents if parent.is_dir())
    with TemporaryDirectory(prefix=".plan-", dir=beside) as folder:
        config, speed = _settled(
            Path(folder), options, overrides, Log(say, Path(folder) / "log.txt"), Console(quiet=True)
        )
        say.print(plan_table(config, speed))


def train(options: TrainOptions) -> Run:
    """Prepare the pictures where needed, train, and return the finished run.

    Raises:
        UserError: for every mistake in the options, before anything is written.
        Stopped: on Ctrl-C or SIGTERM, after saving.
    """
    started = time.monotonic()
    _check(options)
    if options.plan:
        raise UserError("A plan trains nothing; leave `plan` away, or call snowmelt.train.plan.")
    path = _path(options)
    _check_source(path, options)
    run = _existing(path, options)
    say = console()
    if run is not None and run.status().get("state") == "finished":
        say.print(f"{path} is finished; draw from it with `snowmelt sample {path}`.", markup=False)
        return run
    overrides = _refuse_early(options) if run is None else {}
    # From here on torch is needed; most mistakes have been refused without waiting for it.
    from snowmelt.run import lock
    from snowmelt.training.session import Here, train_run

    with make_folder(path, begun="config.toml"), lock(path):
        log = Log(say, path / "log.txt")
        run = _existing(path, options) or _new(path, options, overrides, log)
        report = train_run(run, Here(options.device, options.workers, options.save_every), log, started)
    log(f"Wrote {report}")
    log(f"Finished in {words_of(time.monotonic() - started)}. Draw more with: snowmelt sample {run.path}")
    return run


def _check(options: TrainOptions) -> None:
    if options.resume is not None:
        kept = (*(name for name in PROCESS_OPTIONS if name != "plan"), "source")
        fields = [field for field in dataclasses.fields(options) if field.name not in kept]
        given = [_option(field.name) for field in fields if getattr(options, field.name) != field.default]
        if options.source is not None or options.out is not None or given:
            names = ", ".join(given) or "the source and --out"
            raise UserError(f"--resume RUN continues a run as it was started; leave {names} away.")
    elif options.source is None:
        raise UserError("Name a folder of images to train on, or continue a run with --resume RUN.")
    check_length(options.steps, options.duration)
    for name, least, most in (("batch", 1, 65536), ("workers", 0, 64), ("save_every", 0, math.inf)):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{_option(name)} is {value}; give {least} to {most}.")


def _check_source(path: Path, options: TrainOptions) -> None:
    """Refuse a source that is not there before anybody waits for torch; a run that has begun needs it no longer."""
    from snowmelt.data.source import source_kind

    if options.source is not None and not options.source.startswith("builtin:") and not (path / "config.toml").exists():
        source_kind(Path(options.source))


def _option(name: str) -> str:
    """The option of a field, as it is typed."""
    return "--" + {"duration": "for"}.get(name, name).replace("_", "-")


def _path(options: TrainOptions) -> Path:
    """Of the run."""
    return Path(options.resume or options.out or Path("runs") / _name(str(options.source)))


def _name(source: str) -> str:
    return Path(source.removeprefix("builtin:")).resolve().name.split(".")[0] or "run"


def _request(options: TrainOptions) -> dict[str, Any]:
    """The options that make the run what it is, as config.toml keeps them."""
    asked = {name: value for name, value in vars(options).items() if name not in PROCESS_OPTIONS and value is not None}
    if options.source is not None and not options.source.startswith("builtin:"):
        asked["source"] = str(Path(options.source).resolve())
    return asked | ({"config": _settings_text(options.config)} if options.config else {})


def _settings_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({error}).") from error


def _existing(path: Path, options: TrainOptions) -> Run | None:
    """The run to continue, or None when there is none yet.

    Raises:
        UserError: `path` holds something else, or a run that was started with other options.
    """
    from snowmelt.run import Run, is_run

    if options.resume is not None:
        return Run.open(path)
    if is_run(path):
        run = Run.open(path)
        asked, before = to_tables(_request(options)), run.config.request
        changed = sorted(name for name in asked.keys() | before.keys() if asked.get(name) != before.get(name))
        if changed:
            raise UserError(
                f"{path} was started with other options ({', '.join(map(_option, changed))}); continue it with "
                f"`snowmelt train --resume {path}`, or choose another --out."
            )
        return run
    if path.is_file():
        raise UserError(f"{path} is a file; name a folder for the run with --out.")
    # A process that was killed before config.toml existed leaves these.
    ours = ("data", "log.txt")
    if path.is_dir() and any(child.name not in ours and child.name[0] != "." for child in path.iterdir()):
        raise UserError(f"{path} exists and is not a run; choose another --out.")
    return None


def _refuse_early(options: TrainOptions) -> dict[str, dict[str, Any]]:
    """Refuse all that can be refused before the first byte is written; the person's settings, as tables."""
    from snowmelt.data.prepared import is_prepared

    overrides = _overrides(options)
    trial = resolve(DataConfig(options.size or 32, 3), options, overrides)
    check_seconds(trial.training.seconds, "[training] seconds =")
    if options.size is not None:
        check_size(trial)
    if is_prepared(Path(str(options.source))):
        fields = [field for field in dataclasses.fields(options) if field.name in DATA_OPTIONS]
        given = [_option(field.name) for field in fields if getattr(options, field.name) != field.default]
        if given:
            raise UserError(f"{options.source} is prepared already; leave {', '.join(given)} away.")
    from snowmelt.device import make_precision, pick_device
    from snowmelt.models import check_names

    check_names(trial)
    device = pick_device(options.device)
    if (asked := _precision(options, overrides)) != "auto":
        make_precision(device, asked)
    return overrides


def _precision(options: TrainOptions, overrides: dict[str, dict[str, Any]]) -> str:
    """The one asked for, or auto."""
    return options.precision if options.precision != "auto" else overrides["training"].get("precision", "auto")


def _new(path: Path, options: TrainOptions, overrides: dict[str, dict[str, Any]], log: Log) -> Run:
    """Prepare the pictures and write a fully resolved run."""
    from snowmelt.run import Run
    from snowmelt.training.forecast import updates_of

    config, speed = _settled(path, options, overrides, log, console())
    log(f"Updates: {updates_of(config, speed)}.")
    return Run.create(path, config)


def _settled(
    path: Path, options: TrainOptions, overrides: dict[str, dict[str, Any]], log: Log, say: Console
) -> tuple[Config, float | None]:
    """The configuration, settled by the pictures, which are prepared in `path` where needed, and by the machine; and
    how many images a second it trains, where that was measured.

    Args:
        say: is told how the pictures are prepared.
    """
    from snowmelt.data.prepared import is_prepared, open_prepared
    from snowmelt.device import pick_device
    from snowmelt.training.fitting import fitted

    source = Path(str(options.source))
    seed = overrides["training"].get("seed", 0)
    data = open_prepared(source) if is_prepared(source) else _prepare(path / "data", options, seed, say)
    choice, given = partial(resolve, facts_of(data), options, overrides), overrides["training"]
    check_size(choice())
    asked = _precision(options, overrides)
    return fitted(choice, data, pick_device(options.device), asked=asked, given=given, log=log)


def _overrides(options: TrainOptions) -> dict[str, dict[str, Any]]:
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
            "seed": options.seed or None,
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
            option = _option(next(iter(known[section])))
            raise UserError(f"{option} says how a diffusion model learns; leave it away, or leave --model away.")
    return {section: {**tables.get(section, {}), **known.get(section, {})} for section in sections}


def resolve(
    data: DataConfig,
    options: TrainOptions,
    overrides: dict[str, dict[str, Any]],
    *,
    images: int | None = None,
    gpu: bool = False,
    large: bool = False,
) -> Config:
    """The whole configuration: the preset for these pictures, overridden by what the person gave.

    Args:
        images: how many the machine can train on in the time given; None where that is not known.
        gpu, large: see `preset`; of a network of which the person has given anything the rest is the usual one's.

    Raises:
        UserError: an override has an unknown key or a value that does not fit.
    """
    own_network = bool(overrides.get("network"))
    choice = partial(preset, data, options.model, gpu=gpu, large=large and not own_network)
    usual, chosen = choice(), choice(images=images)
    if own_network:
        chosen = dataclasses.replace(chosen, network=usual.network)
    tables = config_tables(dataclasses.replace(chosen, version=__version__))
    if overrides.get("diffusion", {}).get("predicts") in EXPORTED:
        tables["diffusion"]["linear"] = 0
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
    if config.training.steps is not None and "augment" not in overrides.get("diffusion", {}):
        # No time to fit anything to, but how often each picture is going to be seen is known.
        augment = changed_for(data, config.training.steps * config.training.batch)
        config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, augment=augment))
    return dataclasses.replace(config, data=data, request=_request(options))


def _prepare(out: Path, options: TrainOptions, seed: int, say: Console) -> Prepared:
    from snowmelt.prepare import PrepareOptions, prepare

    return prepare(
        PrepareOptions(
            source=str(options.source),
            out=out,
            size=options.size,
            color=options.color,
            background=options.background,
            fit=options.fit,
            classes=options.classes,
            seed=seed,
        ),
        say,
    )
