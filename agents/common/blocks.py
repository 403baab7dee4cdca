"""Large arrays on disk as blocks of rows, each a file named by the checksum of its content.

What did not change since the last checkpoint has its file already, so a replay buffer costs what was added to it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import sync_folder

BLOCK = 2**22  # bytes


class DamagedError(ValueError):
    """A file that is missing or not as it was written; the message names it."""


class BlockStore:
    """A folder of blocks.

    :param folder: is made when something is written
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, array: np.ndarray, rows: int, clean: Callable[[int, int], str | None] = lambda first, last: None) -> Any:
        """Write the first ``rows`` rows of an array.

        :param clean: (first, last) -> name of the block of these rows, if it is known not to have changed
        :return: what :meth:`read` needs, as plain data
        """
        per_block = rows_per_block(array)
        names = []
        for first in range(0, rows, per_block):
            last = min(rows, first + per_block)
            known = clean(first, last)
            names.append(known if known and self._path(known).exists() else self._write_block(array[first:last]))
        sync_folder(self.folder)
        return {"dtype": array.dtype.str, "shape": list(array.shape[1:]), "rows": rows, "blocks": names}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _write_block(self, block: np.ndarray) -> str:
        block = np.ascontiguousarray(block)
        name = _digest(block)
        path = self._path(name)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.new")
            try:
                with open(beside, "wb") as file:
                    np.save(file, block, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
        return name

    def read(self, entry: Any, into: np.ndarray) -> None:
        """Fill the first rows of ``into``, block by block.

        :raises DamagedError: naming a block that is missing or not as it was written
        """
        if (entry["dtype"], entry["shape"]) != (into.dtype.str, list(into.shape[1:])) or entry["rows"] > len(into):
            raise DamagedError(f"{self.folder} holds rows of another shape than the buffer of this agent")
        first = 0
        for name in entry["blocks"]:
            path = self._path(name)
            try:
                block = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DamagedError(f"{path} cannot be read ({error})") from error
            if _digest(block) != name:
                raise DamagedError(f"{path} is not as it was written")
            into[first : first + len(block)] = block
            first += len(block)

    def keep_only(self, names: Iterable[str]) -> None:
        """Delete all other blocks, and what a kill left half-written."""
        kept = {f"{name}.npy" for name in names}
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)


def rows_per_block(array: np.ndarray) -> int:
    """How many rows make a block of about :data:`BLOCK` bytes."""
    return max(1, BLOCK // max(1, array[:1].nbytes))


def _digest(block: np.ndarray) -> str:
    digest = hashlib.sha256(f"{block.dtype.str}{block.shape}".encode())
    digest.update(np.ascontiguousarray(block).data if block.size else b"")
    return digest.hexdigest()
