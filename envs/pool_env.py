"""One EnvPool environment as a Gymnasium environment, for suites that have no other implementation here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .pool_replay import EpisodeLog

NO_LIMIT = 2**31 - 1  # steps; EnvPool stores it as int32


class PoolEnv(gym.Env):
    """One environment of EnvPool, without a time limit.

    :param pool_id: EnvPool's name of it
    :param observation_space: a Box; its dtype is that of the observations
    :param config: EnvPool's own arguments
    :param render_mode: ``rgb_array`` where the observations are pictures, else None
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    def __init__(
        self,
        pool_id: str,
        observation_space: spaces.Box,
        action_space: spaces.Space,
        config: Mapping[str, Any],
        render_mode: str | None = None,
    ) -> None:
        self.observation_space, self.action_space, self.render_mode = observation_space, action_space, render_mode
        self._pool_id, self._config = pool_id, config
        self._pool: Any = None
        self._log = EpisodeLog(1)

    def _build(self, seed: int) -> None:
        import envpool

        self._log.begin([seed])
        self._pool = envpool.make_gymnasium(
            self._pool_id, num_envs=1, num_threads=1, seed=seed, max_episode_steps=NO_LIMIT, **self._config
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if self._pool is None or seed is not None:
            self._build(int(self.np_random.integers(2**31)))
        self._log.reset(np.zeros(1, np.int32))
        observations, infos = self._pool.reset()
        return self._first(observations), _scalars(infos)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._log.act(actions := np.array([action]))
        observations, rewards, terminated, _, infos = self._pool.step(actions)
        return self._first(observations), float(rewards[0]), bool(terminated[0]), False, _scalars(infos)

    def _first(self, observations: np.ndarray) -> np.ndarray:
        self._observation = observations[0].astype(self.observation_space.dtype)
        return self._observation

    def resumable_state(self) -> dict[str, Any]:
        """Where the environment is, as plain data."""
        return {"log": self._log.state(), "random": self.np_random.bit_generator.state}

    def resume_from(self, state: dict[str, Any]) -> None:
        """Bring the environment to where :meth:`resumable_state` found it, see :class:`EpisodeLog`."""
        if state["log"]["seeds"]:
            self._build(*state["log"]["seeds"])
            self._log.replay(state["log"], lambda _: self._first(self._pool.reset()[0]), self._step_again)
        self.np_random.bit_generator.state = state["random"]

    def _step_again(self, _: np.ndarray, actions: np.ndarray) -> None:
        self._first(self._pool.step(actions)[0])

    def render(self) -> Any:
        return self._observation if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _scalars(infos: dict[str, Any]) -> dict[str, Any]:
    return {key: value[0] for key, value in infos.items() if key not in ("env_id", "players", "elapsed_step")}
