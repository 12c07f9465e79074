"""How far a run has come: the counters that a checkpoint keeps beside the tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Counters of a run; with the seed they determine everything still to come."""

    step: int = 0
    """Updates done."""
    images: int = 0
    """Images seen."""
    elapsed: float = 0.0
    """Seconds of work in the run so far, over all its resumptions."""
    rate_scale: float = 1.0
    """Factor on the learning rate, halved by every rollback."""
    rollbacks: int = 0
    skipped: int = 0
    """Updates skipped because they were not finite."""
    in_a_row: int = 0
    """Of these, how many just now."""

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint's state.json."""
        return asdict(self)

    @staticmethod
    def of(state: dict[str, Any]) -> Progress:
        """From a checkpoint's state.json."""
        return Progress(**{name: state[name] for name in asdict(Progress())})
