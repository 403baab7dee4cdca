"""EnvPool's MuJoCo tasks against Gymnasium's, step by step from the same states."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from tether.envs.mujoco import SUITE

# EnvPool's starts without their noise, which then are the model's own state; v4 and v5 alike.
STILL: dict[str, dict[str, float]] = {
    "Pusher": {"reset_qvel_scale": 0.0},
    "Reacher": {"reset_qpos_scale": 0.0, "reset_qvel_scale": 0.0},
}
TABLE = [env_id for env_id in SUITE.ids() if SUITE.pool(env_id).agrees]  # type: ignore[union-attr]


def rebuild(env: gym.Env, seen: dict[str, np.ndarray]) -> None:
    """Put the reference into its initial state, and the objects and goals of Pusher and Reacher where they are seen."""
    task: Any = env.unwrapped
    qpos, qvel = task.init_qpos.copy(), task.init_qvel.copy()
    name, seen_now = env.spec.name, seen["obs"]  # type: ignore[union-attr]
    if name == "Reacher":
        qpos[2:], qvel[2:] = seen_now[4:6], 0
    if name == "Pusher":
        place(task, qpos, 0 * qvel)
        for body, joints, xy in (("object", slice(-4, -2), seen_now[17:19]), ("goal", slice(-2, None), seen_now[20:22])):
            qpos[joints] += (xy - task.get_body_com(body)[:2])[::-1]  # the slide along y comes first
        qvel *= 0
    place(task, qpos, qvel)


def place(task: Any, qpos: np.ndarray, qvel: np.ndarray) -> None:
    mujoco.mj_resetData(task.model, task.data)
    task.set_state(qpos, qvel)


def still(env_id: str) -> dict[str, float]:
    return STILL.get(env_id.split("-")[0], {"reset_noise_scale": 0.0})


@pytest.mark.parametrize("env_id", TABLE)
def test_steps_agree(pair: Any, env_id: str) -> None:
    observation, reward, rewarded, _ = pair(env_id, rebuild, config=still(env_id), max_episode_steps=50).walk(120)
    assert observation < 1e-6
    assert reward < 1e-6
    assert rewarded


@pytest.mark.parametrize("env_id", ["Ant-v5", "Hopper-v4", "Humanoid-v5", "InvertedDoublePendulum-v5", "Walker2d-v5"])
def test_terminations_agree(pair: Any, env_id: str) -> None:
    assert pair(env_id, rebuild, hold=5, config=still(env_id)).walk(120)[3] > 0


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("Ant-v5", {"contact_cost_weight": 0.1, "forward_reward_weight": 2.0, "healthy_reward": 3.0}),
        ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 1.0}),
        ("Hopper-v4", {"terminate_when_unhealthy": False, "ctrl_cost_weight": 0.5}),
    ],
)
def test_arguments_mean_the_same(pair: Any, env_id: str, kwargs: dict[str, Any]) -> None:
    both = pair(env_id, rebuild, config=still(env_id), max_episode_steps=50, **kwargs)
    observation, reward, _, _ = both.walk(60)
    assert observation < 1e-6
    assert reward < 1e-6


def test_contact_forces_differ_without_our_setting(pair: Any) -> None:
    """The comparison sees a difference where there is one: EnvPool's own Humanoid-v4 leaves the contact forces out."""
    both = pair("Humanoid-v4", rebuild, config={**still("Humanoid-v4"), "post_constraint": False})
    assert both.walk(30)[0] > 1.0


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Reacher-v4"])
def test_starts_agree(starts_differ: Any, env_id: str) -> None:
    assert not starts_differ(env_id)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", TABLE)
def test_all_starts_agree(starts_differ: Any, env_id: str) -> None:
    assert not starts_differ(env_id)
