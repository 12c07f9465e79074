"""Seconds until a thousand pictures of a run are files, the whole command as a person runs it.

    python benchmarks/drawing.py RUN --steps 8

`snowmelt sample RUN` takes turns with a program that draws with a pipeline of `diffusers` from a U-Net of 3.8 million
parameters, the small one of the other benchmarks (what its weights are does not matter for the time), with DDIM in
batches of 64, and saves the pictures. Since that takes minutes, it draws one batch, and once only starts: the
difference is what a batch costs, of which as many are counted as there would be. Nothing of `diffusers` is shown, and
no ratio, where it is not installed.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import tyro
from rich.console import Console
from rich.table import Table

from commands import timed
from snowmelt.config import read_config

BATCH = 64
RIVAL = """
import sys
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
size, channels, count, steps, folder = *map(int, sys.argv[1:5]), sys.argv[5]
down = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
up = ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
unet = UNet2DModel(size, channels, channels, down_block_types=down, up_block_types=up,
                   block_out_channels=(64, 96, 128), layers_per_block=1)
pipeline = DDIMPipeline(unet.eval(), DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)
if count:
    for number, picture in enumerate(pipeline(batch_size=count, num_inference_steps=steps).images):
        picture.save(f"{folder}/{number}.png")
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    run: tyro.conf.Positional[Path]
    """A run of `snowmelt train`."""
    count: int = 1000
    steps: int = 8
    """Of ours; what `snowmelt tune` found for as many is used."""
    rival_steps: int = 20
    turns: int = 3


def main(options: Options) -> None:
    """Take turns and print the table."""
    data = read_config(options.run / "config.toml").data
    there = find_spec("diffusers") is not None
    ours, theirs, ratios = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        sample = ["-m", "snowmelt", "sample", str(options.run), "--out", folder, "--unconditional"]
        for _ in range(options.turns):
            drawn = timed([sys.executable, *sample, "--count", str(options.count), "--steps", str(options.steps)])
            ours.append(drawn.clock)
            if not there:
                continue
            told = ["-c", RIVAL, str(data.size), str(data.channels)]
            started, batch = (
                timed([sys.executable, *told, str(count), str(options.rival_steps), folder]).clock
                for count in (0, BATCH)
            )
            theirs.append(started + (batch - started) * options.count / BATCH)
            ratios.append(theirs[-1] / ours[-1])
    table = Table("", "steps", "seconds", "median", "diffusers' over it", title=f"{options.count:,} pictures")
    rows = [("snowmelt sample", options.steps, ours, ratios), ("diffusers, DDIM", options.rival_steps, theirs, [])]
    for name, steps, taken, over in rows:
        if taken:
            each = ", ".join(f"{seconds:.1f}" for seconds in taken)
            table.add_row(name, str(steps), each, f"{median(taken):.1f}", f"{median(over):.1f} x" if over else "-")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
