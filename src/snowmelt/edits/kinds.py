"""The kinds of edits: each a function of a canvas and its options; a mistake is told before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from snowmelt.data.decode import recipe_of
from snowmelt.data.photo import images_of, read_photo, size_of_photo
from snowmelt.diffusion.editing import FILLS, Operator, blurred, cut, greyed, inpainted, psnr, shrunk, slerp
from snowmelt.diffusion.grids import GRIDS, check_grid
from snowmelt.diffusion.noise import add_noise
from snowmelt.diffusion.samplers import SAMPLERS
from snowmelt.edits.canvas import Canvas, Result, decibels
from snowmelt.edits.options import (
    EnlargeOptions,
    InpaintOptions,
    InterpolateOptions,
    InvertOptions,
    RestoreOptions,
    VaryOptions,
)
from snowmelt.errors import UserError, choose
from snowmelt.seeds import noise_source
from snowmelt.shapes import Images
from snowmelt.terminal import console


def inpaint(canvas: Canvas, options: InpaintOptions) -> Result:
    """What could be where the mask is white."""
    fill = choose(FILLS, options.fill, "fill")
    known, unknown = canvas.photo(options.photo), _mask(canvas, options)
    denoise = fill.denoise(canvas.denoise(), known, unknown, canvas.run.config.data.std)
    # Once more around the threshold: one that divides whole pictures must leave what is known.
    kept = partial(inpainted, known=known, unknown=unknown)
    images = canvas.walk(denoise, canvas.noise(0), fill.path(canvas.grid), kept)
    return Result(images, [known, known * (1 - unknown)], {"share filled": round(float(unknown.mean()), 4)})


def _mask(canvas: Canvas, options: InpaintOptions) -> Tensor:
    """(1, 1, size, size) 1 where the photo is to be filled in, 0 where it is kept."""
    size, wanted = canvas.run.config.data.size, size_of_photo(options.photo)
    found = size_of_photo(options.mask, "mask")
    if found not in (wanted, (size, size)):
        raise UserError(
            f"The mask {options.mask} has {found[0]} x {found[1]} pixels; "
            f"make it as large as the photo, {wanted[0]} x {wanted[1]}."
        )
    # What is transparent, or padded, is kept.
    recipe = recipe_of(size, "black", canvas.run.config.data.fit)
    unknown = (images_of(read_photo(options.mask, recipe, "mask"), 1) >= 0).float()
    if not unknown.any():
        raise UserError(f"The mask {options.mask} is black everywhere; paint white what is to be filled in.")
    return unknown.to(canvas.model.precision.device)


def vary(canvas: Canvas, options: VaryOptions) -> Result:
    """SDEdit: from the photo with noise, along the clean end of the schedule."""
    photo = canvas.photo(options.photo)
    spacing = GRIDS[SAMPLERS[options.sampler].grid]
    log_snrs = check_grid(spacing(cut(canvas.model.sampled_on, options.strength), options.steps))
    noise = canvas.noise(0)
    x = add_noise(photo.expand_as(noise), noise, log_snrs[0].to(photo))
    return Result(canvas.walk(canvas.denoise(), x, log_snrs), [photo], {"from log-SNR": round(float(log_snrs[0]), 3)})


def interpolate(canvas: Canvas, options: InterpolateOptions) -> Result:
    """Along the great circle between two noises."""
    ends = (options.first, options.second)
    photos = [None if _is_seed(end) else canvas.photo(Path(end)) for end in ends]
    noises = [_noise_of(canvas, end, photo) for end, photo in zip(ends, photos, strict=True)]
    shares = [number / max(1, options.count - 1) for number in range(options.count)]
    x = torch.cat([slerp(noises[0], noises[1], share) for share in shares])
    images = canvas.walk(canvas.denoise(), x, canvas.grid)
    facts: dict[str, Any] = {"shares": [round(share, 4) for share in shares]}
    for photo, image, end in zip(photos, (images[:1], images[-1:]), ("first", "second"), strict=True):
        if photo is not None and (end == "first" or options.count > 1):
            facts[f"reconstruction PSNR of the {end} in dB"] = decibels(psnr(image, photo))
    return Result(images, [photo for photo in photos if photo is not None], facts)


def _is_seed(end: str) -> bool:
    return end.removeprefix("-").isdecimal()


def _noise_of(canvas: Canvas, end: str, photo: Images | None) -> Images:
    if photo is not None:
        return canvas.inverted(photo, InvertOptions.rounds)
    data = canvas.run.config.data
    return noise_source([int(end)], [0], (data.channels, data.size, data.size), canvas.model.precision.device)(0)


def invert(canvas: Canvas, options: InvertOptions) -> Result:
    """The noise of a photo, and what becomes of it."""
    photo = canvas.photo(options.photo)
    noise = canvas.inverted(photo, options.rounds)
    images = canvas.walk(canvas.denoise(), noise, canvas.grid)
    quality = psnr(images, photo).item()
    console().print(f"Inverted and drawn again: PSNR {quality:.1f} dB", markup=False)
    facts = {"reconstruction PSNR in dB": decibels(quality), "std of the noise": round(float(noise.std()), 4)}
    return Result(images, [photo, noise / 3], facts, noise)


def enlarge(canvas: Canvas, options: EnlargeOptions) -> Result:
    """What shrinks to the small picture."""
    size, factor = canvas.run.config.data.size, options.factor
    if factor < 2 or size % factor:
        fitting = ", ".join(str(number) for number in range(2, size + 1) if size % number == 0)
        raise UserError(
            f"--factor is {factor}, which does not divide the run's {size} pixels; choose one of: {fitting}."
        )
    small = canvas.photo(options.photo, shrunk=factor)
    before = functional.interpolate(small, scale_factor=factor)
    return canvas.restored(shrunk(factor), small, options.noise)._replace(before=[before])


def restore(canvas: Canvas, options: RestoreOptions) -> Result:
    """What the damage turns into the photo."""
    size = canvas.run.config.data.size
    if options.width > size:
        raise UserError(f"--width is {options.width:g}, more than the pictures have; give at most {size}.")
    damages: dict[str, Operator] = {"blur": blurred(options.width), "grey": greyed}
    operator = choose(damages, options.damage, "damage")
    if operator is greyed and canvas.run.config.data.channels == 1:
        raise UserError("--damage grey gives a photo its colours, and this run draws in grey; name a colour run.")
    photo = canvas.photo(options.photo)
    seen = greyed(photo) if operator is greyed else photo
    return canvas.restored(operator, seen, options.noise)._replace(before=[seen.expand_as(photo)])


KINDS: dict[str, Callable[[Canvas, Any], Result]] = {
    "inpaint": inpaint,
    "vary": vary,
    "interpolate": interpolate,
    "invert": invert,
    "enlarge": enlarge,
    "restore": restore,
}
