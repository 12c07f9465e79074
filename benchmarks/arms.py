"""Which settings learn most? Arms of one change each, on the same pictures, by images seen or by time.

    python benchmarks/arms.py PREPARED --seconds 180 --arms "" "training.batch=16" "training.batch=32"
    python benchmarks/arms.py PREPARED --images 10000 --seeds 0 1 2 --arms "" "network.patch=2" --samples 1000 --out DIR

An arm is the preset for these pictures with the named values in the place of its own, in the words of config.toml;
"" is the preset as it is. `--seconds` are those of the training alone: an arm's own speed is measured first, and
its steps follow from that, so that a slower arm sees fewer pictures. The loss is that of held-out pictures, with
the average weights: the error of v whatever an arm predicts, mean over log-SNRs from -8 to 6; with `--samples`
pictures are drawn too, and their Frechet distances measured as `snowmelt evaluate` measures them. Results go on in a
file, so that an arm that was run before is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from contest import found_in
from snowmelt.config import Config, TrainingConfig, config_tables
from snowmelt.data.pixels import to_pixels
from snowmelt.data.prepared import Prepared, open_prepared, spread_rows
from snowmelt.data.stream import Stream
from snowmelt.device import Precision, keep_memory, threads_for
from snowmelt.ema import Average
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluating.quality import in_spaces, spaces_of
from snowmelt.evaluation.drawing import SHARP, SMOOTH, detail, in_parts, noise_of
from snowmelt.evaluation.held_out import errors_of
from snowmelt.models import build_learner
from snowmelt.models.base import Drawing, Learner, Model
from snowmelt.models.diffusion import HELD_OUT_LEVELS
from snowmelt.networks.group_norm import channels_last_pays
from snowmelt.pictures import save_png, sheet
from snowmelt.presets import facts_of, preset
from snowmelt.seeds import generator
from snowmelt.tables import from_table
from snowmelt.terminal import Log, console
from snowmelt.training.plan import Plan
from snowmelt.training.session import study

CPU = torch.device("cpu")
TRIAL = 3
"""Steps that tell an arm's speed, after one."""
BATCH = 64
"""Pictures drawn at once."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare."""

    data: tyro.conf.Positional[Path]
    """A prepared dataset."""
    arms: tuple[str, ...] = ("",)
    """Settings such as "training.batch=16 network.patch=2"."""
    seconds: float | None = None
    images: int | None = None
    seeds: tuple[int, ...] = (0,)
    held_out: int = 600
    pictures: int | None = None
    """Train on so many of the pictures, taken by chance, and hold out all the others."""
    samples: int = 0
    threads: int = 0
    """As many as a training takes at first when not given."""
    model: str = "diffusion"
    out: Path = Path("runs/arms")


def configured(arm: str, data: Prepared, options: Options) -> Config:
    """The preset with the arm's settings."""
    tables = config_tables(preset(facts_of(data), options.model))
    for word in arm.split():
        name, _, value = word.partition("=")
        section, _, key = name.partition(".")
        tables[section][key] = tomllib.loads(f"value = {value}")["value"]
    return from_table(Config, tables, arm)


def opened(options: Options) -> Prepared:
    """The pictures; where only some are to be trained on, a dataset of its own as far as encoders are concerned."""
    data = open_prepared(options.data)
    if options.pictures is None:
        return data
    rows = np.random.default_rng(0).permutation(len(data.images))
    train, held_out = np.sort(rows[: options.pictures]), np.sort(rows[options.pictures :])
    fingerprint = f"{data.fingerprint[:40]}{options.pictures:024d}"
    return dataclasses.replace(data, train=train, held_out=held_out, fingerprint=fingerprint)


def precision(training: TrainingConfig) -> Precision:
    """The arm's, float32 unless it says otherwise, in the layout that `snowmelt train` takes."""
    return Precision(CPU, training.precision, layout="channels_last" if channels_last_pays(CPU) else "default")


def trained(config: Config, data: Prepared, options: Options, seed: int) -> tuple[Learner, Average, dict[str, Any]]:
    """The arm, trained."""
    training = dataclasses.replace(config.training, seed=seed, steps=None, seconds=None)
    config = dataclasses.replace(config, training=training)
    stream = Stream(data, batch=training.batch, seed=seed, flip=training.flip, workers=0, device=CPU)
    if options.images is not None:
        steps = options.images // training.batch
    else:
        assert options.seconds is not None, "give --seconds or --images"
        trial = build_learner(config, precision(training))
        trial.update(stream.at(0), generator(seed, "trial", 0), 0.0)
        begin = time.perf_counter()
        for step in range(1, TRIAL + 1):
            trial.update(stream.at(step), generator(seed, "trial", step), 0.0)
        steps = int(options.seconds * TRIAL / (time.perf_counter() - begin))
    plan = Plan(dataclasses.replace(training, steps=steps), Path(), [(0, steps)])
    learner = build_learner(config, precision(training))
    study(learner, data, flip=training.flip)
    average = Average(learner.averaged, training.average)
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        learner.update(stream.at(step - 1), generator(seed, "train", step, 0), plan.learning_rate(step))
        average.update(step)
    seconds = time.perf_counter() - begin
    about = {"updates": steps, "images": steps * training.batch, "seconds": seconds, "parameters": learner.parameters}
    return learner, average, about


def drawn_by(model: Model, drawing: Drawing, count: int) -> torch.Tensor:
    """So many pictures."""
    parts, facts = list[torch.Tensor](), model.config.data  # type: ignore[attr-defined]
    for numbers in in_parts(range(count), BATCH):
        *_, last = model.sample(*noise_of(facts, 0, numbers, CPU), drawing)
        parts.append(last.x0)
    return torch.cat(parts)


def measured(learner: Learner, average: Average, data: Prepared, options: Options, name: str) -> dict[str, Any]:
    """Loss and distance with the average weights, in float32."""
    learner.model.precision = dataclasses.replace(learner.model.precision, name="fp32")
    if options.model == "diffusion":
        # Of every arm what it says within the range, or those that are not censored would err more by that alone.
        learner.model.denoiser.censored = True
    with average.applied():
        errors = errors_of(learner, data, spread_rows(data.held_out, options.held_out), seed=0, device=CPU)
        found: dict[str, Any] = {key: values.mean().item() for key, values in errors.items()}
        if options.model == "diffusion":  # |x0_hat - x0|^2 / sigma^2, so that arms that predict something else compare
            by_level = [found[f"error at log-SNR {level:+.0f}"] * (1 + math.exp(level)) for level in HELD_OUT_LEVELS]
            found["error of v"] = sum(by_level) / len(by_level)
        if options.samples:
            drawing = Drawing()
            drawn = drawn_by(learner.model, drawing, options.samples)
            if not learner.model.at_once:
                # As `snowmelt train` decides at its end, though by more pictures.
                sharp = drawn_by(learner.model, Drawing(sampler=SHARP), options.samples)
                if detail(drawn) < SMOOTH * detail(sharp):
                    drawing, drawn = Drawing(sampler=SHARP), sharp
            save_png(options.out / f"{name}.png", sheet(drawn[:80], 10))
            spaces = spaces_of(data, EvaluateOptions(Path()), Log(console(), options.out / "log.txt"))
            figures = in_spaces(spaces, data, to_pixels(drawn).numpy(), seed=0, names=("frechet",))
            found |= {f"frechet {figure.space}": figure.value for figure in figures} | {"sampler": drawing.sampler}
    return found


def main(options: Options) -> None:
    """Train and measure every arm with every seed; the table after each."""
    found_in(options.out, samples=options.samples, held_out=options.held_out, threads=options.threads)
    keep_memory()
    data, file = opened(options), options.out / "found.json"
    torch.set_num_threads(options.threads or threads_for(data.size))
    budget = f"{options.images} images" if options.images is not None else f"{options.seconds:g} s"
    for seed in options.seeds:
        for arm in options.arms:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            some = "" if options.pictures is None else f"{options.pictures} pictures, "
            name = f"{options.data}, {some}{budget}, seed {seed}: {options.model} {arm or 'preset'}"
            if name not in found:
                learner, average, about = trained(configured(arm, data, options), data, options, seed)
                row = about | measured(learner, average, data, options, f"{len(found):03d}")
                found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
                file.write_text(json.dumps(found | {name: row}, indent=1), encoding="utf-8")
            show(json.loads(file.read_text(encoding="utf-8")))


def show(found: dict[str, Any]) -> None:
    """The table so far."""
    spaces = sorted({key for row in found.values() for key in row if key.startswith("frechet")})
    table = Table("arm", "M", "updates", "images", "images/s", "held-out loss", *spaces)
    for name, row in found.items():
        table.add_row(
            name, f"{row['parameters'] / 1e6:.2f}", f"{row['updates']:,}", f"{row['images']:,}",
            f"{row['images'] / row['seconds']:.1f}", f"{row.get('error of v', row['held_out_loss']):.4f}",
            *(f"{row[space]:.4g}" if row.get(space) is not None else "-" for space in spaces),
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
