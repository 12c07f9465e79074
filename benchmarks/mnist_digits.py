"""Are the digits of an MNIST run digits? A small classifier, trained here, counts.

    python benchmarks/mnist_digits.py RUN --train mnist-train.zip --test mnist-test.zip

Prints the share of drawn pictures that the classifier recognises with over 0.9 confidence, beside the same share of
real test digits, and how the classes are spread. They are drawn in what `snowmelt sample` draws in.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from snowmelt.data.pixels import to_images, to_pixels
from snowmelt.data.prepared import Prepared, is_prepared, open_prepared
from snowmelt.models.base import Drawing
from snowmelt.prepare import PrepareOptions, prepare
from snowmelt.run import Run
from snowmelt.sample import SampleOptions, wanted_pictures
from snowmelt.seeds import generator, noise_source
from snowmelt.shapes import Images, Labels


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    run: tyro.conf.Positional[Path]
    """An MNIST run."""
    train: Path = Path("../shared/data/mnist-train.zip")
    """Real digits to train the classifier on."""
    test: Path = Path("../shared/data/mnist-test.zip")
    """Real digits that neither model has seen."""
    cache: Path = Path("runs/mnist-classifier")
    """Where the prepared digits and the classifier are kept between calls."""
    count: int = 2000
    """Pictures drawn, each of a class by chance: unconditional samples."""
    null: bool = False
    """Also draw with the network that is told no class."""
    steps: int = 50
    """Evaluations of the network for each picture."""
    guidance: float = 1.0
    """For the pictures with classes."""


def digits(source: Path, cache: Path) -> Prepared:
    """The real digits at 28 pixels, prepared once."""
    out = cache / source.stem
    return open_prepared(out) if is_prepared(out) else prepare(PrepareOptions(str(source), out, size=28))


def tensors(data: Prepared, index: np.ndarray) -> tuple[Images, Labels]:
    """Images and labels of some of the pictures."""
    assert data.labels is not None
    return to_images(torch.from_numpy(data.images[index])), torch.from_numpy(data.labels[index])


def classifier() -> nn.Module:
    """A small convolutional network over 28 x 28 grey pictures."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip


def trained(data: Prepared, cache: Path, steps: int = 1600) -> nn.Module:
    """The classifier, from the cache or trained on the real training digits."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    network, path = classifier(), cache / "classifier.safetensors"
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    for step in range(steps):
        index = torch.randint(len(data.images), (128,), generator=generator(0, "classifier", step)).numpy()
        images, labels = tensors(data, index)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, 2 * (1 - step / steps))
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    save_file(network.state_dict(), path)
    return network.eval()


@torch.inference_mode()
def judge(network: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """Class and confidence of every picture, as it would be stored."""
    shares = torch.cat([F.softmax(network(part), dim=1) for part in to_images(to_pixels(images)).split(500)])
    return shares.argmax(1), shares.max(1).values


def draw(run: Run, labels: Labels | None, options: Options) -> Images:
    """New digits, of the given classes or of none."""
    model, _ = run.load_model(run.drawing_precision("cpu", "auto"))
    shape = (run.config.data.channels, run.config.data.size, run.config.data.size)
    parts: list[Images] = []
    for start in range(0, options.count, 100):
        numbers = range(start, min(start + 100, options.count))
        drawing = Drawing(sampler="ddim", steps=options.steps, guidance=1.0 if labels is None else options.guidance)
        cond = None if labels is None else labels[list(numbers)]
        *_, last = model.sample(noise_source([0] * len(numbers), numbers, shape), cond, drawing)
        parts.append(last.x0.clone())
    return torch.cat(parts)


def main(options: Options) -> None:
    """Measure and print a table."""
    options.cache.mkdir(parents=True, exist_ok=True)
    network = trained(digits(options.train, options.cache), options.cache)
    test = digits(options.test, options.cache)
    run = Run.open(options.run)
    real, real_labels = tensors(test, np.arange(len(test.images)))
    wanted = wanted_pictures(SampleOptions(options.run, count=options.count, unconditional=True), run)
    labels = torch.tensor([one.label for one in wanted])
    rows = {
        "real test digits": (real, real_labels),
        "drawn, class by chance": (draw(run, labels, options), labels),
    }
    if options.null:
        rows["drawn, network told no class"] = (draw(run, None, options), None)
    table = Table(
        "digits",
        "count",
        "over 0.9",
        "as its class",
        "least class",
        "most class",
        title=str(options.run),
        title_justify="left",
    )
    for name, (images, wanted) in rows.items():
        classes, confidence = judge(network, images)
        spread = torch.bincount(classes, minlength=10) / len(classes)
        right = "-" if wanted is None else f"{(classes == wanted).float().mean():.1%}"
        sure = f"{(confidence > 0.9).float().mean():.1%}"
        table.add_row(name, str(len(images)), sure, right, f"{spread.min():.1%}", f"{spread.max():.1%}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
