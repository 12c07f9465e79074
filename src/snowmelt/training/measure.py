"""How a training computes on this machine, and how fast: measured before it begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import torch

from snowmelt.config import Config, TrainingConfig
from snowmelt.data.prepared import Prepared
from snowmelt.data.stream import batch_of
from snowmelt.device import (
    DTYPES,
    GAIN,
    Precision,
    changes_for,
    faster_precision,
    improved,
    is_gpu,
    keep_memory,
    make_precision,
    most_threads,
    threads_for,
    time_of,
    use_tensor_cores,
)
from snowmelt.models import MODELS, build_learner
from snowmelt.models.base import Learner
from snowmelt.networks.group_norm import channels_last_pays
from snowmelt.recording import forget_tried, speed_up
from snowmelt.seeds import generator


class Measured(NamedTuple):
    """What this machine does with a configuration."""

    precision: str
    threads: int
    images_per_second: float | None
    """None where nothing depends on it: in a run by steps whose precision needed no race."""
    layout: str = "default"
    compile: bool = False
    record: bool = False
    reasons: tuple[str, ...] = ()
    """For and against each, in words."""

    def settled(self, config: Config) -> Config:
        """The configuration with its precision, layout and threads, and whether it is compiled or recorded."""
        kept = {name: getattr(self, name) for name in ("precision", "threads", "layout", "compile", "record")}
        return dataclasses.replace(config, training=dataclasses.replace(config.training, **kept))


def precision_of(training: TrainingConfig, device: torch.device) -> Precision:
    """How a run computes; only a GPU compiles, since on a CPU that takes minutes and gains nothing, or records."""
    checked, gpu = make_precision(device, training.precision), is_gpu(device)
    return dataclasses.replace(
        checked, layout=training.layout, compiled=training.compile and gpu, recorded=training.record and gpu
    )


def learner_of(config: Config, precision: Precision, failed: Callable[[str], object]) -> Learner:
    """A learner that computes so.

    Args:
        failed: is told why, where its network could not be compiled or recorded.
    """
    learner = build_learner(config, precision)
    if precision.compiled or precision.recorded:
        network = learner.model.compilable
        if network is None:
            failed(f"there is no such way for a {config.model}")
        else:
            speed_up(network, precision, failed)
    return learner


PATIENCE = 0.02
"""Share of a training that the steps of trying formats again may take."""


def refuse(reason: str) -> None:
    """Of a network that is only tried: it cannot be compiled or recorded."""
    raise RuntimeError(reason)


def measure(
    config: Config,
    data: Prepared,
    device: torch.device,
    *,
    asked: str,
    thorough: bool = True,
    given: Collection[str] = (),
) -> Measured:
    """Train a few steps to see how fast that is, in the precision asked for or, for "auto", in each.

    Args:
        thorough: then try another layout, and on a GPU recording, and compiling where the run is long enough for it;
            on a CPU only in a run by time, and also more threads: one by steps should give the same weights again on
            the same machine, and where two ways are about as fast, chance would choose between them.
        given: keys of [training] that the person has set; they are as `config` has them.
    """
    size = config.data.size
    threads = config.training.threads if "threads" in given else threads_for(size)
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_memory()
    use_tensor_cores(device)
    names = tuple(DTYPES) if asked == "auto" else (make_precision(device, asked).name,)
    learners: dict[Precision, Learner] = {}
    # Some pictures will do; a stream would copy them all.
    batch = batch_of(data, np.resize(data.train, config.training.batch), device)
    reasons = list[str]()

    start = dataclasses.replace(precision_of(config.training, device), compiled=False, recorded=False)
    pays = "layout" not in given and channels_last_pays(device)

    def plain(name: str) -> Precision:
        """What is tried first. Without layers whose kernels are compiled channels_last is faster in float32 only
        (docs/recipe.md)."""
        lies = pays and (MODELS[config.model].kernels or name == "fp32")
        return dataclasses.replace(start, name=name, layout="channels_last" if lies else start.layout)

    def step(precision: Precision) -> None:
        if precision not in learners:
            # One at a time: each takes as much memory as the run will.
            learners.clear()
            forget_tried(device)
            learners[precision] = learner_of(config, precision, refuse)
        learners[precision].update(batch, generator(0, "measure", device=device), 0.0)

    seconds = 3.0 if config.training.seconds is None else min(3.0, 0.02 * config.training.seconds)
    gpu = is_gpu(device)
    thorough = thorough and (gpu or config.training.seconds is not None)
    timed = config.training.seconds is not None or thorough

    def length(taken: float) -> float:
        """Seconds of the training, from those of a step."""
        return config.training.seconds or (config.training.steps or 0) * taken

    found = faster_precision(
        device,
        lambda precision: step(plain(precision.name)),
        names=names,
        timed=timed,
        seconds=seconds * len(names) / len(DTYPES),
        again=lambda taken: PATIENCE * length(taken),
    )
    if found.ratio is not None:
        slower = (found.precision == "bf16") == (found.ratio < 1)
        told = f"bf16 trains {found.ratio:.2f} times as fast as fp32 here{', too little to decide' if slower else ''}"
        reasons.append(f"Precision: {found.precision} ({told})")
    best, taken = plain(found.precision), found.seconds
    if pays and best.layout == "channels_last":
        reasons.append("channels_last: yes (its kernels could be compiled)")
    if taken is not None:
        # What the person has asked for, whether it pays or not; the rest is tried on top of it.
        asked_for = [name for name in ("compile", "record") if gpu and getattr(config.training, name)]
        best, taken, _ = improved(
            best, step, before=taken, changes=asked_for, given=given, seconds=seconds / 3, gain=0.0
        )
    if thorough and taken is not None:
        changes = [name for name in changes_for(device, length(taken)) if name not in given]
        if best.layout == "channels_last":
            changes = [name for name in changes if name != "layout"]
        if gpu and "compile" not in (*changes, *given):
            reasons.append("compiled: no (so short a training does not wait for the compiler)")
        best, taken, more = improved(best, step, before=taken, changes=changes, given=given, seconds=seconds / 3)
        reasons += more
        if not gpu and "threads" not in given and (most := most_threads(size)) > threads:
            torch.set_num_threads(most)
            ratio = taken / (other := time_of(best, step, seconds / 3))
            reasons.append(
                f"{most} threads: {'yes' if ratio >= GAIN else 'no'} ({ratio:.2f} times as fast as {threads})"
            )
            threads, taken = (most, other) if ratio >= GAIN else (threads, taken)
            torch.set_num_threads(threads)
    speed = taken and len(batch.images) / taken
    learners.clear()
    forget_tried(device)
    ways = {"compile": best.compiled, "record": best.recorded}
    ways |= {key: getattr(config.training, key) for key in ways if key in given}
    return Measured(best.name, threads, speed, best.layout, **ways, reasons=tuple(reasons))
