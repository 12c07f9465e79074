"""The page of a run: its sections in order, each of which tells what it could not read."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from snowmelt import __version__
from snowmelt.pages.markup import code, details, fill, items, plain
from snowmelt.pages.reading import finite, or_reason, whole
from snowmelt.pages.shell import Page, document, look_of, template
from snowmelt.reporting.course import course, previews
from snowmelt.reporting.data import data_sheet
from snowmelt.reporting.measured import measured
from snowmelt.reporting.shown import hero, samples
from snowmelt.run import Run, is_locked
from snowmelt.terminal import words_of

HERE = "snowmelt.reporting"
FAMILIES = {
    "diffusion": "a diffusion model: it turns noise into pictures, step by step",
    "vae": "a variational autoencoder (VAE): it puts pictures into a few numbers, and draws new ones from such numbers",
    "gan": "a generative adversarial network (GAN): one network draws, and learns to deceive another that judges",
}
SECTIONS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("How the pictures came to be", previews),
    ("How the training went", course),
    ("The pictures it learned from", data_sheet),
    ("Pictures it drew", samples),
    ("What was measured", measured),
)


def report_page(run: Run) -> bytes:
    """The whole file, which asks for nothing outside itself."""
    parts = [(title, or_reason(lambda build=build: build(run), "This part")) for title, build in SECTIONS]
    parts.append(("Settings, and how to go on", or_reason(lambda: settings(run), "The settings")))
    sections = "".join(
        f"<section>\n<h2><span>{number}</span>{title}</h2>\n{body}\n</section>\n"
        for number, (title, body) in enumerate(parts, 1)
    )
    name = plain(run.path.resolve().name)
    values = {
        "name": name,
        "state": or_reason(lambda: plain(state_of(run)), "The state of the run"),
        "family": FAMILIES.get(run.config.model, plain(run.config.model)),
        "hero": or_reason(lambda: hero(run), "The pictures of the run"),
        "facts": or_reason(lambda: facts(run), "What the run says of itself"),
        "alarms": or_reason(lambda: alarms(run), "The alarms of the run"),
        "sections": sections,
        "version": __version__,
    }
    look = look_of(run.config.data.size)
    body = fill(template(HERE, "report.html"), values)
    return document(Page("report", f"{name}: a run of Snowmelt", template(HERE, "report.css"), body, look))


def state_of(run: Run) -> str:
    """How far the run is, in a sentence."""
    status = run.status()
    state, step, horizon = stage_of(run), whole(status.get("step")), whole(status.get("horizon"))
    where = f"step {step:,}"
    if horizon > step:
        where += f" of {horizon:,} ({step / horizon:.0%} of the way)"
    sentences = {
        "finished": f"The training is finished, after {step:,} steps.",
        "training": f"The run is still training: {where} when it last said so.",
        "interrupted": f"The training was interrupted after {where}; it can be continued.",
        "stopped": f"The training was stopped at {where}; it can be continued.",
        "failed": f"The training failed at {where}: {str(status.get('error', 'no reason was given')).rstrip('.')}.",
    }
    if run.bare:
        return "The run was imported, and has no pictures to train on."
    if state in sentences:
        return sentences[state]
    return f"The run says of itself: {state}." if state else "The run has not said anything of itself."


def stage_of(run: Run) -> str:
    """What the run says it is doing; interrupted where it says training and nobody is at it."""
    state = str(run.status().get("state", ""))
    return "interrupted" if state == "training" and not is_locked(run.path) else state


def facts(run: Run) -> str:
    """Size, steps, images, time, in a line."""
    lines, status, data = run.metrics(), run.status(), run.config.data
    last: dict[str, Any] = {key: value for line in lines for key, value in line.items()}
    seconds = finite(status.get("seconds")) or finite(last.get("seconds"))
    images = whole(status.get("images")) or whole(last.get("images"))
    parts = [
        f"{data.size} × {data.size} pixels, {'grey' if data.channels == 1 else 'colour'}",
        f"{whole(status.get('step')):,} steps" if "step" in status else "",
        f"{images:,} images seen" if images else "",
        f"trained for {words_of(seconds)}" if seconds else "",
        f"Snowmelt {plain(run.config.version)}" if run.config.version else "",
    ]
    return " · ".join(part for part in parts if part)


def alarms(run: Run) -> str:
    """What the run warned of while it trained; nothing where it did not."""
    said = [line for line in run.metrics() if isinstance(line.get("alarm"), str)]
    if not said:
        return ""
    words = {
        "memorization": "It began to learn pictures by heart",
        "collapse": "Its pictures became all alike",
    }
    entries = [
        f"<b>{words.get(line['alarm'], plain(line['alarm']))}</b>"
        + (f" at step {line['step']:,}" if "step" in line else "")
        + (f". {plain(line['text'])}" if line.get("text") else "")
        for line in said
    ]
    return f'<section><div class="alarm" role="note"><h3>Alarms</h3>{items(entries)}</div></section>'


def settings(run: Run) -> str:
    """Commands, versions, and config.toml, folded."""
    path = shlex.quote(str(run.path))
    unfinished = stage_of(run) in ("interrupted", "stopped", "failed") and not run.bare
    lines = [
        *([f"snowmelt train --resume {path}        # continue"] if unfinished else []),
        f"snowmelt sample {path} --grid        # draw more pictures",
        *([] if run.bare else [f"snowmelt evaluate {path}             # measure it"]),
        f"snowmelt report {path}               # write this page again",
    ]
    newest = run.newest_checkpoint()
    weights = f"checkpoint {plain(newest.name)}" if newest else "no checkpoint yet"
    toml = (run.path / "config.toml").read_text(encoding="utf-8", errors="replace")
    folded = "\n".join(plain(line) for line in toml.splitlines())
    wrote = f"The run was written by Snowmelt {plain(run.config.version)}" if run.config.version else "The run"
    shown = details("Every setting (config.toml)", f'<pre tabindex="0"><code>{folded}</code></pre>')
    return f'{code(lines)}<p>{wrote}; its newest weights: {weights}.</p><div class="wide">{shown}</div>'
