"""The contract of `make_vec`, the same on every backend."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.results_plotter import load_results
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from tether.envs import EnvError, make_env, make_vec, resolve_backend

BACKENDS = ["dummy", "envpool"]  # a process each is slow to start: one test compares `subproc` with `dummy`
STATE_IDS = ["HalfCheetah-v5", "CartPole-v1", "dm_control/cartpole-swingup-v0"]


def actions(venv: VecEnv, rng: np.random.Generator) -> np.ndarray:
    space = venv.action_space
    if isinstance(space, gym.spaces.Discrete):
        return rng.integers(space.n, size=venv.num_envs)
    assert isinstance(space, gym.spaces.Box)
    return rng.uniform(space.low, space.high, (venv.num_envs, *space.shape)).astype(np.float32)


def trajectory(env_id: str, backend: str, seed: int, steps: int = 25, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Observations (steps + 1, 2, d) and rewards (steps, 2) under fixed actions."""
    venv = make_vec(env_id, 2, backend=backend, seed=seed, **kwargs)
    rng = np.random.default_rng(0)
    observations, rewards = [venv.reset()], []
    for _ in range(steps):
        observation, reward, _, _ = venv.step(actions(venv, rng))
        observations.append(observation)
        rewards.append(reward)
    venv.close()
    return np.array(observations), np.array(rewards)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_time_limit_is_a_truncation(backend: str) -> None:
    venv = make_vec("HalfCheetah-v5", 2, backend=backend, seed=0, env_kwargs={"max_episode_steps": 4})
    rng = np.random.default_rng(0)
    venv.reset()
    for step in range(1, 13):
        before, _, dones, infos = venv.step(actions(venv, rng))
        assert dones.tolist() == [step % 4 == 0] * 2
        for i, info in enumerate(infos):
            assert bool(info.get("TimeLimit.truncated", False)) == dones[i]
            assert ("terminal_observation" in info) == dones[i]
            if dones[i]:
                assert info["episode"]["l"] == 4
                assert info["terminal_observation"].shape == (17,)
                assert info["terminal_observation"].dtype == before.dtype == np.float32
                # The next episode starts still but for noise; the one that ended was moving.
                assert np.abs(before[i]).max() < 1 < np.abs(info["terminal_observation"]).max()
    venv.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fall_is_a_termination(backend: str) -> None:
    venv = make_vec("CartPole-v1", 2, backend=backend, seed=0)
    venv.reset()
    ends = 0
    for _ in range(40):
        observations, rewards, dones, infos = venv.step(np.ones(2, dtype=np.int64))
        assert rewards.tolist() == [1, 1]
        for i in np.flatnonzero(dones):
            ends += 1
            assert infos[i]["TimeLimit.truncated"] is False
            assert abs(infos[i]["terminal_observation"][2]) > 0.2094
            assert np.abs(observations[i]).max() <= 0.05
    assert ends > 4
    venv.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fall_at_the_time_limit_is_a_termination(backend: str) -> None:
    """Pushed to the right from this seed, the pole falls in some step: a limit of just as many changes nothing."""

    def first_end(limit: int) -> tuple[int, bool]:
        venv = make_vec("CartPole-v1", 1, backend=backend, seed=5, env_kwargs={"max_episode_steps": limit})
        venv.reset()
        for step in range(1, 100):
            _, _, dones, infos = venv.step(np.ones(1, dtype=np.int64))
            if dones[0]:
                venv.close()
                return step, bool(infos[0]["TimeLimit.truncated"])
        raise AssertionError

    steps, truncated = first_end(500)
    assert not truncated
    assert first_end(steps) == (steps, False)
    assert first_end(steps - 1) == (steps - 1, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("env_id", STATE_IDS)
def test_seeds(env_id: str, backend: str) -> None:
    observations, rewards = trajectory(env_id, backend, 3)
    again, rewards_again = trajectory(env_id, backend, 3)
    np.testing.assert_array_equal(observations, again)
    np.testing.assert_array_equal(rewards, rewards_again)
    assert not np.array_equal(observations[0], trajectory(env_id, backend, 4, steps=1)[0][0])
    assert not np.array_equal(observations[0, 0], observations[0, 1])


def test_subproc_does_as_dummy_does() -> None:
    """Observations, rewards and ends, of both kinds, with what is told at the ends."""
    arguments = {"n_envs": 2, "seed": 1, "env_kwargs": {"max_episode_steps": 20}}
    venvs = [make_vec("CartPole-v1", backend=backend, **arguments) for backend in ("dummy", "subproc")]  # type: ignore[arg-type]
    rng, kinds = np.random.default_rng(0), set()
    np.testing.assert_array_equal(*(venv.reset() for venv in venvs))
    for _ in range(60):
        move = actions(venvs[0], rng)
        (observations, rewards, dones, infos), other = (venv.step(move) for venv in venvs)
        np.testing.assert_array_equal(observations, other[0])
        np.testing.assert_allclose(rewards, other[1], rtol=1e-6)
        np.testing.assert_array_equal(dones, other[2])
        for i in np.flatnonzero(dones):
            kinds.add(infos[i]["TimeLimit.truncated"])
            assert infos[i]["TimeLimit.truncated"] == other[3][i]["TimeLimit.truncated"]
            assert infos[i]["episode"]["l"] == other[3][i]["episode"]["l"]
            np.testing.assert_array_equal(infos[i]["terminal_observation"], other[3][i]["terminal_observation"])
    assert kinds == {False, True}
    for venv in venvs:
        venv.close()


@pytest.mark.parametrize("backend", ["dummy", "envpool"])
def test_without_a_seed_every_vector_is_another(backend: str) -> None:
    starts = []
    for _ in range(2):
        venv = make_vec("dm_control/cartpole-balance-v0", 2, backend=backend)
        starts.append(venv.reset())
        venv.close()
    assert len({tuple(row) for row in np.concatenate(starts)}) == 4


def test_the_number_of_threads_changes_nothing() -> None:
    one, two = (trajectory("Hopper-v5", "envpool", 0, num_threads=n)[0] for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_the_action_space_is_seeded() -> None:
    first, second = (make_vec("HalfCheetah-v5", seed=11).action_space.sample() for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_seed_takes_effect_at_the_next_reset_only() -> None:
    venv = make_vec("HalfCheetah-v5", 2, backend="envpool", seed=0)
    first = venv.reset()
    assert not np.array_equal(first, venv.reset())
    venv.seed(0)
    np.testing.assert_array_equal(first, venv.reset())
    venv.close()


@pytest.mark.parametrize("env_id", [*STATE_IDS, "dm_control/quadruped-walk-v0", "procgen/coinrun-easy-v0"])
def test_spaces_are_the_references(env_id: str, need: Any) -> None:
    if env_id.startswith("procgen/"):
        from tether.envs.procgen import build

        need(build() == "envpool", "Qt 5")
    pool, dummy = (make_vec(env_id, 1, backend=backend) for backend in ("envpool", "dummy"))
    assert pool.observation_space == dummy.observation_space
    assert pool.action_space == dummy.action_space
    assert pool.observation_space.contains(pool.reset()[0])
    pool.close()
    dummy.close()


def test_physics_run_between_send_and_receive() -> None:
    """`step_async` sends, `step_wait` receives: their product is a step's."""
    venv, same = (make_vec("HalfCheetah-v5", 2, backend="envpool", seed=0) for _ in range(2))
    venv.reset()
    same.reset()
    move = np.ones((2, 6), dtype=np.float32)
    venv.step_async(move)
    later = venv.step_wait()
    np.testing.assert_array_equal(later[0], same.step(move)[0])
    venv.close()
    same.close()


def test_what_envpool_answers_and_refuses() -> None:
    venv = make_vec("HalfCheetah-v5", 3, backend="envpool")
    assert venv.get_attr("render_mode") == [None] * 3
    assert venv.get_attr("spec", 0)[0].max_episode_steps == 1000
    assert not venv.has_attr("model")
    assert venv.env_is_wrapped(Monitor) == [False] * 3
    with pytest.raises(EnvError, match="'set_state' cannot be called: use backend='dummy'"):
        venv.env_method("set_state")
    with pytest.raises(EnvError, match="'frame_skip' cannot be set: use backend='dummy'"):
        venv.set_attr("frame_skip", 1)
    venv.set_options({"x": 1})
    with pytest.raises(EnvError, match="take no reset options"):
        venv.reset()
    venv.close()


@pytest.mark.parametrize("backend", ["dummy", "envpool"])
def test_monitor_file_is_sb3s(backend: str, tmp_path: Path) -> None:
    file = tmp_path / "run" / "monitor.csv"
    venv = make_vec("HalfCheetah-v5", 2, backend=backend, monitor_file=file, env_kwargs={"max_episode_steps": 5})
    assert isinstance(venv, VecMonitor)
    venv.reset()
    returns = np.zeros(2)
    for _ in range(10):
        returns += venv.step(np.ones((2, 6), dtype=np.float32))[1]
    venv.close()
    table = load_results(str(file.parent))
    assert table["l"].tolist() == [5] * 4
    np.testing.assert_allclose(table["r"].sum(), returns.sum(), rtol=1e-5)


def test_normalize() -> None:
    venv = make_vec("HalfCheetah-v5", 2, normalize={"gamma": 0.9})
    assert isinstance(venv, VecNormalize)
    assert venv.gamma == 0.9
    assert isinstance(venv.venv, VecMonitor)
    venv.close()


def test_frame_stack() -> None:
    venv = make_vec("HalfCheetah-v5", 2, frame_stack=3)
    assert venv.reset().shape == (2, 51)
    venv.close()


@pytest.mark.parametrize("backend", ["dummy", "envpool"])
def test_ppo_learns_on_it(backend: str) -> None:
    venv = make_vec("CartPole-v1", 4, backend=backend, normalize=True)
    model = PPO("MlpPolicy", venv, n_steps=32, n_epochs=1, seed=0).learn(256)
    assert model.ep_info_buffer
    venv.close()


def test_auto(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_backend("HalfCheetah-v5", 8) == "envpool"
    assert resolve_backend("HalfCheetah-v5", 1) == "dummy"
    assert resolve_backend("HalfCheetah-v5", 8, env_kwargs={"max_episode_steps": 10}) == "envpool"
    assert resolve_backend("HalfCheetah-v5", 8, env_kwargs={"xml_file": "x"}) == "dummy"
    assert resolve_backend("HalfCheetah-v5", 8, "subproc") == "subproc"
    assert resolve_backend("Pendulum-v1", 8) == "dummy"
    assert resolve_backend("dm_control/ball_in_cup-catch-v0", 8) == "dummy"
    assert resolve_backend("dm_control/cheetah-run-v0", 8, env_kwargs={"from_pixels": True}) == "dummy"
    with caplog.at_level(logging.INFO, logger="tether"):
        make_vec("CartPole-v1", 2).close()
    assert "CartPole-v1: 2 environment(s) on backend 'envpool'" in caplog.text


def test_auto_is_dummy_without_envpool_or_with_other_physics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.envs.mujoco.version", lambda name: "3.3.0")
    assert resolve_backend("Hopper-v5", 8) == "dummy"
    assert resolve_backend("dm_control/cheetah-run-v0", 8) == "dummy"
    monkeypatch.setattr("tether.envs.make.installed", lambda *names: False)
    assert resolve_backend("CartPole-v1", 8) == "dummy"
    with pytest.raises(EnvError, match=r'pip install "tether-rl\[envpool\]"'):
        resolve_backend("CartPole-v1", 8, "envpool")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"backend": "fast"}, "There is no backend 'fast': use one of auto, dummy, subproc, envpool."),
        ({"n_envs": 0}, "n_envs is 0: use 1 or more."),
        (
            {"backend": "envpool", "env_kwargs": {"xml_file": "x"}},
            "EnvPool's Hopper-v5 does not take 'xml_file': leave it out, or use backend='dummy'.",
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EnvError) as error:
        make_vec("Hopper-v5", **arguments)
    assert str(error.value) == sentence


@pytest.mark.parametrize("backend", ["auto", "dummy", "subproc"])
@pytest.mark.parametrize(
    ("env_id", "kwargs", "sentence"),
    [
        ("Hoper-v5", {}, "There is no environment 'Hoper-v5': did you mean 'Hopper-v5'?"),
        ("dm_control/cheetah-fly-v0", {}, "There is no environment 'dm_control/cheetah-fly-v0': did you mean"),
        ("Hopper-v5", {"nonsense": 1}, "Hopper-v5 has no argument 'nonsense'"),
    ],
)
def test_what_make_env_refuses(env_id: str, kwargs: dict[str, Any], sentence: str, backend: str) -> None:
    with pytest.raises(EnvError) as error:
        make_vec(env_id, 2, backend=backend, env_kwargs=kwargs)
    assert str(error.value).startswith(sentence)


def test_observations_are_not_written_over() -> None:
    venv = make_vec("CartPole-v1", 4, backend="envpool", seed=0)
    first = venv.reset()
    second, rewards, _, _ = venv.step(np.zeros(4, dtype=int))
    kept = [first.copy(), second.copy(), rewards.copy()]
    for _ in range(200):
        venv.step(np.zeros(4, dtype=int))
    for old, now in zip(kept, (first, second, rewards), strict=True):
        np.testing.assert_array_equal(old, now)
    venv.close()


def test_envpool_has_not_everything() -> None:
    with pytest.raises(EnvError, match="EnvPool does not have LunarLander-v3: use backend='dummy' or backend='subproc'"):
        make_vec("LunarLander-v3", backend="envpool")


def test_single_environments_are_float32_and_seeded() -> None:
    env = make_env("HalfCheetah-v5")
    first, _ = env.reset(seed=1)
    assert first.dtype == np.float32
    assert env.observation_space.contains(first)
    np.testing.assert_array_equal(first, env.reset(seed=1)[0])
    env.close()
