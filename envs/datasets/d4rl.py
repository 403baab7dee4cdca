"""D4RL's HDF5 files, as its ``qlearning_dataset`` reads them, and the names and addresses of its data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cache import Blocks, cached, checked_sha256
from .dataset import DatasetError, OfflineDataset, as_field
from .hdf5 import find, open_hdf5, stream

_KEYS = ("observations", "actions", "rewards", "terminals")
_HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl"


class Task(NamedTuple):
    """One data set of D4RL: its address, and what its ``infos.py`` says of it."""

    url: str
    meta: dict[str, Any]


def read(
    path: Path | str,
    *,
    sha256: str | None = None,
    meta: Mapping[str, Any] | None = None,
    max_episode_steps: int | None = None,
    clip_actions: bool = False,
) -> OfflineDataset:
    """Read a file with observations, actions, rewards, terminals and, where it has them, timeouts and next_observations.

    Without next observations, a transition leads to the next row; those that a timeout ends, and the last one of all, lead
    nowhere and are dropped, as D4RL does, and the episode is then cut one step earlier.

    :param sha256: what the file must have
    :param meta: goes into the data set's
    :param max_episode_steps: where an episode is cut in a file without ``timeouts``
    :param clip_actions: to [-1, 1], where the file goes beyond
    :raises DatasetError: naming file, key and row of what is wrong; rows count the transitions that are kept
    """
    path = Path(path)
    digest = checked_sha256(path, sha256)
    options = {"max_episode_steps": max_episode_steps, "clip_actions": clip_actions}
    described = {**(meta or {}), "source": str(path), "format": "d4rl"}
    return cached(digest, options, lambda: _blocks(path, max_episode_steps, clip_actions), described)


def _blocks(path: Path, max_episode_steps: int | None, clip_actions: bool) -> Blocks:
    with open_hdf5(path) as file:
        arrays = find(path, file, _KEYS, ("timeouts", "next_observations"))
        terminals = _flags(path, arrays["terminals"])
        timeouts = _flags(path, arrays["timeouts"]) if "timeouts" in arrays else _limits(terminals, max_episode_steps)
        kept = np.ones(len(terminals), bool)
        if "next_observations" not in arrays:
            kept = ~timeouts
            kept[-1] = False
            if not kept.any():
                raise DatasetError(f"{path}: 'timeouts' leave no transition with a next row: use a file with longer episodes.")
            yield {"rows": np.flatnonzero(kept)}
            timeouts = timeouts | np.append(~kept[1:], False)
        yield {"terminals": terminals[kept], "timeouts": (timeouts & ~terminals)[kept]}
        for block in stream(path, arrays["observations"]):
            yield {"observations": as_field("observations", block)}
        for key in ("actions", "rewards", "next_observations"):
            if key in arrays:
                yield from _kept(path, key, arrays[key], kept, clip_actions and key == "actions")


def _flags(path: Path, array: Any) -> np.ndarray:
    return np.concatenate([as_field("terminals", block) for block in stream(path, array)])


def _limits(terminals: np.ndarray, max_episode_steps: int | None) -> np.ndarray:
    """Where the time limit ends an episode, counted from the end of the one before."""
    if max_episode_steps is None:
        return np.zeros(len(terminals), bool)
    starts = np.concatenate([[0], np.flatnonzero(terminals) + 1])
    rows = np.arange(len(terminals))
    steps = rows - starts[np.searchsorted(starts, rows, side="right") - 1]
    return steps % max_episode_steps == max_episode_steps - 1


def _kept(path: Path, key: str, array: Any, kept: np.ndarray, clip: bool) -> Blocks:
    first = 0
    for block in stream(path, array):
        part = as_field(key, block)[kept[first : first + len(block)]]
        yield {key: np.clip(part, -1, 1) if clip else part}
        first += len(block)


def tasks() -> dict[str, Task]:
    """The data sets that can be had by name.

    Addresses and reference returns as in ``d4rl/infos.py`` of github.com/Farama-Foundation/D4RL.
    """
    return {**_mujoco(), **_antmaze(), **_adroit(), **_kitchen()}


def _task(folder: str, file: str, low: float, high: float, steps: int, env_id: str | None = None) -> Task:
    meta = {"reference_min_return": low, "reference_max_return": high, "max_episode_steps": steps}
    return Task(f"{_HOST}/{folder}/{file}.hdf5", meta if env_id is None else {**meta, "env_id": env_id})


def _mujoco() -> dict[str, Task]:
    robots = {
        "halfcheetah": (-280.178953, 12135.0, "HalfCheetah-v4"),  # v4 has the dynamics of the v2 that made the data
        "hopper": (-20.272305, 3234.3, "Hopper-v4"),
        "walker2d": (1.629008, 4592.3, "Walker2d-v4"),
        "ant": (-325.6, 3879.7, None),
    }
    kinds = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
    return {
        f"{robot}-{kind}-v2": _task("gym_mujoco_v2", f"{robot}_{kind.replace('-', '_')}-v2", low, high, 1000, env_id)
        for robot, (low, high, env_id) in robots.items()
        for kind in kinds
    }


def _antmaze() -> dict[str, Task]:
    mazes = {  # starts and goals, as the file's name has them
        "umaze": ("u-maze", False, False, 700),
        "umaze-diverse": ("u-maze", True, True, 700),
        "medium-play": ("big-maze", True, False, 1000),
        "medium-diverse": ("big-maze", True, True, 1000),
        "large-play": ("hardest-maze", True, False, 1000),
        "large-diverse": ("hardest-maze", True, True, 1000),
    }
    file = "Ant_maze_{}_noisy_multistart_{}_multigoal_{}_sparse_fixed"
    return {
        f"antmaze-{name}-v2": _task("ant_maze_v2", file.format(maze, starts, goals), 0.0, 1.0, steps)
        for name, (maze, starts, goals, steps) in mazes.items()
    }


def _adroit() -> dict[str, Task]:
    hands = {
        "pen": (96.262799, 3076.8331017826877, 100),
        "hammer": (-274.856578, 12794.134825156867, 200),
        "door": (-56.512833, 2880.5693087298737, 200),
        "relocate": (-6.425911, 4233.877797728884, 200),
    }
    return {
        f"{hand}-{kind}-v1": _task("hand_dapg_v1", f"{hand}-{kind}-v1", low, high, steps, f"AdroitHand{hand.capitalize()}-v1")
        for hand, (low, high, steps) in hands.items()
        for kind in ("human", "cloned", "expert")
    }


def _kitchen() -> dict[str, Task]:
    files = {
        "complete": "mini_kitchen_microwave_kettle_light_slider-v0",
        "partial": "kitchen_microwave_kettle_light_slider-v0",
        "mixed": "kitchen_microwave_kettle_bottomburner_light-v0",
    }
    return {f"kitchen-{kind}-v0": _task("kitchen", file, 0.0, 4.0, 280) for kind, file in files.items()}
