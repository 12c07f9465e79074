"""From a run directory to a trained model: set up, resume, train, finish, report."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from snowmelt.config import TrainingConfig
from snowmelt.data.prepared import Prepared, spread_rows
from snowmelt.data.stream import Batch, Stream, batch_of
from snowmelt.data.workers import cores
from snowmelt.device import has_room, imitated, keep_memory, pick_device, use_tensor_cores
from snowmelt.ema import Average
from snowmelt.errors import NO_MEMORY, Stopped, UserError, out_of_memory
from snowmelt.models.base import Learner
from snowmelt.networks.group_norm import gradients
from snowmelt.run import Run
from snowmelt.seeds import generator
from snowmelt.terminal import Log
from snowmelt.training.forecast import outlook
from snowmelt.training.loop import Session, fit, groups_of, not_written, restore, stopped
from snowmelt.training.measure import learner_of, precision_of
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
                # Every other one, also where a batch is a single large picture.
                images[first % 2 :: 2] = images[first % 2 :: 2].flip(3)
            yield Batch(images, labels)

    learner.model.study(batches())


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
        for difference in _differences(config.training, device):
            log(difference)
    run.write_status("training", step=progress.step, images=progress.images)
    return session, progress


def _differences(training: TrainingConfig, device: torch.device) -> Iterator[str]:
    """What a run should know that goes on elsewhere than where it was settled how it computes."""
    if device.type != "cpu":
        return
    if training.threads > cores():
        yield f"It computes with {training.threads} threads, and there are {cores()} cores here: that may be slow."
    if training.layout == "channels_last" and gradients(torch.float32) is None:
        yield "The kernels for channels_last cannot be compiled here: torch's are slower."
    if training.precision == "bf16" and imitated(device) is not None:
        yield "This processor does not multiply bfloat16, but imitates it: that may take many times as long."


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
