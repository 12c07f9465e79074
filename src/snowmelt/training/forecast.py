"""What a run is going to do, said before it does it."""

from __future__ import annotations

from rich.table import Table

from snowmelt.config import Config
from snowmelt.device import Precision, pick_device
from snowmelt.models import build_learner
from snowmelt.terminal import words_of
from snowmelt.training.watch import DRAWING, WATCH_SHARE

TRAINED = 0.9
"""Share of the time that is trained; the rest goes to starting, previews and the final pictures."""


def plan_table(config: Config, images_per_second: float | None) -> Table:
    """What `snowmelt train` decided for these pictures and this machine.

    Args:
        images_per_second: as measured with this configuration; None where it was not.
    """
    data, training = config.data, config.training
    updates = updates_in(config, images_per_second)
    learner = build_learner(config, Precision(pick_device("cpu"), training.precision))
    model = learner.model
    held = "no classes" if not data.classes else f"{len(data.classes)} classes"
    colour = "grey" if data.channels == 1 else "colour"
    ways = [training.layout] * (training.layout != "default") + ["compiled"] * training.compile
    facts = {
        "pictures": f"{data.pictures:,} to train on, {data.size} x {data.size}, {colour}, {held}",
        "model": f"{config.model}, widths {', '.join(map(str, config.architecture.channels))}, "
        f"{learner.parameters / 1e6:.2f} M parameters",
        "arithmetic": ", ".join(
            (training.precision, *ways, f"{training.threads} CPU threads"),
        ),
        "updates": updates_of(config, images_per_second),
        "learning rate": f"{training.learning_rate:g} by {training.optimizer}, rising over "
        f"{min(training.warmup, updates // 5)} updates, falling to 0 over the last {training.decay:.0%}",
        "average": f"of the weights, as wide as {training.average:.0%} of the run",
        "previews": f"at most {WATCH_SHARE:.0%} of the time",
        "pictures drawn": "in a single step" if model.at_once else f"in {DRAWING.steps} steps of {DRAWING.sampler}",
    }
    table = Table(show_header=False, title="With these pictures, on this machine", title_justify="left")
    for name, fact in facts.items():
        table.add_row(name, fact)
    return table


def updates_in(config: Config, speed: float | None) -> int:
    """How many updates there will be; `speed` is in images a second, of a run by time."""
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.seconds is not None and speed is not None, "a run by time is measured"
    return int(TRAINED * training.seconds * speed / training.batch)


def updates_of(config: Config, speed: float | None) -> str:
    """How far the training goes, in words."""
    training, updates = config.training, updates_in(config, speed)
    images = updates * training.batch
    time = "" if training.seconds is None else f" in {words_of(training.seconds)}, at {speed:.0f} images/s"
    times = images / config.data.pictures if config.data.pictures else 0.0
    passes = f", {times:,.0f} times each picture" if times >= 10 else f", {times:.2g} times each picture"
    return f"about {updates:,} of {training.batch} images: {images:,}{time}{passes if times else ''}"
