"""The shell of every page: one file that opens offline, whose content security policy lets nothing in from outside."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from snowmelt import __version__
from snowmelt.pages.markup import fill

HERE = "snowmelt.pages"
SMALL = 96
"""Pictures up to so many pixels wide are shown in squares."""


@dataclass(frozen=True)
class Page:
    """What goes into the shell; all of it HTML or CSS of ours."""

    verb: str
    """Makes the page."""
    title: str
    style: str
    """What its style sheet adds to the common one."""
    body: str
    look: str = "photo"
    """pixels where pictures are shown in squares, or photo."""


def look_of(size: int) -> str:
    """The look of a page with pictures so many pixels wide."""
    return "pixels" if size <= SMALL else "photo"


def template(package: str, name: str) -> str:
    """A file that lies beside the modules of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def script_data(value: Any) -> str:
    """JSON that may stand inside a `<script>`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def mark_of(verb: str) -> str:
    """Stands within the first `MARKED` bytes of every page that `snowmelt VERB` made."""
    return f'<meta name="generator" content="snowmelt {verb}'


MARKED = 2000


def is_made_by(path: Path, verb: str) -> bool:
    """Whether the file is a page that `snowmelt VERB` made."""
    with path.open("rb") as file:
        return mark_of(verb).encode() in file.read(MARKED)


def document(page: Page) -> bytes:
    """The whole file."""
    script = template(HERE, "scrubber.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "script_hash": f"sha256-{digest}",
        "verb": page.verb,
        "version": __version__,
        "title": page.title,
        "style": template(HERE, "base.css") + page.style,
        "look": page.look,
        "body": page.body,
        "script": script,
    }
    return fill(template(HERE, "shell.html"), values).encode()
