"""The page as a whole: what it is about, and its templates."""

from __future__ import annotations

import html
from dataclasses import dataclass

from snowmelt import __version__
from snowmelt.pages.markup import fill
from snowmelt.pages.shell import Page, document, look_of, template

HERE = "snowmelt.explaining"


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


def whole(forward: Part, network: Part | None, subject: Subject, size: int) -> bytes:
    """index.html: the story of the photo, and then that of the network or how to get one."""
    rest = (
        fill(template(HERE, "network.html"), network.values)
        if network
        else fill(template(HERE, "closing.html"), {"photo": html.escape(subject.photo)})
    )
    more = "; of DDIM: Song, Meng and Ermon, 2020 (arXiv:2010.02502)" if network else ""
    values = {"rest": rest, "more_references": more, "version": __version__, "command": html.escape(subject.command)}
    body = fill(template(HERE, "forward.html"), {**forward.values, **values})
    title = f"{html.escape(subject.photo)}: a photo in a diffusion model"
    return document(Page("explain", title, template(HERE, "explain.css"), body, look_of(size)))
