"""What names and `metadata.jsonl` say about the pictures: classes and captions; and which are held out of training."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from snowmelt.data.source import natural, tidy_name
from snowmelt.errors import UserError
from snowmelt.files import printable

METADATA = "metadata.jsonl"
# Folders that name a part of a data set and not what is in the pictures.
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


def find_classes(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """Labels int64 (count,) and class names when the sub-folders of a source are classes, otherwise None.

    A folder around everything is looked through, and so are `train` and `test`. Then every picture must lie in a
    sub-folder, and there must be at least two of them with two pictures each on average.
    """
    paths = [[part for part in name.split("/") if part != ".."] for name in names]
    while all(len(path) > 1 for path in paths):
        tops = {path[0] for path in paths}
        if len(tops) > 1 and not {top.lower() for top in tops} <= _PARTS:
            break
        paths = [path[1:] for path in paths]
    else:
        return None
    if len(names) < 2 * len(tops):
        return None
    classes = sorted(tops, key=lambda name: (natural(name), name))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[path[0]] for path in paths], dtype=np.int64)
    return labels, tuple(printable(name) for name in classes)


def read_captions(files: Mapping[str, bytes], names: Iterable[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Captions by file name from `metadata.jsonl` files (`imagefolder` convention), and complaints (place, reason)."""
    known = {_same(name): name for name in names}
    captions: dict[str, str] = {}
    complaints: list[tuple[str, str]] = []
    for file, content in files.items():
        folder = file[: -len(METADATA)]
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                name, text = _caption(line)
                target = known.get(_same(tidy_name(folder + name)))
                if target is None:
                    raise ValueError(f"names {name}, which is not in the source")
                if target in captions:
                    raise ValueError(f"names {name} once more; its first caption counts")
                captions[target] = text
            except ValueError as reason:
                complaints.append((f"{file}, line {number}", str(reason)))
    return captions, complaints


def _same(name: str) -> str:
    """Mac and Linux write the same accented name with different letters."""
    return unicodedata.normalize("NFC", name)


def _caption(line: bytes) -> tuple[str, str]:
    try:
        row: Any = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError("has no file_name")
    if not isinstance(row.get("text"), str):
        raise ValueError("has no text")
    return row["file_name"], row["text"].encode("utf-8", "replace").decode()


def held_out_count(count: int) -> int:
    """A tenth of up to 1,000 pictures, a twentieth of 2,000 and more; at least 50 of 100 or more, at least 1."""
    share = max(min(count // 10, 100), -(-count // 20))
    return max(50 if count >= 100 else 1, share)


def hold_out(digests: Sequence[bytes], labels: np.ndarray | None, seed: int) -> np.ndarray:
    """The rows to hold out, int64 and increasing: by seed alone, classes in proportion, duplicates on one side.

    A class keeps one picture to train on, as long as there are enough others.
    """
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for row, digest in enumerate(digests):
        groups[digest].append(row)
    if len(groups) < 2:
        raise UserError(f"All {len(digests)} pictures are the same picture; training needs at least 2 different ones.")
    kinds = [0] * len(digests) if labels is None else labels.tolist()
    target = held_out_count(len(digests))
    room, kept = _shares(np.bincount(kinds), target), Counter(kinds)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(groups))
    rows = list(groups.values())
    chosen: list[int] = []
    left = [rows[place] for place in order]
    # Where duplicates did not fit their class's share, others make up the number; last those that a class needs.
    for in_share, sparing in ((True, True), (False, True), (False, False)):
        groups_left, left = left, []
        for group in groups_left:
            # Copies may be of several classes; the first one's share they are of.
            kind = kinds[group[0]]
            if len(group) <= (room[kind] if in_share else target - len(chosen)):
                taken = Counter(kinds[row] for row in group)
                if not sparing or all(count < kept[one] for one, count in taken.items()):
                    room[kind] -= len(group)
                    kept.subtract(taken)
                    chosen += group
                    continue
            left.append(group)
    return np.array(sorted(chosen or min(left, key=len)), dtype=np.int64)


def _shares(counts: np.ndarray, target: int) -> list[int]:
    """`target` divided in proportion to `counts`, largest remainders first."""
    total = int(counts.sum())
    exact = [target * int(count) for count in counts]
    shares = [value // total for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda kind: (-(exact[kind] % total), kind))
    for kind in by_remainder[: target - sum(shares)]:
        shares[kind] += 1
    return shares
