"""robomimic's HDF5 files: demonstrations in ``data/demo_<k>``, subsets of them in ``mask/<filter>``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..robosuite import LOW_DIM, NAMES
from .cache import Blocks, cached, checked_sha256
from .dataset import DatasetError, OfflineDataset, as_field
from .hdf5 import find, open_hdf5

_HOST = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5"
_HORIZONS = {"lift": 400, "can": 400, "square": 400, "transport": 700, "tool_hang": 700}


def read(
    path: Path | str,
    *,
    sha256: str | None = None,
    meta: Mapping[str, Any] | None = None,
    keys: Sequence[str] = LOW_DIM,
    filter_key: str | None = None,
    step_penalty: bool = False,
) -> OfflineDataset:
    """Read the demonstrations in the order of their numbers.

    ``dones`` are terminals; a demonstration whose last step is none is cut there. Rewards are as in the file, 1 for success.
    A person may go on after success: the file then has that many rows more, each of them a success and a terminal.

    ``meta["env_id"]`` and ``meta["env_kwargs"]`` are what `make_env` makes the environment of the data from.

    :param sha256: what the file must have
    :param meta: goes before what the file says
    :param keys: of ``obs``, concatenated in this order; a single key may be an image
    :param filter_key: of ``mask``, as ``train``; None takes all demonstrations
    :param step_penalty: lower every reward by 1, as the environment's argument of this name does
    :raises DatasetError: naming file, key and row of what is wrong
    """
    path = Path(path)
    digest = checked_sha256(path, sha256)
    with open_hdf5(path) as file:
        env_args = json.loads(file["data"].attrs.get("env_args", "{}")) if "data" in file else {}
        names = _demonstrations(path, file, filter_key)
    options = {"keys": list(keys), "filter_key": filter_key, "step_penalty": step_penalty}
    described = {**_task(env_args), **(meta or {}), "observation_keys": list(keys), "source": str(path), "format": "robomimic"}
    if step_penalty:
        described["env_kwargs"] = {**described.get("env_kwargs", {}), "step_penalty": True}
    return cached(digest, options, lambda: _blocks(path, names, keys, float(step_penalty)), described)


def _task(env_args: Mapping[str, Any]) -> dict[str, Any]:
    """The environment that a file names, by our id where it is one of ours."""
    if "env_name" not in env_args:
        return {}
    ids = {name: env_id for env_id, name in NAMES.items()}
    return {"env_id": ids.get(env_args["env_name"], env_args["env_name"]), "env_kwargs": env_args.get("env_kwargs", {})}


def _demonstrations(path: Path, file: Any, filter_key: str | None) -> list[str]:
    if "data" not in file or not len(file["data"]):
        raise DatasetError(f"{path} has no demonstrations in 'data': use a file of robomimic.")
    names = list(file["data"])
    if filter_key is not None:
        masks = file.get("mask", {})
        if filter_key not in masks:
            raise DatasetError(f"{path} has no 'mask/{filter_key}': choose one of {', '.join(sorted(masks)) or 'none'}.")
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in masks[filter_key][:]]
    for name in names:
        if name not in file["data"]:
            raise DatasetError(f"{path}: 'mask/{filter_key}' names '{name}', which 'data' lacks: choose another filter key.")
        if not re.search(r"_\d+$", name):
            raise DatasetError(f"{path}: 'data/{name}' has no number at its end: name the demonstrations demo_<k>.")
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def _blocks(path: Path, names: Sequence[str], keys: Sequence[str], penalty: float) -> Blocks:
    with open_hdf5(path) as file:
        widths: dict[str, tuple[int, ...]] = {}
        for name in names:
            group = file["data"][name]
            required = ["actions", "rewards", "dones", *(f"{side}/{key}" for side in ("obs", "next_obs") for key in keys)]
            arrays = {key: array[:] for key, array in find(path, group, required).items()}
            for key, array in arrays.items():
                if widths.setdefault(key, array.shape[1:]) != array.shape[1:]:
                    wrong = f"'data/{name}/{key}' has rows of the shape {array.shape[1:]}, the others {widths[key]}"
                    raise DatasetError(f"{path}: {wrong}: leave it out with a filter key.")
            terminals = as_field("terminals", arrays["dones"])
            yield {
                "observations": _joined([arrays[f"obs/{key}"] for key in keys]),
                "next_observations": _joined([arrays[f"next_obs/{key}"] for key in keys]),
                "actions": as_field("actions", arrays["actions"]),
                "rewards": as_field("rewards", arrays["rewards"] - penalty),
                "terminals": terminals,
                "timeouts": (np.arange(len(terminals)) == len(terminals) - 1) & ~terminals,
            }


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return as_field("observations", parts[0])
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1).astype(np.float32)


def addresses() -> dict[str, tuple[str, int]]:
    """Address and steps of a rollout of the low-dimensional data of people, by ``<task>-<ph or mh>-low_dim``.

    The addresses are those of version 1.5 in robomimic's repository of data on Hugging Face, the steps those of the table
    in its ``__init__.py``.
    """
    found = {f"{task}-ph-low_dim": (f"{_HOST}/{task}/ph/low_dim_v15.hdf5", steps) for task, steps in _HORIZONS.items()}
    for task in ("lift", "can", "square", "transport"):
        found[f"{task}-mh-low_dim"] = (f"{_HOST}/{task}/mh/low_dim_v15.hdf5", 1100 if task == "transport" else 500)
    return found
