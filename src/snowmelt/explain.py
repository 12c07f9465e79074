"""`snowmelt explain`: a photo becomes a page that shows the forward process and, with a run, the way back."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from snowmelt.data.publish import contents, publish
from snowmelt.errors import UserError, choose
from snowmelt.late import import_torch
from snowmelt.terminal import console

if TYPE_CHECKING:
    from snowmelt.data.decode import Recipe
    from snowmelt.diffusion.schedules import Schedule
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run

SIZE = 128
SMALLEST, LARGEST = 8, 256
FEWEST, MOST = 10, 10_000
FILES = (
    "index.html",
    "forward.png",
    "histogram.png",
    "curves.png",
    "reverse.png",
    "beliefs.png",
    "steps.png",
    "parts.png",
    "errors.png",
)


@dataclasses.dataclass(frozen=True)
class ExplainOptions:
    """Show a photo turn to noise and back: one page that opens offline, and its pictures as PNG."""

    photo: tyro.conf.Positional[Path]
    """A picture file: JPEG, PNG, WebP, ..."""
    run: Path | None = None
    """A run of a diffusion model: the page then shows its way back, too."""
    out: Path | None = None
    """Where the page goes; explain/NAME when not given."""
    schedule: str | None = None
    """The noise schedule; linear when not given, or that of the run."""
    steps: int = 1000
    """Steps from photo to noise, T."""
    seed: int = 0
    """Decides the noise: that of picture 0 of the same seed in `snowmelt sample`."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """The class that the network is told; the one that fits the photo best when not given."""
    size: int | None = None
    """Height and width in pixels, 8 to 256; 128 when not given, and with --run the run's own."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes a GPU where there is one."""


def explain(options: ExplainOptions) -> Path:
    """Write the page and its pictures, and return the path of index.html.

    The folder appears whole or not at all, replaces only an earlier explanation, and is the same bytes for the same
    photo, options and weights.

    Raises:
        UserError: for every mistake in the options, before anything is written.
    """
    out = options.out or Path("explain") / (options.photo.stem or "photo")
    _check(options, out)
    # Late, so that the command line stays instant.
    import_torch()
    from snowmelt.data.photo import images_of, read_photo
    from snowmelt.explaining.forward import forward_part
    from snowmelt.explaining.page import Part, Subject, whole
    from snowmelt.explaining.process import Process
    from snowmelt.files import printable

    run, model = _opened(options)
    name, schedule = _schedule(options, model)
    photo = read_photo(options.photo, _recipe(options, run))
    x0 = images_of(photo, 3 if run is None else run.config.data.channels)
    process = Process.of(x0, schedule, options.steps, options.seed)
    photo_name = printable(options.photo.name)
    subject = Subject(photo_name, photo.changes, name, options.seed, _command(options))
    with console().status("Walking from the photo to noise"):
        forward = forward_part(process, subject)
    network: Part | None = None
    if run is not None and model is not None:
        from snowmelt.explaining.network import Network, fitting_label
        from snowmelt.explaining.reverse import reverse_part

        with console().status("Walking back with the network"):
            label = _label(options, run)
            label = fitting_label(model, process, options.seed) if label is None else label
            network = reverse_part(process, Network.of(model, label), run, subject)
    files = {**forward.files, **(network.files if network else {})}
    with publish(out, is_explanation) as folder:
        for file, data in files.items():
            (folder / file).write_bytes(data)
        (folder / "index.html").write_bytes(whole(forward, network, subject, x0.shape[-1]))
    console().print(f"Wrote {out / 'index.html'}; open it in a browser", markup=False)
    return out / "index.html"


def is_explanation(out: Path) -> bool:
    """Whether the folder holds an earlier explanation and nothing else."""
    from snowmelt.pages.shell import is_made_by

    page = out / "index.html"
    if not page.is_file() or any(name not in FILES for name in contents(out)):
        return False
    return is_made_by(page, "explain")


def _check(options: ExplainOptions, out: Path) -> None:
    """What can be told without torch."""
    if not FEWEST <= options.steps <= MOST:
        raise UserError(f"--steps is {options.steps}; give a number from {FEWEST} to {MOST:,}, such as 1000.")
    if options.size is not None and not SMALLEST <= options.size <= LARGEST:
        raise UserError(f"--size is {options.size}; give a number from {SMALLEST} to {LARGEST}.")
    if options.class_name is not None and options.run is None:
        raise UserError("--class is told to a network, and there is none; name a run with --run, too.")
    if out.is_dir() and contents(out) and not is_explanation(out):
        raise UserError(f"{out} holds files that are not an explanation's; choose another place with --out.")


def _opened(options: ExplainOptions) -> tuple[Run, DiffusionModel] | tuple[None, None]:
    """The run and its model, where one was named."""
    if options.run is None:
        return None, None
    from snowmelt.device import make_precision, pick_device
    from snowmelt.models.diffusion import DiffusionModel
    from snowmelt.run import Run

    run = Run.open(options.run)
    if options.size not in (None, run.config.data.size):
        raise UserError(f"{run.path} knows pictures of {run.config.data.size} pixels; leave --size away.")
    _label(options, run)
    model, _ = run.load_model(make_precision(pick_device(options.device), "fp32"))
    if not isinstance(model, DiffusionModel):
        raise UserError(
            f"{run.path} is no diffusion model ({run.config.model}); name the run of one, or leave it away."
        )
    return run, model


def _label(options: ExplainOptions, run: Run) -> int | None:
    if options.class_name is None:
        return None
    if not run.config.data.classes:
        raise UserError(f"{run.path} was trained without classes; leave --class away.")
    return run.config.data.label_of(options.class_name)


def _schedule(options: ExplainOptions, model: DiffusionModel | None) -> tuple[str, Schedule]:
    """The one asked for, or the run's, or DDPM's; and its name."""
    from snowmelt.diffusion.schedules import SCHEDULES

    if options.schedule is not None or model is None:
        name = options.schedule or "linear"
        return name, choose(SCHEDULES, name, "schedule")
    diffusion = model.config.diffusion
    name = "the run's own betas" if diffusion.betas else diffusion.schedule
    return (name if diffusion.shift == 1 else f"{name}, shifted by {diffusion.shift:g}"), model.schedule


def _recipe(options: ExplainOptions, run: Run | None) -> Recipe:
    """How the photo is made to fit: as the run's own pictures were."""
    from snowmelt.config import DataConfig
    from snowmelt.data.decode import recipe_of

    data = DataConfig(options.size or SIZE, channels=3) if run is None else run.config.data
    return recipe_of(data.size, data.background, data.fit)


def _command(options: ExplainOptions) -> str:
    """The line that makes the page again."""
    words: list[object] = ["snowmelt", "explain", options.photo]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in ("photo", "out", "device") and value != field.default:
            words += [f"--{'class' if field.name == 'class_name' else field.name}", value]
    return shlex.join(map(str, words))
