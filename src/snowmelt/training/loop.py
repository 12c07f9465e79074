"""The loop: batch -> update -> average -> log, preview, checkpoint; one for every family of models."""

from __future__ import annotations

import errno
import json
import shutil
import time
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from snowmelt import checkpoint
from snowmelt.data.stream import Stream
from snowmelt.ema import Average
from snowmelt.errors import Stopped, UserError
from snowmelt.files import write_atomic
from snowmelt.models.base import Learner
from snowmelt.run import Run
from snowmelt.seeds import generator
from snowmelt.terminal import Log, size_of, words_of
from snowmelt.training.plan import Plan
from snowmelt.training.progress import Progress
from snowmelt.training.signals import Stop
from snowmelt.training.watch import PREVIEWS, Watch

BAD_STEPS = 3
"""Updates in a row that may be skipped before the run goes back to its last good state."""
SNAPSHOTS = (0.1, 0.25, 0.5)
"""Shares of the training after which the average weights are kept for good: to guide pictures away from (the first of
them, by autoguidance), and to measure how the pictures become better."""
LAG = 16
"""Updates after which a GPU is asked whether they were finite; asked after each it would stand still meanwhile."""
ROLLBACKS = 5
"""After so many, the run ends: something other than the learning rate is wrong."""


@dataclass
class Session:
    """One process's work on a run."""

    run: Run
    learner: Learner
    average: Average
    stream: Stream
    plan: Plan
    watch: Watch
    log: Log
    stop: Stop
    device: torch.device
    save_every: float
    started: float
    """`time.monotonic()` at which the run's clock stood at 0, were it one process."""


def fit(session: Session, progress: Progress) -> Progress:
    """Train until the plan is fulfilled.

    Raises:
        Stopped: a signal came; everything is saved.
        UserError: the run diverged beyond help.
        OSError: something could not be written; see `not_written`.
    """
    plan, watch, seed = session.plan, session.watch, session.run.config.training.seed
    save(session, progress)
    saved, durations, trained = time.monotonic(), list[float](), 0.0
    first, begin, waiting = progress.step + 1, 0.0, list[bool | Tensor]()
    while not plan.finished(progress.step):
        if session.stop.requested and not waiting:
            save(session, progress)
            raise stopped(session, progress)
        if not waiting:
            begin = time.monotonic()
        batch = session.stream.at(progress.step)
        progress.step += 1
        progress.images += len(batch.images)
        rate = plan.learning_rate(progress.step) * progress.rate_scale
        rng = generator(seed, "train", progress.step, progress.rollbacks, device=session.device)
        update = session.learner.update(batch, rng, rate)
        if update.finite is not False:
            # A GPU that is not waited for has left the weights of a bad update as they were, which may be averaged.
            session.average.update(progress.step)
        waiting.append(update.finite)
        together, now = len(waiting), time.monotonic()
        known = isinstance(update.finite, bool) or together >= LAG or progress.step == first
        if known or now - saved >= session.save_every or eventful(session, progress, trained + now - begin):
            rollbacks = progress.rollbacks
            progress = judged(session, progress, waiting)
            if progress.rollbacks > rollbacks:
                continue
        progress.elapsed = time.monotonic() - session.started
        watch.after_update(progress, update.losses, rate)
        if waiting:
            continue
        if session.device.type == "cpu" or progress.step != first:
            # The first update of a process wakes a GPU up, and may compile.
            taken = time.monotonic() - begin
            recent = min(100, max(10, progress.step // 4))
            durations = [*durations, *[taken / together] * together][-recent:]
            trained += taken
        if durations and plan.decides_at(progress.step, trained, progress.elapsed):
            decide(session, progress, fmean(durations))
        watch.preview_if_due(progress)
        keep_snapshots(session, progress)
        if time.monotonic() - saved >= session.save_every and not progress.in_a_row:
            save(session, progress)
            saved = time.monotonic()
    save(session, progress)
    return progress


def eventful(session: Session, progress: Progress, trained: float) -> bool:
    """Whether more happens after this update than the next one."""
    plan, step = session.plan, progress.step
    return (
        plan.finished(step)
        or plan.due(step, PREVIEWS)
        or plan.decides_at(step, trained, progress.elapsed)
        or session.stop.requested
    )


def judged(session: Session, progress: Progress, waiting: list[bool | Tensor]) -> Progress:
    """Count the last updates, finite or `skipped`, one after the other; `waiting` is empty then.

    After a return to an earlier state those that followed do not count.
    """
    tensors = [one for one in waiting if isinstance(one, Tensor)]
    finite = torch.stack(tensors).tolist() if tensors else [*waiting]
    waiting.clear()
    rollbacks, first = progress.rollbacks, progress.step + 1 - len(finite)
    for step, good in enumerate(finite, first):
        if good:
            progress.in_a_row = 0
        else:
            progress = skipped(session, progress, step)
            if progress.rollbacks > rollbacks:
                break
    return progress


def keep_snapshots(session: Session, progress: Progress) -> None:
    """Keep the average weights for good at each of `SNAPSHOTS`."""
    horizon, folder = session.plan.horizon(progress.step), session.run.snapshots
    passed = 0 if horizon is None else sum(progress.step >= share * horizon for share in SNAPSHOTS)
    if passed > len(checkpoint.steps_saved(folder)):
        checkpoint.save(
            folder, progress.step, {"average": session.average.state()}, progress.as_dict(), keep=len(SNAPSHOTS)
        )


def stopped(session: Session, progress: Progress) -> Stopped:
    """What is said when a signal ended the work."""
    path = session.run.path
    message = f"Saved step {progress.step}; continue with: snowmelt train --resume {path}"
    return Stopped(message, session.stop.signal or 0)


def decide(session: Session, progress: Progress, per_step: float) -> None:
    """Fix the horizon of a run by time, or look at it again."""
    plan, watch = session.plan, session.watch
    if not watch.preview_seconds:
        watch.foresee()
        progress.elapsed = time.monotonic() - session.started
    watch.keep_pace(per_step)
    budget, first = plan.config.seconds or 0.0, plan.horizon(progress.step) is None
    ending = watch.seconds_of_finish()
    plan.decide(
        progress.step,
        elapsed=progress.elapsed,
        per_step=per_step,
        per_watch=watch.seconds_left(progress.step, budget - progress.elapsed),
        ending=ending,
    )
    if first and plan.finished(progress.step):
        needed = words_of(ending + watch.preview_seconds)
        session.log(
            f"No time is left to train: {words_of(progress.elapsed)} have gone by, and the final pictures and the "
            f"report take {needed}. Give more time with --for, or prepare smaller pictures with --size."
        )


def skipped(session: Session, progress: Progress, step: int) -> Progress:
    """Count update number `step`, which was skipped; after `BAD_STEPS` in a row go back to the last good state, with
    half the learning rate."""
    progress.skipped += 1
    progress.in_a_row += 1
    if progress.in_a_row < BAD_STEPS:
        session.log(f"Step {step} was skipped: its loss or gradient was not finite.")
        return progress
    if progress.rollbacks >= ROLLBACKS:
        raise UserError(
            f"Training diverged {ROLLBACKS + 1} times, with ever lower learning rates; "
            f"start again with a lower --learning-rate than {session.run.config.training.learning_rate:g}."
        )
    # Written down first: a run killed before its next checkpoint must come back with the lower rate.
    write_atomic(session.run.path / "rollbacks.json", json.dumps(progress.rollbacks + 1))
    back = restore(session)
    back.skipped, back.in_a_row = progress.skipped, 0
    back.elapsed = time.monotonic() - session.started
    session.run.forget_metrics_after(back.step)
    session.watch.forget()
    session.log(
        f"Steps up to {step} were not finite {BAD_STEPS} times in a row: back to step {back.step}, "
        f"with {back.rate_scale:g} of the learning rate."
    )
    return back


def groups_of(session: Session) -> checkpoint.Groups:
    """Every tensor that a checkpoint holds."""
    return {
        "weights": session.learner.model.state_dict(),
        "average": session.average.state(),
        "optimizer": session.learner.optimizer_tensors(),
    }


def save(session: Session, progress: Progress) -> None:
    """Write a checkpoint, unless the weights are not finite."""
    groups = groups_of(session)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in groups["weights"].values()):
        session.log(f"Step {progress.step} was not saved: weights are not finite.")
        return
    begin = time.monotonic()
    progress.elapsed = begin - session.started
    checkpoint.save(session.run.checkpoints, progress.step, groups, progress.as_dict())
    session.watch.checkpoint_seconds = max(session.watch.checkpoint_seconds, time.monotonic() - begin)
    session.run.write_status("training", step=progress.step, images=progress.images)


def not_written(run: Run, groups: checkpoint.Groups, error: OSError) -> UserError:
    """The sentence for a disk that takes no more, full or otherwise."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{error.filename or run.path} cannot be written ({error.strerror or error}); mend that and continue with "
            f"`snowmelt train --resume {run.path}`."
        )
    needed = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
    free = shutil.disk_usage(run.path).free
    kept = run.newest_checkpoint()
    return UserError(
        f"The disk is full: a checkpoint needs {size_of(needed)} and {size_of(free)} are free at {run.path}; "
        f"make room and continue with `snowmelt train --resume {run.path}` "
        f"({'from step ' + str(int(kept.name)) if kept else 'from the start'})."
    )


def restore(session: Session) -> Progress:
    """Put the newest checkpoint back into the learner and the average; fresh counters where there is none.

    Raises:
        UserError: it is damaged, or from a later version.
    """
    path = session.run.newest_checkpoint()
    if path is None:
        return Progress()
    progress = Progress.of(checkpoint.read_state(path))
    rollbacks = session.run.path / "rollbacks.json"
    if rollbacks.exists():
        try:
            progress.rollbacks = int(rollbacks.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{rollbacks} is damaged; write into it how often training went back, or 0.") from error
    tensors = {name: checkpoint.load(path, name) for name in ("weights", "average", "optimizer")}
    checkpoint.load_into(session.learner.model, tensors["weights"], path)
    session.average.load(tensors["average"])
    session.learner.load_optimizer(tensors["optimizer"])
    return progress
