"""What makes reconstructions sharp, at a cost in likelihood: a critic of patches, and a distance between patches.

The likelihood prefers a blurred picture to one whose details are in the wrong places; these do not. Neither needs a
network that was trained elsewhere. (The critic as in Esser et al. 2021, arXiv:2012.09841; the distance as in
Heitz et al. 2021, arXiv:2006.07229, on pixels.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from snowmelt.config import Config
from snowmelt.device import Precision
from snowmelt.errors import UserError
from snowmelt.models.optimizer import Optimizer, under
from snowmelt.networks.autoencoder import PatchCritic
from snowmelt.seeds import seeded
from snowmelt.shapes import Images, Level

CRITIC = "critic weights/"
CRITIC_STATE = "critic optimizer/"
PATCH, PROJECTIONS = 5, 24
"""Side of the patches of the patch term, and random directions they are looked at from in each update."""


def patch_distance(images: Images, others: Images, rng: torch.Generator) -> Level:
    """How unlike the patches of each picture are to those of the other one, wherever in it they are: a mean, from 0.

    The sliced Wasserstein distance: patches are looked at from random directions of length 1 (the same for all
    pictures), and their sorted values compared. A blurred picture lacks the large values, so this sharpens, while the
    places of the details are left free. Pictures in [-1, 1], at least `PATCH` pixels a side.
    """
    shape = (PROJECTIONS, images.shape[1], PATCH, PATCH)
    directions = torch.randn(shape, generator=rng, device=images.device)
    # Without a mean: colours are the likelihood's matter.
    directions = directions - directions.mean((2, 3), keepdim=True)
    directions = directions / directions.flatten(1).norm(dim=1)[:, None, None, None]
    one, other = (F.conv2d(x, directions).flatten(2).sort(dim=2).values for x in (images, others))
    return (one - other).abs().mean()


class Critic:
    """The optional critic of patches: its weights, its optimizer, and what it thinks of reconstructions."""

    def __init__(self, config: Config, precision: Precision) -> None:
        with seeded(config.training.seed, "critic"):
            self.network = PatchCritic(config.data.channels).to(precision.device)
        self.precision = precision
        self.optimizer = Optimizer(self.network, config.training)

    def opinion(self, images: Images) -> Tensor:
        """(batch, 1, down, across), high where patches look real, for pictures in [-1, 1]."""
        with self.precision.autocast():
            return self.network(images).float()

    def learn(self, images: Images, others: Images) -> None:
        """Its gradients for telling pictures from reconstructions, by the hinge loss; no step is made."""
        loss = F.relu(1 - self.opinion(images)).mean() + F.relu(1 + self.opinion(others.detach())).mean()
        # What the decoder's own step left here.
        self.network.zero_grad(set_to_none=True)
        loss.backward()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer, by names that begin as `CRITIC` and `CRITIC_STATE`."""
        weights = {CRITIC + name: tensor for name, tensor in self.network.state_dict().items()}
        return weights | {CRITIC_STATE + name: tensor for name, tensor in self.optimizer.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave.

        Raises:
            UserError: they are of no critic, or of another one.
        """
        try:
            self.network.load_state_dict(under(tensors, CRITIC))
        except RuntimeError as error:
            raise UserError(
                "The checkpoint holds no such critic as config.toml has now; put config.toml back."
            ) from error
        self.optimizer.load(under(tensors, CRITIC_STATE))
