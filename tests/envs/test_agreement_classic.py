"""EnvPool's classic control against Gymnasium's, step by step from the same states."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tether.envs.registered import POOL


def rebuild(env: gym.Env, seen: dict[str, np.ndarray]) -> None:
    o = seen["obs"].astype(np.float64)
    task: Any = env.unwrapped
    if task.spec.name == "Acrobot":
        o = np.array([np.arctan2(o[1], o[0]), np.arctan2(o[3], o[2]), *o[4:]])
    task.state = o


def with_the_swing(env_id: str) -> Any:
    """An action along the velocity gets the car up the hill and the acrobot over the line; CartPole falls by itself."""
    if env_id == "MountainCarContinuous-v0":
        return lambda o: np.float32([np.sign(o[1])])
    speed = {"MountainCar-v0": 1, "Acrobot-v1": 5}
    return (lambda o: 2 * (o[speed[env_id]] > 0)) if env_id in speed else None


@pytest.mark.parametrize("env_id", POOL)
def test_steps_and_terminations_agree(pair: Any, env_id: str) -> None:
    both = pair(env_id, rebuild, policy=with_the_swing(env_id))
    observation, reward, rewarded, terminated = both.walk(600)
    assert observation < 1e-4  # the state comes from a float32 observation
    assert reward < 1e-6
    assert rewarded
    assert terminated


def test_starts_agree(starts_differ: Any) -> None:
    assert [env_id for env_id in POOL if starts_differ(env_id)] == []
