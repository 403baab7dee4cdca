"""Divergences between two action distributions of one family: KL, and the Tsallis Bregman divergence of order q.

With ln_{2-q}(x) = (x^{q-1} - 1) / (q - 1) and psi(pi) = sum_a pi ln_{2-q} pi, the Bregman divergence is
    B(pi, pi_k) = E_pi[ln_{2-q} pi - q ln_{2-q} pi_k] - 1 + sum_a pi_k^q,
which is KL(pi || pi_k) at q = 1 and sum_a (pi - pi_k)^2 at q = 2 (derived; specification of MDPO, section 2.4).
"""

from __future__ import annotations

import math
from typing import Any

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    kl_divergence,
)

from .distributions import Gaussian


def log_q(x: th.Tensor, q: float) -> th.Tensor:
    """ln_{2-q}(x) = (x^{q-1} - 1) / (q - 1); the natural logarithm at q = 1."""
    return x.log() if q == 1.0 else (x.pow(q - 1.0) - 1.0) / (q - 1.0)


def kl_gaussian(mean: th.Tensor, log_std: th.Tensor, mean_old: th.Tensor, log_std_old: th.Tensor) -> th.Tensor:
    """KL(N(m, s^2) || N(m_o, s_o^2)) = log(s_o / s) + (s^2 + (m - m_o)^2) / (2 s_o^2) - 1/2, elementwise."""
    precision = th.exp(-2.0 * log_std_old)
    return log_std_old - log_std + 0.5 * precision * ((2.0 * log_std).exp() + (mean - mean_old).square()) - 0.5


def kl(new: Distribution, old: Distribution) -> th.Tensor:
    """KL(new || old), analytic, summed over action dimensions: the direction that mirror descent dictates.

    :return: (B,)
    """
    if isinstance(new, Gaussian) and isinstance(old, Gaussian):
        return kl_gaussian(new.mean, new.log_std, old.mean, old.log_std).sum(dim=-1)
    divergence = kl_divergence(new, old)
    return divergence.sum(dim=-1) if divergence.ndim > 1 else divergence


def bregman_discrete(p: th.Tensor, p_old: th.Tensor, q: float) -> th.Tensor:
    """B(p, p_old) of categorical probabilities (..., n), q in (1, 2]; shape (...)."""
    return (p * (log_q(p, q) - q * log_q(p_old, q)) + p_old.pow(q)).sum(dim=-1) - 1.0


def bregman_gaussian(
    mean: th.Tensor, std: th.Tensor, mean_old: th.Tensor, std_old: th.Tensor, q: float
) -> th.Tensor:
    """B of two one-dimensional normal densities, elementwise, q in (1, 2].

    Every term is a Gaussian integral:
        int pi^q          = (2 pi s^2)^{(1-q)/2} / sqrt(q)
        int pi pi_k^{q-1} = (2 pi s_k^2)^{(1-q)/2} sqrt(s_k^2 / v) exp(-(q-1) (m - m_k)^2 / (2 v)),  v = s_k^2 + (q-1) s^2
    and B = (int pi^q - q int pi pi_k^{q-1}) / (q - 1) + int pi_k^q (derived here; checked by quadrature in a test).
    """

    def power_integral(s: th.Tensor) -> th.Tensor:
        return (2.0 * math.pi * s.square()).pow((1.0 - q) / 2.0)

    v = std_old.square() + (q - 1.0) * std.square()
    cross = power_integral(std_old) * std_old * v.rsqrt() * th.exp(-(q - 1.0) * (mean - mean_old).square() / (2.0 * v))
    own, old = power_integral(std) / math.sqrt(q), power_integral(std_old) / math.sqrt(q)
    return (own - q * cross) / (q - 1.0) + old


def bregman(new: Any, old: Any, q: float) -> th.Tensor:
    """The Bregman divergence of order q, summed over action dimensions (q = 1: :func:`kl`).

    :param new: SB3 distribution over a batch of B states
    :param old: another of the same class
    :return: (B,)
    :raises ValueError: for a distribution without a closed form here
    """
    if q == 1.0:
        return kl(new, old)
    if isinstance(new, DiagGaussianDistribution):
        n, o = new.distribution, old.distribution
        return bregman_gaussian(n.mean, n.stddev, o.mean, o.stddev, q).sum(dim=-1)
    if isinstance(new, CategoricalDistribution):
        return bregman_discrete(new.distribution.probs, old.distribution.probs, q)
    if isinstance(new, MultiCategoricalDistribution):
        parts = zip(new.distribution, old.distribution, strict=True)
        return th.stack([bregman_discrete(n.probs, o.probs, q) for n, o in parts]).sum(dim=0)
    if isinstance(new, BernoulliDistribution):
        p, p_old = new.distribution.probs, old.distribution.probs
        both, both_old = th.stack([p, 1.0 - p], -1), th.stack([p_old, 1.0 - p_old], -1)
        return bregman_discrete(both, both_old, q).sum(dim=-1)
    raise ValueError(f"The Tsallis divergence is not known for {type(new).__name__}: use tsallis_q=1, the KL divergence.")
