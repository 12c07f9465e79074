"""Ctrl-C and SIGTERM: the first asks the run to save and leave, a later one ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from snowmelt.errors import Stopped

CAUGHT = (signal.SIGINT, signal.SIGTERM)
APART = 1.0
"""Seconds between two signals that are two: launchers hand one on that has come from the terminal, or send it to a
process and to its group."""


@dataclass
class Stop:
    """Whether the run was asked to stop, and by which signal."""

    signal: int | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.signal is not None


@contextmanager
def stopping(message: str) -> Generator[None]:
    """Within it SIGTERM, like Ctrl-C, ends the work at once and cleanly, with `Stopped` and this message.

    For work that keeps what is done and can be begun again; `catch_signals` is for work that must first save.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def leave(number: int, _frame: FrameType | None) -> None:
        raise Stopped(message, number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(message, signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def catch_signals() -> Generator[Stop]:
    """Within it the first signal is only noted; what handled signals before does so again afterwards."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in CAUGHT}
    came = 0.0

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if not stop.requested:
            came, stop.signal = time.monotonic(), number
        elif time.monotonic() - came >= APART:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in CAUGHT:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
