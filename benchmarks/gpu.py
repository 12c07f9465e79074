"""CIFAR-10 on one GPU: speed and pictures after 10 and 30 minutes, here and by the script of `diffusers`.

    python benchmarks/gpu.py ../shared/data/cifar10-train.zip --minutes 10 30

Each system trains alone, for the same minutes, on the same training pictures: Snowmelt by `snowmelt train --for` with
nothing else chosen, `diffusers` by the step of its train_unconditional.py on the U-Net of the DDPM paper (35.7 million
parameters) in fp32 or, as `diffusers bf16`, under autocast. Its batch is that of the paper, since that of the script,
16, leaves a GPU idle. Its clock begins with its first update, Snowmelt's with the command. Then, off the clock:

    images/s     while training: the median over a run of Snowmelt, the mean of a rival
    of the peak  operations of the network's forward and backward pass, as torch counts them, times images/s, over
                 what the GPU's makers say of dense products in bf16
    distances    Frechet, to the pictures that `snowmelt evaluate` would take, of `--samples` pictures in the offline
                 spaces, drawn with 35, 10 and 5 evaluations (Heun and UniPC), at the same levels for all, which are
                 those of Snowmelt's schedule; in fp32; Snowmelt draws pictures of its classes, as often as the folder
                 has them

Ratios (x) are to the best rival of the same minutes, above 1 where this one is better. Without a GPU it only shows
that it works; `snowmelt train` then takes 30 s, its least:

    python benchmarks/gpu.py builtin:digits --device cpu --minutes 0.05 --network small --samples 256 --spaces random
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from contest import data_of, drawn, found_in, one_by_one, train_for, train_snowmelt, updates_in
from rivals import diffusers
from snowmelt.config import DataConfig, UNetConfig
from snowmelt.data.pixels import to_images, to_pixels
from snowmelt.data.prepared import Prepared, open_prepared
from snowmelt.device import Precision, pick_device
from snowmelt.diffusion.denoiser import Denoise
from snowmelt.errors import choose
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.evaluating.quality import in_spaces, spaces_of
from snowmelt.foreign.unet2d import network_of
from snowmelt.models.base import Drawing
from snowmelt.models.diffusion import DiffusionModel
from snowmelt.networks.unet import UNet
from snowmelt.presets import SHORTEST, facts_of
from snowmelt.run import Run
from snowmelt.terminal import Log, console
from throughput import settings as settings_of

PEAKS: dict[str, float] = {
    # Part of a device's name, the first that fits: dense bf16 products, FLOP/s.
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
CONTESTANTS = ("diffusers", "diffusers bf16", "snowmelt")
WAYS: dict[int, tuple[str, int]] = {35: ("heun", 18), 10: ("unipc", 10), 5: ("unipc", 5)}
"""By evaluations of the network: sampler and steps."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    source: tyro.conf.Positional[str]
    """A folder or archive of images, or a prepared dataset."""
    minutes: tuple[float, ...] = (10.0, 30.0)
    contestants: tuple[str, ...] = CONTESTANTS
    network: str = "large"
    """Of `diffusers`: small or large, as in throughput.py."""
    batch: int = 128
    """Of `diffusers`."""
    samples: int = 5000
    spaces: tuple[str, ...] = ("trained", "random")
    device: str = "auto"
    peak: float | None = None
    """FLOP/s of dense bf16 products, where the device is not known here."""
    seed: int = 0
    out: Path = Path("runs/gpu")


Bind = Callable[[Tensor | None], Denoise]


def operations_of(network: UNetConfig, facts: DataConfig) -> float:
    """Of a forward and a backward pass, for one picture."""
    model = UNet(network, channels=facts.channels, classes=len(facts.classes))
    with FlopCounterMode(display=False) as counted:
        model(torch.randn(1, facts.channels, facts.size, facts.size), torch.zeros(1)).sum().backward()
    return counted.get_total_flops()


def name_of(device: torch.device) -> str:
    """Of the hardware."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def peak_of(device: torch.device, options: Options) -> float | None:
    """FLOP/s; None where nobody knows."""
    known = (peak for part, peak in PEAKS.items() if part.lower() in name_of(device).lower())
    return options.peak or next(known, None)


def diffusers_trained(
    data: Prepared, seconds: float, options: Options, device: torch.device, *, bf16: bool
) -> tuple[Bind, dict[str, Any]]:
    """The rival after so long, and what it did."""
    facts = facts_of(data)
    pictures = to_images(torch.from_numpy(np.ascontiguousarray(data.images[data.train])))
    pixels = {"sample_size": facts.size, "in_channels": facts.channels, "out_channels": facts.channels}
    given = {**settings_of(options.network), **pixels}
    make = partial(diffusers, pictures, given, options.batch, bf16=bf16, device=device)
    rival = make(updates=updates_in(seconds, make(), device), seed=options.seed)
    images = train_for(seconds, rival, device) * options.batch
    denoise = rival.finished()
    network, _ = network_of(given, Path("benchmark"))
    return lambda _labels: denoise, {
        "images": images,
        "speed": images / seconds,
        "parameters": sum(weight.numel() for weight in rival.module.parameters()),
        "operations": operations_of(network, dataclasses.replace(facts, classes=(), counts=())),
        "how": f"{rival.precision}, batch {options.batch}",
    }


def snowmelt_trained(data: Path, seconds: float, options: Options, device: torch.device) -> tuple[Bind, dict[str, Any]]:
    """A run of `snowmelt train --for`, and what it did."""
    path = options.out / f"snowmelt-{seconds:.0f}"
    asked = () if options.device == "auto" else ("--device", options.device)
    status = train_snowmelt(data, max(seconds, SHORTEST), path, options.seed, *asked)
    run = Run.open(path)
    training = run.config.training
    model, _ = run.load_model(Precision(device))
    assert isinstance(model, DiffusionModel)

    def bind(labels: Tensor | None) -> Denoise:
        asked = model.bind(labels)
        return lambda x, log_snr: asked(x, log_snr).clamp(-1, 1)

    return bind, {
        "images": status["images"],
        "speed": run.speed(),
        "parameters": status["parameters"],
        "operations": operations_of(run.config.network, run.config.data),
        "how": ", ".join((*training.ways, f"batch {training.batch}")),
    }


def distances(bind: Bind, data: Prepared, options: Options, device: torch.device) -> dict[str, Any]:
    """By evaluations: seconds for a picture, and by space the distance with its interval and floor."""
    log = Log(console(), options.out / "log.txt")
    spaces = spaces_of(data, EvaluateOptions(Path(), spaces=options.spaces, device=options.device), log)
    found: dict[str, Any] = {}
    for evaluations, (sampler, steps) in WAYS.items():
        pictures, seconds = drawn(
            bind, facts_of(data), Drawing(sampler=sampler, steps=steps), options.samples, batch=500, device=device
        )
        pixels = to_pixels(pictures).numpy()
        figures = in_spaces(spaces, data, pixels, seed=options.seed, names=("frechet",))
        values = {
            figure.space: [figure.value, figure.low, figure.high, figure.floor, figure.reason] for figure in figures
        }
        found[str(evaluations)] = {"seconds": seconds, "distances": values}
    return found


def work(name: str, data: str, minutes: float, fields: dict[str, Any]) -> None:
    """The process of one system: train, measure, and print what was found as one line of JSON."""
    options = Options(**{**fields, "out": Path(fields["out"]), "spaces": tuple(fields["spaces"])})
    device, prepared = pick_device(options.device), open_prepared(Path(data))
    if name == "snowmelt":
        bind, about = snowmelt_trained(Path(data), 60 * minutes, options, device)
    else:
        bind, about = diffusers_trained(prepared, 60 * minutes, options, device, bf16=name.endswith("bf16"))
    peak = peak_of(device, options)
    about["of_peak"] = peak and about["operations"] * about["speed"] / peak
    print(json.dumps(about | {"drawn": distances(bind, prepared, options, device)}), flush=True)


def show(found: dict[str, dict[str, Any]], options: Options) -> None:
    """The table; ratios are to the best rival of the same minutes."""
    device, today = pick_device(options.device), datetime.now(tz=UTC).date()
    table = Table(
        "", "minutes", "M parameters", "computes", "images", "images/s", "x", "of the peak",
        *(f"Frechet, {evaluations} evaluations" for evaluations in WAYS),
        title=f"{today}, {name_of(device)}: {options.source}, {options.samples:,} pictures drawn",
    )  # fmt: skip
    for title, row in found.items():
        name, minutes = title.rsplit(", ", 1)
        rivals = [other for key, other in found.items() if key.endswith(f", {minutes}") and "snowmelt" not in key]
        fastest = max((other["speed"] for other in rivals), default=float("nan"))
        cells: list[str] = []
        for evaluations, made in row["drawn"].items():
            words: list[str] = []
            for space, (value, low, high, floor, reason) in made["distances"].items():
                if value is None:
                    words.append(f"{space}: {reason}")
                    continue
                theirs = [other["drawn"][evaluations]["distances"][space][0] for other in rivals]
                nearest = min((one for one in theirs if one is not None), default=float("nan"))
                words.append(
                    f"{space} {value:.4g} ({low:.4g} to {high:.4g}; real {floor:.3g}), {nearest / value:.2f} x"
                )
            cells.append("\n".join(words))
        table.add_row(
            name, minutes.removesuffix(" min"), f"{row['parameters'] / 1e6:.2f}", row["how"], f"{row['images']:,}",
            f"{row['speed']:,.0f}", f"{row['speed'] / fastest:.2f}",
            f"{row['of_peak']:.1%}" if row["of_peak"] else "-", *cells,
        )  # fmt: skip
    Console(width=200).print(table)


def main(options: Options) -> None:
    """Train each, measure each, print the table after each."""
    for name in options.contestants:
        choose(dict.fromkeys(CONTESTANTS), name, "contestant")
    settings = {key: value for key, value in vars(options).items() if key not in ("minutes", "contestants", "out")}
    found, data = found_in(options.out, **settings), data_of(options.source, options.out)
    jobs = [(name, minutes) for minutes in options.minutes for name in options.contestants]
    one_by_one(__file__, jobs, data, options, found, partial(show, options=options))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Options))
