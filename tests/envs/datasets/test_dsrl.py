"""DSRL's files and FISOR's PointRobot file: read, refused, written; the table of tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tether.envs import DatasetError, OfflineDataset, load_dataset
from tether.envs.datasets import dsrl
from tether.envs.datasets.dsrl_tasks import TASKS

Make = Callable[..., dict[str, np.ndarray]]
Save = Callable[..., Path]
Kept = Callable[[], list[str]]


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"chunks": True}])
@pytest.mark.parametrize("columns", [False, True])
def test_read(transitions: Make, save_hdf5: Save, tmp_path: Path, options: dict[str, Any], columns: bool) -> None:
    arrays = transitions()
    stored = {key: array.astype(np.float64) for key, array in arrays.items()}
    if columns:
        stored = {key: array[:, None] if array.ndim == 1 else array for key, array in stored.items()}
    dataset = load_dataset(save_hdf5(tmp_path / "a.hdf5", stored, **options))
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(dataset, name), array)
        assert getattr(dataset, name).dtype == array.dtype
    assert dataset.meta["format"] == "dsrl"


def test_the_table_is_known_by_file_name(transitions: Make, save_hdf5: Save, tmp_path: Path) -> None:
    dataset = load_dataset(save_hdf5(tmp_path / "SafetyBallRun-v0-80-940.hdf5", transitions()))
    assert dataset.meta["env_id"] == "SafetyBallRun-v0"
    assert dataset.meta["max_episode_steps"] == 100
    assert dataset.meta["reference_max_return"] == 1327.445556640625


def test_table() -> None:
    assert len(TASKS) == 38
    assert len({task.url for task in TASKS.values()}) == 38
    for name, task in TASKS.items():
        assert task.min_return < task.max_return, name
        cost, trajectories = task.file.split("-")[-2:]
        assert 0 < task.max_cost < int(cost) + 0.1, name
        assert int(trajectories) > 0
    assert TASKS["OfflineCarGoal1Gymnasium-v0"].env_id == "SafetyCarGoal1-v0"
    assert TASKS["OfflineMetadrive-easymean-v0"].env_id == "SafeMetaDrive-easymean-v0"
    assert dsrl.task_meta("elsewhere.hdf5") == {}


def corrupt(arrays: dict[str, np.ndarray], name: str, row: int, value: float) -> dict[str, np.ndarray]:
    changed = {**arrays, name: arrays[name].copy()}
    changed[name][row] = value
    return changed


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rewards", np.nan, "'rewards' is not finite at row 11"),
        ("observations", np.inf, "'observations' is not finite at row 11"),
        ("actions", 1.5, r"'actions' leaves \[-1, 1\] at row 11"),
        ("costs", -1, "'costs' is negative at row 11"),
    ],
)
def test_bad_rows(
    transitions: Make, save_hdf5: Save, tmp_path: Path, kept: Kept, name: str, value: float, words: str
) -> None:
    path = save_hdf5(tmp_path / "bad.hdf5", corrupt(transitions(), name, 11, value))
    with pytest.raises(DatasetError, match=rf"bad\.hdf5: {words}"):
        load_dataset(path)
    assert kept() == []


def test_actions_are_clipped_on_request(transitions: Make, save_hdf5: Save, tmp_path: Path) -> None:
    path = save_hdf5(tmp_path / "a.hdf5", corrupt(transitions(), "actions", 11, 1.5))
    assert np.abs(load_dataset(path, clip_actions=True).actions).max() == 1
    with pytest.raises(DatasetError, match="leaves"):
        load_dataset(path)


@pytest.mark.parametrize("missing", ["next_observations", "actions", "rewards", "terminals", "timeouts"])
def test_missing_keys(transitions: Make, save_hdf5: Save, tmp_path: Path, kept: Kept, missing: str) -> None:
    arrays = transitions()
    del arrays[missing]
    with pytest.raises(DatasetError, match=rf"bad\.hdf5 has no '{missing}' in '/', which holds "):
        load_dataset(save_hdf5(tmp_path / "bad.hdf5", arrays))
    assert kept() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": np.zeros(14)}, "'rewards' has 14 rows where 'observations' has 15"),
        ({"rewards": np.float64(3)}, "'rewards' is no array with rows"),
        ({"rewards": np.zeros((15, 2))}, r"'rewards' has the shape \(15, 2\): it must be \(N,\)"),
        ({"actions": np.zeros(15)}, r"'actions' has the shape \(15,\): it must be \(N, d\)"),
        ({"next_observations": np.zeros((15, 3))}, r"'next_observations' is float32 \(15, 3\) where"),
        ({"terminals": np.zeros(15), "timeouts": np.zeros(15)}, "'terminals' and 'timeouts' end no episode in rows 0 to 14"),
    ],
)
def test_wrong_shapes(
    transitions: Make, save_hdf5: Save, tmp_path: Path, kept: Kept, changes: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(DatasetError, match=rf"bad\.hdf5: {words}"):
        load_dataset(save_hdf5(tmp_path / "bad.hdf5", {**transitions(), **changes}))
    assert kept() == []


@pytest.mark.parametrize("bytes_kept", [0, 100, 2000, -1000])
def test_truncated(transitions: Make, save_hdf5: Save, tmp_path: Path, kept: Kept, bytes_kept: int) -> None:
    path = save_hdf5(tmp_path / "bad.hdf5", transitions(episodes=30))
    path.write_bytes(path.read_bytes()[:bytes_kept])
    with pytest.raises(DatasetError, match=r"bad\.hdf5 is not a whole HDF5 file: copy or download it again\."):
        load_dataset(path)
    assert kept() == []


def test_a_damaged_chunk_is_named(transitions: Make, save_hdf5: Save, tmp_path: Path, kept: Kept) -> None:
    import h5py

    path = save_hdf5(tmp_path / "bad.hdf5", transitions(episodes=30), compression="gzip", fletcher32=True)
    with h5py.File(path) as file:
        chunk = file["rewards"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"bad\.hdf5: '/rewards' cannot be read from row 0 to 149"):
        load_dataset(path)
    assert kept() == []


# ---------------------------------------------------------------------- written


def test_what_is_written_is_read(transitions: Make, tmp_path: Path) -> None:
    meta = {"env_id": "Here-v0", "reference_max_return": 3.5, "cost_names": ["heat", "force"], "action_low": [-2.0, -3.0]}
    arrays = transitions()
    arrays["constraint_values"] = 2 * arrays["costs"] - 1
    arrays["costs"] = np.stack([arrays["costs"]] * 2, axis=1)
    dataset = OfflineDataset(**arrays, meta={**meta, "source": "elsewhere", "format": "d4rl"})
    path = dsrl.write(tmp_path / "sub" / "a.hdf5", dataset, {"behaviour": "random"})
    again = load_dataset(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(again, name), array)
    expected = {**meta, "behaviour": "random", "source": str(path), "format": "dsrl"}
    assert {key: again.meta[key] for key in expected} == expected
    assert [file.name for file in path.parent.iterdir()] == ["a.hdf5"]


def test_the_written_file_is_dsrl_s(transitions: Make, tmp_path: Path) -> None:
    """The checks of DSRL's own `get_dataset`, and its gzip."""
    import h5py

    arrays = transitions()
    with h5py.File(dsrl.write(tmp_path / "a.hdf5", OfflineDataset(**arrays))) as file:
        assert set(file) == set(arrays)
        for key, array in arrays.items():
            assert file[key].shape == array.shape
            assert file[key].compression == "gzip"
            np.testing.assert_array_equal(file[key][:], array)


def test_a_failed_write_leaves_the_former_file(transitions: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dsrl.write(tmp_path / "a.hdf5", OfflineDataset(**transitions()))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dsrl, "_write_array", fail)
    with pytest.raises(DatasetError, match=r"a\.hdf5 cannot be written \(No space left on device\)"):
        dsrl.write(path, OfflineDataset(**transitions(seed=1)))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.hdf5"]


def test_data_without_costs_are_not_written(transitions: Make, tmp_path: Path) -> None:
    arrays = transitions()
    del arrays["costs"]
    with pytest.raises(DatasetError, match="DSRL's format needs 'costs'"):
        dsrl.write(tmp_path / "a.hdf5", OfflineDataset(**arrays))


def test_file_name(transitions: Make) -> None:
    arrays = transitions()
    arrays["costs"][:] = np.repeat([0.0, 1.0, 0.5], 5)
    assert dsrl.file_name("SafetyBallRun-v0", OfflineDataset(**arrays)) == "SafetyBallRun-v0-5-3.hdf5"


# ---------------------------------------------------------------------- PointRobot


@pytest.mark.parametrize("block", [1, 2**22])
def test_point_robot(
    transitions: Make, save_hdf5: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("tether.envs.datasets.dataset.BLOCK", block)
    arrays = transitions(episodes=4)
    height = arrays["costs"] - 0.5
    names = {"state": "observations", "action": "actions", "next_state": "next_observations", "reward": "rewards"}
    stored = {key: arrays[name] for key, name in names.items()}
    for episode in range(4):  # real steps: the next state is the next row's state
        rows = slice(5 * episode, 5 * episode + 4)
        stored["next_state"][rows] = stored["state"][5 * episode + 1 : 5 * episode + 5]
    stored.update(done=arrays["terminals"], h=height, cost=(height <= 0).astype(np.float32))
    dataset = load_dataset(save_hdf5(tmp_path / "robot.hdf5", stored))
    assert dataset.meta["format"] == "pointrobot"
    np.testing.assert_array_equal(np.asarray(dataset.constraint_values), height)
    np.testing.assert_array_equal(np.asarray(dataset.costs), height > 0)
    np.testing.assert_array_equal(dataset.terminals, arrays["terminals"])
    np.testing.assert_array_equal(dataset.timeouts, arrays["timeouts"])
    assert dataset.unsafe_transitions == int((height > 0).sum())


def test_point_robot_of_other_widths(save_hdf5: Save, tmp_path: Path, kept: Kept) -> None:
    stored = {"state": np.zeros((4, 3)), "next_state": np.zeros((4, 2)), "action": np.zeros((4, 2)), "done": np.ones(4)}
    with pytest.raises(DatasetError, match=r"bad\.hdf5: 'next_state' has rows of the shape \(2,\), 'state' of \(3,\)"):
        load_dataset(save_hdf5(tmp_path / "bad.hdf5", {**stored, "reward": np.zeros(4), "h": np.zeros(4)}))
    assert kept() == []
