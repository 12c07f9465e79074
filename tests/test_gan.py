"""The GAN: its losses and penalties are those of the definitions, changes do not leak, and resuming is exact."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import stirred
from snowmelt.config import Config, DataConfig, GANConfig, TrainingConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.editing import slerp
from snowmelt.errors import UserError
from snowmelt.models import build_learner, build_model
from snowmelt.models.augment import AUGMENTATIONS, SHIFT, draw_change
from snowmelt.models.base import Drawing
from snowmelt.models.gan import GANLearner, GANModel, gamma_at
from snowmelt.networks.adversarial import Critic, Generator, sizes
from snowmelt.presets import MOST_AUGMENT, augment_for, preset
from snowmelt.seeds import generator, noise_source

CPU = Precision(torch.device("cpu"))
NAMES = ("a", "b", "c")


def config(
    *, classes: tuple[str, ...] = NAMES, counts: tuple[int, ...] = (), gan: GANConfig | None = None, size: int = 9
) -> Config:
    data = DataConfig(size, 3, classes, counts)
    small = gan or GANConfig(channels=(8, 16), latents=8)
    return Config(data, "gan", gan=small, training=TrainingConfig(steps=9, batch=6, optimizer="adamw"))


def learner(chosen: Config | None = None) -> GANLearner:
    built = build_learner(chosen or config(), CPU)
    assert isinstance(built, GANLearner)
    return built


def batch(count: int = 6, *, size: int = 9, classes: int = 3, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=rng) if classes else None
    return Batch(torch.rand(count, 3, size, size, generator=rng) * 2 - 1, labels)


def noise(count: int, *, size: int = 9, first: int = 0):
    return noise_source([0] * count, range(first, first + count), (3, size, size))


# ---- the objective


def test_one_pass_gives_both_gradients_of_the_definition():
    """The shortcut, the critic's own slopes handed to the generator, equals differentiating the two losses."""
    mine = learner(config(gan=GANConfig(channels=(8, 16), latents=8, gamma=0.01)))
    # Pictures of 3 x 9 x 9 values with a standard deviation of 0.5.
    weight_of_penalties = 0.01 * 243 * 0.25
    stirred(mine.critic)
    stirred(mine.model)
    taught: dict[str, dict[str, Tensor]] = {}

    def keep(name: str, module: nn.Module):
        def look(_rate: float) -> None:
            taught[name] = {key: weight.grad.clone() for key, weight in module.named_parameters()}

        return look

    for name, optimizer in mine.optimizers.items():
        optimizer.clip = math.inf
        optimizer.move = keep(name, optimizer.module)
    images, labels = batch()
    update = mine.update(Batch(images, labels), generator(0, "one"), 1e-3)
    assert update.finite

    latents = torch.randn(6, 8, generator=generator(0, "one"))
    fake = mine.model.generator(latents, labels)
    real, made = mine.critic(images, labels), mine.critic(fake, labels)
    loss = F.softplus(-(made - real)).mean()
    mine.model.zero_grad()
    loss.backward()
    for key, weight in mine.model.named_parameters():
        torch.testing.assert_close(weight.grad, taught["generator"][key], rtol=1e-4, atol=1e-7)

    mine.critic.zero_grad()
    penalties = []
    for pictures in (images, fake.detach()):
        asked = pictures.clone().requires_grad_()
        (slope,) = torch.autograd.grad(mine.critic(asked, labels).sum(), asked, create_graph=True)
        penalties.append(slope.flatten(1).norm(dim=1).square().mean())
    critic = F.softplus(-(mine.critic(images, labels) - mine.critic(fake.detach(), labels))).mean()
    (critic + weight_of_penalties / 2 * sum(penalties)).backward()
    for key, weight in mine.critic.named_parameters():
        torch.testing.assert_close(weight.grad, taught["critic"][key], rtol=1e-4, atol=1e-6)
    expected = {"loss": loss, "critic": critic, "r1": penalties[0], "r2": penalties[1]}
    assert update.losses == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)


def test_the_penalty_weakens_with_the_images_seen_and_resumes_where_it_was():
    fading = GANConfig(channels=(8, 16), latents=8, gamma=1.0, gamma_last=0.01, burn_in=12)
    mine, resumed = learner(config(gan=fading)), learner(config(gan=fading))
    mine.update(batch(), generator(0, "one"), 1e-3)
    assert gamma_at(fading, mine.seen) == pytest.approx(0.1), "six of twelve images are half of the way, in factors"
    resumed.load_optimizer({name: tensor.clone() for name, tensor in mine.optimizer_tensors().items()})
    assert resumed.seen == 6
    assert gamma_at(fading, 99) == 0.01 and gamma_at(GANConfig(burn_in=0), 0) == GANConfig().gamma_last


def test_the_critic_and_the_generator_pull_against_each_other():
    """On one pair of pictures a small step of the critic alone raises the margin; one of the generator lowers it."""
    mine = learner(config(gan=GANConfig(channels=(8, 16), latents=8, gamma=0.0, gamma_last=0.0)))
    stirred(mine.critic)
    images, labels = batch()
    latents = torch.randn(6, 8, generator=generator(0, "pull"))

    def margin() -> float:
        with torch.no_grad():
            return (mine.critic(images, labels) - mine.critic(mine.model.generator(latents, labels), labels)).mean()

    for name, sign in (("critic", 1), ("generator", -1)):
        moving, still = mine.optimizers[name], mine.optimizers[{"critic": "generator", "generator": "critic"}[name]]
        before, move = margin(), still.move
        still.move = lambda _rate: None
        mine.update(Batch(images, labels), generator(0, "pull"), 1e-5)
        still.move = move
        assert sign * (margin() - before) > 0, moving


def test_what_is_not_finite_changes_nothing():
    mine = learner()
    mine.update(batch(), generator(0, "first"), 1e-3)
    before = {name: tensor.clone() for name, tensor in (mine.model.state_dict() | mine.optimizer_tensors()).items()}
    images, labels = batch(seed=1)
    images[2, 0, 3, 3] = math.nan
    assert not mine.update(Batch(images, labels), generator(0, "second"), 1e-3).finite
    after = mine.model.state_dict() | mine.optimizer_tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(weight.grad is None for weight in (*mine.model.parameters(), *mine.critic.parameters()))
    assert mine.update(batch(seed=1), generator(0, "second"), 1e-3).finite


def test_a_generator_alone_that_is_not_finite_holds_the_critic_back(monkeypatch):
    """Both step or neither: else a skipped step would leave a critic that is a step ahead."""
    mine = learner()
    monkeypatch.setattr(mine.optimizers["generator"], "clip_gradients", lambda: False)
    before = {name: tensor.clone() for name, tensor in mine.critic.state_dict().items()}
    assert not mine.update(batch(), generator(0, "first"), 1e-3).finite
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.critic.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(optimizer):
    """k + n steps equal k steps, everything through what a checkpoint keeps, and n more; with changes to pictures."""
    chosen = config(gan=GANConfig(channels=(8, 16), latents=8, augment=0.5))
    chosen = dataclasses.replace(chosen, training=dataclasses.replace(chosen.training, optimizer=optimizer))

    def go(of: GANLearner, steps: range) -> None:
        for step in steps:
            of.update(batch(seed=step), generator(0, "train", step), 1e-3)

    whole = learner(chosen)
    go(whole, range(5))
    first, second = learner(chosen), learner(chosen)
    go(first, range(3))
    go(second, range(10, 12))
    second.model.load_state_dict({name: tensor.clone() for name, tensor in first.model.state_dict().items()})
    second.load_optimizer({name: tensor.clone() for name, tensor in first.optimizer_tensors().items()})
    go(second, range(3, 5))
    ends = [of.model.state_dict() | of.optimizer_tensors() for of in (whole, second)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_all_chance_comes_from_the_generator_of_the_step():
    ends = []
    for disturbance in (1, 2):
        mine = learner(config(gan=GANConfig(channels=(8, 16), latents=8, augment=0.5)))
        torch.manual_seed(disturbance)
        mine.update(batch(), generator(0, "train", 1), 1e-3)
        ends.append(torch.cat([weight.flatten() for weight in mine.critic.parameters()]))
    assert torch.equal(*ends)


class Known(nn.Module):
    """A critic that knows some pictures by heart: 5 for each of them, 0 for all others."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.pictures = pictures

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return 5 * (x[:, None] == self.pictures).flatten(2).all(2).any(1).float()


def test_the_gap_shows_a_critic_that_knows_pictures_by_heart():
    mine, known, other = learner(), batch(8), batch(8, seed=1)
    mine.critic = Known(known.images)
    errors = [mine.held_out(some, generator(0, "held out")) for some in (known, other)]
    assert errors[0].keys() == {"held_out_loss", "critic score"}
    for found, score in zip(errors, (5.0, 0.0), strict=True):
        torch.testing.assert_close(found["critic score"], torch.full((8,), score))
        torch.testing.assert_close(found["held_out_loss"], torch.full((8,), math.log1p(math.exp(-score))))


# ---- changes that do not leak


def test_shifts_can_be_told_from_what_is_seen():
    """One lit pixel at places of known frequency: from the shifted ones, by the Fourier transform, its places again.

    The transform of the shifts' own distribution is at least 1 - p everywhere, so dividing by it is safe.
    """
    size, count, p = 8, 20_000, 0.6
    furthest = round(SHIFT * size)
    even = torch.zeros(size)
    even[: furthest + 1] = 1 / (furthest + 1)
    difference = torch.fft.fft(even).abs().square()
    symbol = 1 - p + p * difference
    assert symbol.min() >= 1 - p - 1e-6
    true = torch.tensor([0.3, 0.0, 0.1, 0.0, 0.25, 0.05, 0.0, 0.3])
    rng = torch.Generator().manual_seed(0)
    places = torch.multinomial(true, count, replacement=True, generator=rng)
    pictures = F.one_hot(places, size).float()[:, None, None, :].expand(-1, 1, size, -1)
    active = (torch.rand(count, generator=rng) < p).float()
    seen = AUGMENTATIONS["shift"](active, size, rng)(pictures)[:, 0, 0].mean(0)
    found = torch.fft.ifft(torch.fft.fft(seen) / symbol).real
    # A share of 20,000 draws errs by 0.0035 at most; dividing by 0.4 or more makes that 0.009; three times that.
    assert (found - true).abs().max() < 0.027 < (seen - true).abs().max()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_tones_are_changed_by_numbers_that_can_be_undone(name):
    """Each change is one Gaussian number that adds up over changes: its characteristic function, exp(-s^2 / 2), has no
    zero, so neither has (1 - p) + p exp(-s^2 / 2); and what is not chosen stays as it is."""
    x = batch(4000, size=2, classes=0).images
    active = (torch.arange(len(x)) % 2).float()
    changed = AUGMENTATIONS[name](active, 2, generator(0, name))(x)
    torch.testing.assert_close(changed[::2], x[::2], rtol=0, atol=1e-6)
    grey, grey_before = changed.mean(1), x.mean(1)
    number = {
        "brightness": lambda: (changed - x)[1::2, 0, 0, 0] / 0.2,
        "contrast": lambda: (changed / x)[1::2, 0, 0, 0].log2() / 0.5,
        "saturation": lambda: ((changed - grey[:, None]) / (x - grey_before[:, None]))[1::2, 0, 0, 0].log2(),
    }[name]()
    # Standard normal: of 2,000, mean and deviation err by 0.022 and 0.016; four times that.
    assert abs(number.mean().item()) < 0.09 and abs(number.std().item() - 1) < 0.065
    if name == "saturation":
        torch.testing.assert_close(grey, grey_before, rtol=0, atol=1e-5)


def test_what_cutout_hides_is_seen_in_other_pictures():
    """With probability p a square goes to grey, and pixel by pixel at least 1 - p of the pictures show all there is."""
    size, p = 8, 0.7
    x = torch.ones(4000, 1, size, size)
    rng = generator(0, "cutout")
    active = (torch.rand(len(x), generator=rng) < p).float()
    changed = AUGMENTATIONS["cutout"](active, size, rng)(x)
    assert set(changed.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(changed[active == 0], x[active == 0])
    hidden = (changed[active == 1] == 0).flatten(1).sum(1)
    assert hidden.max() == 16 and hidden.min() >= 4
    # A share of 4,000 errs by 0.008 at most.
    assert changed.mean(0).min() > 1 - p - 0.03


def test_both_halves_are_changed_alike_and_only_where_asked_for():
    x = batch(500).images
    change = draw_change(500, 9, 0.6, generator(0, "change"))
    assert torch.equal(change(x), change(x))
    # Each of five changes leaves a picture alone with 0.4: 1 % of pictures stay, 0.45 % of error at 500.
    same = (change(x) - x).abs().flatten(1).amax(1) < 1e-6
    assert 0 < same.float().mean() < 0.03
    assert draw_change(500, 9, 0.0, generator(0, "change"))(x) is x


def test_changes_keep_gradients_and_second_gradients():
    """All of them are affine, so the Jacobian is what it does to differences, and squares have the second gradients."""
    x, y = batch(3, size=4).images.requires_grad_(), batch(3, size=4, seed=1).images
    change = draw_change(3, 4, 0.9, generator(3, "change"))
    (slope,) = torch.autograd.grad(change(x).square().sum() / 2, x, create_graph=True)
    (second,) = torch.autograd.grad(slope, x, y)
    linear = change(y) - change(torch.zeros_like(y))
    torch.testing.assert_close((slope * y).sum(), (change(x) * linear).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((second * y).sum(), linear.square().sum(), rtol=1e-4, atol=1e-4)


def test_generated_pictures_are_not_changed():
    """What is drawn does not know of the changes: the same weights draw the same, whatever the probability."""
    drawn = []
    for probability in (0.0, 0.7):
        model = build_model(config(gan=GANConfig(channels=(8, 16), latents=8, augment=probability)), CPU)
        *_, step = model.sample(noise(4), torch.tensor([0, 1, 2, 0]), Drawing())
        drawn.append(step.x0)
    assert torch.equal(*drawn)


# ---- the networks


def test_an_answer_depends_on_its_own_picture_only():
    """No statistics of the batch anywhere: pictures may be scored and made in any company, up to rounding."""
    chosen = config(gan=GANConfig(channels=(8, 16, 16), latents=8, blocks=2, patch=3))
    critic = stirred(Critic(chosen.gan, channels=3, size=9, classes=3))
    maker = stirred(Generator(chosen.gan, channels=3, size=9, classes=3))
    images, labels = batch()
    latents = torch.randn(6, 8, generator=generator(0, "own"))
    with torch.no_grad():
        for net, inputs in ((critic, images), (maker, latents)):
            torch.testing.assert_close(net(inputs, labels)[2:3], net(inputs[2:3], labels[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "patch", "sides"), [(28, 2, [14, 7, 4]), (9, 1, [9, 5, 3]), (32, 2, [16, 8, 4])])
def test_any_size_is_halved_and_made_again(size, patch, sides):
    gan = GANConfig(channels=(8, 8, 8), latents=4, patch=patch)
    assert sizes(gan, size) == sides
    made = Generator(gan, channels=1, size=size, classes=0)(torch.zeros(2, 4))
    assert made.shape == (2, 1, size, size)
    assert Critic(gan, channels=1, size=size, classes=0)(made).shape == (2,)


def test_every_weight_learns():
    """After two steps (the first moves the layers that begin at zero) every weight of both networks has moved."""
    mine = learner()
    before = [weight.clone() for weight in (*mine.model.parameters(), *mine.critic.parameters())]
    for step in range(3):
        mine.update(batch(24), generator(0, "train", step), 1e-3)
    names = [name for of in (mine.model, mine.critic) for name, _ in of.named_parameters()]
    after = (*mine.model.parameters(), *mine.critic.parameters())
    still = [name for name, old, new in zip(names, before, after, strict=True) if torch.equal(old, new)]
    # A constant added to every score cancels in every comparison.
    assert still == ["score.bias"]


def test_the_class_counts_for_both_networks():
    mine = learner()
    stirred(mine.critic)
    stirred(mine.model)
    images = batch(2).images
    latents = torch.ones(2, 8)
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        made = mine.model.generator(latents, labels)
        scores = mine.critic(images[:1].repeat(2, 1, 1, 1), labels)
    assert not torch.allclose(made[0], made[1]) and scores[0] != scores[1]


# ---- drawing


def test_a_picture_is_its_own_noise_only():
    model = stirred(build_model(config(), CPU))
    labels = torch.tensor([0, 1, 2, 0])
    *_, whole = model.sample(noise(4), labels, Drawing())
    *_, one = model.sample(noise(1, first=2), labels[2:3], Drawing())
    torch.testing.assert_close(whole.x0[2:3], one.x0, rtol=1e-4, atol=1e-5)
    assert whole.x0.abs().max() <= 1 and not whole.x0.requires_grad
    assert GANModel.at_once and len(list(model.sample(noise(4), labels, Drawing()))) == 1
    assert not torch.allclose(whole.x0[0], whole.x0[3]), "the same class from other noise"


@pytest.mark.parametrize("unasked", [None, torch.full((3000,), 3)])
def test_without_a_class_classes_come_as_often_as_in_training(unasked):
    model = build_model(config(counts=(600, 300, 100)), CPU)
    chance = torch.randn(3000, generator=generator(0, "chance"))
    shares = model.labels(chance, unasked).bincount(minlength=3) / 3000
    # Of 3,000 draws a share errs by 0.009 at most; four times that.
    assert (shares - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 0.036
    asked = torch.arange(3000) % 3
    assert torch.equal(model.labels(chance, asked), asked)


def test_the_way_between_two_pictures():
    """It begins and ends at pictures of their own, and stays at distances that standard normal values have."""
    model = stirred(build_model(config(), CPU))
    held_out = batch(3)
    columns = model.shows(noise(3), held_out)["interpolation"]
    assert len(columns) == 8 and all(column.shape == held_out.images.shape for column in columns)
    assert not torch.allclose(columns[0], columns[-1])
    first, last = torch.randn(2, 200, 512, generator=generator(0, "way"))
    norms = slerp(first, last, 0.5).norm(dim=1) / math.sqrt(512)
    # A straight line would pass at 0.71.
    assert (norms - 1).abs().max() < 0.15
    torch.testing.assert_close(slerp(first, last, 0.0), first)
    torch.testing.assert_close(slerp(first, last, 1.0), last)


# ---- the dial, and mistakes


@pytest.mark.parametrize("size", [8, 28, 32, 64, 128])
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 10), (3, 0)])
def test_both_networks_together_are_as_large_as_the_diffusion_model(size, channels, classes):
    data = DataConfig(size, channels, tuple("0123456789")[:classes])
    gan, rival = (build_learner(preset(data, family), CPU).parameters for family in ("gan", "diffusion"))
    assert abs(gan / rival - 1) < 0.15


@pytest.mark.parametrize("size", [8, 12, 40, 80, 96, 160, 256, 512, 1024])
def test_every_size_that_the_patch_divides_has_a_small_smallest_map(size):
    gan = preset(DataConfig(size, 3), "gan").gan
    assert size % gan.divisor == 0 and sizes(gan, size)[-1] <= 6


def test_the_fewer_pictures_the_more_they_are_changed():
    probabilities = [augment_for(count) for count in (1, 200, 1000, 3000, 10_000, 20_000, 60_000)]
    assert probabilities == sorted(probabilities, reverse=True)
    assert probabilities[0] == MOST_AUGMENT < 0.8 and probabilities[-1] == 0
    assert preset(DataConfig(28, 1, pictures=500), "gan").gan.augment == MOST_AUGMENT
    assert augment_for(0) == 0, "an imported description may not say how many there were"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"channels": ()}, "at least 1"),
        ({"channels": (8, 0)}, "at least 1"),
        ({"latents": 0}, "at least 1"),
        ({"channels": (8, 100_000)}, "too large"),
        ({"channels": (8,) * 40}, "too large"),
        ({"gamma": -0.1}, "at least 0"),
        ({"gamma": math.nan}, "at least 0"),
        ({"gamma": math.inf}, "at least 0"),
        ({"gamma_last": -0.1}, "at least 0"),
        ({"gamma": 0.0}, "0 for both"),
        ({"gamma_last": 0.0}, "0 for both"),
        ({"burn_in": -1}, "a number of images"),
        ({"augment": 1.0}, "from 0 to less than 1"),
        ({"augment": -0.1}, "from 0 to less than 1"),
        ({"augment": math.nan}, "from 0 to less than 1"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(wrong, says):
    with pytest.raises(UserError, match=says) as refused:
        GANConfig(**wrong)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
