"""One iteration's transitions in preallocated memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

Observations = th.Tensor | dict[str, th.Tensor]


def _host_view(store: Any) -> Any:
    if isinstance(store, dict):
        return {key: _host_view(part) for key, part in store.items()}
    return store.numpy() if store.device.type == "cpu" else store


def _put(store: Any, place: tuple[int, slice], values: Any) -> Any:
    store[place] = values if isinstance(store, np.ndarray) else th.as_tensor(values, device=store.device)
    return store[place]


def stacked(observations: tuple[Any, ...]) -> Any:
    """Single observations (arrays or dicts) as one batch."""
    if isinstance(observations[0], dict):
        return {key: np.stack([single[key] for single in observations]) for key in observations[0]}
    return np.stack(observations)


class Rollout:
    """``n_steps`` steps of ``n_envs`` environments.

    Observations and actions lie on the training device (what the losses read), rewards and episode ends on the host,
    where the environments give them; they are moved once a rollout.

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
        # On the CPU the same memory as arrays: writing a row there costs a tenth of what it costs through torch.
        self._observations, self._actions = _host_view(self.observations), _host_view(self.actions)
        self.rewards = np.zeros((n_steps, n_envs), dtype=np.float32)
        self.dones = np.zeros((n_steps, n_envs), dtype=bool)
        self.timeouts: list[tuple[int, int, Any]] = []  # (t, env, terminal observation)

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

    def observe(self, t: int, envs: slice, observations: Any) -> Any:
        """Store what some environments see at step t.

        :param envs: which of the environments
        :param observations: their observations as the environment gave them, (n, *obs) or a dict of such
        :return: the same where they are stored: tensors on a GPU, arrays on the CPU
        """
        if isinstance(self._observations, dict):
            return {key: _put(store, (t, envs), observations[key]) for key, store in self._observations.items()}
        return _put(self._observations, (t, envs), observations)

    def act(self, t: int, envs: slice, actions: np.ndarray) -> None:
        """Store the actions of step t, (n, *act), as the policy sampled them (unclipped)."""
        _put(self._actions, (t, envs), actions)

    def outcome(
        self, t: int, envs: slice, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]
    ) -> list[tuple[int, Any]]:
        """Store what came of step t.

        :param rewards: (n,), raw
        :param dones: (n,) bool
        :param infos: the vector environment's; time limits and terminal observations are read from them
        :return: number and terminal observation of the environments that a time limit cut
        """
        self.rewards[t, envs] = rewards
        self.dones[t, envs] = dones
        cut = [
            (env + (envs.start or 0), infos[env]["terminal_observation"])
            for env, done in enumerate(dones.tolist())
            if done and infos[env].get("TimeLimit.truncated", False)
        ]
        self.timeouts += [(t, env, terminal) for env, terminal in cut]
        return cut

    def flat_observations(self) -> Observations:
        """Observations as one batch, (T * E, *obs)."""
        if isinstance(self.observations, dict):
            return {key: store.flatten(0, 1) for key, store in self.observations.items()}
        return self.observations.flatten(0, 1)

    def flat_actions(self) -> th.Tensor:
        """Actions as one batch, (T * E, *act); those of a box as (T * E, d)."""
        flat = self.actions.flatten(0, 1)
        return flat.flatten(1) if flat.ndim > 2 else flat

    def state(self, n_steps: int) -> dict[str, Any]:
        """The first ``n_steps`` steps, as arrays; what lies behind may be unwritten."""
        return {
            "observations": _first(self.observations, n_steps),
            "actions": self.actions[:n_steps],
            "rewards": self.rewards[:n_steps],
            "dones": self.dones[:n_steps],
            "timeouts": [list(timeout) for timeout in self.timeouts],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        _write_first(self.observations, state["observations"])
        for name in ("actions", "rewards", "dones"):
            _write_first(getattr(self, name), state[name])
        self.timeouts = [tuple(timeout) for timeout in state["timeouts"]]


def _first(store: Any, n_steps: int) -> Any:
    return {key: part[:n_steps] for key, part in store.items()} if isinstance(store, dict) else store[:n_steps]


def _write_first(store: Any, rows: Any) -> None:
    if isinstance(store, dict):
        for key, part in store.items():
            _write_first(part, rows[key])
    else:
        store[: len(rows)] = rows
