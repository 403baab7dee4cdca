"""DSRL's HDF5 files, read and written, and the PointRobot file of FISOR."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .cache import Blocks, cached, checked_sha256, sync_folder
from .dataset import DatasetError, OfflineDataset, as_field, block_rows
from .dsrl_tasks import TASKS, Task
from .hdf5 import attributes, find, import_extra, open_hdf5, stream

_KEYS = ("observations", "actions", "rewards", "costs", "terminals", "timeouts", "next_observations")
_POINT_ROBOT = {
    "observations": "state",
    "actions": "action",
    "rewards": "reward",
    "terminals": "done",
    "next_observations": "next_state",
    "constraint_values": "h",
}


def read(
    path: Path | str, *, sha256: str | None = None, meta: Mapping[str, Any] | None = None, clip_actions: bool = False
) -> OfflineDataset:
    """Read a file of DSRL, of `write`, or FISOR's PointRobot file.

    PointRobot's ``cost`` is 1 where the robot is safe and is not read: costs are 1 where ``h`` > 0. It marks no timeouts;
    an episode is cut where its next state is not the state of the next row.

    :param sha256: what the file must have
    :param meta: goes before what the file and DSRL's table say
    :param clip_actions: to [-1, 1], where the file goes beyond
    :raises DatasetError: naming file, key and row of what is wrong
    """
    path = Path(path)
    digest = checked_sha256(path, sha256)
    with open_hdf5(path) as file:
        kind = "pointrobot" if "state" in file else "dsrl"
        described = {**task_meta(path.name), **attributes(file), **(meta or {}), "source": str(path), "format": kind}
    blocks = _point_robot_blocks if kind == "pointrobot" else _blocks
    return cached(digest, {"clip_actions": clip_actions}, lambda: _clipped(blocks(path), clip_actions), described)


def task_meta(name: str) -> dict[str, Any]:
    """What DSRL's table tells of a data set, by its id or file name; empty for a name that is not in it."""
    task = TASKS.get(name) or next((task for task in TASKS.values() if task.file == name.removesuffix(".hdf5")), None)
    return {} if task is None else _described(task)


def _described(task: Task) -> dict[str, Any]:
    return {
        "env_id": task.env_id,
        "reference_min_return": task.min_return,
        "reference_max_return": task.max_return,
        "reference_max_cost": task.max_cost,
        "max_episode_steps": task.max_episode_steps,
    }


def _clipped(blocks: Blocks, clip_actions: bool) -> Blocks:
    for part in blocks:
        yield {name: np.clip(block, -1, 1) if clip_actions and name == "actions" else block for name, block in part.items()}


def _blocks(path: Path) -> Blocks:
    with open_hdf5(path) as file:
        for key, array in find(path, file, _KEYS, ["constraint_values"]).items():
            for block in stream(path, array):
                yield {key: as_field(key, block)}


def _point_robot_blocks(path: Path) -> Blocks:
    with open_hdf5(path) as file:
        arrays = find(path, file, list(_POINT_ROBOT.values()))
        here, there = (arrays[key].shape[1:] for key in ("state", "next_state"))
        if here != there:
            raise DatasetError(f"{path}: 'next_state' has rows of the shape {there}, 'state' of {here}: repair the file.")
        for field, key in _POINT_ROBOT.items():
            for block in stream(path, arrays[key]):
                yield {field: as_field(field, block)}
        for block in stream(path, arrays["h"]):
            yield {"costs": (as_field("costs", block) > 0).astype(np.float32)}
        yield from _cuts(path, arrays)


def _cuts(path: Path, arrays: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    done = np.concatenate([as_field("terminals", block) for block in stream(path, arrays["done"])])
    first = 0
    for reached in stream(path, arrays["next_state"]):
        last = min(first + len(reached), len(done) - 1)
        broken = np.ones(len(reached), bool)  # the last row of all has nothing after it
        broken[: last - first] = (reached[: last - first] != arrays["state"][first + 1 : last + 1]).any(axis=1)
        yield {"timeouts": broken & ~done[first : first + len(reached)]}
        first += len(reached)


def file_name(env_id: str, dataset: OfflineDataset) -> str:
    """The name of a data set by DSRL's rule, ``Safety<Task>-v<k>-<max cost>-<trajectories>.hdf5``.

    :param env_id: ``Safety<Task>-v<k>``
    :raises DatasetError: where the data have no costs; of several the sum counts
    """
    costs = dataset.episodes().costs
    if costs is None:
        raise DatasetError(f"{dataset.meta.get('source', 'The data set')}: 'costs' is missing, which DSRL's file name tells.")
    return f"{env_id}-{math.ceil(costs.reshape(len(costs), -1).sum(1).max())}-{len(costs)}.hdf5"


def write(path: Path | str, dataset: OfflineDataset, attrs: Mapping[str, Any] | None = None) -> Path:
    """Write a data set in DSRL's format, compressed; a failure at any point leaves the former file.

    Constraint values are written beside DSRL's seven arrays, several costs as (N, m).

    :param attrs: HDF5 attributes, beside the data set's ``meta`` without source, sha256 and format
    :raises DatasetError: where the data have no costs, or the file cannot be written
    """
    path = Path(path)
    h5py = import_extra("h5py", str(path))
    if dataset.costs is None:
        raise DatasetError(f"{path} was not written: DSRL's format needs 'costs', and the data set has none.")
    own = ("source", "sha256", "format")  # of the file that was read
    kept = {key: value for key, value in dataset.meta.items() if key not in own and value is not None}
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(beside, "w") as file:
            file.attrs.update({**kept, **(attrs or {})})
            for key in (*_KEYS, "constraint_values"):
                if getattr(dataset, key) is not None:
                    _write_array(file, key, getattr(dataset, key))
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DatasetError(f"{path} cannot be written ({error.strerror or error}): use another folder.") from error
        raise
    sync_folder(path.parent)
    return path


def _write_array(file: Any, key: str, array: Any) -> None:
    rows = min(len(array), block_rows(array))
    data = file.create_dataset(key, array.shape, array.dtype, chunks=(rows, *array.shape[1:]), compression="gzip")
    for first in range(0, len(array), rows):
        data[first : first + rows] = np.asarray(array[first : first + rows])
