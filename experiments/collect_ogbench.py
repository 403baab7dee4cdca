"""OGBench's data without its server: episodes in as many processes as there are cores, as the npz files that it reads.

An episode follows from its number alone and is kept until the files are written: the same command goes on where it was
interrupted, and gives the same files in whatever number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError
from .interrupts import stoppable
from .manifest import describe, write_json
from .walker import load_walker, train_walker

if TYPE_CHECKING:
    from tether.envs.datasets.ogbench_make import Generator

    from .collect import CollectConfig

VALIDATION = 10  # one episode for validation for so many for training
EPISODE = 1_000_003  # between the seeds of two episodes


def collect_ogbench(config: CollectConfig, command: str = "", jobs: int | None = None) -> Path:
    """Make the training and the validation part of a dataset, or go on with them.

    :param config: ``env`` is the dataset's name, ``out`` a folder or the training part's file, ``steps`` its transitions
    :param jobs: processes; None: one a core
    :return: the training part; the validation part, ``-val.npz``, and a datasheet (``.json``) lie beside it
    :raises UsageError: for what cannot be made
    :raises DatasetError: for a name that has no recipe
    """
    from tether.envs.datasets.ogbench_make import recipe
    from tether.envs.envpool_vec import available_cores

    made = recipe(config.env)
    if config.behaviours or config.env_kwargs:
        raise UsageError("OGBench's data have one behaviour and no arguments: leave out --behaviour and --env-kwargs.")
    path = config.out if config.out.suffix == ".npz" else config.out / f"{config.env}.npz"
    training = made.episodes if config.steps is None else -(-config.steps // (made.length - 1))
    episodes = training + max(1, training // VALIDATION)
    shards = _shards(path, config)
    walker = train_walker(config.cache, config.train_steps, config.seed) if made.walks else None
    todo = [i for i in range(episodes) if not (shards / f"{i:06d}.npz").is_file()]
    with stoppable():
        _make(config, shards, todo, walker, min(jobs or available_cores(), max(1, len(todo))))
    rows = [_read(shards / f"{i:06d}.npz") for i in range(episodes)]
    validation = path.with_name(f"{path.stem}-val.npz")
    for place, part in ((path, rows[:training]), (validation, rows[training:])):
        _write(place, {name: np.concatenate([episode[name] for episode in part]) for name in part[0]}, compress=True)
    write_json(path.with_suffix(".json"), _sheet(path, validation, config, command, training, made.length))
    shutil.rmtree(shards.parent)
    return path


def _shards(path: Path, config: CollectConfig) -> Path:
    """Where finished episodes lie, which depend on the name and the seed only."""
    folder = path.with_name(f".{path.name}.partial") / f"{config.env}-{config.seed}-{config.train_steps}"
    if folder.parent.is_dir() and not folder.is_dir():
        raise UsageError(f"{folder.parent} holds episodes of another collection: finish that one, or delete the folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---------------------------------------------------------------------- episodes


def _make(config: CollectConfig, shards: Path, numbers: Sequence[int], walker: Path | None, jobs: int) -> None:
    """Make and keep the episodes of these numbers."""
    one = partial(_episode, shards, config.seed)
    if jobs == 1:
        _begin(config.env, walker)
        try:
            for number in numbers:
                one(number)
        finally:
            _end()
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (config.env, walker)) as pool:
        try:
            for _ in pool.map(one, numbers):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_GENERATOR: list[Generator] = []  # of this process


def _begin(name: str, walker: Path | None) -> None:
    import torch as th

    from tether.envs.datasets.ogbench_make import Generator, recipe

    th.set_num_threads(1)  # the processes share the cores
    _GENERATOR[:] = [Generator(recipe(name), None if walker is None else load_walker(walker))]


def _end() -> None:
    _GENERATOR.pop().close()


def _episode(shards: Path, seed: int, number: int) -> None:
    _write(shards / f"{number:06d}.npz", _GENERATOR[0].episode(seed + EPISODE * (number + 1)), compress=False)


# ---------------------------------------------------------------------- files


def _write(path: Path, arrays: dict[str, np.ndarray], compress: bool) -> None:
    beside = path.with_suffix(".new")
    with open(beside, "wb") as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)  # type: ignore[arg-type]
    beside.replace(path)


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _sheet(path: Path, validation: Path, config: CollectConfig, command: str, episodes: int, length: int) -> dict[str, Any]:
    """The datasheet."""
    from tether.envs.datasets.cache import file_sha256

    return {
        "file": path.name, "sha256": file_sha256(path), "validation": validation.name,
        "validation_sha256": file_sha256(validation), "name": config.env, "seed": config.seed, "command": command,
        "episodes": episodes, "transitions": episodes * (length - 1), **describe(),
    }  # fmt: skip
