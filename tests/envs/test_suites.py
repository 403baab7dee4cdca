"""The suites that other packages bring: Atari, Gymnasium-Robotics, Meta-World, OGBench, ICU-Sepsis."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tether.envs import EnvError, make_env, make_vec, resolve_backend
from tether.envs.suite import installed


@pytest.fixture
def atari(need: Any) -> None:
    need(installed("ale_py", "cv2"), "ale-py")


@pytest.mark.usefixtures("atari")
def test_one_atari_game_is_as_gymnasium_makes_it() -> None:
    env = make_env("ALE/Breakout-v5")
    observation, _ = env.reset(seed=0)
    assert observation.shape == (210, 160, 3)
    env.close()


@pytest.mark.usefixtures("atari")
def test_a_vector_of_atari_games_is_preprocessed() -> None:
    venv = make_vec("ALE/Breakout-v5", 2, seed=0)
    assert venv.observation_space.shape == (4, 84, 84)
    assert venv.reset().dtype == np.uint8
    rng = np.random.default_rng(0)
    rewards = [venv.step(rng.integers(4, size=2))[1] for _ in range(60)]
    assert set(np.unique(rewards)) <= {-1.0, 0.0, 1.0}
    venv.close()
    other = make_vec("ALE/Breakout-v5", 1, frame_stack=0, env_kwargs={"screen_size": 42, "clip_reward": False})
    assert other.observation_space.shape == (1, 42, 42)
    other.close()


@pytest.mark.usefixtures("atari")
def test_atari_skips_frames_once() -> None:
    """Four frames a step, not four of the wrapper times four of the game."""
    env = make_env("ALE/Breakout-v5", preprocess=True)
    env.reset(seed=0)
    before = env.unwrapped.ale.getEpisodeFrameNumber()  # type: ignore[attr-defined]
    env.step(0)
    assert env.unwrapped.ale.getEpisodeFrameNumber() - before == 4  # type: ignore[attr-defined]
    env.close()


@pytest.mark.parametrize(
    ("env_id", "steps", "shapes"),
    [("AdroitHandDoor-v1", 200, (39, 28)), ("cube-single-play-singletask-task1-v0", 200, (28, 5))],
)
def test_manipulation(env_id: str, steps: int, shapes: tuple[int, int], need: Any) -> None:
    need(installed("gymnasium_robotics", "ogbench"), "gymnasium-robotics or ogbench")
    env = make_env(env_id)
    observation, _ = env.reset(seed=0)
    assert env.spec is not None
    assert env.spec.max_episode_steps == steps
    assert (env.observation_space.shape, env.action_space.shape) == ((shapes[0],), (shapes[1],))
    assert env.observation_space.contains(observation)
    assert observation.dtype == np.float32
    env.step(env.action_space.sample())
    env.close()


def test_goals_stay_a_dict(need: Any) -> None:
    need(installed("gymnasium_robotics"), "gymnasium-robotics")
    env = make_env("FetchReach-v4")
    observation, _ = env.reset(seed=0)
    assert isinstance(env.observation_space, gym.spaces.Dict)
    assert set(observation) == {"observation", "achieved_goal", "desired_goal"}
    assert env.observation_space.contains(observation)
    env.close()


def test_meta_world(need: Any) -> None:
    need(installed("envpool"), "EnvPool")
    env_id = "Meta-World/door-open-v3"
    assert resolve_backend(env_id, 2) == "envpool"
    env, venv = make_env(env_id), make_vec(env_id, 2, seed=0, env_kwargs={"max_episode_steps": 3})
    assert env.spec is not None
    assert env.spec.max_episode_steps == 500
    assert env.observation_space == venv.observation_space
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert "success" in env.step(env.action_space.sample())[4]
    venv.reset()
    for _ in range(3):
        _, rewards, dones, infos = venv.step(np.zeros((2, 4), dtype=np.float32))
    assert dones.all()
    assert all(0 <= reward <= 10 for reward in rewards)
    assert all(info["TimeLimit.truncated"] and "success" in info for info in infos)
    with pytest.raises(EnvError, match="gives no pictures here: leave out render_mode"):
        make_env(env_id, render_mode="rgb_array")
    with pytest.raises(EnvError, match="has no argument 'goal'"):
        make_env(env_id, goal=1)
    env.close()
    venv.close()


def test_icu_sepsis(need: Any) -> None:
    need(installed("icu_sepsis"), "icu-sepsis")
    venv = make_vec("Sepsis/ICU-Sepsis-v2", 2, seed=0)
    assert (venv.observation_space.n, venv.action_space.n) == (716, 25)  # type: ignore[attr-defined]
    venv.reset()
    venv.step(np.zeros(2, dtype=int))
    venv.close()
