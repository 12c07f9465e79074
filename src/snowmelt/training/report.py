"""The report of a finished run: what it saw, how it went, and its pictures, in one Markdown page."""

from __future__ import annotations

import os
from pathlib import Path

from snowmelt.evaluation.curves import COUNTED
from snowmelt.files import write_atomic
from snowmelt.run import Run
from snowmelt.terminal import words_of
from snowmelt.training.progress import Progress


def write_report(run: Run, progress: Progress, pictures: list[Path], forecast: str | None) -> Path:
    """Write `report.md` into the run and return its path.

    Args:
        forecast: what more time would bring, where that is known.
    """
    config, lines = run.config, run.metrics()
    data, training = config.data, config.training
    final = next((line for line in reversed(lines) if "held_out_loss" in line), {})
    speed = run.speed()
    facts = {
        "Pictures": f"{data.size} x {data.size}, {'grey' if data.channels == 1 else 'colour'}, "
        f"{len(data.classes) or 'no'} classes",
        "Model": f"{config.model}, widths {config.architecture.channels}",
        "Trained": f"{progress.step:,} steps, {progress.images:,} images seen, {words_of(progress.elapsed)}",
        "Speed": f"{speed:.0f} images/s in {training.precision}" if speed else "-",
        "Skipped updates": f"{progress.skipped}, {progress.rollbacks} rollbacks",
        "Held-out loss": f"{final.get('held_out_loss', float('nan')):.4f}",
        "Forecast": forecast or "-",
    } | {f"Alarm: {line['alarm']}": line["text"] for line in lines if "alarm" in line}
    parts = [f"# {run.path.name}", "", "| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())]
    parts += ["", "## Pictures", "", *(f"![{path.stem}]({os.path.relpath(path, run.path)})" for path in pictures)]
    parts += ["", "## Curves", "", "![curves](curves.png)", "", "| on held-out pictures | |", "|---|---|"]
    parts += [f"| {key} | {value:.5f} |" for key, value in final.items() if key not in COUNTED]
    path = run.path / "report.md"
    write_atomic(path, "\n".join(parts) + "\n")
    return path
