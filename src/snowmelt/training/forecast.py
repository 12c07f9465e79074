"""What a run is going to do, said before it does it, and what a longer one would bring, said after it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from snowmelt.config import Config
from snowmelt.device import Precision, pick_device
from snowmelt.evaluation.drawing import SHARP
from snowmelt.models import build_learner
from snowmelt.terminal import words_of
from snowmelt.training.previews import DRAWING
from snowmelt.training.watch import WATCH_SHARE

TRAINED = 0.9
"""Share of the time that is trained; the rest goes to starting, previews and the final pictures."""
MIDDLE = (0.3, 0.75)
"""Shares of the images between which a run must have been measured, so that its last doubling is known."""
LASTING = (0.4, 1.0)
"""What part of the gain of its last doubling a run gains by the next: docs/recipe.md. The learning rate falls to 0 in
every run, which lowers the loss once and not once more."""
LEAST = 200
"""Updates of a run that says what twice the time would bring: shorter ones gained more than it would have said."""


def plan_table(config: Config, images_per_second: float | None, spent: float) -> Table:
    """What `snowmelt train` decided for these pictures and this machine.

    Args:
        images_per_second: as measured with this configuration; None where it was not.
        spent: seconds of a run's time that preparing takes.
    """
    data, training = config.data, config.training
    updates = updates_in(config, images_per_second, spent)
    learner = build_learner(config, Precision(pick_device("cpu"), training.precision))
    model = learner.model
    held = "no classes" if not data.classes else f"{len(data.classes)} classes"
    colour = "grey" if data.channels == 1 else "colour"
    facts = {
        "pictures": f"{data.pictures:,} to train on, {data.size} x {data.size}, {colour}, {held}",
        "model": f"{config.model}, widths {', '.join(map(str, config.architecture.channels))}, "
        f"{learner.parameters / 1e6:.2f} M parameters",
        "arithmetic": ", ".join((*training.ways, f"{training.threads} CPU threads")),
        "updates": updates_of(config, images_per_second, spent),
        "learning rate": f"{training.learning_rate:g} by {training.optimizer}, rising over "
        f"{min(training.warmup, updates // 5)} updates, falling to 0 over the last {training.decay:.0%}",
        **({"shown beside": _shown(config)} if config.model == "diffusion" else {}),
        "changes": _changes(config),
        "average": f"of the weights, as wide as {training.average:.0%} of the run",
        "previews": f"at most {WATCH_SHARE:.0%} of the time",
        "pictures drawn": "in a single step"
        if model.at_once
        else f"in {DRAWING.steps} steps of {DRAWING.sampler}, or of {SHARP} where that costs them their detail",
    }
    table = Table(show_header=False, title="With these pictures, on this machine", title_justify="left")
    for name, fact in facts.items():
        table.add_row(name, fact)
    return table


def _changes(config: Config) -> str:
    """What is done to the pictures that are trained on, in words."""
    mirrored = ["half of the pictures mirrored"] if config.training.flip else []
    changed, told = {
        "diffusion": (config.diffusion.augment, "to the pictures, told to the network"),
        "gan": (config.gan.augment, "to all pictures that the critic sees"),
    }.get(config.model, (0.0, ""))
    return ", ".join([*mirrored, *([f"{told}, each with probability {changed:g}"] if changed else [])]) or "none"


def _shown(config: Config) -> str:
    """What the network is shown beside the noisy picture, in words."""
    directions = config.diffusion.linear
    return f"the best linear estimate, along up to {directions} directions" if directions else "nothing"


def updates_in(config: Config, speed: float | None, spent: float) -> int:
    """How many updates there will be; of a run by time `speed` is in images a second, and `spent` of its seconds have
    gone by preparing."""
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.seconds is not None and speed is not None, "a run by time is measured"
    return int(TRAINED * max(0.0, training.seconds - spent) * speed / training.batch)


def updates_of(config: Config, speed: float | None, spent: float) -> str:
    """How far the training goes, in words."""
    training, updates = config.training, updates_in(config, speed, spent)
    images = updates * training.batch
    time = "" if training.seconds is None else f" in {words_of(training.seconds)}, at {speed:.0f} images/s"
    times = images / config.data.pictures if config.data.pictures else 0.0
    passes = f", {times:,.0f} times each picture" if times >= 10 else f", {times:.2g} times each picture"
    return f"about {updates:,} of {training.batch} images: {images:,}{time}{passes if times else ''}"


def outlook(curve: Sequence[tuple[int, float]], updates: int) -> str | None:
    """What twice the time is expected to bring a run of so many updates, in a sentence; see `gain_of_doubling`."""
    found = gain_of_doubling(curve) if updates >= LEAST else None
    if found is None:
        return None
    low, high = (round(100 * share) for share in found)
    if found[1] <= 0:
        return (
            "Twice the time is expected to bring nothing: the held-out loss no longer falls. More pictures would help."
        )
    expected = "less than 1" if not high else f"about {high}" if low == high else f"{low} to {high}"
    return f"Twice the time is expected to lower the held-out loss by {expected} %."


def gain_of_doubling(curve: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """The shares of its last held-out loss between which a run of twice the images is expected to lower it.

    Args:
        curve: images and held-out loss at moments of a finished run, by rising images.

    Returns:
        (0, 0) where the loss no longer falls; None where it was not measured at about half of the images.
    """
    points = [(images, loss) for images, loss in curve if images > 0 and 0 < loss < math.inf]
    if not points:
        return None
    images, loss = points[-1]
    middle = [(seen, then) for seen, then in points if MIDDLE[0] * images <= seen <= MIDDLE[1] * images]
    if not middle:
        return None
    seen, then = min(middle, key=lambda point: abs(math.log(2 * point[0] / images)))
    drop = math.log(then / loss) * math.log(2) / math.log(images / seen)
    low, high = (-math.expm1(-part * max(0.0, drop)) for part in LASTING)
    return low, high
