"""What the tests of several files share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tether.envs import make_env, make_vec
from tether.envs.envpool_vec import EnvPoolVecEnv
from tether.envs.make import _pool_task


@pytest.fixture(scope="session")
def need() -> Callable[[bool, str], None]:
    """``need(present, what)``: skip where something is missing, but fail in CI, where everything must be there."""

    def check(present: bool, what: str) -> None:
        if not present:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what} is not there")

    return check


class OpenPool(EnvPoolVecEnv):
    """EnvPool's vector environment that keeps the float64 observations it was made from."""

    def _observations(self, state: list[np.ndarray]) -> np.ndarray:
        names = [key.removeprefix("obs:") for key in self._pool._state_keys]
        self.raw = dict(zip(names, state, strict=True))
        return super()._observations(state)


class Pair:
    """EnvPool and the reference side by side, in the same states and under the same actions.

    :param rebuild: ``rebuild(reference, seen)`` puts the reference into the state of EnvPool's first observation
        (float64 arrays by name)
    :param hold: for how many steps a random action is kept; above 1 it is from the corners of the action space
    :param policy: gives the action for an observation, in the place of random ones
    :param config: EnvPool's own arguments
    :param kwargs: arguments of both
    """

    def __init__(
        self,
        env_id: str,
        rebuild: Callable[[gym.Env, dict[str, np.ndarray]], None],
        hold: int = 1,
        policy: Callable[[np.ndarray], Any] | None = None,
        config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.reference, self._rebuild = make_env(env_id, **kwargs), rebuild
        self._hold, self._policy, self._steps = hold, policy, 0
        kwargs.pop("max_episode_steps", None)
        self.pool = OpenPool(_pool_task(env_id), self.reference, 1, 1, **kwargs, **(config or {}))
        self.pool.seed(7)
        self._rng = np.random.default_rng(7)
        self._last = self.pool.reset()
        self.restart()

    @property
    def seen(self) -> dict[str, np.ndarray]:
        """What EnvPool shows of its environment, also what is no part of the observation."""
        return {name: value[0] for name, value in self.pool.raw.items()}

    def restart(self) -> None:
        self.reference.reset(seed=7)
        self._rebuild(self.reference, self.seen)

    def step(self) -> tuple[float, float, bool, bool]:
        """Take one action in both.

        :return: largest absolute difference of the observations, difference of the rewards relative to their size,
            whether there was a reward and whether the episode terminated; their ends must be the same
        """
        if self._policy is not None:
            self._action = self._policy(self._last[0])
        elif self._steps % self._hold == 0:
            self._action = self._random_action()
        self._steps += 1
        self._last, rewards, dones, infos = self.pool.step(np.array([self._action]))
        observation, reward, terminated, truncated, _ = self.reference.step(self._action)
        reward = float(reward)
        assert bool(dones[0]) == (terminated or truncated)
        assert infos[0].get("TimeLimit.truncated", False) == (truncated and not terminated)
        mine = infos[0].get("terminal_observation", self._last[0])
        if dones[0]:
            self.restart()
        gap = abs(rewards[0].item() - reward) / max(1.0, abs(reward))
        return float(np.abs(mine - observation).max()), gap, abs(reward) > 1e-6, terminated

    def _random_action(self) -> Any:
        space = self.reference.action_space
        if isinstance(space, gym.spaces.Discrete):
            return self._rng.integers(space.n)
        if self._hold > 1:
            return np.where(self._rng.random(space.shape) < 0.5, space.low, space.high)
        return self._rng.uniform(space.low, space.high).astype(np.float32)

    def walk(self, steps: int) -> tuple[float, float, int, int]:
        """Take many actions: the largest differences, and how many steps were rewarded and episodes terminated."""
        observation, reward, rewarded, terminated = zip(*(self.step() for _ in range(steps)), strict=True)
        self.pool.close()
        self.reference.close()
        return max(observation), max(reward), sum(rewarded), sum(terminated)


@pytest.fixture(scope="session")
def pair() -> type[Pair]:
    return Pair


@pytest.fixture(scope="session")
def starts_differ() -> Callable[[str], list[int]]:
    """Which entries of an id's first observations do not come from one distribution in EnvPool and the reference."""

    def find(env_id: str) -> list[int]:
        from scipy.stats import ks_2samp

        venv = make_vec(env_id, 8, backend="envpool", seed=0)
        pool = np.concatenate([venv.reset() for _ in range(40)]).round(6)
        env = make_env(env_id)
        own = np.stack([env.reset(seed=seed)[0] for seed in range(320)]).round(6)
        venv.close()
        env.close()
        # Two samples of 320 from one distribution are this far apart once in a million entries.
        return [k for k in range(own.shape[1]) if ks_2samp(pool[:, k], own[:, k], method="asymp").statistic > 0.213]

    return find
