"""Do the distances of `snowmelt evaluate` rise with what is wrong with pictures?

    python benchmarks/feature_ranking.py --count 2000

Real pictures against other real ones, then against ever worse ones: slightly blurred, noisy too, half of the classes
missing too, nothing but noise. Prints every metric at each step in each space, and whether each distance rises at
every step; the shares (precision, recall, density, coverage) are printed and not judged. The strengths of the damage
are the same everywhere, and so is the number of pictures of every step of a chain.

The pictures come from the test archive where there is one, which no encoder has seen; emoji has none, and its training
pictures are cut in two. Pictures without classes are halved by the first letter of their captions.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from snowmelt.data.pixels import to_images, to_pixels
from snowmelt.data.prepared import Prepared, is_prepared, open_prepared
from snowmelt.evaluation.encoder import blurred
from snowmelt.evaluation.features import open_spaces
from snowmelt.evaluation.metrics import OF_FEATURES
from snowmelt.evaluation.neighbours import Pair
from snowmelt.evaluation.patches import projections, sliced_distance
from snowmelt.prepare import PrepareOptions, prepare
from snowmelt.seeds import generator

DISTANCES = ("frechet", "kid", "patches")
Steps = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    folder: Path = Path("../shared/data")
    """Where the archives are."""
    cache: Path = Path("runs/ranking")
    """Where the prepared datasets are kept."""
    count: int = 2000
    """Pictures a side; fewer where there are not so many."""
    names: tuple[str, ...] = ("mnist", "cifar10", "emoji")
    """Datasets of `SIZES`."""
    spaces: tuple[str, ...] = ("trained", "random")
    inception: Path | None = None
    dinov2: Path | None = None
    blur: float = 0.6
    """Standard deviation in pixels of what makes pictures blurred."""
    noise: float = 0.1
    """Standard deviation of the noise, of pictures in [-1, 1]: 13 of 255 levels."""
    seed: int = 0


SIZES = {"mnist": 28, "cifar10": 32, "emoji": 32}


def datasets(options: Options, name: str) -> tuple[Prepared, Prepared]:
    """The dataset that an encoder learns from, and the one to measure on; prepared once."""
    train, test = (
        next(path for end in ends if (path := options.folder / f"{name}{end}.zip").exists())
        for ends in (("-train", ""), ("-test", ""))
    )
    opened = {source: options.cache / source.stem for source in (train, test)}
    for source, out in opened.items():
        if not is_prepared(out):
            prepare(PrepareOptions(str(source), out, size=SIZES[name]))
    return open_prepared(opened[train]), open_prepared(opened[test])


def halves(data: Prepared) -> np.ndarray:
    """Which half of the classes each picture is of, 0 or 1; by the caption's first letter where there are none."""
    if data.labels is not None:
        return (data.labels >= len(data.classes) // 2).astype(np.int64)
    assert data.captions is not None, "the pictures have classes or captions"
    letters = np.array([caption[:1].lower() for caption in data.captions])
    return (letters > np.sort(letters)[len(letters) // 2]).astype(np.int64)


def chosen(data: Prepared, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the reference, of other real pictures, and of other real pictures of one half of the classes.

    The last two are as many, so that no step is farther only because its pictures are fewer.
    """
    rows = np.random.default_rng(seed).permutation(len(data.images))
    count = min(count, len(rows) // 2)
    reference, rest = rows[:count], rows[count:]
    half = rest[halves(data)[rest] == 0][:count]
    return reference, rest[: len(half)], half


def worse(data: Prepared, real: np.ndarray, half: np.ndarray, options: Options) -> Steps:
    """The chain, uint8 pictures; and, beside it, the pictures of half of the classes undamaged."""

    def spoiled(rows: np.ndarray, noise: float) -> np.ndarray:
        images = to_images(torch.from_numpy(data.images[rows]))
        images = blurred(images, torch.full((len(images),), options.blur))
        rng = generator(options.seed, "ranking")
        return to_pixels(images + noise * torch.randn(images.shape, generator=rng)).numpy()

    snow = np.random.default_rng(options.seed).integers(0, 256, data.images[real].shape, dtype=np.uint8)
    return {
        "real": data.images[real],
        "blurred": spoiled(real, 0.0),
        "noisier": spoiled(real, options.noise),
        "half missing": spoiled(half, options.noise),
        "noise": snow,
        "(half, undamaged)": data.images[half],
    }


def rank(name: str, options: Options, screen: Console) -> bool:
    """Measure one dataset and print its tables; whether every distance rises."""
    begin = time.monotonic()
    learned, data = datasets(options, name)
    spaces = open_spaces(
        learned, options.spaces, inception=options.inception, dinov2=options.dinov2,
        device=torch.device("cpu"), log=screen.print,
    )  # fmt: skip
    opened = time.monotonic() - begin
    reference, real, half = chosen(data, options.count, options.seed)
    steps = worse(data, real, half, options)
    screen.print(f"\n{name}: {len(real)} pictures against {len(reference)}; spaces opened in {opened:.0f} s")
    rises = True
    for space in spaces:
        begin = time.monotonic()
        wanted = space.features(data.images[reference])
        pairs = {step: Pair(wanted, space.features(pixels)) for step, pixels in steps.items()}
        each = (time.monotonic() - begin) / (len(reference) + len(steps) * len(real))
        title = f"{name}, {space.name}: {space.dimension} dimensions, {1000 * each:.2f} ms for a picture"
        rows = {metric: [take(pair) for pair in pairs.values()] for metric, take in OF_FEATURES.items()}
        rises &= show(title, list(steps), rows, screen)
    whole = data.images[reference[: len(real)]]
    patches = [sliced_distance(*projections(whole, pixels, options.seed)) for pixels in steps.values()]
    return show(f"{name}, pixels", list(steps), {"patches": patches}, screen) and rises


def show(title: str, steps: list[str], rows: dict[str, list[float]], screen: Console) -> bool:
    """Print a table with a row for each metric; whether every distance in it rises along the chain."""
    table = Table("metric", *steps, "rises", title=title, title_justify="left")
    rises = True
    for metric, values in rows.items():
        chain = [value for step, value in zip(steps, values, strict=True) if not step.startswith("(")]
        right = chain == sorted(chain)
        rises &= right or metric not in DISTANCES
        judged = ("ok" if right else "NO") if metric in DISTANCES else ""
        table.add_row(metric, *(f"{value:.4g}" for value in values), judged)
    screen.print(table)
    return rises


def main(options: Options) -> None:
    """Rank all datasets."""
    screen = Console(width=140)
    rises = {name: rank(name, options, screen) for name in options.names}
    for name, right in rises.items():
        screen.print(f"{name}: {'every distance rises' if right else 'some distance does NOT rise'} along the chain")


if __name__ == "__main__":
    main(tyro.cli(Options))
