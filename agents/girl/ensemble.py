"""An ensemble that predicts the next posterior: where its members disagree, there is information to gain.

The digests say that the expected information gain is the disagreement of five members; what they predict, from what, and
how they are kept apart (their beginnings, and a share of the samples that is drawn anew at every loss) completes it.
"""

from __future__ import annotations

from itertools import pairwise

import torch as th
from torch import nn
from torch.nn import functional as F

from ..common.batched import BatchedLinear, lecun_normal
from .latents import Latent

KEEP = 0.8  # share of the samples that a member learns from


class Ensemble(nn.Module):
    """K networks side by side from [z, h, a] to the statistics of the next posterior.

    :param features: width of [z, h]
    :param action_dim: width of a
    :param latent: family of z
    :param members: K
    :param units: of each of the two hidden layers
    """

    def __init__(self, features: int, action_dim: int, latent: Latent, members: int = 5, units: int = 400) -> None:
        super().__init__()
        self.latent, self.members = latent, members
        widths = (features + action_dim, units, units, latent.statistics)
        pairs = pairwise(widths)
        self.layers = nn.ModuleList(BatchedLinear(members, a, b, lecun_normal) for a, b in pairs)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """What each member says of (N, features + A), described, (K, N, ...)."""
        x = inputs.expand(self.members, -1, -1)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.latent.describe(self.layers[-1](x))

    def loss(self, inputs: th.Tensor, target: th.Tensor, weight: th.Tensor) -> th.Tensor:
        """The sum of the members' mean losses against the next posterior, each on its own share of the samples.

        :param inputs: (N, features + A), detached
        :param target: described posteriors (N, ...), detached
        :param weight: (N,), 0 where there is no next step
        """
        losses = self.latent.nll(self(inputs), target.unsqueeze(0))
        kept = (th.rand_like(losses) < KEEP) * weight
        return ((losses * kept).sum(1) / kept.sum(1).clamp(min=1.0)).sum()

    @th.no_grad()
    def information_gain(self, inputs: th.Tensor, weight: th.Tensor) -> th.Tensor:
        """Mean disagreement over the samples of weight 1, in nats."""
        return (self.latent.disagreement(self(inputs)) * weight).sum() / weight.sum().clamp(min=1.0)
