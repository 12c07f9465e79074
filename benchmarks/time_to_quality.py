"""How good are pictures after so many minutes, here and elsewhere?

    python benchmarks/time_to_quality.py ../shared/data/mnist-train.zip --size 32 --minutes 10 --ours 1 2.5 10

Each system trains alone, one after the other, on the same training pictures of the same size, with all cores: the
rivals for `--minutes` with the settings of their own scripts on a small network of theirs, Snowmelt by `snowmelt train
--for`, once for each of `--ours`. Then, off the clock and the same for all:

    error      of denoising pictures that nobody trained on, |picture - x0|^2 / sigma^2 per pixel (the error of v), mean
               over log-SNR -8, -6 ... 6; no system is told the class, since only Snowmelt learns classes
    distances  Frechet, of `--samples` pictures, to those that `snowmelt evaluate` would take (held-out ones, or all
               where fewer than 500 are), in the offline spaces; none with --samples 0. Snowmelt draws as `snowmelt
               sample --precision fp32` does, pictures of its classes, as often as the folder has them. A rival draws in
               whichever of several ways is nearest to real pictures with it (by 64 pictures, in the random space)

A rival's clock begins with its first update, Snowmelt's with the command. What is chosen for the rivals, beyond their
scripts: `diffusers` trains a U-Net of 3.8 million parameters in fp32 or, as `diffusers bf16`, under autocast, and its
cosine learning rate is laid out for the updates that fit into the time; denoising-diffusion-pytorch trains a `Unet` of
width 32. `diffusers tuned` and `denoising-diffusion-pytorch tuned` are the same networks, losses and batches with the
optimizer, learning rate and averaging of Snowmelt. A rival asked about a level answers for the nearest step of its
table. How to install them: rivals.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from snowmelt.models.base import Drawing

HELD_OUT = 256
BATCH = 64
"""Pictures drawn or denoised at once."""
SCRIPT_BATCH = 16
"""The default of both scripts."""
RIVALS = (
    "diffusers",
    "diffusers bf16",
    "diffusers tuned",
    "denoising-diffusion-pytorch",
    "denoising-diffusion-pytorch tuned",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    source: tyro.conf.Positional[str]
    """A folder or archive of images, or a prepared dataset."""
    minutes: float = 10.0
    """Of each rival."""
    ours: tuple[float, ...] = (1.0, 2.5, 10.0)
    """Minutes of the runs of Snowmelt."""
    rivals: tuple[str, ...] = ("diffusers", "denoising-diffusion-pytorch")
    size: int | None = None
    samples: int = 400
    seed: int = 0
    out: Path = Path("runs/time-to-quality")


SCREENED = 64
"""Pictures by which a rival's way to draw is chosen..."""
OF_RIVALS = (
    Drawing(sampler="dpmpp_2m"),
    Drawing(sampler="dpmpp_2m_sde"),
    Drawing(sampler="unipc", schedule="linear"),
    Drawing(sampler="ddim", steps=30, schedule="linear", spacing="time"),
    Drawing(sampler="ddpm", steps=30, schedule="linear", spacing="time"),
)
"""...from these and that of Snowmelt."""

Denoise = Callable[[Any, Any], Any]


def trained_rival(name: str, data: Path, seconds: float, seed: int) -> tuple[Denoise, dict[str, Any]]:
    """A rival trained for so long, and what it did."""
    import numpy as np
    import torch

    from contest import train_for, updates_in
    from rivals import denoising_diffusion_pytorch, denoising_diffusion_pytorch_tuned, diffusers, diffusers_tuned
    from rivals import settings as settings_of
    from snowmelt.data.pixels import to_images
    from snowmelt.data.prepared import open_prepared

    prepared = open_prepared(data)
    pictures = to_images(torch.from_numpy(np.ascontiguousarray(prepared.images[prepared.train])))
    channels, size = pictures.shape[1], pictures.shape[2]
    if name.startswith("diffusers"):
        settings = settings_of("small", size, channels)
        make = diffusers_tuned if name.endswith("tuned") else partial(diffusers, bf16=name.endswith("bf16"))
        updates = updates_in(seconds, make(pictures, settings, SCRIPT_BATCH))
        rival = make(pictures, settings, SCRIPT_BATCH, updates=updates, seed=seed)
    elif name.endswith("tuned"):
        updates = updates_in(seconds, denoising_diffusion_pytorch_tuned(pictures, SCRIPT_BATCH))
        rival = denoising_diffusion_pytorch_tuned(pictures, SCRIPT_BATCH, updates=updates, seed=seed)
    else:
        rival = denoising_diffusion_pytorch(pictures, SCRIPT_BATCH, seed=seed)
    steps = train_for(seconds, rival)
    parameters = sum(weight.numel() for weight in rival.module.parameters())
    return rival.finished(), {"images": steps * SCRIPT_BATCH, "parameters": parameters}


def trained_snowmelt(data: Path, seconds: float, run: Path, seed: int) -> tuple[Denoise | None, dict[str, Any]]:
    """A run of `snowmelt train --for`; its denoiser is bound to classes later."""
    from contest import train_snowmelt

    # Rivals are trained on the processor too.
    status = train_snowmelt(data, seconds, run, seed, "--device", "cpu")
    return None, {"images": status["images"], "parameters": status["parameters"]}


def measured(denoise: Denoise | None, run: Path | None, data: Path, options: Options) -> dict[str, Any]:
    """Errors and distances."""
    import numpy as np
    import torch

    from contest import drawn
    from snowmelt.data.pixels import to_images, to_pixels
    from snowmelt.data.prepared import open_prepared, spread_rows
    from snowmelt.device import Precision
    from snowmelt.diffusion.noise import add_noise
    from snowmelt.evaluating.options import EvaluateOptions
    from snowmelt.evaluating.quality import in_spaces, spaces_of
    from snowmelt.evaluation.drawing import usual
    from snowmelt.evaluation.features import real_features
    from snowmelt.evaluation.metrics import frechet_of
    from snowmelt.evaluation.neighbours import Pair
    from snowmelt.models.diffusion import HELD_OUT_LEVELS
    from snowmelt.pictures import save_png, sheet
    from snowmelt.presets import facts_of
    from snowmelt.run import Run
    from snowmelt.seeds import generator
    from snowmelt.terminal import Log, console

    prepared = open_prepared(data)
    facts = facts_of(prepared)
    bind: Callable[[Any], Denoise]
    own = Drawing()
    if run is None:
        assert denoise is not None

        def bind(_labels: Any) -> Denoise:
            return denoise
    else:
        trained = Run.open(run)
        model, state = trained.load_model(Precision(torch.device("cpu")))
        own = usual(trained, state, own, sampler=None)

        def bind(labels: Any) -> Denoise:
            return lambda x, log_snr: model.bind(labels)(x, log_snr).clamp(-1, 1)

    rows = spread_rows(prepared.held_out, HELD_OUT)
    images = to_images(torch.from_numpy(np.ascontiguousarray(prepared.images[rows])))
    noise = torch.randn(images.shape, generator=generator(0, "held out"))
    errors: list[float] = []
    with torch.no_grad():
        for level in HELD_OUT_LEVELS:
            log_snr, squares = torch.tensor(level), list[float]()
            for start in range(0, len(images), BATCH):
                part = slice(start, start + BATCH)
                x = add_noise(images[part], noise[part], log_snr)
                answer = bind(None)(x, log_snr)
                squares += ((answer - images[part]) ** 2).flatten(1).mean(1).tolist()
            errors.append(sum(squares) / len(squares) * (1 + float(torch.tensor(level).exp())))
    found: dict[str, Any] = {"error": sum(errors) / len(errors), "errors": errors}
    if not options.samples:
        return found
    log = Log(console(), options.out / "log.txt")
    spaces = spaces_of(prepared, EvaluateOptions(Path()), log)
    ways = {own: float("nan")}
    if run is None:
        *_, random = spaces
        real = real_features(random, prepared, spread_rows(prepared.train, 2000))
        ways |= dict.fromkeys(OF_RIVALS, float("nan"))
        for way in ways:
            seen, _ = drawn(bind, facts, way, SCREENED, batch=BATCH)
            ways[way] = frechet_of(Pair(real, random.features(to_pixels(seen).numpy())))
    best = min(ways, key=lambda way: ways[way])
    pictures, seconds = drawn(bind, facts, best, options.samples, batch=BATCH)
    pixels = to_pixels(pictures).numpy()
    figures = in_spaces(spaces, prepared, pixels, seed=options.seed, names=("frechet",))
    return found | {
        "seconds_per_picture": seconds,
        "way": best.as_dict(),
        "ways": [[way.as_dict(), distance] for way, distance in ways.items()],
        "distances": {figure.space: [figure.value, figure.low, figure.high, figure.floor] for figure in figures},
        "sheet": str(save_png(options.out / f"{time.time():.0f}.png", sheet(pictures[:64], 8))),
    }


def main(options: Options) -> None:
    """Train each, measure each, print the table after each."""
    from contest import data_of, found_in, one_by_one
    from snowmelt.errors import choose

    for name in options.rivals:
        choose(dict.fromkeys(RIVALS), name, "rival")
    settings = {name: getattr(options, name) for name in ("source", "size", "samples", "seed")}
    found, data = found_in(options.out, **settings), data_of(options.source, options.out, options.size)
    jobs = [(name, options.minutes) for name in options.rivals] + [("snowmelt", minutes) for minutes in options.ours]
    one_by_one(__file__, jobs, data, options, found, show)


def show(found: dict[str, Any]) -> None:
    """The table so far; ratios are to the best rival."""
    rivals = [row for title, row in found.items() if not title.startswith("snowmelt")]
    heads = ("", "images", "M parameters", "error", "of the best rival's", "Frechet distance", "rival's over it")
    table = Table(*heads, "s/picture")
    for title, row in found.items():
        least = min((other["error"] for other in rivals), default=float("nan"))
        cells, ratios = [], []
        for space, (value, low, high, floor) in row.get("distances", {}).items():
            if value is None:
                continue
            cells.append(f"{space} {value:.4g} ({low:.4g} to {high:.4g}; real {floor:.3g})")
            theirs = [other["distances"][space][0] for other in rivals if "distances" in other]
            nearest = min((distance for distance in theirs if distance is not None), default=float("nan"))
            ratios.append(f"{space} {nearest / value:.2f}")
        table.add_row(
            title, f"{row['images']:,}", f"{row['parameters'] / 1e6:.2f}", f"{row['error']:.4f}",
            f"{row['error'] / least:.2f}", "\n".join(cells), "\n".join(ratios),
            f"{row['seconds_per_picture']:.3f}" if "seconds_per_picture" in row else "-",
        )  # fmt: skip
    Console(width=170).print(table)


def work(name: str, data: str, minutes: float, fields: dict[str, Any]) -> None:
    """The process of one system: train, measure, and print what was found as one line of JSON."""
    begin = time.time()
    options = Options(**{**fields, "out": Path(fields["out"])})
    run = None
    if name == "snowmelt":
        run = options.out / f"snowmelt-{minutes:g}"
        denoise, about = trained_snowmelt(Path(data), 60 * minutes, run, options.seed)
    else:
        denoise, about = trained_rival(name, Path(data), 60 * minutes, options.seed)
    about["seconds"] = time.time() - begin
    print(json.dumps(about | measured(denoise, run, Path(data), options)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Options))
