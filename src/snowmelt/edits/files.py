"""The files of an edit: a PNG and a note for each picture, and a sheet of before and after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from snowmelt import __version__
from snowmelt.checkpoint import digest_of
from snowmelt.data.pixels import to_pixels
from snowmelt.edits.canvas import Result
from snowmelt.edits.options import EditOptions, is_positional, pictures_named
from snowmelt.errors import option_of
from snowmelt.files import write_atomic
from snowmelt.pictures import picture, save_png, sheet

WIDEST = 12
"""Pictures in a row of the sheet."""
LONGEST = 80
"""Bytes of a photo's name that are part of what its edits are called; file systems allow 255 in all."""


def write_edit(out: Path, kind: str, options: EditOptions, checkpoint: Path, result: Result) -> list[Path]:
    """Each picture's PNG and note, the noise where it was sought, then the sheet; returns what was written."""
    facts = note_of(kind, options, checkpoint) | result.facts
    stem = "-".join([kind, *(_short(Path(str(one)).stem) for one in pictures_named(options)), f"seed{options.seed}"])
    files: list[Path] = []
    for number, pixels in enumerate(to_pixels(result.images)):
        path = save_png(out / f"{stem}-{number:05d}.png", picture(pixels))
        note = path.with_suffix(".json")
        write_atomic(note, json.dumps(facts | {"number": number}, indent=1, ensure_ascii=False))
        files += [path, note]
    if result.noise is not None:
        files.append(out / f"{stem}-noise.safetensors")
        write_atomic(files[-1], safetensors.torch.save({"noise": result.noise.cpu().contiguous()}))
    tiles = torch.cat([*result.before, result.images])
    return [*files, save_png(out / f"{stem}-sheet.png", sheet(tiles, min(len(tiles), WIDEST), smallest=64))]


def _short(stem: str) -> str:
    """As much of a name as two of them leave room for in the name of a file."""
    return os.fsencode(stem)[:LONGEST].decode(errors="ignore")


def note_of(kind: str, options: EditOptions, checkpoint: Path) -> dict[str, Any]:
    """What determines the pictures, and the line that makes them again."""
    asked = {option_of(name).removeprefix("--"): value for name, value in vars(options).items()}
    named = [*pictures_named(options), getattr(options, "mask", None)]
    files = [Path(str(one)) for one in named if one is not None and Path(str(one)).is_file()]
    return {
        "snowmelt": __version__,
        "edit": kind,
        **{
            name: str(value) if isinstance(value, Path) else value
            for name, value in asked.items()
            if name not in ("out", "device")
        },
        "checkpoint": checkpoint.name,
        "weights": digest_of(checkpoint),
        "sha256": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "command": command_of(kind, options),
    }


def command_of(kind: str, options: EditOptions) -> str:
    """The line that makes the edit again."""
    words: list[object] = ["snowmelt", "edit", kind, options.run, *pictures_named(options)]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not is_positional(field) and field.name not in ("out", "device") and value != field.default:
            words += [option_of(field.name), value]
    return shlex.join(map(str, words))
