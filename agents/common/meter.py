"""Means of what every gradient step tells, kept on the device until somebody looks."""

from __future__ import annotations

from collections.abc import Mapping

import torch as th


class Meter:
    """Means of named scalars since the last look, summed on the device."""

    def __init__(self) -> None:
        # By the names that came together: steps of a delayed actor have more of them than the others.
        self.sums: dict[tuple[str, ...], tuple[th.Tensor, int]] = {}

    def add(self, info: Mapping[str, th.Tensor]) -> None:
        """Take in one step's scalars."""
        values, names = th.stack([value.detach() for value in info.values()]), tuple(info)
        total, count = self.sums.get(names, (None, 0))
        self.sums[names] = (values if total is None else total.add_(values), count + 1)

    def take(self) -> dict[str, th.Tensor]:
        """The means, and a new beginning."""
        totals: dict[str, tuple[th.Tensor, int]] = {}
        for names, (sums, count) in self.sums.items():
            for name, value in zip(names, sums, strict=True):
                before, of = totals.get(name, (th.zeros_like(value), 0))
                totals[name] = (before + value, of + count)
        self.sums = {}
        return {name: total / count for name, (total, count) in totals.items()}
