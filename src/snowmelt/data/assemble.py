"""Source -> the files of a prepared dataset.

source -> entries -> (shorter sides -> size) -> pictures -> colour or grey -> duplicates, split, statistics
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from snowmelt.data.annotations import METADATA, find_classes, hold_out, read_captions
from snowmelt.data.decode import Color, Picture, Recipe, fit_picture, picture, to_grey
from snowmelt.data.prepared import HEADER_BYTES, Contents, npy_header, row_chunks, row_digests, write_dataset
from snowmelt.data.report import Fate, commonest, summary, write_reports
from snowmelt.data.source import (
    BUILTIN,
    MAX_FILE_BYTES,
    Entry,
    Listing,
    Unusable,
    is_builtin,
    list_source,
    open_reader,
    packing,
    unpack,
    walk,
)
from snowmelt.data.workers import Outcome, Pool, decoding_pool
from snowmelt.errors import UserError
from snowmelt.files import printable

SIZES = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_LOOKED_AT = 4096
_GREY_SHARE = 0.01  # one coloured cover does not make a folder of X-rays a colour dataset
_COLOUR_LOST = "its colour was removed"


@dataclass(frozen=True)
class Plan:
    """Checked options."""

    source: str
    out: Path
    size: int | None
    color: str
    background: Color
    fit: str
    seed: int
    classes: str
    workers: int


@dataclass(frozen=True)
class _Gathered:
    """The pictures lie in `images.npy`, in the order of `names`; what else is known of them is here."""

    names: list[str]
    fates: list[Fate]
    captions: dict[str, str]
    settings: dict[str, int | str]
    reasons: list[str]


def fill(folder: Path, plan: Plan, console: Console) -> list[str]:
    """Write all files of the dataset into the empty `folder`; the closing lines for people."""
    gathered = _gather(folder, plan, console)
    digests = row_digests(np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False))
    labels, classes = (find_classes(gathered.names) if plan.classes == "auto" else None) or (None, ())
    captions = tuple(gathered.captions.get(name, "") for name in gathered.names)
    captions = captions if any(captions) else None
    held_out = hold_out(digests, labels, plan.seed)
    source = printable(plan.source if is_builtin(plan.source) else Path(plan.source).resolve().name)
    write_dataset(folder, digests, Contents(labels, classes, captions, held_out, gathered.settings, source))
    duplicates = _duplicates(digests, gathered.names)
    lines = summary(gathered.fates, duplicates) + gathered.reasons
    shown = ", ".join(classes[:6]) + (", ..." if len(classes) > 6 else "")
    lines.append(f"{len(classes)} classes from the sub-folders: {shown}" if classes else "no classes")
    if captions:
        lines.append(f"{sum(map(bool, captions)):,} captions from {METADATA}")
    lines.append(f"{len(held_out):,} of {len(gathered.names):,} held out of training to measure on")
    write_reports(folder, gathered.fates, duplicates, lines)
    return lines


def _duplicates(digests: Sequence[bytes], names: Sequence[str]) -> list[list[str]]:
    groups: defaultdict[bytes, list[str]] = defaultdict(list)
    for digest, name in zip(digests, names, strict=True):
        groups[digest].append(name)
    return [group for group in groups.values() if len(group) > 1]


# pictures from files


def _gather(folder: Path, plan: Plan, console: Console) -> _Gathered:
    if is_builtin(plan.source):
        return BUILTINS[plan.source.removeprefix(BUILTIN)](folder, plan)
    path, unpacked = Path(plan.source), folder / "source.tar"
    if path.is_file() and packing(path) is not None:
        unpack(path, unpacked)
        path = unpacked
    try:
        return _gather_files(folder, plan, list_source(path), console)
    finally:
        unpacked.unlink(missing_ok=True)


def _gather_files(folder: Path, plan: Plan, listing: Listing, console: Console) -> _Gathered:
    notes = [entry for entry in listing.entries if entry.name.rpartition("/")[2] == METADATA]
    entries = [entry for entry in listing.entries if entry.name.rpartition("/")[2] != METADATA]
    fates = [Fate(name, "skipped", (reason,)) for name, reason in listing.skipped]
    with decoding_pool(listing, plan.workers) as pool:
        size, reason = _choose_size(plan, pool, entries, console)
        _check_room(folder, sum(not entry.name.lower().endswith(BESIDE) for entry in entries), size)
        recipe = Recipe(size, plan.background, plan.fit)
        outcomes = _tracked(pool.outcomes(recipe, entries), len(entries), "decoding", console)
        names = [entry.name for entry in entries]
        made, coloured = _write_rows(folder / "images.npy", zip(names, outcomes, strict=True), size)
    used = [fate.name for fate in made if fate.fate != "skipped"]
    if len(used) < 2:
        raise UserError(_too_few(plan.source, used, [*made, *fates]))
    channels, why, made = _settle_color(folder, plan, made, coloured)
    captions, more = _captions(listing, notes)
    fates = sorted([*made, *fates, *more], key=lambda fate: fate.name.encode("utf-8", "surrogateescape"))
    return _Gathered(used, fates, captions, _settings(plan, size, channels), [reason, why])


def _settings(plan: Plan, size: int, channels: int) -> dict[str, int | str]:
    """What the pixels and the split depend on besides the images."""
    background = "#{:02x}{:02x}{:02x}".format(*plan.background)
    color = "grey" if channels == 1 else "rgb"
    return {"size": size, "color": color, "background": background, "fit": plan.fit, "seed": plan.seed}


def _choose_size(plan: Plan, pool: Pool, entries: Sequence[Entry], console: Console) -> tuple[int, str]:
    """The size in pixels, and why."""
    if plan.size is not None:
        return plan.size, f"size {plan.size} x {plan.size}, as asked"
    step = -(-len(entries) // _LOOKED_AT) or 1  # evenly spread over the names: a median needs no more
    some = entries[::step]
    outcomes = _tracked(pool.outcomes(None, some), len(some), "measuring", console)
    sides = sorted(side for side in outcomes if isinstance(side, int))
    if not sides:
        return SIZES[0], ""  # decoding will find out why there is none
    median = sides[len(sides) // 2]
    size = max((size for size in SIZES if size <= median), default=SIZES[0])
    return size, f"size {size} x {size}: the middle image's shorter side has {median} pixels (another: --size)"


BESIDE = (".txt", ".json", ".csv", ".xml", ".html", ".md")
"""Endings of what often lies beside pictures and needs no room; whether a file is a picture its content decides."""


def _check_room(folder: Path, count: int, size: int) -> None:
    needed = count * size * size * 4  # colour, and a grey copy of it
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The prepared images need {needed >> 20:,} MB, but only {free >> 20:,} MB are free; "
            "free some space, choose a smaller --size or another --out."
        )


def _tracked(outcomes: Iterable[Outcome], total: int, title: str, console: Console) -> Iterator[Outcome]:
    """The same outcomes, with a bar, count, rate and time left on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total, rate="")
        for count, outcome in enumerate(outcomes, start=1):
            yield outcome
            if count % 32 == 0 or count == total:
                speed = progress.tasks[0].speed
                progress.update(task, completed=count, rate=f"{speed:,.0f}/s" if speed else "")


def _write_rows(path: Path, outcomes: Iterable[tuple[str, Outcome]], size: int) -> tuple[list[Fate], list[bool]]:
    """Stream the pictures as rows (size, size, 3) into an npy file; every file's fate, and which rows have colour."""
    fates: list[Fate] = []
    coloured: list[bool] = []
    with path.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        for name, outcome in outcomes:
            if isinstance(outcome, Picture):
                pixels = outcome.pixels
                file.write((pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)).tobytes())
                coloured.append(outcome.coloured)
                fates.append(Fate(name, "changed" if outcome.changes else "used", outcome.changes))
            else:
                fates.append(Fate(name, "skipped", (str(outcome),)))
        file.seek(0)
        file.write(npy_header((len(coloured), size, size, 3)))
    return fates, coloured


def _settle_color(folder: Path, plan: Plan, fates: list[Fate], coloured: list[bool]) -> tuple[int, str, list[Fate]]:
    """Rewrite the rows as grey if that is what they are or should be: channels, why, and the fates."""
    some, total = sum(coloured), len(coloured)
    if plan.color == "rgb" or (plan.color == "auto" and some > _GREY_SHARE * total):
        return (
            3,
            "colour, as asked" if plan.color == "rgb" else f"colour: {some:,} of {total:,} images have some",
            fates,
        )
    why = "grey, as asked" if plan.color == "grey" else f"grey: {some:,} of {total:,} images have colour"
    _make_grey(folder / "images.npy")
    flags = iter(coloured)
    return 1, why, [_lose_color(fate) if fate.fate != "skipped" and next(flags) else fate for fate in fates]


def _lose_color(fate: Fate) -> Fate:
    return replace(fate, fate="changed", reasons=(*fate.reasons, _COLOUR_LOST))


def _make_grey(path: Path) -> None:
    images = np.load(path, mmap_mode="r", allow_pickle=False)
    grey = path.with_name("grey.npy")
    with grey.open("wb") as file:
        file.write(npy_header((*images.shape[:3], 1)))
        for chunk in row_chunks(images):
            file.write(to_grey(np.asarray(images[chunk])).tobytes())
    del images  # Windows cannot replace a mapped file
    grey.replace(path)


def _captions(listing: Listing, notes: Sequence[Entry]) -> tuple[dict[str, str], list[Fate]]:
    """Captions by file name, and the fates of the metadata files and of their lines that make no sense."""
    read = open_reader(listing.kind, listing.path) if notes else None
    contents: dict[str, bytes] = {}
    fates: list[Fate] = []
    for entry in notes if read else ():
        try:
            if entry.size > MAX_FILE_BYTES:
                raise Unusable(f"larger than {MAX_FILE_BYTES >> 20} MB")
            contents[entry.name] = read(entry, MAX_FILE_BYTES) if read else b""
        except Unusable as reason:
            fates.append(Fate(entry.name, "skipped", (str(reason),)))
    captions, complaints = read_captions(contents, walk(listing))
    fates += [Fate(name, "metadata", ("read for captions",)) for name in contents]
    return captions, fates + [Fate(place, "skipped", (reason,)) for place, reason in complaints]


def _too_few(source: str, used: Sequence[str], fates: Sequence[Fate]) -> str:
    if used:
        start = f"{source} has only one usable image ({printable(used[0])}); training needs at least 2"
    elif not fates:
        return f"{source} is empty; put images into it or name another folder."
    else:
        start = f"{source} has no usable images"
    reasons = "; ".join(line.removeprefix("skipped: ") for line in commonest(fates, "skipped", most=2))
    return f"{start}{f' ({reasons})' if reasons else ''}; name a folder, zip or tar of images."


# pictures from a library


def _digits(folder: Path, plan: Plan) -> _Gathered:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, 0..16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "builtin:digits comes with scikit-learn, which is missing; `pip install 'snowmelt[demo]'`."
        ) from None
    bunch: Any = load_digits()
    recipe = Recipe(plan.size or 8, plan.background, plan.fit)
    names = [f"{target}/{number:04}" for number, target in enumerate(bunch.target)]
    values = np.floor(bunch.images * (255 / 16) + 0.5).astype(np.uint8)

    def pictures() -> Iterator[tuple[str, Outcome]]:
        for row in sorted(range(len(names)), key=names.__getitem__):
            image, changes = fit_picture(Image.fromarray(values[row]), recipe)
            yield names[row], picture(image, tuple(change for change in changes if change))

    fates, coloured = _write_rows(folder / "images.npy", pictures(), recipe.size)
    channels, why, fates = _settle_color(folder, plan, fates, coloured)
    reasons = [f"size {recipe.size} x {recipe.size}", why]
    return _Gathered(sorted(names), fates, {}, _settings(plan, recipe.size, channels), reasons)


BUILTINS: dict[str, Callable[[Path, Plan], _Gathered]] = {"digits": _digits}
