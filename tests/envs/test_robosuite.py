"""robomimic's tasks of robosuite: spaces, seeds, success, and demonstrations of theirs written, read and lived again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tether.agents.common.env_state import env_state, restore_env_state
from tether.envs import EnvError, OfflineDataset, list_envs, load_dataset, make_env, make_vec
from tether.envs.robosuite import _INSTALL, _MODULES, LOW_DIM, NAMES, STEPS
from tether.envs.suite import installed

WIDTHS = {"robomimic/lift-v0": 19, "robomimic/can-v0": 23, "robomimic/square-v0": 23, "robomimic/tool_hang-v0": 53}
needed = pytest.mark.skipif(not installed(*_MODULES), reason=f"robosuite is not there: {_INSTALL[0]}; {_INSTALL[1]}")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETHER_DATA", str(tmp_path / "cache"))


def episode(env: gym.Env, seed: int, steps: int = 8) -> np.ndarray:
    """Observations (T + 1, d) from a seed under actions that belong to it."""
    rng = np.random.default_rng(seed)
    observations = [env.reset(seed=seed)[0]]
    observations += [env.step(rng.uniform(-1, 1, 7).astype(np.float32))[0] for _ in range(steps)]
    return np.array(observations)


class Lifter:
    """Above the cube, down to it, close the gripper, up: from observations (19,) to actions (7,)."""

    def __init__(self) -> None:
        self.stage, self.held = 0, 0

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        hand, cube = observation[:3], observation[9:12]
        up = np.array([0, 0, 1])
        aims = cube + 0.06 * up, cube, hand, hand + 0.1 * up
        self.held += self.stage == 2
        if (self.stage < 2 and np.linalg.norm(aims[self.stage] - hand) < 0.013) or self.held == 7:
            self.stage, self.held = self.stage + 1, 0
        action = np.zeros(7, np.float32)
        action[:3] = np.clip((aims[self.stage] - hand) / 0.05, -1, 1)
        action[6] = 1 if self.stage >= 2 else -1
        return action


def demonstration(env: gym.Env, seed: int) -> dict[str, np.ndarray]:
    """Steps of one lift until the episode ends, whose success is the last step's."""
    act, (observation, _), rows, ended = Lifter(), env.reset(seed=seed), [], False
    while not ended:
        action = act(observation)
        following, reward, terminated, truncated, info = env.step(action)
        assert info["success"] == terminated
        rows.append((observation, action, reward, terminated, following))
        observation, ended = following, terminated or truncated
    return dict(zip(("obs", "actions", "rewards", "dones", "next_obs"), map(np.array, zip(*rows, strict=True)), strict=True))


@pytest.fixture(scope="module")
def lifts() -> list[dict[str, np.ndarray]]:
    env = make_env("robomimic/lift-v0")
    demonstrations = [demonstration(env, seed) for seed in range(3)]
    env.close()
    return demonstrations


def write(path: Path, demonstrations: list[dict[str, np.ndarray]]) -> Path:
    """As robomimic's scripts lay them out, with the controller as its files of version 1.5 have it."""
    h5py = pytest.importorskip("h5py")
    reach, borders = [0.05] * 3 + [0.5] * 3, np.cumsum((3, 4, 2))
    arm = {
        "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": reach, "output_min": [-x for x in reach],
        "kp": 150, "damping": 1, "impedance_mode": "fixed", "kp_limits": [0, 300], "damping_limits": [0, 10],
        "position_limits": None, "orientation_limits": None, "uncouple_pos_ori": True, "control_delta": True,
        "interpolation": None, "ramp_ratio": 0.2, "input_ref_frame": "world", "gripper": {"type": "GRIP"},
    }  # fmt: skip
    kwargs = {
        "has_renderer": False, "has_offscreen_renderer": True, "ignore_done": True, "use_object_obs": True,
        "use_camera_obs": True, "control_freq": 20, "controller_configs": {"type": "BASIC", "body_parts": {"right": arm}},
        "robots": ["Panda"], "camera_depths": False, "camera_heights": 84, "camera_widths": 84, "lite_physics": False,
        "reward_shaping": False,
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_version": "1.5.1", "type": 1, "env_kwargs": kwargs})
        for number, demo in enumerate(demonstrations):
            group = data.create_group(f"demo_{number}")
            for key in ("actions", "rewards"):
                group[key] = demo[key]
            group["dones"] = demo["dones"].astype(np.int64)
            for side in ("obs", "next_obs"):
                for key, part in zip(LOW_DIM, np.split(demo[side], borders, axis=1), strict=True):
                    group[f"{side}/{key}"] = part
    return path


@needed
@pytest.mark.parametrize("env_id", STEPS)
def test_an_episode_follows_from_seed_and_actions(env_id: str) -> None:
    """In another instance, after other episodes, and whatever NumPy's global generator is."""
    first, second = make_env(env_id), make_env(env_id)
    assert first.observation_space == gym.spaces.Box(-np.inf, np.inf, (WIDTHS[env_id],), np.float32)
    assert first.action_space == gym.spaces.Box(-1, 1, (7,), np.float32)
    assert first.spec is not None
    assert (first.spec.id, first.spec.max_episode_steps) == (env_id, STEPS[env_id])
    lived = episode(first, 5)
    assert first.observation_space.contains(lived[0])
    np.random.seed(9)  # noqa: NPY002
    before = np.random.get_state()[1]  # noqa: NPY002
    other = episode(second, 7)
    np.testing.assert_array_equal(episode(second, 5), lived)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert not np.array_equal(other[0], lived[0])
    assert not np.array_equal(second.reset()[0], second.reset()[0])
    for env in (first, second, second):
        env.close()


@needed
def test_success_ends_the_episode(lifts: list[dict[str, np.ndarray]]) -> None:
    for demo in lifts:
        assert len(demo["rewards"]) < 60
        last = np.arange(len(demo["rewards"])) == len(demo["rewards"]) - 1
        np.testing.assert_array_equal(demo["rewards"], last.astype(float))
        np.testing.assert_array_equal(demo["dones"], last)
        assert demo["next_obs"][-1, 11] > 0.84, "the cube is 4 cm above the table, whose height is 0.8 m"


@needed
def test_steps_may_cost() -> None:
    env = make_env("robomimic/lift-v0", step_penalty=True, max_episode_steps=3)
    env.reset(seed=0)
    steps = [env.step(np.zeros(7, np.float32))[1:4] for _ in range(3)]
    assert steps == [(-1.0, False, False)] * 2 + [(-1.0, False, True)]
    env.close()
    env = make_env("robomimic/lift-v0", step_penalty=True)
    assert demonstration(env, 0)["rewards"][-2:].tolist() == [-1.0, 0.0]
    env.close()


@needed
def test_demonstrations_are_read_as_they_were_lived(tmp_path: Path, lifts: list[dict[str, np.ndarray]]) -> None:
    path = write(tmp_path / "lift.hdf5", lifts)
    dataset = load_dataset(path)
    assert dataset.meta["env_id"] == "robomimic/lift-v0"
    assert dataset.episodes().returns.tolist() == [1.0] * 3
    assert dataset.episodes().lengths.tolist() == [len(demo["rewards"]) for demo in lifts]
    inside = np.flatnonzero(~dataset.terminals[:])
    np.testing.assert_array_equal(dataset.next_observations[inside], dataset.observations[inside + 1])
    for name, key in (("observations", "obs"), ("next_observations", "next_obs"), ("actions", "actions")):
        np.testing.assert_array_equal(getattr(dataset, name)[:], np.concatenate([demo[key] for demo in lifts]))
    costly = load_dataset(path, step_penalty=True)
    np.testing.assert_array_equal(costly.rewards[:], dataset.rewards[:] - 1)
    for data, shift in ((dataset, 0.0), (costly, 1.0)):
        assert_lived_again(data, seed=0, shift=shift)


def assert_lived_again(dataset: OfflineDataset, seed: int, shift: float) -> None:
    """The environment that a data set names, with the controller of its file, gives the data set's first episode again."""
    env = make_env(dataset.meta["env_id"], **dataset.meta["env_kwargs"])
    env.reset(seed=seed)
    for row in range(int(dataset.episodes().lengths[0])):
        observation, reward, terminated, _, _ = env.step(dataset.actions[row])
        np.testing.assert_array_equal(observation, dataset.next_observations[row])
        assert (reward, terminated) == (dataset.rewards[row], dataset.terminals[row])
    assert (reward, terminated) == (1.0 - shift, True)
    env.close()


@needed
def test_an_episode_under_way_goes_on_elsewhere() -> None:
    first, second = (make_vec("robomimic/lift-v0", 1, seed=seed, env_kwargs={"max_episode_steps": 6}) for seed in (1, 2))
    actions = np.random.default_rng(0).uniform(-1, 1, (14, 1, 7)).astype(np.float32)
    first.reset()
    for action in actions[:9]:
        first.step(action)
    restore_env_state(second, env_state(first))
    for action in actions[9:]:
        for ours, theirs in zip(first.step(action)[:3], second.step(action)[:3], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    first.close()
    second.close()


@needed
def test_a_picture() -> None:
    env = make_env("robomimic/can-v0", render_mode="rgb_array")
    pictures: list[Any] = []
    for seed in (0, 1):
        env.reset(seed=seed)
        pictures.append(env.render())
    assert (pictures[0].shape, pictures[0].dtype) == ((256, 256, 3), np.uint8)
    assert pictures[0].std() > 0
    assert not np.array_equal(*pictures), "the can lies elsewhere"
    env.close()


@needed
def test_it_is_quiet() -> None:
    code = "from tether.envs import make_env; env = make_env('robomimic/lift-v0'); env.reset(seed=0); env.close()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "robosuite" not in done.stderr


@needed
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: make_env("robomimic/lift-v0", step_penalti=True),
            "robomimic/lift-v0 has no argument 'step_penalti': leave it out, or look for its right name.",
        ),
        (
            lambda: make_env("robomimic/cam-v0"),
            "There is no environment 'robomimic/cam-v0': did you mean 'robomimic/can-v0'?",
        ),
        (
            lambda: make_env("robomimic/lift-v0", render_mode="human"),
            "robomimic/lift-v0 has no render_mode 'human': use 'rgb_array'.",
        ),
    ],
)
def test_refusals(make: Callable[[], gym.Env], sentence: str) -> None:
    with pytest.raises(EnvError) as error:
        make()
    assert str(error.value) == sentence


@needed
def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robosuite.__version__", "1.4.1")
    with pytest.raises(EnvError, match=r"robosuite 1\.4\.1: type 'pip install --no-deps robosuite==1\.5\.2'\."):
        make_env("robomimic/lift-v0")


@needed
def test_the_list() -> None:
    assert list_envs()["robosuite"] == list(STEPS) == list(NAMES)


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.envs.robosuite.installed", lambda *names: False)
    assert "robosuite" not in list_envs()
    with pytest.raises(EnvError) as error:
        make_env("robomimic/can-v0")
    assert str(error.value) == (
        "robomimic/can-v0 needs two lines: type 'pip install \"tether-rl[robosuite]\"', "
        "and then 'pip install --no-deps robosuite==1.5.2'."
    )
