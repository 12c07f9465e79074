"""`snowmelt prepare`: images anywhere -> a prepared dataset and a report of what was used, changed and skipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console

from snowmelt.data.prepared import FILES, Prepared, is_prepared, open_prepared
from snowmelt.errors import UserError, choose, options_given

if TYPE_CHECKING:
    from snowmelt.data.assemble import Plan

MIN_SIZE, MAX_SIZE = 8, 1024

PICTURE_OPTIONS = ("size", "color", "background", "fit", "classes")
"""What is decided of pictures when they are prepared; `train` and `compare`, which may prepare them, have these too."""


@dataclass(frozen=True)
class PrepareOptions:
    """Turn a folder, zip or tar of images into a prepared dataset. The source is only read."""

    source: tyro.conf.Positional[str]
    """A folder of images (sub-folders may be classes), a zip or tar of images, or builtin:digits."""
    out: Path | None = None
    """Where to write; prepared/NAME when not given."""
    size: int | None = None
    """Height and width in pixels, a multiple of 4 from 8 to 1024; chosen from the images, up to 64, when not given."""
    color: Literal["auto", "rgb", "grey"] = "auto"
    """Colour or grey; auto looks at the images."""
    background: str = "white"
    """What transparent and padded parts show: a name or #rrggbb."""
    fit: Literal["crop", "pad"] = "crop"
    """How an image that is not square becomes one: crop to the middle, or pad with the background."""
    seed: int = 0
    """Decides which images are held out of training to measure on."""
    classes: Literal["auto", "none"] = "auto"
    """auto takes sub-folders as classes where every image lies in one."""
    workers: int | None = None
    """Processes that decode; one per core when not given."""


def prepare(options: PrepareOptions, console: Console | None = None) -> Prepared:
    """Write the prepared dataset and its report, say what was done, and open it.

    It appears whole or not at all, replaces only a prepared dataset, and is the same bytes for the same images and
    options. A `UserError` where the source holds no two different images or an option makes no sense.
    """
    # Late, so that `snowmelt --help` stays instant.
    from snowmelt.data.assemble import fill
    from snowmelt.data.publish import publish

    console = console or Console()
    plan = _check(options)
    try:
        with publish(plan.out, _is_only_ours) as folder:
            lines = fill(folder, plan, console)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{plan.out} cannot be written ({reason}); free some space or choose --out.") from error
    for line in [*lines, f"written to {plan.out}; what was changed or skipped is in {plan.out / 'report.txt'}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return open_prepared(plan.out)


def refuse_late(source: Path, options: Any) -> None:
    """Refuse options of another verb that come too late for pictures which are prepared already."""
    if is_prepared(source) and (named := options_given(options, PICTURE_OPTIONS)):
        raise UserError(f"{source} is prepared already; leave {named} away.")


def _check(options: PrepareOptions) -> Plan:
    from snowmelt.data.assemble import Plan
    from snowmelt.data.decode import FITS, color_of
    from snowmelt.data.workers import cores

    if options.size is not None:
        _check_size(options.size)
    choose(FITS, options.fit, "fit")
    choose(dict.fromkeys(("auto", "rgb", "grey")), options.color, "color")
    choose(dict.fromkeys(("auto", "none")), options.classes, "choice of classes")
    if options.seed < 0:
        raise UserError(f"The seed is {options.seed}; choose a whole number from 0.")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"{options.workers} workers cannot decode; choose 1 or more, or leave --workers out.")
    name = _check_source(options.source)
    out = options.out or Path("prepared") / name
    source = Path(options.source)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies inside the source, which is only read; choose a place outside it with --out.")
    return Plan(
        source=options.source,
        out=out,
        size=options.size,
        color=options.color,
        background=color_of(options.background),
        fit=options.fit,
        seed=options.seed,
        classes=options.classes,
        workers=options.workers or cores(),
    )


def _check_size(size: int) -> None:
    if MIN_SIZE <= size <= MAX_SIZE and size % 4 == 0:
        return
    below = size // 4 * 4
    near = [str(value) for value in (below, below + 4) if MIN_SIZE <= value <= MAX_SIZE]
    near = near or [str(MIN_SIZE if size < MIN_SIZE else MAX_SIZE)]
    rule = f"a multiple of 4 from {MIN_SIZE} to {MAX_SIZE}"
    raise UserError(f"The size is {size}, but it must be {rule}; choose {' or '.join(near)}.")


def _check_source(source: str) -> str:
    """The name of the dataset."""
    from snowmelt.data.assemble import BUILTINS
    from snowmelt.data.source import BUILTIN, is_builtin, name_of, source_kind

    if is_builtin(source):
        name = source.removeprefix(BUILTIN)
        choose(BUILTINS, name, "built-in dataset")
        return name
    path = Path(source)
    if is_prepared(path):
        raise UserError(f"{path} is a prepared dataset already; train on it with `snowmelt train {path}`.")
    source_kind(path)
    return name_of(source)


def _is_only_ours(out: Path) -> bool:
    from snowmelt.data.publish import contents

    return is_prepared(out) and all(name in FILES for name in contents(out))
