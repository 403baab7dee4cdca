"""robomimic's files, as its own scripts lay them out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tether.envs import DatasetError, load_dataset
from tether.envs.datasets.robomimic import LOW_DIM

h5py = pytest.importorskip("h5py")
WIDTHS = dict(zip(LOW_DIM, (3, 4, 2, 14), strict=True))


def write(path: Path, lengths: tuple[int, ...] = (4, 6, 5), skip: str = "") -> Path:
    """Demonstrations 0, 1, ..., 9, 10, ... whose values are their numbers; the second one fails."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "PickPlaceCan", "type": 1, "env_kwargs": {}})
        data.attrs["total"] = sum(lengths)
        for number, steps in enumerate(lengths):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = np.full((steps, 7), number / 20)
            demo["rewards"] = (np.arange(steps) == steps - 1) * float(number != 1)
            demo["dones"] = ((np.arange(steps) == steps - 1) & (number != 1)).astype(np.int64)
            demo["states"] = np.zeros((steps, 71))
            for key, width in WIDTHS.items():
                demo[f"obs/{key}"] = np.arange(steps)[:, None] + np.full((steps, width), 100.0 * number)
                demo[f"next_obs/{key}"] = demo[f"obs/{key}"][:] + 1
            if skip:
                del demo[skip]
        file["mask/train"] = np.array([b"demo_2", b"demo_0"])
    return path


def test_read(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path / "a.hdf5"))
    assert dataset.observations.shape == (15, 23)
    assert (dataset.meta["env_id"], dataset.meta["env_kwargs"]) == ("robomimic/can-v0", {})
    assert dataset.episodes().lengths.tolist() == [4, 6, 5]
    assert dataset.episodes().returns.tolist() == [1, 0, 1]
    assert np.flatnonzero(dataset.terminals).tolist() == [3, 14]
    assert np.flatnonzero(dataset.timeouts).tolist() == [9]
    np.testing.assert_array_equal(dataset.next_observations, dataset.observations[:] + 1)


@pytest.mark.parametrize(
    ("name", "env_id"),
    [
        ("Lift", "robomimic/lift-v0"),
        ("NutAssemblySquare", "robomimic/square-v0"),
        ("ToolHang", "robomimic/tool_hang-v0"),
        ("TwoArmTransport", "TwoArmTransport"),
    ],
)
def test_the_environment_is_named_as_ours(tmp_path: Path, name: str, env_id: str) -> None:
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": name, "env_kwargs": {"control_freq": 20}})
    meta = load_dataset(path).meta
    assert (meta["env_id"], meta["env_kwargs"]) == (env_id, {"control_freq": 20})


def test_without_env_args(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        del file["data"].attrs["env_args"]
    assert not {"env_id", "env_kwargs"} & set(load_dataset(path).meta)


def test_steps_may_cost(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    dataset = load_dataset(path, step_penalty=True)
    assert dataset.rewards[:].tolist() == [-1, -1, -1, 0, *[-1] * 6, -1, -1, -1, -1, 0]
    assert dataset.meta["env_kwargs"] == {"step_penalty": True}
    assert load_dataset(path).rewards[:].sum() == 2, "other options are other arrays"


def test_rows_after_success_are_terminals_each(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", (5,))
    with h5py.File(path, "a") as file:
        for key in ("rewards", "dones"):
            file[f"data/demo_0/{key}"][2:] = 1
    dataset = load_dataset(path)
    assert dataset.terminals[:].tolist() == [False, False, True, True, True]
    assert dataset.episodes().lengths.tolist() == [3, 1, 1]
    assert not dataset.timeouts[:].any()


def test_demonstrations_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path / "a.hdf5", tuple(range(1, 13))))
    assert dataset.episodes().lengths.tolist() == list(range(1, 13))


def test_filter_and_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    dataset = load_dataset(path, filter_key="train", keys=["object", "robot0_eef_pos"])
    assert dataset.observations.shape == (9, 17)
    assert dataset.episodes().lengths.tolist() == [4, 5]
    assert load_dataset(path).observations.shape == (15, 23), "other options are other arrays"
    with pytest.raises(DatasetError, match=r"a\.hdf5 has no 'mask/valid': choose one of train"):
        load_dataset(path, filter_key="valid")


@pytest.mark.parametrize("missing", ["dones", "obs/object", "next_obs/robot0_eef_pos"])
def test_missing_keys(tmp_path: Path, kept: Callable[[], list[str]], missing: str) -> None:
    with pytest.raises(DatasetError, match=rf"a\.hdf5 has no '{missing}' in '/data/demo_0'"):
        load_dataset(write(tmp_path / "a.hdf5", skip=missing))
    assert kept() == []


def test_bad_rows(tmp_path: Path, kept: Callable[[], list[str]]) -> None:
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        file["data/demo_1/actions"][2, 3] = 1.5
    with pytest.raises(DatasetError, match=r"a\.hdf5: 'actions' leaves \[-1, 1\] at row 6"):
        load_dataset(path)
    assert kept() == []


def test_demonstrations_of_other_widths(tmp_path: Path, kept: Callable[[], list[str]]) -> None:
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        del file["data/demo_2/obs/object"]
        file["data/demo_2/obs/object"] = np.zeros((5, 13))
    with pytest.raises(DatasetError, match=r"'data/demo_2/obs/object' has rows of the shape \(13,\), the others \(14,\)"):
        load_dataset(path)
    assert kept() == []


@pytest.mark.parametrize(
    ("mask", "words"),
    [(b"demo_7", "'mask/odd' names 'demo_7', which 'data' lacks"), (b"first", "'mask/odd' names 'first', which 'data' lacks")],
)
def test_filters_that_name_what_is_not_there(tmp_path: Path, mask: bytes, words: str) -> None:
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        file["mask/odd"] = np.array([mask])
    with pytest.raises(DatasetError, match=words):
        load_dataset(path, filter_key="odd")
    with h5py.File(path, "a") as file:
        file["data"].move("demo_1", "first")
    with pytest.raises(DatasetError, match=r"'data/first' has no number at its end"):
        load_dataset(path)
