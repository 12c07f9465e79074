"""A configuration fitted to a machine: a few steps are timed, and from the images that fit in follows the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from snowmelt.config import Config
from snowmelt.data.prepared import Prepared
from snowmelt.device import LEAST_COMPILED, is_gpu, reason_of
from snowmelt.presets import LEAST_PLENTIFUL, width_for
from snowmelt.training.measure import Measured, measure

LOOKED = 400
"""Steps that a run by time must have room for before some are spent on trying whether another layout is faster."""
WIDTH_COST = 1.5
"""The power of the width that the time of a picture goes by: less than 2, as wide layers compute faster."""
HOPED = 4
"""How many times faster a compiled network is at most: one that would be too slow even then is not compiled."""


def fitted(
    choice: Callable[..., Config],
    data: Prepared,
    device: torch.device,
    *,
    given: Mapping[str, Any],
    log: Callable[[str], object],
    spent: float = 0.0,
) -> tuple[Config, float | None]:
    """What is to be trained on this device, and how many images a second that is, where it was measured.

    What a measurement changes is measured again.

    Args:
        choice: the configuration, of what it should be told: `images`, `gpu`, `large` and `width` of `preset`.
        given: what the person has set of [training].
        spent: seconds of a run's time that have gone by preparing pictures.
    """
    config, asked = choice(), given.get("precision", "auto")
    seconds = None if config.training.seconds is None else max(0.0, config.training.seconds - spent)
    again = partial(measure, data=data, device=device, given=given)
    ask = partial(again, asked=asked)
    if seconds is None:
        return _told([ask(config)], config, log)
    gpu = is_gpu(device)
    if gpu and (found := _larger(choice, again, ask, seconds, log)) is not None:
        return found
    # On a CPU a brief run, which has the least time to try anything, is tried as it would be: with few pictures a step.
    # Many of them are faster by about as much as a longer run's network is slower.
    config = choice(gpu=True) if gpu else choice(images=0)
    tries = [measured := ask(config, thorough=False)]
    assert measured.images_per_second is not None, "a run by time is measured"
    # How fast it is as it is decides the batch; then it is asked what makes that faster.
    speed = measured.images_per_second
    chosen = choice(images=int(seconds * speed), gpu=gpu)
    batch = chosen.training.batch
    thorough = gpu or LOOKED * batch / speed <= seconds
    other = chosen.architecture != config.architecture
    if thorough or other or batch != config.training.batch:
        precision = asked if other else measured.precision
        tries.append(again(chosen, asked=precision, thorough=thorough))
    if not gpu and (wider := _wider(choice, tries[-1], chosen, seconds, log)) is not None:
        chosen = wider
        tries.append(again(chosen, asked=asked))
    return _told(tries, chosen, log)


def _wider(
    choice: Callable[..., Config], measured: Measured, usual: Config, seconds: float, log: Callable[[str], object]
) -> Config | None:
    """The wider network of a CPU that has time for it, by how fast the usual one was.

    None where it has not, where there is none, or where the person says how the network looks.
    """
    images = int(seconds * (measured.images_per_second or 0.0))
    if (width := width_for(usual.data, images)) == 1:
        return None
    images = int(images / width**WIDTH_COST)
    config = choice(images=images, width=width)
    if config.architecture == usual.architecture:
        return None
    log(f"Network: {width:g} times as wide as usual, which sees about {images:,} images.")
    return config


def _told(tries: Sequence[Measured], config: Config, log: Callable[[str], object]) -> tuple[Config, float | None]:
    """What `fitted` returns, by the last measurement; of each decision the last reason is said."""
    reasons = dict(reason.split(": ", 1) for measured in tries for reason in measured.reasons)
    for decided, reason in reasons.items():
        log(f"{decided}: {reason}.")
    return tries[-1].settled(config), tries[-1].images_per_second


def _larger(
    choice: Callable[..., Config],
    again: Callable[..., Measured],
    ask: Callable[..., Measured],
    seconds: float,
    log: Callable[[str], object],
) -> tuple[Config, float | None] | None:
    """The larger network of a GPU, where there is one that it has memory and time for.

    Measuring it takes some of that time: what is said of the images is of the rest.
    """
    end, config = time.monotonic() + seconds, choice(gpu=True, large=True)
    if config.architecture == choice(gpu=True).architecture or (config.training.seconds or 0.0) < LEAST_COMPILED:
        return None

    def images_of(measured: Measured) -> int:
        return int((end - time.monotonic()) * (measured.images_per_second or 0.0))

    try:
        tries = [measured := ask(config, thorough=False)]
        if HOPED * images_of(measured) >= LEAST_PLENTIFUL:
            tries.append(measured := again(config, asked=measured.precision))
        images = images_of(measured)
        if images >= LEAST_PLENTIFUL:
            log(f"Network: a larger one, which sees {images:,} images.")
            chosen = choice(images=images, gpu=True, large=True)
            if chosen != config:
                tries.append(again(chosen, asked=measured.precision))
            return _told(tries, chosen, log)
        reason = f"a larger one would see {images:,} images"
    except RuntimeError as error:
        # Of memory, mostly.
        reason = f"a larger one cannot be trained: {reason_of(error)}"
    log(f"Network: the usual one ({reason}).")
    return None
