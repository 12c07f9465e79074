"""`snowmelt evaluate`: a run becomes numbers that can be trusted, in RUN/evaluations."""

from __future__ import annotations

import json
from pathlib import Path

from snowmelt.evaluating.options import EvaluateOptions, check
from snowmelt.files import write_atomic
from snowmelt.late import import_torch
from snowmelt.terminal import Log, console

__all__ = ["EvaluateOptions", "evaluate"]


def evaluate(options: EvaluateOptions) -> list[Path]:
    """Measure what is asked for and return the files written.

    Raises:
        UserError: for every mistake in the options, before anything is computed; nothing is half-written.
    """
    check(options)
    # Late, so that the command line stays instant.
    import_torch()
    from rich.console import Console

    from snowmelt.evaluating.bits import bits_table, check_bits, measure_bits
    from snowmelt.evaluating.quality import check_run, measure_quality, spaces_of
    from snowmelt.evaluating.tables import quality_tables, reasons
    from snowmelt.run import Run

    run = Run.open(Path(options.run))
    log, out, files = Log(console(), run.path / "log.txt"), Console(highlight=False), list[Path]()
    check_run(run, options)
    if "bits" in options.measure:
        check_bits(run, options)
    # Before anything is measured, since a name or weights may be wrong.
    spaces = spaces_of(run.open_pictures(), options, log) if "quality" in options.measure else []
    if "bits" in options.measure:
        bits = measure_bits(run, options)
        files.append(run.folder("evaluations") / "bits.json")
        write_atomic(files[-1], json.dumps(bits, indent=1))
        out.print(bits_table(bits))
    if {"quality", "copies"} & set(options.measure):
        found = measure_quality(run, options, spaces, log)
        files.append(run.folder("evaluations") / "quality" / "figures.json")
        for table in quality_tables(found):
            out.print(table)
        for reason in reasons(found):
            log(reason)
    for file in files:
        log(f"Wrote {file}")
    return files
