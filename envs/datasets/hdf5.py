"""What the readers of HDF5 files share: opening in words, finding arrays, streaming their rows."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import DatasetError, block_rows


def import_extra(module: str, what: str, extra: str = "offline") -> Any:
    """A library that only some readers need.

    :param what: the file that needs it, for the message
    :raises DatasetError: with the line that installs it
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(f'{what} needs an extra: pip install "tether-rl[{extra}]".') from error


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """An HDF5 file opened for reading.

    :raises DatasetError: where it is none, or is cut off
    """
    h5py = import_extra("h5py", str(path))
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path} is not a whole HDF5 file: copy or download it again.") from error
    with file:
        yield file


def find(path: Path, group: Any, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The arrays of a group by key, equally long.

    :raises DatasetError: naming the key that is missing, is no array of numbers, or is not as long as the first
    """
    for key in required:
        if key not in group:
            held = ", ".join(sorted(group)) or "nothing"
            raise DatasetError(f"{path} has no '{key}' in '{group.name}', which holds {held}: use a file with it.")
    found = {key: group[key] for key in (*required, *optional) if key in group}
    rows: int | None = None
    for key, array in found.items():
        if not getattr(array, "shape", ()):
            raise DatasetError(f"{path}: '{key}' is no array with rows: use a file in which it is one.")
        if array.dtype.kind not in "biuf":
            raise DatasetError(f"{path}: '{key}' holds {array.dtype}: use a file in which it is numbers.")
        rows = len(array) if rows is None else rows
        if len(array) != rows:
            raise DatasetError(f"{path}: '{key}' has {len(array)} rows where '{required[0]}' has {rows}: repair the file.")
    if not rows:
        raise DatasetError(f"{path}: '{required[0]}' has no rows: use a file with at least one transition.")
    return found


def stream(path: Path, array: Any) -> Iterator[np.ndarray]:
    """The rows of an array in blocks that hold whole chunks, so that none is decompressed twice.

    :raises DatasetError: naming the rows that cannot be read
    """
    chunk = array.chunks[0] if array.chunks else 1
    rows = max(chunk, block_rows(array) // chunk * chunk)
    for first in range(0, len(array), rows):
        try:
            block = array[first : first + rows]
        except (OSError, RuntimeError) as error:
            lost = f"row {first} to {min(first + rows, len(array)) - 1}"
            raise DatasetError(f"{path}: '{array.name}' cannot be read from {lost}: copy or download it again.") from error
        yield block


def attributes(group: Any) -> dict[str, Any]:
    """The attributes of a group as plain values and lists."""
    plain = (np.generic, np.ndarray)
    return {key: value.tolist() if isinstance(value, plain) else value for key, value in group.attrs.items()}
