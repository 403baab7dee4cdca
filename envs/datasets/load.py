"""The one door to offline data: `load_dataset` by path or by name."""

from __future__ import annotations

import difflib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import d4rl, dsrl, mimic, minari, ogbench, robomimic
from .cache import cache_folder
from .dataset import DatasetError, OfflineDataset
from .download import download
from .dsrl_tasks import TASKS
from .hdf5 import open_hdf5

_READERS: dict[str, Callable[..., OfflineDataset]] = {
    "dsrl": dsrl.read,
    "d4rl": d4rl.read,
    "minari": minari.read,
    "ogbench": ogbench.read,
    "robomimic": robomimic.read,
    "mimic": mimic.read,
}


def load_dataset(
    source: str | Path, *, format: str | None = None, sha256: str | None = None, **kwargs: Any
) -> OfflineDataset:
    """Load offline data.

    :param source: a file, a folder, or a name of `list_datasets`, which is downloaded once from where its makers keep it
    :param format: ``dsrl``, ``d4rl``, ``minari``, ``ogbench``, ``robomimic`` or ``mimic``; by default told from the content
    :param sha256: what the file must have; a download that has another is removed
    :param kwargs: the reader's own arguments, as ``clip_actions`` (dsrl, d4rl), ``keys`` (robomimic) or ``reward`` (mimic)
    :return: memory-mapped from the cache, but mimic in memory, with ``meta["source"]`` and ``meta["sha256"]``
    :raises DatasetError: in one sentence that names what is wrong and what to do
    """
    if format is not None and format not in _READERS:
        raise DatasetError(f"There is no format '{format}': use one of {', '.join(_READERS)}.")
    path = Path(source).expanduser()
    if path.exists():
        path = path.parent if path.name == "main_data.hdf5" else path
        return _READERS[format or _recognised(path)](path, sha256=sha256, **kwargs)
    return _by_name(str(source), format, sha256, kwargs)


def list_datasets() -> dict[str, list[str]]:
    """The names that `load_dataset` downloads, by format; Minari serves more ids than are listed."""
    return {
        "dsrl": list(TASKS),
        "d4rl": list(d4rl.tasks()),
        "minari": minari.names(),
        "ogbench": ogbench.names(),
        "robomimic": list(robomimic.addresses()),
    }


def _recognised(path: Path) -> str:
    """The format of a file or folder by what is in it."""
    if path.is_dir():
        if (path / "metadata.json").exists() or (path / "data" / "metadata.json").exists():
            return "minari"
        raise DatasetError(f"{path} is a folder without Minari's metadata.json: give the file itself, or Minari's folder.")
    if zipfile.is_zipfile(path) or path.suffix == ".npz":
        return "ogbench"
    if path.suffix.lower() == ".csv":
        if {"traj", "step", "o:gender"} <= set(mimic.header(path)):
            return "mimic"
        raise DatasetError(f"{path} has not all of the columns traj, step and o:gender: use a raw table of mimic_sepsis.")
    with open_hdf5(path) as file:
        keys = set(file)
    if "data" in keys:
        return "robomimic"
    if {"state", "next_state"} <= keys or {"observations", "costs"} <= keys:
        return "dsrl"
    if "observations" in keys:
        return "d4rl"
    found = ", ".join(sorted(keys)) or "none"
    raise DatasetError(f"{path} has the keys {found}, which no format has: give format=, one of {', '.join(_READERS)}.")


def _by_name(name: str, format: str | None, sha256: str | None, kwargs: dict[str, Any]) -> OfflineDataset:
    """Find a name in the formats' tables; what the table knows goes into ``meta``."""
    dsrl_id = next((key for key, task in TASKS.items() if name in (key, task.file, f"{task.file}.hdf5")), None)
    d4rl_task, at_ogbench, at_robomimic = d4rl.tasks().get(name), ogbench.address(name), robomimic.addresses().get(name)
    if dsrl_id is not None:
        path = _downloaded("dsrl", TASKS[dsrl_id].url, sha256)
        return dsrl.read(path, sha256=sha256, meta={"dataset_id": dsrl_id}, **kwargs)
    if d4rl_task is not None:
        path = _downloaded("d4rl", d4rl_task.url, sha256)
        return d4rl.read(path, sha256=sha256, meta={"dataset_id": name, **d4rl_task.meta}, **kwargs)
    if at_ogbench is not None:
        path, options = _downloaded("ogbench", at_ogbench[0], sha256), at_ogbench[1]
        return ogbench.read(path, sha256=sha256, meta={"dataset_id": name}, **{**options, **kwargs})
    if at_robomimic is not None:
        path = _downloaded("robomimic", at_robomimic[0], sha256)
        meta = {"dataset_id": name, "max_episode_steps": at_robomimic[1]}
        return robomimic.read(path, sha256=sha256, meta=meta, **kwargs)
    if minari.NAME.fullmatch(name) and ("/" in name or format == "minari" or minari.local_folder(name).is_dir()):
        return minari.read(minari.fetch(name), sha256=sha256, **kwargs)
    raise DatasetError(_unknown(name))


def _downloaded(format: str, url: str, sha256: str | None) -> Path:
    """The file of an address, which is downloaded once; robomimic's and others' file names repeat, so its folder is kept."""
    parts = url.split("/")[-3:] if format == "robomimic" else url.split("/")[-1:]
    return download(url, cache_folder().joinpath("files", format, *parts), sha256)


def _unknown(name: str) -> str:
    if os.sep in name and Path(name).suffix in (".hdf5", ".h5", ".npz", ".csv"):
        return f"There is no file {name}: correct the path."
    known = [key for keys in list_datasets().values() for key in keys] + [task.file for task in TASKS.values()]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "give a path, or a name that list_datasets() gives."
    return f"There is no data set '{name}': {hint}"
