"""Divergences against closed forms, quadrature and the golden numbers of the specification (section 10 b, e, h)."""

import numpy as np
import pytest
import torch as th
from scipy.integrate import quad
from scipy.stats import norm
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)

from tether.agents.common.divergences import bregman, bregman_discrete, bregman_gaussian, kl, log_q

UNIFORM = th.full((4,), 0.25, dtype=th.float64)
OLD = th.tensor([0.1, 0.2, 0.3, 0.4], dtype=th.float64)


def gaussian(mean, std):
    mean = th.as_tensor(mean, dtype=th.float64)
    return DiagGaussianDistribution(mean.shape[-1]).proba_distribution(mean, th.as_tensor(std, dtype=th.float64).log())


def test_kl_is_of_new_from_old():
    """10 e: new N(.5, .4^2), old N(.3, .5^2): KL(new||old) = .123144, KL(old||new) = .183106."""
    new, old = gaussian([[0.5]], [0.4]), gaussian([[0.3]], [0.5])
    assert kl(new, old).item() == pytest.approx(0.123144, abs=5e-7)
    assert kl(old, new).item() == pytest.approx(0.183106, abs=5e-7)


def test_kl_sums_over_dimensions():
    new, old = gaussian([[0.5, 0.1]], [0.4, 1.2]), gaussian([[0.3, -0.4]], [0.5, 0.7])
    parts = [
        kl(gaussian([[m]], [s]), gaussian([[mo]], [so])).item()
        for m, s, mo, so in ((0.5, 0.4, 0.3, 0.5), (0.1, 1.2, -0.4, 0.7))
    ]
    assert kl(new, old).shape == (1,)
    assert kl(new, old).item() == pytest.approx(sum(parts), rel=1e-12)


@pytest.mark.parametrize("x", [1e-3, 0.3, 1.0, 2.5])
def test_q_logarithm(x):
    value = th.tensor(x, dtype=th.float64)
    assert log_q(value, 2.0).item() == pytest.approx(x - 1.0, abs=1e-15)
    assert log_q(value, 1.0).item() == np.log(x)
    assert log_q(value, 1.0 + 1e-7).item() == pytest.approx(np.log(x), abs=1e-5)


@pytest.mark.parametrize(("q", "golden"), [(2.0, 0.05), (1.4, 0.0882793)])
def test_bregman_golden_numbers(q, golden):
    """10 h."""
    assert bregman_discrete(UNIFORM, OLD, q).item() == pytest.approx(golden, abs=5e-8)


def test_bregman_at_q_1_is_kl():
    """10 h: KL(uniform || old) = .121777."""
    new = CategoricalDistribution(4).proba_distribution(UNIFORM.log()[None])
    old = CategoricalDistribution(4).proba_distribution(OLD.log()[None])
    assert bregman(new, old, 1.0).item() == pytest.approx(0.121777, abs=5e-7)
    assert bregman(new, old, 1.0 + 1e-6).item() == pytest.approx(0.121777, abs=1e-5)


@pytest.mark.parametrize("q", [1.1, 1.4, 1.7, 2.0])
def test_bregman_is_that_of_its_potential(q):
    """10 h, the identity of section 2.4, from the definition: psi(p) - psi(p_old) - <psi'(p_old), p - p_old>."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, p_old = (th.as_tensor(rng.dirichlet(np.ones(5))) for _ in range(2))
        p_old = p_old.clone().requires_grad_()
        (gradient,) = th.autograd.grad((p_old * log_q(p_old, q)).sum(), p_old)
        expected = (p * log_q(p, q)).sum() - (p_old * log_q(p_old, q)).sum() - (gradient * (p - p_old)).sum()
        assert bregman_discrete(p, p_old, q).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("q", [1.1, 1.4, 2.0])
@pytest.mark.parametrize(("m", "s", "m_old", "s_old"), [(0.5, 0.4, 0.3, 0.5), (-1.0, 1.5, 0.7, 0.6), (0.0, 1.0, 0.0, 1.0)])
def test_bregman_of_gaussians_by_quadrature(q, m, s, m_old, s_old):
    p, p_old = norm(m, s).pdf, norm(m_old, s_old).pdf

    def integrand(a):
        ln = lambda x: (x ** (q - 1) - 1) / (q - 1)  # noqa: E731
        return p(a) * (ln(p(a)) - q * ln(p_old(a))) + p_old(a) ** q

    # Outside +-15 both densities are below 1e-22; the integrand's constant -1 is taken out of the integral.
    expected = quad(integrand, -15, 15, limit=400, epsabs=1e-12)[0] - 1.0
    got = bregman_gaussian(*(th.tensor(v, dtype=th.float64) for v in (m, s, m_old, s_old)), q)
    assert got.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_divergence_vanishes_with_its_gradient_only_at_the_old_policy(q):
    mean = th.zeros(1, 3, dtype=th.float64, requires_grad=True)
    log_std = th.full((3,), -0.3, dtype=th.float64, requires_grad=True)
    new = DiagGaussianDistribution(3).proba_distribution(mean, log_std)
    old = gaussian([[0.0] * 3], [float(np.exp(-0.3))] * 3)
    divergence = bregman(new, old, q).sum()
    gradients = th.autograd.grad(divergence, (mean, log_std))
    assert abs(divergence.item()) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients)
    assert bregman(gaussian([[0.1] * 3], [0.7] * 3), old, q).item() > 1e-4


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_families_agree_where_they_coincide(q):
    """A Bernoulli is a two-way categorical; a multi-categorical sums its parts."""
    logits, logits_old = th.tensor([[0.3, -1.0]], dtype=th.float64), th.tensor([[-0.2, 0.5]], dtype=th.float64)
    bernoulli = [BernoulliDistribution(2).proba_distribution(x) for x in (logits, logits_old)]
    as_pairs = [th.stack([x, th.zeros_like(x)], -1).flatten(1) for x in (logits, logits_old)]
    multi = [MultiCategoricalDistribution([2, 2]).proba_distribution(x) for x in as_pairs]
    by_bernoulli, by_multi = bregman(*bernoulli, q), bregman(*multi, q)
    if by_bernoulli.ndim > 1:
        by_bernoulli = by_bernoulli.sum(-1)
    assert by_bernoulli.item() == pytest.approx(by_multi.item(), rel=1e-9)
