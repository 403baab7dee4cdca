"""Rows of a larger array, looked up when they are read: next observations cost no memory where they are observations too."""

from __future__ import annotations

from typing import Any

import numpy as np


class Rows:
    """The rows ``array[index]`` without a copy of them.

    :param array: (M, ...) what the rows are taken from, also memory-mapped
    :param index: (N,) integers in [0, M)
    """

    def __init__(self, array: np.ndarray, index: np.ndarray) -> None:
        self.array, self.index = array, index

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, ...)``."""
        return (len(self.index), *self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return self.array.dtype

    @property
    def ndim(self) -> int:
        """Of the array."""
        return self.array.ndim

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> np.ndarray:
        """The rows of an integer, a slice, an index array or a mask, read into memory."""
        return np.asarray(self.array[self.index[key]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("Rows are read into memory: they cannot become an array without a copy.")
        return np.asarray(self[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"Rows(shape={self.shape}, dtype={self.dtype})"
