"""Generative adversarial networks: a generator makes pictures, a critic compares them with real ones.

With D the critic's score, x a real picture and y a generated one of the same class, the two losses are

    generator  softplus(-(D(y) - D(x)))
    critic     softplus(-(D(x) - D(y))) + gamma s^2 / 2 (|grad D(x)|^2 + |grad D(y)|^2)

where s^2, the pixels of a picture times their variance, makes gamma mean the same for pictures of any size. gamma
falls while the first images are seen: a critic that is held back finds the outlines, a freer one the details.
Each generated picture is compared with a real one, so the generator cannot win by making one good picture over and
over; the two penalties (R1, R2) let training converge. (Huang et al. 2024, arXiv:2501.05441; Jolicoeur-Martineau 2018,
arXiv:1807.00734; Mescheder et al. 2018, arXiv:1801.04406.)

Both networks are updated from one pass: the gradient of D at the generated pictures is what the penalty measures and
what the generator learns from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snowmelt.config import Config, GANConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.editing import slerp
from snowmelt.diffusion.walk import NoiseSource, Step
from snowmelt.models.augment import Change, draw_change
from snowmelt.models.base import Drawing, Model, Update, classes_of, count_parameters, finished, latents_of
from snowmelt.models.optimizer import Optimizer, step_together, under
from snowmelt.networks.adversarial import Critic, Generator
from snowmelt.seeds import seeded
from snowmelt.shapes import Features, Images, Labels, Levels

BETAS = (0.0, 0.99)
"""Of Adam: no momentum, since the other network has moved on by the next step."""
COLUMNS = 8
"""Pictures on the way from one to another."""


class GANModel(Model):
    """The generator; all that drawing needs."""

    at_once: ClassVar[bool] = True

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        data = config.data
        self.generator = Generator(config.gan, channels=data.channels, size=data.size, classes=len(data.classes))

    def images(self, latents: Features, labels: Labels | None) -> Images:
        """Pictures, nearly in [-1, 1], in float32, computed in the run's precision."""
        with self.precision.autocast():
            images = self.generator(latents, labels)
        return images.float()

    def labels(self, chance: Levels, labels: Labels | None) -> Labels | None:
        """Where no class is asked for, one chosen by `chance`, (batch,) standard normal, as often as in training."""
        classes = len(self.config.data.classes)
        if not classes:
            return None
        drawn = classes_of(self.config.data, chance)
        return drawn if labels is None else torch.where(labels < classes, labels, drawn)

    def start(self, noise: NoiseSource, labels: Labels | None) -> tuple[Features, Labels | None]:
        """The latents and the classes that pictures are made from."""
        values = latents_of(noise, self.config.gan.latents + 1)
        return values[:, 1:], self.labels(values[:, 0], labels)

    def sample(self, noise: NoiseSource, labels: Labels | None, drawing: Drawing) -> Iterator[Step]:
        """From noise to pictures in one step: see `Model`."""
        del drawing
        self.eval()
        with torch.no_grad():
            x0 = self.images(*self.start(noise, labels)).clamp(-1, 1)
        yield finished(noise(0), x0)

    def shows(self, noise: NoiseSource, held_out: Batch) -> dict[str, list[Images]]:
        """In each row the way from one picture to another of its class: see `Model`."""
        self.eval()
        count = self.config.gan.latents
        values = latents_of(noise, 2 * count + 1)
        labels = self.labels(values[:, 0], held_out.labels)
        first, last = values[:, 1 : count + 1], values[:, count + 1 :]
        with torch.no_grad():
            way = [self.images(slerp(first, last, i / (COLUMNS - 1)), labels).clamp(-1, 1) for i in range(COLUMNS)]
        return {"interpolation": way}


class Compared(NamedTuple):
    """What the critic said of real and generated pictures, and how steep it is there."""

    real: Levels
    generated: Levels
    slopes: Images
    """The gradient of its score at each generated picture."""
    r1: Tensor
    r2: Tensor
    """Mean squared norms of its gradient at real and at generated pictures."""


class GANLearner:
    """Trains a `GANModel` against a critic, which no drawing needs and only checkpoints of the training hold."""

    def __init__(self, model: GANModel) -> None:
        self.model = model
        self.config = model.config
        data, training = self.config.data, self.config.training
        with seeded(training.seed, "critic"):
            critic = Critic(self.config.gan, channels=data.channels, size=data.size, classes=len(data.classes))
        self.critic = critic.to(model.precision.device)
        self.distance = data.channels * data.size**2 * data.std**2
        self.seen = 0
        self.optimizers = {
            "generator": Optimizer(model, training, dtype=model.precision.dtype, betas=BETAS),
            "critic": Optimizer(self.critic, training, dtype=model.precision.dtype, betas=BETAS),
        }

    @property
    def averaged(self) -> nn.Module:
        """The generator."""
        return self.model

    @property
    def parameters(self) -> int:
        """Of the generator and the critic."""
        return count_parameters(self.model, self.critic)

    def update(self, batch: Batch, rng: torch.Generator, learning_rate: float) -> Update:
        """One step of both networks, from the same pictures: see `Learner`."""
        self.model.train()
        images, labels = batch
        gan = self.config.gan
        latents = torch.randn(len(images), gan.latents, generator=rng, device=images.device)
        change = draw_change(len(images), self.config.data.size, gan.augment, rng)
        fake = self.model.images(latents, labels)
        seen = self.compare(images, fake.detach(), labels, change)
        margin = seen.real - seen.generated
        critic = F.softplus(-margin).mean()
        loss = F.softplus(margin).mean()
        values = {"loss": loss, "critic": critic, "r1": seen.r1, "r2": seen.r2}
        losses = {name: value.item() for name, value in values.items()}
        penalty = gamma_at(gan, self.seen) * self.distance / 2 * (seen.r1 + seen.r2)
        (critic + penalty).backward(inputs=list(self.critic.parameters()))
        # d loss / d D(y) = -sigmoid(D(x) - D(y)), and d D(y) / d y is at hand.
        share = margin.detach().sigmoid()[:, None, None, None] / len(images)
        fake.backward(-share * seen.slopes)
        finite = step_together(self.optimizers.values(), learning_rate)
        self.seen += len(images) if finite else 0
        return Update(losses, finite)

    def compare(self, real: Images, generated: Images, labels: Labels | None, change: Change) -> Compared:
        """Ask the critic about both, changed alike; in float32, whose range the penalties need."""
        shown = torch.cat([real, generated]).requires_grad_()
        seen = torch.cat([change(half) for half in shown.chunk(2)])
        scores: Tensor = self.critic(seen, None if labels is None else labels.repeat(2))
        (slopes,) = torch.autograd.grad(scores.sum(), shown, create_graph=True)
        r1, r2 = (half.square().flatten(1).sum(1).mean() for half in slopes.chunk(2))
        of_real, of_generated = scores.chunk(2)
        return Compared(of_real, of_generated, slopes.chunk(2)[1].detach(), r1, r2)

    def held_out(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """The critic's loss for each picture next to generated ones, and its score: see `Learner`.

        A critic that knows its training pictures by heart scores them higher, and so has a lower loss on them.
        """
        self.model.eval()
        images, labels = batch
        latents = torch.randn(len(images), self.config.gan.latents, generator=rng, device=images.device)
        with torch.no_grad():
            fake = self.model.images(latents, labels)
            score, typical = self.critic(images, labels), self.critic(fake, labels).mean()
        return {"held_out_loss": F.softplus(typical - score), "critic score": score}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The critic's weights as `critic/<weight>`, and of each network `<network> optimizer/<weight>/<quantity>`."""
        weights = {f"critic/{name}": weight for name, weight in self.critic.state_dict().items()}
        states = {
            f"{network} optimizer/{name}": value
            for network, optimizer in self.optimizers.items()
            for name, value in optimizer.tensors().items()
        }
        return {"images seen": torch.tensor(self.seen), **weights, **states}

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        self.seen = int(tensors["images seen"])
        self.critic.load_state_dict(under(tensors, "critic/"))
        for network, optimizer in self.optimizers.items():
            optimizer.load(under(tensors, f"{network} optimizer/"))


def gamma_at(config: GANConfig, seen: int) -> float:
    """The weight of the penalties after so many images.

    >>> [round(gamma_at(GANConfig(gamma=0.1, gamma_last=0.001, burn_in=100), n), 6) for n in (0, 50, 100, 900)]
    [0.1, 0.01, 0.001, 0.001]
    """
    share = min(1.0, seen / config.burn_in) if config.burn_in else 1.0
    return config.gamma ** (1 - share) * config.gamma_last**share
