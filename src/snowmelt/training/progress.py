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
    rollbacks: int = 0
    """Returns to the last good state; each halves the learning rate."""
    skipped: int = 0
    """Updates skipped because they were not finite."""
    in_a_row: int = 0
    """Of these, how many just now."""

    @property
    def rate_scale(self) -> float:
        """Factor on the learning rate."""
        return 0.5**self.rollbacks

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint's state.json."""
        return asdict(self)

    @staticmethod
    def of(state: dict[str, Any]) -> Progress:
        """From a checkpoint's state.json."""
        return Progress(**{name: state[name] for name in asdict(Progress())})
