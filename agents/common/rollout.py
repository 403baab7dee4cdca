"""One iteration's transitions in preallocated memory, and the advantages computed from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

Observations = th.Tensor | dict[str, th.Tensor]


def generalized_advantage(
    rewards: np.ndarray, values: np.ndarray, dones: np.ndarray, gamma: float, gae_lambda: float
) -> np.ndarray:
    """GAE: A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}, delta_t = r_t + gamma (1 - done_t) V_{t+1} - V_t.

    :param rewards: (T, E) float32
    :param values: (T + 1, E) float32, V of each observation and of the one after the last step
    :param dones: (T, E) bool, the episode ended with this step (V_{t+1} then belongs to the next episode)
    :return: advantages (T, E) float32; Schulman et al. 2016, eq. 16
    """
    going_on = (~dones).astype(np.float32)
    deltas = rewards + gamma * going_on * values[1:] - values[:-1]
    decay = gamma * gae_lambda * going_on
    advantages = np.empty_like(deltas)
    running = np.zeros(deltas.shape[1], dtype=np.float32)
    for t in reversed(range(len(deltas))):
        running = deltas[t] + decay[t] * running
        advantages[t] = running
    return advantages


class Rollout:
    """``n_steps`` steps of ``n_envs`` environments.

    Observations and actions lie on the training device (what the losses read), rewards and episode ends on the host
    (where the environment gives them and the short loops over time run).

    :param n_steps: T, steps per environment
    :param n_envs: E
    :param device: where observations and actions are kept
    """

    def __init__(
        self,
        n_steps: int,
        n_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device,
    ) -> None:
        self.n_steps, self.n_envs, self.device = n_steps, n_envs, device
        self.observations = self._allocate(observation_space, n_steps)
        self.actions: th.Tensor = self._allocate(action_space, n_steps)  # type: ignore[assignment]
        self.rewards = np.zeros((n_steps, n_envs), dtype=np.float32)
        self.dones = np.zeros((n_steps, n_envs), dtype=bool)
        self.timeouts: list[tuple[int, int, Any]] = []  # (t, env, terminal observation)
        self.position = 0

    def _allocate(self, space: spaces.Space[Any], n_steps: int) -> Observations:
        if isinstance(space, spaces.Dict):
            return {key: self._allocate(part, n_steps) for key, part in space.items()}  # type: ignore[misc]
        kind = np.dtype(space.dtype)
        dtype = th.float32 if kind.kind == "f" else th.uint8 if kind == np.uint8 else th.int64
        if isinstance(space, spaces.MultiBinary):
            dtype = th.float32
        return th.zeros((n_steps, self.n_envs, *space.shape), dtype=dtype, device=self.device)  # type: ignore[misc]

    def reset(self) -> None:
        """Forget the transitions; the memory is used again."""
        self.timeouts.clear()
        self.position = 0

    def add(
        self,
        observations: Any,
        actions: th.Tensor,
        rewards: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one step of every environment: the observations acted on and what came of it.

        :param observations: tensor (E, *obs) or dict of such
        :param actions: (E, *act), as the policy sampled them (unclipped)
        :param rewards: (E,), raw
        :param dones: (E,) bool
        :param infos: the vector environment's; time limits and terminal observations are read from them
        """
        t = self.position
        if isinstance(self.observations, dict):
            for key, store in self.observations.items():
                store[t].copy_(observations[key])
        else:
            self.observations[t].copy_(observations)
        self.actions[t].copy_(actions)
        self.rewards[t] = rewards
        self.dones[t] = dones
        for env in np.flatnonzero(dones):
            if infos[env].get("TimeLimit.truncated", False):
                self.timeouts.append((t, int(env), infos[env]["terminal_observation"]))
        self.position += 1

    def flat_observations(self) -> Observations:
        """Observations as one batch, (T * E, *obs)."""
        if isinstance(self.observations, dict):
            return {key: store.flatten(0, 1) for key, store in self.observations.items()}
        return self.observations.flatten(0, 1)

    def flat_actions(self) -> th.Tensor:
        """Actions as one batch, (T * E, *act)."""
        return self.actions.flatten(0, 1)

    def to_batch(self, values: np.ndarray) -> th.Tensor:
        """A host array (T, E) as a float32 tensor (T * E,) on the device, in the order of the other batches."""
        return th.as_tensor(values, dtype=th.float32, device=self.device).flatten()
