"""D4RL's files against its `qlearning_dataset`, written out here as its documentation describes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tether.envs import DatasetError, load_dataset
from tether.envs.datasets import d4rl
from tether.envs.datasets.rows import Rows

Make = Callable[..., dict[str, np.ndarray]]
Save = Callable[..., Path]
Kept = Callable[[], list[str]]
KEYS = ("observations", "actions", "rewards", "terminals")


def reference(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Row by row: every row but the last leads to the next one; those that a timeout ends are dropped."""
    rows = [row for row in range(len(arrays["rewards"]) - 1) if not arrays["timeouts"][row]]
    found = {key: np.array([arrays[key][row] for row in rows]) for key in KEYS}
    return {**found, "next_observations": np.array([arrays["observations"][row + 1] for row in rows])}


@given(st.lists(st.sampled_from(["", "", "", "terminal", "timeout", "both"]), min_size=3, max_size=30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_without_next_observations(save_hdf5: Save, tmp_path: Path, kinds: list[str]) -> None:
    n = len(kinds)
    rng = np.random.default_rng(n)
    arrays = {
        "observations": rng.normal(size=(n, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.array([kind in ("terminal", "both") for kind in kinds]),
        "timeouts": np.array([kind in ("timeout", "both") for kind in kinds]),
    }
    expected = reference(arrays)
    path = save_hdf5(tmp_path / "a.hdf5", {**arrays, "infos/qpos": np.zeros((n, 9))})
    if not len(expected["rewards"]):
        with pytest.raises(DatasetError, match="leave no transition with a next row"):
            load_dataset(path)
        return
    dataset = load_dataset(path)
    for key, array in expected.items():
        np.testing.assert_array_equal(np.asarray(getattr(dataset, key)), array)
    assert isinstance(dataset.next_observations, Rows)
    going_on = ~(dataset.terminals | dataset.timeouts)
    np.testing.assert_array_equal(dataset.next_observations[:-1][going_on[:-1]], dataset.observations[1:][going_on[:-1]])


def test_an_episode_is_cut_one_step_earlier(transitions: Make, save_hdf5: Save, tmp_path: Path) -> None:
    arrays = transitions()
    del arrays["next_observations"], arrays["costs"]
    dataset = load_dataset(save_hdf5(tmp_path / "a.hdf5", arrays))
    assert dataset.episodes().lengths.tolist() == [4, 5, 4]
    assert np.flatnonzero(dataset.terminals).tolist() == [8]
    assert np.flatnonzero(dataset.timeouts).tolist() == [3, 12]


def test_with_next_observations(transitions: Make, save_hdf5: Save, tmp_path: Path) -> None:
    arrays = transitions()
    del arrays["costs"]
    dataset = load_dataset(save_hdf5(tmp_path / "a.hdf5", arrays))
    for key, array in arrays.items():
        np.testing.assert_array_equal(getattr(dataset, key), array)
    assert dataset.meta["format"] == "d4rl"


def test_a_time_limit_in_the_place_of_timeouts(transitions: Make, save_hdf5: Save, tmp_path: Path) -> None:
    arrays = transitions(episodes=4, steps=6)
    for key in ("costs", "timeouts"):
        del arrays[key]
    path = save_hdf5(tmp_path / "a.hdf5", arrays)
    assert load_dataset(path).episodes().lengths.tolist() == [12, 12]
    assert load_dataset(path, max_episode_steps=6).episodes().lengths.tolist() == [6, 6, 6, 6]
    assert load_dataset(path, max_episode_steps=5).episodes().lengths.tolist() == [5, 5, 2, 5, 5, 2]


def test_bad_rows_name_the_transition(transitions: Make, save_hdf5: Save, tmp_path: Path, kept: Kept) -> None:
    arrays = transitions()
    del arrays["next_observations"], arrays["costs"]
    arrays["rewards"][5] = np.nan
    with pytest.raises(DatasetError, match=r"bad\.hdf5: 'rewards' is not finite at row 4"):
        load_dataset(save_hdf5(tmp_path / "bad.hdf5", arrays))
    assert kept() == []


def test_names() -> None:
    tasks = d4rl.tasks()
    host = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
    assert tasks["halfcheetah-medium-expert-v2"].url == f"{host}/gym_mujoco_v2/halfcheetah_medium_expert-v2.hdf5"
    assert tasks["door-human-v1"].url == f"{host}/hand_dapg_v1/door-human-v1.hdf5"
    file = "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5"
    assert tasks["antmaze-medium-play-v2"].url == f"{host}/ant_maze_v2/{file}"
    for name, task in tasks.items():
        assert task.meta["reference_min_return"] < task.meta["reference_max_return"], name
