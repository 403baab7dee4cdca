"""The guardian of OGSRL's theory: the sublevel set of a polynomial that covers most of the data and is as small as it can."""

from __future__ import annotations

import itertools
import math

import torch as th

from .min_max import MinMax

ROUNDS = 50  # of choosing the points to cover, at most
TIGHT = 1e-4  # relative excess over 1 of the farthest covered point, at which the weights are good enough
WEIGHT_STEPS = 1000


class SublevelSet:
    """ghat(x) = 1[q(x) > 1], q(x) = e(u)^T P e(u), e all monomials of the scaled x up to a degree, P positive definite.

    Fitted by min log det P^-1 subject to #{q(x_i) > 1} <= alpha N, which the paper (arXiv 2505.16242, section 4) smooths
    and which is solved here as minimum-volume ellipsoids with outliers are: the points of smallest q are covered by
    the smallest set (its dual is a D-optimal design, whose weights w_i <- w_i e_i^T M(w)^-1 e_i / m are found by
    multiplication), then chosen anew, until they stay. log det P^-1 falls in every round.

    With many columns the set is tight around its sample: degree 2 in 15 columns has 136 monomials, takes minutes for
    20,000 points and flags far more than alpha of fresh ones. :func:`samples_needed` says what theory asks for.

    :param scale: of points
    :param exponents: (m, n) int64, of the monomials
    :param root: (m, m), L with P = L L^T
    """

    def __init__(self, scale: MinMax, exponents: th.Tensor, root: th.Tensor) -> None:
        self.scale, self.exponents, self.root = scale, exponents, root

    @classmethod
    def fit(cls, points: th.Tensor, alpha: float = 0.05, degree: int = 2) -> SublevelSet:
        """The set that covers at least (1 - alpha) N of (N, n) points.

        :param degree: of the monomials; q has twice that
        :raises ValueError: for an argument outside its range, or fewer points than monomials
        """
        if not 0.0 <= alpha < 1.0 or degree < 1:
            raise ValueError(f"alpha lies in [0, 1) and degree is 1 or more, not alpha={alpha} and degree={degree}.")
        scale = MinMax.of(points)
        exponents = _exponents(points.shape[1], degree).to(points.device)
        features = _monomials(scale.scaled(points).double(), exponents)
        covered = math.ceil((1.0 - alpha) * len(points))
        if covered <= features.shape[1]:
            raise ValueError(f"{covered} points to cover are too few for {features.shape[1]} monomials: lower the degree.")
        # The problem has local optima: the smaller of two sets, begun without the points that are far by the moments of all
        # monomials, and without those that are far from the middle.
        scaled = scale.scaled(points).double()
        middle = scaled.median(0).values
        far = (_quadratic(features, _root(features.T @ features / len(features))), (scaled - middle).square().sum(1))
        roots = [_concentrated(features, values.argsort(stable=True)[:covered]) for values in far]
        return cls(scale, exponents, max(roots, key=lambda root: float(th.linalg.slogdet(root).logabsdet)))

    def value(self, points: th.Tensor) -> th.Tensor:
        """q at (B, n) points, (B,) float64."""
        return _quadratic(_monomials(self.scale.scaled(points).double(), self.exponents), self.root)

    def outside(self, points: th.Tensor) -> th.Tensor:
        """ghat at (B, n) points, (B,) bool."""
        return self.value(points) > 1.0


def samples_needed(delta: float, gap: float) -> int:
    """N >= log(1 / delta) / (2 gap^2): points after which the set leaves the ideal one with probability delta at most.

    Hoeffding's bound exp(-2 N gap^2) of the paper's appendix; its main text prints another, which is wrong.

    :param gap: alpha_c - alpha, between the allowed and the true share of outliers
    """
    return math.ceil(math.log(1.0 / delta) / (2.0 * gap**2))


def _exponents(dimensions: int, degree: int) -> th.Tensor:
    """Of all monomials up to the degree, (m, n), the constant first."""
    rows = []
    for total in range(degree + 1):
        for factors in itertools.combinations_with_replacement(range(dimensions), total):
            rows.append([factors.count(i) for i in range(dimensions)])
    return th.tensor(rows)


def _monomials(scaled: th.Tensor, exponents: th.Tensor) -> th.Tensor:
    """(B, m) of (B, n)."""
    powers = th.stack([scaled**k for k in range(int(exponents.max()) + 1)])  # (degree + 1, B, n)
    columns = th.arange(scaled.shape[1], device=scaled.device)
    product = th.ones(len(scaled), len(exponents), dtype=scaled.dtype, device=scaled.device)
    for i in columns.tolist():
        product *= powers[exponents[:, i], :, i].T
    return product


def _quadratic(features: th.Tensor, root: th.Tensor) -> th.Tensor:
    """|L^T e|^2, (B,)."""
    return (features @ root).square().sum(1)


def _root(moments: th.Tensor) -> th.Tensor:
    """L with L L^T the inverse of (m, m) moments, which get a trace's 1e-12 where they are singular."""
    eye = th.eye(len(moments), dtype=moments.dtype, device=moments.device)
    lower = th.linalg.cholesky(moments + 1e-12 * moments.trace() * eye)
    return th.linalg.solve_triangular(lower, eye, upper=False).T


def _concentrated(features: th.Tensor, chosen: th.Tensor) -> th.Tensor:
    """L of a set that covers as many points as are ``chosen``, from where no round makes it smaller."""
    for _ in range(ROUNDS):
        root = _smallest_cover(features[chosen])
        before, chosen = chosen, _quadratic(features, root).argsort(stable=True)[: len(chosen)]
        if th.equal(before.sort().values, chosen.sort().values):
            break
    return root


def _smallest_cover(features: th.Tensor) -> th.Tensor:
    """L of the P with the smallest log det P^-1 whose set holds all (B, m) features."""
    count, m = features.shape
    weights = th.full((count,), 1.0 / count, dtype=features.dtype, device=features.device)
    for _ in range(WEIGHT_STEPS):
        root = _root((features * weights.unsqueeze(1)).T @ features)
        values = _quadratic(features, root) / m
        if float(values.max()) < 1.0 + TIGHT:
            break
        weights = weights * values
        weights /= weights.sum()
    return root / math.sqrt(m * float(values.max()) * (1.0 + 1e-9))  # rounding leaves no covered point outside
