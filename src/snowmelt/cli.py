"""The command line: one table from verb to function; the options of a verb are the fields of its dataclass."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

VERBS: dict[str, tuple[str, str, str]] = {
    # verb: (module, options dataclass, what it does); the function bears the verb's name, or that after a colon.
    # A verb of several kinds has a table of dataclasses, and the word after it picks one.
    "prepare": ("snowmelt.prepare", "PrepareOptions", "look through a folder, zip or tar of images and make it ready"),
    "train": (
        "snowmelt.train:train_or_plan",
        "TrainOptions",
        "train a generator on pictures, or continue an interrupted run",
    ),
    "sample": ("snowmelt.sample", "SampleOptions", "draw new pictures from a run"),
    "tune": ("snowmelt.tune", "TuneOptions", "find the levels at which few steps draw best with a run"),
    "import": ("snowmelt.exchange:import_run", "ImportOptions", "make a run of a network that diffusers saved"),
    "export": ("snowmelt.exchange:export_run", "ExportOptions", "write a run for diffusers, or as ONNX"),
    "explain": ("snowmelt.explain", "ExplainOptions", "show a photo turn to noise and, with a run, back"),
    "edit": ("snowmelt.edit", "EDITS", "change a picture: fill in, vary, interpolate, invert, enlarge, restore"),
    "evaluate": ("snowmelt.evaluate", "EvaluateOptions", "measure a run on pictures held out of its training"),
    "report": ("snowmelt.report", "ReportOptions", "show a run, at whatever stage, as one page that opens offline"),
    "compare": (
        "snowmelt.compare",
        "CompareOptions",
        "train VAE, GAN and diffusion for the same time, or compare finished runs",
    ),
}

COMPUTE = ("train", "sample", "tune", "edit", "explain", "evaluate", "compare")
"""Verbs for whose networks a compiler can begin before torch is imported."""
DRAW = ("sample", "tune")
"""Those of them whose networks compute answers alone, in nothing but what pictures are drawn in."""

USAGE = """Snowmelt turns a folder of images into a generator.

usage: snowmelt VERB ...      (snowmelt VERB --help explains a verb)

{verbs}

first steps:
  snowmelt train my-pictures/ --for 20m --out runs/mine
  snowmelt sample runs/mine --grid
"""


def main() -> None:
    """Run the command line of this process and exit: 0 done, 2 a mistake told in a sentence, 128 + n signal n."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`): nothing is left to say, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line, without the program's name, and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(USAGE.format(verbs="\n".join(f"  {verb:{width}}  {about}" for verb, (_, _, about) in VERBS.items())))
        return 0
    if arguments[0] in ("-V", "--version"):
        from snowmelt import __version__

        print(f"snowmelt {__version__}")
        return 0
    _calm_threads()
    from snowmelt.errors import NO_MEMORY, Stopped, UserError, out_of_memory

    try:
        return _call(arguments[0], arguments[1:])
    except UserError as error:
        print(f"snowmelt: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    except BrokenPipeError:
        raise
    except OSError as error:
        print(
            f"snowmelt: {error.filename or 'A file'}: {error.strerror or error}; mend that and try again.",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"snowmelt: {NO_MEMORY}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("snowmelt: interrupted", file=sys.stderr)
        return 130


def _calm_threads() -> None:
    """Have waiting OpenMP threads spin for a moment only; this must be set before torch is imported.

    Spinning without end makes every step many times slower as soon as another process is busy; not spinning at all
    makes them a fifth slower on a quiet machine (112 against 140 images/s, 2 cores).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _call(verb: str, arguments: list[str]) -> int:
    import tyro

    from snowmelt.errors import UserError, choose, nearest

    home, options_name, _ = choose(VERBS, verb, "verb")
    module_name, _, function_name = home.partition(":")
    module = importlib.import_module(module_name)
    kind: Any = getattr(module, options_name)
    words = f"snowmelt {verb}"
    if isinstance(kind, dict):
        kind, words, arguments = _kind_of(verb, kind, arguments)
    options, unknown = tyro.cli(kind, prog=words, args=arguments, return_unknown_args=True)
    if unknown:
        raise UserError(f"{words} has no option {unknown[0]!r}; {nearest(unknown[0], _option_names(kind))}.")
    if verb in COMPUTE:
        from snowmelt.networks import kernels

        draws = verb in DRAW
        kernels.begin(kernels.BF16 if draws and _draws_in_bf16(options) else (), gradients=not draws)
    getattr(module, function_name or verb)(options)
    return 0


def _draws_in_bf16(options: Any) -> bool:
    """Whether this run draws in bfloat16 on a processor, seen without torch; what is wrong with it, its verb says."""
    from snowmelt.config import read_config
    from snowmelt.errors import UserError
    from snowmelt.networks.kernels import drawn_in

    try:
        trained = read_config(options.run / "config.toml").training.precision
    except UserError:
        return False
    return drawn_in(options.precision, trained) == "bf16"


def _kind_of(verb: str, kinds: dict[str, Any], arguments: list[str]) -> tuple[Any, str, list[str]]:
    """The options of the kind named first, how it is called, and what comes after."""
    from snowmelt.errors import UserError, choose

    if not arguments:
        raise UserError(f"snowmelt {verb} needs to know which kind; choose one of: {', '.join(kinds)}.")
    if arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, kinds))
        lines = [f"  {name:{width}}  {kind.__doc__.splitlines()[0]}" for name, kind in kinds.items()]
        print(
            f"usage: snowmelt {verb} KIND ...      (snowmelt {verb} KIND --help explains a kind)\n\n" + "\n".join(lines)
        )
        raise SystemExit(0)
    return choose(kinds, arguments[0], f"kind of {verb}"), f"snowmelt {verb} {arguments[0]}", arguments[1:]


def _option_names(kind: Any) -> list[str]:
    import dataclasses

    from snowmelt.errors import option_of

    return [option_of(field.name) for field in dataclasses.fields(kind) if "Positional" not in str(field.type)]
