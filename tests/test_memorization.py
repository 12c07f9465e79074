"""Planted copies are found, and nothing else is."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from snowmelt.errors import UserError
from snowmelt.evaluation import nearest
from snowmelt.evaluation.memorization import LEAST, Searched, _limit, find_copies, gaps
from snowmelt.evaluation.nearest import Rows, averages, nearest_features, nearest_pixels

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
RNG = np.random.default_rng(0)


def drawn(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Smooth random colour pictures."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    return nn.functional.interpolate(small, (size, size), mode="bilinear").permute(0, 2, 3, 1).byte().numpy()


def noisy(pictures: np.ndarray) -> np.ndarray:
    return np.clip(pictures + RNG.normal(0, 3, pictures.shape), 0, 255).round().astype(np.uint8)


def jpeg(pictures: np.ndarray) -> np.ndarray:
    """Compressed and opened again, at a quality where no artefact is seen."""
    found: list[np.ndarray] = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture.squeeze()).save(file, "jpeg", quality=92, subsampling=0)
        found.append(np.asarray(Image.open(file)).reshape(picture.shape))
    return np.stack(found)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exact": lambda pictures: pictures,
    "mirrored": lambda pictures: pictures[:, :, ::-1],
    "noisy": noisy,
    "jpeg": jpeg,
}


def check(pictures: np.ndarray, held_out: int, share: float) -> None:
    """Of 400 new pictures some are replaced by copies: over 95 % of these are found, under 1 % of the others flagged.

    New pictures that are a training picture to the eye (mirrored twins, one drawing under two names) are no false
    alarms, and neither is it fair to count them as found.
    """
    others, new, training = pictures[:held_out], pictures[held_out : held_out + 400], pictures[held_out + 400 :]
    twins = nearest_pixels(averages(new), averages(training)).distance < 2
    new = new[~twins.numpy()]
    count = max(4, round(share * len(new)))
    for name, change in CHANGES.items():
        copies = change(training[np.linspace(0, len(training) - 1, count).astype(int)])
        found = find_copies(Searched(np.concatenate([copies, new])), Searched(training), Searched(others))
        hits = sum(sample < count for sample in found.flagged)
        assert hits > 0.95 * count, (name, hits, count)
        assert found.count - hits < 0.01 * len(new), (name, found.count - hits)
        assert found.copies.low <= found.copies.share <= found.copies.high
        assert found.false_alarms * found.held_out <= 3, "1 % of 300"


@pytest.mark.parametrize(("held_out", "share"), [(50, 0.01), (300, 0.1)])
def test_planted_copies_of_drawn_pictures_are_found(held_out, share):
    check(drawn(1200, 0), held_out, share)


@pytest.fixture(scope="module")
def real_pictures(tmp_path_factory) -> Callable[[str], np.ndarray]:
    from rich.console import Console

    from snowmelt.prepare import PrepareOptions, prepare

    def pictures(name: str) -> np.ndarray:
        source = DATA / f"{name}.zip"
        if not source.exists():
            pytest.skip("../shared/data is not here")
        folder = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(source) as archive:
            names = [member for member in archive.namelist() if member.endswith((".png", ".jpg", ".jpeg"))]
            archive.extractall(folder / "some", names[:: max(1, len(names) // 1200)])
        options = PrepareOptions(source=str(folder / "some"), out=folder / "prepared", size=32, workers=1)
        images = prepare(options, Console(file=io.StringIO())).images
        return np.asarray(images)[np.random.default_rng(1).permutation(len(images))[:1200]]

    return pictures


@pytest.mark.parametrize("name", ["emoji", "mnist-test", "cifar10-test"])
def test_planted_copies_of_real_pictures_are_found(real_pictures, name):
    check(real_pictures(name), 300, 0.1)


def test_the_nearest_picture_is_the_nearest():
    """Against all pairs: the largest difference of averages, mirrored or not."""
    training, pictures = averages(drawn(50, 0)), averages(np.concatenate([drawn(5, 1), drawn(50, 0)[7:9, :, ::-1]]))
    found = nearest_pixels(pictures, training)
    straight, mirrored = (
        (side[:, None] - training[None]).abs().flatten(2).amax(2) for side in (pictures, pictures.flip(3))
    )
    known, rows = torch.minimum(straight, mirrored).sort(dim=1)
    assert torch.equal(found.row, rows[:, 0])
    assert torch.allclose(found.distance, known[:, 0])
    assert torch.allclose(found.ratio, known[:, 0] / known[:, 1:].mean(1))
    assert found.row[5:].tolist() == [7, 8]
    assert found.flipped[5:].all()


def test_the_nearest_features_are_the_nearest():
    rng = torch.Generator().manual_seed(0)
    features, training = torch.randn(9, 6, generator=rng) + 30, torch.randn(80, 6, generator=rng) + 30
    known, rows = torch.cdist(features.double(), training.double()).sort(dim=1)
    found = nearest_features(features, training)
    assert torch.equal(found.row, rows[:, 0])
    assert torch.allclose(found.ratio.double(), known[:, 0] / known[:, 1:51].mean(1), rtol=1e-4)

    mirrored = torch.randn(9, 6, generator=rng) + 30
    straight, other = (torch.cdist(side.double(), training.double()) for side in (features, mirrored))
    known, rows = torch.minimum(straight, other).sort(dim=1)
    found = nearest_features(features, training, mirrored)
    assert torch.equal(found.row, rows[:, 0])
    assert torch.allclose(found.ratio.double(), known[:, 0] / known[:, 1:51].mean(1), rtol=1e-4)
    assert torch.equal(found.flipped, straight.amin(1) > known[:, 0])
    assert 0 < found.flipped.sum() < 9


def test_pictures_are_read_and_compared_in_parts(monkeypatch):
    """As many at a time as the memory holds, whatever their number; the answers are those of all at once."""
    images, rows = drawn(90, 0), np.arange(2, 82, 2)
    wanted, pictures = averages(images[rows]), averages(drawn(20, 1))
    found = nearest_pixels(pictures, wanted), nearest_features(pictures.flatten(1), wanted.flatten(1))
    assert nearest._at_once(10_000) == 128 and 1 < nearest._at_once(1_000_000) <= 2**28 / 12e6
    monkeypatch.setattr(nearest, "_READ_BYTES", 7 * images[0].nbytes)
    monkeypatch.setattr(nearest, "_MATRIX_BYTES", 3 * 12 * len(rows))
    seen = list[int]()
    monkeypatch.setattr(Rows, "__getitem__", lambda some, part: seen.append(1) or some.images[some.rows[part]])
    assert torch.equal(averages(Rows(images, rows)), wanted) and len(seen) == 6
    again = nearest_pixels(pictures, wanted), nearest_features(pictures.flatten(1), wanted.flatten(1))
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one.row, other.row) and torch.equal(one.flipped, other.flipped)
        assert torch.allclose(one.ratio, other.ratio)


def test_copies_that_only_features_see_are_found():
    """Shifted pictures: no pixel is where it was, but an encoder sees the same."""
    training, new, held_out = drawn(300, 0), drawn(100, 1), drawn(100, 2)
    rng = torch.Generator().manual_seed(0)
    seen = [torch.randn(count, 16, generator=rng) for count in (300, 100, 100)]
    new[:5], seen[1][:5] = np.roll(training[:5], 9, axis=2), seen[0][:5] + 0.01
    sides = [
        Searched(pixels, features)
        for pixels, features in zip((new, training, held_out), (seen[1], seen[0], seen[2]), strict=True)
    ]
    found = find_copies(*sides)
    assert set(found.flagged) == {0, 1, 2, 3, 4}
    assert {(pair.sample, pair.training) for pair in found.pairs[:5]} == {(row, row) for row in range(5)}
    assert not any(pair.flipped for pair in found.pairs[:5])
    assert find_copies(*(Searched(side.pixels) for side in sides)).count == 0


def test_mirrored_copies_that_only_features_see_are_found():
    training, new, held_out = drawn(300, 0), drawn(100, 1), drawn(100, 2)
    rng = torch.Generator().manual_seed(0)
    known, mine, mine_mirrored, theirs, theirs_mirrored = (
        torch.randn(count, 16, generator=rng) for count in (300, 100, 100, 100, 100)
    )
    mine_mirrored[:5] = known[:5] + 0.01
    blind = Searched(new, mine), Searched(training, known), Searched(held_out, theirs)
    seeing = Searched(new, mine, mine_mirrored), blind[1], Searched(held_out, theirs, theirs_mirrored)
    assert find_copies(*blind).count == find_copies(seeing[0], *blind[1:]).count == 0, "for both or for neither"
    found = find_copies(*seeing)
    assert set(found.flagged) == {0, 1, 2, 3, 4}
    assert {(pair.sample, pair.training, pair.flipped) for pair in found.pairs[:5]} == {
        (row, row, True) for row in range(5)
    }


def test_false_alarms_are_those_of_pictures_that_set_no_limit():
    """A tenth of the held-out pictures are brighter training pictures, all in the same half: every one is an alarm,
    though the limits that all of them set together flag none."""
    training, held_out = drawn(600, 0), drawn(100, 2)
    held_out[1:20:2] = np.clip(training[:10].astype(int) + 6, 0, 255)
    found = find_copies(Searched(drawn(100, 1)), Searched(training), Searched(held_out))
    assert (found.duplicates, found.held_out, found.false_alarms) == (0, 100, 0.1)
    ratios = nearest_pixels(averages(held_out), averages(training)).ratio
    assert _limit(ratios) < ratios.min()


def test_a_model_that_copies_nothing_is_as_close_as_held_out_pictures():
    """The 95 % interval of the share holds 0.5 in 3 of 4 draws at least; fewer have a chance of 1.4 % (binomial)."""
    held = 0
    for seed in range(1, 5):
        found = find_copies(Searched(drawn(250, seed)), Searched(drawn(400, 0)), Searched(drawn(250, seed + 20)))
        assert found.count == 0
        held += found.closer.low < 0.5 < found.closer.high
    assert held >= 3
    assert len(found.pairs) == 16
    assert [pair.ratio for pair in found.pairs] == sorted(pair.ratio for pair in found.pairs)
    copies = find_copies(Searched(drawn(400, 0)[:100]), Searched(drawn(400, 0)), Searched(drawn(250, 2)))
    assert copies.copies.share == copies.closer.share == 1


def test_held_out_twins_are_set_aside():
    """A tenth of the held-out pictures are mirrored training pictures; copies are found all the same."""
    training, held_out = drawn(600, 0), drawn(100, 2)
    held_out[:10] = training[:10, :, ::-1]
    found = find_copies(
        Searched(np.concatenate([noisy(training[50:60]), drawn(90, 1)])),
        Searched(Rows(training, np.arange(len(training)))),
        Searched(held_out),
    )
    assert (found.duplicates, found.held_out) == (10, 90)
    assert found.flagged == tuple(range(10))


def test_few_pictures():
    with pytest.raises(UserError, match="20 or more held-out"):
        find_copies(Searched(drawn(5, 0)), Searched(drawn(5, 1)), Searched(drawn(LEAST - 1, 2)))
    found = find_copies(Searched(drawn(1, 0)), Searched(drawn(1, 1)), Searched(drawn(LEAST, 2)))
    assert found.count == 0 and len(found.pairs) == 1


def test_gaps_are_those_of_welch():
    stats = pytest.importorskip("scipy.stats")
    rng = torch.Generator().manual_seed(0)
    train, held_out = torch.randn(30, generator=rng), torch.randn(12, generator=rng) * 2 + 1
    (gap,) = gaps({"error at log-SNR -2": train}, {"error at log-SNR -2": held_out})
    known = stats.ttest_ind(held_out.numpy(), train.numpy(), equal_var=False).confidence_interval(0.95)
    assert (gap.low, gap.high) == (pytest.approx(known.low, rel=5e-3), pytest.approx(known.high, rel=5e-3))
    assert gap.difference == pytest.approx(gap.held_out - gap.train)
    with pytest.raises(UserError, match="different levels"):
        gaps({"a": train}, {"b": held_out})
    with pytest.raises(UserError, match="fewer than two"):
        gaps({"a": train[:1]}, {"a": held_out})
