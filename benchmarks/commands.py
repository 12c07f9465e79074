"""What benchmarks share that time whole commands."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a command took, in seconds."""

    clock: float
    processor: float
    """Of the command and its children together."""


def timed(words: Sequence[str], code: int = 0) -> Taken:
    """Run a command once.

    Raises:
        RuntimeError: it does not exit with `code`.
    """
    begin, spent = time.perf_counter(), _processor_seconds()
    ended = subprocess.run(words, capture_output=True, text=True)
    taken = Taken(time.perf_counter() - begin, _processor_seconds() - spent)
    if ended.returncode != code:
        raise RuntimeError(f"{' '.join(words)} exits with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    return taken


def _processor_seconds() -> float:
    """Of all processes that have been started here and have ended."""
    times = os.times()
    return times.children_user + times.children_system
