"""What is seen of a run while it trains: one progress line, metrics, previews, the held-out error, its curves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from rich.live import Live
from rich.text import Text
from torch import Tensor

from snowmelt import checkpoint
from snowmelt.data.pixels import to_pixels
from snowmelt.data.prepared import Prepared, spread_rows
from snowmelt.data.stream import batch_of
from snowmelt.device import memory_in_use
from snowmelt.ema import Average
from snowmelt.evaluation.curves import plot_curves
from snowmelt.evaluation.held_out import Errors, errors_in_parts, joined
from snowmelt.evaluation.memorization import gaps
from snowmelt.models.base import Learner
from snowmelt.pages.markup import png
from snowmelt.pictures import save_png, sheet, strip
from snowmelt.presets import drawn_at_once
from snowmelt.run import Run
from snowmelt.seeds import noise_source
from snowmelt.shapes import Images
from snowmelt.terminal import Log, size_of, words_of
from snowmelt.training.alarms import ALIKE, EARLIEST, learned_by_heart, spread_ratio
from snowmelt.training.plan import Plan
from snowmelt.training.previews import Drawn, Previews
from snowmelt.training.progress import Progress
from snowmelt.training.signals import Stop

PREVIEWS = [0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
"""Moments of the horizon at which a preview is drawn; denser at first, when most changes."""
LINES = 200
"""Lines of metrics over a run."""
HELD_OUT = 48
"""Held-out pictures, and as many training pictures, looked at for each preview."""
LOSS = "held_out_loss"
"""The error that every family measures by this name, on training pictures too."""
SHOWN = 8
"""Rows of what only one family can show."""
WATCH_SHARE = 0.05
"""Of the time of a run that previews may take; the last one is always drawn."""
ERRORS_SHARE = 0.03
"""Of the time that may go to measuring errors at moments for whose preview there is none: so that it is seen when
pictures are learned by heart."""
STATUS_SECONDS = 2.0
"""Between writes of status.json."""
FINISH = 0.5
"""Seconds that the report takes, and the end of the process."""
FINAL_SHARE = 0.2
"""Of the time of a run that drawing the final pictures may take; where all would take longer there are fewer."""
PROBED = 24
"""Pictures whose errors tell how long those of all take."""
PROBING = 0.01
"""Share of the time of a run after which no more steps of a preview are tried to see how long all take."""
QUIET_SECONDS = 10.0
"""Between progress lines where the output is not a terminal."""


def numbers(values: Sequence[float | Tensor]) -> list[float]:
    """Losses as numbers; those on a device are fetched together, since it is waited for each time."""
    there = [value for value in values if isinstance(value, Tensor)]
    return torch.stack(there).tolist() if len(there) == len(values) > 0 else [float(value) for value in values]


@dataclass
class Watch:
    """Follows one run."""

    run: Run
    log: Log
    plan: Plan
    learner: Learner
    average: Average
    data: Prepared
    device: torch.device
    stop: Stop
    live: Live = field(init=False)
    previews: Previews = field(init=False)
    losses: dict[str, list[float | Tensor]] = field(default_factory=dict[str, list[float | Tensor]])
    speeds: deque[tuple[float, int]] = field(default_factory=lambda: deque[tuple[float, int]](maxlen=40))
    said: float = 0.0
    written: float = 0.0
    preview_seconds: float = 0.0
    """Of the last preview, or foreseen for the first one."""
    saving_seconds: float = 0.0
    """Of writing its picture."""
    plotting_seconds: float = 0.0
    """Of drawing the curves."""
    drawing_seconds: float = 0.0
    """Of drawing its pictures, without saving or measuring anything."""
    checkpoint_seconds: float = 0.0
    """Of saving everything, at most so far: the first time without the momenta of the optimizer."""
    errors_seconds: float = 0.0
    """Of the errors in a preview."""
    pace: float = 0.0
    """Seconds of an update when the last preview was seen or foreseen; 0 until the next look at the horizon."""
    last: tuple[int, Drawn | None] = (-1, None)
    """What the preview of the last step drew, which are the final pictures, and that step."""
    spent: float = 0.0
    """Seconds on previews so far, in this process."""
    spent_on_errors: float = 0.0
    """Seconds on errors without a preview."""

    def __post_init__(self) -> None:
        self.live = Live(Text(""), console=self.log.console, refresh_per_second=4, transient=True)
        self.previews = Previews(self.run, self.learner.model, self.device, self.stop, self.log)

    def after_update(self, progress: Progress, losses: Mapping[str, float | Tensor], rate: float) -> None:
        """Take note of an update; now and then say so and write a line of metrics."""
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)
        self.speeds.append((time.monotonic(), progress.images))
        horizon = self.plan.horizon(progress.step)
        self._say(progress, horizon)
        if progress.step % max(1, (horizon or LINES * 10) // LINES) == 0 or progress.step == 1:
            finite = {name: list(filter(isfinite, numbers(values))) for name, values in self.losses.items()}
            line = {
                "step": progress.step,
                "images": progress.images,
                "learning_rate": rate,
                "images_per_second": round(self.images_per_second(), 2),
                "seconds": round(progress.elapsed, 3),
                "memory": memory_in_use(self.device),
            }
            self.run.append_metrics(line | {name: fmean(values) for name, values in finite.items() if values})
            self.losses.clear()

    def forget(self) -> None:
        """The run has gone back to an earlier state: what was seen since does not count."""
        self.losses.clear()
        self.speeds.clear()

    def images_per_second(self) -> float:
        """Over the last updates."""
        (begin, before), (end, after) = self.speeds[0], self.speeds[-1]
        return (after - before) / (end - begin) if end > begin else 0.0

    def _say(self, progress: Progress, horizon: int | None) -> None:
        now = time.monotonic()
        terminal = self.log.console.is_terminal
        self.said = self.said or now - QUIET_SECONDS + 2
        if now - self.said < (0.2 if terminal else QUIET_SECONDS):
            return
        self.said = now
        line = self._line(progress, horizon)
        if terminal:
            self.live.update(Text(line))
        else:
            self.log.console.print(line, markup=False)
        if now - self.written >= STATUS_SECONDS:
            self.written = now
            self.run.write_status("training", step=progress.step, horizon=horizon, images=progress.images)

    def _line(self, progress: Progress, horizon: int | None) -> str:
        speed = self.images_per_second()
        if self.run.config.training.seconds is not None:
            left = words_of(self.run.config.training.seconds - progress.elapsed)
        else:
            batch = self.run.config.training.batch
            left = words_of(((horizon or 0) - progress.step) * batch / speed) if speed else "?"
        loss = float(self.losses["loss"][-1]) if self.losses else float("nan")
        step = f"step {progress.step}/{horizon}" if horizon else f"step {progress.step}"
        return (
            f"{step} · {progress.images:,} images · loss {loss:.4f} · {speed:.0f} images/s · "
            f"{left} left · {size_of(memory_in_use(self.device))}"
        )

    def seconds_left(self, step: int, seconds: float) -> float:
        """How long the previews after `step` will take in a run that may still take `seconds`."""
        horizon = self.plan.horizon(step)
        left = sum(1 for share in PREVIEWS if horizon is None or round(share * horizon) > step)
        previews = WATCH_SHARE * seconds if self._affords(self.preview_seconds, WATCH_SHARE) else 0.0
        errors = ERRORS_SHARE * seconds if self._affords(self.errors_seconds, ERRORS_SHARE) else 0.0
        errors = min(left * self.errors_seconds, errors)
        return min(left * self.preview_seconds, previews + self.preview_seconds + errors)

    def _affords(self, seconds: float, share: float) -> bool:
        """Whether so many seconds are no more than this share of a run by time."""
        whole = self.plan.config.seconds
        return whole is None or seconds <= share * whole

    def keep_pace(self, per_step: float) -> None:
        """Scale what a preview and its errors take to the time that an update takes now.

        They were seen, or foreseen, when it took another time: a machine that other processes have left draws faster
        too. Plotting, which is hardly shared among cores, stays what it is.
        """
        change = per_step / (self.pace or per_step)
        plotting = min(self.plotting_seconds, self.preview_seconds)
        self.preview_seconds = plotting + (self.preview_seconds - plotting) * change
        self.errors_seconds *= change
        self.drawing_seconds *= change
        self.pace = per_step

    def seconds_of_finish(self) -> float:
        """How long it takes to write the final pictures, grid and strip twice as large, a checkpoint and a report; and
        to draw them with another sampler too."""
        again = 0.0 if self.learner.model.at_once else self.drawing_seconds
        return FINISH + again + 3 * self.saving_seconds + 2 * self.checkpoint_seconds

    def preview_if_due(self, progress: Progress) -> None:
        """Draw the preview of this moment, or measure its errors, if there is one and earlier ones left time for it."""
        if not self.plan.due(progress.step, PREVIEWS):
            return
        finished = self.plan.finished(progress.step)
        if not (finished or self.preview_seconds) and self.plan.config.seconds:
            # A resumed run does not know yet.
            self.foresee()
        previews = self._affords(self.preview_seconds, WATCH_SHARE) and self.spent <= WATCH_SHARE * progress.elapsed
        errors = self._affords(self.errors_seconds, ERRORS_SHARE)
        if finished or previews:
            self.preview(progress)
        elif errors and self.spent_on_errors <= ERRORS_SHARE * progress.elapsed:
            begin = time.monotonic()
            with self.average.applied():
                self._measure(progress, None)
            self.spent_on_errors += time.monotonic() - begin

    def foresee(self) -> None:
        """How long a preview takes, from small parts of one, which a short run has time for."""
        rows = self.data.held_out[:PROBED]
        begin = time.monotonic()
        self._errors(rows)
        whole = sum(min(HELD_OUT, len(one)) for one in (self.data.held_out, self.data.train))
        self.errors_seconds = (time.monotonic() - begin) * whole / max(1, len(rows))
        self.drawing_seconds, pictures, times = self.previews.foreseen(PROBING * (self.plan.config.seconds or 0.0))
        ways = 1 if self.learner.model.at_once else 2
        left = self.previews.limit(ways * self.drawing_seconds, FINAL_SHARE * (self.plan.config.seconds or inf))
        self.drawing_seconds, times = left * self.drawing_seconds, left * times
        begin = time.monotonic()
        png(sheet(pictures, self.previews.columns))
        self.saving_seconds = times * (time.monotonic() - begin)
        self._plot()
        foreseen = self.drawing_seconds, self.saving_seconds, self.errors_seconds, self.plotting_seconds
        self.preview_seconds = sum(foreseen)
        self.pace = 0.0

    def preview(self, progress: Progress) -> None:
        """Draw the grid from the run's fixed noise and measure the held-out error, both with the average weights."""
        finished = self.plan.finished(progress.step)
        begin = time.monotonic()
        with self.average.applied():
            drawn = self._draw_at_last() if finished else self.previews.draw()
            if drawn is None:
                return
            self.drawing_seconds = time.monotonic() - begin
            if finished:
                self.last = progress.step, drawn
            path = self.run.folder("previews") / f"{progress.step:09d}.png"
            saving = time.monotonic()
            save_png(path, sheet(drawn.pictures, self.previews.columns))
            self.saving_seconds = time.monotonic() - saving
            errors = time.monotonic()
            self._measure(progress, drawn.pictures)
            self.errors_seconds = time.monotonic() - errors
        self._plot()
        self.preview_seconds, self.pace = time.monotonic() - begin, 0.0
        self.spent += self.preview_seconds

    def _draw_at_last(self) -> Drawn | None:
        if self.plan.config.seconds and not self.preview_seconds:
            # Of a run that is resumed at its end: how many pictures there is time for.
            self.foresee()
        return self.previews.draw_at_last()

    def _plot(self) -> None:
        """The first time takes longest, since more code is loaded for it."""
        begin = time.monotonic()
        plot_curves(self.run.metrics(), self.run.path / "curves.png")
        self.plotting_seconds = time.monotonic() - begin

    def finish(self, progress: Progress) -> list[Path]:
        """The final pictures: a grid, a strip of pictures melting out of noise, and what else the family can show."""
        step, drawn = self.last
        with self.average.applied():
            drawn = drawn if step == progress.step else self._draw_at_last()
            if drawn is None:
                return []
            shown = self._shows()
        if not self.learner.model.at_once:
            shown["strip"] = drawn.strip
        path = self.run.path
        return [
            save_png(path / "grid.png", sheet(drawn.pictures, self.previews.columns, smallest=64)),
            *(save_png(path / f"{name}.png", strip(columns, smallest=64)) for name, columns in shown.items()),
        ]

    def _shows(self) -> dict[str, list[Images]]:
        held_out = batch_of(self.data, spread_rows(self.data.held_out, SHOWN), self.device)
        numbers, shape = range(len(held_out.images)), tuple(held_out.images.shape[1:])
        noise = noise_source([self.run.config.training.seed] * len(numbers), numbers, shape, self.device)
        return self.learner.model.shows(noise, held_out) if numbers else {}

    def _measure(self, progress: Progress, drawn: Images | None) -> None:
        """The errors on held-out and on training pictures, and how different drawn pictures are, if there are any."""
        held_out, train = (self._errors(rows) for rows in (self.data.held_out, self.data.train))
        if held_out is None or train is None:
            return
        line: dict[str, float] = {name: round(values.mean().item(), 7) for name, values in held_out.items()}
        line["train_loss"] = round(train[LOSS].mean().item(), 7)
        if min(len(train[LOSS]), len(held_out[LOSS])) > 1:  # fewer have no deviation, and no gap is beyond doubt
            (gap,) = gaps({LOSS: train[LOSS]}, {LOSS: held_out[LOSS]})
            self._say_by_heart(progress, learned_by_heart(gap))
        if drawn is not None and (spread := self._spread(drawn)) is not None:
            line["spread"] = round(spread, 4)
            self._say_collapse(progress, spread)
        self.run.append_metrics({"step": progress.step, "images": progress.images} | line)

    def _errors(self, rows: np.ndarray) -> Errors | None:
        """On some of the pictures `rows`; None when the run was asked to stop meanwhile."""
        config, some, parts = self.run.config, spread_rows(rows, HELD_OUT), list[Errors]()
        for part in errors_in_parts(
            self.learner,
            self.data,
            some,
            seed=config.training.seed,
            device=self.device,
            batch=drawn_at_once(config),
        ):
            parts.append(part)
            if self.stop.requested:
                return None
        return joined(parts)

    def _spread(self, drawn: Images) -> float | None:
        classes = min(10, len(self.run.config.data.classes))
        return spread_ratio(to_pixels(drawn), self.data, columns=self.previews.columns, classes=classes)

    def _said(self, name: str) -> bool:
        return any(line.get("alarm") == name for line in self.run.metrics())

    def _say_by_heart(self, progress: Progress, by_heart: bool) -> None:
        """Warn once; until pictures are learned by heart, keep the average weights of the last good moment."""
        if self._said("memorization"):
            return
        if by_heart:
            kept = checkpoint.steps_saved(self.run.before)
            where = (
                f"`snowmelt sample {self.run.path} --state before` draws as it was at step {kept[-1]}" if kept else ""
            )
            self._alarm(
                progress,
                "memorization",
                "The network begins to know its training pictures by heart (its errors on held-out pictures are larger "
                f"beyond doubt): more pictures help, or less training{'; ' + where if where else ''}.",
            )
        else:
            checkpoint.save(
                self.run.before, progress.step, {"average": self.average.state()}, progress.as_dict(), keep=1
            )

    def _say_collapse(self, progress: Progress, spread: float) -> None:
        """Warn once."""
        horizon = self.plan.horizon(progress.step) or 0
        if spread < ALIKE and 0 < EARLIEST * horizon <= progress.step and not self._said("collapse"):
            self._alarm(
                progress,
                "collapse",
                f"The drawn pictures are much alike (they differ {spread:.0%} as much as real ones): the model has "
                "collapsed, or has learned little yet.",
            )

    def _alarm(self, progress: Progress, name: str, text: str) -> None:
        self.log(text)
        self.run.append_metrics({"step": progress.step, "images": progress.images, "alarm": name, "text": text})
