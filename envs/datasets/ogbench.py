"""OGBench's npz files: trajectories with one row more than they have transitions, and the rewards of its single tasks."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cache import Blocks, cached, checked_sha256
from .dataset import BLOCK, DatasetError, OfflineDataset, as_field
from .hdf5 import import_extra

_HOST = "https://rail.eecs.berkeley.edu/datasets/ogbench"
_STATE = ("qpos", "button_states")  # what the rewards of single tasks are computed from


def read(
    path: Path | str,
    *,
    sha256: str | None = None,
    meta: Mapping[str, Any] | None = None,
    task: str | None = None,
    sparse: bool = False,
) -> OfflineDataset:
    """Read a file of OGBench.

    ``terminals`` in it mark the last row of each trajectory, which has no next one: that row is only a next observation
    here, and the transition into it is a timeout. Without a task the rewards are 0 and nothing is terminal.

    :param sha256: what the file must have
    :param meta: goes into the data set's
    :param task: a single-task name such as ``cube-single-play-singletask-task1-v0``: rewards are then OGBench's, and the
        transitions that reach the goal are terminal, also in the middle of a trajectory
    :param sparse: rewards are -1 wherever they are not 0, as the environment's argument of this name has it
    :raises DatasetError: naming file, key and row of what is wrong
    """
    path = Path(path)
    digest = checked_sha256(path, sha256)
    described = {**(meta or {}), **({} if task is None else {"env_id": task}), "source": str(path), "format": "ogbench"}
    if sparse:
        described["env_kwargs"] = {"sparse": True}
    options = {"task": task, **({"sparse": True} if sparse else {})}
    return cached(digest, options, lambda: _blocks(path, task, sparse), described)


def _blocks(path: Path, task: str | None, sparse: bool) -> Blocks:
    arrays = _open(path)
    for key in ("observations", "actions", "terminals"):
        _require(path, arrays, key, len(arrays.get("observations", ())))
    last = np.concatenate([as_field("terminals", block) for block in arrays["terminals"].blocks()])
    last[-1] = True  # the row after the last does not exist, marked or not
    kept = ~last
    if not kept.any():
        raise DatasetError(f"{path}: 'terminals' leave no transition with a next row: use a file with longer trajectories.")
    yield {"rows": np.flatnonzero(kept)}
    yield from _outcomes(path, arrays, kept, task, sparse)
    for block in arrays["observations"].blocks():
        yield {"observations": as_field("observations", block)}
    first = 0
    for block in arrays["actions"].blocks():
        yield {"actions": as_field("actions", block)[kept[first : first + len(block)]]}
        first += len(block)


def _outcomes(path: Path, arrays: Mapping[str, _Member], kept: np.ndarray, task: str | None, sparse: bool) -> Blocks:
    """Rewards, terminals and timeouts of the rows that are kept."""
    ends = np.append(~kept[1:], True)[kept]
    rewards, reached = np.zeros(len(ends), np.float32), np.zeros(len(ends), bool)
    if task is not None:
        state = {}
        for key in _STATE:
            if key == "qpos" or key in arrays:
                _require(path, arrays, key, len(kept))
                state[key] = np.concatenate(list(arrays[key].blocks()))[kept]
        rewards, reached = _relabelled(path, state, task)
        rewards = np.where(rewards != 0.0, -1.0, 0.0).astype(np.float32) if sparse else rewards
    yield {"rewards": rewards, "terminals": reached, "timeouts": ends & ~reached}


def _relabelled(path: Path, state: dict[str, np.ndarray], task: str) -> tuple[np.ndarray, np.ndarray]:
    import gymnasium as gym

    ogbench = import_extra("ogbench", str(path), extra="ogbench")
    relabel = import_extra("ogbench.relabel_utils", str(path), extra="ogbench").relabel_dataset
    if "singletask" not in task.split("-"):
        raise DatasetError(f"'{task}' is no single task of OGBench: use a name such as cube-single-play-singletask-task1-v0.")
    try:
        env = ogbench.make_env_and_datasets(task, env_only=True)
    except gym.error.Error as error:
        raise DatasetError(f"OGBench has no task '{task}': correct its name.") from error
    try:
        relabel(task, env, state)
    except (KeyError, IndexError) as error:
        raise DatasetError(f"{path} lacks the state that the rewards of '{task}' need: use the data of this task.") from error
    finally:
        env.close()
    return state["rewards"], state["masks"] == 0


def _require(path: Path, arrays: Mapping[str, _Member], key: str, rows: int) -> None:
    if key not in arrays:
        raise DatasetError(f"{path} has no '{key}', only {', '.join(sorted(arrays))}: use a file with it.")
    if len(arrays[key]) != rows or not rows:
        raise DatasetError(f"{path}: '{key}' has {len(arrays[key])} rows where 'observations' has {rows}: repair the file.")


# ---------------------------------------------------------------------- npz, block by block


class _Member(NamedTuple):
    """An array of an npz file, that is read as a stream: `numpy.load` would inflate all of it into memory."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def blocks(self) -> Iterator[np.ndarray]:
        """Its rows, in order."""
        size = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        rows = max(1, BLOCK // max(1, size))
        try:
            with zipfile.ZipFile(self.path) as file, file.open(self.name) as stream:
                _header(stream)
                for first in range(0, len(self), rows):
                    count = min(rows, len(self) - first)
                    data = np.frombuffer(stream.read(count * size), self.dtype)
                    yield data.reshape(count, *self.shape[1:])
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise DatasetError(f"{self.path}: '{self.name}' is damaged: copy or download the file again.") from error


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _open(path: Path) -> dict[str, _Member]:
    members = {}
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                with file.open(name) as stream:
                    shape, fortran, dtype = _header(stream)
                if fortran or dtype.kind not in "biuf":
                    raise DatasetError(f"{path}: '{name}' is no array of numbers in C order: save it again with numpy.savez.")
                members[name.removesuffix(".npy")] = _Member(path, name, shape, dtype)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is not a whole npz file: copy or download it again.") from error
    return members


# ---------------------------------------------------------------------- names


def names() -> list[str]:
    """The data sets with continuous actions, without their single tasks."""
    mazes = [f"{robot}maze-{size}" for robot in ("point", "ant", "humanoid") for size in ("medium", "large", "giant")]
    mazes += ["pointmaze-teleport", "antmaze-teleport", "antsoccer-arena", "antsoccer-medium"]
    kinds = [f"{maze}-{kind}" for maze in mazes for kind in ("navigate", "stitch")]
    kinds += [f"antmaze-{size}-explore" for size in ("medium", "large", "teleport")]
    objects = [f"cube-{count}" for count in ("single", "double", "triple", "quadruple")]
    objects += ["scene", *(f"puzzle-{size}" for size in ("3x3", "4x4", "4x5", "4x6"))]
    kinds += [f"{thing}-{kind}" for thing in objects for kind in ("play", "noisy")]
    seen = [kind for kind in kinds if not kind.startswith(("point", "antsoccer"))]
    return [f"{kind}-v0" for kind in kinds] + [f"visual-{kind}-v0" for kind in seen]


def address(name: str) -> tuple[str, dict[str, Any]] | None:
    """Where a data set or single task is downloaded from, and what `read` needs for it; None for a name it does not have.

    ``cube-single-play-v0-val`` is the validation part of ``cube-single-play-v0``.
    """
    base, val = name.removesuffix("-val"), "-val" if name.endswith("-val") else ""
    plain = re.sub(r"-singletask(-task\d)?(?=-v0$)", "", base)
    if plain not in names():
        return None
    return f"{_HOST}/{plain}{val}.npz", {} if plain == base else {"task": base}
