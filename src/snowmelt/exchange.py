"""`snowmelt import` and `snowmelt export`: networks from elsewhere become runs, and runs become folders for elsewhere.

A run and a folder of `diffusers` hold the same weights under the same names; what differs is how the settings around
them are written down: see `foreign`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from snowmelt import __version__
from snowmelt.config import Config, DataConfig, TrainingConfig
from snowmelt.data.publish import publish
from snowmelt.data.source import resolved
from snowmelt.errors import UserError, choose
from snowmelt.files import write_synced
from snowmelt.presets import DEFAULT_SECONDS, check_length, facts_of, preset
from snowmelt.terminal import Log, console, seconds_of

if TYPE_CHECKING:
    from torch import Tensor

    from snowmelt.data.prepared import Prepared
    from snowmelt.foreign.pipeline import Foreign
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run

GENTLE = 2e-4
"""Learning rate of an imported network: that of DDPM's own training. One ten times as high forgets what was learnt."""
LEVELS = 50
"""Levels noted beside an ONNX file, for whoever draws with it."""


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """Make a run of a network that diffusers saved: the folder of a DDPMPipeline, or of a UNet2DModel alone."""

    folder: tyro.conf.Positional[Path]
    """The folder that save_pretrained made; its weights must be safetensors."""
    out: Path | None = None
    """The run directory; runs/NAME when not given."""
    pictures: str | None = None
    """Pictures to go on training with: a folder, zip or tar, a prepared dataset, or builtin:digits."""
    steps: int | None = None
    """How many optimizer steps `snowmelt train --resume` will train."""
    duration: Annotated[str | None, tyro.conf.arg(name="for")] = None
    """How long it may take: 90s, 20m, 8h. 10m when neither this nor --steps is given."""
    every_label: bool = False
    """Take every label of the network for a class, and add one that stands for no class. Without this the last label
    stands for no class already, as in networks trained here."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write the average weights of a run so that diffusers, or anything that reads ONNX, opens them."""

    run: tyro.conf.Positional[Path]
    """The run directory that `snowmelt train` made."""
    out: Path | None = None
    """The folder to write; RUN/exported/FORMAT when not given."""
    format: Literal["diffusers", "onnx"] = "diffusers"
    """diffusers: a DDPMPipeline. onnx: the denoiser (x, log_snr, labels) -> x0, and how to use it as JSON."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Of a run with classes: the one that the pipeline draws, since a DDPMPipeline cannot be told one."""
    keep_classes: bool = False
    """Keep all classes in the network instead: for importing it again, and for UNet2DModel without the pipeline."""


def import_run(options: ImportOptions) -> Run:
    """Read the folder, make a run of it, and return it; it appears whole or not at all.

    Raises:
        UserError: the folder, the pictures or the options cannot be used; nothing is written.
    """
    training = _training(options)
    folder = Path(options.folder)
    out = Path(options.out or Path("runs") / (folder.resolve().name or "imported"))
    _refuse_existing(out)
    # Late, so that the command line stays instant.
    from snowmelt.foreign.pipeline import read_folder
    from snowmelt.run import Run

    foreign = read_folder(folder)
    known = _known(foreign, options)
    say = console()
    with publish(out, lambda _out: False) as building:
        data = _pictures(foreign, known, options, building) if options.pictures else None
        facts = known
        if data is not None:
            # Where the pictures have classes, their names are the names of the labels.
            facts = dataclasses.replace(facts_of(data), classes=data.classes or known.classes)
        config = _config(foreign, facts, training)
        request = {"folder": str(folder.resolve())}
        if data is not None:
            request["source"] = resolved(str(options.pictures))
        if data is not None and data.path.parent != building:
            request["source"] = str(data.path.resolve())
        run = Run.create(building, dataclasses.replace(config, request=request))
        log = Log(say, building / "log.txt")
        _describe(foreign, config, options, log)
        _save_weights(run, _weights(foreign, config))
        run.write_status("stopped", step=0, images=0)
    say.print(f"Imported into {out}. Draw from it with: snowmelt sample {out}", markup=False)
    if data is not None:
        say.print(f"Go on training with: snowmelt train --resume {out}", markup=False)
    return Run.open(out)


def _training(options: ImportOptions) -> TrainingConfig:
    """How it will be trained, as far as the options say."""
    check_length(options.steps, options.duration)
    if options.steps is not None:
        return TrainingConfig(steps=options.steps)
    return TrainingConfig(seconds=DEFAULT_SECONDS if options.duration is None else seconds_of(options.duration))


def _refuse_existing(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out.")


def _known(foreign: Foreign, options: ImportOptions) -> DataConfig:
    """What is known of the data without pictures: size, colour, classes."""
    pictures = foreign.pictures
    if foreign.data is not None and not options.every_label:
        return dataclasses.replace(foreign.data, fingerprint="")
    if options.every_label and not pictures.labels:
        raise UserError(f"The network in {options.folder} has no classes; leave --every-label away.")
    count = pictures.labels or 0
    names = tuple(str(label) for label in range(count if options.every_label else count - 1))
    return DataConfig(pictures.size, pictures.channels, names)


def _pictures(foreign: Foreign, known: DataConfig, options: ImportOptions, building: Path) -> Prepared:
    """The pictures, prepared as the network needs them: in the new run, or where they are prepared already.

    Raises:
        UserError: they cannot be prepared, or do not fit the network.
    """
    from rich.console import Console

    from snowmelt.data.prepared import is_prepared, open_prepared
    from snowmelt.prepare import PrepareOptions, prepare

    source = str(options.pictures)
    if is_prepared(Path(source)):
        data = open_prepared(Path(source))
    else:
        console().print(f"Preparing the pictures of {source}", markup=False)
        wanted = PrepareOptions(
            source,
            building / "data",
            known.size,
            "grey" if known.channels == 1 else "rgb",
            classes="auto" if known.classes else "none",
        )
        data = prepare(wanted, Console(quiet=True))
    if (data.size, data.channels) != (known.size, known.channels):
        raise UserError(
            f"{source} holds pictures of {data.size} pixels and {data.channels} channels and the network draws "
            f"{known.size} and {known.channels}; name the images themselves, and they are prepared to fit."
        )
    if data.classes and len(data.classes) != len(known.classes):
        advice = "name other pictures, or prepare these with --classes none"
        if len(data.classes) == foreign.pictures.labels:
            advice = "add --every-label if none of its labels stands for no class"
        raise UserError(f"{source} has {len(data.classes)} classes and the network {len(known.classes)}; {advice}.")
    return data


def _config(foreign: Foreign, data: DataConfig, training: TrainingConfig) -> Config:
    from snowmelt.device import threads_for

    training = dataclasses.replace(
        preset(data, "diffusion").training,
        steps=training.steps,
        seconds=training.seconds,
        learning_rate=GENTLE,
        threads=threads_for(data.size),
    )
    return Config(data, "diffusion", foreign.network, foreign.diffusion, training=training, version=__version__)


def _weights(foreign: Foreign, config: Config) -> dict[str, Tensor]:
    """The weights of the backbone; a class embedding without a row for no class gets the mean of the others."""
    from torch import cat

    weights, name = dict(foreign.weights), "class_embedding.weight"
    if name in weights and len(weights[name]) == len(config.data.classes):
        weights[name] = cat([weights[name], weights[name].mean(0, keepdim=True)])
    return weights


def _save_weights(run: Run, weights: dict[str, Tensor]) -> None:
    """The checkpoint of step 0: the weights, which are their own average, and an optimizer that has seen nothing."""
    import torch

    from snowmelt import checkpoint
    from snowmelt.device import Precision
    from snowmelt.models import build_learner
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.training.progress import Progress

    learner = build_learner(run.config, Precision(torch.device("cpu")))
    assert isinstance(learner.model, DiffusionModel)
    learner.model.denoiser.backbone.load_state_dict(weights)
    state = learner.model.state_dict()
    groups = {"weights": state, "average": state, "optimizer": learner.optimizer_tensors()}
    checkpoint.save(run.checkpoints, 0, groups, Progress().as_dict())


def _describe(foreign: Foreign, config: Config, options: ImportOptions, log: Log) -> None:
    pictures, data = foreign.pictures, config.data
    count = sum(tensor.numel() for tensor in foreign.weights.values())
    kind = "grey" if pictures.channels == 1 else "colour"
    log(f"{options.folder}: {count:,} weights for {kind} pictures of {pictures.size} pixels.")
    table = f"a table of {len(foreign.diffusion.betas)} betas" if foreign.diffusion.betas else "DDPM's linear betas"
    if foreign.bare:
        log("The folder does not say how the network was trained: taken to predict the noise on DDPM's linear betas.")
    else:
        log(f"It predicts {foreign.diffusion.predicts} on {table}.")
    if data.classes and foreign.data is None:
        last = "one more, the mean of all, stands" if options.every_label else "the last one stands"
        log(f"It has {pictures.labels} labels: {last} for no class.")


def export_run(options: ExportOptions) -> Path:
    """Write the folder and return it; it appears whole or not at all.

    Raises:
        UserError: the run cannot be written in this format, or the options make no sense; nothing is written.
    """
    # Late, so that the command line stays instant.
    import torch

    from snowmelt.device import Precision
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run

    run = Run.open(Path(options.run))
    write = choose(_FORMATS, options.format, "format")
    out = Path(options.out or run.path / "exported" / options.format)
    _refuse_existing(out)
    _check_classes(options, run)
    model, checkpoint = run.load_model(Precision(torch.device("cpu")))
    if not isinstance(model, DiffusionModel):
        raise UserError(f"{run.path} is a {run.config.model} and no diffusion model; only those can be exported.")
    with publish(out, lambda _out: False) as building:
        write(building, model, options)
    step = int(checkpoint.name)
    console().print(f"Wrote the average weights of step {step} to {out}", markup=False)
    return out


def _check_classes(options: ExportOptions, run: Run) -> None:
    names = run.config.data.classes
    if options.class_name is None and not options.keep_classes:
        if options.format == "diffusers" and run.always_told:
            raise UserError(
                f"{run.path} knows pictures only with their class; say which with --class, or add --keep-classes."
            )
        return
    if options.format == "onnx":
        raise UserError("An ONNX file is told the class whenever it is asked; leave --class and --keep-classes away.")
    if not names:
        raise UserError(f"{options.run} was trained without classes; leave --class and --keep-classes away.")
    if options.class_name is not None and options.keep_classes:
        raise UserError("--class and --keep-classes exclude each other; give one.")
    if options.class_name is not None:
        run.config.data.label_of(options.class_name)


def _to_diffusers(folder: Path, model: DiffusionModel, options: ExportOptions) -> None:
    from snowmelt.foreign.pipeline import write_folder

    data, diffusion = model.config.data, model.config.diffusion
    weights = model.denoiser.backbone.state_dict()
    data = dataclasses.replace(data, fingerprint="")
    # Pictures that are drawn are unchanged, of which the network need not be told.
    weights.pop("told_embedding.weight", None)
    diffusion = dataclasses.replace(diffusion, augment=0.0)
    if data.classes and not options.keep_classes:
        label = len(data.classes) if options.class_name is None else data.label_of(options.class_name)
        # The embeddings of level and class are added, so a class that never changes is part of the bias before it.
        rows = weights.pop("class_embedding.weight")
        weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + rows[label]
        data = dataclasses.replace(data, classes=(), counts=())
    write_folder(folder, model.config.network, data, diffusion, weights)
    if len(data.classes) < len(model.config.data.classes):
        drawn = "no class (choose one with --class)" if options.class_name is None else f"class {options.class_name}"
        console().print(f"A DDPMPipeline cannot be told a class: this one draws {drawn}.", markup=False)


def _to_onnx(folder: Path, model: DiffusionModel, options: ExportOptions) -> None:
    from snowmelt.diffusion.grids import time_grid
    from snowmelt.foreign.onnx import export_denoiser

    data = model.config.data
    classes = {"classes": list(data.classes), "no_class": len(data.classes)} if data.classes else {}
    about = {
        "snowmelt": __version__,
        "inputs": ["x", "log_snr", "labels"] if data.classes else ["x", "log_snr"],
        "output": "x0",
        "size": data.size,
        "channels": data.channels,
        "range": [-1, 1],
        **classes,
        "log_snrs": time_grid(model.sampled_on, LEVELS).tolist(),
    }
    export_denoiser(
        model.denoiser, folder / "denoiser.onnx", size=data.size, channels=data.channels, classes=len(data.classes)
    )
    write_synced(folder / "denoiser.json", json.dumps(about, indent=1, ensure_ascii=False).encode())


_FORMATS: dict[str, Callable[[Path, DiffusionModel, ExportOptions], None]] = {
    "diffusers": _to_diffusers,
    "onnx": _to_onnx,
}
