"""OGSRL's networks: a Gaussian policy, and a value for every signal."""

from __future__ import annotations

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from ..common.batched import BatchedMLP, torch_default
from ..common.batched_gaussian import BatchedGaussian
from ..common.offline_policy import OfflinePolicy


class OGSRLPolicy(OfflinePolicy):
    """A Gaussian with tanh networks, not squashed, and as many values as there are signals: of reward, costs, ghat.

    Inside, observations and actions are scaled to [-1, 1] by the data's minima and maxima.

    :param net_arch: hidden units of all networks
    :param log_std: of the Gaussian, at first
    :param constraints: number of values beside the reward's; the agent sets it
    """

    action_middle: th.Tensor
    action_half: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        net_arch: tuple[int, ...] = (128, 128),
        log_std: float = -0.5,
        constraints: int = 0,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, seeds, net_arch=net_arch, log_std=log_std, constraints=constraints
        )
        self.actor = BatchedGaussian(seeds, self.obs_dim, self.action_dim, net_arch, log_std)
        self.signals = 1 + constraints
        self.values = BatchedMLP(seeds * self.signals, self.obs_dim, net_arch, 1, nn.Tanh, torch_default)
        # Lagrange multipliers, of optimizer="lagrangian"; of "dual" those of the latest step.
        self.nu = nn.Parameter(th.zeros(seeds, constraints), requires_grad=False)
        self.register_buffer("action_middle", th.zeros(self.action_dim))
        self.register_buffer("action_half", th.ones(self.action_dim))

    def value(self, observations: th.Tensor) -> th.Tensor:
        """V of every signal at scaled observations: (S, B, o) to (S, K, B)."""
        seeds, size, width = observations.shape
        repeated = observations.unsqueeze(1).expand(seeds, self.signals, size, width).reshape(-1, size, width)
        return self.values(repeated).view(seeds, self.signals, size)

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """The mean or a sample, in the data's units and clipped to [-1, 1]: (S, B, d)."""
        mean, log_std = self.actor(observations)
        scaled = mean if deterministic else mean + log_std.exp() * th.randn_like(mean)
        return (self.action_middle + self.action_half * scaled).clamp(-1.0, 1.0)
