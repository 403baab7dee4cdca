"""Bullet-Safety-Gym: shapes, costs, seeds that hold, and what is said where it is not installed."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tether.agents.common.env_state import env_state, restore_env_state
from tether.envs import EnvError, list_envs, make_env, make_vec
from tether.envs.bullet import STEPS
from tether.envs.suite import installed

SHAPES = {
    "SafetyBallRun-v0": (7, 2), "SafetyCarRun-v0": (7, 2), "SafetyDroneRun-v0": (17, 4), "SafetyAntRun-v0": (33, 8),
    "SafetyBallCircle-v0": (8, 2), "SafetyCarCircle-v0": (8, 2), "SafetyDroneCircle-v0": (18, 4),
    "SafetyAntCircle-v0": (34, 8),
}  # fmt: skip


@pytest.fixture
def bullet(need: Any) -> None:
    need(installed("pybullet", "bullet_safety_gym"), "bullet-safety-gym")


def episode(env: Any, seed: int, steps: int = 40) -> np.ndarray:
    """Observations (T + 1, d) from a seed under actions that belong to it."""
    rng = np.random.default_rng(seed)
    observations, ended = [env.reset(seed=seed)[0]], False
    while not ended and len(observations) <= steps:
        observation, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        observations.append(observation)
        ended = terminated or truncated
    return np.array(observations)


@pytest.mark.usefixtures("bullet")
@pytest.mark.parametrize("env_id", STEPS)
def test_an_episode_follows_from_seed_and_actions(env_id: str) -> None:
    """In another instance, after other episodes, and whatever the global generators are."""
    first, second = make_env(env_id), make_env(env_id)
    assert (first.observation_space.shape, first.action_space.shape) == tuple((size,) for size in SHAPES[env_id])
    assert first.spec is not None
    assert (first.spec.id, first.spec.max_episode_steps) == (env_id, STEPS[env_id])
    lived = episode(first, 5)
    assert lived.dtype == np.float32
    np.random.seed(9)  # noqa: NPY002
    episode(second, 7)
    other = episode(second, 8, 17)
    np.testing.assert_array_equal(episode(second, 5), lived)
    assert not np.array_equal(other[0], lived[0])
    first.close()
    second.close()
    second.close()


@pytest.mark.usefixtures("bullet")
def test_the_global_generators_stay_as_they_are() -> None:
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    expected = np.random.random(), random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    env = make_env("SafetyCarRun-v0")
    env.reset(seed=0)
    env.close()
    assert (np.random.random(), random.random()) == expected  # noqa: NPY002


@pytest.mark.usefixtures("bullet")
def test_costs_of_the_run_task_are_lines_and_speed() -> None:
    env = make_env("SafetyBallRun-v0")
    env.reset(seed=0)
    seen = set()
    for _ in range(100):
        observation, _, _, truncated, info = env.step(np.array([1.0, 0.3]))
        outside, speed = abs(observation[1]) * 10.0 > 2.0, np.linalg.norm(observation[2:4]) * 5.0
        assert info["cost"] == float(outside or speed > 2.5)
        assert isinstance(info["cost"], float)
        seen.add(info["cost"])
    assert seen == {0.0, 1.0}
    assert truncated
    env.close()


@pytest.mark.usefixtures("bullet")
def test_costs_of_the_circle_task_are_the_lines() -> None:
    env = make_env("SafetyBallCircle-v0")
    env.reset(seed=0)
    costs = []
    for _ in range(200):
        observation, _, _, _, info = env.step(np.array([1.0, 0.0]))
        assert info["cost"] == float(abs(observation[0]) * 10.0 > 6.0)
        costs.append(info["cost"])
    assert set(costs) == {0.0, 1.0}
    env.close()


@pytest.mark.usefixtures("bullet")
def test_costs_reach_the_vectors_infos_also_at_the_end() -> None:
    venv = make_vec("SafetyBallRun-v0", 2, seed=0, env_kwargs={"max_episode_steps": 60})
    venv.reset()
    for _ in range(60):
        _, _, dones, infos = venv.step(np.ones((2, 2), np.float32))
    assert dones.all()
    assert [(info["cost"], info["TimeLimit.truncated"], info["episode"]["l"]) for info in infos] == [(1.0, True, 60)] * 2
    venv.close()


@pytest.mark.usefixtures("bullet")
@pytest.mark.parametrize("env_id", ["SafetyCarCircle-v0", "SafetyDroneRun-v0"])
def test_an_episode_under_way_goes_on_elsewhere(env_id: str) -> None:
    first, second = (make_vec(env_id, 2, seed=seed, env_kwargs={"max_episode_steps": 50}) for seed in (1, 2))
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (120, 2, *(first.action_space.shape or ()))).astype(np.float32)
    first.reset()
    for action in actions[:70]:
        first.step(action)
    restore_env_state(second, env_state(first))
    for action in actions[70:]:
        for ours, theirs in zip(first.step(action)[:3], second.step(action)[:3], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    first.close()
    second.close()


@pytest.mark.usefixtures("bullet")
def test_a_picture() -> None:
    env = make_env("SafetyBallCircle-v0", render_mode="rgb_array")
    env.reset(seed=0)
    picture: Any = env.render()
    assert (picture.shape, picture.dtype) == ((360, 480, 3), np.uint8)
    assert picture.std() > 0
    env.close()


@pytest.mark.usefixtures("bullet")
def test_it_is_quiet() -> None:
    code = "from tether.envs import make_env; env = make_env('SafetyBallRun-v0'); env.reset(seed=0); env.close()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "pybullet" not in done.stderr


@pytest.mark.usefixtures("bullet")
@pytest.mark.parametrize(
    ("env_id", "kwargs", "sentence"),
    [
        (
            "SafetyBallRun-v0",
            {"max_steps": 3},
            "SafetyBallRun-v0 has no argument 'max_steps': did you mean 'max_episode_steps'?",
        ),
        (
            "SafetyBallReach-v0",
            {},
            f"SafetyBallReach-v0 is not among the tasks whose starts follow a seed: use one of {', '.join(STEPS)}.",
        ),
        (
            "SafetyBallRun-v0",
            {"render_mode": "human"},
            "SafetyBallRun-v0 has no render_mode 'human': use 'rgb_array'.",
        ),
    ],
)
def test_refusals(env_id: str, kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EnvError) as error:
        make_env(env_id, **kwargs)
    assert str(error.value) == sentence


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.envs.bullet.installed", lambda *names: False)
    assert "bullet" not in list_envs()
    with pytest.raises(EnvError) as error:
        make_env("SafetyBallRun-v0")
    assert str(error.value) == (
        "SafetyBallRun-v0 needs two packages: type 'pip install pybullet==3.2.7', "
        "and then 'pip install --no-deps bullet-safety-gym==1.4.0'."
    )
