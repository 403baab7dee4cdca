"""Velocity-constrained MuJoCo: thresholds, which velocity counts, and that costs reach the vector's infos."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tether.agents.common.env_state import env_state, restore_env_state
from tether.envs import EnvError, cautious_arguments, list_envs, make_env, make_vec, resolve_backend
from tether.envs.safety import LIMITS

SIZES = {"Ant": 27, "HalfCheetah": 17, "Hopper": 11, "Humanoid": 376, "Swimmer": 8, "Walker2d": 17}


def after_a_step_at(env_id: str, x_velocity: float, y_velocity: float = 0.0, **kwargs: Any) -> dict[str, Any]:
    """The info of a step without torques that began with these velocities of the root."""
    env = make_env(env_id, **kwargs)
    env.reset(seed=0)
    task: Any = env.unwrapped
    velocity = np.zeros(task.model.nv)
    velocity[0] = x_velocity
    if "Ant" in env_id or "Swimmer" in env_id or "Humanoid" in env_id:
        velocity[1] = y_velocity
    task.set_state(task.init_qpos, velocity)
    info = env.step(np.zeros(env.action_space.shape or ()))[4]
    env.close()
    return info


def test_ids() -> None:
    assert list_envs()["safety"] == [f"Safety{robot}Velocity-v1" for robot in LIMITS]
    assert set(SIZES) == set(LIMITS)


@pytest.mark.parametrize("robot", LIMITS)
def test_sizes_limit_and_name(robot: str) -> None:
    """The sizes of DSRL's data sets; Ant's 27 are without contact forces."""
    env = make_env(f"Safety{robot}Velocity-v1")
    assert env.observation_space.shape == (SIZES[robot],)
    assert env.observation_space.dtype == np.float32
    assert env.spec is not None
    assert (env.spec.id, env.spec.max_episode_steps) == (f"Safety{robot}Velocity-v1", 1000)
    env.close()


@pytest.mark.parametrize("robot", LIMITS)
def test_cost_is_one_above_the_threshold(robot: str) -> None:
    env_id = f"Safety{robot}Velocity-v1"
    fast, slow = after_a_step_at(env_id, 10.0), after_a_step_at(env_id, 0.0)
    assert fast["x_velocity"] > LIMITS[robot].threshold > slow["x_velocity"]
    assert (fast["cost"], slow["cost"]) == (1.0, 0.0)
    assert isinstance(fast["cost"], float)


@pytest.mark.parametrize(("robot", "sideways"), [("Ant", 1.0), ("Humanoid", 1.0), ("Swimmer", 0.0)])
def test_whether_running_sideways_costs(robot: str, sideways: float) -> None:
    info = after_a_step_at(f"Safety{robot}Velocity-v1", 0.0, 10.0)
    assert abs(info["y_velocity"]) > LIMITS[robot].threshold > info["x_velocity"]
    assert info["cost"] == sideways


@pytest.mark.parametrize(("robot", "backwards"), [("Ant", 1.0), ("HalfCheetah", 0.0), ("Hopper", 0.0)])
def test_whether_running_backwards_costs(robot: str, backwards: float) -> None:
    assert after_a_step_at(f"Safety{robot}Velocity-v1", -10.0)["cost"] == backwards


def test_the_threshold_can_be_changed() -> None:
    env_id = "SafetyHalfCheetahVelocity-v1"
    speed = after_a_step_at(env_id, 2.0)["x_velocity"]
    assert after_a_step_at(env_id, 2.0, velocity_threshold=speed - 1e-6)["cost"] == 1.0
    assert after_a_step_at(env_id, 2.0, velocity_threshold=speed)["cost"] == 0.0  # at the threshold is not above it


@pytest.mark.parametrize("robot", ["HalfCheetah", "Ant"])
def test_everything_but_the_cost_is_gymnasiums(robot: str) -> None:
    ours, theirs = make_env(f"Safety{robot}Velocity-v1"), make_env(f"{robot}-v4")
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-1, 1, ours.action_space.shape)
        (observation, *ends, info), (expected, *expected_ends, expected_info) = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(observation, expected)
        assert ends == expected_ends
        assert set(info) == {*expected_info, "cost"}


def test_costs_reach_the_vectors_infos_also_at_the_end() -> None:
    env_id = "SafetyHopperVelocity-v1"
    assert resolve_backend(env_id, 4) == "dummy"
    venv = make_vec(env_id, 2, seed=0, env_kwargs={"velocity_threshold": 0.0})
    venv.reset()
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(150):
        _, _, dones, infos = venv.step(rng.uniform(-1, 1, (2, 3)).astype(np.float32))
        assert all(info["cost"] == float(info["x_velocity"] > 0.0) for info in infos)
        ends += sum(dones)
    assert ends > 0
    venv.close()


def test_a_time_limit_is_a_truncation() -> None:
    venv = make_vec("SafetySwimmerVelocity-v1", 1, seed=0, env_kwargs={"max_episode_steps": 2})
    venv.reset()
    for _ in range(2):
        _, _, dones, infos = venv.step(np.zeros((1, 2), np.float32))
    assert dones[0]
    assert infos[0]["TimeLimit.truncated"]
    assert infos[0]["cost"] == 0.0
    venv.close()


@pytest.mark.parametrize(
    ("env_id", "kwargs", "sentence"),
    [
        (
            "SafetyAntVelocity-v0",
            {},
            "There is no environment 'SafetyAntVelocity-v0': did you mean 'SafetyAntVelocity-v1'?",
        ),
        (
            "SafetyAntVelocity-v1",
            {"velocity_threshold": -1.0},
            "velocity_threshold is -1.0: give a speed in m/s, 0 or more.",
        ),
        (
            "SafetyAntVelocity-v1",
            {"speed": 1.0},
            "SafetyAntVelocity-v1 has no argument 'speed': leave it out, or look for its right name.",
        ),
    ],
)
def test_refusals(env_id: str, kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EnvError) as error:
        make_env(env_id, **kwargs)
    assert str(error.value) == sentence


def test_nothing_is_registered_with_gymnasium() -> None:
    """The ids stay free for Safety-Gymnasium itself."""
    assert "SafetyAntVelocity-v1" not in gym.registry


@pytest.mark.parametrize("robot", ["Hopper", "Ant"])
def test_a_vector_goes_on_elsewhere(robot: str) -> None:
    first, second = (make_vec(f"Safety{robot}Velocity-v1", 2, seed=seed) for seed in (1, 2))
    first.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 2, *(first.action_space.shape or ()))).astype(np.float32)
    for action in actions[:77]:
        first.step(action)
    restore_env_state(second, env_state(first))
    for action in actions[77:]:
        *ours, infos = first.step(action)
        *theirs, expected = second.step(action)
        for mine, yours in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, yours)
        assert [info["cost"] for info in infos] == [info["cost"] for info in expected]


def test_a_margin_lowers_the_threshold() -> None:
    env = make_env("SafetyHalfCheetahVelocity-v1", margin=0.25)
    assert env.get_wrapper_attr("threshold") == pytest.approx(0.75 * 3.2096)
    assert cautious_arguments("SafetyHalfCheetahVelocity-v1") == {"margin": 0.2}
    for env_id in list_envs()["safety"]:
        make_env(env_id, **cautious_arguments(env_id)).close()
    with pytest.raises(EnvError, match="margin is 1"):
        make_env("SafetyHalfCheetahVelocity-v1", margin=1.0)
