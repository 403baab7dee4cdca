"""A world made of recorded transitions: what follows (s, a) is what followed one that is recorded near it."""

from __future__ import annotations

import torch as th

from .guardian import kernel_columns, kernel_rows
from .neighbours import NearestNeighbour


class NearestModel:
    """Answers with row numbers of the recorded transitions, so that next state, reward and costs come from the same one.

    The kernel density of the recorded (s, a, s'), conditioned on (s, a), is a mixture of the recorded next states with
    weights proportional to exp(-|u(s, a) - u_i|^2 / (2 sigma^2)). With a bandwidth one of them is drawn; without, the
    nearest answers, which is the limit of a small sigma. OGSRL (arXiv 2505.16242), section 5 and appendix G.

    :param pairs: (N, n), scaled (s, a)
    :param bandwidth: sigma, or None
    """

    def __init__(self, pairs: th.Tensor, bandwidth: float | None = None) -> None:
        self._nearest, self._bandwidth = NearestNeighbour(pairs), bandwidth
        self._columns = None if bandwidth is None else kernel_columns(pairs)

    def rows(self, pairs: th.Tensor) -> th.Tensor:
        """Of (B, n) scaled pairs the recorded transition that answers, (B,) int64."""
        if self._bandwidth is None or self._columns is None:
            return self._nearest(pairs)
        exponents = kernel_rows(pairs, self._bandwidth) @ self._columns
        weights = (exponents - exponents.amax(1, keepdim=True)).exp_().cumsum(1)
        drawn = th.rand(len(pairs), 1, device=pairs.device) * weights[:, -1:]
        return th.searchsorted(weights, drawn).squeeze(1).clamp(max=weights.shape[1] - 1)
