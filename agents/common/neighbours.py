"""The nearest of many fixed points, by the distances to all of them.

A k-d tree is faster only for queries that lie very near a point: an actor's do not, and in the 15 to 60 dimensions of a
robot's states and actions it visits most points anyway.
"""

from __future__ import annotations

import torch as th

BLOCK = 128  # points of which the smallest distance is kept at first
CHUNK = {"cpu": 2**18, "cuda": 2**26}  # distances at a time: those that stay in a cache, or 256 MB


class NearestNeighbour:
    """Index of the Euclidean nearest of N points; among equals, up to rounding, any.

    :param points: (N, n) float32, on the device that asks
    """

    def __init__(self, points: th.Tensor) -> None:
        self.last = len(points) - 1
        padding = -len(points) % BLOCK
        self.points = th.cat([points, points[-1:].expand(padding, -1)])
        self.squares = self.points.square().sum(1, keepdim=True)

    def __call__(self, queries: th.Tensor) -> th.Tensor:
        """(B, n) to (B,) indices: the block of the nearest by |y|^2 - 2 x.y, and in it the nearest by |x - y|^2."""
        size = max(BLOCK, CHUNK[queries.device.type] // max(1, len(queries)) // BLOCK * BLOCK)
        smallest = []
        for points, squares in zip(self.points.split(size), self.squares.split(size), strict=True):
            distances = th.addmm(squares, points, queries.T, alpha=-2.0)
            smallest.append(distances.view(len(points) // BLOCK, BLOCK, len(queries)).amin(1))
        block = th.cat(smallest).argmin(0)
        within = self.points.view(-1, BLOCK, self.points.shape[1])[block]
        nearest = (within - queries.unsqueeze(1)).square().sum(2).argmin(1)
        return (block * BLOCK + nearest).clamp(max=self.last)
