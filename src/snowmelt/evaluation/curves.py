"""The curves of a run as one PNG: its losses over images seen, and its errors on held-out pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from snowmelt.files import write_atomic

ERROR = "error at log-SNR "
COUNTED = {
    "step",
    "images",
    "seconds",
    "learning_rate",
    "images_per_second",
    "memory",
    "loss",
    "held_out_loss",
    "train_loss",
    "spread",
    "alarm",
    "text",
}
"""What lines of metrics hold that is no error of a family's own."""


def plot_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the lines of a metrics.jsonl into the PNG `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    _losses(losses, lines)
    measured = [line for line in lines if "held_out_loss" in line]
    (_levels if any(key.startswith(ERROR) for line in measured for key in line) else _parts)(errors, measured)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(path, buffer.getvalue())


def _losses(axes: Any, lines: list[dict[str, Any]]) -> None:
    names = {
        "loss": "training (own weights)",
        "train_loss": "training pictures (average weights)",
        "held_out_loss": "held out (average weights)",
    }
    for key, name in names.items():
        points = [(line["images"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=None if key == "loss" else "o", ms=3)
    axes.set(xlabel="images seen", ylabel="loss", title="Loss")
    if all(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log")
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


def _parts(axes: Any, lines: list[dict[str, Any]]) -> None:
    """What another family measures on held-out pictures, over images seen."""
    for key in sorted({key for line in lines for key in line} - COUNTED):
        points = [(line["images"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=key)
    axes.set(xlabel="images seen", title="On held-out pictures")
    if axes.lines:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
