"""ProcGen: the games, their levels, and EnvPool's build against OpenAI's."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from tether.envs import EnvError, make_env, make_vec
from tether.envs.procgen import GAMES, SUITE, OpenAIProcgen, build
from tether.envs.suite import installed

ALL = [f"procgen/{game}-{mode}-v0" for game in GAMES for mode in ("easy", "hard")]


@pytest.fixture(autouse=True)
def _qt(need: Any) -> None:
    need(build() == "envpool", "EnvPool with Qt 5")


def test_every_game_runs() -> None:
    assert set(SUITE.ids()) == set(ALL)
    for env_id in ALL:
        env = make_env(env_id)
        observation, _ = env.reset(seed=0)
        assert observation.shape == (64, 64, 3)
        assert env.observation_space.contains(observation)
        assert env.action_space.n == 15  # type: ignore[attr-defined]
        for action in (7, 4):
            observation, reward, *_ = env.step(action)
        assert env.observation_space.contains(observation)
        assert np.isfinite(reward)
        env.close()


def test_a_vector_gives_channels_first() -> None:
    for backend in ("dummy", "envpool"):
        venv = make_vec("procgen/bigfish-easy-v0", 3, backend=backend, seed=0)
        assert venv.observation_space.shape == (3, 64, 64)
        observations, rewards, _, _ = (venv.reset(), venv.step(np.full(3, 4)))[1]
        assert observations.shape == (3, 3, 64, 64)
        assert observations.dtype == np.uint8
        assert rewards.dtype == np.float32
        venv.close()


def levels(n_resets: int, **kwargs: Any) -> set[int]:
    venv = make_vec("procgen/leaper-easy-v0", 16, seed=0, backend="envpool", env_kwargs=kwargs)
    venv.reset()
    pool = venv.venv._pool  # type: ignore[attr-defined]
    seeds = {int(level) for _ in range(n_resets) for level in pool.reset()[1]["level_seed"]}
    venv.close()
    return seeds


def test_levels() -> None:
    default = levels(40)
    assert default <= set(range(200))
    assert len(default) > 150
    assert levels(4, num_levels=5, start_level=50) == set(range(50, 55))
    assert max(levels(2, num_levels=0)) > 10_000


def test_one_level_has_one_first_picture() -> None:
    for backend in ("dummy", "envpool"):
        arguments = {"num_levels": 1, "start_level": 3}
        venv = make_vec("procgen/coinrun-hard-v0", 3, backend=backend, seed=0, env_kwargs=arguments)
        first = venv.reset()
        assert (first == first[0]).all()
        venv.close()
    several = make_vec("procgen/coinrun-hard-v0", 3, seed=0)
    pictures = several.reset()
    assert not (pictures == pictures[0]).all()
    several.close()


def test_seeds() -> None:
    env = make_env("procgen/maze-easy-v0")
    first, _ = env.reset(seed=1)
    np.testing.assert_array_equal(first, env.reset(seed=1)[0])
    assert not np.array_equal(first, env.reset(seed=2)[0])
    env.close()


def test_ends() -> None:
    """The maze ends by itself after 500 steps, an earlier limit is a truncation."""
    for limit, expected in ((None, (500, True, False)), (20, (20, False, True))):
        env = make_env("procgen/maze-easy-v0", **({} if limit is None else {"max_episode_steps": limit}))
        env.reset(seed=0)
        steps, terminated, truncated = 0, False, False
        while not (terminated or truncated):
            _, _, terminated, truncated, _ = env.step(4)
            steps += 1
        assert (steps, terminated, truncated) == expected
        env.close()


def test_an_ended_game_shows_its_end_and_the_next_start() -> None:
    """The picture at the end is not that of the next start, which is the level's first."""
    arguments = {"num_levels": 1, "start_level": 5}
    venv = make_vec("procgen/bigfish-easy-v0", 1, backend="envpool", seed=0, env_kwargs=arguments)
    first = venv.reset()
    for _ in range(500):
        observations, _, dones, infos = venv.step(np.array([4]))
        if dones[0]:
            break
    np.testing.assert_array_equal(observations, first)
    assert not np.array_equal(infos[0]["terminal_observation"], first[0])
    assert infos[0]["TimeLimit.truncated"] is False
    assert infos[0]["level_seed"] == 5
    venv.close()


def test_rewards_of_a_thousand_first_steps() -> None:
    """A vector in one pool and single environments see the same rewards equally often."""
    venv = make_vec("procgen/fruitbot-easy-v0", 20, backend="envpool", seed=0)
    single = make_vec("procgen/fruitbot-easy-v0", 20, backend="dummy", seed=100)
    rewards = []
    for each in (venv, single):
        rng = np.random.default_rng(0)
        each.reset()
        rewards.append(np.concatenate([each.step(rng.integers(15, size=20))[1] for _ in range(50)]))
        each.close()
    assert set(np.unique(rewards)) <= {-4.0, 0.0, 1.0, 10.0}
    assert abs(np.mean(rewards[0] != 0) - np.mean(rewards[1] != 0)) < 0.03


def test_envpool_agrees_with_openai() -> None:
    """The same level under the same actions: rewards and ends are equal, and pictures but for the rims of sprites."""
    if not installed("procgen", "gym3", "gym"):
        pytest.skip("OpenAI's build is not installed (pip install --no-deps gym3 procgen-mirror==0.10.7)")
    levels = {"num_levels": 1, "start_level": 5}
    rng = np.random.default_rng(0)
    for env_id in ALL:
        game, mode = env_id.removeprefix("procgen/").split("-")[:2]
        pool, own = make_env(env_id, **levels), OpenAIProcgen(None, env_name=game, distribution_mode=mode, **levels)
        apart = [pool.reset(seed=0)[0] != own.reset(seed=0)[0]]
        for _ in range(100):
            action = int(rng.integers(15))
            mine, theirs = pool.step(action), own.step(action)
            assert mine[1:4] == theirs[1:4], env_id
            if mine[2]:
                apart.append(pool.reset()[0] != own.reset()[0])
            else:
                apart.append(mine[0] != theirs[0])
        assert np.mean(apart) < 0.05, env_id
        pool.close()
        own.close()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvError, match="'num_level': did you mean 'num_levels'"):
        make_env("procgen/coinrun-easy-v0", num_level=1)
    for make in (make_env, make_vec):
        with pytest.raises(EnvError, match="did you mean 'procgen/coinrun-easy-v0'"):
            make("procgen/coinrum-easy-v0")
    monkeypatch.setattr("tether.envs.procgen.build", lambda: None)
    for make_one in (make_env, partial(make_vec, n_envs=2), partial(make_vec, backend="envpool")):
        with pytest.raises(EnvError) as error:
            make_one("procgen/coinrun-easy-v0")
        assert str(error.value) == (
            'procgen/coinrun-easy-v0 needs EnvPool and Qt 5: pip install "tether-rl[procgen]" and apt-get install '
            "libqt5core5a libqt5gui5, or, without Qt, pip install gym==0.26.2 cffi and pip install --no-deps gym3 "
            "procgen-mirror==0.10.7."
        )


def test_openai_game_goes_on_from_its_state() -> None:
    """The wheel's own state call, over several ends of episodes and through plain data."""
    if not installed("procgen", "gym3", "gym"):
        pytest.skip("OpenAI's build is not installed (pip install --no-deps gym3 procgen-mirror==0.10.7)")
    first, second = (OpenAIProcgen(None, env_name="bigfish", distribution_mode="easy", num_levels=0) for _ in range(2))
    first.reset(seed=3)
    second.reset(seed=9)
    actions = np.random.default_rng(0).integers(15, size=900)

    def go(env: OpenAIProcgen, action: int) -> tuple[np.ndarray, float, bool]:
        picture, reward, ended, *_ = env.step(action)
        return env.reset()[0] if ended else picture, reward, ended

    ends = [go(first, action)[2] for action in actions[:377]]
    assert sum(ends) > 1
    second.resume_from(first.resumable_state())
    for action in actions[377:]:
        ours, theirs = go(first, action), go(second, action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
