"""What became of every file: `report.json` for programs, `report.txt` and a few closing lines for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snowmelt.files import printable


@dataclass(frozen=True)
class Fate:
    """One file: `used`, `changed` (used, but not as it was), `skipped`, or `metadata`."""

    name: str
    fate: str
    reasons: tuple[str, ...] = ()


def write_reports(folder: Path, fates: Sequence[Fate], duplicates: Sequence[Sequence[str]], lines: list[str]) -> None:
    """Both reports; `lines` open the one for people."""
    rows = [json.dumps(_row(fate), ensure_ascii=False) for fate in fates]
    groups = [json.dumps([printable(name) for name in group], ensure_ascii=False) for group in duplicates]
    counts = json.dumps(Counter(fate.fate for fate in fates), sort_keys=True)
    parts = [f'"counts": {counts}', _array("files", rows), _array("duplicates", groups)]
    _write(folder / "report.json", "{\n" + ",\n".join(parts) + "\n}\n")
    notable = [fate for fate in fates if fate.fate != "used"]
    text = [*lines, "", *(f"{fate.fate}: {printable(fate.name)}: {'; '.join(fate.reasons)}" for fate in notable)]
    text += [f"the same picture: {', '.join(printable(name) for name in group)}" for group in duplicates]
    _write(folder / "report.txt", "\n".join(text) + "\n")


def _row(fate: Fate) -> dict[str, object]:
    return {"name": printable(fate.name), "fate": fate.fate, "reasons": [printable(reason) for reason in fate.reasons]}


def _array(name: str, rows: Sequence[str]) -> str:
    return f'"{name}": [\n' + ",\n".join(rows) + "\n]" if rows else f'"{name}": []'


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def summary(fates: Sequence[Fate], duplicates: Sequence[Sequence[str]]) -> list[str]:
    """How many files were used, changed and skipped, and the commonest reasons with an example each."""
    counts = Counter(fate.fate for fate in fates)
    used, changed, skipped = counts["used"], counts["changed"], counts["skipped"]
    lines = [f"{used + changed:,} pictures used, {changed:,} of them changed; {skipped:,} files skipped"]
    lines += [f"  {line}" for fate in ("changed", "skipped") for line in commonest(fates, fate)]
    if duplicates:
        copies = sum(len(group) - 1 for group in duplicates)
        example = " and ".join(printable(name) for name in duplicates[0][:2])
        lines.append(f"{copies:,} exact duplicates, kept (such as {example})")
    return lines


def commonest(fates: Sequence[Fate], fate: str, most: int = 5) -> list[str]:
    """The commonest reasons of one fate, each with its count and first example."""
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for file in fates:
        if file.fate == fate:
            for reason in file.reasons:
                kind = _kind(reason)
                reasons[kind] += 1
                examples.setdefault(kind, f"{file.name}: {reason}" if kind != reason else file.name)
    lines = [
        f"{fate}: {count:,} {kind} (such as {printable(examples[kind])})" for kind, count in reasons.most_common(most)
    ]
    rest = len(reasons) - most
    return [*lines, f"{fate}: {rest} more reasons"] if rest > 0 else lines


def _kind(reason: str) -> str:
    """The reason without the numbers of one file."""
    for start in ("enlarged", "declares", "only ", "too long and thin", "is a "):
        if reason.startswith(start):
            return {"only ": "too small", "is a ": "named as another format", "declares": "too large"}.get(start, start)
    return reason
