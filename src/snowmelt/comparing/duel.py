"""Training the models of a comparison: each in a process of its own, by the same command a person would type.

    DATA (shared)   plan.json (the shares of the time, and what was spent)   vae/ gan/ diffusion/ (runs)

All of it can be interrupted anywhere: what is done stays done, and a run that was under way continues.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from snowmelt.comparing.budget import Shares
from snowmelt.comparing.options import CompareOptions
from snowmelt.errors import Stopped, UserError, option_of
from snowmelt.files import write_atomic
from snowmelt.run import Run, is_run
from snowmelt.terminal import Log, words_of
from snowmelt.training.signals import Stop

POLL = 0.2
"""Seconds between looks at a training process."""
CHANGEABLE = {"duration", "models", "samples", "spaces", "inception", "dinov2"}
"""Options that may change as long as no time has been shared out and nothing measured: pictures depend on none."""


@dataclass
class Ledger:
    """What a comparison has decided and spent; kept in plan.json."""

    path: Path
    request: dict[str, Any]
    """The options it was asked for with."""
    shares: Shares | None = None
    spent: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds by what they went to, over all interruptions."""
    samples: int | None = None
    """Pictures drawn of each model, once that is decided."""

    @staticmethod
    def open(path: Path, request: dict[str, Any]) -> Ledger:
        """The ledger at `path`, or a new one.

        Raises:
            UserError: it is damaged, or belongs to a comparison with other options.
        """
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            shares = None if known["shares"] is None else Shares(**known["shares"])
            spent = {name: float(seconds) for name, seconds in known["spent"].items()}
            ledger = Ledger(path, known["request"], shares, spent, known["samples"])
        except FileNotFoundError:
            return Ledger(path, request)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged; compare again with another --out.") from error
        changed = sorted(name for name in request if ledger.request.get(name) != request[name])
        if changed and ledger.shares is None and "measuring" not in spent and {*changed} <= CHANGEABLE:
            ledger.request, changed = request, []
        if changed:
            names = ", ".join("the pictures" if name == "sources" else option_of(name) for name in changed)
            raise UserError(
                f"{path.parent} was begun with other options ({names}); repeat that command to continue it, or choose "
                "another --out."
            )
        return ledger

    def save(self) -> None:
        """Write it down."""
        shares = None if self.shares is None else asdict(self.shares)
        about = {"request": self.request, "shares": shares, "spent": self.spent, "samples": self.samples}
        write_atomic(self.path, json.dumps(about, indent=1))

    @property
    def total(self) -> float:
        """Seconds spent so far."""
        return sum(self.spent.values())

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count the time of the block as spent on `name`, also when it is left early; but of a command that is refused
        before anything was kept nothing is, so that it can be corrected."""
        begin, before, refused = time.monotonic(), self.spent.get(name, 0.0), False
        try:
            yield
        except UserError:
            refused = not self.path.exists()
            raise
        finally:
            self.spent[name] = before + time.monotonic() - begin
            if not refused:
                self.save()


def train_models(
    options: CompareOptions, data: Path, ledger: Ledger, stop: Stop, log: Log
) -> tuple[list[Run], list[str]]:
    """Every model trained to its end, one after the other; and a sentence for each that failed.

    Raises:
        Stopped: a signal came; the model under way has saved itself.
        UserError: no training came to its end.
    """
    assert ledger.shares is not None
    runs, failed = list[Run](), list[str]()
    for family in options.families:
        path = ledger.path.parent / family
        if not _is_finished(path):
            log(f"Training {family} for {words_of(ledger.shares.each)}.")
            with ledger.phase(family):
                _train(_command(options, family, data, path, ledger.shares.each), path, stop)
        if _is_finished(path):
            runs.append(Run.open(path))
        else:
            why = Run.open(path).status().get("error") if is_run(path) else None
            failed.append(f"The training of {family} failed{': ' + str(why) if why else '; it has said why.'}")
            log(failed[-1])
    if not runs:
        raise UserError("No model could be trained; mend what the trainings said and repeat the command.")
    return runs, failed


def _is_finished(path: Path) -> bool:
    return is_run(path) and Run.open(path).status().get("state") == "finished"


def _command(options: CompareOptions, family: str, data: Path, path: Path, seconds: float) -> list[str]:
    """The words after `snowmelt`."""
    if is_run(path):
        return ["train", "--resume", str(path), "--device", options.device]
    words = ["train", str(data), "--model", family, "--for", f"{seconds:.1f}s", "--seed", str(options.seed)]
    return [*words, *(["--flip"] if options.flip else []), "--device", options.device, "--out", str(path)]


def _train(words: list[str], path: Path, stop: Stop) -> None:
    # In a session of its own, so that a Ctrl-C does not reach it twice: a second signal that comes late would end it
    # unsaved.
    # On Windows it does, and to terminate is to end it unsaved.
    asked = os.name == "nt"
    command = [sys.executable, "-P", "-m", "snowmelt", *words]
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603  our own command line
    while process.poll() is None:
        if stop.requested and not asked:
            asked = True
            process.terminate()
        time.sleep(POLL)
    if stop.requested:
        raise Stopped(f"Everything is saved in {path.parent}; the same command continues.", stop.signal or 0)
