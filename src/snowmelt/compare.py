"""`snowmelt compare`: VAE, GAN and diffusion on the same pictures, for the same time, by the same measure."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snowmelt import __version__
from snowmelt.comparing.budget import AIM
from snowmelt.comparing.options import CompareOptions, check, check_runs
from snowmelt.config import DataConfig
from snowmelt.errors import UserError, choose
from snowmelt.evaluating.options import EvaluateOptions
from snowmelt.files import holds_else, make_folder, write_atomic
from snowmelt.late import import_torch
from snowmelt.presets import check_size, facts_of, preset
from snowmelt.terminal import Log, console

if TYPE_CHECKING:
    from snowmelt.comparing.duel import Ledger
    from snowmelt.data.prepared import Prepared
    from snowmelt.evaluation.features import Space
    from snowmelt.run import Run

__all__ = ["CompareOptions", "compare"]

PLAN = "plan.json"
NO_TIME = (
    "An encoder of these pictures would have taken too large a part of the time, so only random features saw them."
)
PROCESS_OPTIONS = ("out", "processes", "precision", "device")
"""What may differ when a command continues a comparison."""


def compare(options: CompareOptions) -> Path:
    """Train or take the models, measure them alike, write the report, and return the path of report.html.

    Raises:
        UserError: for every mistake in the options, before anything is written.
        Stopped: on Ctrl-C or SIGTERM, after saving; the same command continues.
    """
    check(options)
    # Late, so that the command line stays instant.
    import_torch()
    from snowmelt.comparing.duel import Ledger
    from snowmelt.run import Run, is_run, lock
    from snowmelt.training.signals import stopping

    finished = all(is_run(Path(source)) for source in options.sources)
    if finished:
        check_runs(options)
    elif len(options.sources) > 1:
        _refuse_mixture(options)
    out = Path(options.out or Path("compare") / _name(options))
    runs = _alike([Run.open(Path(source)) for source in options.sources]) if finished else []
    _refuse_foreign(out)
    if not finished:
        _check_source(options, out)
    from snowmelt.evaluation.features import SPACES

    for name in options.spaces:
        choose(SPACES, name, "feature space")
    kept = stopping(f"What is done is kept in {out}; the same command continues.")
    with make_folder(out, begun=PLAN), lock(out), kept:
        log, ledger = Log(console(), out / "log.txt"), Ledger.open(out / PLAN, _request(options))
        failed: list[str] = []
        if not finished:
            runs, failed = _duel(options, out, ledger, log)
        found = _measured(options, runs, ledger, log, timed=not finished)
        found["not_measured"] = [*failed, *found["not_measured"]]
        page = _write(out, found)
    log(f"{found['verdict']['headline']}")
    log(f"Wrote {page}; open it in a browser")
    return page


def _name(options: CompareOptions) -> str:
    from snowmelt.data.source import name_of

    return "-".join(map(name_of, options.sources))[:80]


def _request(options: CompareOptions) -> dict[str, Any]:
    """The options that make the comparison what it is."""
    from snowmelt.data.source import resolved

    asked = dataclasses.asdict(options)
    kept = {name: value for name, value in asked.items() if name not in PROCESS_OPTIONS}
    kept["sources"] = [resolved(one) for one in options.sources]
    return json.loads(json.dumps(kept, default=str))


def _refuse_mixture(options: CompareOptions) -> None:
    from snowmelt.run import is_run

    others = [source for source in options.sources if not is_run(Path(source))]
    raise UserError(
        f"{others[0]} is no run; name one folder or archive of pictures to train models on, or finished runs only."
    )


def _check_source(options: CompareOptions, out: Path) -> None:
    """Refuse pictures that are not there, where `out` does not have them yet, and options that come too late for
    prepared ones."""
    from snowmelt.data.prepared import is_prepared
    from snowmelt.data.source import is_builtin, source_kind
    from snowmelt.prepare import refuse_late

    if options.size is not None:
        _check_sizes(options, DataConfig(options.size, 3))
    source = options.sources[0]
    if not is_builtin(source) and not is_prepared(out / "data"):
        source_kind(Path(source))
    refuse_late(Path(source), options)


def _refuse_foreign(out: Path) -> None:
    """A folder that holds something else is left alone."""
    if out.is_file():
        raise UserError(f"{out} is a file; choose another folder with --out.")
    if not (out / PLAN).exists() and holds_else(out):
        raise UserError(f"{out} exists and is no comparison; choose another --out.")


def _alike(runs: list[Run]) -> list[Run]:
    """The runs, which can be compared.

    Raises:
        UserError: they were trained on other pictures, at other sizes, or are not finished.
    """
    for run in runs:
        state = run.status().get("state")
        if state != "finished":
            end = "wait for it" if state == "training" else f"finish it with `snowmelt train --resume {run.path}`"
            end = "import it with --pictures, and train it" if run.bare else end
            raise UserError(f"{run.path} is not finished ({state or 'never trained'}); {end}.")
    first = runs[0]
    for run in runs[1:]:
        if run.config.data.size != first.config.data.size or run.config.data.channels != first.config.data.channels:
            raise UserError(
                f"{run.path} draws pictures of {run.config.data.size} pixels and {first.path} of "
                f"{first.config.data.size}, or of other colours; compare runs with pictures of one kind."
            )
        if run.config.data.fingerprint != first.config.data.fingerprint:
            raise UserError(
                f"{run.path} and {first.path} were trained on different pictures; compare runs of the same dataset."
            )
    return runs


def _duel(options: CompareOptions, out: Path, ledger: Ledger, log: Log) -> tuple[list[Run], list[str]]:
    """The models, trained for equal times on the same pictures; and a sentence for each that failed."""
    from snowmelt.comparing.budget import shares
    from snowmelt.comparing.duel import train_models
    from snowmelt.evaluating.quality import see_real
    from snowmelt.training.signals import catch_signals

    with ledger.phase("pictures"):
        data = _pictures(options, out)
        _check_sizes(options, facts_of(data))
    if ledger.shares is None:
        with ledger.phase("encoder"):
            see_real(_spaces(options, data, log, timed=True), data)
        ledger.shares = shares(options.seconds, ledger.total, len(options.families))
        ledger.save()
    with catch_signals() as stop:
        return train_models(options, data.path, ledger, stop, log)


def _check_sizes(options: CompareOptions, data: DataConfig) -> None:
    """Refuse pictures of a size that one of the models cannot halve as often as it must."""
    for family in options.families:
        check_size(preset(data, family))


def _pictures(options: CompareOptions, out: Path) -> Prepared:
    """The prepared pictures that all the models share."""
    from snowmelt.data.prepared import is_prepared, open_prepared
    from snowmelt.prepare import PICTURE_OPTIONS, PrepareOptions, prepare

    source = Path(options.sources[0])
    if is_prepared(source):
        return open_prepared(source)
    if is_prepared(out / "data"):
        return open_prepared(out / "data")
    settings = {name: getattr(options, name) for name in (*PICTURE_OPTIONS, "seed")}
    return prepare(PrepareOptions(source=options.sources[0], out=out / "data", **settings), console())


def _spaces(options: CompareOptions, data: Prepared, log: Log, *, timed: bool) -> list[Space]:
    """The feature spaces that there is time for."""
    from snowmelt.comparing.budget import ENCODER_SHARE
    from snowmelt.evaluating.quality import spaces_of
    from snowmelt.evaluation.features import expected_seconds

    evaluate = _evaluate_options(options)
    if timed and expected_seconds(data, options.spaces, 0) > ENCODER_SHARE * options.seconds:
        log(NO_TIME)
        left = tuple(name for name in options.spaces if name != "trained") or ("random",)
        evaluate = dataclasses.replace(evaluate, spaces=left)
    return spaces_of(data, evaluate, log)


def _evaluate_options(options: CompareOptions) -> EvaluateOptions:
    names = ("samples", "spaces", "inception", "dinov2", "seed", "processes", "precision", "device")
    return EvaluateOptions(run=Path(), **{name: getattr(options, name) for name in names})


def _measured(options: CompareOptions, runs: list[Run], ledger: Ledger, log: Log, *, timed: bool) -> dict[str, Any]:
    """What compare.json holds."""
    from snowmelt.comparing.budget import STATES, samples_over_time, samples_within
    from snowmelt.comparing.entry import entry_of, folder_names, seconds_over_time, sheets_of
    from snowmelt.comparing.verdict import verdict
    from snowmelt.evaluating.draw import seconds_per_picture
    from snowmelt.evaluating.quality import order_of, seconds_of_measuring

    data = runs[0].open_pictures()
    with ledger.phase("encoder"):
        spaces = _spaces(options, data, log, timed=timed)
    evaluate = _evaluate_options(options)
    if timed and ledger.samples is None:
        with ledger.phase("measuring"):
            each = sum(seconds_per_picture(order_of(run, evaluate), options.processes) for run in runs)

        def cost(samples: int) -> float:
            early = samples_over_time(samples)
            measuring = seconds_of_measuring(data, spaces, samples, evaluate) + STATES * seconds_over_time(
                data, spaces, early
            )
            return each * (samples + STATES * early) + len(runs) * measuring

        ledger.samples = samples_within(options.seconds * AIM - ledger.total, cost, options.samples)
    evaluate = dataclasses.replace(evaluate, samples=ledger.samples or options.samples)
    entries: list[dict[str, Any]] = []
    names = folder_names([run.path.resolve() for run in runs])
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        with ledger.phase("measuring"):
            kept = ledger.path.parent / "measured" / f"{number}-{run.config.model}.json"
            entry = entry_of(run, evaluate, spaces, log, kept)
        sheet = (sheets_of(kept) / "samples.png").relative_to(ledger.path.parent)
        entries.append(entry | {"name": name, "sheet": sheet.as_posix()})
    about = runs[0].config.data
    return {
        "snowmelt": __version__,
        "source": ", ".join(options.sources),
        "seconds": options.seconds if timed else None,
        "elapsed": round(ledger.total, 1),
        "spent": {name: round(seconds, 1) for name, seconds in ledger.spent.items()},
        "seed": options.seed,
        "data": {
            "size": about.size,
            "channels": about.channels,
            "classes": list(about.classes),
            "train": len(data.train),
            "held_out": len(data.held_out),
            "fingerprint": about.fingerprint,
        },
        "runs": entries,
        "verdict": verdict(entries),
        "not_measured": _not_measured(entries, NO_TIME if timed and "trained" in options.spaces else ""),
    }


def _not_measured(entries: list[dict[str, Any]], untrained: str) -> list[str]:
    """Every reason why a number is missing, once.

    Args:
        untrained: why no trained encoder saw the pictures, where none did.
    """
    reasons = [figure["reason"] for entry in entries for figure in entry["quality"]["figures"] if figure["reason"]]
    told = [sentence for entry in entries for sentence in (*entry["quality"]["not_measured"], *entry["not_measured"])]
    missing = "" if any("trained" in entry["quality"]["spaces"] for entry in entries) else untrained
    return [sentence for sentence in dict.fromkeys([missing, *reasons, *told]) if sentence]


def _write(out: Path, found: dict[str, Any]) -> Path:
    """The report in all its forms; the page last."""
    from snowmelt.comparing.page import comparison_markdown, comparison_page, comparison_png

    for entry in found["runs"]:
        with suppress(ValueError):
            # Windows knows no way from one drive to another.
            entry["path"] = os.path.relpath(entry["path"], out.resolve())
    write_atomic(out / "compare.json", json.dumps(found, indent=1, ensure_ascii=False))
    write_atomic(out / "compare.png", comparison_png(out, found))
    write_atomic(out / "report.md", comparison_markdown(found))
    write_atomic(out / "report.html", comparison_page(out, found))
    return out / "report.html"
