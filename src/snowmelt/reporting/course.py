"""How a run went: its previews behind a slider, and its curves over the images seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snowmelt.evaluation.curves import COUNTED, ERROR
from snowmelt.pages.charts import Chart, Line, lines_chart, svg
from snowmelt.pages.markup import details, fill, number, plain, table
from snowmelt.pages.reading import DAMAGE, Embedded, embedded, finite, opened
from snowmelt.pages.shell import script_data, template
from snowmelt.pictures import moments_of
from snowmelt.run import Run

PREVIEWS = 24
"""Moments behind the slider at most."""
BUDGET = 1_400_000
"""Bytes of all of them."""
POINTS = 250
"""Of a curve."""
OWN = COUNTED - {"spread"}
"""Names in metrics.jsonl that have a chart chosen for them, or need none."""
WORDS = {
    "KL bits": "what the description of a picture costs, bits for each value",
    "reconstruction bits": "what the rest of a picture costs, bits for each value",
    "squared error": "of pictures made again from their description; black is −1, white is 1",
    "active latents": "how many numbers of the description tell anything",
    "reconstruction": "what the rest of a training picture costs, bits for each value",
    "kl": "the cost of the description of training pictures, bits for each value",
    "critic": "the loss of the critic; 0.69 is a tie",
    "critic score": "what the critic thinks of held-out pictures",
    "r1": "how steep the critic is at real pictures, squared",
    "r2": "how steep the critic is at drawn pictures, squared",
    "spread": "how different the drawn pictures are, as a share of how different real ones are",
}

Metrics = list[dict[str, Any]]


# the previews


def previews(run: Run) -> str:
    """The previews as a timeline that can be scrubbed."""
    files = sorted(path for path in (run.path / "previews").glob("*.png") if path.stem.isdigit())
    chosen = [files[index] for index in moments_of(len(files), PREVIEWS)] if files else []
    shown = [(path, one) for path in chosen if (one := _read(path, BUDGET // len(chosen)))]
    if not shown:
        return "<p>The run has no previews (yet).</p>"
    metrics = run.metrics()
    horizon = int(shown[-1][0].stem) or 1
    frames = [_frame(path, one, metrics, horizon) for path, one in shown]
    last = frames[-1]
    values = {
        "image": str(last["images"]["x"]),
        "width": str(shown[-1][1].size[0]),
        "height": str(shown[-1][1].size[1]),
        "ratio": f"{shown[-1][1].size[0] / shown[-1][1].size[1]:.3f}",
        "alt": plain(last["label"]),
        "last": str(len(frames) - 1),
        "frames": script_data(frames),
        "about": _about(files, shown),
        **{name: plain(last["texts"][name]) for name in ("step", "images", "loss")},
    }
    return fill(template("snowmelt.reporting", "previews.html"), values)


def _read(path: Path, budget: int) -> Embedded | None:
    try:
        return embedded(opened(path), budget)
    except DAMAGE:
        return None


def _frame(path: Path, one: Embedded, metrics: Metrics, horizon: int) -> dict[str, Any]:
    step = int(path.stem)
    line = next((line for line in metrics if line.get("step") == step and "held_out_loss" in line), {})
    loss, images = finite(line.get("held_out_loss")), finite(line.get("images"))
    held_out = "not measured" if loss is None else number(loss)
    return {
        "images": {"x": one.address},
        "texts": {"step": f"{step:,}", "images": "–" if images is None else f"{images:,.0f}", "loss": held_out},
        "shares": {},
        "paths": {},
        "place": step / horizon,
        "label": f"Preview at step {step:,}, held-out loss {held_out}",
    }


def _about(files: list[Path], shown: list[tuple[Path, Embedded]]) -> str:
    few = f"{len(shown)} of the {len(files)} previews" if len(shown) < len(files) else f"All {len(files)} previews"
    changed = next((one.note for _, one in shown if one.note), "")
    return f"{few}{f', {changed}' if changed else ''}. All are drawn from the same noise; the files lie in previews/."


# the curves


def course(run: Run) -> str:
    """Losses, held-out errors, learning rate, speed and memory; what more time is expected to bring."""
    metrics = run.metrics()
    panels = [panel for panel in (*_losses(metrics), *_errors(metrics), *_others(metrics), *_machine(metrics)) if panel]
    if not panels:
        return "<p>The run has not written down any losses yet.</p>"
    charts = "".join(
        f'<figure class="chart">{svg(chart, f"course{index}", chart.title)}<figcaption>{words}</figcaption></figure>'
        for index, (chart, words) in enumerate(panels)
    )
    forecast = run.status().get("forecast")
    words = f"<p>{plain(forecast)}</p>" if isinstance(forecast, str) else ""
    return f'<div class="charts wide">{charts}</div>{words}{_last(metrics)}'


Panel = tuple[Chart, str]
"""A chart and its caption."""


def _points(metrics: Metrics, key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Images seen and values, thinned to `POINTS`."""
    found = [(finite(line.get("images")), finite(line.get(key))) for line in metrics if key in line]
    pairs = [(images, value * scale) for images, value in found if images is not None and value is not None]
    pairs = [pairs[index] for index in moments_of(len(pairs), POINTS)] if pairs else []
    return [images for images, _ in pairs], [value for _, value in pairs]


def _panel(title: str, caption: str, lines: list[Line]) -> Panel | None:
    """None where there is nothing to draw."""
    lines = [line for line in lines if line.ys]
    return (lines_chart(title, "images seen", lines), caption) if lines else None


def _losses(metrics: Metrics) -> list[Panel | None]:
    training = [Line("signal", *_points(metrics, "loss"))]
    held_out, train = _points(metrics, "held_out_loss"), _points(metrics, "train_loss")
    words = '<b class="noise">● The loss on pictures held out of training</b>'
    if train[1]:
        words += ', and <b class="signal">■ on training pictures</b>; where they part, pictures are learned by heart'
    both = [Line("signal", *train, dots="s"), Line("noise", *held_out, dots="o")]
    return [
        _panel("Loss while training", "<b>The loss while training</b>, of the weights as they are", training),
        _panel("Loss on held-out and on training pictures", f"{words} (average weights)", both),
    ]


def _errors(metrics: Metrics) -> list[Panel | None]:
    """The error by level: at first, in the middle and at last."""
    lines = [line for line in metrics if any(key.startswith(ERROR) for key in line)]
    chosen = [lines[index] for index in moments_of(len(lines), 3)] if lines else []
    roles = [("faint", "^"), ("signal", "s"), ("noise", "o")][-len(chosen) :]
    drawn: list[Line] = []
    words: list[str] = []
    for (role, mark), line in zip(roles, chosen, strict=False):
        levels = sorted(_levels(line).items())
        drawn.append(Line(role, [level for level, _ in levels], [value for _, value in levels], dots=mark))
        sign = {"^": "▲", "s": "■", "o": "●"}[mark]
        words.append(f'<b class="{role}">{sign} {number(finite(line.get("images")) or 0.0)}</b>')
    drawn = [line for line in drawn if line.ys]
    if not drawn:
        return []
    caption = f"<b>The held-out error by noise level</b>, noise on the left, after {', '.join(words)} images"
    return [(lines_chart("Held-out error by noise level", "log-SNR", drawn), caption)]


def _levels(line: dict[str, Any]) -> dict[float, float]:
    found: dict[float, float] = {}
    for key, value in line.items():
        try:
            level = float(key.removeprefix(ERROR)) if key.startswith(ERROR) else None
        except ValueError:
            continue
        error = finite(value)
        if level is not None and error is not None and abs(level) < 100:
            found[level] = error
    return found


def _others(metrics: Metrics) -> list[Panel | None]:
    """Whatever else the family measures."""
    names = list(dict.fromkeys(key for line in metrics for key in line if key not in OWN and not key.startswith(ERROR)))
    return [_other(metrics, name) for name in names[:12]]


def _other(metrics: Metrics, name: str) -> Panel | None:
    about = f": {WORDS[name]}" if name in WORDS else ""
    line = Line("third", *_points(metrics, name))
    few = len(line.xs) <= 30
    return _panel(name, f"<b>{plain(name)}</b>{about}", [line._replace(dots="o") if few else line])


def _machine(metrics: Metrics) -> list[Panel | None]:
    return [
        _panel("Learning rate", "<b>The learning rate</b>", [Line("signal", *_points(metrics, "learning_rate"))]),
        _panel("Speed", "<b>Speed</b>, images a second", [Line("signal", *_points(metrics, "images_per_second"))]),
        _panel("Memory", "<b>Memory</b> in use, GB", [Line("signal", *_points(metrics, "memory", 1 / 2**30))]),
    ]


def _last(metrics: Metrics) -> str:
    """What was measured last on held-out pictures, as numbers."""
    line = next((line for line in reversed(metrics) if "held_out_loss" in line), {})
    rows = [
        [plain(name), number(value)]
        for name, found in line.items()
        if name not in ("step", "images") and (value := finite(found)) is not None
    ]
    shown = table(["", "last measured"], rows, "The last held-out measurement")
    return details("The last measurement in numbers", shown) if rows else ""
