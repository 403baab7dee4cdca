"""R2VPO against the specification's checks (extras, section 2) on the real loss."""

import math

import pytest
import torch as th

from tests.kit.rollouts import collected
from tests.kit.worlds import Bandit
from tether.agents import PPO, R2VPO


def gradient(agent, loss):
    grads = th.autograd.grad(loss, agent.policy.optimizer.trained, allow_unused=True)
    return th.cat([g.flatten() for g in grads if g is not None])


def test_at_the_old_policy_the_step_is_vanilla_policy_gradient():
    """Check 1: rho = 1, no penalty, gradient of -mean(A log pi) and of PPO's loss."""
    agent = R2VPO("MlpPolicy", "Pendulum-v1", n_steps=256, seed=0)
    batch = collected(agent, 256)
    advantages = batch["advantages"]

    def log_prob():
        return agent.policy.distribution_at(batch["observations"]).log_prob(batch["actions"])

    loss, variance = agent.policy_loss(log_prob() - batch["old_log_prob"], advantages, th.tensor(3.0))
    assert variance.item() < 1e-10
    ours = gradient(agent, loss)
    vanilla = gradient(agent, -(advantages * log_prob()).mean())
    ppo = PPO("MlpPolicy", "Pendulum-v1", n_steps=256, seed=0)
    clipped = gradient(agent, ppo.policy_loss(th.exp(log_prob() - batch["old_log_prob"]), advantages, th.tensor(0.2)))
    assert (ours - vanilla).abs().max() < 1e-4 * vanilla.abs().max()
    assert (ours - clipped).abs().max() < 1e-4 * vanilla.abs().max()


def test_without_multiplier_it_is_the_unclipped_surrogate():
    """Check 2."""
    agent = R2VPO("MlpPolicy", "CartPole-v1", seed=0)
    log_ratio, advantages = th.randn(64), th.randn(64)
    loss, _ = agent.policy_loss(log_ratio, advantages, th.tensor(0.0))
    assert loss.item() == pytest.approx(-(log_ratio.exp() * advantages).mean().item(), rel=1e-6)


def test_the_multiplier_rises_only_when_the_bound_is_passed():
    """Check 3: up iff the variance is above delta, never below 0."""
    agent = R2VPO("MlpPolicy", "CartPole-v1", delta=0.02, multiplier_init=0.05, multiplier_lr=1.0, seed=0)
    agent.dual_step(th.tensor(0.05))
    assert agent.multiplier.item() == pytest.approx(0.08)
    agent.dual_step(th.tensor(0.01))
    assert agent.multiplier.item() == pytest.approx(0.07)
    for _ in range(10):
        agent.dual_step(th.tensor(0.0))
    assert agent.multiplier.item() == 0.0


def test_the_second_moment_is_chi_squared():
    """Check 4: Gaussians with dmu = .3, sigma = 1: exp(.09) - 1 = .09417, about twice the KL of .045."""
    agent = R2VPO("MlpPolicy", "Pendulum-v1", seed=0)
    a = th.randn(2_000_000, dtype=th.float64, generator=th.Generator().manual_seed(0))
    log_ratio = 0.5 * a.square() - 0.5 * (a - 0.3).square()
    _, variance = agent.policy_loss(log_ratio, th.zeros_like(a), th.tensor(1.0))
    assert math.exp(0.09) - 1.0 == pytest.approx(0.09417, abs=1e-5)
    assert variance.item() == pytest.approx(0.09417, abs=5e-4)
    assert th.exp(log_ratio).var().item() == pytest.approx(variance.item(), abs=5e-4)


@pytest.mark.parametrize(("advantage", "multiplier"), [(1.0, 2.0), (-1.0, 2.0), (0.5, 1.0)])
def test_one_sample_stops_where_the_brake_balances(advantage, multiplier):
    """Check 5: descent ends at rho* = 1 + A / (2 nu)."""
    agent = R2VPO("MlpPolicy", "CartPole-v1", seed=0)
    log_ratio = th.zeros(1, dtype=th.float64, requires_grad=True)
    optimizer = th.optim.SGD([log_ratio], lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        loss, _ = agent.policy_loss(log_ratio, th.tensor([advantage], dtype=th.float64), th.tensor(multiplier))
        loss.backward()
        optimizer.step()
    assert log_ratio.exp().item() == pytest.approx(1.0 + advantage / (2.0 * multiplier), abs=1e-9)


def test_the_dual_finds_the_bound():
    """Check 6: a bandit with exact expectations; after convergence the second moment is delta."""
    agent = R2VPO("MlpPolicy", Bandit(), n_steps=128, delta=0.05, multiplier_lr=1.0, seed=0)
    old = th.tensor([0.1, 0.2, 0.3, 0.4], dtype=th.float64)
    q = th.tensor([1.0, -1.0, 0.5, 0.0], dtype=th.float64)
    counts, advantages = [0] + [1] * 2 + [2] * 3 + [3] * 4, q - (old * q).sum()
    logits = old.log().clone().requires_grad_()
    optimizer = th.optim.Adam([logits], lr=3e-3)
    for _ in range(4000):
        log_ratio = (logits.log_softmax(0) - old.log())[counts]
        loss, variance = agent.policy_loss(log_ratio, advantages[counts], agent.multiplier.double())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agent.dual_step(0.02 * (variance.detach().float() - agent.delta) + agent.delta)
    assert variance.item() == pytest.approx(0.05, abs=2e-3)
    # At the optimum rho = 1 + (A - mean) / (2 nu), so nu = std(A) / (2 sqrt(delta)).
    std = ((old * advantages.square()).sum()).sqrt().item()
    assert agent.multiplier.item() == pytest.approx(std / (2.0 * math.sqrt(0.05)), rel=0.03)


def test_every_update_moves_the_dual_by_the_excess_it_logs():
    """In real training: nu <- max(0, nu + eta (second moment - delta)), so that the moments' mean can exceed delta by no more
    than nu has grown, over eta n. On single runs they swing around delta for long: how far is no property of the method."""
    agent = R2VPO("MlpPolicy", "Pendulum-v1", n_steps=256, delta=0.02, learning_rate=1e-3, seed=0)
    seen, duals, after = [], [agent.multiplier.item()], agent.after_update

    def look(measured):
        seen.append(measured["trust_region"].item())
        after(measured)
        duals.append(agent.multiplier.item())

    agent.after_update = look
    agent.learn(256 * 12)
    assert len(seen) == 12
    assert max(seen) > 1e-4
    for before, moment, nu in zip(duals, seen, duals[1:], strict=False):
        assert nu == pytest.approx(max(0.0, before + 10.0 * (moment - 0.02)), abs=1e-5)
    assert sum(seen) / len(seen) <= 0.02 + (duals[-1] - duals[0]) / (10.0 * len(seen)) + 1e-6


def test_the_multiplier_is_saved(tmp_path):
    agent = R2VPO("MlpPolicy", "Pendulum-v1", n_steps=128, seed=0).learn(256)
    agent.save(tmp_path / "model")
    assert R2VPO.load(tmp_path / "model").multiplier.item() == agent.multiplier.item() != 1.0


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"delta": 0.0}, "delta bounds the ratio's variance"),
        ({"multiplier_init": -1.0}, "must not be negative"),
        ({"multiplier_lr": -1.0}, "must not be negative"),
        ({"n_steps": 100}, "does not divide the rollout"),
    ],
)
def test_bad_arguments_are_refused_in_words(kwargs, words):
    with pytest.raises(ValueError, match=words):
        R2VPO("MlpPolicy", "CartPole-v1", **kwargs)
