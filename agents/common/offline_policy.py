"""What the policies of all offline agents share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule

STD_FLOOR = 1e-3  # added to the standard deviation that observations are divided by


class OfflinePolicy(BasePolicy):
    """Base of the offline agents' policies: networks with the seed as their first axis, actions in [-1, 1] inside.

    :param observation_space: a Box of vectors
    :param action_space: a Box
    :param lr_schedule: not used here; the agent makes the optimisers
    :param seeds: S, agents side by side; only where it is 1 does the policy act
    :param arguments: those that a class adds, kept in its files
    """

    obs_mean: th.Tensor
    obs_std: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        **arguments: Any,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True)
        self.arguments = {"seeds": seeds, **arguments}
        self.seeds = seeds
        self.obs_dim, self.action_dim = spaces.flatdim(observation_space), spaces.flatdim(action_space)
        # Of the dataset, where the agent normalises; `predict` takes raw observations in any case.
        self.register_buffer("obs_mean", th.zeros(self.obs_dim))
        self.register_buffer("obs_std", th.ones(self.obs_dim))

    def standardize(self, observations: th.Tensor) -> None:
        """Normalise by the mean and standard deviation of a dataset's observations (N, o), as TD3+BC does."""
        self.obs_mean.copy_(observations.mean(0))
        self.obs_std.copy_(observations.std(0, unbiased=False) + STD_FLOOR)

    def normalized(self, observations: th.Tensor) -> th.Tensor:
        """(x - mean) / std."""
        return (observations - self.obs_mean) / self.obs_std

    def set_training_mode(self, mode: bool) -> None:
        """As SB3's, which walks through all modules at every action."""
        if mode != self.training:
            self.train(mode)

    def _refuse_several_seeds(self) -> None:
        if self.seeds > 1:
            raise ValueError(f"This agent holds {self.seeds} agents side by side: agent.split() gives them one by one.")

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        self._refuse_several_seeds()
        rows = self.normalized(observation.float().flatten(1))
        return self.act(rows.unsqueeze(0), deterministic)[0]

    @abstractmethod
    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """Actions in [-1, 1], (S, B, d), at normalised observations (S, B, o)."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = super()._get_constructor_parameters()
        return {"observation_space": own["observation_space"], "action_space": own["action_space"], **self.arguments}
