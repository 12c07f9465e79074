"""ONNX: the denoiser (x, log_snr, labels) -> x0 in a form that runs without Python.

It asks the torch exporter for the graph, and so needs the packages of the extra `onnx`.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from snowmelt.diffusion.denoiser import Denoiser
from snowmelt.errors import UserError

MOST = 65536
"""Pictures in one batch."""


def export_denoiser(denoiser: Denoiser, path: Path, *, size: int, channels: int, classes: int) -> None:
    """Write the graph of a denoiser on the CPU; the number of pictures is free.

    Raises:
        UserError: the extra is not installed.
    """
    opset = _opset()
    x, log_snr = torch.randn(2, channels, size, size), torch.tensor([0.5, -3.0])
    inputs = (x, log_snr, torch.tensor([0, classes])) if classes else (x, log_snr)
    batch = torch.export.Dim("batch", max=MOST)

    def searchsorted(rising: Any, values: Any, *_: Any) -> Any:
        """How many of `rising` lie below each value; ONNX has no such operation."""
        place, last = opset.Constant(value_ints=[0]), opset.Constant(value_ints=[-1])
        below = opset.Less(opset.Unsqueeze(rising, place), opset.Unsqueeze(values, last))
        return opset.ReduceSum(opset.Cast(below, to=7), last, keepdims=0)

    denoiser.eval()
    with torch.no_grad(), _quietly():
        # Once as usual, so that tables are computed before the graph is made and stand in it as numbers.
        denoiser(*inputs)
        program = torch.onnx.export(
            denoiser,
            inputs,
            input_names=["x", "log_snr", "labels"][: len(inputs)],
            output_names=["x0"],
            dynamo=True,
            verbose=False,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            custom_translation_table={torch.ops.aten.searchsorted.Tensor: searchsorted},
        )
        assert program is not None
        program.save(path)


def _opset() -> Any:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from onnxscript import opset18
    except ImportError as error:
        raise UserError(
            f"ONNX needs a package more ({error.name}); add it with: pip install 'snowmelt[onnx]'"
        ) from error
    return opset18


@contextmanager
def _quietly() -> Generator[None]:
    """Keep the exporter's talk of its own parts from people."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
