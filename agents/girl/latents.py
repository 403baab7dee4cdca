"""The two families of stochastic latents: what networks say about them, samples, divergences, disagreement.

A *description* is a tensor that fixes the distribution: log-probabilities (..., S, C) of S categoricals, or mean and
standard deviation (..., 2, D) of a diagonal Gaussian. Samples are flat, (..., features).
"""

from __future__ import annotations

from typing import Protocol

import torch as th
from torch.nn import functional as F

UNIMIX = 0.01  # share of the uniform distribution in a categorical one (DreamerV3)


class Latent(Protocol):
    """What the world model asks of a family."""

    statistics: int
    """Numbers that a network gives."""
    features: int
    """Width of a sample."""
    grounded: int
    """The first so many statistics are what grounding shifts: logits, or means."""

    def describe(self, raw: th.Tensor) -> th.Tensor:
        """The description that a network's numbers (..., statistics) stand for."""

    def noise(self, *shape: int, device: th.device) -> th.Tensor:
        """What :meth:`sample` needs to be random, for a batch of this shape."""

    def sample(self, description: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """A sample (..., features) with a gradient into the description."""

    def mode(self, description: th.Tensor) -> th.Tensor:
        """The likeliest value (..., features), with a gradient into the description."""

    def kl(self, p: th.Tensor, q: th.Tensor) -> th.Tensor:
        """KL(p || q) in nats, summed over the variables, (...)."""

    def nll(self, predicted: th.Tensor, target: th.Tensor) -> th.Tensor:
        """The loss (...) of a description that should have been another one."""

    def disagreement(self, members: th.Tensor) -> th.Tensor:
        """Expected information gain (...) of an ensemble's descriptions (K, ...), in nats, summed over the variables."""


class CategoricalLatent:
    """S one-hot variables of C classes, with straight-through gradients.

    p = (1 - unimix) softmax(logits) + unimix / C, so that no class is impossible (DreamerV3).

    :param variables: S
    :param classes: C
    :param unimix: share of the uniform distribution
    """

    def __init__(self, variables: int, classes: int, unimix: float = UNIMIX) -> None:
        self.variables, self.classes, self.unimix = variables, classes, unimix
        self.statistics = self.features = self.grounded = variables * classes

    def describe(self, raw: th.Tensor) -> th.Tensor:
        logits = raw.unflatten(-1, (self.variables, self.classes)).float()
        return (F.softmax(logits, -1) * (1.0 - self.unimix) + self.unimix / self.classes).log()

    def noise(self, *shape: int, device: th.device) -> th.Tensor:
        """Uniform noise (*shape, S, 1): one number a variable."""
        return th.rand(*shape, self.variables, 1, device=device)

    def sample(self, description: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """The class in whose part of the cumulated probabilities the noise lies."""
        probabilities = description.exp()
        below = probabilities.detach().cumsum(-1) < noise
        return self._one_hot(probabilities, below.sum(-1, keepdim=True).clamp(max=self.classes - 1))

    def mode(self, description: th.Tensor) -> th.Tensor:
        """The likeliest classes, with the gradient of the log-probabilities (NM512)."""
        return self._one_hot(description, description.argmax(-1, keepdim=True))

    @staticmethod
    def _one_hot(source: th.Tensor, chosen: th.Tensor) -> th.Tensor:
        """One-hot of the chosen classes, with the gradient of ``source``."""
        hot = th.zeros_like(source).scatter_(-1, chosen, 1.0)
        return (hot + (source - source.detach())).flatten(-2)

    def kl(self, p: th.Tensor, q: th.Tensor) -> th.Tensor:
        return (p.exp() * (p - q)).sum((-2, -1))

    def entropy(self, description: th.Tensor) -> th.Tensor:
        return -(description.exp() * description).sum((-2, -1))

    def nll(self, predicted: th.Tensor, target: th.Tensor) -> th.Tensor:
        """Cross-entropy."""
        return -(target.exp() * predicted).sum((-2, -1))

    def disagreement(self, members: th.Tensor) -> th.Tensor:
        """H(mean_k p_k) - mean_k H(p_k), Jensen-Shannon: at most S ln K."""
        mean = members.exp().mean(0).clamp(min=1e-30).log()
        return (self.entropy(mean) - self.entropy(members).mean(0)).clamp(min=0.0)


class GaussianLatent:
    """A diagonal Gaussian: mean free, std = 2 sigmoid(raw / 2) + 0.1 (DreamerV3's continuous latent).

    :param variables: D
    """

    def __init__(self, variables: int) -> None:
        self.features = self.grounded = variables
        self.statistics = 2 * variables

    def describe(self, raw: th.Tensor) -> th.Tensor:
        mean, scale = raw.float().chunk(2, -1)
        return th.stack((mean, 2.0 * (scale / 2.0).sigmoid() + 0.1), -2)

    def noise(self, *shape: int, device: th.device) -> th.Tensor:
        """Normal noise (*shape, D)."""
        return th.randn(*shape, self.features, device=device)

    def sample(self, description: th.Tensor, noise: th.Tensor) -> th.Tensor:
        mean, std = description.unbind(-2)
        return mean + std * noise

    def mode(self, description: th.Tensor) -> th.Tensor:
        return description[..., 0, :]

    def kl(self, p: th.Tensor, q: th.Tensor) -> th.Tensor:
        (mean, std), (other, wide) = p.unbind(-2), q.unbind(-2)
        ratio = (std / wide).square()
        return 0.5 * (ratio - 1.0 - ratio.log() + ((mean - other) / wide).square()).sum(-1)

    def nll(self, predicted: th.Tensor, target: th.Tensor) -> th.Tensor:
        """Of the target's mean."""
        mean, std = predicted.unbind(-2)
        return -th.distributions.Normal(mean, std, validate_args=False).log_prob(target[..., 0, :]).sum(-1)

    def disagreement(self, members: th.Tensor) -> th.Tensor:
        """0.5 sum_d log(1 + Var_k(mu_kd) / mean_k sigma_kd^2), the population variance."""
        mean, std = members.unbind(-2)
        return 0.5 * (mean.var(0, unbiased=False) / std.square().mean(0)).log1p().sum(-1)
