"""The actor and the scale of returns (DreamerV3; the digests tell no deviation)."""

from __future__ import annotations

import math

import torch as th
from torch import nn
from torch.nn import functional as F

from .latents import UNIMIX
from .networks import MLP

HALF_LOG_2PIE = 0.5 * (1.0 + math.log(2.0 * math.pi))  # entropy of a standard normal


class Actor(nn.Module):
    """Actions in [-1, 1]^A from a Gaussian with mean tanh(m) and std in [0.1, 1], or one of A in one-hot form.

    :param features: width of [z, h]
    :param action_dim: A
    :param discrete: choose one of A
    """

    def __init__(self, features: int, action_dim: int, layers: int, units: int, discrete: bool) -> None:
        super().__init__()
        self.discrete, self.action_dim = discrete, action_dim
        self.network = MLP(features, layers, units, action_dim if discrete else 2 * action_dim)

    def noise(self, *shape: int, device: th.device) -> th.Tensor:
        """What :meth:`sample` needs, (*shape, A)."""
        if self.discrete:
            return th.empty(*shape, self.action_dim, device=device).exponential_().log_().neg_()
        return th.randn(*shape, self.action_dim, device=device)

    def describe(self, features: th.Tensor) -> th.Tensor:
        """Log-probabilities (..., A), 1 % of them uniform, or mean and std (..., 2, A)."""
        raw = self.network(features).float()
        if self.discrete:
            return (F.softmax(raw, -1) * (1.0 - UNIMIX) + UNIMIX / self.action_dim).log()
        mean, scale = raw.chunk(2, -1)
        return th.stack((mean.tanh(), 0.9 * (scale + 2.0).sigmoid() + 0.1), -2)

    def sample(self, description: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """An action; one outside of the box is scaled back, with the gradient it had."""
        if self.discrete:
            scores = description + noise
            return th.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        mean, std = description.unbind(-2)
        action = mean + std * noise
        return action * (1.0 / action.abs().clamp(min=1.0)).detach()

    def mode(self, description: th.Tensor) -> th.Tensor:
        """The likeliest action."""
        if self.discrete:
            return F.one_hot(description.argmax(-1), self.action_dim).float()
        return description[..., 0, :]

    def entropy(self, description: th.Tensor) -> th.Tensor:
        """In nats, (...); of the Gaussian before it is scaled back."""
        if self.discrete:
            return -(description.exp() * description).sum(-1)
        return (description[..., 1, :].log() + HALF_LOG_2PIE).sum(-1)

    def log_prob(self, description: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Of one of A in one-hot form (..., A), (...)."""
        return (description * actions).sum(-1)


class ReturnScale(nn.Module):
    """Moving averages of the 5th and 95th percentile of the returns; they are divided by their distance, but not by less
    than 1."""

    percentiles: th.Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("percentiles", th.zeros(2))

    @th.no_grad()
    def update(self, returns: th.Tensor) -> None:
        """Take in a batch of returns; where a percentile would not be finite it stays."""
        ordered = returns.float().flatten().sort().values
        now = []
        for share in (0.05, 0.95):  # as th.quantile, which refuses more than 16 million numbers
            below, part = divmod(share * (len(ordered) - 1), 1.0)
            low = ordered[int(below)]
            now.append(low.lerp(ordered[min(int(below) + 1, len(ordered) - 1)], part))
        moved = self.percentiles.lerp(th.stack(now), 1.0 - self.decay)
        self.percentiles.copy_(th.where(moved.isfinite(), moved, self.percentiles))

    @property
    def scale(self) -> th.Tensor:
        """S = max(1, P95 - P5)."""
        return (self.percentiles[1] - self.percentiles[0]).clamp(min=1.0)
