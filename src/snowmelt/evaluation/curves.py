"""The curves of a run as one PNG: its losses over images seen, its held-out error by noise level."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from snowmelt.files import write_atomic

ERROR = "error at log-SNR "


def plot_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the lines of a metrics.jsonl into the PNG `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, levels = figure.subplots(1, 2)
    _losses(losses, lines)
    _levels(levels, [line for line in lines if "held_out_loss" in line])
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(path, buffer.getvalue())


def _losses(axes: Any, lines: list[dict[str, Any]]) -> None:
    for key, name in (("loss", "training (own weights)"), ("held_out_loss", "held out (average weights)")):
        points = [(line["images"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if key == "held_out_loss" else None, ms=3)
    axes.set(xlabel="images seen", ylabel="loss", title="Loss", yscale="log")
    if axes.lines:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def _levels(axes: Any, lines: list[dict[str, Any]]) -> None:
    shown = lines[:: max(1, len(lines) // 5)]
    for index, line in enumerate(shown if not lines or shown[-1] is lines[-1] else [*shown, lines[-1]]):
        errors = {float(key.removeprefix(ERROR)): value for key, value in line.items() if key.startswith(ERROR)}
        if errors:
            axes.plot(
                list(errors), list(errors.values()), marker="o", ms=3, color=f"C{index}", label=f"{line['images']:,}"
            )
    axes.set(xlabel="log-SNR (noise to picture)", ylabel="held-out error per pixel", yscale="log")
    axes.set_title("Held-out denoising error by noise level")
    if axes.lines:
        axes.legend(title="images seen", frameon=False)
    axes.grid(alpha=0.3)
