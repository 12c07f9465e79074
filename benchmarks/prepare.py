"""Pictures per second of `snowmelt prepare`, the whole command as a person runs it.

    python benchmarks/prepare.py ../shared/data/dogs.zip

The photos of a folder, zip or tar are scaled to a longer side of 500 pixels and saved as JPEG; from the second time
round they are other parts of the same photos, since `prepare` counts equal pictures only once. Then `python -m snowmelt
prepare` works on all of them and on two of them in turn: the difference is what the pictures themselves cost, the rest
is the start of Python. Files are read from memory, as they have just been written. Processor time is that of the
command and its decoders together; where something else computes at the same time, it says more than the clock.
"""

from __future__ import annotations

import dataclasses
import io
import random
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

import tyro
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from commands import Taken, timed
from snowmelt.data.prepared import open_prepared
from snowmelt.data.source import MAX_FILE_BYTES, list_source, open_reader
from snowmelt.data.workers import cores
from snowmelt.errors import UserError

FEW = 2
"""The fewest that `prepare` takes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    source: tyro.conf.Positional[Path]
    """A folder, zip or tar of photos."""
    count: int = 2000
    side: int = 500
    """The longer side of the photos in pixels."""
    quality: int = 90
    """Of their JPEG files."""
    size: int | None = None
    """What they are prepared to; `prepare` chooses when not given, here 64."""
    turns: int = 5
    workers: int | None = None
    """Decoding processes; as many as `prepare` would start when not given."""
    keep: Path | None = None
    """Where the photos are kept between calls; made anew each time when not given."""


def part_of(photo: Image.Image, chance: random.Random) -> Image.Image:
    """Nine tenths of the photo, somewhere in it."""
    width, height = round(photo.width * 0.9), round(photo.height * 0.9)
    left, top = chance.randint(0, photo.width - width), chance.randint(0, photo.height - height)
    return photo.crop((left, top, left + width, top + height))


def write_photos(folder: Path, options: Options) -> None:
    """As many different photos as asked for, of the asked size.

    Raises:
        UserError: the source holds no photo.
    """
    listing = list_source(options.source)
    read = open_reader(listing.kind, listing.path)
    chance, made, before = random.Random(0), 0, -1  # noqa: S311  no secret
    while made < options.count:
        if made == before:
            raise UserError(f"{options.source} holds no photo that can be read; name another folder, zip or tar.")
        first, before = before < 0, made
        for entry in listing.entries:
            try:
                photo = ImageOps.exif_transpose(Image.open(io.BytesIO(read(entry, MAX_FILE_BYTES)))).convert("RGB")
            except OSError:
                continue
            photo = photo if first else part_of(photo, chance)
            photo = ImageOps.contain(photo, (options.side, options.side), Image.Resampling.LANCZOS)
            photo.save(folder / f"{made:06}.jpg", quality=options.quality)
            made += 1
            if made == options.count:
                break


def photos(folder: Path, options: Options) -> tuple[Path, Path]:
    """The folder of all photos and that of a few, made where they are missing."""
    every, few = folder / f"{options.count}-{options.side}-{options.quality}", folder / "few"
    if not every.exists():
        making = folder / "making"
        shutil.rmtree(making, ignore_errors=True)  # of a call that was cut off
        making.mkdir(parents=True, exist_ok=True)
        write_photos(making, options)
        making.rename(every)
    few.mkdir(exist_ok=True)
    for path in sorted(every.iterdir())[:FEW]:
        (few / path.name).write_bytes(path.read_bytes())
    return every, few


def prepare(source: Path, out: Path, options: Options) -> Taken:
    """Run the command once."""
    command = [sys.executable, "-m", "snowmelt", "prepare", str(source), "--out", str(out)]
    command += ["--size", str(options.size)] if options.size is not None else []
    command += ["--workers", str(options.workers)] if options.workers is not None else []
    return timed(command)


def measure(folder: Path, options: Options, screen: Console) -> None:
    """Prepare all and a few in turn, and print the table."""
    every, few = photos(folder, options)
    taken: dict[Path, list[Taken]] = {every: [], few: []}
    out = folder / "prepared"
    for source in taken:
        prepare(source, out / source.name, options)  # not counted: it reads the files into memory
    for _ in range(options.turns):
        for source, found in taken.items():
            found.append(prepare(source, out / source.name, options))
    shape = open_prepared(out / every.name).images.shape
    bytes_each = median(path.stat().st_size for path in every.iterdir())
    clock = {source: median(one.clock for one in found) for source, found in taken.items()}
    work = {source: median(one.processor for one in found) for source, found in taken.items()}
    between = median(all_of.clock - some.clock for all_of, some in zip(taken[every], taken[few], strict=True))
    least = median(all_of.processor - some.processor for all_of, some in zip(taken[every], taken[few], strict=True))
    table = Table(
        "", "pictures", "seconds", "pictures/s", "processor seconds", "ms of a processor per picture",
        title=f"prepare: {shape[0]:,} JPEG photos of {options.side} pixels, {bytes_each / 1e3:.0f} kB each, "
        f"to {shape[1]} x {shape[2]} on {options.workers or cores()} cores; median of {options.turns} turns",
    )  # fmt: skip
    rows = (
        ("the whole command", options.count, clock[every], work[every]),
        ("a few pictures: the start", FEW, clock[few], work[few]),
        ("the difference", options.count - FEW, between, least),
    )
    for name, count, seconds, spent in rows:
        table.add_row(
            name, f"{count:,}", f"{seconds:.2f}", f"{count / seconds:,.0f}" if count > FEW else "",
            f"{spent:.2f}", f"{1000 * spent / count:.2f}" if count > FEW else "",
        )  # fmt: skip
    screen.print(table)


def main(options: Options) -> None:
    """Make the photos and measure."""
    screen = Console(width=120)
    if options.keep is not None:
        measure(options.keep, options, screen)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options, screen)


if __name__ == "__main__":
    main(tyro.cli(Options))
