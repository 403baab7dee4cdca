"""What the tests of several files share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tether.envs import make_env
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


@pytest.fixture(scope="session")
def worst_difference() -> Callable[..., dict[str, float]]:
    """Step EnvPool and the reference side by side from the same states; see `compare`."""
    return compare


def compare(
    env_id: str,
    rebuild: Callable[[gym.Env, dict[str, np.ndarray]], None],
    steps: int,
    view: Callable[[np.ndarray], Any] = np.asarray,
    config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Step both with the same actions, from the same state after every reset.

    :param rebuild: puts the reference into the state of EnvPool's first observation (float64, by name)
    :param view: what to compare of an observation
    :param config: EnvPool's own arguments
    :param kwargs: arguments of both
    :return: the largest absolute difference of observations and the largest of rewards relative to their size,
        and how many episodes terminated
    """
    reference = make_env(env_id, **kwargs)
    task = _pool_task(env_id)
    arguments = {name: value for name, value in kwargs.items() if name != "max_episode_steps"}
    pool = OpenPool(task, reference, 1, 1, **arguments, **(config or {}))
    pool.seed(7)
    rng = np.random.default_rng(7)
    worst = {"observation": 0.0, "reward": 0.0, "terminations": 0.0}

    def restart() -> None:
        reference.reset(seed=7)
        rebuild(reference, {name: value[0] for name, value in pool.raw.items()})

    pool.reset()
    restart()
    for _ in range(steps):
        action = rng.uniform(reference.action_space.low, reference.action_space.high).astype(np.float32)
        observations, rewards, dones, infos = pool.step(action[None])
        observation, reward, terminated, truncated, _ = reference.step(action)
        mine = infos[0].get("terminal_observation", observations[0])
        assert bool(dones[0]) == (terminated or truncated)
        assert infos[0].get("TimeLimit.truncated", False) == (truncated and not terminated)
        worst["observation"] = max(worst["observation"], float(np.abs(np.subtract(view(mine), view(observation))).max()))
        worst["reward"] = max(worst["reward"], abs(rewards[0] - reward) / max(1.0, abs(reward)))
        if dones[0]:
            worst["terminations"] += terminated
            restart()
    pool.close()
    reference.close()
    return worst
