"""A world made of recorded transitions: what follows (s, a) is what followed one that is recorded near it."""

from __future__ import annotations

import torch as th

from .guardian import KernelGuardian
from .neighbours import NearestNeighbour


class NearestModel:
    """Answers with row numbers of the recorded transitions, so that next state, reward and costs come from the same one.

    The kernel density of the same pairs, conditioned on (s, a), is a mixture of the recorded next states with weights
    proportional to exp(-|u(s, a) - u_i|^2 / (2 sigma^2)): with ``density`` one of them is drawn; without, the nearest one
    answers, which is the limit of a small sigma. OGSRL (arXiv 2505.16242), section 5 and appendix G.

    :param pairs: (N, n), scaled (s, a)
    :param density: None, or the kernel density of the same pairs, in the same units
    """

    def __init__(self, pairs: th.Tensor, density: KernelGuardian | None = None) -> None:
        self._nearest, self._density = NearestNeighbour(pairs), density
        self._kernels = None if density is None else density.right(pairs)

    def rows(self, pairs: th.Tensor) -> th.Tensor:
        """Of (B, n) scaled pairs the recorded transition that answers, (B,) int64."""
        if self._density is None or self._kernels is None:
            return self._nearest(pairs)
        exponents = self._density.left(pairs) @ self._kernels
        weights = (exponents - exponents.amax(1, keepdim=True)).exp_().cumsum(1)
        drawn = th.rand(len(pairs), 1, device=pairs.device) * weights[:, -1:]
        return th.searchsorted(weights, drawn).squeeze(1).clamp(max=weights.shape[1] - 1)
