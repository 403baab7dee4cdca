"""dm_control: the order of the parts, bounds, ends, pixels."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tether.envs import make_env, make_vec
from tether.envs.distractors import COLOUR, GEOM, DistractedPixels
from tether.envs.dm_control import SUITE
from tether.envs.suite import EnvError


@pytest.mark.parametrize("env_id", ["dm_control/fish-swim-v0", "dm_control/manipulator-bring_ball-v0"])
def test_parts_keep_dm_controls_order(env_id: str) -> None:
    """Neither id's parts are in alphabetical order."""
    env = make_env(env_id)
    observation, _ = env.reset(seed=0)
    task: Any = env.unwrapped
    parts = task._env.task.get_observation(task._env.physics)
    assert list(parts) != sorted(parts)
    np.testing.assert_array_equal(observation, np.concatenate([np.ravel(p) for p in parts.values()]).astype(np.float32))
    assert env.observation_space.contains(observation)
    env.close()


def test_the_dict_stays_where_it_is_asked_for() -> None:
    env = make_env("dm_control/fish-swim-v0", flatten=False)
    assert isinstance(env.observation_space, gym.spaces.Dict)
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"joint_angles", "upright", "target", "velocity"}
    assert env.observation_space.contains(observation)
    assert observation["velocity"].dtype == np.float32
    venv = make_vec("dm_control/fish-swim-v0", 2, env_kwargs={"flatten": False})
    assert venv.reset()["target"].shape == (2, 3)
    env.close()
    venv.close()


def test_actions_are_float32_within_the_bounds() -> None:
    env = make_env("dm_control/quadruped-walk-v0")
    spec = env.unwrapped._env.action_spec()  # type: ignore[attr-defined]
    assert env.action_space.dtype == np.float32
    assert (env.action_space.low.astype(float) >= spec.minimum).all()  # type: ignore[attr-defined]
    assert (env.action_space.high.astype(float) <= spec.maximum).all()  # type: ignore[attr-defined]
    np.testing.assert_allclose(env.action_space.high, spec.maximum, rtol=1e-6)  # type: ignore[attr-defined]
    env.close()


def test_the_time_limit_is_a_truncation() -> None:
    env = make_env("dm_control/pendulum-swingup-v0")
    assert env.spec is not None
    assert env.spec.max_episode_steps == 1000
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(1000)]
    assert ends[-1] == (False, True)
    assert not np.any(ends[:-1])
    env.close()


def test_discount_zero_is_a_termination() -> None:
    env = make_env("dm_control/lqr-lqr_2_1-v0")
    assert env.spec is not None
    assert env.spec.max_episode_steps is None
    env.reset(seed=0)
    physics = env.unwrapped._env.physics  # type: ignore[attr-defined]
    with physics.reset_context():
        physics.data.qpos[:] = 0  # there LQR ends
    assert env.step(np.zeros(1, dtype=np.float32))[2:4] == (True, False)
    env.close()


def test_action_repeat() -> None:
    once, thrice = (make_env("dm_control/cheetah-run-v0", action_repeat=n) for n in (1, 3))
    once.reset(seed=0)
    thrice.reset(seed=0)
    action = np.ones(6, dtype=np.float32)
    single = [once.step(action) for _ in range(3)]
    observation, reward, *_ = thrice.step(action)
    np.testing.assert_array_equal(observation, single[-1][0])
    assert reward == pytest.approx(sum(step[1] for step in single))
    assert thrice.spec is not None
    assert thrice.spec.max_episode_steps == 334
    assert thrice.metadata["render_fps"] == round(100 / 3)


@pytest.fixture(scope="session")
def renderer(need: Any) -> None:
    try:
        make_env("dm_control/pendulum-swingup-v0", from_pixels=True).reset()
    except Exception as error:  # each platform's library has errors of its own
        need(False, f"an OpenGL renderer ({error!r})")


@pytest.mark.usefixtures("renderer")
def test_pixels() -> None:
    arguments = {"from_pixels": True, "image_size": 32, "action_repeat": 2}
    env = make_env("dm_control/walker-walk-v0", **arguments)  # type: ignore[arg-type]
    picture, _ = env.reset(seed=0)
    assert picture.shape == (32, 32, 3)
    assert env.observation_space.contains(picture)
    assert picture.std() > 10
    np.testing.assert_array_equal(picture, env.reset(seed=0)[0])
    venv = make_vec("dm_control/walker-walk-v0", 1, seed=0, env_kwargs=arguments)
    np.testing.assert_array_equal(venv.reset()[0], picture.transpose(2, 0, 1))
    env.close()
    venv.close()


@pytest.mark.usefixtures("renderer")
def test_fast_pixels_and_cameras_are_other_pictures() -> None:
    options: list[dict[str, Any]] = [{}, {"fast_render": True}, {"camera_id": 1}]
    pictures = [make_env("dm_control/walker-walk-v0", from_pixels=True, **kw).reset(seed=0)[0] for kw in options]
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 3
    stock, fast, side = (picture.astype(int) for picture in pictures)
    assert 0 < np.abs(stock - fast).mean() < 20  # the same scene
    assert np.abs(stock - side).mean() > np.abs(stock - fast).mean()


@pytest.mark.usefixtures("renderer")
@pytest.mark.parametrize("task", ["quadruped-walk", "dog-fetch", "cheetah-run", "finger-spin"])
def test_the_body_is_in_the_picture(task: str) -> None:
    env = make_env(f"dm_control/{task}-v0", from_pixels=True, distraction=1.0)
    env.reset(seed=0)
    assert isinstance(env, DistractedPixels)
    assert (~env.background()).sum() > 100
    env.close()


@pytest.mark.usefixtures("renderer")
def test_render() -> None:
    env = make_env("dm_control/cartpole-swingup-v0", render_mode="rgb_array")
    env.reset(seed=0)
    picture: Any = env.render()
    assert picture.shape == (240, 320, 3)
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("env_id", SUITE.ids())
def test_every_task_runs(env_id: str) -> None:
    env = make_env(env_id)
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        assert env.observation_space.contains(observation)
        observation, reward, *_ = env.step(env.action_space.sample())
        assert np.isfinite(reward)
    venv = make_vec(env_id, 1, backend="envpool")
    assert venv.observation_space == env.observation_space
    assert venv.reset().shape == (1, *observation.shape)
    env.close()
    venv.close()


@pytest.mark.usefixtures("renderer")
def test_distraction_changes_the_background_and_nothing_of_the_task() -> None:
    """Sky and floor are texture, the body keeps its shape; rewards, and pictures of the same seed, are the same."""
    arguments: dict[str, Any] = {"from_pixels": True, "fast_render": True}
    clean, wild, again = (make_env("dm_control/walker-walk-v0", **arguments, distraction=d) for d in (0.0, 1.0, 1.0))
    _, one, same = (env.reset(seed=3)[0] for env in (clean, wild, again))
    np.testing.assert_array_equal(one, same)
    layers = wild
    while not isinstance(layers, DistractedPixels):
        layers = layers.env  # type: ignore[attr-defined]
    action = wild.action_space.sample()
    texture = layers.texture.picture(0)
    for _ in range(20):
        after, reward, *_ = clean.step(action)
        distracted, distracted_reward, *_ = wild.step(action)
        assert reward == distracted_reward
        behind = layers.background()
        assert 0.8 < behind.mean() < 0.99
        np.testing.assert_array_equal(distracted[behind], layers.texture.picture(layers.steps)[behind])
        tint = 1.0 + COLOUR * np.sin(layers.tints[0] + layers.tints[1] * layers.steps)
        np.testing.assert_allclose(distracted[~behind], np.minimum(after[~behind] * tint, 255.0), atol=1.0)
    assert np.abs(layers.texture.picture(20).astype(int) - texture).mean() > 20  # it moves
    assert np.abs(wild.reset()[0].astype(int) - one).mean() > 20  # the next episode has another


@pytest.mark.usefixtures("renderer")
@pytest.mark.parametrize("env_id", ["dm_control/finger-turn_hard-v0", "dm_control/ball_in_cup-catch-v0"])
def test_distraction_leaves_what_is_drawn_and_is_no_geom(env_id: str) -> None:
    """finger's target is a site, ball_in_cup's string a tendon."""
    layers = make_env(env_id, from_pixels=True, distraction=1.0)
    layers.reset(seed=0)
    while not isinstance(layers, DistractedPixels):
        layers = layers.env  # type: ignore[attr-defined]
    kinds = layers._physics.render(layers.size, layers.size, camera_id=layers.camera_id, segmentation=True)[..., 1]
    others = (kinds >= 0) & (kinds != GEOM)
    assert others.sum() > 5
    assert not layers.background()[others].any()


def test_arguments_that_make_no_environment() -> None:
    for name in ("action_repeat", "image_size"):
        for value in (0, -2, 2.5):
            with pytest.raises(EnvError, match=f"{name} is a whole number above 0, not {value}"):
                make_env("dm_control/cartpole-swingup-v0", **{name: value})
    with pytest.raises(EnvError, match=r"is -1 \(the free camera\) or one of its 2, from 0 on: not 9"):
        make_env("dm_control/cartpole-swingup-v0", camera_id=9)
    with pytest.raises(EnvError, match=r"distraction is a strength in \[0, 1\] and needs from_pixels=True, not 0.5"):
        make_env("dm_control/walker-walk-v0", distraction=0.5)
    with pytest.raises(EnvError, match=r"not 2\.0"):
        make_env("dm_control/walker-walk-v0", from_pixels=True, distraction=2.0)
