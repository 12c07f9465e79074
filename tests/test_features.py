"""Feature spaces: cached, refused with one sentence where weights are missing, and farther the more is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from snowmelt import files
from snowmelt.data.pixels import to_images, to_pixels
from snowmelt.data.prepared import spread_rows
from snowmelt.errors import UserError
from snowmelt.evaluation import cache, encoder, features, nearest
from snowmelt.evaluation.cache import Published, fetched
from snowmelt.evaluation.encoder import Lessons, blurred
from snowmelt.evaluation.features import Space, expected_seconds, open_spaces, random_space, real_features
from snowmelt.evaluation.metrics import frechet_of
from snowmelt.evaluation.neighbours import Pair
from test_encoder import CPU, SHORT, dataset, shapes


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A cache of its own and a short training."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(encoder, "LESSONS", SHORT)
    return tmp_path / "cache"


def opened(names: tuple[str, ...], **given) -> list[Space]:
    return open_spaces(dataset(), names, device=CPU, log=lambda text: None, **given)


def test_a_space_says_what_it_is(quick):
    spaces = opened(("random", "trained"))
    assert [space.name for space in spaces] == ["random", "trained"]
    for space in spaces:
        found = space.features(dataset().images[:7])
        assert found.shape == (7, space.dimension) and found.dtype == torch.float32
        assert 64 <= space.dimension <= 128 and space.about and len(space.identity) == 64


def test_features_are_standardised_on_training_pictures(quick):
    data = dataset()
    for space in opened(("random", "trained")):
        found = space.features(data.images[data.train])
        torch.testing.assert_close(found.mean(0), torch.zeros(space.dimension), atol=1e-3, rtol=0)
        assert ((found.std(0) - 1).abs() < 1e-2).float().mean() > 0.8, "all but answers that never change"


def test_features_do_not_depend_on_what_is_measured_beside(quick):
    pixels = dataset(300).images
    for space in opened(("random", "trained")):
        # Float32 sums in another order; features are about 1 in size.
        torch.testing.assert_close(space.features(pixels)[260:], space.features(pixels[260:]), atol=1e-4, rtol=1e-4)


def test_real_features_are_kept(quick):
    data, rows = dataset(), np.arange(5, 40)
    (space,) = opened(("random",))
    found = real_features(space, data, rows)
    torch.testing.assert_close(found, space.features(data.images[rows]))
    blind = dataclasses.replace(space, features=lambda pixels: torch.zeros(len(pixels), space.dimension))
    assert torch.equal(real_features(blind, data, rows), found), "they came from the cache"
    other = dataclasses.replace(blind, identity="other")
    assert not real_features(other, data, rows).any() and not real_features(blind, data, rows[::-1].copy()).any()
    for path in (quick / "features").iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert torch.equal(real_features(space, data, rows), found), "made again"


def test_the_cache_stands_writers_side_by_side(quick, monkeypatch):
    """As many processes as like may write the same file: it appears at once and whole. Threads play the processes."""
    monkeypatch.setattr(files.os, "getpid", threading.get_ident)
    path = cache.cache_folder("features") / "x.safetensors"
    with ThreadPoolExecutor(8) as pool:
        done = pool.map(lambda _: cache.kept(path, lambda: {"a": torch.arange(5)})["a"].tolist(), range(32))
        assert list(done) == [[0, 1, 2, 3, 4]] * 32
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def chain(pixels: np.ndarray, missing: np.ndarray) -> dict[str, np.ndarray]:
    """Ever worse pictures: blurred, noisy too, one of three kinds missing too, nothing but noise; as many of each."""
    count = int((~missing).sum())
    rng = torch.Generator().manual_seed(0)

    def spoiled(part: np.ndarray, noise: float) -> np.ndarray:
        images = blurred(to_images(torch.from_numpy(part)), torch.full((len(part),), 0.6))
        return to_pixels(images + noise * torch.randn(images.shape, generator=rng)).numpy()

    return {
        "real": pixels[:count],
        "blurred": spoiled(pixels[:count], 0),
        "noisier": spoiled(pixels[:count], 0.1),
        "missing": spoiled(pixels[~missing], 0.1),
        "noise": np.random.default_rng(0).integers(0, 256, pixels[:count].shape, dtype=np.uint8),
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["trained", "random"])
def test_distances_rise_with_what_is_wrong(name, channels, quick, monkeypatch):
    monkeypatch.setattr(encoder, "LESSONS", Lessons(fewest=20, most=20, batch=24))
    data = dataset(400, channels=channels)
    (space,) = open_spaces(data, (name,), device=CPU, log=lambda text: None)
    fresh, labels = shapes(500, channels=channels, seed=6)
    real = space.features(shapes(int((labels != 0).sum()), channels=channels, seed=5)[0])
    steps = [space.features(pixels) for pixels in chain(fresh, labels == 0).values()]
    found = [frechet_of(Pair(real, step)) for step in steps]
    assert found == sorted(found), found


def test_random_space_needs_no_data():
    pixels, _ = shapes(40, channels=1)
    first, second = random_space(1), random_space(1)
    assert first.identity == second.identity != random_space(3).identity
    assert torch.equal(first.features(pixels), second.features(pixels))
    spread, alike = (first.features(some).var(0).sum() for some in (pixels, pixels[:1].repeat(40, 0)))
    assert alike < 1e-6 < spread


MISTAKES = {
    "an unknown space": (("traind",), {}, "did you mean 'trained'"),
    "dinov2 without weights": (("dinov2",), {}, "--dinov2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_before_training(mistake, quick):
    names, given, words = MISTAKES[mistake]
    with pytest.raises(UserError, match=words) as caught:
        opened(("trained", *names), **given)
    assert "\n" not in str(caught.value) and not list(quick.rglob("*.safetensors"))


@pytest.mark.parametrize("space", ["inception", "dinov2"])
def test_wrong_weights_are_one_sentence(space, quick, tmp_path):
    path = tmp_path / "weights.safetensors"
    for write in (lambda: None, lambda: path.write_bytes(b"x"), lambda: save_file({"a": torch.zeros(2)}, path)):
        write()
        with pytest.raises(UserError) as caught:
            opened((space,), **{space: path})
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Tiny(torch.nn.Module):
    """In the place of Inception-v3."""

    dimension = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * self.scale


def test_weights_are_the_usual_ones_by_their_whole_digest_only(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "Inception", Tiny)
    usual, other = tmp_path / "mine.safetensors", tmp_path / "other.safetensors"
    save_file({"scale": torch.tensor([3.0, 4.0])}, usual)
    save_file({"scale": torch.tensor([3.0, 5.0])}, other)
    digest = hashlib.sha256(usual.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "INCEPTION", dataclasses.replace(features.INCEPTION, sha256=digest))
    first, second = (opened(("inception",), inception=path)[0] for path in (usual, other))
    assert first.about == "Inception-v3 of the usual FID"
    assert second.about == "Inception-v3 with other weights than those of the usual FID"
    assert first.identity != second.identity


def test_the_published_name_with_another_digest_is_refused(quick, tmp_path):
    """One that begins alike is another one too."""
    path = tmp_path / features.INCEPTION.name
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="another SHA-256") as caught:
        opened(("inception",), inception=path)
    assert "6726825d" in str(caught.value) and "\n" not in str(caught.value)


def test_rows_are_spread_over_all_of_them():
    """Increasing, none twice, the first and the last among them, and gaps that differ by one at most."""
    for count in (2, 3, 10, 99, 100, 101, 199, 5003):
        for most in (2, 3, 7, 100, 101, 200):
            rows = spread_rows(np.arange(count) * 3, most)
            assert len(rows) == min(count, most) and rows[0] == 0 and rows[-1] == 3 * (count - 1)
            gaps = np.diff(rows) // 3
            assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert not len(spread_rows(np.arange(0), 5)) and spread_rows(np.arange(4), 1).tolist() == [0]


def test_real_pictures_are_read_in_parts(quick, monkeypatch):
    """However many there are, and however large, about 16 MB are in the memory at a time."""
    data, rows = dataset(40), np.arange(3, 33)
    (space,) = opened(("random",))
    wanted = space.features(data.images[rows])
    monkeypatch.setattr(nearest, "_READ_BYTES", 8 * data.images[0].nbytes)
    seen = list[int]()

    def watched(pixels: np.ndarray) -> torch.Tensor:
        seen.append(len(pixels))
        return space.features(pixels)

    found = real_features(dataclasses.replace(space, identity="watched", features=watched), data, rows)
    assert seen == [8, 8, 8, 6]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)  # float32 sums in another order


def test_no_network_names_the_option(quick, monkeypatch):
    def offline(url: str, size: int) -> bytes:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(cache, "_download", offline)
    with pytest.raises(UserError, match=r"no route to host.*--inception"):
        opened(("inception",))


def test_fetching_once_and_only_what_was_meant(quick):
    data, asked = b"weights", list[str]()
    what = Published("w.bin", "https://example.org/w.bin", hashlib.sha256(data).hexdigest(), 100, "--weights")

    def fetch(url: str, size: int) -> bytes:
        asked.append(url)
        return data

    with pytest.raises(UserError, match=r"SHA-256 differs.*--weights"):
        fetched(what, lambda url, size: b"other")
    assert not list(cache.cache_folder("weights").iterdir())
    assert fetched(what, fetch).read_bytes() == data and fetched(what, fetch).exists() and len(asked) == 1
    with pytest.raises(UserError, match="not https"):
        fetched(dataclasses.replace(what, name="v.bin", url="file:///etc/hostname"))


def test_seconds_are_announced(quick):
    data = dataset()
    before = expected_seconds(data, ("trained", "random"), 1000)
    opened(("trained",))
    assert before > expected_seconds(data, ("trained", "random"), 1000) > expected_seconds(data, ("random",), 1000) > 0
