"""The constrained trust-region step: golden numbers, the conditions of optimality, conjugate gradients, the Fisher matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th

from tether.agents.common.batched_gaussian import BatchedGaussian
from tether.agents.common.conjugate_gradient import conjugate_gradient
from tether.agents.common.constrained_step import constrained_step

KL = 0.01


def solve(g, b, c, kl=KL):
    """The step with F = I, and what the solver says."""
    g, b, c = np.array(g, float), np.array(b, float).reshape(-1, len(g)), np.atleast_1d(np.array(c, float))
    step = constrained_step(g @ g, b @ g, b @ b.T, c, kl)
    return -step.along_g * g - b.T @ step.along_b, step


@pytest.mark.parametrize(
    ("g", "b", "c", "x", "nu"),
    [
        ((-1, 0), (1, 0), -1.0, (0.14142, 0.0), 0.0),
        ((-1, 0), (1, 0), -0.05, (0.05, 0.0), 1.0),  # g lies in the span of b: lambda is 0
        ((-1, -1), (1, 0), 0.05, (-0.05, 0.13229), 1.37796),
        ((-1, -1), (1, 0), 0.0, (0.0, 0.14142), 1.0),
    ],
)
def test_golden_numbers(g, b, c, x, nu):
    found, step = solve(g, b, c)
    assert found == pytest.approx(x, abs=5e-6)
    assert step.nu[0] == pytest.approx(nu, abs=5e-6)
    assert step.feasible


def test_golden_multiplier_of_the_region():
    _, step = solve((-1, -1), (1, 0), 0.05)
    assert 1.0 / step.along_g == pytest.approx(7.5593, abs=5e-5)
    _, step = solve((-1, -1), (1, 0), 0.0)
    assert 1.0 / step.along_g == pytest.approx(7.0711, abs=5e-5)


def test_golden_recovery():
    found, step = solve((-1, 0), (1, 0), 0.5)
    assert found == pytest.approx((-0.14142, 0.0), abs=5e-6)
    assert not step.feasible


@pytest.mark.parametrize("seed", range(60))
def test_the_conditions_of_optimality_hold(seed):
    """Karush, Kuhn and Tucker's, which for a convex problem are enough: random problems of one to three constraints."""
    rng = np.random.default_rng(seed)
    size, count = 6, int(rng.integers(1, 4))
    root = rng.normal(size=(size, size))
    fisher = root @ root.T + 0.1 * np.eye(size)
    g, b, c = rng.normal(size=size), rng.normal(size=(count, size)), 0.1 * rng.normal(size=count)
    inverse = np.linalg.inv(fisher)
    step = constrained_step(g @ inverse @ g, b @ inverse @ g, b @ inverse @ b.T, c, KL)
    x = -step.along_g * inverse @ g - inverse @ b.T @ step.along_b
    divergence = 0.5 * x @ fisher @ x
    assert divergence <= KL * (1 + 1e-9)
    if not step.feasible:
        # Nothing within the region satisfies all: a linear function of the region's points is above 0 everywhere.
        assert divergence == pytest.approx(KL)
        weights = np.maximum(step.nu, 0.0)
        assert weights @ c > np.sqrt(2 * KL * weights @ b @ inverse @ b.T @ weights)
        return
    slack = c + b @ x
    assert slack.max() <= 1e-7
    assert step.nu.min() >= -1e-9
    assert step.nu @ slack == pytest.approx(0.0, abs=1e-8)
    multiplier = 1.0 / step.along_g
    assert g + b.T @ step.nu + multiplier * fisher @ x == pytest.approx(np.zeros(size), abs=1e-7)
    assert divergence == pytest.approx(KL)


def test_infinite_limits_and_flat_constraints_are_left_out():
    plain, _ = solve((-1, -2, 0), np.zeros((0, 3)), np.zeros(0))
    free, _ = solve((-1, -2, 0), (1, 1, 0), -np.inf)
    flat, step = solve((-1, -2, 0), (1e-6, 0, 0), 5.0)
    assert np.array_equal(plain, free)
    assert np.array_equal(plain, flat)
    assert step.feasible


def test_constraints_that_contradict_each_other_are_taken_one_at_a_time():
    found, step = solve((-1, 0), [(1, 0), (-1, 0)], (0.01, 0.3))
    assert found == pytest.approx((0.14142, 0.0), abs=1e-5)  # towards the one that is farther away
    assert not step.feasible


def test_equal_constraints_count_once():
    once, _ = solve((-1, -1), (1, 0), 0.05)
    twice, step = solve((-1, -1), [(1, 0), (1, 0)], (0.05, 0.05))
    assert twice == pytest.approx(once)
    assert step.nu.sum() == pytest.approx(1.37796, abs=5e-6)


# ---------------------------------------------------------------------- conjugate gradients, Fisher matrix


def test_conjugate_gradients_solve_every_system():
    th.manual_seed(0)
    root = th.randn(3, 8, 8, dtype=th.float64)
    matrices = root @ root.mT + th.eye(8)
    right = th.randn(2, 3, 8, dtype=th.float64)
    right[0, 1] = 0.0
    found = conjugate_gradient(lambda v: (matrices @ v.unsqueeze(3)).squeeze(3), right, 20, 1e-24)
    assert th.allclose(found, th.linalg.solve(matrices, right.unsqueeze(3)).squeeze(3), atol=1e-9)


@pytest.fixture
def gaussian():
    th.manual_seed(0)
    actor = BatchedGaussian(2, 3, 2, (5, 4)).double()
    observations = th.randn(2, 7, 3, dtype=th.float64)
    weights = th.rand(2, 7, dtype=th.float64)
    return actor, observations, weights / weights.sum(1, keepdim=True)


def test_fisher_products_are_second_derivatives_of_the_divergence(gaussian):
    actor, observations, weights = gaussian
    vectors = th.randn(3, *actor.flat().shape, dtype=th.float64)
    found = actor.fisher_product(observations, weights)(vectors)
    mean, log_std = (part.detach() for part in actor(observations))
    parameters = list(actor.parameters())
    for vector, product in zip(vectors, found, strict=True):
        divergence = (actor.kl_from(mean, log_std, observations) * weights).sum()
        slope = actor.flat(th.autograd.grad(divergence, parameters, create_graph=True))
        expected = actor.flat(th.autograd.grad((slope * vector).sum(), parameters))
        assert th.allclose(product, expected, atol=1e-10)


def test_half_the_product_is_the_divergence_of_a_small_step(gaussian):
    actor, observations, weights = gaussian
    mean, log_std = (part.detach().clone() for part in actor(observations))
    before = actor.flat().detach().clone()
    step = 1e-4 * th.randn_like(before)
    predicted = 0.5 * (step * actor.fisher_product(observations, weights)(step[None])[0]).sum(1)
    actor.assign(before + step)
    divergence = (actor.kl_from(mean, log_std, observations) * weights).sum(1)
    assert divergence.tolist() == pytest.approx(predicted.tolist(), rel=1e-2)


def test_log_probabilities_are_torchs(gaussian):
    actor, observations, _ = gaussian
    actions = th.randn(2, 7, 2, dtype=th.float64)
    mean, log_std = actor(observations)
    expected = th.distributions.Normal(mean, log_std.exp().expand_as(mean)).log_prob(actions).sum(2)
    assert th.allclose(actor.log_prob(observations, actions), expected)
