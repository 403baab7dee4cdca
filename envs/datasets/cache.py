"""Files turned once into plain arrays on disk, kept under their checksum, and memory-mapped from then on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import BLOCK, DatasetError, OfflineDataset
from .rows import Rows

# Part of every folder's name: raise it when a reader writes other arrays than before.
_VERSION = 1

Blocks = Iterator[Mapping[str, np.ndarray]]


def cache_folder() -> Path:
    """Where downloads and converted arrays lie: ``$TETHER_DATA``, else ``~/.cache/tether/datasets``."""
    chosen = os.environ.get("TETHER_DATA")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "tether" / "datasets"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, read in blocks; of a folder: of the names and sums of the files in it."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checked_sha256(path: Path, expected: str | None) -> str:
    """The SHA-256 of a file or folder.

    :raises DatasetError: where it is not the expected one, or cannot be read
    """
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): check the name and the permissions.") from error
    if expected is not None and found != expected.lower():
        raise DatasetError(f"{path} has the sha256 {found} instead of {expected.lower()}: get the right file.")
    return found


def cached(
    sha256: str, options: Mapping[str, Any], blocks: Callable[[], Blocks], meta: Mapping[str, Any]
) -> OfflineDataset:
    """The data set whose arrays a reader streams, from the cache where they are there already.

    Beside the fields of `OfflineDataset` a reader may give ``rows`` (N,): transition i then leads from observation
    ``rows[i]`` to the one after it, and neither is stored twice.

    :param sha256: of the source
    :param options: of the reader; with other ones the arrays are others
    :param blocks: gives parts of the arrays by name, each array's in order
    :param meta: of the data set, with ``source`` and ``format``
    :raises DatasetError: where the data are refused, or the cache cannot be written; nothing is left in it then
    """
    from filelock import FileLock

    key = hashlib.sha256(json.dumps([_VERSION, options], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / sha256 / f"{meta['format']}-{key}"
    meta = {**meta, "sha256": sha256}
    if not folder.is_dir():
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            with FileLock(cache_folder() / f".{sha256}.lock"):
                if not folder.is_dir():
                    _convert(folder, blocks, meta)
        except OSError as error:
            advice = "make room, or set TETHER_DATA to another folder"
            raise DatasetError(f"The cache {folder} cannot be written ({error.strerror}): {advice}.") from error
    return _dataset(folder, meta)


def _convert(folder: Path, blocks: Callable[[], Blocks], meta: Mapping[str, Any]) -> None:
    """Write beside, check, then rename: a kill or a refusal at any point leaves no folder of that name."""
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        _write(beside, blocks())
        _dataset(beside, meta)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
        raise
    for place in (folder, folder.parent):
        sync_folder(place)


def _write(folder: Path, blocks: Blocks) -> None:
    columns: dict[str, _Column] = {}
    with contextlib.ExitStack() as stack:
        for part in blocks:
            for name, block in part.items():
                if name not in columns:
                    columns[name] = stack.enter_context(_Column(folder / f"{name}.npy", block))
                columns[name].append(block)


class _Column:
    """An ``.npy`` file that grows by rows."""

    def __init__(self, path: Path, like: np.ndarray) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  closed by __exit__
        self._dtype, self._row, self._rows = like.dtype, like.shape[1:], 0
        self._write_header()

    def __enter__(self) -> _Column:
        return self

    def _write_header(self) -> None:
        """Its size does not depend on the number of rows, so that it can be written again when that is known."""
        shape = (self._rows, *self._row)
        form = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, form)

    def append(self, block: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(block, self._dtype).tobytes())
        self._rows += len(block)

    def __exit__(self, *problem: object) -> None:
        with self._file:
            self._write_header()
            self._file.flush()
            os.fsync(self._file.fileno())


def _dataset(folder: Path, meta: Mapping[str, Any]) -> OfflineDataset:
    arrays: dict[str, Any] = {}
    for path in folder.glob("*.npy"):
        try:
            arrays[path.stem] = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path} is damaged: remove the folder {folder} and load again.") from error
    rows = arrays.pop("rows", None)
    if rows is not None:
        observations = arrays["observations"]
        arrays["observations"] = Rows(observations, rows)
        arrays["next_observations"] = Rows(observations[1:], rows)
    return OfflineDataset(**arrays, meta=dict(meta))


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
