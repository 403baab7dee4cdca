"""A conditional variational autoencoder of actions: what the data would do in a state."""

from __future__ import annotations

import torch as th
from torch import nn

from .batched import BatchedMLP

LOG_STD = (-4.0, 15.0)
LATENT_CLIP = 0.5


class ActionVAE(nn.Module):
    """Encoder (s, a) -> N(mean, std), decoder (s, z) -> tanh, S of them side by side; latent of 2 d numbers (BCQ).

    :param width: hidden units of two layers in each half
    """

    def __init__(self, seeds: int, obs_dim: int, action_dim: int, width: int = 400) -> None:
        super().__init__()
        self.latent_dim = 2 * action_dim
        self.encoder = BatchedMLP(seeds, obs_dim + action_dim, (width, width), 2 * self.latent_dim)
        self.decoder = BatchedMLP(seeds, obs_dim + self.latent_dim, (width, width), action_dim)

    def encode(self, observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Mean and log-std of the latent, (S, B, 2 d) each."""
        mean, log_std = self.encoder(th.cat([observations, actions], -1)).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD)

    def decode(self, observations: th.Tensor, latent: th.Tensor | None = None) -> th.Tensor:
        """Actions in [-1, 1], (S, B, d); without ``latent`` one is drawn, clipped to +-0.5 as in BCQ."""
        if latent is None:
            latent = th.randn(*observations.shape[:2], self.latent_dim, device=observations.device)
            latent = latent.clamp(-LATENT_CLIP, LATENT_CLIP)
        return self.decoder(th.cat([observations, latent], -1)).tanh()

    def loss(self, observations: th.Tensor, actions: th.Tensor, beta: float) -> th.Tensor:
        """E[ (a - decoded)^2 ] + beta E[ KL ], means over batch and dimensions, of each seed; (S,)."""
        mean, log_std = self.encode(observations, actions)
        decoded = self.decode(observations, mean + log_std.exp() * th.randn_like(mean))
        return (decoded - actions).square().mean((1, 2)) + beta * divergence(mean, log_std).mean(1)


def divergence(mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """KL(N(mean, std) || N(0, 1)), mean over the last axis."""
    return 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0 - 2.0 * log_std).mean(-1)
