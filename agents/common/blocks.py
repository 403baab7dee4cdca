"""Large arrays on disk as blocks of rows, each a file named by the checksum of its content.

What did not change since the last checkpoint has its file already, so a replay buffer costs what was added to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import replace_file

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
        return {"dtype": array.dtype.str, "shape": list(array.shape[1:]), "rows": rows, "blocks": names}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _write_block(self, block: np.ndarray) -> str:
        content = np.ascontiguousarray(block).tobytes()
        name = hashlib.sha256(content).hexdigest()
        if not self._path(name).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(name), content)
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
                content = path.read_bytes()
            except OSError as error:
                raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
            if hashlib.sha256(content).hexdigest() != name:
                raise DamagedError(f"{path} is not as it was written")
            block = np.frombuffer(content, into.dtype).reshape(-1, *into.shape[1:])
            into[first : first + len(block)] = block
            first += len(block)

    def keep_only(self, names: Iterable[str]) -> None:
        """Delete all other blocks, and what a kill left half-written."""
        kept = {self._path(name).name for name in names}
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)


def rows_per_block(array: np.ndarray) -> int:
    """How many rows make a block of about :data:`BLOCK` bytes."""
    return max(1, BLOCK // max(1, array[:1].nbytes))
