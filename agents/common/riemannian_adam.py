"""Adam for networks some of whose parameters are points of the Poincare ball (Becigneul and Ganea 2019).

A point p moves by its Riemannian gradient r = g / lambda_p^2; the second moment is the scalar <r, r>_p = lambda_p^2 |r|^2,
the step the retraction p - lr m_hat / (sqrt(v_hat) + eps), kept inside the ball, and the first moment is carried along
by parallel transport. All other parameters take Adam's step. geoopt's optimiser is the oracle in a test; this one has its
step count in a tensor, which resumes exactly, and lets points within 5e-6 of the boundary (geoopt: 4e-3, in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch as th
from torch import nn

from .hyperbolic import BallPoints, conformal_factor, into_ball


def gyration(u: th.Tensor, v: th.Tensor, w: th.Tensor, c: float) -> th.Tensor:
    """gyr[u, v] w, the rotation by which Moebius addition fails to be associative; vectors (..., d)."""
    uu, vv = u.square().sum(-1, keepdim=True), v.square().sum(-1, keepdim=True)
    uv, uw, vw = ((x * y).sum(-1, keepdim=True) for x, y in ((u, v), (u, w), (v, w)))
    a = -c * c * uw * vv + c * vw + 2.0 * c * c * uv * vw
    b = -c * c * vw * uu - c * uw
    return w + 2.0 * (a * u + b * v) / (1.0 + 2.0 * c * uv + c * c * uu * vv)


def transport(p: th.Tensor, q: th.Tensor, w: th.Tensor, c: float) -> th.Tensor:
    """The tangent vector ``w`` at p, parallel-transported to q: lambda_p / lambda_q gyr[q, -p] w."""
    return conformal_factor(p, c) / conformal_factor(q, c) * gyration(q, -p, w, c)


class RiemannianAdam(th.optim.Adam):
    """:class:`torch.optim.Adam` that moves :class:`BallPoints` along the ball.

    :param params: parameters of one group
    :param curvature: c of the ball
    :param kwargs: as torch's
    """

    def __init__(self, params: Iterable[nn.Parameter], curvature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(list(params), **kwargs)
        self.curvature = curvature

    @th.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; closures are not supported."""
        (group,) = self.param_groups
        points = [p for p in group["params"] if isinstance(p, BallPoints) and p.grad is not None]
        gradients = [p.grad for p in points]
        for p in points:
            p.grad = None  # so that Adam passes them over
        super().step()
        for p, gradient in zip(points, gradients, strict=True):
            self._move(p, gradient, group)  # type: ignore[arg-type]
            p.grad = gradient

    def _move(self, p: th.Tensor, gradient: th.Tensor, group: dict[str, Any]) -> None:
        state, c, (beta1, beta2) = self.state[p], self.curvature, group["betas"]
        if not state:
            state["step"] = th.zeros((), dtype=th.float32)
            state["exp_avg"], state["exp_avg_sq"] = th.zeros_like(p), th.zeros_like(p[..., :1])
        state["step"] += 1
        factor = conformal_factor(p, c)
        riemannian = gradient / factor.square()
        m = state["exp_avg"].lerp_(riemannian, 1.0 - beta1)
        squared = (factor * riemannian).square().sum(-1, keepdim=True)
        v = state["exp_avg_sq"].lerp_(squared, 1.0 - beta2)
        taken = state["step"].item()
        m_hat, v_hat = m / (1.0 - beta1**taken), v / (1.0 - beta2**taken)
        new = into_ball(p - group["lr"] * m_hat / (v_hat.sqrt() + group["eps"]), c)
        # In float64: near the boundary the denominator of a gyration is too small for less.
        m.copy_(transport(p.double(), new.double(), m.double(), c))
        p.copy_(new)
