"""The encoder trained on the folder: a function of the training pictures, cached, awake to damage."""

from __future__ import annotations

import dataclasses
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch

from snowmelt.data.pixels import to_images, to_pixels
from snowmelt.data.prepared import Prepared
from snowmelt.errors import UserError
from snowmelt.evaluation import cache, classes, encoder
from snowmelt.evaluation.encoder import Lessons, blurred, damaged, said_of, train_encoder, trained
from snowmelt.evaluation.shares import wilson
from snowmelt.networks.encoder import Encoder, RandomEncoder

CPU = torch.device("cpu")
SHORT = Lessons(fewest=6, most=6, batch=8)


def shapes(count: int, size: int = 16, channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Discs, bars and checkers of any colour at any place, uint8 (count, size, size, channels), and which they are."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    down, across = np.mgrid[:size, :size]
    pictures = np.zeros((count, size, size, channels), np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        y, x = rng.integers(size // 3, 2 * size // 3, 2)
        disc = np.hypot(down - y, across - x) < rng.uniform(0.2, 0.35) * size
        form = abs(across - x) < size / 4
        forms = (disc, form & ((down + y) // 4 % 2 == 0), form & ((down + y) // 4 % 2 == (across + x) // 4 % 2))
        picture[forms[label]] = rng.integers(100, 256, channels)
    return pictures, labels.astype(np.int64)


def dataset(count: int = 120, size: int = 16, channels: int = 3, named: bool = True, seed: int = 0) -> Prepared:
    """Pictures of shapes with every sixth held out; nothing on the disk."""
    images, labels = shapes(count, size, channels, seed)
    held_out = np.arange(0, count, 6, dtype=np.int64)
    return Prepared(
        path=Path("nowhere"),
        images=images,
        labels=labels if named else None,
        classes=("disc", "bars", "checkers") if named else (),
        captions=None,
        train=np.setdiff1d(np.arange(count, dtype=np.int64), held_out),
        held_out=held_out,
        mean=0.0,
        std=1.0,
        fingerprint=f"{count} {size} {channels} {named} {seed}",
    )


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """Pictures and the encoder that learned from them for long enough to be of use, kept in a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("school")))
        patch.setattr(encoder, "LESSONS", Lessons(fewest=60, most=60, batch=32, smoothing=0.0))
        data = dataset(600)
        yield data, trained(data, device=CPU, log=lambda text: None).encoder


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A cache of its own and a short training."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(encoder, "LESSONS", SHORT)
    return tmp_path / "cache"


def weights_of(data: Prepared, lessons: Lessons = SHORT) -> str:
    return cache.digest_of(train_encoder(data, lessons, device=CPU).state_dict())


def test_the_same_pictures_give_the_same_bytes():
    torch.manual_seed(1)
    first = weights_of(dataset())
    torch.manual_seed(2)
    assert weights_of(dataset()) == first
    assert weights_of(dataset(seed=1)) != first


def test_training_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    train_encoder(dataset(), dataclasses.replace(SHORT, fewest=1, most=1), device=CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_held_out_pictures_are_never_read(quick):
    data = dataset()
    poisoned = data.images.copy()
    poisoned[data.held_out] = np.random.default_rng(0).integers(0, 256, poisoned[data.held_out].shape)
    assert data.labels is not None
    labels = data.labels.copy()
    labels[data.held_out] = 0
    first = trained(data, device=CPU, log=lambda text: None)
    other = dataclasses.replace(data, images=poisoned, labels=labels, fingerprint="another")
    assert trained(other, device=CPU, log=lambda text: None).identity == first.identity


def test_it_is_trained_once_and_again_when_damaged(quick, monkeypatch):
    said = list[str]()
    first = trained(dataset(), device=CPU, log=said.append)
    assert len(said) == 1 and "about" in said[0]
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "train_encoder", None)
        again = trained(dataset(), device=CPU, log=said.append)
    assert again.identity == first.identity and len(said) == 1
    (path,) = (quick / "encoders").iterdir()
    whole = path.read_bytes()
    for damage in (whole[:-7], b"", whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]):
        path.write_bytes(damage)
        assert trained(dataset(), device=CPU, log=said.append).identity == first.identity
        assert path.read_bytes() == whole


@pytest.mark.parametrize("size", [8, 15, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_sizes_and_colours(size, channels):
    data = dataset(16, size, channels, named=channels == 3)
    network = train_encoder(data, Lessons(fewest=2, most=2, batch=4), device=CPU)
    features, said = said_of(network, data.images)
    assert features.shape == (16, Encoder.dimension) and features.isfinite().all()
    assert said.shape[1] == 3 or channels == 1


def test_it_learns_the_classes_and_the_damage(school):
    """On pictures it has not seen; by chance a third of the classes would be right, and all damage would look alike."""
    network = school[1]
    fresh, labels = shapes(200, seed=9)
    assert (said_of(network, fresh)[1].argmax(1).numpy() == labels).mean() > 0.75
    images = to_images(torch.from_numpy(fresh))
    with torch.inference_mode():
        sharp, soft = (network(x).damage[:, 0].mean() for x in (images, blurred(images, torch.full((200,), 1.5))))
        clean, noisy = (network(x).damage[:, 1].mean() for x in (images, images + 0.4 * torch.randn(images.shape)))
    assert soft > sharp + 0.1 and noisy > clean + 0.05


def test_blur_is_that_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    images = torch.rand(3, 2, 12, 12)
    sigmas = (0.0, 0.7, 1.3)
    found = blurred(images, torch.tensor(sigmas))
    torch.testing.assert_close(found[0], images[0])
    for image, mine, sigma in zip(images[1:], found[1:], sigmas[1:], strict=True):
        wanted = ndimage.gaussian_filter(image.numpy(), (0, sigma, sigma), mode="nearest", radius=4)
        np.testing.assert_allclose(mine.numpy(), wanted, atol=1e-5)  # float32


def test_damage_is_as_strong_as_said():
    images = torch.zeros(400, 1, 16, 16)
    spoiled, strength = damaged(images, Lessons(), torch.Generator().manual_seed(0))
    # The standard deviation of 256 values is known to 1 / sqrt(512) = 4.4 %; five of those.
    torch.testing.assert_close(spoiled.std(dim=(1, 2, 3)), strength[:, 1] * Lessons().noise, rtol=0.22, atol=1e-6)
    assert 0.3 < (strength == 0).float().mean() < 0.5


def test_pairs_that_agree_cost_nothing():
    views = torch.nn.functional.one_hot(torch.arange(8)).float()
    assert encoder.alike(views, views, 0.01) < 1e-6
    # All alike: every row is as likely, ln 8 nats.
    assert encoder.alike(views[:1].repeat(8, 1), views[:1].repeat(8, 1), 0.1) == pytest.approx(np.log(8), abs=1e-5)


def test_random_filters_keep_the_power_and_the_seed():
    first, second = (RandomEncoder(3, torch.Generator().manual_seed(5)) for _ in range(2))
    images = torch.randn(64, 3, 32, 32)
    assert torch.equal(first(images), second(images)) and first(images).shape == (64, RandomEncoder.dimension)
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_wilson_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for count, total in ((0, 10), (3, 10), (10, 10), (970, 2000)):
        wanted = stats.binomtest(count, total).proportion_ci(method="wilson")
        found = astuple(wilson(count, total))
        assert found == pytest.approx((count / total, wanted.low, wanted.high), abs=1e-7)


def test_recognised_classes(school):
    data = school[0]
    fresh, labels = shapes(300, seed=7)
    some = labels != 2  # the checkers are missing
    found = classes.recognised(data, data.held_out, fresh[some], labels[some])
    assert found is not None and found["reason"] == ""
    value, low, high = found["as_asked"]
    assert low <= value <= high and value > 0.75
    assert found["balance"]["checkers"] < 0.1 < 0.2 < found["balance_real"]["checkers"] and found["distance"] > 0.15
    assert sum(found["balance"].values()) == pytest.approx(1) == sum(found["balance_real"].values())
    unasked = classes.recognised(data, data.held_out, fresh[some], None)
    assert unasked is not None and unasked["as_asked"] is None


def test_no_numbers_where_the_encoder_knows_nothing(quick):
    data = dataset(600)
    random = dataclasses.replace(data, labels=np.random.default_rng(0).integers(0, 3, 600), fingerprint="random labels")
    found = classes.recognised(random, random.held_out, random.images[:60], None)
    assert found is not None and found["recognised"] is None and "rightly" in found["reason"]
    few = dataset(60)
    found = classes.recognised(few, few.held_out, few.images[:60], None)
    assert found is not None and found["balance"] is None and "held out" in found["reason"]
    assert classes.recognised(dataset(60, named=False), few.held_out, few.images, None) is None


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=cache.VARIABLE):
        trained(dataset(), device=CPU, log=lambda text: None)


def test_stored_and_shown_pictures_agree():
    """What the tests call damage goes through pixels as generated pictures do."""
    pixels, _ = shapes(4)
    assert np.array_equal(to_pixels(to_images(torch.from_numpy(pixels))).numpy(), pixels)
