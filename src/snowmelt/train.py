"""`snowmelt train`: a folder of images (or a prepared dataset) becomes a run that anybody can draw from."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from snowmelt.config import Config, DataConfig
from snowmelt.errors import UserError, option_of, options_given
from snowmelt.files import holds_else, make_folder
from snowmelt.late import import_torch
from snowmelt.presets import check_length, check_seconds, check_size, facts_of
from snowmelt.tables import to_tables
from snowmelt.terminal import Log, console, words_of
from snowmelt.training.options import PROCESS_OPTIONS, TrainOptions, overrides_of, request_of, resolve

if TYPE_CHECKING:
    from rich.console import Console

    from snowmelt.data.prepared import Prepared
    from snowmelt.run import Run


def train_or_plan(options: TrainOptions) -> None:
    """The verb: `plan` with --plan, else `train`."""
    (plan if options.plan else train)(options)


def plan(options: TrainOptions) -> None:
    """Say what `train` would do with these pictures on this machine, and leave nothing behind.

    Raises:
        UserError: for every mistake in the options.
    """
    from rich.console import Console

    _check(options)
    _check_source(_path(options), options)
    import_torch()
    from snowmelt.training.forecast import plan_table
    from snowmelt.training.signals import stopping

    overrides, say = _refuse_early(options), console()
    out = _path(options).absolute()
    beside = next(parent for parent in out.parents if parent.is_dir())
    with stopping("Nothing was planned."), TemporaryDirectory(prefix=".plan-", dir=beside) as folder:
        log = Log(say, Path(folder) / "log.txt")
        say.print(plan_table(*_settled(Path(folder), options, overrides, log, Console(quiet=True))))


def train(options: TrainOptions) -> Run:
    """Prepare the pictures where needed, train, and return the finished run.

    Raises:
        UserError: for every mistake in the options, before anything is written.
        Stopped: on Ctrl-C or SIGTERM, after saving.
    """
    started = time.monotonic()
    _check(options)
    if options.plan:
        raise UserError("A plan trains nothing; leave `plan` away, or call `plan` of the module `snowmelt.train`.")
    path = _path(options)
    _check_source(path, options)
    # From here on torch is needed; numbers that are no good, and a missing source, have been refused without it.
    import_torch()
    run = _existing(path, options)
    say = console()
    if run is not None and run.status().get("state") == "finished":
        say.print(f"{path} is finished; draw from it with `snowmelt sample {path}`.", markup=False)
        return run
    overrides = _refuse_early(options) if run is None else {}
    from snowmelt.run import lock
    from snowmelt.training.session import Here, train_run

    with make_folder(path, begun="config.toml"), lock(path):
        log = Log(say, path / "log.txt")
        run = _existing(path, options) or _new(path, options, overrides, log)
        report = train_run(run, Here(options.device, options.workers, options.save_every), log, started)
    log(f"Wrote {report}")
    log(f"Finished in {words_of(time.monotonic() - started)}. Draw more with: snowmelt sample {run.path}")
    return run


def _check(options: TrainOptions) -> None:
    if options.resume is not None:
        kept = {*PROCESS_OPTIONS, "source"} - {"plan"}
        named = options_given(options, vars(options).keys() - kept)
        if options.source is not None or options.out is not None or named:
            names = named or "the source and --out"
            raise UserError(f"--resume RUN continues a run as it was started; leave {names} away.")
    elif options.source is None:
        raise UserError("Name a folder of images to train on, or continue a run with --resume RUN.")
    check_length(options.steps, options.duration)
    for name, least, most in (("batch", 1, 65536), ("workers", 0, 64), ("save_every", 0, math.inf)):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{option_of(name)} is {value}; give {least} to {most}.")


def _check_source(path: Path, options: TrainOptions) -> None:
    """Refuse a source that is not there before anybody waits for torch; a run that has begun needs it no longer."""
    from snowmelt.data.source import is_builtin, source_kind

    if options.source is not None and not is_builtin(options.source) and not (path / "config.toml").exists():
        source_kind(Path(options.source))


def _path(options: TrainOptions) -> Path:
    """Of the run."""
    from snowmelt.data.source import name_of

    return Path(options.resume or options.out or Path("runs") / name_of(str(options.source)))


def _existing(path: Path, options: TrainOptions) -> Run | None:
    """The run to continue, or None when there is none yet.

    Raises:
        UserError: `path` holds something else, or a run that was started with other options.
    """
    from snowmelt.run import Run, is_run

    if options.resume is not None:
        return Run.open(path)
    if is_run(path):
        run = Run.open(path)
        asked, before = to_tables(request_of(options)), run.config.request
        changed = sorted(name for name in asked.keys() | before.keys() if asked.get(name) != before.get(name))
        if changed:
            raise UserError(
                f"{path} was started with other options ({', '.join(map(option_of, changed))}); continue it with "
                f"`snowmelt train --resume {path}`, or choose another --out."
            )
        return run
    if path.is_file():
        raise UserError(f"{path} is a file; name a folder for the run with --out.")
    if holds_else(path):
        raise UserError(f"{path} exists and is not a run; choose another --out.")
    return None


def _refuse_early(options: TrainOptions) -> dict[str, dict[str, Any]]:
    """Refuse all that can be refused before the first byte is written; the person's settings, as tables."""
    from snowmelt.prepare import refuse_late

    overrides = overrides_of(options)
    trial = resolve(DataConfig(options.size or 32, 3), options, overrides)
    check_seconds(trial.training.seconds, "[training] seconds =")
    if options.size is not None:
        check_size(trial)
    refuse_late(Path(str(options.source)), options)
    from snowmelt.device import make_precision, pick_device
    from snowmelt.models import check_names

    check_names(trial)
    device = pick_device(options.device)
    if "precision" in overrides["training"]:
        make_precision(device, overrides["training"]["precision"])
    return overrides


def _new(path: Path, options: TrainOptions, overrides: dict[str, dict[str, Any]], log: Log) -> Run:
    """Prepare the pictures and write a fully resolved run."""
    from snowmelt.run import Run
    from snowmelt.training.forecast import updates_of

    config, speed, spent = _settled(path, options, overrides, log, console())
    log(f"Updates: {updates_of(config, speed, spent)}.")
    return Run.create(path, config)


def _settled(
    path: Path, options: TrainOptions, overrides: dict[str, dict[str, Any]], log: Log, say: Console
) -> tuple[Config, float | None, float]:
    """The configuration, settled by the pictures, which are prepared in `path` where needed, and by the machine; how
    many images a second it trains, where that was measured; and the seconds that preparing took.

    Args:
        say: is told how the pictures are prepared.
    """
    from snowmelt.data.prepared import is_prepared, open_prepared
    from snowmelt.device import pick_device
    from snowmelt.training.fitting import fitted

    source = Path(str(options.source))
    seed = overrides["training"].get("seed", 0)
    own, begin, spent = path / "data", time.monotonic(), 0.0
    if not is_prepared(source):
        data = _prepare(own, options, seed, say)
        spent = time.monotonic() - begin
    else:
        data = open_prepared(source)
        if own.exists() and not (is_prepared(own) and open_prepared(own).fingerprint == data.fingerprint):
            # Left by a call that was interrupted; the run would take them for its own.
            raise UserError(f"{own} holds other pictures than {source}; delete it, or choose another --out.")
    choice = partial(resolve, facts_of(data), options, overrides)
    check_size(choice())
    given = overrides["training"]
    return *fitted(choice, data, pick_device(options.device), given=given, log=log, spent=spent), spent


def _prepare(out: Path, options: TrainOptions, seed: int, say: Console) -> Prepared:
    from snowmelt.prepare import PICTURE_OPTIONS, PrepareOptions, prepare

    settings = {name: getattr(options, name) for name in PICTURE_OPTIONS}
    return prepare(PrepareOptions(source=str(options.source), out=out, seed=seed, **settings), say)
