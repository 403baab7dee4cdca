"""A run's resumable state as one folder, swapped in whole: a kill at any moment leaves the last good one.

What is kept: weights, optimisers, normalisers, counters, replay buffer, the state of the random generators. What is
not: the state of the environments, which start a new episode on resume.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from .errors import UsageError, first_line
from .manifest import write_json

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize


def save_model(model: BaseAlgorithm, path: Path) -> None:
    """``model.save`` beside, synced, then renamed; statistics of a ``VecNormalize`` go into :func:`normalizer_path`."""
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        beside = normalizer_path(path).with_name(f".new-{normalizer_path(path).name}")
        normalizer.save(str(beside))
        os.replace(beside, normalizer_path(path))
    beside = path.with_name(f".new-{path.name}")
    model.save(beside)
    _sync(beside)
    os.replace(beside, path)


def normalizer_path(model: Path) -> Path:
    """Where a model's ``VecNormalize`` is kept: ``vecnormalize.pkl`` beside it, ``best_vecnormalize.pkl`` for the best."""
    return model.with_name("best_vecnormalize.pkl" if model.name == "best_model.zip" else "vecnormalize.pkl")


def save_checkpoint(model: BaseAlgorithm, folder: Path) -> None:
    """Write the state of ``model`` to ``folder``, replacing the former checkpoint only when it is complete."""
    new, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_model(model, new / "model.zip")
    if getattr(model, "replay_buffer", None) is not None:
        model.save_replay_buffer(new / "replay_buffer.pkl")  # type: ignore[attr-defined]
    th.save(_random_state(), new / "random.pt")
    write_json(new / "state.json", {"timesteps": model.num_timesteps, "time": time.time()})
    for file in new.iterdir():
        _sync(file)
    if folder.exists():  # if not, `old` is the only one until `new` has the name
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: the folder, or its predecessor where a kill fell between the two renames."""
    for candidate in (folder, folder.with_name(f"{folder.name}.old")):
        if (candidate / "state.json").is_file():
            return candidate
    return None


def checkpoint_time(folder: Path) -> float:
    """The moment at which a checkpoint was written, in seconds since the epoch."""
    return float(json.loads((folder / "state.json").read_text(encoding="utf-8")).get("time", "inf"))


def load_checkpoint(cls: type[BaseAlgorithm], folder: Path, env: VecEnv, device: str) -> BaseAlgorithm:
    """The agent as it was saved, on a fresh ``env`` (which gets its ``VecNormalize`` back with its statistics).

    :raises UsageError: if a file of the checkpoint cannot be read
    """
    path = folder / "model.zip"
    try:
        if normalizer_path(path).is_file():
            env = restore_normalizer(env, normalizer_path(path))
        model = cls.load(path, env=env, device=device)
        if (folder / "replay_buffer.pkl").is_file():
            model.load_replay_buffer(folder / "replay_buffer.pkl")  # type: ignore[attr-defined]
        _restore_random_state(th.load(folder / "random.pt", weights_only=True))
    except Exception as error:
        raise UsageError(
            f"The checkpoint {folder} cannot be read ({first_line(error)}): "
            "delete the run's folder to start it anew, or put the checkpoint back from a copy."
        ) from error
    return model


def restore_normalizer(env: VecEnv, path: Path) -> VecNormalize:
    """Wrap ``env`` in the ``VecNormalize`` saved at ``path``, in the place of one that it has."""
    from stable_baselines3.common.vec_env import VecNormalize

    return VecNormalize.load(str(path), env.venv if isinstance(env, VecNormalize) else env)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _random_state() -> dict[str, Any]:
    version, keys, gauss = random.getstate()
    name, mt, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - SB3 draws from the global generator
    return {
        "python": [version, list(keys), gauss],
        "numpy": [name, th.as_tensor(np.asarray(mt, np.int64)), position, has_gauss, cached],
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_initialized() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, mt, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, mt.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    th.set_rng_state(state["torch"])
    th.cuda.set_rng_state_all(state.get("cuda", [])[: th.cuda.device_count()])
