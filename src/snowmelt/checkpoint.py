"""Checkpoints: a directory of safetensors and one JSON, complete or absent, never half.

    checkpoints/000001200/   weights.safetensors  average.safetensors  optimizer.safetensors  state.json

`state.json` holds the counters and the SHA-256 of every other file. A checkpoint is written under a temporary name,
synced and renamed, so whatever has its final name was complete; what was altered later, the hashes tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from snowmelt import __version__
from snowmelt.config import FORMAT
from snowmelt.errors import UserError
from snowmelt.files import sync_directory, write_synced

KEEP = 2
"""How many checkpoints of a run are kept: the newest, and one to fall back on."""

CHECKPOINTS = "checkpoints"
"""The folder of those that training goes on from, in a run."""

Groups = Mapping[str, Mapping[str, Tensor]]


def steps_saved(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in `folder`, rising."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` is."""
    return folder / f"{step:09d}"


def save(folder: Path, step: int, groups: Groups, state: Mapping[str, Any], *, keep: int = KEEP) -> Path:
    """Write the checkpoint of `step`; older ones beyond `keep` are removed once it is safe.

    Args:
        groups: tensors by name, by file (`weights`, `average`, ...).
        state: counters, as JSON.

    Raises:
        OSError: the disk is full or refuses; the earlier checkpoints are untouched.
    """
    final = path_of(folder, step)
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary = folder / f".writing-{step:09d}-{os.getpid()}"
    try:
        temporary.mkdir()
        _write(temporary, groups, {**state, "step": step})
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(folder)
    for old in steps_saved(folder)[:-keep]:
        # Under another name first, so that a kill half-way leaves no half checkpoint.
        going = folder / f".writing-old-{old}"
        path_of(folder, old).rename(going)
        shutil.rmtree(going, ignore_errors=True)
    return final


def _write(folder: Path, groups: Groups, state: Mapping[str, Any]) -> None:
    hashes: dict[str, str] = {}
    for name, tensors in groups.items():
        data = save_tensors({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        hashes[name] = hashlib.sha256(data).hexdigest()
        write_synced(folder / f"{name}.safetensors", data)
    about = {"format": FORMAT, "version": __version__, **state, "sha256": hashes}
    write_synced(folder / "state.json", json.dumps({**about, "self": _self_hash(about)}, indent=1).encode())
    sync_directory(folder)


def _self_hash(about: Mapping[str, Any]) -> str:
    """Of everything in a state.json but this hash."""
    rest = {key: value for key, value in about.items() if key != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The counters of a checkpoint.

    Raises:
        UserError: missing, damaged, or of a later version.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        later = state["format"] > FORMAT
        if not later and state["self"] != _self_hash(state):
            raise ValueError("altered")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "state.json") from error
    if later:
        raise UserError(
            f"The checkpoint {path} was written by a later Snowmelt ({state.get('version')}); upgrade to read it."
        )
    return state


def digest_of(path: Path) -> str:
    """What tells the average weights of a checkpoint from all others.

    Raises:
        UserError: see `read_state`.
    """
    return str(read_state(path)["sha256"]["average"])


def load(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, checked against its hash.

    Raises:
        UserError: the file is missing, truncated or altered.
    """
    expected = read_state(path)["sha256"].get(name)
    try:
        data = (path / f"{name}.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != expected:
            raise _damaged(path, f"{name}.safetensors")
        return load_tensors(data)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"{name}.safetensors") from error


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put the weights of a checkpoint into a module.

    Raises:
        UserError: they do not fit, because the run's config.toml was altered or another version made them.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {path} do not fit the network in the run's config.toml; put config.toml back as it was, "
            "or use the version of Snowmelt that it names."
        ) from error


def _damaged(path: Path, file: str) -> UserError:
    steps = steps_saved(path.parent)
    if path.parent.name != CHECKPOINTS or (steps and path != path_of(path.parent, steps[-1])):
        advice = f"delete the folder {path}, from which no training goes on"
    elif len(steps) > 1:
        advice = f"delete the folder {path} to go on from step {steps[-2]}, the one before"
    else:
        advice = "it is the only one, so train again, or copy the run back from a backup"
    return UserError(f"The checkpoint {path} is damaged ({file} is missing, truncated or altered); {advice}.")
