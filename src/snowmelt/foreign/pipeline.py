"""The folder of a `DDPMPipeline` of `diffusers`: read and written as what it is, JSON and safetensors.

    model_index.json   scheduler/scheduler_config.json   unet/config.json   unet/diffusion_pytorch_model.safetensors

and `snowmelt.json`, which `diffusers` does not read: the names of the classes, and on which schedule the network was
trained. Nothing in a folder is ever run or unpickled, and `diffusers` need not be installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from snowmelt import __version__
from snowmelt.config import FORMAT, DataConfig, DiffusionConfig, UNetConfig
from snowmelt.errors import UserError
from snowmelt.files import write_synced
from snowmelt.foreign.betas import diffusion_of, scheduler_of
from snowmelt.foreign.unet2d import Pictures, network_of, settings_of
from snowmelt.networks.unet import UNet
from snowmelt.tables import from_table, to_tables

WEIGHTS = "diffusion_pytorch_model.safetensors"
NOTES = "snowmelt.json"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
DIFFUSERS_VERSION = "0.36.0"
"""The version of `diffusers` that the folders written here are of."""
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The parts of attention, as folders of the first days name them."""

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Foreign:
    """A network as it stands in a folder."""

    network: UNetConfig
    pictures: Pictures
    diffusion: DiffusionConfig
    weights: dict[str, Tensor]
    data: DataConfig | None
    """What Snowmelt noted when it wrote the folder; None where it did not."""
    bare: bool
    """Whether nothing is said of the levels, so that DDPM's are taken."""


def read_folder(path: Path) -> Foreign:
    """The network in the folder of a pipeline, or of a `UNet2DModel` alone.

    Raises:
        UserError: it is none, or one that cannot be had here, or has no weights but pickled ones.
    """
    if not path.is_dir():
        raise UserError(f"There is no folder {path}; name one that save_pretrained of diffusers made.")
    index, unet = path / "model_index.json", path
    if index.is_file():
        _check_index(read_json(index), index)
        unet = path / "unet" if (path / "unet").is_dir() else path
    settings = read_json(
        unet / "config.json", else_say=f"{path} is no folder of diffusers (it has no model_index.json)"
    )
    if settings.get("_class_name") != "UNet2DModel":
        raise UserError(f"{unet} holds a {settings.get('_class_name')}; only a UNet2DModel can be imported.")
    network, pictures = network_of(settings, unet / "config.json")
    places = (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json")
    found = [place for place in places if place.is_file()]
    if index.is_file() and not found:
        raise UserError(f"{places[0]} is missing, which says on what noise the network was trained; copy it there.")
    plain: dict[str, Any] = {"_class_name": "DDPMScheduler"}
    plain |= {"variance_type": "learned_range"} if pictures.learns_variance else {}
    levels, where = (read_json(found[0]), found[0]) if found else (plain, unet)
    diffusion = diffusion_of(levels, where, learns_variance=pictures.learns_variance)
    data, noted = _notes(path / NOTES, pictures, diffusion)
    return Foreign(network, pictures, noted, read_weights(unet, network, pictures), data, bare=not found)


def read_json(path: Path, else_say: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: not there (then the sentence begins with `else_say`), or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{else_say or f'{path} is missing'}; name one that save_pretrained made.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); put the original back.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; put the original back.")
    return cast(dict[str, Any], found)


def _check_index(index: Mapping[str, Any], where: Path) -> None:
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{where} is of a {kind}; only {', '.join(PIPELINES)} can be imported.")
    if index.get("unet") != ["diffusers", "UNet2DModel"]:
        raise UserError(
            f"{where} has the network {index.get('unet')}; only a UNet2DModel of diffusers can be imported."
        )


def read_weights(folder: Path, network: UNetConfig, pictures: Pictures) -> dict[str, Tensor]:
    """The weights beside a config.json, float32, by the names they have here.

    Raises:
        UserError: there are none, only pickled ones, or ones that do not fit the network.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        names = sorted(file.name for file in folder.iterdir())
        pickled = [name for name in names if Path(name).suffix in PICKLED]
        if pickled:
            raise UserError(
                f"{folder / pickled[0]} is pickled, and reading it could run any code; load it where you trust it and "
                "write it again with save_pretrained(..., safe_serialization=True)."
            )
        if f"{WEIGHTS}.index.json" in names:
            raise UserError(
                f"The weights in {folder} are in parts; save them with a larger max_shard_size, in one file."
            )
        raise UserError(f"{path} is missing; copy the weights there.")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again.") from error
    old = re.compile(rf"(attentions\.\d+)\.({'|'.join(RENAMED)})\.")
    weights = {old.sub(lambda m: f"{m[1]}.{RENAMED[m[2]]}.", name): tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        expected = network_like(network, pictures).state_dict()
    fits = [name in weights and weights[name].shape == tensor.shape for name, tensor in expected.items()]
    wrong = [name for name, fit in zip(expected, fits, strict=True) if not fit] + sorted(
        weights.keys() - expected.keys()
    )
    if wrong:
        raise UserError(f"{path} does not fit config.json beside it (first at {wrong[0]}); copy both again.")
    if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise UserError(f"{path} holds weights that are not finite numbers; copy it again, or take an earlier one.")
    return {name: weights[name].float() for name in expected}


def network_like(network: UNetConfig, pictures: Pictures) -> UNet:
    """The network of a folder, its weights untrained."""
    out = pictures.channels * (2 if pictures.learns_variance else 1)
    return UNet(network, channels=pictures.channels, classes=(pictures.labels or 1) - 1, out=out)


def _notes(path: Path, pictures: Pictures, read: DiffusionConfig) -> tuple[DataConfig | None, DiffusionConfig]:
    """What Snowmelt noted of data and diffusion, as far as it is of the same network."""
    if not path.is_file():
        return None, read
    notes = read_json(path)
    if type(notes.get("format")) is not int or notes["format"] > FORMAT:
        raise UserError(f"{path} was written by a later Snowmelt; upgrade, or remove it to import without it.")
    data = _noted(DataConfig, notes, "data", path)
    diffusion = _noted(DiffusionConfig, notes, "diffusion", path)
    labels = len(data.classes) + 1 if data.classes else None
    same = [
        (data.size, pictures.size),
        (data.channels, pictures.channels),
        (labels, pictures.labels),
        (diffusion.predicts, read.predicts),
        (diffusion.betas, read.betas),
        (diffusion.variance, read.variance),
        (diffusion.linear, read.linear),
        (diffusion.augment, read.augment),
    ]
    return (data, diffusion) if all(ours == theirs for ours, theirs in same) else (None, read)


def _noted(kind: type[Kind], notes: Mapping[str, Any], name: str, path: Path) -> Kind:
    found = notes.get(name)
    return from_table(kind, cast(dict[str, Any], found) if isinstance(found, dict) else {}, f"{path}, {name}")


def write_folder(
    folder: Path, network: UNetConfig, data: DataConfig, diffusion: DiffusionConfig, weights: Mapping[str, Tensor]
) -> None:
    """Write a network into the empty `folder`, as `DiffusionPipeline.from_pretrained` opens it.

    Args:
        data: as the network in the folder knows it; its classes are those of its embedding.
        weights: of the network, by the names they have here, which are those of `UNet2DModel`.

    Raises:
        UserError: `diffusers` has no such network; then nothing is written.
    """
    labels = len(data.classes) + 1 if data.classes else None
    pictures = Pictures(data.size, data.channels, labels, diffusion.variance == "learned")
    unet, scheduler = settings_of(network, pictures), scheduler_of(diffusion)
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    for name in ("unet", "scheduler"):
        (folder / name).mkdir()
    _write_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", **index})
    _write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **unet})
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    notes = {"format": FORMAT, "version": __version__, "data": to_tables(data), "diffusion": to_tables(diffusion)}
    write_synced(folder / NOTES, json.dumps(notes, indent=1, ensure_ascii=False).encode())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_synced(folder / "unet" / WEIGHTS, save_tensors(tensors, metadata={"format": "pt"}))


def _write_json(path: Path, about: Mapping[str, Any]) -> None:
    """In the way of `diffusers`: sorted, with the version."""
    write_synced(
        path, (json.dumps({**about, "_diffusers_version": DIFFUSERS_VERSION}, indent=2, sort_keys=True) + "\n").encode()
    )
