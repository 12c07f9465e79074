"""Does `--for` choose well? It beside presets set by hand, which get the same time.

    python benchmarks/dial.py ../shared/data/mnist-train.zip ../shared/data/emoji.zip --size 32 --minutes 1 3
    python benchmarks/dial.py ../shared/data/dogs.zip --size 64 --minutes 1 3 --out DIR

In each cell (a source and a time) five runs of `snowmelt train --for` follow each other: one that chooses for itself
and four that are given, by --config, what somebody might set by hand:

    small batches   16 pictures, which makes most updates
    large batches   64 pictures
    wide            twice the channels, 32 pictures, and a learning rate of 0.002
    patches         squares of pixels enter as one place, which leaves a quarter of the places on the widest map;
                    32 pictures

with the learning rate that runs of unknown length have, but for the wide one's. Then, off the clock, each draws as
`snowmelt sample` does, in float32, and is measured as `snowmelt evaluate` measures. The time is that of the whole
command. A cell is met in a space when the time is within 5 % and the Frechet distance no more than 1.1 times that of
the best preset. Results go on in a file, so that a cell that was run before is not run again; --redraw has its runs
draw again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from snowmelt.config import DataConfig

DIAL = "--for"
TIME, DISTANCE = 0.05, 1.1
"""How far from the time a run may end, and how many times as far from real pictures as the best preset it may draw."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Folders or archives of images, or prepared datasets."""
    minutes: tuple[float, ...] = (1.0, 3.0)
    size: int | None = None
    samples: int = 400
    """Pictures of each run that are measured."""
    seed: int = 0
    redraw: bool = False
    """Draw and measure anew with the runs that --out has, as after a change of how pictures are drawn."""
    out: Path = Path("runs/dial")


def presets(facts: DataConfig) -> dict[str, str]:
    """Four configurations for these pictures, as TOML for --config."""
    from snowmelt.presets import network_for, preset

    network = network_for(facts)
    # Network and rate are those of runs whose length is not known: they must not follow the dial.
    rate = preset(facts, "diffusion").training.learning_rate
    usual = {"channels": list(network.channels)}
    wide = {"channels": [2 * width for width in network.channels]}
    channels, attention = list(network.channels[1:]), list(network.attention[1:])
    patches = {"channels": channels, "attention": attention, "patch": 2 * network.patch}
    return {
        "small batches": _toml(network=usual, training={"batch": 16, "learning_rate": rate}),
        "large batches": _toml(network=usual, training={"batch": 64, "learning_rate": rate}),
        "wide": _toml(network=wide, training={"batch": 32, "learning_rate": 2e-3}),
        "patches": _toml(network=patches, training={"batch": 32, "learning_rate": rate}),
    }


def _toml(**sections: dict[str, Any]) -> str:
    def lines() -> Iterator[str]:
        for name, values in sections.items():
            yield f"[{name}]"
            # JSON's numbers, lists and words for true and false are TOML's too.
            yield from (f"{key} = {json.dumps(value)}" for key, value in values.items())

    return "\n".join(lines()) + "\n"


def cell(data: Path, minutes: float, name: str, options: Options, *, taken: float | None) -> dict[str, Any]:
    """One run: how long it took, what it saw, and how near to real pictures it draws.

    Args:
        taken: the seconds it took, where it is trained already.
    """
    import torch

    from contest import train_snowmelt
    from snowmelt.data.prepared import open_prepared
    from snowmelt.evaluating.draw import draw
    from snowmelt.evaluating.options import EvaluateOptions
    from snowmelt.evaluating.quality import in_spaces, order_of, spaces_of
    from snowmelt.pictures import save_png, sheet_of_pixels
    from snowmelt.presets import facts_of
    from snowmelt.run import Run
    from snowmelt.terminal import Log, console

    prepared = open_prepared(data)
    folder = options.out / f"{data.parent.name}-{minutes:g}-{name.strip('-').replace(' ', '-')}"
    more: list[str] = []
    if name != DIAL:
        settings = folder.with_name(f"{folder.name}.toml")
        settings.write_text(presets(facts_of(prepared))[name], encoding="utf-8")
        more = ["--config", str(settings)]
    if taken is None:
        # Of a cell that was stopped: a run that is finished would not be trained.
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.monotonic()
        train_snowmelt(data, 60 * minutes, folder, options.seed, *more)
        taken = time.monotonic() - begin
    run = Run.open(folder)
    # All alike, whatever each preset was trained in, and on every machine.
    asked = EvaluateOptions(folder, samples=options.samples, seed=options.seed, precision="fp32")
    status = run.status()
    drawn = draw(order_of(run, asked), 0)
    save_png(folder.with_name(f"{folder.name}.png"), sheet_of_pixels(torch.from_numpy(drawn.pixels[:64]), 8))
    spaces = spaces_of(prepared, asked, Log(console(), options.out / "log.txt"))
    figures = in_spaces(spaces, prepared, drawn.pixels, seed=options.seed, names=("frechet", "kid"))
    return {
        "seconds": taken,
        "images": status["images"],
        "parameters": status["parameters"],
        "batch": run.config.training.batch,
        "distances": {
            figure.space: [figure.value, figure.low, figure.high] for figure in figures if figure.metric == "frechet"
        },
        "kid": {figure.space: [figure.value, figure.low, figure.high] for figure in figures if figure.metric == "kid"},
    }


def main(options: Options) -> None:
    """Run every cell, and print the table after each."""
    from contest import data_of, found_in
    from snowmelt.data.prepared import is_prepared
    from snowmelt.data.source import name_of

    found_in(options.out, size=options.size, samples=options.samples, seed=options.seed)
    file = options.out / "found.json"
    for source in options.sources:
        # A prepared dataset lies in a folder that tells more than its own name, mostly "data".
        named = Path(source).resolve().parent if is_prepared(Path(source)) else Path(source)
        folder = options.out / name_of(str(named))
        folder.mkdir(exist_ok=True)
        data = data_of(source, folder, options.size)
        for minutes in options.minutes:
            for name in (DIAL, *presets(DataConfig(options.size or 32, 3))):
                found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
                row = found.setdefault(f"{folder.name}, {minutes:g} min", {})
                if name in row and not options.redraw:
                    continue
                taken = row[name]["seconds"] if name in row else None
                told = json.dumps([str(data), minutes, name, {**vars(options), "out": str(options.out)}, taken])
                words = [sys.executable, __file__, "--worker", told]
                done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
                row[name] = json.loads(done.stdout.splitlines()[-1])
                file.write_text(json.dumps(found, indent=1), encoding="utf-8")
            show(json.loads(file.read_text(encoding="utf-8")))


def show(found: dict[str, Any]) -> None:
    """The table so far."""
    table = Table("cell", "settings", "M", "batch", "images", "time", "Frechet distance", "KID x 1000", "met")
    for title, row in found.items():
        for name, one in row.items():
            distances = (f"{space} {_words(one['distances'][space])}" for space in one["distances"])
            kids = (f"{1000 * value:.3g}" if value is not None else "-" for value, *_ in one["kid"].values())
            table.add_row(
                title if name == DIAL else "", name, f"{one['parameters'] / 1e6:.2f}", str(one["batch"]),
                f"{one['images']:,}", f"{one['seconds'] / (60 * _minutes(title)):.3f}", "\n".join(distances),
                "\n".join(kids), "\n".join(_met(title, row)) if name == DIAL else "",
            )  # fmt: skip
    Console(width=150).print(table)


def _words(distance: list[float | None]) -> str:
    value, low, high = distance
    return "-" if value is None or low is None or high is None else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _minutes(title: str) -> float:
    return float(title.rpartition(", ")[2].removesuffix(" min"))


def _met(title: str, row: dict[str, Any]) -> Iterator[str]:
    """Whether the time is kept and, in each space, how far the dial is from real pictures beside the best preset."""
    ours = row[DIAL]
    late = ours["seconds"] / (60 * _minutes(title)) - 1
    yield f"time {'yes' if abs(late) <= TIME else 'no'}"
    for space, (value, *_) in ours["distances"].items():
        theirs = [one["distances"][space][0] for name, one in row.items() if name != DIAL]
        least = min((distance for distance in theirs if distance is not None), default=None)
        if value is None or least is None:
            yield f"{space} -"
        else:
            yield f"{space} {value / least:.2f} {'yes' if value <= DISTANCE * least else 'no'}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        source, minutes, name, fields, taken = json.loads(sys.argv[2])
        options = Options(**{**fields, "out": Path(fields["out"])})
        print(json.dumps(cell(Path(source), minutes, name, options, taken=taken)))
    else:
        main(tyro.cli(Options))
