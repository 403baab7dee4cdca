"""Columns scaled to [-1, 1] by the smallest and largest value of a training set."""

from __future__ import annotations

from typing import NamedTuple

import torch as th


class MinMax(NamedTuple):
    """u = (v - middle) / half for every column, with u = -1 at its smallest and 1 at its largest training value.

    :param middle: (n,)
    :param half: (n,), half of the range
    """

    middle: th.Tensor
    half: th.Tensor

    @classmethod
    def of(cls, points: th.Tensor) -> MinMax:
        """Of (N, n) training points; a column that is constant has the range 1, so that its training value is -1."""
        low, high = points.amin(0), points.amax(0)
        half = th.where(high > low, high - low, th.ones_like(low)) / 2.0
        return cls(low + half, half)

    def scaled(self, points: th.Tensor) -> th.Tensor:
        """(..., n) to (..., n); what lies outside the training range is not clipped."""
        return (points - self.middle) / self.half

    def raw(self, scaled: th.Tensor) -> th.Tensor:
        """What :meth:`scaled` was made of."""
        return self.middle + self.half * scaled
