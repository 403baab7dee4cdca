"""Running moments, and the two things an on-policy agent scales with them: observations and rewards.

The formulas are those of SB3's ``VecNormalize`` (its ``RunningMeanStd`` is the oracle in a test). The difference is when
they are refreshed: once an iteration instead of at every step, so that the policy that collected a rollout and the
policy that the update starts from are the same function, and the ratio between them starts at exactly one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch as th
from torch import nn

from .advantages import discounted_sum

EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Mean and variance of all samples seen, merged batch by batch (Chan et al.); saved with the module.

    :param shape: shape of one sample; buffers are float64
    """

    mean: th.Tensor
    var: th.Tensor
    count: th.Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(shape, dtype=th.float64))
        self.register_buffer("var", th.ones(shape, dtype=th.float64))
        self.register_buffer("count", th.tensor(1e-4, dtype=th.float64))

    @th.no_grad()
    def update(self, batch: th.Tensor) -> None:
        """Merge ``batch`` (B, *shape) into the moments."""
        batch = batch.to(self.mean.device, th.float64)
        n, mean, var = batch.shape[0], batch.mean(0), batch.var(0, unbiased=False)
        total, delta = self.count + n, mean - self.mean
        m2 = self.var * self.count + var * n + delta.square() * self.count * n / total
        self.mean.add_(delta * n / total)
        self.var.copy_(m2 / total)
        self.count.copy_(total)

    def location_and_scale(self) -> tuple[th.Tensor, th.Tensor]:
        """Mean and 1 / std, float32 copies."""
        return self.mean.float(), (self.var + EPSILON).rsqrt().float()

    def standardizer(self, clip: float) -> Callable[[th.Tensor], th.Tensor]:
        """The function x -> (x - mean) / std, float32, clipped to +-``clip``, with the moments of this moment.

        Float32 copies of the moments are made here, once, and not at every call of the function.
        """
        mean, scale = self.location_and_scale()
        return lambda values: ((values - mean) * scale).clamp_(-clip, clip)


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of the discounted return, as ``VecNormalize`` does.

    :param n_envs: number of environments, each with its own return
    :param gamma: discount of the return
    :param clip: scaled rewards stay in [-clip, clip]
    """

    returns: th.Tensor

    def __init__(self, n_envs: int, gamma: float, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma, self.clip = gamma, clip
        self.moments = RunningMoments()
        # Not persistent: a model may be loaded for another number of environments.
        self.register_buffer("returns", th.zeros(n_envs, dtype=th.float64), persistent=False)

    @th.no_grad()
    def scale(self, rewards: th.Tensor, dones: th.Tensor) -> th.Tensor:
        """Scale a rollout's rewards.

        :param rewards: (T, E) float32, raw
        :param dones: (T, E) bool, the episode ended with this step
        :return: (T, E) float32
        """
        going_on = (~dones).double()
        inflow = rewards.double()
        inflow[0] += self.gamma * self.returns
        # R_t = r_t + gamma (1 - done_{t-1}) R_{t-1}: the sum of `discounted_sum`, with time running backwards.
        decay = self.gamma * th.vstack([th.zeros_like(going_on[:1]), going_on[:-1]])
        returns = discounted_sum(inflow.flip(0), decay.flip(0)).flip(0)
        self.returns.copy_(returns[-1] * going_on[-1])
        self.moments.update(returns.flatten())
        return (rewards * (self.moments.var + EPSILON).rsqrt()).float().clamp_(-self.clip, self.clip)
