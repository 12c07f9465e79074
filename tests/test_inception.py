"""Inception-v3, DINOv2 and the reader of their files, against direct readings of the definitions on random weights."""

from __future__ import annotations

import collections
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from conftest import stirred
from snowmelt.data.pixels import to_images
from snowmelt.errors import UserError
from snowmelt.evaluation import cache
from snowmelt.evaluation.features import open_spaces
from snowmelt.evaluation.weights import read_weights
from snowmelt.networks import inception as network_module
from snowmelt.networks.inception import Inception
from snowmelt.networks.vit import Extents, VisionTransformer, extents_of, positions
from test_encoder import CPU, dataset

TINY = Extents(width=128, depth=2, heads=2, patch=14, places=5, hidden=256)


@pytest.fixture(scope="module")
def inception() -> Inception:
    """Random weights at which the answers neither vanish nor explode, and running moments that are not 0 and 1."""
    torch.manual_seed(0)
    network = Inception().eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, math.sqrt(2 / tensor[0].numel()))
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bn.bias")):
            tensor.normal_(0, 0.1)
    return network


# Inception-v3 read directly: what each block joins, as lists of convolutions (name, padding) from its input.

PLAIN = ("", 0)
A = [[("branch1x1", 0)], [("branch5x5_1", 0), ("branch5x5_2", 2)]]
A += [[("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1)]]
C = [[("branch1x1", 0)], [("branch7x7_1", 0), ("branch7x7_2", (0, 3)), ("branch7x7_3", (3, 0))]]
C += [[("branch7x7dbl_1", 0), *((f"branch7x7dbl_{n}", (3, 0) if n % 2 == 0 else (0, 3)) for n in (2, 3, 4, 5))]]
E = [[("branch1x1", 0)]]
E += [[("branch3x3_1", 0), (f"branch3x3_2{side}", pad)] for side, pad in (("a", (0, 1)), ("b", (1, 0)))]
TWICE = [("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1)]
E += [[*TWICE, (f"branch3x3dbl_3{side}", pad)] for side, pad in (("a", (0, 1)), ("b", (1, 0)))]


def oracle(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The pool3 features of pictures in [-1, 1] as large as they are."""

    def conv(x, name, padding=0, stride=1):
        x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
        moments = (w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *moments, eps=1e-3))

    def mean_pool(x):
        """Sums over the places that exist, divided by how many those are."""
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3)
        total = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
        return total / F.conv2d(ones, kernel, padding=1)

    def block(x, name, paths, pool):
        found = []
        for path in paths:
            y = x
            for part, padding in path:
                y = conv(y, f"{name}.{part}", padding)
            found.append(y)
        return torch.cat([*found, conv(pool(x), f"{name}.branch_pool")], 1)

    x = conv(conv(conv(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = block(x, name, A, mean_pool)
    y = conv(conv(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2", 1)
    y = conv(y, "Mixed_6a.branch3x3dbl_3", stride=2)
    x = torch.cat([conv(x, "Mixed_6a.branch3x3", stride=2), y, F.max_pool2d(x, 3, 2)], 1)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = block(x, name, C, mean_pool)
    three = conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", stride=2)
    y = conv(conv(x, "Mixed_7a.branch7x7x3_1"), "Mixed_7a.branch7x7x3_2", (0, 3))
    y = conv(conv(y, "Mixed_7a.branch7x7x3_3", (3, 0)), "Mixed_7a.branch7x7x3_4", stride=2)
    x = torch.cat([three, y, F.max_pool2d(x, 3, 2)], 1)
    x = block(x, "Mixed_7b", E, mean_pool)
    x = block(x, "Mixed_7c", E, lambda x: F.max_pool2d(F.pad(x, (1,) * 4, value=-math.inf), 3, 1))
    return x.mean((2, 3))


SMALL = 107
"""Pixels: every block has still edges and, but for the last two, an inside, at an eighth of the cost of 299."""


def test_inception_is_the_one_of_the_definition(inception, monkeypatch):
    monkeypatch.setattr(network_module, "SIDE", SMALL)
    x = torch.rand(1, 3, SMALL, SMALL, generator=torch.Generator().manual_seed(1)) * 2 - 1
    wanted = oracle(inception.state_dict(), x)
    assert wanted.shape == (1, 2048) and wanted.std() > 0.01
    # Nearly a hundred convolutions in float32; nothing is resized.
    torch.testing.assert_close(inception(x), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_inception_has_the_parts_of_the_usual_file(inception):
    """94 convolutions, each with a norm, and 1,008 classes."""
    names = inception.state_dict()
    assert sum(name.endswith("conv.weight") for name in names) == 94
    assert names["fc.weight"].shape == (1008, 2048) and len(names) == 6 * 94 + 2
    assert names["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert {"Mixed_5b.branch5x5_2.bn.running_var", "Mixed_6e.branch7x7dbl_5.conv.weight"} <= names.keys()


def test_pictures_are_made_299_pixels_without_antialiasing():
    """Bilinear by hand: each new place lies between two old ones, weighted by nearness, beyond the edge the edge."""
    seen = list[torch.Tensor]()

    class Watched(Inception):
        def trunk(self, x):
            seen.append(x)
            return torch.zeros(len(x), 2048, 8, 8)

    pixels = torch.randint(0, 256, (2, 40, 40, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Watched()(to_images(pixels))
    places = np.clip((np.arange(299) + 0.5) * 40 / 299 - 0.5, 0, 39)
    low = np.floor(places).astype(int)
    weights = np.zeros((299, 40))
    for row, (start, place) in enumerate(zip(low, places, strict=True)):
        weights[row, start] += 1 - (place - start)
        weights[row, min(start + 1, 39)] += place - start
    for picture, x in zip(pixels.numpy()[..., 0], seen[0].numpy(), strict=True):
        wanted = weights @ (picture / 255.0) @ weights.T * 2 - 1
        np.testing.assert_allclose(
            x, np.broadcast_to(wanted, (3, 299, 299)), atol=2e-5
        )  # places in float32 are good to 299 / 2^24


def test_the_distance_is_that_of_torchmetrics(inception, tmp_path, monkeypatch):
    """FID by torchmetrics with our network as its extractor, and by our own features and distance.

    In every 64th feature: torchmetrics' eigenvalues of all 2,048 take a minute.
    """
    metrics = pytest.importorskip("torchmetrics.image.fid")
    from snowmelt.evaluation.metrics import frechet, moments

    monkeypatch.setattr(network_module, "SIDE", 75)
    save_file(inception.state_dict(), tmp_path / "i.safetensors")
    (space,) = open_spaces(dataset(), ("inception",), inception=tmp_path / "i.safetensors", device=CPU, log=lambda t: 0)
    assert "other weights than those of the usual FID" in space.about
    sets = [dataset(4, seed=seed).images for seed in (1, 2)]

    class Extractor(torch.nn.Module):
        num_features = 32

        def forward(self, pixels):
            return inception(to_images(pixels.permute(0, 2, 3, 1)))[:, ::64]

    fid = metrics.FrechetInceptionDistance(feature=Extractor())
    for pixels, real in zip(sets, (True, False), strict=True):
        fid.update(torch.from_numpy(pixels).permute(0, 3, 1, 2), real=real)
    (mean_a, cov_a), (mean_b, cov_b) = (moments(space.features(pixels)[:, ::64]) for pixels in sets)
    # torchmetrics takes roots of eigenvalues of a product that is not symmetric and has rank 3: rounding of 1e-8.
    assert frechet(mean_a, cov_a, mean_b, cov_b) == pytest.approx(float(fid.compute()), rel=1e-3)


# DINOv2


def vit_oracle(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The class token of the tiny network for normalised pictures, head by head and token by token."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    side = x.shape[3] // 14
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(len(x), side * side, -1)
    tokens = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(x), 1, -1), tokens], 1) + positions(w["pos_embed"], side)
    for block in range(2):
        name = f"blocks.{block}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        heads = []
        for head in range(2):
            q, k, v = (qkv[..., 128 * part + 64 * head : 128 * part + 64 * head + 64] for part in range(3))
            heads.append(torch.softmax(q @ k.mT / 8, -1) @ v)
        x = x + w[f"{name}.ls1.gamma"] * linear(torch.cat(heads, -1), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + w[f"{name}.ls2.gamma"] * linear(hidden, f"{name}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_the_transformer_is_the_one_of_the_definition():
    network = stirred(VisionTransformer(TINY))
    assert isinstance(network, VisionTransformer)
    x = torch.randn(2, 3, 70, 70)
    for pictures in (x, torch.randn(2, 3, 112, 112)):
        with torch.no_grad():
            torch.testing.assert_close(
                network.tokens(pictures)[:, 0], vit_oracle(network.state_dict(), pictures), atol=1e-4, rtol=1e-4
            )


def test_positions_of_other_sizes():
    """Kept where the size is that of the training; else bicubic with the scale that Meta uses, and linear in itself."""
    embedding = torch.randn(1, 1 + 37**2, 4)
    assert positions(embedding, 37) is embedding
    small = positions(embedding, 16)
    assert small.shape == (1, 257, 4) and torch.equal(small[:, 0], embedding[:, 0])
    grid = embedding[:, 1:].reshape(1, 37, 37, 4).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(small[:, 1:], wanted.reshape(1, 256, 4))
    flat = torch.ones(1, 1 + 37**2, 2)
    torch.testing.assert_close(positions(flat, 16), torch.ones(1, 257, 2))


@pytest.mark.parametrize("width, depth", [(384, 12), (768, 12), (1024, 24)])
def test_the_size_is_read_from_the_shapes(width, depth):
    """Names and shapes as in Meta's files of S/14, B/14 and L/14."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "patch_embed.proj.weight": (width, 3, 14, 14)}
    shapes |= {f"blocks.{number}.mlp.fc1.weight": (4 * width, width) for number in range(depth)}
    assert extents_of(shapes) == Extents(width, depth, width // 64, 14, 37, 4 * width)


def test_a_file_of_dinov2_is_a_space(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    network = stirred(VisionTransformer(TINY))
    torch.save(network.state_dict(), tmp_path / "dinov2.pth")
    pictures = dataset(3).images
    (space,) = open_spaces(dataset(), ("dinov2",), dinov2=tmp_path / "dinov2.pth", device=CPU, log=lambda text: None)
    x = F.interpolate(to_images(torch.from_numpy(pictures)), (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = vit_oracle(network.state_dict(), ((x + 1) / 2 - mean) / std)
    torch.testing.assert_close(space.features(pictures), wanted.detach(), atol=1e-4, rtol=1e-4)


# Files of torch, and what must not be read


def state() -> dict[str, torch.Tensor]:
    whole = torch.arange(24.0).reshape(4, 6)
    return collections.OrderedDict(
        a=whole, b=whole[1:3, ::2], t=whole.T, n=torch.tensor(7), h=torch.ones(3).half(), e=torch.empty(0),
        p=torch.nn.Parameter(torch.ones(2)),
    )  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dictionary", [collections.OrderedDict, dict])
def test_files_of_torch_are_read_without_running_them(zipped, dictionary, tmp_path):
    path, wanted = tmp_path / "w.pth", dictionary(state())
    torch.save(wanted, path, _use_new_zipfile_serialization=zipped)
    found = read_weights(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


@pytest.mark.parametrize("zipped", [True, False])
def test_modules_states_are_read(zipped, tmp_path):
    """They carry `_metadata`, an attribute."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    torch.save(network.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    torch.nn.Sequential(*network).load_state_dict(read_weights(tmp_path / "w.pth"))


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HOSTILE = {
    "system": lambda path: Runs(os.system, f"touch {path}"),
    "eval": lambda path: Runs(eval, f"open({str(path)!r}, 'w')"),
    "in a dictionary": lambda path: {"a": torch.ones(2), "b": Runs(os.system, f"touch {path}")},
    "as a key": lambda path: {Runs(os.system, f"touch {path}"): torch.ones(2)},
    "an ordered dictionary of it": lambda path: Runs(
        collections.OrderedDict, [("a", Runs(os.system, f"touch {path}"))]
    ),
    "a module": lambda path: torch.nn.Linear(2, 2),
    "numbers": lambda path: {"a": 1},
    "a list": lambda path: [torch.ones(2)],
    "nested": lambda path: {"model": {"a": torch.ones(2)}},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, zipped, protocol, tmp_path):
    proof = tmp_path / "proof"
    path = tmp_path / "w.pth"
    torch.save(HOSTILE[name](proof), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"not loaded|no readable weights") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value) and not proof.exists()


def rewritten(path, change):
    """The zip file with its data.pkl changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in parts.items():
            archive.writestr(entry, change(data) if entry.endswith("data.pkl") else data)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "no pickle": lambda path: path.write_bytes(b"\x80\x02" + bytes(range(256))),
    "cut inside": lambda path: rewritten(path, lambda data: data[:-1]),
    "stack taken away": lambda path: rewritten(path, lambda data: b"\x80\x02R."),
    "a reference to nothing": lambda path: rewritten(path, lambda data: b"\x80\x02h\x05."),
    "mark taken away": lambda path: rewritten(path, lambda data: b"\x80\x02t."),
    "larger than its storage": lambda path: rewritten(path, lambda data: data.replace(b"K\x04K\x06", b"K\x40K\x60")),
    "another storage": lambda path: rewritten(path, lambda data: data.replace(b"FloatStorage", b"OtherStorage")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_one_sentence(name, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(4, 6)}, path)
    DAMAGES[name](path)
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


CHAIN = b"]q\x00]q\x01ah\x01]q\x02a"
"""A list in a list, and then another in the inner one: so lists could be nested without any bound."""
CRAFTED = {
    "a tuple as a name": (b"})\x85K\x01s.", "names that are no text"),
    "a tuple too deep to be hashed": (b"})" + b"\x85" * 300_000 + b"K\x01s.", "nested too deeply"),
    "a list in itself": (b"]q\x00h\x00a.", "a part of itself"),
    "a list that grows inside another": (CHAIN + b".", "a part of itself"),
    "a dictionary in dictionaries": (b"}" * 30 + b"X\x01\x00\x00\x00a}" + b"s." * 30, "no tensor|not loaded|readable"),
    "what would take years to be said": (b")" + b"q\x00h\x00\x86" * 19 + b")R.", "the call of tuple"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles_are_refused_at_once(name, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(4, 6)}, path)
    code, words = CRAFTED[name]
    rewritten(path, lambda data: b"\x80\x02" + code)
    with pytest.raises(UserError, match=words) as caught:
        read_weights(path)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_small_files_of_large_tensors_are_refused(zipped, tmp_path):
    """Many names for the same numbers, each of which becomes a tensor of its own; a few are usual."""
    path, numbers = tmp_path / "w.pth", torch.arange(100_000.0)
    torch.save({f"n{number}": numbers for number in range(4)}, path, _use_new_zipfile_serialization=zipped)
    assert len(read_weights(path)) == 4
    torch.save({f"n{number}": numbers for number in range(30)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="much larger than the file"):
        read_weights(path)
    torch.save({"a": torch.ones((1,) * 20)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="20 dimensions"):
        read_weights(path)


def test_compressed_parts_are_refused(tmp_path):
    """A few bytes would become gigabytes."""
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    with pytest.raises(UserError, match="compressed"):
        read_weights(path)
