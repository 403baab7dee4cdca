"""The out-of-distribution guardian of OGSRL: a kernel density of the data's (s, a) pairs, cut at a quantile."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from .atomic import replace_file
from .min_max import MinMax

SURE = 1e-5  # relative error that sums in float32 stay below
ROUNDING = 1e-9  # relative, of sums in float64: what equals the threshold lies inside
FLOAT32_EXPONENT = 60.0  # of |x|^2 and |y|^2 over 2 sigma^2 together, up to which that holds
CHUNK = {"cpu": 2**20, "cuda": 2**26}  # kernel values at a time: those that stay in a cache, or 256 MB (512 in float64)
FIRST = 1024  # reference points after which queries are looked at for the first time


class KernelGuardian:
    """ghat(x) = 1[f(x) < f_alpha], with f the density of N reference points and f_alpha its alpha-quantile on them.

        f(x) = 1/N sum_i exp(-|u(x) - u_i|^2 / (2 sigma^2)) / (sigma sqrt(2 pi)),

    u scales every column to [-1, 1] by the points' own minima and maxima (:class:`MinMax`). A point of the reference set
    counts itself. Source: OGSRL (arXiv 2505.16242), appendix G.3 and the authors' code, whose normaliser, that of one
    dimension, is kept: labels do not depend on it. The paper's sigma of 0.535 is Scott's factor N^(-1/(n + 4)) for its
    data, without the standard deviation that Scott multiplies it with. Columns in [-1, 1] have one of 0.1 to 0.7, so that
    the factor alone is wide: a third of it finds twice as many inadmissible actions in ICU-Sepsis, and flags 9 % of fresh
    data instead of 5 (``experiments/studies/ogsrl-sepsis-narrow.yaml``).

    :param references: (N, n), scaled, in an order that has nothing to do with where they lie
    :param scale: of points
    :param bandwidth: sigma
    :param threshold: f_alpha; :meth:`fit` makes all four
    """

    def __init__(self, references: th.Tensor, scale: MinMax, bandwidth: float, threshold: float = 0.0) -> None:
        self.references, self.scale, self.bandwidth, self.threshold = references, scale, bandwidth, threshold
        self._float32, self._float64 = (kernel_columns(references.to(dtype)) for dtype in (th.float32, th.float64))
        self._largest = float(references.square().sum(1).max())

    @classmethod
    def fit(cls, points: th.Tensor, alpha: float = 0.05, bandwidth: float | None = None) -> KernelGuardian:
        """The guardian of a reference set.

        :param points: (N, n) float32
        :param alpha: share of them that lies outside
        :param bandwidth: sigma; None: Scott's factor
        :raises ValueError: for an argument outside its range
        """
        if not 0.0 < alpha < 1.0 or (bandwidth is not None and not bandwidth > 0.0):
            raise ValueError(f"alpha lies in (0, 1) and bandwidth is above 0, not alpha={alpha} and bandwidth={bandwidth}.")
        scale = MinMax.of(points)
        order = th.randperm(len(points), generator=th.Generator().manual_seed(0)).to(points.device)
        guardian = cls(scale.scaled(points)[order], scale, bandwidth or scott(*points.shape))
        guardian.threshold = guardian._quantile(points, alpha)
        return guardian

    def _quantile(self, points: th.Tensor, alpha: float) -> float:
        """The alpha-quantile of the points' densities, interpolated linearly as by ``np.percentile``, exact to float64."""
        densities = self.density(points)
        near = (densities / densities.quantile(alpha) - 1.0).abs() < 100.0 * SURE
        densities[near] = self._normalized(self._sums(self.scale.scaled(points[near]).double(), self._float64))
        return float(np.percentile(densities.cpu().numpy(), 100.0 * alpha))

    def density(self, points: th.Tensor) -> th.Tensor:
        """f at (B, n) points in the units of the reference set, (B,) float64, to within 1e-5 of itself."""
        scaled = self.scale.scaled(points)
        coarse = self._is_coarse(scaled)
        sums = th.empty(len(points), dtype=th.float64, device=points.device)
        sums[~coarse] = self._sums(scaled[~coarse].float(), self._float32).double()
        sums[coarse] = self._sums(scaled[coarse].double(), self._float64)
        return self._normalized(sums)

    def outside(self, points: th.Tensor) -> th.Tensor:
        """ghat at (B, n) points in the units of the reference set, (B,) bool.

        The labels are those of the whole sum in float64. On a GPU that is what is computed, without a look at any number, so
        that a graph can capture it. On a CPU a point is done with as soon as a part of the sum reaches the threshold, and
        only what is within rounding of it is computed in float64.
        """
        scaled = self.scale.scaled(points)
        needed = self.threshold * self.bandwidth * math.sqrt(2.0 * math.pi) * len(self.references)
        if points.device.type != "cpu":
            return self._sums(scaled.double(), self._float64) < needed * (1.0 - ROUNDING)
        coarse = self._is_coarse(scaled)
        sums, open_rows, first = th.zeros(len(points)), (~coarse).nonzero().squeeze(1), 0
        while len(open_rows) and first < len(self.references):
            size = FIRST if first == 0 else first
            sums[open_rows] += self._sums(scaled[open_rows].float(), self._float32[:, first : first + size])
            open_rows, first = open_rows[sums[open_rows] < needed * (1.0 + SURE)], first + size
        unsure = open_rows[sums[open_rows] > needed * (1.0 - SURE)]
        unsure = th.cat([unsure, coarse.nonzero().squeeze(1)])
        outside = sums < needed
        if len(unsure):
            outside[unsure] = self._sums(scaled[unsure].double(), self._float64) < needed * (1.0 - ROUNDING)
        return outside

    # ------------------------------------------------------------------ sums of kernels

    def _is_coarse(self, scaled: th.Tensor) -> th.Tensor:
        """Of which points float32 gives no sum to within 1e-5, (B,) bool."""
        return (scaled.square().sum(1) + self._largest) / (2.0 * self.bandwidth**2) > FLOAT32_EXPONENT

    def _sums(self, scaled: th.Tensor, right: th.Tensor) -> th.Tensor:
        """sum_i exp(-|x - y_i|^2 / (2 sigma^2)), (B,): one product, one exponential and one sum for each chunk."""
        rows = min(2048, max(1, len(scaled)))
        columns = max(256, CHUNK[scaled.device.type] // rows)
        sums = [
            th.stack([(left @ part).exp_().sum(1) for part in right.split(columns, 1)]).sum(0)
            for left in kernel_rows(scaled, self.bandwidth).split(rows)
        ]
        return th.cat(sums) if sums else scaled.new_zeros(0)

    def _normalized(self, sums: th.Tensor) -> th.Tensor:
        return sums / (len(self.references) * self.bandwidth * math.sqrt(2.0 * math.pi))

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write the guardian as ``npz``; a failure leaves the former file."""
        file = io.BytesIO()
        tensors = {"references": self.references, "middle": self.scale.middle, "half": self.scale.half}
        arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        np.savez_compressed(file, bandwidth=self.bandwidth, threshold=self.threshold, **arrays)
        replace_file(Path(path), file.getvalue())

    @classmethod
    def load(cls, path: str | Path, device: th.device | str = "cpu") -> KernelGuardian:
        """Read what :meth:`save` wrote; its labels are the same."""
        with np.load(path, allow_pickle=False) as file:
            references, middle, half = (th.from_numpy(file[name]).to(device) for name in ("references", "middle", "half"))
            return cls(references, MinMax(middle, half), float(file["bandwidth"]), float(file["threshold"]))


def scott(count: int, dimensions: int) -> float:
    """Scott's factor N^(-1/(n + 4)) of N points in n dimensions: the bandwidth where the standard deviation is 1."""
    return count ** (-1.0 / (dimensions + 4))


def kernel_columns(references: th.Tensor) -> th.Tensor:
    """(N, n) scaled points y as (n + 2, N): the product with :func:`kernel_rows` of x is -|x - y|^2 / (2 sigma^2)."""
    squares = references.square().sum(1, keepdim=True)
    return th.cat([references, th.ones_like(squares), squares], 1).T.contiguous()


def kernel_rows(points: th.Tensor, bandwidth: float) -> th.Tensor:
    """(B, n) scaled points x as (B, n + 2)."""
    squares = points.square().sum(1, keepdim=True)
    return th.cat([points, -0.5 * squares, th.full_like(squares, -0.5)], 1) / bandwidth**2
