"""Variational autoencoders: a picture is described by a few numbers, and drawn from them.

    z ~ q(z | x) = N(mean, exp(log_variance)),     p(x | z) = Gaussian in the bins of 8 bits
    prior p(z) = N(0, I), or with classes p(z | c) = N(mean_c, exp(log_variance_c)), learned
    -log p(x) <= -log p(x | z) + KL(q(z | x) || p(z)),      in bits/dim, like the bound of diffusion

A fresh z becomes a new picture; the mean of q(z | x), scaled to variance 1, is the latent of a codec. The decoder's
variance weighs the two terms against each other, so it is part of the model and never a constant. With one prior for
all classes an encoder would have to forget the class first, which saves 3.3 bits of some 80 (MNIST) and is not learned
in minutes.
(Kingma & Welling 2013, arXiv:1312.6114; Sohn et al. 2015 for the prior of a class; Rybkin et al. 2021,
arXiv:2006.13202, for the variance; Kingma et al. 2016, arXiv:1606.04934, for the free bits.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snowmelt.config import Config, DataConfig
from snowmelt.data.stream import Batch
from snowmelt.device import Precision
from snowmelt.diffusion.editing import slerp
from snowmelt.diffusion.process import data_term, gaussian_kl
from snowmelt.diffusion.walk import NoiseSource, Step
from snowmelt.errors import choose
from snowmelt.models.base import Drawing, Model, Update, classes_of, count_parameters, finished, latents_of
from snowmelt.models.optimizer import Optimizer, step_together
from snowmelt.models.sharpness import CRITIC, CRITIC_STATE, Critic, patch_distance
from snowmelt.networks.autoencoder import Autoencoder
from snowmelt.shapes import Answers, Images, Labels, Level, Levels

COLUMNS = 8
"""Pictures from one held-out picture to another."""
ACTIVE = 0.01
"""Variance over pictures of the mean of a latent from which it counts as used (Burda et al. 2015, arXiv:1509.00519)."""
SLOWEST = 0.02
"""Share of a batch in the running measurements, after the first fifty."""
PACE = 10.0
"""How much faster the priors of the classes learn than the networks, whose latents they follow."""
LEAST_LOG_STD = -5.0
"""Of the decoder: below this (0.9 grey levels) a smaller one says nothing more about 8-bit pixels."""


def running(old: Tensor, new: Tensor, updates: Tensor) -> None:
    """Move a running mean towards `new`, in place: the plain mean at first, then by `SLOWEST`."""
    old.lerp_(new.detach().to(old.dtype), (1 / updates).clamp(min=SLOWEST).to(old.dtype))


class Optimal(nn.Module):
    """One variance for all values of all pictures: the mean squared error, the best that a constant can be."""

    ANSWERS = 1
    mean_square: Tensor

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        self.register_buffer("mean_square", torch.tensor(data.std**2))

    def forward(self, answer: Answers) -> tuple[Images, Tensor]:
        """Mean and log of the standard deviation of each value."""
        return answer, self.mean_square.log().clamp(min=2 * LEAST_LOG_STD) / 2

    def observe(self, squared_error: Level, updates: Tensor) -> None:
        """Take in the error of a batch."""
        running(self.mean_square, squared_error, updates)


class Learned(nn.Module):
    """A variance for each place and channel, the same in all pictures."""

    ANSWERS = 1

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((1, data.channels, data.size, data.size), math.log(data.std)))

    def forward(self, answer: Answers) -> tuple[Images, Tensor]:
        """Mean and log of the standard deviation of each value."""
        return answer, bounded(self.log_std)

    def observe(self, squared_error: Level, updates: Tensor) -> None:
        """It learns by its gradient."""


class Told(nn.Module):
    """A variance that the decoder tells for each value of each picture."""

    ANSWERS = 2

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        self.first = math.log(data.std)

    def forward(self, answer: Answers) -> tuple[Images, Tensor]:
        """Mean and log of the standard deviation of each value."""
        mean, told = answer.chunk(2, dim=1)
        return mean, bounded(told + self.first)

    def observe(self, squared_error: Level, updates: Tensor) -> None:
        """It learns by its gradient."""


def bounded(log_std: Tensor) -> Tensor:
    """Nearly `log_std` itself, and never below `LEAST_LOG_STD`."""
    return LEAST_LOG_STD + F.softplus(log_std - LEAST_LOG_STD)


VARIANCES: dict[str, type[Optimal | Learned | Told]] = {"optimal": Optimal, "learned": Learned, "told": Told}
"""Variances of the decoder, by name."""


def by_latent(values: Tensor) -> Tensor:
    """(batch, latents) or (batch, latents, height, width) as (batch, latents, places)."""
    return values.reshape(*values.shape[:2], -1)


class Latents(NamedTuple):
    """A Gaussian for the latents of each picture: (batch, latents) or (batch, latents, height, width) each."""

    mean: Tensor
    log_variance: Tensor

    @property
    def std(self) -> Tensor:
        """The standard deviation."""
        return (self.log_variance / 2).exp()

    def draw(self, noise: Tensor) -> Tensor:
        """Latents for standard normal noise."""
        return self.mean + self.std * noise

    def noise(self, latents: Tensor) -> Tensor:
        """The noise that they are drawn by: the inverse of `draw`."""
        return (latents - self.mean) / self.std

    def kl(self, prior: Latents) -> Tensor:
        """(batch, latents) nats: KL(self || prior), summed over the places of a map."""
        each = gaussian_kl(self.mean, self.log_variance.exp(), prior.mean, prior.log_variance.exp())
        return by_latent(each).sum(2)


class Guess(NamedTuple):
    """A batch through the autoencoder and back."""

    posterior: Latents
    kl: Tensor
    """(batch, latents) nats."""
    picture: Images
    """The mean of p(x | z)."""
    reconstruction: Levels
    """-log p(x | z), bits/dim."""


class VAEModel(Model):
    """Encoder, decoder and the decoder's variance, with what was measured of the latents while they learned."""

    at_once: ClassVar[bool] = True
    latent_means: Tensor
    latent_squares: Tensor
    updates: Tensor

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        data, vae = config.data, config.vae
        self.variance = choose(VARIANCES, vae.variance, "vae.variance")(data)
        self.network = Autoencoder(
            vae, size=data.size, channels=data.channels, classes=len(data.classes), answers=self.variance.ANSWERS
        )
        side = data.size // vae.divisor
        self.shape = (vae.latents,) if vae.is_vector else (vae.latents, side, side)
        """Of the latents of one picture."""
        self.priors = nn.Embedding(max(1, len(data.classes)), 2 * vae.latents)
        nn.init.zeros_(self.priors.weight)
        self.dims = data.channels * data.size**2 * math.log(2)
        """Nats of a picture that are one bit/dim."""
        # Moments and no deviations: their running averages are the moments of all that was averaged.
        self.register_buffer("latent_means", torch.zeros(vae.latents))
        self.register_buffer("latent_squares", torch.ones(vae.latents))
        self.register_buffer("updates", torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        """A number: what the posterior means are multiplied by to have variance 1 over the training pictures."""
        return (self.latent_squares.mean() - self.latent_means.mean() ** 2).clamp(min=1e-8).rsqrt()

    @property
    def active(self) -> int:
        """Latents that tell something of a picture: see `ACTIVE`."""
        return int((self.latent_squares - self.latent_means**2 > ACTIVE).sum())

    def prior(self, labels: Labels | None, count: int) -> Latents:
        """p(z) of each of `count` pictures of these classes."""
        if labels is None:
            zeros = torch.zeros((count, *self.shape), device=self.precision.device)
            return Latents(zeros, zeros)
        told = PACE * self.priors(labels)
        # A map has the same prior at all of its places.
        mean, log_variance = told.view(*told.shape, *(1 for _ in self.shape[1:])).chunk(2, dim=1)
        return Latents(mean, log_variance)

    def posterior(self, images: Images, labels: Labels | None) -> Latents:
        """What the encoder thinks of pictures."""
        with self.precision.autocast():
            told = self.network.encoder(images, self.network.embed(labels, len(images)))
        mean, log_variance = told.float().chunk(2, dim=1)
        return Latents(mean, log_variance.clamp(-20, 10))

    def answer(self, latents: Tensor, embedding: Tensor) -> tuple[Images, Tensor]:
        """Mean and log of the standard deviation of p(x | z)."""
        with self.precision.autocast():
            answer = self.network.decoder(latents, embedding)
        return self.variance(answer.float())

    def through(self, images: Images, labels: Labels | None, noise: Tensor) -> Guess:
        """Pictures to latents and back, by a draw of q(z | x)."""
        posterior = self.posterior(images, labels)
        kl = posterior.kl(self.prior(labels, len(images)))
        mean, log_std = self.answer(posterior.draw(noise), self.network.embed(labels, len(images)))
        nats = data_term(images, mean, log_std.exp()).flatten(1).mean(1)
        return Guess(posterior, kl, mean, nats / math.log(2))

    def any_noise(self, count: int, rng: torch.Generator) -> Tensor:
        """Standard normal values for the latents of `count` pictures."""
        return torch.randn((count, *self.shape), generator=rng, device=self.precision.device)

    @torch.no_grad()
    def bits(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """The bound at one draw of each picture's latents, and its two terms: see `Model`."""
        self.eval()
        guess = self.through(batch.images, batch.labels, self.any_noise(len(batch.images), rng))
        kl = guess.kl.sum(1) / self.dims
        return {"bound": guess.reconstruction + kl, "reconstruction": guess.reconstruction, "KL": kl}

    @torch.no_grad()
    def encode(self, images: Images, labels: Labels | None) -> Tensor:
        """(batch, *shape): the posterior means, scaled to variance 1."""
        self.eval()
        return self.scale * self.posterior(images, labels).mean

    @torch.no_grad()
    def decode(self, latents: Tensor, labels: Labels | None) -> Images:
        """Scaled latents to pictures in [-1, 1]: the inverse of `encode`, up to the reconstruction error."""
        self.eval()
        return self.pictured(latents / self.scale, self.network.embed(labels, len(latents)))

    @torch.no_grad()
    def pictured(self, latents: Tensor, embedding: Tensor) -> Images:
        """Latents as they are to pictures in [-1, 1]."""
        return self.answer(latents, embedding)[0].clamp(-1, 1)

    def sample(self, noise: NoiseSource, labels: Labels | None, drawing: Drawing) -> Iterator[Step]:
        """One step: a draw of the prior, decoded. Without `labels` each picture's class is drawn too: see `Model`."""
        del drawing
        self.eval()
        start = noise(0)
        drawn = latents_of(noise, math.prod(self.shape) + 1)
        if labels is None and self.config.data.classes:
            labels = classes_of(self.config.data, drawn[:, -1])
        with torch.no_grad():
            latents = self.prior(labels, len(start)).draw(drawn[:, :-1].unflatten(1, self.shape))
            picture = self.pictured(latents, self.network.embed(labels, len(start)))
        yield finished(start, picture)

    @torch.no_grad()
    def shows(self, noise: NoiseSource, held_out: Batch) -> dict[str, list[Images]]:
        """Reconstructions by a draw of q(z | x), and the way from each picture to the next one: see `Model`."""
        self.eval()
        images, labels = held_out
        posterior, prior = self.posterior(images, labels), self.prior(labels, len(images))
        embedding = self.network.embed(labels, len(images))
        drawn = latents_of(noise, math.prod(self.shape)).unflatten(1, self.shape)
        back = self.pictured(posterior.draw(drawn), embedding)
        ends = prior.noise(posterior.mean)
        columns: list[Images] = []
        for share in torch.linspace(0, 1, COLUMNS).tolist():
            mean, log_variance, told = (x.lerp(x.roll(-1, 0), share) for x in (*prior, embedding))
            latents = Latents(mean, log_variance).draw(slerp(ends, ends.roll(-1, 0), share))
            columns.append(self.pictured(latents, told))
        return {"reconstructions": [images, back], "interpolation": columns}

    @torch.no_grad()
    def observe(self, images: Images, guess: Guess) -> None:
        """Take in what a training batch says of the latents and of the error."""
        self.updates.add_(1)
        means = by_latent(guess.posterior.mean)
        running(self.latent_means, means.mean((0, 2)), self.updates)
        running(self.latent_squares, (means**2).mean((0, 2)), self.updates)
        self.variance.observe(((guess.picture.clamp(-1, 1) - images) ** 2).mean(), self.updates)


class VAELearner:
    """Trains a `VAEModel` by the bound."""

    def __init__(self, model: VAEModel) -> None:
        self.model, self.config = model, model.config
        self.optimizer = Optimizer(model, self.config.training, dtype=model.precision.dtype)
        self.critic = Critic(self.config, model.precision) if self.config.vae.adversarial else None

    @property
    def averaged(self) -> nn.Module:
        """The whole model."""
        return self.model

    @property
    def parameters(self) -> int:
        """Of encoder, decoder and, where there is one, the critic."""
        return count_parameters(self.model, *([] if self.critic is None else [self.critic.network]))

    def _guess(self, batch: Batch, rng: torch.Generator) -> Guess:
        return self.model.through(batch.images, batch.labels, self.model.any_noise(len(batch.images), rng))

    def update(self, batch: Batch, rng: torch.Generator, learning_rate: float) -> Update:
        """One step at one draw of each picture's latents: see `Learner`."""
        self.model.train()
        guess = self._guess(batch, rng)
        kl, reconstruction, dims = guess.kl.mean(0), guess.reconstruction.mean(), self.model.dims
        places = math.prod(self.model.shape[1:])
        free = self.config.vae.free_bits * math.log(2) * places
        loss = reconstruction + kl.clamp(min=free).sum() / dims
        for weight, term in self._sharpeners():
            loss = loss + weight * term(batch.images, guess.picture, rng)
        losses = {"reconstruction": reconstruction.item(), "kl": (kl.sum() / dims).item()}
        losses = {"loss": sum(losses.values()), **losses}
        if not math.isfinite(loss.item() + losses["loss"]):
            return Update(losses, finite=False)
        loss.backward()
        optimizers = [self.optimizer]
        if self.critic is not None:
            self.critic.learn(batch.images, guess.picture)
            optimizers.append(self.critic.optimizer)
        finite = step_together(optimizers, learning_rate)
        if finite:
            self.model.observe(batch.images, guess)
        return Update(losses, finite)

    def _sharpeners(self) -> list[tuple[float, Callable[[Images, Images, torch.Generator], Tensor]]]:
        """The optional terms and their weights."""
        vae, terms = self.config.vae, list[tuple[float, Callable[[Images, Images, torch.Generator], Tensor]]]()
        if vae.patch_term:
            terms.append((vae.patch_term, patch_distance))
        critic = self.critic
        if critic is not None:
            terms.append((vae.adversarial, lambda _images, picture, _rng: -critic.opinion(picture).mean()))
        return terms

    @torch.no_grad()
    def held_out(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """The bound and its two terms in bits/dim, the squared error, and the latents in use: see `Learner`."""
        self.model.eval()
        guess = self._guess(batch, rng)
        kl = guess.kl.sum(1) / self.model.dims
        error = ((guess.picture.clamp(-1, 1) - batch.images) ** 2).flatten(1).mean(1)
        return {
            "held_out_loss": guess.reconstruction + kl,
            "reconstruction bits": guess.reconstruction,
            "KL bits": kl,
            "squared error": error,
            "active latents": torch.full_like(kl, self.model.active),
        }

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Momenta and step counts, and the critic: see `Learner`."""
        return self.optimizer.tensors() | ({} if self.critic is None else self.critic.tensors())

    def load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        mine = {name for name in tensors if not name.startswith((CRITIC, CRITIC_STATE))}
        self.optimizer.load({name: tensors[name] for name in mine})
        if self.critic is not None:
            self.critic.load(tensors)
