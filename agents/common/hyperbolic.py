"""Hyperbolic geometry of sectional curvature -c: points, maps at the origin, and the heads that score points.

A Euclidean feature x_E in R^d is taken for a tangent vector at the origin; exp_o(x_E) is its point. Points of the
hyperboloid are pairs (x_0, x_s) with -x_0^2 + |x_s|^2 = -1/c, points of the Poincare ball vectors with |x| < 1/sqrt(c).

The heads are regressions (MLR): output k is the signed, scaled distance of the point to hyperplane k. They compute in
float64, whatever the type of the features, and give their type back; parameters are float32 and, but for those of
:class:`BallPointRegression`, Euclidean. Equations after Bdeir et al. 2024 (hyperboloid), Shimizu et al. 2021
("Poincare++"), Ganea et al. 2018 and Cetin et al. 2023 (ball points), constants after the code of arXiv 2512.14202.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch as th
from torch import nn
from torch.nn import functional as F

LARGEST_RADIUS = 300.0  # sqrt(c) |v| beyond it is taken for it: sinh of it is 1e130, whose square a double still holds
BALL_MARGIN = {th.float32: 5e-6, th.float64: 1e-8}  # a ball's points keep this distance from its boundary (authors' code)
CLAMP_SHARPNESS = 50.0
TINY = 1e-30


def _even(series: tuple[float, ...], function: th.Tensor, s: th.Tensor) -> th.Tensor:
    """``function``, or where s < 1e-3 its Taylor series sum_i series_i s^i, whose gradient at 0 is finite."""
    small, near = s.clamp(max=1e-3), th.zeros_like(s)  # clamped, for an overflow in the branch not taken would be a NaN
    for coefficient in reversed(series):
        near = near * small + coefficient
    return th.where(s < 1e-3, near, function)


def sinh_ratio(s: th.Tensor) -> th.Tensor:
    """sinh(z) / z at z = sqrt(s), smooth at 0; beyond the largest radius R it is sinh(R) / z."""
    z = s.clamp(min=1e-3).sqrt()
    return _even((1.0, 1 / 6, 1 / 120, 1 / 5040), z.clamp(max=LARGEST_RADIUS).sinh() / z, s)


def tanh_ratio(s: th.Tensor) -> th.Tensor:
    """tanh(z) / z at z = sqrt(s), smooth at 0."""
    z = s.clamp(min=1e-3).sqrt()
    return _even((1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835), z.tanh() / z, s)


# ---------------------------------------------------------------------- the hyperboloid


def lorentz_inner(x: th.Tensor, y: th.Tensor) -> th.Tensor:
    """<x, y>_L = -x_0 y_0 + x_s . y_s, (B,), of vectors (B, d + 1)."""
    return (x[..., 1:] * y[..., 1:]).sum(-1) - x[..., 0] * y[..., 0]


def hyperboloid_exp(v: th.Tensor, c: float = 1.0) -> th.Tensor:
    """exp_o of tangent vectors: x_s = sinh(sqrt(c) |v|) / (sqrt(c) |v|) v, x_0 = sqrt(|x_s|^2 + 1/c).

    At v = 0 the Jacobian of x_s is the identity.

    :param v: (B, d)
    :return: (B, d + 1)
    """
    xs = sinh_ratio(c * v.square().sum(-1, keepdim=True)) * v
    x0 = (xs.square().sum(-1, keepdim=True) + 1.0 / c).sqrt()
    return th.cat([x0, xs], dim=-1)


def hyperboloid_log(x: th.Tensor, c: float = 1.0) -> th.Tensor:
    """log_o, the inverse of :func:`hyperboloid_exp`: d(o, x) x_s / |x_s| with d = asinh(sqrt(c) |x_s|) / sqrt(c).

    :param x: (B, d + 1)
    :return: (B, d)
    """
    xs = x[..., 1:]
    norm = math.sqrt(c) * (xs.square().sum(-1, keepdim=True) + TINY).sqrt()
    return norm.asinh() / norm * xs


def hyperboloid_distance(x: th.Tensor, y: th.Tensor, c: float = 1.0) -> th.Tensor:
    """d(x, y) = acosh(-c <x, y>_L) / sqrt(c), (B,), of points (B, d + 1)."""
    return (-c * lorentz_inner(x, y)).clamp(min=1.0).acosh() / math.sqrt(c)


def to_ball(x: th.Tensor, c: float = 1.0) -> th.Tensor:
    """The isometry to the Poincare ball, p = x_s / (1 + sqrt(c) x_0): (B, d + 1) to (B, d)."""
    return x[..., 1:] / (1.0 + math.sqrt(c) * x[..., :1])


# ---------------------------------------------------------------------- the Poincare ball


def into_ball(x: th.Tensor, c: float = 1.0) -> th.Tensor:
    """``x`` (..., d), moved inside where it lies outside or too near to the boundary for its precision."""
    largest = 1.0 / math.sqrt(c) - BALL_MARGIN[x.dtype]
    norm = (x.square().sum(-1, keepdim=True) + TINY).sqrt()
    return th.where(norm > largest, x / norm * largest, x)


def poincare_exp(v: th.Tensor, c: float = 1.0) -> th.Tensor:
    """exp_o of tangent vectors: tanh(sqrt(c) |v|) / (sqrt(c) |v|) v, kept inside the ball; (B, d) to (B, d)."""
    return into_ball(tanh_ratio(c * v.square().sum(-1, keepdim=True)) * v, c)


def conformal_factor(x: th.Tensor, c: float = 1.0) -> th.Tensor:
    """lambda = 2 / (1 - c |x|^2), (..., 1), of points of the ball (..., d)."""
    return 2.0 / (1.0 - c * x.square().sum(-1, keepdim=True))


def mobius_add(x: th.Tensor, y: th.Tensor, c: float = 1.0) -> th.Tensor:
    """x (+) y = ((1 + 2c<x,y> + c|y|^2) x + (1 - c|x|^2) y) / (1 + 2c<x,y> + c^2 |x|^2 |y|^2), kept inside the ball."""
    xy, xx, yy = (x * y).sum(-1, keepdim=True), x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    above = (1.0 + 2.0 * c * xy + c * yy) * x + (1.0 - c * xx) * y
    return into_ball(above / (1.0 + 2.0 * c * xy + c * c * xx * yy), c)


# ---------------------------------------------------------------------- heads


def smooth_clamp(x: th.Tensor) -> th.Tensor:
    """The identity within +-L, L = ln(2 / eps), and flat outside (authors' code): 36.74 for float64, 16.64 for float32.

    Above L it is L' - softplus_50(L' - x) with L' = L - eps and softplus_50(y) = log(1 + exp(50 y)) / 50, so it falls by
    ln(2) / 50 at L and rises back to L'.
    """
    eps = th.finfo(x.dtype).eps
    limit = math.log(2.0 / eps)
    size = x.abs()
    flat = limit - eps - F.softplus(limit - eps - size, beta=CLAMP_SHARPNESS)
    return th.where(size > limit, x.sign() * flat, x)


class HyperplaneRegression(nn.Module):
    """What the two heads with Euclidean parameters share: K normals z_k (K, d) and K offsets r_k (K, 1).

    :param features: d
    :param outputs: K
    :param c: the space's curvature is -c
    """

    def __init__(self, features: int, outputs: int, c: float = 1.0) -> None:
        super().__init__()
        self.c, self.out_features = c, outputs
        self.weight = nn.Parameter(th.randn(outputs, features) / math.sqrt(features))
        self.bias = nn.Parameter(th.zeros(outputs, 1))

    def forward(self, x_e: th.Tensor) -> th.Tensor:
        """Scores (B, K) of exp_o(x_e), computed in float64, in the type of ``x_e`` (B, d)."""
        z, r = self.weight.double(), self.bias.double().squeeze(-1)
        norm = (z.square().sum(-1) + TINY).sqrt()
        return self.scores(x_e.double(), z, norm, r).to(x_e.dtype)

    @abstractmethod
    def scores(self, v: th.Tensor, z: th.Tensor, norm: th.Tensor, r: th.Tensor) -> th.Tensor:
        """The head's equation.

        :param v: tangent vectors (B, d), float64 like the rest
        :param z: normals (K, d)
        :param norm: |z_k| (K,)
        :param r: offsets (K,)
        """


class HyperboloidRegression(HyperplaneRegression):
    """|z_k| / sqrt(c) asinh( S( sqrt(c) a_k / |z_k| ) ), a_k = cosh(sqrt(c) r_k) <z_k, x_s> - sinh(sqrt(c) r_k) |z_k| x_0.

    S is :func:`smooth_clamp`, so that outputs stay below 4.2972 |z_k| / sqrt(c).
    """

    def scores(self, v: th.Tensor, z: th.Tensor, norm: th.Tensor, r: th.Tensor) -> th.Tensor:
        root, x = math.sqrt(self.c), hyperboloid_exp(v, self.c)
        # a_k / |z_k| is one product of the points with the (time-like and space-like) parts of the hyperplanes.
        planes = th.cat([-(root * r).sinh().unsqueeze(-1), ((root * r).cosh() / norm).unsqueeze(-1) * z], dim=-1)
        return norm / root * smooth_clamp(root * (x @ planes.T)).asinh()


class PoincareRegression(HyperplaneRegression):
    """2 |z_k| / sqrt(c) asinh( S( (1 - lambda) sinh(2 sqrt(c) r_k) + sqrt(c) lambda cosh(2 sqrt(c) r_k) <z_k, x> / |z_k| ) ).

    lambda is the conformal factor of x, which is what makes its gradient grow near the boundary.
    """

    def scores(self, v: th.Tensor, z: th.Tensor, norm: th.Tensor, r: th.Tensor) -> th.Tensor:
        root, x = math.sqrt(self.c), poincare_exp(v, self.c)
        factor = conformal_factor(x, self.c)
        inner = (x @ z.T) / norm
        argument = (1.0 - factor) * (2.0 * root * r).sinh() + root * factor * (2.0 * root * r).cosh() * inner
        return 2.0 * norm / root * smooth_clamp(argument).asinh()


class BallPoints(nn.Parameter):
    """A parameter whose rows are points of the Poincare ball; Riemannian Adam moves it along the ball."""


class BallPointRegression(nn.Module):
    """The head of Hyper+S-RYM: |a_k| / sqrt(c) asinh( 2 sqrt(c) <D, a_k> / (|1 - c |D|^2| |a_k|) ), D = (-p_k) (+) x.

    Computed in the type of its parameters, float32. The points p_k (K, d) lie in the ball and need a Riemannian
    optimiser, see ``riemannian_adam.py``.

    :param features: d
    :param outputs: K
    :param c: the ball's curvature is -c
    """

    def __init__(self, features: int, outputs: int, c: float = 1.0) -> None:
        super().__init__()
        self.c, self.out_features = c, outputs
        self.weight = nn.Parameter(th.randn(outputs, features) / math.sqrt(features))
        self.bias = BallPoints(th.zeros(outputs, features))

    def forward(self, x_e: th.Tensor) -> th.Tensor:
        """Scores (B, K) of exp_o(x_e), (B, d)."""
        root, a = math.sqrt(self.c), self.weight
        x = poincare_exp(x_e.to(a.dtype), self.c)
        shifted = mobius_add(-self.bias, x.unsqueeze(-2), self.c)
        norm = a.norm(dim=-1)
        inner, squared = (shifted * a).sum(-1), shifted.square().sum(-1)
        return norm / root * (2.0 * root * inner / ((1.0 - self.c * squared).abs() * norm + 1e-15)).asinh()

