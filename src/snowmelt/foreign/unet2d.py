"""`UNet2DModel`, the U-Net of `diffusers`: its settings as a `UNetConfig` and back.

What is not named in a config.json has the value of `DEFAULTS`, and what `DEFAULTS` does not name means nothing there
either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

from snowmelt.config import UNetConfig
from snowmelt.errors import UserError
from snowmelt.tables import from_table

DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True, False),
    "class_embed_type": (None,),
}
"""The values that networks here can have."""
MOST = 65_536
"""Pixels of a side, or labels."""
WHOLE = ("layers_per_block", "norm_num_groups", "attention_head_dim", "attn_norm_num_groups")
REAL = ("norm_eps", "freq_shift", "dropout")
"""Settings that are numbers."""
DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True}
UP = {"UpBlock2D": False, "AttnUpBlock2D": True}
"""Whether there is attention, by the names of the blocks."""


@dataclass(frozen=True)
class Pictures:
    """What a network is made for."""

    size: int
    channels: int
    labels: int | None
    """Rows of its class embedding; none without one."""
    learns_variance: bool = False
    """Whether it answers with twice the channels."""


def network_of(settings: Mapping[str, Any], where: Path) -> tuple[UNetConfig, Pictures]:
    """The network that a config.json describes, and what for.

    Raises:
        UserError: it is one that networks here cannot be; the sentence names the setting and `where`.
    """
    given = {name: settings.get(name, default) for name, default in DEFAULTS.items()}
    for name, possible in ONLY.items():
        if given[name] not in possible:
            raise _refused(where, name, given[name], " or ".join(map(repr, possible)))
    channels = _check_numbers(given, where)
    attention = _attention(given, where)
    head, groups, middle = (given[name] for name in ("attention_head_dim", "norm_num_groups", "attn_norm_num_groups"))
    if middle is None and given["resnet_time_scale_shift"] == "scale_shift":
        middle = 0
    table = {
        "channels": channels,
        "attention": attention,
        "blocks": given["layers_per_block"],
        "groups": groups,
        # One head at every size.
        "head_channels": max(channels) if head is None else head,
        "dropout": given["dropout"],
        "embedding": "add" if given["resnet_time_scale_shift"] == "default" else "scale_shift",
        "epsilon": given["norm_eps"],
        "halving": "centered" if given["downsample_padding"] else "corner",
        "sines_first": not given["flip_sin_to_cos"],
        "frequency_shift": given["freq_shift"],
        "middle_attention": given["add_attention"],
    }
    network = from_table(
        UNetConfig, table | ({} if middle in (None, groups) else {"middle_groups": middle}), str(where)
    )
    if head is not None and any(width < head for width in network.attended):
        raise _refused(where, "attention_head_dim", head, "what divides all channels with attention")
    if given["time_embedding_dim"] not in (None, 4 * channels[0]):
        raise _refused(where, "time_embedding_dim", given["time_embedding_dim"], f"None or {4 * channels[0]}")
    return network, _pictures(given, network, where)


def settings_of(network: UNetConfig, pictures: Pictures) -> dict[str, Any]:
    """The config.json of a network.

    Raises:
        UserError: `UNet2DModel` has no such network.
    """
    if network.patch > 1:
        raise UserError(
            f"This network takes squares of {network.patch} x {network.patch} pixels, which no UNet2DModel of "
            "diffusers does; export it with --format onnx, or train with patch = 1 in [network] of --config."
        )
    middle = network.groups if network.middle_groups is None else network.middle_groups
    if network.middle_attention and not middle and network.embedding == "add":
        raise UserError("UNet2DModel of diffusers has no network.middle_groups = 0 with network.embedding = 'add'.")
    return {
        **DEFAULTS,
        "sample_size": pictures.size,
        "in_channels": pictures.channels,
        "out_channels": pictures.channels * (2 if pictures.learns_variance else 1),
        "freq_shift": int(network.frequency_shift) if network.frequency_shift.is_integer() else network.frequency_shift,
        "flip_sin_to_cos": not network.sines_first,
        "down_block_types": ["AttnDownBlock2D" if on else "DownBlock2D" for on in network.attention],
        "up_block_types": ["AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(network.attention)],
        "block_out_channels": list(network.channels),
        "layers_per_block": network.blocks,
        "downsample_padding": 0 if network.halving == "corner" else 1,
        "dropout": network.dropout,
        "attention_head_dim": _head(network),
        "norm_num_groups": network.groups,
        "attn_norm_num_groups": middle or None,
        "norm_eps": network.epsilon,
        "resnet_time_scale_shift": "default" if network.embedding == "add" else "scale_shift",
        "add_attention": network.middle_attention,
        "num_class_embeds": pictures.labels,
    }


def _head(network: UNetConfig) -> int | None:
    """Channels of a head; None for one head at every size."""
    if all(width % network.head_channels == 0 for width in network.attended):
        return network.head_channels
    if all(width <= network.head_channels for width in network.attended):
        return None
    raise UserError(
        f"UNet2DModel of diffusers has no heads of {network.head_channels} channels where there are fewer channels "
        f"({min(network.attended)}); export it with --format onnx."
    )


def _attention(given: Mapping[str, Any], where: Path) -> list[bool]:
    """Whether there is attention at each size, from the full size down."""
    found: list[list[bool]] = []
    for name, kinds in (("down_block_types", DOWN), ("up_block_types", UP)):
        blocks = given[name] if isinstance(given[name], list) else [given[name]]
        # Folders of the first days write UNetResDownBlock2D.
        plain = [str(block).removeprefix("UNetRes") for block in cast(list[Any], blocks)]
        unknown = [block for block in plain if block not in kinds]
        if unknown:
            raise _refused(where, name, unknown[0], " or ".join(kinds))
        found.append([kinds[block] for block in plain])
    down, up = found
    if down != up[::-1]:
        raise _refused(
            where, "up_block_types", given["up_block_types"], "attention at the sizes that have it on the way down"
        )
    return down


def _pictures(given: Mapping[str, Any], network: UNetConfig, where: Path) -> Pictures:
    size, channels, out, labels = (
        given[name] for name in ("sample_size", "in_channels", "out_channels", "num_class_embeds")
    )
    if size is None:
        raise UserError(f"{where} does not say how large the pictures are; write their size there as sample_size.")
    height, *widths = cast(list[Any], size) if isinstance(size, list) and size else [size]
    if not _whole(height) or height > MOST or height % network.divisor or widths not in ([], [height]):
        raise _refused(where, "sample_size", size, f"one multiple of {network.divisor} up to {MOST:,} for both sides")
    if not _whole(channels) or channels not in (1, 3):
        raise _refused(where, "in_channels", channels, "1 (grey) or 3 (colour)")
    if out not in (channels, 2 * channels):
        raise _refused(where, "out_channels", out, f"{channels}, or {2 * channels} with a learned variance")
    if labels is not None and (not _whole(labels) or not 2 <= labels <= MOST):
        raise _refused(where, "num_class_embeds", labels, f"None or 2 to {MOST:,}")
    return Pictures(height, channels, labels, learns_variance=out != channels)


def _check_numbers(given: Mapping[str, Any], where: Path) -> list[int]:
    """The channels at each size, when they and all that must be numbers are."""
    optional = ("attention_head_dim", "attn_norm_num_groups")
    for name in WHOLE:
        value = given[name]
        if not (_whole(value) or (value is None and name in optional)):
            raise _refused(where, name, value, "a whole number from 1")
    for name in REAL:
        if type(given[name]) not in (int, float):
            raise _refused(where, name, given[name], "a number")
    channels: Any = given["block_out_channels"]
    if not isinstance(channels, list) or not channels or not all(map(_whole, cast(list[Any], channels))):
        raise _refused(where, "block_out_channels", channels, "a list of whole numbers")
    channels = cast(list[int], channels)
    if any(width % given["norm_num_groups"] for width in channels):
        raise _refused(where, "norm_num_groups", given["norm_num_groups"], f"a divisor of all channels, {channels}")
    return channels


def _whole(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _refused(where: Path, name: str, value: Any, possible: str) -> UserError:
    return UserError(f"{where} has {name} = {value!r}, which a network here cannot have; possible is {possible}.")
