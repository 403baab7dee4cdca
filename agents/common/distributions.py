"""SB3's action distributions without argument validation, each sampled as a function of noise drawn beforehand.

Validation reads tensors back to the host at every construction; the guard in ``finite.py`` does that once an update.
Noise for a whole rollout is one draw, so a step costs no call of the generator, and what an environment is given does
not depend on which environments are stepped together.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.preprocessing import get_action_dim

LOG_TWO_PI = math.log(2.0 * math.pi)


class _FromParameters(Distribution):
    """SB3's two shortcuts, for distributions whose ``proba_distribution`` gives a new object."""

    def actions_from_params(self, *parameters: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Actions of the distribution with these parameters."""
        return self.proba_distribution(*parameters).get_actions(deterministic=deterministic)

    def log_prob_from_params(self, *parameters: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Sampled actions and their log-probability."""
        new = self.proba_distribution(*parameters)
        actions = new.sample()
        return actions, new.log_prob(actions)


class Gaussian(_FromParameters, DiagGaussianDistribution):  # type: ignore[misc]
    """Independent normal actions; parameters are mean (B, d) and log_std (d,) or (B, d)."""

    mean: th.Tensor
    log_std: th.Tensor

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> Gaussian:
        """The distribution with these parameters, a new object."""
        new = copy.copy(self)
        new.mean, new.log_std = mean_actions, log_std
        return new

    @property
    def distribution(self) -> th.distributions.Normal:
        """As torch's object, made when asked for: the losses do without it."""
        return th.distributions.Normal(self.mean, self.log_std.exp().expand_as(self.mean), validate_args=False)

    @distribution.setter
    def distribution(self, _: Any) -> None:
        """SB3's constructor clears it."""

    @property
    def parameters(self) -> dict[str, th.Tensor]:
        """What :meth:`proba_distribution` takes, (B, d) each; a copy, because log_std is the policy's own parameter."""
        return {"mean_actions": self.mean, "log_std": self.log_std.expand_as(self.mean).clone()}

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """log pi(actions), summed over dimensions, (B,)."""
        z = (actions - self.mean) * th.exp(-self.log_std)
        return -0.5 * z.square().sum(-1) - (self.log_std.sum(-1) + 0.5 * LOG_TWO_PI * actions.shape[-1])

    def entropy(self) -> th.Tensor:
        """Differential entropy, (B,)."""
        entropy = self.log_std.sum(-1) + 0.5 * (1.0 + LOG_TWO_PI) * self.mean.shape[-1]
        return entropy.expand(self.mean.shape[0])

    def mode(self) -> th.Tensor:
        """The mean, (B, d)."""
        return self.mean

    def sample(self) -> th.Tensor:
        """(B, d), differentiable in the parameters."""
        return self.from_noise(self.draw_noise((self.mean.shape[0],), self.mean.device))

    def draw_noise(self, shape: tuple[int, ...], device: th.device) -> th.Tensor:
        """Standard normal, (*shape, d)."""
        return th.randn(*shape, self.action_dim, device=device)

    def from_noise(self, noise: th.Tensor) -> th.Tensor:
        """mean + std * noise."""
        return th.addcmul(self.mean, self.log_std.exp(), noise)


def _minus_log_exponential(shape: tuple[int, ...], device: th.device) -> th.Tensor:
    """Standard Gumbel variates: the largest of logits + these is a sample of the softmax."""
    return -th.empty(shape, device=device).exponential_().log()


class Categorical(_FromParameters, CategoricalDistribution):  # type: ignore[misc]
    """One of n actions; the parameter is action_logits (B, n)."""

    def proba_distribution(self, action_logits: th.Tensor) -> Categorical:
        """The distribution with these logits, a new object."""
        new = copy.copy(self)
        new.distribution = th.distributions.Categorical(logits=action_logits, validate_args=False)
        return new

    @property
    def parameters(self) -> dict[str, th.Tensor]:
        """Normalised logits (B, n)."""
        return {"action_logits": self.distribution.logits}

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """log pi(actions), (B,)."""
        return self.distribution.logits.gather(-1, actions.long().reshape(-1, 1)).squeeze(-1)

    def sample(self) -> th.Tensor:
        """(B,)"""
        logits = self.distribution.logits
        return self.from_noise(self.draw_noise(tuple(logits.shape[:-1]), logits.device))

    def draw_noise(self, shape: tuple[int, ...], device: th.device) -> th.Tensor:
        """Gumbel noise, (*shape, n)."""
        return _minus_log_exponential((*shape, self.action_dim), device)

    def from_noise(self, noise: th.Tensor) -> th.Tensor:
        """The Gumbel-max sample."""
        return (self.distribution.logits + noise).argmax(-1)


class MultiCategorical(_FromParameters, MultiCategoricalDistribution):  # type: ignore[misc]
    """Several independent categorical actions; the parameter is action_logits (B, sum of n)."""

    def proba_distribution(self, action_logits: th.Tensor) -> MultiCategorical:
        """The distribution with these logits, a new object."""
        new = copy.copy(self)
        parts = action_logits.split(list(self.action_dims), dim=-1)
        new.distribution = [th.distributions.Categorical(logits=part, validate_args=False) for part in parts]
        return new

    @property
    def parameters(self) -> dict[str, th.Tensor]:
        """Normalised logits (B, sum of n)."""
        return {"action_logits": th.cat([part.logits for part in self.distribution], dim=-1)}

    def sample(self) -> th.Tensor:
        """(B, k)"""
        logits = self.distribution[0].logits
        return self.from_noise(self.draw_noise(tuple(logits.shape[:-1]), logits.device))

    def draw_noise(self, shape: tuple[int, ...], device: th.device) -> th.Tensor:
        """Gumbel noise, (*shape, sum of n)."""
        return _minus_log_exponential((*shape, int(sum(self.action_dims))), device)

    def from_noise(self, noise: th.Tensor) -> th.Tensor:
        """One Gumbel-max sample per action."""
        noises = noise.split(list(self.action_dims), dim=-1)
        pairs = zip(self.distribution, noises, strict=True)
        return th.stack([(part.logits + own).argmax(-1) for part, own in pairs], dim=-1)


class Bernoulli(_FromParameters, BernoulliDistribution):  # type: ignore[misc]
    """Independent binary actions; the parameter is action_logits (B, d)."""

    def proba_distribution(self, action_logits: th.Tensor) -> Bernoulli:
        """The distribution with these logits, a new object."""
        new = copy.copy(self)
        new.distribution = th.distributions.Bernoulli(logits=action_logits, validate_args=False)
        return new

    @property
    def parameters(self) -> dict[str, th.Tensor]:
        """Logits (B, d)."""
        return {"action_logits": self.distribution.logits}

    def sample(self) -> th.Tensor:
        """(B, d)"""
        logits = self.distribution.logits
        return self.from_noise(self.draw_noise(tuple(logits.shape[:-1]), logits.device))

    def draw_noise(self, shape: tuple[int, ...], device: th.device) -> th.Tensor:
        """Uniform in [0, 1), (*shape, d)."""
        return th.rand(*shape, self.action_dims, device=device)

    def from_noise(self, noise: th.Tensor) -> th.Tensor:
        """1 where the noise lies below the probability."""
        return (noise < self.distribution.probs).float()


def action_distribution(space: spaces.Space[Any]) -> Distribution:
    """The distribution for an action space.

    :raises ValueError: for a space that is neither Box, Discrete, MultiDiscrete nor MultiBinary
    """
    if isinstance(space, spaces.Box):
        return Gaussian(get_action_dim(space))
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategorical(list(space.nvec))
    if isinstance(space, spaces.MultiBinary):
        return Bernoulli(int(space.shape[0]))
    raise ValueError(f"There is no action distribution for {space}: wrap the environment so that its actions are one of "
                     "Box, Discrete, MultiDiscrete or MultiBinary.")
