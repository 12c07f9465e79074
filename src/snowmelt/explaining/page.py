"""The page as a whole: what it is about, its templates, and the shell that lets nothing in from outside."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from snowmelt import __version__
from snowmelt.explaining.markup import fill

SMALL = 96
"""Photos up to so many pixels wide are shown in squares."""


@dataclass(frozen=True)
class Subject:
    """What a page is about, in words."""

    photo: str
    """Its file's name."""
    changes: tuple[str, ...]
    """What was done to it to fit."""
    schedule: str
    seed: int
    command: str
    """Makes the page again."""


@dataclass(frozen=True)
class Part:
    """What becomes of a template, and the pictures that belong beside the page."""

    values: dict[str, str]
    files: dict[str, bytes]


def template(name: str) -> str:
    """A file that lies beside this one."""
    return resources.files("snowmelt.explaining").joinpath(name).read_text(encoding="utf-8")


def script_data(value: Any) -> str:
    """JSON that may stand inside a `<script>`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def whole(forward: Part, network: Part | None, subject: Subject, size: int) -> bytes:
    """index.html: the story of the photo, and then that of the network or how to get one."""
    rest = (
        fill(template("network.html"), network.values)
        if network
        else fill(template("closing.html"), {"photo": html.escape(subject.photo)})
    )
    more = "; of DDIM: Song, Meng and Ermon, 2020 (arXiv:2010.02502)" if network else ""
    values = {"rest": rest, "more_references": more, "version": __version__, "command": html.escape(subject.command)}
    script = template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shell = {
        "title": f"{html.escape(subject.photo)}: a photo in a diffusion model",
        "style": template("page.css"),
        "script": script,
        "script_hash": f"sha256-{digest}",
        "version": __version__,
        "look": "pixels" if size <= SMALL else "photo",
        "body": fill(template("forward.html"), {**forward.values, **values}),
    }
    return fill(template("shell.html"), shell).encode()
