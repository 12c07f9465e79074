"""`snowmelt report`: a run, at whatever stage, becomes one page that opens offline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from snowmelt.errors import UserError
from snowmelt.files import write_atomic
from snowmelt.terminal import console


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Show a run as one page that opens offline: its pictures, its data, its curves, and what was measured."""

    run: tyro.conf.Positional[Path]
    """A run directory, finished or not."""
    out: Path | None = None
    """Where the page goes; RUN/report.html when not given."""


def report(options: ReportOptions) -> Path:
    """Write the page and return its path; an earlier report there is replaced in one instant.

    Raises:
        UserError: `options.run` is no run, or the page cannot go where it is asked to.
    """
    # Late, so that the command line stays instant.
    from snowmelt.reporting.page import report_page
    from snowmelt.run import Run

    run = Run.open(options.run)
    out = options.out or run.path / "report.html"
    _check(out)
    with console().status("Writing the report"):
        data = report_page(run)
    write_atomic(out, data)
    console().print(f"Wrote {out} ({len(data) / 1e6:.1f} MB); open it in a browser", markup=False)
    return out


def _check(out: Path) -> None:
    from snowmelt.pages.shell import is_made_by

    if out.is_dir():
        raise UserError(f"{out} is a folder; name the page with --out, such as {out / 'report.html'}.")
    if out.exists() and not is_made_by(out, "report"):
        raise UserError(f"{out} is not a report that could be replaced; choose another place with --out.")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent}; make it, or choose another place with --out.")
