"""OGBench's files against its own `load_dataset` and `make_env_and_datasets`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tether.envs import DatasetError, load_dataset
from tether.envs.datasets import ogbench as module
from tether.envs.datasets.rows import Rows

oracle = pytest.importorskip("ogbench")
Kept = Callable[[], list[str]]
TASK = "pointmaze-medium-navigate-singletask-task1-v0"


def arrays(trajectories: int = 4, rows: int = 6, width: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = trajectories * rows
    return {
        "observations": rng.normal(size=(n, width)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "terminals": np.tile(np.arange(rows) == rows - 1, trajectories),
        "qpos": rng.normal(size=(n, 2)).astype(np.float32),
        "qvel": rng.normal(size=(n, 2)).astype(np.float32),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., None], block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    path = tmp_path / "data-v0.npz"
    save(path, **arrays())
    expected = oracle.utils.load_dataset(path)
    dataset = load_dataset(path)
    for key in ("observations", "actions", "next_observations"):
        np.testing.assert_array_equal(np.asarray(getattr(dataset, key)), expected[key])
    np.testing.assert_array_equal(dataset.timeouts, expected["terminals"] == 1)
    assert not dataset.terminals.any()
    assert not dataset.rewards.any()
    assert isinstance(dataset.observations, Rows)
    assert isinstance(dataset.observations.array, np.memmap)
    assert dataset.episodes().lengths.tolist() == [5] * 4


def test_images(tmp_path: Path) -> None:
    stored = {**arrays(), "observations": np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3), np.uint8)}
    np.savez_compressed(tmp_path / "a.npz", **stored)
    dataset = load_dataset(tmp_path / "a.npz")
    assert dataset.observations.dtype == np.uint8
    np.testing.assert_array_equal(dataset.next_observations[0], stored["observations"][1])


def test_rewards_of_a_single_task(tmp_path: Path) -> None:
    stored = arrays(trajectories=20)
    goal = oracle.make_env_and_datasets(TASK, env_only=True)
    goal.reset()
    stored["qpos"][7:10] = goal.unwrapped.cur_goal_xy  # reached in the middle of a trajectory
    for name in ("a.npz", "a-val.npz"):
        np.savez_compressed(tmp_path / name, **stored)
    _, expected, _ = oracle.make_env_and_datasets(TASK, dataset_path=str(tmp_path / "a.npz"))
    dataset = load_dataset(tmp_path / "a.npz", task=TASK)
    np.testing.assert_array_equal(dataset.rewards, expected["rewards"])
    np.testing.assert_array_equal(dataset.terminals, expected["masks"] == 0)
    ends = (expected["masks"] == 0) | (expected["terminals"] == 1)
    np.testing.assert_array_equal(dataset.terminals | dataset.timeouts, ends)
    assert dataset.terminals.sum() >= 3
    assert dataset.meta["env_id"] == TASK


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actions": None}, r"bad\.npz has no 'actions', only observations, qpos, qvel, terminals"),
        ({"terminals": None}, r"bad\.npz has no 'terminals'"),
        ({"actions": np.zeros((23, 2), np.float32)}, r"bad\.npz: 'actions' has 23 rows where 'observations' has 24"),
        ({"actions": np.full((24, 2), 2, np.float32)}, r"bad\.npz: 'actions' leaves \[-1, 1\] at row 0"),
        ({"observations": np.full((24, 2), np.nan, np.float32)}, r"bad\.npz: 'observations' is not finite at row 0"),
        ({"terminals": np.ones(24, bool)}, r"bad\.npz: 'terminals' leave no transition"),
        ({"actions": np.array([None] * 24)}, r"bad\.npz: 'actions\.npy' is no array of numbers"),
    ],
)
def test_bad_input(tmp_path: Path, kept: Kept, changes: dict[str, np.ndarray | None], words: str) -> None:
    stored = {key: array for key, array in {**arrays(), **changes}.items() if array is not None}
    np.savez(tmp_path / "bad.npz", **stored)
    with pytest.raises(DatasetError, match=words):
        load_dataset(tmp_path / "bad.npz")
    assert kept() == []


def test_what_a_task_needs(tmp_path: Path, kept: Kept) -> None:
    stored = arrays()
    np.savez(tmp_path / "whole.npz", **stored)
    del stored["qpos"]
    np.savez(tmp_path / "bad.npz", **stored)
    with pytest.raises(DatasetError, match=r"bad\.npz has no 'qpos'"):
        load_dataset(tmp_path / "bad.npz", task=TASK)
    with pytest.raises(DatasetError, match=r"'cube-single-v0' is no single task"):
        load_dataset(tmp_path / "whole.npz", task="cube-single-v0")
    with pytest.raises(DatasetError, match=r"OGBench has no task 'nowhere-singletask-v0'"):
        load_dataset(tmp_path / "whole.npz", task="nowhere-singletask-v0")
    assert kept() == []


def test_truncated(tmp_path: Path, kept: Kept) -> None:
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **arrays())
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DatasetError, match=r"bad\.npz is not a whole npz file"):
        load_dataset(path)
    middle = content.find(b"actions.npy") + 200
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    with pytest.raises(DatasetError, match=r"bad\.npz: 'actions\.npy' is damaged|not a whole npz file"):
        load_dataset(path)
    assert kept() == []


def test_names() -> None:
    host = "https://rail.eecs.berkeley.edu/datasets/ogbench"
    assert module.address("cube-single-play-v0") == (f"{host}/cube-single-play-v0.npz", {})
    assert module.address("cube-single-play-v0-val") == (f"{host}/cube-single-play-v0-val.npz", {})
    for task in ("cube-single-play-singletask-v0", "cube-single-play-singletask-task3-v0"):
        assert module.address(task) == (f"{host}/cube-single-play-v0.npz", {"task": task})
    assert module.address("cube-thousand-play-v0") is None


@pytest.mark.parametrize("name", module.names())
def test_every_name_has_its_environment(name: str) -> None:
    import gymnasium as gym

    assert "-".join([*name.split("-")[:-2], "v0"]) in gym.registry
