"""What a person reads while a verb works: one console, sizes and times in words."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from rich.console import Console

from snowmelt.errors import UserError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def console() -> Console:
    """Where progress goes: standard error, so that standard output stays for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def seconds_of(duration: str) -> float:
    """Seconds of a duration such as 90s, 20m, 1h30m, 8h.

    Raises:
        UserError: it is none.
    """
    text = duration.strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UserError(f"{duration!r} is no duration; write it like 90s, 20m, 1h30m or 8h.")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def words_of(seconds: float) -> str:
    """A duration a person reads at a glance: 42 s, 7:05, 3:07:05."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}" if minutes else f"{whole} s"


def size_of(count: int) -> str:
    """Bytes in the unit that fits: 512 MB."""
    power = min(3, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.0f} {('bytes', 'KB', 'MB', 'GB')[power]}"


class Log:
    """Says a line to the person and keeps it, with the time, in a file."""

    def __init__(self, console: Console, path: Path) -> None:
        self.console, self.path = console, path

    def __call__(self, text: str) -> None:
        self.console.print(text, markup=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")
