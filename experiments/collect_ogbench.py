"""OGBench's data without its server: episodes in as many processes as there are cores, as the npz files that it reads.

An episode follows from its number alone and is kept until the files are written: the same command goes on where it was
interrupted, and gives the same files in whatever number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError
from .interrupts import stoppable
from .manifest import describe, write_json
from .walker import TRAIN_STEPS, load_walker, train_walker

if TYPE_CHECKING:
    from .collect import CollectConfig

VALIDATION = 10  # one episode for validation for so many for training
EPISODE = 1_000_003  # between the seeds of two episodes
MINUTE = 60.0  # seconds between two lines that say how far it is


def collect_ogbench(config: CollectConfig, command: str = "", jobs: int | None = None) -> Path:
    """Make the training and the validation part of a dataset, or go on with them, or find them there.

    :param config: ``env`` is the dataset's name, ``out`` a folder or the training part's file, ``steps`` its transitions
    :param jobs: processes; None: one a core
    :return: the training part; the validation part, ``-val.npz``, and a datasheet (``.json``) lie beside it
    :raises UsageError: for what cannot be made, and when a process died
    :raises DatasetError: for a name that has no recipe
    """
    from tether.envs.datasets.hdf5 import import_extra
    from tether.envs.datasets.ogbench_make import recipe
    from tether.envs.envpool_vec import available_cores

    made = recipe(config.env)
    import_extra("ogbench", config.env, extra="ogbench")
    if config.behaviours or config.env_kwargs:
        raise UsageError("OGBench's data have one behaviour and no arguments: leave out --behaviour and --env-kwargs.")
    if config.out.suffix == ".hdf5":
        raise UsageError(f"OGBench's data are npz files: give --out a folder, or {config.out.with_suffix('.npz')}.")
    path = config.out if config.out.suffix == ".npz" else config.out / f"{config.env}.npz"
    validation = path.with_name(f"{path.stem}-val.npz")
    training = made.episodes if config.steps is None else -(-config.steps // (made.length - 1))
    episodes = training + max(1, training // VALIDATION)
    sheet = {"name": config.env, "seed": config.seed, "episodes": training, "transitions": training * (made.length - 1)}
    sheet |= {"train_steps": config.train_steps or TRAIN_STEPS} if made.walks else {}
    if _is_there(path, validation, sheet):
        return path
    folder = _shards(path, config)
    shards = [_shard(folder, number) for number in range(episodes)]
    walker = train_walker(config.cache, config.train_steps, config.seed) if made.walks else None
    todo = [number for number in range(episodes) if not zipfile.is_zipfile(shards[number])]
    with stoppable():
        _make(config, folder, todo, walker, min(jobs or available_cores(), max(1, len(todo))))
    for place, part in ((path, shards[:training]), (validation, shards[training:])):
        _publish(place, partial(_join, part))
    write_json(path.with_suffix(".json"), {**sheet, **_provenance(path, validation, command)})
    shutil.rmtree(folder.parent)
    return path


def _is_there(path: Path, validation: Path, sheet: dict[str, Any]) -> bool:
    """Whether the very dataset lies there, whole."""
    from tether.envs.datasets.cache import file_sha256

    note = path.with_suffix(".json")
    if not (path.is_file() and validation.is_file() and note.is_file()):
        return False
    found = json.loads(note.read_text(encoding="utf-8"))
    parts = {"sha256": path, "validation_sha256": validation}
    same = all(found.get(key) == value for key, value in sheet.items())
    return same and all(found.get(key) == file_sha256(part) for key, part in parts.items())


def _shards(path: Path, config: CollectConfig) -> Path:
    """Where finished episodes lie, which depend on the name and the seed only."""
    folder = path.with_name(f".{path.name}.partial") / f"{config.env}-{config.seed}-{config.train_steps}"
    if folder.parent.is_dir() and not folder.is_dir():
        raise UsageError(f"{folder.parent} holds episodes of another collection: finish that one, or delete the folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---------------------------------------------------------------------- episodes


def _make(config: CollectConfig, folder: Path, numbers: Sequence[int], walker: Path | None, jobs: int) -> None:
    """Make and keep the episodes of these numbers; each process has its own share of them."""
    if jobs == 1:
        _make_share(config.env, walker, folder, config.seed, numbers)
        return
    shares = [(config.env, walker, folder, config.seed, numbers[k::jobs]) for k in range(jobs)]
    processes = [get_context("spawn").Process(target=_process, args=share, daemon=True) for share in shares]
    try:
        for process in processes:
            process.start()
        while going := [process.sentinel for process in processes if process.is_alive()]:
            if not wait(going, MINUTE):
                done = sum(_shard(folder, number).is_file() for number in numbers)
                print(f"  {done:,} of {len(numbers):,} episodes", flush=True)
    finally:  # half an episode is worth nothing
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()
    if any(process.exitcode for process in processes):
        raise UsageError(
            "A process that made episodes died: mend what it printed above, or what killed it (memory, perhaps), and give the "
            "same command again, which goes on."
        )


def _process(*share: Any) -> None:
    """A process of its own: Ctrl-C is for the first one, and whatever ends that one ends this."""
    from .cli import quiet

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with quiet():
        _make_share(*share)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_share(name: str, walker: Path | None, folder: Path, seed: int, numbers: Sequence[int]) -> None:
    from tether.agents.common.threads import use_threads
    from tether.envs.datasets.ogbench_make import Generator, recipe

    with use_threads(1), closing(Generator(recipe(name), None if walker is None else load_walker(walker))) as generator:
        for number in numbers:
            rows = generator.episode(seed + EPISODE * (number + 1))
            _publish(_shard(folder, number), partial(np.savez, **rows))  # type: ignore[arg-type]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


# ---------------------------------------------------------------------- files


def _publish(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file that is there in whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            write(file)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _join(shards: Sequence[Path], file: IO[bytes]) -> None:
    """Write the episodes one after the other, as ``numpy.savez_compressed`` would, with one of them in memory."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as whole:
        for name, first in _read(shards[0]).items():
            shape = (len(shards) * len(first), *first.shape[1:])
            with whole.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for shard in shards:
                    with np.load(shard, allow_pickle=False) as episode:
                        stream.write(episode[name].tobytes())


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _provenance(path: Path, validation: Path, command: str) -> dict[str, Any]:
    """What the datasheet says beyond what was asked for."""
    from tether.envs.datasets.cache import file_sha256

    return {
        "file": path.name, "sha256": file_sha256(path), "validation": validation.name,
        "validation_sha256": file_sha256(validation), "command": command, **describe(),
    }  # fmt: skip
