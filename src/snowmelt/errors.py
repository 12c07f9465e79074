"""The exceptions for a mistake and for Ctrl-C, and what their sentences say of options and choices."""

from __future__ import annotations

import dataclasses
import difflib
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

Choice = TypeVar("Choice")


class UserError(Exception):
    """A mistake a person can mend: one sentence that says what happened and what to do.

    The command line prints the sentence and leaves with exit code 2. What was there before is undamaged; of work that
    had begun, such as a training that diverges, what was saved stays.
    """


class Locked(UserError):
    """Another process is at work on the same folder, which is left to it."""


class Stopped(BaseException):
    """A signal ended the work after everything was saved; the message says how to go on.

    Like `KeyboardInterrupt` no `Exception`, which whoever tries a compiler or a recording takes for its failure.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


NO_MEMORY = "There is not enough memory; use a smaller --batch, --count, --size or --pictures, if it has one."


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's, or torch's on a processor, which has no exception of its own.

    By their words, since torch need not be there.
    """
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and torchs)


def option_of(field: str) -> str:
    """The option of a field of a verb's options, as it is typed.

    >>> [option_of(field) for field in ("save_every", "duration", "class_name")]
    ['--save-every', '--for', '--class']
    """
    return "--" + {"duration": "for", "class_name": "class"}.get(field, field).replace("_", "-")


def options_given(options: Any, among: Collection[str]) -> str:
    """Those of so many options of a verb that somebody has set, as they are typed; empty where none is."""
    fields = [field for field in dataclasses.fields(options) if field.name in among]
    return ", ".join(option_of(field.name) for field in fields if getattr(options, field.name) != field.default)


def nearest(name: str, names: Iterable[str]) -> str:
    """The ending of an error sentence: the nearest of `names` when one is near, then all of them."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choose one of: {', '.join(known)}"


def choose(table: Mapping[str, Choice], name: str, what: str) -> Choice:
    """`table[name]`, or a `UserError` that lists the names and the nearest one.

    Accents may be written as Macs do in names of files: as letters of their own.

    >>> choose({"Cafe\u0301": 7}, "Caf\u00e9", "class")
    7
    """
    if name not in table:
        for known in table:
            if unicodedata.normalize("NFC", known) == unicodedata.normalize("NFC", name):
                return table[known]
        raise UserError(f"There is no {what} {name!r}; {nearest(name, table)}.")
    return table[name]
