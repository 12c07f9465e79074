"""The "scheduler" of `diffusers`, as far as a network is trained by it: its table of betas and what is predicted.

How pictures are drawn (steps, clipping, spacing) is chosen here when drawing, so those settings are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from snowmelt.config import DiffusionConfig
from snowmelt.diffusion.process import (
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_terminal_snr,
)
from snowmelt.diffusion.schedules import table
from snowmelt.errors import UserError, nearest

PREDICTIONS = {"epsilon": "noise", "sample": "image", "v_prediction": "v"}
TABLES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": lambda steps, _first, _last: cosine_betas(steps),
    "sigmoid": sigmoid_betas,
}
KINDS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""Those that draw from a network trained on a table of betas."""
MOST_STEPS = 100_000


def diffusion_of(settings: Mapping[str, Any], where: Path, *, learns_variance: bool) -> DiffusionConfig:
    """What the network has learnt, by a scheduler_config.json.

    Raises:
        UserError: something that is not known here; the sentence names the setting and `where`.
    """
    kind = settings.get("_class_name")
    if kind not in KINDS:
        raise UserError(f"{where} is of a {kind}, which has no table of betas; {nearest(str(kind), KINDS)}.")
    # What the first versions had in its place.
    older = "sample" if settings.get("predict_epsilon") is False else "epsilon"
    prediction = settings.get("prediction_type", older)
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise UserError(f"{where} has prediction_type = {prediction!r}; {nearest(str(prediction), PREDICTIONS)}.")
    if learns_variance != (settings.get("variance_type") == "learned_range"):
        raise UserError(
            f"{where} has variance_type = {settings.get('variance_type')!r} for a network with "
            f"{'twice' if learns_variance else 'only'} the channels of a picture; learned_range belongs to twice, and "
            "nothing else does."
        )
    betas = _betas(settings, where)
    if prediction == "epsilon" and betas[-1] == 1:
        raise UserError(
            f"{where} ends without anything of the picture (rescale_betas_zero_snr), where the noise says nothing of "
            "it; only networks with prediction_type sample or v_prediction can be imported with such a table."
        )
    # Schedules there are computed in float32.
    ours = len(betas) == 1000 and torch.allclose(betas, linear_betas(), rtol=1e-6, atol=0)
    values = () if ours else tuple(cast(list[float], betas.tolist()))
    if values:
        table(values)
    return DiffusionConfig(
        schedule="linear",
        predicts=PREDICTIONS[prediction],
        betas=values,
        variance="learned" if learns_variance else "fixed",
    )


def _betas(settings: Mapping[str, Any], where: Path) -> Tensor:
    steps, given = settings.get("num_train_timesteps", 1000), cast(Any, settings.get("trained_betas"))
    if type(steps) is not int or not 2 <= steps <= MOST_STEPS:
        raise UserError(f"{where} has num_train_timesteps = {steps!r}; give a whole number from 2 to {MOST_STEPS:,}.")
    if given is not None:
        if not isinstance(given, list) or len(cast(list[Any], given)) != steps or not all(map(_is_beta, given)):
            raise UserError(
                f"{where} has trained_betas that are not {steps} numbers between 0 and 1, one for each step."
            )
        betas = torch.tensor(given, dtype=torch.float64)
    else:
        name = settings.get("beta_schedule", "linear")
        if not isinstance(name, str) or name not in TABLES:
            raise UserError(f"{where} has beta_schedule = {name!r}; {nearest(str(name), TABLES)}.")
        ends = settings.get("beta_start", 1e-4), settings.get("beta_end", 0.02)
        if not all(map(_is_beta, ends)):
            raise UserError(f"{where} has betas from {ends[0]!r} to {ends[1]!r}; give numbers between 0 and 1.")
        betas = TABLES[name](steps, *ends)
    return zero_terminal_snr(betas) if settings.get("rescale_betas_zero_snr") is True else betas


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def scheduler_of(diffusion: DiffusionConfig) -> dict[str, Any]:
    """The settings of a `DDPMScheduler` for a network; its table is the one whose steps the network is told.

    Raises:
        UserError: it predicts something that `diffusers` does not know.
    """
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if diffusion.predicts not in names:
        raise UserError(
            f"diffusers knows no network that predicts {diffusion.predicts!r}, whose input or answer is scaled anew at "
            "every level; train with --predicts v to export there, or export with --format onnx."
        )
    if diffusion.linear:
        raise UserError(
            "diffusers knows no network that is shown a linear estimate; train with --predicts v and without "
            "diffusion.linear to export there, or export with --format onnx."
        )
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(diffusion.betas) or 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "trained_betas": list(diffusion.betas) or None,
        "prediction_type": names[diffusion.predicts],
        "variance_type": "learned_range" if diffusion.variance == "learned" else "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "rescale_betas_zero_snr": False,
        # From the last step of the table on, also when only some are visited; "leading" would leave noise out.
        "timestep_spacing": "trailing",
    }
