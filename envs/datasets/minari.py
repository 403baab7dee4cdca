"""Minari's data sets, read through its own library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from .cache import Blocks, cached, checked_sha256
from .dataset import DatasetError, OfflineDataset, as_field
from .hdf5 import import_extra

NAME = re.compile(r"([\w-]+/)*[\w-]+-v\d+")
# The ids that Minari's documentation lists for MuJoCo and Adroit; any other can be loaded as well.
_MUJOCO = (
    *("ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverteddoublependulum", "invertedpendulum"),
    *("pusher", "reacher", "swimmer", "walker2d"),
)
_HANDS = ("pen", "hammer", "door", "relocate")


def read(path: Path | str, *, sha256: str | None = None, meta: Mapping[str, Any] | None = None) -> OfflineDataset:
    """Read a data set's folder, the one with ``data`` in it or ``data`` itself.

    Observations are a Box, or a Dict of Boxes that is flattened in the order of its keys. Actions with other finite
    bounds are rescaled to [-1, 1], the bounds kept as ``action_low`` and ``action_high``. ``infos["cost"]`` becomes
    costs, ``infos["costs"]`` several. An episode without an end is cut.

    :param sha256: what the folder must have, as `file_sha256` gives it
    :param meta: goes before what the data set says
    :raises DatasetError: naming folder, key and row of what is wrong
    """
    path = Path(path)
    data = path / "data" if (path / "data").is_dir() else path
    digest = checked_sha256(data, sha256)
    minari = import_extra("minari", str(path))
    try:
        dataset = minari.MinariDataset(data)
        described = _described(dataset)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise DatasetError(f"{path} is no data set that Minari reads ({str(error).rstrip('.')}): get it again.") from error
    space = dataset.action_space
    if not isinstance(space, gym.spaces.Box):
        raise DatasetError(f"{path}: 'actions' are {type(space).__name__}: use a data set whose actions are a Box.")
    if not _is_flat(dataset.observation_space):
        space = dataset.observation_space
        raise DatasetError(f"{path}: 'observations' are {type(space).__name__}: use a data set of Box or Dict of Boxes.")
    described = {**described, **_bounds(space), **(meta or {}), "source": str(path), "format": "minari"}
    return cached(digest, {}, lambda: _blocks(path, dataset), described)


def _described(dataset: Any) -> dict[str, Any]:
    spec, stored = dataset.env_spec, dataset.storage.metadata
    references = {f"reference_{side}_return": stored.get(f"ref_{side}_score") for side in ("min", "max")}
    return {
        "dataset_id": dataset.id,
        **({} if spec is None else {"env_id": spec.id, "max_episode_steps": spec.max_episode_steps}),
        **{key: value for key, value in references.items() if value is not None},
    }


def _is_flat(space: gym.Space) -> bool:
    if isinstance(space, gym.spaces.Dict):
        return all(_is_flat(part) for part in space.values())
    return isinstance(space, gym.spaces.Box) and bool(space.shape)


def _bounds(space: gym.spaces.Box) -> dict[str, Any]:
    """The bounds that actions are rescaled from; empty where they are -1 and 1 or none."""
    low, high = space.low.ravel(), space.high.ravel()
    if not (np.isfinite(low).all() and np.isfinite(high).all()) or ((low == -1).all() and (high == 1).all()):
        return {}
    return {"action_low": low.tolist(), "action_high": high.tolist()}


def _blocks(path: Path, dataset: Any) -> Blocks:
    bounds = _bounds(dataset.action_space)
    first = 0
    for episode in dataset.iterate_episodes():
        steps = len(episode.rewards)
        observations = _flat(episode.observations, dataset.observation_space)
        actions = np.asarray(episode.actions).reshape(len(episode.actions), -1)
        if len(observations) != steps + 1 or len(actions) != steps:
            wrong = f"has {len(observations)} 'observations' and {len(actions)} 'actions' for {steps} 'rewards'"
            raise DatasetError(f"{path}: episode {episode.id} {wrong}: there must be one observation more than actions.")
        if bounds:
            low, high = np.asarray(bounds["action_low"]), np.asarray(bounds["action_high"])
            actions = 2 * (actions - low) / (high - low) - 1
        terminals = as_field("terminals", np.asarray(episode.terminations))
        ends = np.arange(steps) == steps - 1
        yield {
            "rows": first + np.arange(steps),
            "observations": as_field("observations", observations),
            "actions": as_field("actions", actions),
            "rewards": as_field("rewards", np.asarray(episode.rewards)),
            "terminals": terminals,
            "timeouts": (as_field("timeouts", np.asarray(episode.truncations)) | ends) & ~terminals,
            **_costs(episode.infos or {}, steps),
        }
        first += steps + 1


def _flat(values: Any, space: gym.Space) -> np.ndarray:
    if isinstance(space, gym.spaces.Dict):
        parts = [_flat(values[key], part) for key, part in space.items()]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    return np.asarray(values)


def _costs(infos: Mapping[str, Any], steps: int) -> dict[str, np.ndarray]:
    """The last ``steps`` rows: Minari stores the info of a reset, too, where it has the same keys."""
    key = "costs" if "costs" in infos else "cost"
    return {"costs": as_field("costs", np.asarray(infos[key])[-steps:])} if key in infos else {}


def local_folder(name: str) -> Path:
    """Where Minari keeps a data set: below ``$MINARI_DATASETS_PATH``, else ``~/.minari/datasets``."""
    root = os.environ.get("MINARI_DATASETS_PATH")
    return (Path(root) if root else Path.home() / ".minari" / "datasets") / name


def fetch(name: str) -> Path:
    """The folder of a data set, downloaded by Minari itself where it is not there.

    :raises DatasetError: where Minari cannot
    """
    folder = local_folder(name)
    if not (folder / "data").is_dir():
        minari = import_extra("minari", name)
        try:
            minari.download_dataset(name)
        except ImportError as error:
            raise DatasetError(f'{name} is downloaded through an extra of Minari: pip install "minari[hf]".') from error
        except Exception as error:  # Minari, its host and its clients have no common error
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
            raise DatasetError(f"Minari cannot download {name} ({reason}): correct the id, or try again later.") from error
    return folder


def names() -> list[str]:
    """Ids that Minari serves, the best known of them."""
    found = [f"mujoco/{robot}/{kind}-v0" for robot in _MUJOCO for kind in ("simple", "medium", "expert")]
    return found + [f"D4RL/{hand}/{kind}-v2" for hand in _HANDS for kind in ("human", "cloned", "expert")]
