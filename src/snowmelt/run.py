"""The run directory: the only channel between training, the command line and everything that looks on.

    config.toml   data/   status.json   plan.json   metrics.jsonl   checkpoints/   previews/   samples/   log.txt
    snapshots/   before/   evaluations/   curves.png   report.md

Any reader may come, go or crash at any time: every file is replaced whole, and lines are appended whole.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import filelock

from snowmelt import checkpoint
from snowmelt.config import Config, read_config, to_toml
from snowmelt.data.prepared import Prepared, is_prepared, open_prepared
from snowmelt.data.source import is_builtin
from snowmelt.errors import Locked, UserError, choose
from snowmelt.files import write_atomic
from snowmelt.networks import kernels

if TYPE_CHECKING:
    from snowmelt.device import Precision
    from snowmelt.models.base import Learner, Model


@dataclass(frozen=True)
class Run:
    """A run directory and its configuration."""

    path: Path
    config: Config

    @staticmethod
    def create(path: Path, config: Config) -> Run:
        """Make `path` a run; from this moment it explains itself."""
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / "config.toml", to_toml(config))
        return Run(path, config)

    @staticmethod
    def open(path: Path) -> Run:
        """The run at `path`.

        Raises:
            UserError: nothing there, no run, or one that does not load.
        """
        if not path.exists():
            raise UserError(f"There is no run at {path}; `snowmelt train FOLDER --out {path}` makes one.")
        if not is_run(path):
            raise UserError(f"{path} is not a run (it has no config.toml); name a folder that `snowmelt train` made.")
        return Run(path, read_config(path / "config.toml"))

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / checkpoint.CHECKPOINTS

    @property
    def snapshots(self) -> Path:
        """The folder of average weights that are kept for good; the first is from early in the training."""
        return self.path / "snapshots"

    @property
    def before(self) -> Path:
        """The folder of the last average weights that did not know their training pictures by heart."""
        return self.path / "before"

    @property
    def data(self) -> Path:
        """The prepared dataset: the run's own, or the one it was pointed at."""
        own = self.path / "data"
        return own if own.exists() else Path(str(self.config.request.get("source", own)))

    @property
    def bare(self) -> bool:
        """Whether it was imported without pictures: it can draw, but not go on training."""
        return "folder" in self.config.request and not self.config.data.fingerprint

    @property
    def always_told(self) -> bool:
        """Whether it is a diffusion model that knows pictures only with their class: no label was hidden from it."""
        config = self.config
        return config.model == "diffusion" and bool(config.data.classes) and config.diffusion.label_dropout == 0

    def open_pictures(self) -> Prepared:
        """The pictures that the run is trained on.

        Raises:
            UserError: it was imported without any, or they are gone, damaged or others.
        """
        if not self.config.data.fingerprint:
            raise UserError(f"{self.path} was imported without pictures; import it again, with --pictures SOURCE.")
        if not is_prepared(self.data):
            raise UserError(f"The prepared pictures of {self.path} are gone; {self._way_back()}.")
        data = open_prepared(self.data)
        if data.fingerprint != self.config.data.fingerprint:
            raise UserError(f"The pictures in {self.data} are not the ones {self.path} was trained on; put those back.")
        return data

    def check_idle(self, then: str) -> None:
        """Refuse a run that a process trains at this moment.

        Args:
            then: what the person wants to do with it.

        Raises:
            UserError: it is one.
        """
        if self.status().get("state") == "training" and is_locked(self.path):
            raise UserError(
                f"{self.path} is still training; wait for it, or stop it with Ctrl-C and {then} what it has."
            )

    def _way_back(self) -> str:
        """What to do about prepared pictures that are gone."""
        own, source, data = self.path / "data", self.config.request.get("source"), self.config.data
        if source is not None and not is_builtin(str(source)) and not Path(str(source)).exists():
            # Perhaps that was prepared, and the run had none of its own.
            return f"put {own} or {source} back"
        words = ["snowmelt", "prepare", source or "SOURCE", "--out", own, "--size", data.size]
        words += ["--seed", self.config.training.seed]
        words += ["--color", "grey" if data.channels == 1 else "rgb", "--background", data.background]
        words += ["--fit", data.fit, "--classes", "auto" if data.classes else "none"]
        return f"put {own} back, or make it again with `{shlex.join(map(str, words))}`"

    def folder(self, name: str) -> Path:
        """A sub-folder, made when it is not there."""
        path = self.path / name
        path.mkdir(exist_ok=True)
        return path

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; None before the first."""
        steps = checkpoint.steps_saved(self.checkpoints)
        return checkpoint.path_of(self.checkpoints, steps[-1]) if steps else None

    def state_of(self, name: str) -> Path:
        """The folder of one state of the run.

        Args:
            name: newest, before (its pictures were learned by heart), or the number of a step that is kept.

        Raises:
            UserError: there is no such state (yet).
        """
        kept = {
            str(step): checkpoint.path_of(folder, step)
            for folder in self._kept
            for step in checkpoint.steps_saved(folder)
        }
        newest, before = self.newest_checkpoint(), checkpoint.steps_saved(self.before)
        if name == "newest":
            if newest is None:
                raise UserError(
                    f"{self.path} has no checkpoint yet; train it with `snowmelt train --resume {self.path}`."
                )
            return newest
        if name == "before":
            if not any(line.get("alarm") == "memorization" for line in self.metrics()):
                raise UserError(f"{self.path} has not begun to know its pictures by heart; leave --state before away.")
            if not before:
                raise UserError(f"{self.path} knew its pictures by heart at the first look; leave --state before away.")
            return checkpoint.path_of(self.before, before[-1])
        return choose(kept, name, f"kept state of {self.path} called")

    @property
    def _kept(self) -> tuple[Path, ...]:
        return self.snapshots, self.before, self.checkpoints

    def load_model(self, precision: Precision, state: str = "newest") -> tuple[Model, Path]:
        """The model with the average weights of a state (see `state_of`), and where that is.

        Raises:
            UserError: there is no such checkpoint, or it is damaged, or does not fit config.toml.
        """
        from snowmelt.models import build_model

        path = self.state_of(state)
        weights = checkpoint.load(path, "average")
        model = build_model(self.config, self._here(precision))
        checkpoint.load_into(model, weights, path)
        return model, path

    def drawing_precision(self, device: str, asked: str) -> Precision:
        """What pictures are drawn in on a device: see `kernels.drawn_in`.

        Raises:
            UserError: an unknown name, no such device here.
        """
        from snowmelt.device import make_precision, pick_device

        found = pick_device(device)
        return make_precision(found, kernels.drawn_in(asked, self.config.training.precision, found.type))

    def load_learner(self, precision: Precision, state: str = "newest") -> Learner:
        """A learner of the model that `load_model` gives, with what else was kept of its training, to measure with.

        Raises:
            UserError: see `load_model`.
        """
        from snowmelt.models import build_learner

        path = self.state_of(state)
        learner = build_learner(self.config, self._here(precision))
        checkpoint.load_into(learner.model, checkpoint.load(path, "average"), path)
        if (path / "optimizer.safetensors").exists():
            learner.load_optimizer(checkpoint.load(path, "optimizer"))
        return learner

    def _here(self, precision: Precision) -> Precision:
        """How a model of this run computes in this process, which is made ready for it."""
        import torch

        from snowmelt.device import keep_memory, most_threads, threads_for

        size, found = self.config.data.size, self.config.training.threads
        # Its training may have found that more are faster.
        torch.set_num_threads(max(threads_for(size), min(found, most_threads(size))))
        # Training in the same process may have asked for less.
        torch.set_float32_matmul_precision("highest")
        if precision.device.type != "cpu":
            return precision
        keep_memory()
        # Pictures are drawn 1.1 to 1.3 times as fast so (docs/recipe.md).
        return replace(precision, layout="channels_last")

    def status(self) -> dict[str, Any]:
        """What the run last said of itself; empty before it said anything."""
        try:
            said = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def write_status(self, state: str, **about: Any) -> None:
        """Say what the run is doing: `state` is training, stopped, finished or failed; counters stay as last said."""
        before = {key: value for key, value in self.status().items() if key != "error"}
        status = {**before, "state": state, **about, "pid": os.getpid(), "host": socket.gethostname()}
        write_atomic(self.path / "status.json", json.dumps(status, indent=1))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; one that a kill cut short is left out."""
        try:
            lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [fields for line in lines if (fields := _metrics_line(line))]

    def speed(self) -> float | None:
        """Images a second while it trained, the median over its metrics; None before it was seen."""
        speeds = [line["images_per_second"] for line in self.metrics() if line.get("images_per_second")]
        return median(speeds) if speeds else None

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again."""
        kept = [json.dumps(line) for line in self.metrics() if line["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in kept))


def _metrics_line(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) and isinstance(fields.get("step"), int) else {}


@contextmanager
def lock(path: Path) -> Generator[None]:
    """Hold the directory of a run for writing; the system lets go when the process ends, however it ends.

    Raises:
        Locked: another process holds it; the sentence names it.
    """
    # `is_locked` takes it for a moment.
    held = filelock.FileLock(path / ".lock", timeout=0.2)
    owner = path / ".owner"
    try:
        held.acquire()
    except filelock.Timeout as error:
        first = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise Locked(f"{path} is being trained by {first}; wait for it, stop it, or choose another --out.") from error
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        held.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds the directory of a run at this moment."""
    held = filelock.FileLock(path / ".lock", timeout=0)
    if not (path / ".lock").exists():
        return False
    try:
        held.acquire()
    except filelock.Timeout:
        return True
    except OSError:
        return False
    held.release()
    return False


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory."""
    return (path / "config.toml").is_file()
