"""The VAE: its bound is a bound, its codec is a codec, it resumes bit for bit, and it is the size of the U-Net."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from conftest import stirred
from snowmelt.cli import run as cli
from snowmelt.config import Config, DataConfig, TrainingConfig, VAEConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.editing import slerp
from snowmelt.diffusion.process import data_term
from snowmelt.errors import UserError
from snowmelt.models import build_learner, build_model
from snowmelt.models.base import Drawing, Learner, Model, classes_of, count_parameters
from snowmelt.models.sharpness import patch_distance
from snowmelt.models.vae import Latents, VAELearner, VAEModel
from snowmelt.presets import check_size, preset, vae_for
from snowmelt.run import Run
from snowmelt.seeds import generator, noise_source

CPU = Precision(torch.device("cpu"))
DATA = DataConfig(8, 1, ("light", "dark"), (30, 10))
SMALL = VAEConfig(channels=(8, 16), latents=4, narrow=8)
CODEC = dataclasses.replace(SMALL, bottleneck="map")


def config_of(vae: VAEConfig = SMALL, data: DataConfig = DATA, **training: object) -> Config:
    return Config(data, "vae", vae=vae, training=dataclasses.replace(TrainingConfig(batch=16), **training))


def model_of(vae: VAEConfig = SMALL, data: DataConfig = DATA) -> VAEModel:
    model = build_model(config_of(vae, data), CPU)
    assert isinstance(model, VAEModel)
    stirred(model.network)
    return model


def learner_of(vae: VAEConfig = SMALL, data: DataConfig = DATA) -> VAELearner:
    learner = build_learner(config_of(vae, data), CPU)
    assert isinstance(learner, VAELearner)
    return learner


def waves(count: int, size: int = 8, channels: int = 1, seed: int = 0) -> Batch:
    """Waves of any direction and phase in 256 values, dim in one class: pictures that few numbers describe."""
    rng = torch.Generator().manual_seed(seed)
    angle, phase = (2 * math.pi * torch.rand(count, 1, 1, generator=rng) for _ in range(2))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    picture = torch.sin((x * angle.cos() + y * angle.sin()) * 0.9 + phase)
    labels = torch.arange(count) % 2
    picture = picture * torch.where(labels == 0, 0.9, 0.45)[:, None, None]
    picture = ((picture + 1) * 127.5).round() / 127.5 - 1
    return Batch(picture[:, None].expand(-1, channels, -1, -1).contiguous(), labels)


def train(learner: Learner, batch: Batch, steps: int, rate: float = 3e-3, first: int = 0) -> list[dict[str, float]]:
    """Updates on one batch, the rate falling over the second half."""
    return [
        learner.update(
            batch, generator(0, "train", first + step), rate * min(1, step / 10, 2 * (1 - step / steps) + 0.02)
        ).losses
        for step in range(1, steps + 1)
    ]


def settle(learner: VAELearner, batch: Batch) -> None:
    """Measure anew, with the weights as they are now, what is measured while training."""
    learner.model.updates.zero_()
    for number in range(8):
        with torch.no_grad():
            noise = learner.model.any_noise(len(batch.images), generator(1, "settle", number))
            learner.model.observe(batch.images, learner.model.through(*batch, noise))


def noise_for(count: int, size: int = 8, channels: int = 1):
    return noise_source([3] * count, range(count), (channels, size, size))


@pytest.fixture(scope="module")
def trained() -> tuple[VAELearner, Batch]:
    learner, batch = learner_of(), waves(32)
    train(learner, batch, 50, rate=1e-2)
    return learner, batch


def test_the_contracts_are_met():
    assert isinstance(learner_of(), Learner) and isinstance(learner_of().model, Model)
    assert VAEModel.at_once


def test_kl_is_that_of_torch():
    rng = torch.Generator().manual_seed(0)
    mean, log_variance, other = (torch.randn(3, 5, generator=rng) for _ in range(3))
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(other, math.exp(0.5))
    )
    prior = Latents(other, torch.ones(3, 5))
    # float32, a handful of operations.
    assert torch.allclose(Latents(mean, log_variance).kl(prior), theirs, atol=1e-5)
    on_a_map = Latents(*(x[..., None, None].expand(-1, -1, 2, 2) for x in (mean, log_variance)))
    assert torch.allclose(on_a_map.kl(Latents(*(x[..., None, None] for x in prior))), 4 * theirs, atol=1e-5)


@pytest.mark.parametrize("variance", ["optimal", "learned", "told"])
def test_the_bound_lies_above_the_bits_by_how_far_q_is_from_the_posterior(variance):
    """E_q[bound] = -log2 p(x) + KL(q(z | x) || p(z | x)): with one latent both sides are integrals over a line."""
    data = DataConfig(2, 1)
    model = model_of(VAEConfig(channels=(16,), latents=1, narrow=8, variance=variance), data)
    picture = torch.tensor([[[[-1.0, 0.2], [127 / 255, 1.0]]]])
    z = torch.linspace(-9, 9, 3001)[:, None]
    with torch.no_grad():
        mean, log_std = model.answer(z, model.network.embed(None, len(z)))
        likelihood = -data_term(picture, mean, log_std.exp()).flatten(1).sum(1)
        posterior = model.posterior(picture, None)
    step = z[1, 0] - z[0, 0]
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0])
    evidence = torch.logsumexp(prior + likelihood, 0) + step.log()
    log_q = torch.distributions.Normal(posterior.mean[0], (posterior.log_variance[0] / 2).exp()).log_prob(z[:, 0])
    gap = (log_q.exp() * (log_q - (prior + likelihood - evidence))).sum() * step
    many = Batch(picture.expand(4000, -1, -1, -1), None)
    bits = model.bits(many, torch.Generator().manual_seed(0))
    bound, nats = bits["bound"], 4 * math.log(2)
    expected = (gap - evidence) / nats
    assert gap > 0
    # Four standard errors of the mean, and the rounding of 3000 float32 terms.
    assert abs(bound.mean() - expected) < 4 * bound.std() / 4000**0.5 + 1e-4
    assert torch.equal(bound, bits["reconstruction"] + bits["KL"])


def test_an_untrained_picture_costs_about_eight_bits_and_training_lowers_that(trained):
    learner, batch = trained
    fresh = learner_of().held_out(batch, generator(0, "held out"))["held_out_loss"].mean()
    now = learner.held_out(batch, generator(0, "held out"))
    # Untold noise takes 8 bits for each value; a first guess of the right spread is near that.
    assert 6 < fresh < 10
    assert now["held_out_loss"].mean() < 0.75 * fresh
    assert torch.allclose(now["held_out_loss"], now["reconstruction bits"] + now["KL bits"])
    assert now["squared error"].mean() < 0.3 * batch.images.var(), "the latents tell the waves"
    assert {tuple(values.shape) for values in now.values()} == {(len(batch.images),)}


def test_latents_are_in_use_and_their_number_is_told(trained):
    learner, batch = trained
    means = learner.model.posterior(*batch).mean
    used = int((means.var(0) > 0.01).sum())
    assert used >= 2, "a wave has an angle and a phase"
    assert learner.held_out(batch, generator(0, "held out"))["active latents"][0] == used


def test_free_bits_are_spent():
    """Latents that may hold half a bit at no cost soon do, whether the picture wants it or not."""
    free = learner_of(dataclasses.replace(SMALL, free_bits=0.5))
    batch = waves(16)
    train(free, batch, 30, rate=1e-2)
    bits = free.model.posterior(*batch).kl(free.model.prior(batch.labels, 16)).mean(0) / math.log(2)
    # Adam holds it near the threshold from both sides.
    assert (bits > 0.3).all()


def test_the_optimal_variance_is_the_mean_squared_error():
    learner, batch = learner_of(dataclasses.replace(SMALL, variance="optimal")), waves(16)
    first = train(learner, batch, 30, rate=1e-2)[0]
    error = learner.held_out(batch, generator(0, "any"))["squared error"].mean().item()
    settle(learner, batch)
    variance = learner.model.state_dict()["variance.mean_square"].item()
    # The error is that of one draw of the latents, the variance that of many.
    assert variance == pytest.approx(error, rel=0.2)
    assert learner.held_out(batch, generator(0, "any"))["held_out_loss"].mean() < first["loss"] - 1


@pytest.mark.parametrize("vae", [SMALL, CODEC])
def test_the_codec_gives_latents_of_variance_1_and_takes_them_back(vae):
    learner, batch = learner_of(vae), waves(32)
    train(learner, batch, 30, rate=1e-2)
    settle(learner, batch)
    model = learner.model
    latents = model.encode(*batch)
    assert latents.shape == (32, *model.shape)
    # A running mean forgets what was before its last updates only in part.
    assert latents.std() == pytest.approx(1, abs=0.04)
    decoded = model.decode(latents, batch.labels)
    with torch.no_grad():
        raw, _ = model.answer(model.posterior(*batch).mean, model.network.embed(batch.labels, 32))
    # Scaled and scaled back: float32.
    assert torch.allclose(decoded, raw.clamp(-1, 1), atol=1e-4)
    error, of_draws = ((decoded - batch.images) ** 2).mean(), learner.held_out(batch, generator(0, "h"))
    assert error <= of_draws["squared error"].mean(), "the mean of q is the best latent, and a draw is near it"
    assert decoded.abs().max() <= 1


def test_the_scale_is_kept_in_the_checkpoint(trained):
    learner, batch = trained
    other = learner_of().model
    other.load_state_dict(learner.model.state_dict())
    assert torch.equal(other.encode(*batch), learner.model.encode(*batch))


@pytest.mark.parametrize(
    "vae",
    [
        SMALL,
        dataclasses.replace(CODEC, variance="optimal", attention=True),
        dataclasses.replace(SMALL, adversarial=0.1, patch_term=0.1, variance="learned"),
    ],
)
def test_k_and_n_updates_are_k_plus_n_updates(vae):
    batch, whole, parts = waves(8), learner_of(vae), learner_of(vae)
    train(whole, batch, 4)
    train(whole, batch, 3, first=4)
    train(parts, batch, 4)
    resumed = learner_of(vae)
    resumed.model.load_state_dict(parts.model.state_dict())
    resumed.load_optimizer({name: tensor.clone() for name, tensor in parts.optimizer_tensors().items()})
    torch.manual_seed(99)
    train(resumed, batch, 3, first=4)
    assert all(torch.equal(a, b) for a, b in zip(all_of(whole), all_of(resumed), strict=True))


def all_of(learner: VAELearner) -> list[torch.Tensor]:
    tensors = learner.model.state_dict() | learner.optimizer_tensors()
    return [tensors[name] for name in sorted(tensors)]


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_an_update_that_is_not_finite_changes_nothing(adversarial):
    learner = learner_of(dataclasses.replace(SMALL, variance="optimal", adversarial=adversarial))
    train(learner, waves(16), 2)
    before = [tensor.clone() for tensor in all_of(learner)]
    images, labels = waves(16)
    images[0, 0, 0, 0] = math.nan
    assert not learner.update(Batch(images, labels), generator(0, "x"), 1e-3).finite
    assert all(torch.equal(a, b) for a, b in zip(before, all_of(learner), strict=True))


def test_nothing_moves_where_only_the_critic_fails(monkeypatch):
    learner = learner_of(dataclasses.replace(SMALL, adversarial=0.1))
    train(learner, waves(16), 2)
    before = [tensor.clone() for tensor in all_of(learner)]
    monkeypatch.setattr(learner.critic.optimizer, "clip_gradients", lambda: False)
    images, labels = waves(16)
    assert not learner.update(Batch(images, labels), generator(0, "x"), 1e-3).finite
    assert all(torch.equal(a, b) for a, b in zip(before, all_of(learner), strict=True))


@pytest.mark.parametrize("vae", [SMALL, CODEC, dataclasses.replace(SMALL, latents=100)])
def test_a_picture_is_a_function_of_its_own_noise_and_class(vae):
    model, labels = model_of(vae), torch.tensor([0, 1, 0, 1])
    steps = list(model.sample(noise_for(4), labels, Drawing()))
    assert len(steps) == 1 and steps[0].x0.abs().max() <= 1
    assert torch.equal(steps[0].x, noise_for(4)(0))
    alone = next(model.sample(noise_source([3], [2], (1, 8, 8)), labels[2:3], Drawing()))
    # Batches of other sizes are summed up in another order.
    assert torch.allclose(alone.x0, steps[0].x0[2:3], atol=1e-5)
    other = next(model.sample(noise_for(4), 1 - labels, Drawing()))
    assert not torch.allclose(other.x0, steps[0].x0, atol=1e-3)


def test_without_labels_classes_are_drawn_as_often_as_they_are_trained_on():
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    share = (classes_of(DATA, normal) == 1).float().mean()
    # Four standard errors.
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 20_000))
    assert next(model_of().sample(noise_for(3), None, Drawing())).x0.shape == (3, 1, 8, 8)


def test_a_model_without_classes_takes_none():
    model = model_of(data=DataConfig(8, 3))
    images = waves(4, channels=3).images
    assert model.decode(model.encode(images, None), None).shape == images.shape
    assert next(model.sample(noise_for(2, channels=3), None, Drawing())).x0.shape == (2, 3, 8, 8)


def test_the_way_between_two_latents_keeps_their_length():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(5, 6, generator=rng)) * 2 for _ in range(2))
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    assert torch.allclose(slerp(a, b, 0.3).norm(dim=1), torch.full((5,), 2.0), atol=1e-5)
    assert torch.allclose(slerp(a, a, 0.5), a) and slerp(a, -a, 0.5).isfinite().all()
    assert slerp(torch.zeros(1, 3), b[:1, :3], 0.5).isfinite().all()


def test_shows_reconstructions_and_interpolations(trained):
    learner, batch = trained
    some = Batch(batch.images[:3], torch.tensor([0, 1, 0]))
    shown = learner.model.shows(noise_for(3), some)
    original, back = shown["reconstructions"]
    assert torch.equal(original, some.images)
    columns = shown["interpolation"]
    assert len(columns) == 8 and {column.shape for column in columns} == {original.shape}
    # Each row ends where the next one begins.
    assert torch.allclose(columns[-1], columns[0].roll(-1, 0), atol=1e-4)
    assert ((back - original) ** 2).mean() < original.var()
    one = learner.model.shows(noise_for(1), Batch(batch.images[:1], batch.labels[:1]))
    assert all(column.isfinite().all() for column in one["interpolation"])


def test_patch_distance_knows_blur_and_not_place():
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert patch_distance(images, images, generator(0, "p")) == 0
    assert patch_distance(images, blurred, generator(0, "p")) > 0.5
    # The same patches in another order, but for those along the edge.
    assert patch_distance(images, images.roll(4, 3), generator(0, "p")) < 0.15


def gradient_energy(images: torch.Tensor) -> float:
    return float((images.diff(dim=2) ** 2).mean() + (images.diff(dim=3) ** 2).mean())


def energy_of(**terms: float) -> tuple[float, float]:
    """Of reconstructions and of pictures: noise under waves, which four latents cannot tell."""
    images, labels = waves(16)
    images = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    learner = learner_of(dataclasses.replace(SMALL, **terms))
    train(learner, Batch(images, labels), 30, rate=1e-2)
    back = learner.model.decode(learner.model.encode(images, labels), labels)
    return gradient_energy(back), gradient_energy(images)


@pytest.fixture(scope="module")
def plain_energy() -> float:
    plain, real = energy_of()
    assert plain < 0.8 * real, "blurred"
    return plain


@pytest.mark.parametrize("term", [{"patch_term": 30.0}, {"adversarial": 3.0}])
def test_the_optional_terms_make_reconstructions_sharper(term, plain_energy):
    assert energy_of(**term)[0] > 1.15 * plain_energy


@pytest.mark.parametrize("size", [8, 28, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_preset_has_about_as_many_parameters_as_the_unet(size, channels):
    data = DataConfig(size, channels, tuple("0123456789"))
    vae, unet = (build_model(preset(data, name), CPU) for name in ("vae", "diffusion"))
    counts = [count_parameters(vae), count_parameters(unet)]
    assert counts[0] == pytest.approx(counts[1], rel=0.15)


@pytest.mark.parametrize("size", [4, 12, 16, 40, 48, 96, 1008])
def test_the_preset_takes_every_size_that_the_unet_takes(size):
    data = DataConfig(size, 3)
    check_size(preset(data, "diffusion"))
    check_size(preset(data, "vae"))
    if size <= 96:
        model = build_model(preset(data, "vae"), CPU)
        assert next(model.sample(noise_for(1, size, 3), None, Drawing())).x0.shape == (1, 3, size, size)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bottleneck": "vektor"}, "vector"),
        ({"variance": "fixed"}, "optimal"),
        ({"channels": (30, 60)}, "multiples of vae.groups"),
        ({"channels": ()}, "at least 1"),
        ({"latents": 0}, "at least 1"),
        ({"channels": (32,) * 40}, "too large"),
        ({"latents": 10**9}, "too large"),
        ({"free_bits": -0.1}, "at least 0"),
        ({"free_bits": math.nan}, "above"),
        ({"adversarial": -0.5}, "at least 0"),
        ({"attention": True, "channels": (32, 48)}, "multiple of 32"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_a_sentence(settings, said):
    with pytest.raises(UserError, match=said):
        VAEConfig(**settings)


def test_a_run_by_the_command_line(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the built-in digits come with scikit-learn")
    small = tmp_path / "small.toml"
    small.write_text("[vae]\nchannels = [8, 16]\nlatents = 8\nadversarial = 0.05\n")
    words = ["train", "builtin:digits", "--model", "vae", "--steps", "2", "--batch", "16", "--config", str(small)]
    assert cli([*words, "--precision", "fp32", "--out", str(tmp_path / "run")]) == 0
    run = Run.open(tmp_path / "run")
    assert {"held_out_loss", "KL bits"} <= {name for line in run.metrics() for name in line}
    assert cli(["sample", str(run.path), "--count", "2", "--classes", "3"]) == 0
    assert len(list((run.path / "samples").glob("*.png"))) == 2
    assert cli(["evaluate", str(run.path), "--measure", "bits", "--unconditional"]) == 2
    assert "leave --unconditional away" in capsys.readouterr().err


def test_the_codec_is_a_choice_in_a_file():
    vae = dataclasses.replace(vae_for(DataConfig(32, 3)), bottleneck="map", latents=4)
    model = build_model(config_of(vae, DataConfig(32, 3)), CPU)
    assert isinstance(model, VAEModel) and model.shape == (4, 8, 8)
