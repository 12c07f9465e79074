"""Which classes generated pictures are of, as the encoder of the folder recognises them.

A picture counts as recognised where the encoder is sure of a class. That and the balance of the classes are given
beside the same shares of real pictures, since no encoder is sure of all of those. An encoder that is often wrong about
held-out pictures can say nothing, and a reason takes the place of the numbers.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snowmelt.data.prepared import Prepared
from snowmelt.evaluation.encoder import said_of, trained
from snowmelt.evaluation.nearest import Rows
from snowmelt.evaluation.shares import Share, wilson
from snowmelt.terminal import console

SURE = 0.8
"""The probability from which a picture counts as recognised."""
RIGHT = 0.4
"""Held-out pictures, as a share, that an encoder must name rightly to be asked. What it says of drawn pictures stands
beside what it says of real ones, so a weak one is fair to all models alike, but a blind one says nothing."""
FEWEST = 50
"""Held-out pictures that it must have been asked about."""


def class_probabilities(data: Prepared, pixels: np.ndarray | Rows, *, device: torch.device | None = None) -> Tensor:
    """The probabilities of the classes of `data`, (n, classes), of uint8 pictures (n, height, width, channels)."""
    assert data.classes, "the pictures have classes"
    learned = trained(data, device=device or torch.device("cpu"), log=console().print)
    return said_of(learned.encoder, pixels)[1].exp()


def recognised(
    data: Prepared,
    rows: np.ndarray,
    pixels: np.ndarray,
    labels: np.ndarray | Tensor | None,
    *,
    device: torch.device | None = None,
) -> dict[str, Any] | None:
    """The `classes` of a figures.json; None where the pictures have no classes.

    Args:
        rows: real pictures to compare with; of them the held-out ones are used, which the encoder has not seen.
        pixels: generated pictures, uint8 (n, height, width, channels).
        labels: the classes they were asked to be of; None where nothing was asked for.
    """
    if data.labels is None or len(data.classes) < 2:
        return None
    real = np.intersect1d(rows, data.held_out)
    real = real if len(real) >= FEWEST else data.held_out
    if len(real) < FEWEST:
        return _without(f"only {len(real)} pictures are held out of training; {FEWEST} are needed to trust the encoder")
    true = class_probabilities(data, Rows(data.images, real), device=device)
    right = wilson(int((true.argmax(1).numpy() == data.labels[real]).sum()), len(real))
    if right.share < RIGHT:
        return _without(
            f"the encoder names only {right.share:.0%} of held-out pictures rightly; {RIGHT:.0%} are needed", right
        )
    made = class_probabilities(data, pixels, device=device)
    return _shares(data.classes, made, true, labels) | {"held_out_right": list(astuple(right)), "reason": ""}


def _shares(classes: tuple[str, ...], made: Tensor, true: Tensor, labels: np.ndarray | Tensor | None) -> dict[str, Any]:
    balance, balance_real = _balance(made), _balance(true)
    return {
        "recognised": list(astuple(_sure(made))),
        "recognised_real": list(astuple(_sure(true))),
        "as_asked": None if labels is None else list(astuple(_as_asked(made, labels))),
        "balance": dict(zip(classes, balance.tolist(), strict=True)),
        "balance_real": dict(zip(classes, balance_real.tolist(), strict=True)),
        "distance": float((balance - balance_real).abs().sum() / 2),
    }


def _sure(probabilities: Tensor) -> Share:
    return wilson(int((probabilities.max(dim=1).values >= SURE).sum()), len(probabilities))


def _as_asked(probabilities: Tensor, labels: np.ndarray | Tensor) -> Share:
    wanted = torch.as_tensor(labels).cpu()
    return wilson(int((probabilities.argmax(dim=1) == wanted).sum()), len(wanted))


def _balance(probabilities: Tensor) -> Tensor:
    """The share of each class among the pictures, each counted for its likeliest."""
    return torch.bincount(probabilities.argmax(dim=1), minlength=probabilities.shape[1]).double() / len(probabilities)


def _without(reason: str, right: Share | None = None) -> dict[str, Any]:
    names = ("recognised", "recognised_real", "as_asked", "balance", "balance_real", "distance")
    return dict.fromkeys(names) | {"held_out_right": None if right is None else list(astuple(right)), "reason": reason}
