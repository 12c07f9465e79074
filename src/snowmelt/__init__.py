"""Snowmelt turns a folder of images into a generator: the verbs and the parts, by their public names.

Names are imported when they are first used, so that importing Snowmelt costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "snowmelt.errors": ("UserError",),
    "snowmelt.prepare": ("PrepareOptions", "prepare"),
    "snowmelt.train": ("TrainOptions", "train"),
    "snowmelt.sample": ("SampleOptions", "sample"),
    "snowmelt.tune": ("TuneOptions", "tune"),
    "snowmelt.explain": ("ExplainOptions", "explain"),
    "snowmelt.edit": ("EDITS", "edit"),
    "snowmelt.edits.options": (
        "EnlargeOptions",
        "InpaintOptions",
        "InterpolateOptions",
        "InvertOptions",
        "RestoreOptions",
        "VaryOptions",
    ),
    "snowmelt.evaluate": ("EvaluateOptions", "evaluate"),
    "snowmelt.compare": ("CompareOptions", "compare"),
    "snowmelt.report": ("ReportOptions", "report"),
    "snowmelt.exchange": ("ImportOptions", "import_run", "ExportOptions", "export_run"),
    "snowmelt.run": ("Run",),
    "snowmelt.config": ("Config", "DataConfig", "DiffusionConfig", "TrainingConfig", "UNetConfig"),
    "snowmelt.data.prepared": ("Prepared", "open_prepared"),
    "snowmelt.diffusion.noise": ("add_noise", "alpha_sigma"),
    "snowmelt.diffusion.schedules": ("SCHEDULES",),
    "snowmelt.diffusion.grids": ("GRIDS", "time_grid"),
    "snowmelt.diffusion.denoiser": ("Denoiser", "PREDICTS"),
    "snowmelt.diffusion.linear": ("LinearEstimate",),
    "snowmelt.diffusion.loss": ("WEIGHTS", "denoising_loss"),
    "snowmelt.diffusion.samplers": ("SAMPLERS", "Multistep", "ancestral", "multistep"),
    "snowmelt.diffusion.walk": ("Step", "walk"),
    "snowmelt.diffusion.guidance": (
        "GUIDANCES",
        "THRESHOLDS",
        "autoguided",
        "clamped",
        "classifier",
        "classifier_free",
        "dynamic",
        "once",
        "projected",
        "rescaled",
        "within",
    ),
    "snowmelt.diffusion.editing": ("FILLS", "cut", "inpainted", "inversion", "observed", "psnr", "slerp"),
    "snowmelt.networks.unet": ("UNet",),
    "snowmelt.seeds": ("noise_source",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'snowmelt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    # A verb's module bears the same name as its function: the function wins.
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps a verb's function under its name when its module, which bears the same name, is imported later."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_verb = isinstance(value, ModuleType) and name in _HOME_OF
        super().__setattr__(name, getattr(value, name) if is_verb else value)


sys.modules[__name__].__class__ = _Package
