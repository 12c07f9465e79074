"""From a run directory to a trained model: set up, resume, train, finish, report."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from snowmelt.config import Config, TrainingConfig
from snowmelt.data.prepared import Prepared, spread_rows
from snowmelt.data.stream import Batch, Stream
from snowmelt.data.workers import cores
from snowmelt.device import (
    DTYPES,
    Precision,
    changes_for,
    faster_precision,
    has_room,
    improved,
    is_gpu,
    keep_memory,
    make_precision,
    pick_device,
    use_tensor_cores,
)
from snowmelt.ema import Average
from snowmelt.errors import NO_MEMORY, Stopped, UserError, out_of_memory
from snowmelt.evaluation.levels import batch_of
from snowmelt.models import build_learner
from snowmelt.models.base import Learner
from snowmelt.networks.group_norm import FLAGS, channels_last_pays
from snowmelt.networks.kernels import begin
from snowmelt.presets import threads_for
from snowmelt.recording import forget_tried, speed_up
from snowmelt.run import Run
from snowmelt.seeds import generator
from snowmelt.terminal import Log
from snowmelt.training.forecast import outlook
from snowmelt.training.loop import Session, fit, groups_of, not_written, restore, stopped
from snowmelt.training.plan import Plan
from snowmelt.training.progress import Progress
from snowmelt.training.report import write_report
from snowmelt.training.signals import Stop, catch_signals
from snowmelt.training.watch import Watch

STUDIED, STUDIED_BYTES, AT_ONCE_BYTES = 4096, 2**29, 2**21
"""Pictures that a model sees before training begins: so many, or fewer where they have so many bytes; and at once."""


@dataclasses.dataclass(frozen=True)
class Here:
    """What belongs to this process and not to the run."""

    device: str = "auto"
    workers: int = 0
    save_every: float = 60.0


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
    if precision.device.type == "cpu":
        # All at once, and not each when it is first needed.
        begin(FLAGS[precision.dtype])
    learner = build_learner(config, precision)
    if precision.compiled or precision.recorded:
        network = learner.model.compilable
        if network is None:
            failed(f"there is no such way for a {config.model}")
        else:
            speed_up(network, precision, failed)
    return learner


def study(learner: Learner, data: Prepared, *, flip: bool) -> None:
    """Show a model that has learned nothing some of the pictures, for what it is to know of them all along.

    Args:
        flip: mirror half of them, as training will.
    """
    size = data.images[0].nbytes
    rows, count = spread_rows(data.train, max(1, min(STUDIED, STUDIED_BYTES // size))), max(1, AT_ONCE_BYTES // size)

    def batches() -> Iterator[Batch]:
        for first in range(0, len(rows), count):
            images, labels = batch_of(data, rows[first : first + count], torch.device("cpu"))
            if flip:
                images[::2] = images[::2].flip(3)
            yield Batch(images, labels)

    learner.model.study(batches())


def refuse(reason: str) -> None:
    """Of a network that is only tried: it cannot be compiled or recorded."""
    raise RuntimeError(reason)


def measure(
    config: Config,
    data: Prepared,
    device: torch.device,
    *,
    asked: str,
    threads: int | None,
    thorough: bool = True,
    given: Collection[str] = (),
) -> Measured:
    """Train a few steps to see how fast that is, in the precision asked for or, for "auto", in each.

    Args:
        thorough: then try another layout, and on a GPU recording, and compiling where the run is long enough for it;
            on a CPU only in a run by time, since one by steps is to give the same weights again on the same machine.
        given: keys of [training] that the person has set; they are as `config` has them.
    """
    threads = threads or threads_for(config.data, cores())
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
    if "layout" not in given and channels_last_pays(device):
        start = dataclasses.replace(start, layout="channels_last")
        reasons.append("channels_last: yes (its kernels could be compiled)")

    def step(precision: Precision) -> None:
        if precision not in learners:
            # One at a time: each takes as much memory as the run will.
            learners.clear()
            forget_tried(device)
            learners[precision] = learner_of(config, precision, refuse)
        learners[precision].update(batch, generator(0, "measure", device=device), 0.0)

    def plain(precision: Precision) -> None:
        step(dataclasses.replace(start, name=precision.name))

    seconds = 3.0 if config.training.seconds is None else min(3.0, 0.02 * config.training.seconds)
    gpu = is_gpu(device)
    thorough = thorough and (gpu or config.training.seconds is not None)
    timed = config.training.seconds is not None or thorough
    found = faster_precision(device, plain, names=names, timed=timed, seconds=seconds * len(names) / len(DTYPES))
    if found.ratio is not None:
        reasons.append(f"Precision: {found.precision} (bf16 trains {found.ratio:.2f} times as fast as fp32 here)")
    best, taken = dataclasses.replace(start, name=found.precision), found.seconds
    if taken is not None:
        # What the person has asked for, whether it pays or not; the rest is tried on top of it.
        asked_for = [name for name in ("compile", "record") if gpu and getattr(config.training, name)]
        best, taken, _ = improved(
            best, step, before=taken, changes=asked_for, given=given, seconds=seconds / 3, gain=0.0
        )
    if thorough and taken is not None:
        length = config.training.seconds or (config.training.steps or 0) * taken
        changes = [name for name in changes_for(device, length) if name not in given]
        if best.layout == "channels_last":
            changes = [name for name in changes if name != "layout"]
        if gpu and "compile" not in (*changes, *given):
            reasons.append("compiled: no (so short a training does not wait for the compiler)")
        best, taken, more = improved(best, step, before=taken, changes=changes, given=given, seconds=seconds / 3)
        reasons += more
    speed = taken and len(batch.images) / taken
    learners.clear()
    forget_tried(device)
    ways = {"compile": best.compiled, "record": best.recorded}
    ways |= {key: getattr(config.training, key) for key in ways if key in given}
    return Measured(best.name, threads, speed, best.layout, **ways, reasons=tuple(reasons))


def train_run(run: Run, here: Here, log: Log, started: float) -> Path:
    """Train `run` from its newest checkpoint, or from nothing, to its end.

    Args:
        started: `time.monotonic()` when the person's command began.

    Raises:
        Stopped: on Ctrl-C or SIGTERM, after saving.
        UserError: see `fit`, `restore` and `Run.open_pictures`.
    """
    data = run.open_pictures()
    with catch_signals() as stop, _told_if_out_of_memory(run):
        session, progress = _set_up(run, data, here, log, stop, started)
        try:
            return _train(session, progress)
        except Stopped:
            run.write_status("stopped")
            raise
        except UserError as error:
            _try_status(run, str(error))
            raise
        except OSError as error:
            sentence = not_written(run, groups_of(session), error)
            _try_status(run, str(sentence))
            raise sentence from error


@contextmanager
def _told_if_out_of_memory(run: Run) -> Generator[None]:
    """Within it a run without memory is written down as failed; it is the command line that says the sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            _try_status(run, NO_MEMORY)
        raise


def _try_status(run: Run, error: str) -> None:
    try:
        run.write_status("failed", error=error)
    except OSError:
        # The disk that refused the checkpoint may refuse this too; the sentence is what matters.
        print("The run's status could not be written.", file=sys.stderr)


def _set_up(run: Run, data: Prepared, here: Here, log: Log, stop: Stop, started: float) -> tuple[Session, Progress]:
    config = run.config
    torch.set_num_threads(config.training.threads)
    device = pick_device(here.device)
    if device.type == "cpu":
        keep_memory()
    use_tensor_cores(device)
    precision = precision_of(config.training, device)
    learner = learner_of(config, precision, lambda why: log(f"The network is computed as it is ({why})."))
    if run.newest_checkpoint() is None:
        study(learner, data, flip=config.training.flip)
    average = Average(learner.averaged, config.training.average)
    plan = Plan.open(run.path / "plan.json", config.training)
    stream = Stream(
        data,
        batch=config.training.batch,
        seed=config.training.seed,
        flip=config.training.flip,
        workers=here.workers,
        device=device,
        resident=has_room(device, len(data.train) * data.images[0].nbytes),
    )
    watch = Watch(run, log, plan, learner, average, data, device, stop)
    session = Session(run, learner, average, stream, plan, watch, log, stop, device, here.save_every, started)
    images, labels = stream.at(0)
    one = Batch(images[:1], None if labels is None else labels[:1])
    precision.assert_active(learner.model, lambda: learner.held_out(one, generator(0, "check", device=device)))
    progress = restore(session)
    run.forget_metrics_after(progress.step)
    session.started = started - progress.elapsed
    if progress.step:
        log(f"Continuing {run.path} from step {progress.step}.")
    run.write_status("training", step=progress.step, images=progress.images)
    return session, progress


def _train(session: Session, progress: Progress) -> Path:
    run, log = session.run, session.log
    try:
        with session.watch.live:
            progress = fit(session, progress)
            if not any(line["step"] == progress.step for line in run.metrics() if "held_out_loss" in line):
                session.watch.preview(progress)
            files = session.watch.finish(progress)
            if session.stop.requested:
                raise stopped(session, progress)
    finally:
        session.stream.close()
    progress.elapsed = time.monotonic() - session.started
    measured = [(line["images"], line["held_out_loss"]) for line in run.metrics() if "held_out_loss" in line]
    forecast = outlook(measured, progress.step) if session.learner.model.foreseen else None
    report = write_report(run, progress, files, forecast)
    about = {"seconds": round(progress.elapsed, 1), "parameters": session.learner.parameters, "forecast": forecast}
    run.write_status("finished", step=progress.step, images=progress.images, **about)
    for file in files:
        log(f"Wrote {file}")
    if forecast:
        log(forecast)
    return report
