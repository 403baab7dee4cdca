"""The nearest of many fixed points: a k-d tree on the CPU, distances to all of them, up to rounding, on a GPU."""

from __future__ import annotations

import numpy as np
import torch as th
from scipy.spatial import cKDTree

CHUNK = 2**26  # distances at a time on a GPU: 256 MB


class NearestNeighbour:
    """Index of the Euclidean nearest of N points; among equals any.

    :param points: (N, n) float32, on the device that asks
    """

    def __init__(self, points: th.Tensor) -> None:
        self.points = points
        self.tree = cKDTree(points.numpy()) if points.device.type == "cpu" else None
        self.squares = points.square().sum(1)

    def __call__(self, queries: th.Tensor) -> th.Tensor:
        """(B, n) to (B,) indices."""
        if self.tree is not None:
            return th.from_numpy(np.asarray(self.tree.query(queries.numpy(), workers=-1)[1]))
        return self.by_distances(queries)

    def by_distances(self, queries: th.Tensor) -> th.Tensor:
        """The same from |y|^2 - 2 x.y, which orders the points y as their distance to x does."""
        best = th.full((len(queries),), th.inf, device=queries.device)
        index = th.zeros(len(queries), dtype=th.long, device=queries.device)
        size = max(1, CHUNK // len(queries))
        for first in range(0, len(self.points), size):
            part = slice(first, first + size)
            value, at = th.addmm(self.squares[part], queries, self.points[part].T, alpha=-2.0).min(1)
            index = th.where(value < best, at + first, index)
            best = th.minimum(best, value)
        return index
