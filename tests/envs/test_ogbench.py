"""OGBench's single tasks: their ids, limits and sizes, success, and when it is told."""

from __future__ import annotations

import numpy as np
import pytest

from tether.envs import list_envs, make_env

pytest.importorskip("ogbench")

TASKS = {
    "cube-single-play": (200, 28, 5, -1), "cube-double-play": (500, 37, 5, -2), "cube-triple-play": (1000, 46, 5, -3),
    "scene-play": (750, 40, 5, -5), "puzzle-3x3-play": (500, 55, 5, -9), "pointmaze-medium-navigate": (1000, 2, 2, -1),
    "antmaze-medium-navigate": (1000, 29, 8, -1), "antmaze-giant-navigate": (1000, 29, 8, -1),
    "humanoidmaze-medium-navigate": (2000, 69, 21, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_single_tasks(name: str) -> None:
    """Five of each, with the limit of an episode and the sizes that papers use; ``info["success"]`` at every step."""
    limit, observations, actions, worst = TASKS[name]
    assert {f"{name}-singletask-task{k}-v0" for k in range(1, 6)} <= set(list_envs()["ogbench"])
    env = make_env(f"{name}-singletask-task4-v0")
    assert env.spec is not None
    assert env.spec.max_episode_steps == limit
    observation, _ = env.reset(seed=0)
    assert (observation.shape, observation.dtype, env.action_space.shape) == ((observations,), np.float32, (actions,))
    _, reward, terminated, truncated, info = env.step(np.zeros(actions, np.float32))
    assert worst <= reward < 0.0
    assert not any([info["success"], terminated, truncated])
    env.close()


@pytest.mark.parametrize(("timing", "at_once"), [("pre", False), ("post", True)])
def test_when_success_is_told(timing: str, at_once: bool) -> None:
    """OGBench 1.2 tells it, with reward and end, of the state before the step, and formerly of the one after."""
    env = make_env("pointmaze-medium-navigate-singletask-task1-v0", success_timing=timing)
    env.reset(seed=0)
    env.unwrapped.set_xy(env.unwrapped.cur_goal_xy + np.array([1.05, 0.0]))  # type: ignore[attr-defined]
    told = []
    for _ in range(2):
        _, reward, terminated, _, info = env.step(np.array([-1.0, 0.0], np.float32))
        assert bool(info["success"]) == terminated == (reward == 0.0)
        told.append(terminated)
    assert told == [at_once, True]
    env.close()
