"""How far a run goes, and the learning rate on the way.

    rate(step) = learning_rate * min(1, step / warmup, (horizon + 1 - step) / (decay * horizon))

The warm-up is at most a fifth of the horizon. A run given by steps has its horizon from the start. A run given by time
measures itself early and then fixes its horizon, writing it down; at fixed later steps it looks again and moves the
horizon only if the machine's speed has changed so much that it would miss the time. Every such decision is kept in
plan.json, so a resumed run repeats it. Another process may be on another machine: it looks as soon as it has measured
itself. And whenever the time is up the training ends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from snowmelt.config import TrainingConfig
from snowmelt.errors import UserError
from snowmelt.files import write_atomic

AIM = 0.985
"""A run by time aims at this share of it, so that small surprises still fit."""
EARLIER, LATER = 0.015, 0.01
"""The horizon moves when the run would end by more than these shares of the time before or after the aim."""
MEASURE = 0.04
"""Share of the time that is trained before the horizon is fixed."""
LOOKS = 16
"""How often, over the run, the horizon is looked at again."""


@dataclass
class Plan:
    """The horizon of a run, as decided so far."""

    config: TrainingConfig
    path: Path
    decisions: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(step, horizon) of each decision, by rising step."""
    resumed: bool = False
    """Whether other processes have decided all of it: this one has not measured its machine."""

    @staticmethod
    def open(path: Path, config: TrainingConfig) -> Plan:
        """The plan kept at `path`, or a new one.

        Raises:
            UserError: it is damaged; or the configuration gives steps and a time, or neither.
        """
        if (config.steps is None) == (config.seconds is None):
            raise UserError("[training] has to give steps or seconds; put config.toml back as it was.")
        if config.steps is not None:
            return Plan(config, path, [(0, config.steps)])
        try:
            decided = [(int(step), int(horizon)) for step, horizon in json.loads(path.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            decided = []
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged; put it back, or train again with another --out.") from error
        return Plan(config, path, decided, resumed=bool(decided))

    def horizon(self, step: int) -> int | None:
        """The last step, as seen at `step`; None while a run by time is still measuring."""
        known = [horizon for decided, horizon in self.decisions if decided <= step]
        return known[-1] if known else None

    def finished(self, step: int) -> bool:
        """Whether `step` updates are all there are to be."""
        horizon = self.horizon(step)
        return horizon is not None and step >= horizon

    def learning_rate(self, step: int) -> float:
        """For update number `step`, 1 for the first.

        It follows the horizon as it stood before the update: a decision at `step` is made after it, and a resumed run,
        which knows the decision already, must not use it earlier.
        """
        config, horizon = self.config, self.horizon(step - 1)
        warmup = config.warmup if horizon is None else min(config.warmup, horizon // 5)
        warmth = step / max(1, warmup)
        left = 1.0 if horizon is None else (horizon + 1 - step) / max(1.0, config.decay * horizon)
        return config.learning_rate * min(1.0, warmth, left)

    def due(self, step: int, fractions: list[float]) -> bool:
        """Whether one of the moments `fractions` of the horizon falls on `step`."""
        horizon = self.horizon(step)
        if horizon is None:
            return False
        return any(round(fraction * horizon) == step for fraction in fractions)

    def decides_at(self, step: int, trained: float, elapsed: float) -> bool:
        """Whether a run by time should now fix its horizon or look again.

        At the horizon itself no longer: the learning rate has come down to zero, and time that is left is left.

        Args:
            trained: seconds that this process has trained.
            elapsed: seconds of the run so far, all processes together.
        """
        if self.config.seconds is None or self.finished(step):
            return False
        if elapsed >= self.config.seconds:
            return True
        if any(decided >= step for decided, _ in self.decisions):
            return False
        if not self.decisions or self.resumed:
            return step >= 3 and trained >= MEASURE * self.config.seconds
        first, horizon = self.decisions[0]
        stride = max(1, (horizon - first) // LOOKS)
        return (step - first) % stride == 0

    def decide(self, step: int, *, elapsed: float, per_step: float, per_watch: float, ending: float) -> None:
        """Fix or keep the horizon at `step`, and write the decision down before it is used.

        Args:
            elapsed: seconds of the run so far.
            per_step, per_watch: measured seconds of an update, and of the previews and errors still to come, together.
            ending: seconds kept for the final pictures and the report.
        """
        assert self.config.seconds is not None
        budget = self.config.seconds
        possible = step + max(0, int((AIM * budget - elapsed - per_watch - ending) / per_step))
        present = self.horizon(step)
        if present is not None:
            finish = elapsed + (present - step) * per_step + per_watch + ending
            if -EARLIER * budget <= finish - AIM * budget <= LATER * budget:
                possible = present
        # Never beyond `step` once the time is up: else every look would add one more step, without end. Decisions for
        # later steps are of a process that was killed before it had saved them.
        self.decisions = [*(decision for decision in self.decisions if decision[0] < step), (step, possible)]
        self.resumed = False
        write_atomic(self.path, json.dumps(self.decisions))
