"""Guidance: functions from denoise functions to denoise functions.

    guided x0 = x0_without + scale (x0_with - x0_without),     scale 1 = none, 0 = without the class

(Ho & Salimans 2022, arXiv:2207.12598, written so that the weight w of the paper is scale - 1.)
"""

from __future__ import annotations

from torch import Tensor

from snowmelt.diffusion.denoiser import Denoise
from snowmelt.shapes import Images


def classifier_free(with_class: Denoise, without_class: Denoise, scale: float) -> Denoise:
    """Push the estimate away from the one made without the class; a scale of 1 costs one evaluation, not two."""
    if scale == 1:
        return with_class

    def denoise(x: Images, log_snr: Tensor) -> Images:
        return without_class(x, log_snr).lerp(with_class(x, log_snr), scale)

    return denoise


def clamped(denoise: Denoise) -> Denoise:
    """Keep the estimate of the clean image within [-1, 1], where pictures are."""
    return lambda x, log_snr: denoise(x, log_snr).clamp(-1, 1)
