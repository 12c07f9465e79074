"""Feature spaces: what sees the pictures, so that distances between them mean something.

    trained      an encoder trained on the folder itself (`encoder.py`): content and damage; no download
    random       convolutions that nobody trained: texture and colour; no training either
    inception    Inception-v3 of the usual FID: comparable with what others publish
    dinov2       DINOv2's vision transformer: closest to what people see

A space turns uint8 pictures into float32 vectors on the CPU. Features of real pictures are kept in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from snowmelt.data.pixels import to_images
from snowmelt.data.prepared import Prepared, spread_rows
from snowmelt.data.workers import cores
from snowmelt.errors import UserError, choose
from snowmelt.evaluation.cache import Published, cache_folder, digest_of, fetched, is_kept, kept, key_of, rows_key
from snowmelt.evaluation.encoder import (
    STANDARD_PICTURES,
    Standard,
    encoder_path,
    said_of,
    shrunk,
    standard_of,
    trained,
    training_seconds,
)
from snowmelt.evaluation.nearest import Rows, parts_of
from snowmelt.evaluation.weights import read_weights, sha256_of
from snowmelt.networks.encoder import RandomEncoder
from snowmelt.networks.inception import Inception
from snowmelt.networks.vit import VisionTransformer, extents_of
from snowmelt.seeds import generator
from snowmelt.shapes import Features, Images

INCEPTION = Published(
    name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size=100_000_000,
    option="--inception",
)
"""The weights of the usual FID; about 91 MiB."""
RANDOM_VERSION = 1
"""Raised when the code changes what the random convolutions see."""


@dataclass(frozen=True)
class Space:
    """What turns pictures into vectors between which distances are measured."""

    name: str
    about: str
    """One line for people."""
    identity: str
    """A digest of weights and settings: features of different identities must not be compared."""
    dimension: int
    features: Callable[[np.ndarray], Tensor]
    """uint8 (n, height, width, channels) to float32 (n, dimension), on the CPU."""


@dataclass(frozen=True)
class Sources:
    """Where spaces come from."""

    data: Prepared
    inception: Path | None
    dinov2: Path | None
    device: torch.device
    log: Callable[[str], object]


def open_spaces(
    data: Prepared,
    names: Sequence[str],
    *,
    inception: Path | None = None,
    dinov2: Path | None = None,
    device: torch.device,
    log: Callable[[str], object],
) -> list[Space]:
    """The spaces of these names, in their order; an encoder that has to be trained is trained now.

    Raises:
        UserError: an unknown name, or weights that are missing or wrong; before anything is trained.
    """
    sources = Sources(data, inception, dinov2, device, log)
    makers = {name: choose(SPACES, name, "feature space") for name in names}
    # Those that may be missing first, so that nobody waits for an encoder and is refused then.
    order = sorted(makers, key=lambda name: name in ("trained", "random"))
    spaces = {name: makers[name](sources) for name in order}
    return [spaces[name] for name in names]


def real_features(space: Space, data: Prepared, rows: np.ndarray) -> Features:
    """Features of pictures of `data`, (len(rows), dimension); measured once, in parts, and kept in the cache."""
    facts = {"fingerprint": data.fingerprint, "space": space.identity, "rows": rows_key(rows)}
    path = cache_folder("features") / f"{key_of(facts)}.safetensors"
    parts = parts_of(Rows(data.images, rows))
    found = kept(path, lambda: {"features": torch.cat([space.features(part) for part in parts])})
    return found["features"]


SECONDS = {"trained": 0.0012, "random": 0.0012, "inception": 0.35, "dinov2": 0.5}
"""Seconds for a picture on one processor core, of 32 x 32 for the first two; dinov2 stands for its smallest size."""


def expected_seconds(data: Prepared, names: Sequence[str], pictures: int) -> float:
    """About how long it takes on this machine's processor to see so many pictures, training of an encoder included."""
    waiting = 0.0
    if "trained" in names and not is_kept(encoder_path(data)):
        waiting = training_seconds(data, cores())
    area = (min(data.size, 64) / 32) ** 2
    each = sum(SECONDS[name] * (area if name in ("trained", "random") else 1.0) for name in names)
    return waiting + pictures * each / min(cores(), 4)


def random_space(channels: int, standard: Standard | None = None) -> Space:
    """Random convolutions for pictures of 1 or 3 channels; needs no data, which only `standard` comes from."""
    encoder = RandomEncoder(channels, generator(0, "random features", channels)).eval()
    tensors = {**encoder.state_dict(), "version": torch.tensor(RANDOM_VERSION)}
    identity = digest_of(tensors if standard is None else {**tensors, "mean": standard.mean, "std": standard.std})

    def features(pixels: np.ndarray) -> Tensor:
        found = in_batches(pixels, lambda images: encoder(shrunk(images)), batch=250)
        return found if standard is None else standard(found)

    return Space("random", "random convolutions, which nobody trained", identity, encoder.dimension, features)


def in_batches(
    pixels: np.ndarray, network: Callable[[Images], Tensor], *, batch: int, device: torch.device | None = None
) -> Features:
    """The network's answers to uint8 pictures (n, height, width, channels), on the CPU."""
    found = list[Tensor]()
    with torch.no_grad():
        for part in parts_of(pixels, batch):
            images = to_images(torch.from_numpy(np.array(part)).to(device or "cpu"))
            found.append(network(images).float().cpu())
    return torch.cat(found)


def _trained(sources: Sources) -> Space:
    learned = trained(sources.data, device=sources.device, log=sources.log, cores=cores())

    def features(pixels: np.ndarray) -> Tensor:
        return learned.standard(said_of(learned.encoder, pixels)[0])

    about = "an encoder trained on the training pictures of this folder"
    return Space("trained", about, learned.identity, learned.encoder.dimension, features)


def _random(sources: Sources) -> Space:
    data = sources.data
    rows = spread_rows(data.train, STANDARD_PICTURES // 4)
    found = real_features(random_space(data.channels), data, rows)
    return random_space(data.channels, standard_of(found))


def _inception(sources: Sources) -> Space:
    path = sources.inception
    if path is None:
        sources.log(f"Looking for {INCEPTION.name} in the cache, and on the network where it is not there.")
        path = fetched(INCEPTION)
    network = Inception()
    identity = _load(network, path, "Inception-v3", "--inception")
    what = "of" if identity == INCEPTION.sha256 else "with other weights than those of"
    return _published("inception", f"Inception-v3 {what} the usual FID", identity, network, sources.device)


def _dinov2(sources: Sources) -> Space:
    if sources.dinov2 is None:
        raise UserError(
            "The space dinov2 needs its weights (dinov2_vits14_pretrain.pth); give their path with --dinov2."
        )
    weights = read_weights(sources.dinov2)
    try:
        network = VisionTransformer(extents_of({name: tuple(tensor.shape) for name, tensor in weights.items()}))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{sources.dinov2} holds no weights of DINOv2; give their path with --dinov2.") from error
    identity = _load(network, sources.dinov2, "DINOv2", "--dinov2", weights)
    return _published("dinov2", "DINOv2's vision transformer, class token", identity, network, sources.device)


def _load(network: nn.Module, path: Path, what: str, option: str, weights: dict[str, Tensor] | None = None) -> str:
    """Fill the network from the file; the file's digest."""
    digest = sha256_of(path)
    if path.name == INCEPTION.name and digest != INCEPTION.sha256:
        raise UserError(
            f"{path} has the name of the usual weights and another SHA-256 (theirs begins with "
            f"{INCEPTION.sha256[:8]}); fetch it again, or rename it where other weights are meant."
        )
    try:
        network.load_state_dict(read_weights(path) if weights is None else weights)
    except RuntimeError as error:
        raise UserError(f"{path} holds no weights of {what}; give their path with {option}.") from error
    return digest


def _published(name: str, about: str, identity: str, network: nn.Module, device: torch.device) -> Space:
    network.to(device).eval().requires_grad_(False)

    def features(pixels: np.ndarray) -> Tensor:
        return in_batches(pixels, network, batch=32, device=device)

    dimension = network.dimension
    assert isinstance(dimension, int)
    settings = hashlib.sha256(f"{name} 1 {identity}".encode()).hexdigest()
    return Space(name, about, settings, dimension, features)


SPACES: dict[str, Callable[[Sources], Space]] = {
    "trained": _trained,
    "random": _random,
    "inception": _inception,
    "dinov2": _dinov2,
}
"""By name: how a space is opened."""
