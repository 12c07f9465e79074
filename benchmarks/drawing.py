"""Seconds until a thousand pictures of a run are files, the whole command as a person runs it.

    python benchmarks/drawing.py RUN --steps 8

`snowmelt sample RUN`, in the format that it takes by itself, takes turns with a program that draws with a pipeline of
`diffusers` from a U-Net of 3.8 million parameters (what its weights are does not matter for the time), in float32, with
DDIM in batches of 64, and saves the pictures; all on the processor. Since that takes minutes, it draws one batch, and
two more in another call: the difference is what the other batches are counted for. Nothing of `diffusers` is shown, and
no ratio, where it is not installed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import tyro
from rich.console import Console
from rich.table import Table

from commands import timed
from rivals import settings
from snowmelt.config import read_config

BATCH, MORE = 64, 3
RIVAL = """
import json, sys
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
settings, batches, batch, steps, folder = map(json.loads, sys.argv[1:])
pipeline = DDIMPipeline(UNet2DModel(**settings).eval(), DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)
for first in range(batches):
    for number, picture in enumerate(pipeline(batch_size=batch, num_inference_steps=steps).images):
        picture.save(f"{folder}/{first}-{number}.png")
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
    data, there = read_config(options.run / "config.toml").data, find_spec("diffusers") is not None
    ours, theirs, ratios = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        sample = ["snowmelt", "sample", options.run, "--out", folder, "--count", options.count, "--unconditional"]
        sample += ["--steps", options.steps, "--device", "cpu"]
        network = json.dumps(settings("small", data.size, data.channels))
        rest = [*map(json.dumps, (BATCH, options.rival_steps, folder))]
        for _ in range(options.turns):
            ours.append(timed([sys.executable, "-m", *map(str, sample)]).clock)
            if not there:
                continue
            few, many = (
                timed([sys.executable, "-c", RIVAL, network, str(batches), *rest]).clock for batches in (1, MORE)
            )
            theirs.append(few + (many - few) / (MORE - 1) * (options.count / BATCH - 1))
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
