"""The trust-region step under linear constraints, exactly: CPO's dual for any small number of constraints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

NO_GRADIENT = 1e-8  # b' F^-1 b below which a constraint has no gradient to follow
PARALLEL = 1e-12  # of g' F^-1 g, below which all of g lies in the span of the active constraints


class Step(NamedTuple):
    """x = -along_g F^-1 g - F^-1 B along_b.

    :param along_b: (m,)
    :param nu: (m,) multipliers of the constraints, 0 for those that do not bind
    :param feasible: False for a recovery, which leaves the objective alone
    """

    along_g: float
    along_b: np.ndarray
    nu: np.ndarray
    feasible: bool


def constrained_step(q: float, r: np.ndarray, s: np.ndarray, c: np.ndarray, kl: float) -> Step:
    """Solve min g'x subject to c + B'x <= 0 and x'F x / 2 <= kl.

    On an active set A the conditions of Karush, Kuhn and Tucker give
        nu_A = S_AA^-1 (lambda c_A - r_A), lambda = sqrt((q - r_A' S_AA^-1 r_A) / (2 kl - c_A' S_AA^-1 c_A)),
        x = -(1/lambda) F^-1 (g - B_A S_AA^-1 r_A) - F^-1 B_A S_AA^-1 c_A,
    whose first term is left out where g lies in the span of B_A. The optimum is the best of these points that satisfies
    all constraints. Where none can be satisfied within kl it is a recovery: the shortest step that would satisfy them
    all, cut to the length sqrt(2 kl); for one constraint -sqrt(2 kl / s) F^-1 b. Achiam et al. 2017 (arXiv 1705.10528)
    for one constraint, whose cases these are.

    :param q: g' F^-1 g
    :param r: B' F^-1 g, (m,)
    :param s: B' F^-1 B, (m, m)
    :param c: J_C - limit, (m,), in the unit of B'x; -inf is no constraint
    :param kl: the trust region's bound
    """
    q, r, s, c = float(q), np.asarray(r, np.float64), np.asarray(s, np.float64), np.asarray(c, np.float64)
    use = np.isfinite(c) & (np.diagonal(s) >= NO_GRADIENT) if len(c) else np.zeros(0, bool)
    inner = _step(q, r[use], s[np.ix_(use, use)], c[use], kl)
    along_b, nu = np.zeros(len(c)), np.zeros(len(c))
    along_b[use], nu[use] = inner.along_b, inner.nu
    return Step(inner.along_g, along_b, nu, inner.feasible)


def _step(q: float, r: np.ndarray, s: np.ndarray, c: np.ndarray, kl: float) -> Step:
    shortest = _shortest(s, c, kl)
    if shortest is None or shortest @ s @ shortest > 2.0 * kl * (1.0 + 1e-12):
        return _recovery(s, c, kl, shortest)
    if q <= 0.0:
        return Step(0.0, shortest, np.zeros(len(c)), True)
    best: Step | None = None
    lowest = math.inf
    for active, inverse in _active_sets(s):
        step = _candidate(q, r, c, kl, active, inverse)
        if step is None or not _satisfies(step.along_g * r + s @ step.along_b, s, c, kl):
            continue
        value = -step.along_g * q - float(step.along_b @ r)
        if value < lowest:
            best, lowest = step, value
    return best if best is not None else Step(0.0, shortest, np.zeros(len(c)), True)


def _candidate(q: float, r: np.ndarray, c: np.ndarray, kl: float, active: list[int], inverse: np.ndarray) -> Step | None:
    """The point of an active set; None where it lies outside the trust region."""
    to_r, to_c = inverse @ r[active], inverse @ c[active]
    left, room = q - float(r[active] @ to_r), 2.0 * kl - float(c[active] @ to_c)
    if room < 0.0:
        return None
    along_b, nu = np.zeros(len(c)), np.zeros(len(c))
    if left <= PARALLEL * q:
        along_b[active], nu[active] = to_c, -to_r
        return Step(0.0, along_b, nu, True)
    if room == 0.0:
        return None
    lmbda = math.sqrt(left / room)
    along_b[active], nu[active] = to_c - to_r / lmbda, lmbda * to_c - to_r
    return Step(1.0 / lmbda, along_b, nu, True)


def _recovery(s: np.ndarray, c: np.ndarray, kl: float, shortest: np.ndarray | None) -> Step:
    """Towards the constraints: all of them, or where they contradict each other the one that is farthest away."""
    if shortest is None:
        worst = int(np.argmax(c / np.sqrt(np.diagonal(s))))
        shortest = np.eye(len(c))[worst]
    along_b = shortest * math.sqrt(2.0 * kl / float(shortest @ s @ shortest))
    return Step(0.0, along_b, along_b, False)


def _shortest(s: np.ndarray, c: np.ndarray, kl: float) -> np.ndarray | None:
    """Coefficients z of the shortest x = -F^-1 B z that satisfies all constraints; None where there is none."""
    best, length = None, math.inf
    for active, inverse in _active_sets(s):
        z = np.zeros(len(c))
        z[active] = inverse @ c[active]
        if z @ s @ z < length and _satisfies(s @ z, s, c, kl):
            best, length = z, float(z @ s @ z)
    return best


def _satisfies(fall: np.ndarray, s: np.ndarray, c: np.ndarray, kl: float) -> bool:
    """Whether c - fall <= 0, up to rounding."""
    return bool(np.all(c - fall <= 1e-9 * (np.abs(c) + np.sqrt(2.0 * kl * np.diagonal(s)))))


def _active_sets(s: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """All sets of constraints whose gradients are not parallel, each with S_AA^-1."""
    scale = np.sqrt(np.diagonal(s))
    for count in range(len(s) + 1):
        for active in map(list, itertools.combinations(range(len(s)), count)):
            part = s[np.ix_(active, active)] / np.outer(scale[active], scale[active])
            if count < 2 or np.linalg.cond(part) < 1e10:
                yield active, np.linalg.inv(part) / np.outer(scale[active], scale[active])
