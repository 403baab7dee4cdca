"""Flow maps, their trust region and their search, against closed forms: a Gaussian whose flow map is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from tests.kit.offline import random_dataset
from tether.agents import FMQ, MVP
from tether.agents.common.batched import BatchedMLP, BatchedValues, frozen, torch_default, xavier_uniform
from tether.agents.common.flow import FlowNetwork, euler_flow, flow_matching_loss, interpolated
from tether.agents.common.gelu import GELU, gelu
from tether.agents.fmq.flow_maps import (
    FlowMapPolicy,
    diagonal_and_mean_flow_loss,
    lagrangian_loss,
    mean_flow_loss,
    progressive_loss,
    time_pairs,
)
from tether.agents.fmq.fmq import adaptive_radius, trust_region_target
from tether.agents.fmq.search import Search, guided_beam_search, renoised

MU, S = 1.5, 0.5  # data N(MU, S^2), noise N(0, 1)


# ---------------------------------------------------------------------- the Gaussian's exact flow map


def variance(t):
    return (1.0 - t) ** 2 + t**2 * S**2


def exact_jump(x, r, t):
    return t * MU + (variance(t) / variance(r)) ** 0.5 * (x - r * MU)


def exact_velocity(x, t):
    return MU + (t * S**2 - (1.0 - t)) / variance(t) * (x - t * MU)


class ExactMap(nn.Module):
    """u of the Gaussian, in the place of the network."""

    def forward(self, observations, x, r, t):
        gap = t - r
        jump = (exact_jump(x, r, t) - x) / th.where(gap.abs() < 1e-12, 1.0, gap)
        return th.where(gap.abs() < 1e-12, exact_velocity(x, t), jump)

    smooth = forward

    def with_tangent(self, observations, x, times, dx, dtimes):
        value, tangent = th.func.jvp(lambda y, r, t: self(observations, y, r, t), (x, *times), (dx, *dtimes))
        return value, tangent.detach()


EXACT = ExactMap()


def column(*values):
    return th.tensor(values, dtype=th.float64).view(1, -1, 1)


@pytest.mark.parametrize(
    ("r", "t", "x", "arrived", "u"),
    [
        (0.0, 1.0, -1.0, 1.0, 2.0), (0.0, 1.0, 0.5, 1.75, 1.25), (0.0, 0.5, -1.0, 0.190983, 2.381966),
        (0.25, 0.75, 0.3, 1.080544, 1.561088), (0.6, 1.0, 1.2, 1.8, 1.5), (0.4, 0.4, 0.2, 0.2, 2.0),
    ],
)  # fmt: skip
def test_golden_numbers_of_the_gaussian(r, t, x, arrived, u):
    value = EXACT(None, column(x), column(r), column(t)).item()
    assert value == pytest.approx(u, abs=1e-6)
    assert x + (t - r) * value == pytest.approx(arrived, abs=1e-6)


def exact_sample(n, seed=0):
    """Noise, data, the times r < t, and the mask, of n independent pairs."""
    rng = th.Generator().manual_seed(seed)
    noise = th.randn(1, n, 1, dtype=th.float64, generator=rng)
    data = MU + S * th.randn(1, n, 1, dtype=th.float64, generator=rng)
    r, t = time_pairs(*(th.rand(1, n, 1, dtype=th.float64, generator=rng) for _ in range(2)), 1.0)
    return noise, data, r, t, th.ones(1, n, 1, dtype=th.float64)


def test_the_exact_map_is_continuous_at_the_diagonal():
    """u(x, r, r + h) - u(x, r, r) vanishes with h."""
    x, r = column(-1.0, 0.3, 2.0), column(0.2, 0.5, 0.7)
    gaps = [(EXACT(None, x, r, r + h) - EXACT(None, x, r, r)).abs().max().item() for h in (1e-2, 1e-4)]
    assert 0.0 < gaps[1] < 1.1e-2 * gaps[0] < 1e-2


@pytest.mark.parametrize("loss", [mean_flow_loss, lagrangian_loss, progressive_loss])
def test_the_exact_map_solves_every_identity(loss):
    """With the marginal velocity in the place of a_1 - a_0 nothing is left of any of the three losses."""
    noise, data, r, t, valid = exact_sample(200)
    x, _ = interpolated(noise, data, r)
    assert loss(EXACT, None, (x, exact_velocity(x, r), valid), r, t).item() < 1e-18


def test_the_conditional_velocity_gives_the_right_teacher_in_the_mean():
    """The exact map's loss at fixed (r, t) is (dX/dx)^2 Var(v | a_r) = S^2 v(t) / v(r)^2, and the teacher's mean is u."""
    noise, data, *_, valid = exact_sample(400_000)
    r, t = th.full_like(noise, 0.3), th.full_like(noise, 0.8)
    x, velocity = interpolated(noise, data, r)
    loss = mean_flow_loss(EXACT, None, (x, velocity, valid), r, t).item()
    assert loss == pytest.approx(S**2 * variance(0.8) / variance(0.3) ** 2, rel=0.01)
    value, derivative = EXACT.with_tangent(None, x, (r, t), velocity, (th.ones_like(r), th.zeros_like(t)))
    error = velocity + (t - r) * derivative - value
    for moment in (error, error * x):
        assert abs(moment.mean()) < 4.0 * moment.std() / math.sqrt(x.numel())


def test_floor_of_flow_matching():
    """The diagonal's loss of the exact velocity: E[S^2 / v(t)] over uniform t is S pi / 2."""
    _, data, _, _, valid = exact_sample(400_000)
    th.manual_seed(0)
    loss = flow_matching_loss(lambda s, x, t: exact_velocity(x, t), None, data, valid).item()
    assert loss == pytest.approx(S * math.pi / 2.0, rel=0.01)


@pytest.mark.parametrize(("steps", "end"), [(1, 1.5), (10, 1.069217), (100, 1.007355), (1000, 1.000740)])
def test_euler_needs_many_steps_where_the_map_needs_one(steps, end, monkeypatch):
    class Exact:
        def at(self, observations, x, t):
            return exact_velocity(x, t)

    monkeypatch.setattr(th.Tensor, "clamp", lambda self, *_: self)  # the toy's data leave [-1, 1]
    assert euler_flow(Exact(), None, column(-1.0), steps).item() == pytest.approx(end, abs=1e-6)
    assert exact_jump(-1.0, 0.0, 1.0) == pytest.approx(1.0)


# ---------------------------------------------------------------------- the network and its derivative


def network(seeds=1, fourier=True, times=2, obs_dim=3, dim=4):
    th.manual_seed(0)
    return FlowNetwork(seeds, obs_dim, dim, (16, 16), times, fourier).double()


def some(seeds=1, n=5, obs_dim=3, dim=4, seed=1):
    rng = th.Generator().manual_seed(seed)
    draw = lambda *shape: th.randn(seeds, n, *shape, generator=rng, dtype=th.float64)  # noqa: E731
    r, t = time_pairs(*(th.rand(seeds, n, 1, generator=rng, dtype=th.float64) for _ in range(2)), 1.0)
    return draw(obs_dim), draw(dim), draw(dim), r, t


@pytest.mark.parametrize("fourier", [True, False])
@pytest.mark.parametrize("seeds", [1, 3])
def test_tangent_agrees_with_torch_and_with_differences(fourier, seeds):
    u, (s, x, v, r, t) = network(seeds, fourier), some(seeds)
    value, tangent = u.with_tangent(s, x, (r, t), v, (th.ones_like(r), th.zeros_like(t)))
    assert value.requires_grad
    assert not tangent.requires_grad
    expected, jvp = th.func.jvp(lambda y, a, b: u.smooth(s, y, a, b), (x, r, t), (v, th.ones_like(r), th.zeros_like(t)))
    assert th.allclose(value, expected, atol=1e-12)
    assert th.allclose(tangent, jvp, atol=1e-12)
    h = 1e-6
    difference = (u(s, x + h * v, r + h, t) - u(s, x - h * v, r - h, t)) / (2.0 * h)
    assert th.allclose(tangent, difference, atol=1e-7)


def test_the_direction_of_the_last_rows_only():
    u, (s, x, v, r, t) = network(), some()
    ones, zeros = th.ones_like(r[:, 3:]), th.zeros_like(r[:, 3:])
    value, tangent = u.with_tangent(s, x, (r, t), v[:, 3:], (ones, zeros))
    whole = u.with_tangent(s, x, (r, t), v, (th.ones_like(r), th.zeros_like(t)))
    assert th.allclose(value, whole[0])
    assert th.allclose(tangent, whole[1][:, 3:])


def test_both_losses_in_one_pass():
    """The fast path: equal to its two parts, and so are the gradients."""
    u, (s, x, v, r, t) = network(), some()
    time, valid = th.rand(1, 5, 1, dtype=th.float64), (th.rand(1, 5, 2) > 0.3).double()
    diagonal, data = (x.flip(1), v.flip(1), valid.flip(1)), (x, v, valid)
    apart = (
        flow_matching_from(u, s, diagonal, time),
        mean_flow_loss(u, s, data, r, t),
    )
    together = diagonal_and_mean_flow_loss(u, s, diagonal, time, data, r, t)
    for first, second in zip(apart, together, strict=True):
        assert first.item() == pytest.approx(second.item(), rel=1e-12)
        gradients = [th.autograd.grad(loss.sum(), list(u.parameters()), retain_graph=True) for loss in (first, second)]
        assert all(th.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


def flow_matching_from(u, s, diagonal, time):
    x, v, valid = diagonal
    squares = (u(s, x, time, time) - v).square().view(1, 5, 2, 2)
    return (squares * valid[..., None]).mean((1, 2, 3))


def test_gelu_and_its_derivative():
    x = th.linspace(-30.0, 30.0, 20_001).requires_grad_()
    (slope,) = th.autograd.grad(gelu(x).sum(), x)
    reference = nn.functional.gelu(x, approximate="tanh")
    (expected,) = th.autograd.grad(reference.sum(), x)
    assert th.allclose(gelu(x), reference, atol=2e-6, rtol=1e-6)
    assert th.allclose(slope, expected, atol=2e-6, rtol=1e-6)
    assert th.equal(gelu(x.detach()), gelu(x).detach())
    assert th.autograd.gradcheck(gelu, th.linspace(-5, 5, 23, dtype=th.float64).requires_grad_())


def test_fourier_features():
    u = network(times=1)
    features = u.embedded(th.tensor([[[0.0], [1.0]]], dtype=th.float64))[0]
    assert features.shape == (2, 64)
    assert th.equal(features[0], th.cat([th.ones(32), th.zeros(32)]).double())
    assert features[1, 0].item() == pytest.approx(math.cos(1.0))
    assert features[1, 31].item() == pytest.approx(math.cos(1e-4))
    assert features[1, 32].item() == pytest.approx(math.sin(1.0))


@pytest.mark.parametrize("loss", [lagrangian_loss, progressive_loss, mean_flow_loss])
def test_the_map_off_the_diagonal_is_trained(loss):
    """In the released code's `lsd` it is not: jumps get no gradient there."""
    u, (s, x, v, r, t) = network(), some()
    loss(u, s, (x, v, th.ones(1, 5, 2, dtype=th.float64)), r, t).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in u.parameters())


# ---------------------------------------------------------------------- times


def test_curriculum():
    first, second = th.rand(2, 1, 200_000, 1)
    for progress, gap in ((0.0, 0.0), (0.5, 1.0 / 6.0), (1.0, 1.0 / 3.0)):
        r, t = time_pairs(first, second, progress)
        assert r.min() >= 0.0
        assert t.max() <= 1.0
        assert (r <= t).all()
        assert (t - r).mean().item() == pytest.approx(gap, abs=2e-3)
    assert th.allclose(r, th.minimum(first, second))


@pytest.mark.parametrize(("step", "gap"), [(0, 0.0), (4999, 0.0), (27_500, 1 / 6), (50_000, 1 / 3), (10**6, 1 / 3)])
def test_curriculum_follows_the_steps(step, gap):
    agent = FMQ(seed=0, device="cpu", policy_kwargs={"net_arch": [8]}).learn_offline(random_dataset(), 1)
    agent.policy.steps.fill_(step)
    r, t = agent._times(th.zeros(1, 100_000, 1))
    assert (t - r).mean().item() == pytest.approx(gap, abs=2e-3)
    assert th.equal(r, t) == (gap == 0.0)


# ---------------------------------------------------------------------- the trust region


def test_target_lies_on_the_ball():
    rng = th.Generator().manual_seed(0)
    reference, gradient = th.randn(2, 1, 50, 10, generator=rng, dtype=th.float64)
    radius = th.rand(1, 50, generator=rng, dtype=th.float64) + 0.1
    target = trust_region_target(reference, gradient, radius)
    assert th.allclose((target - reference).norm(dim=-1), radius, atol=1e-6)
    assert th.allclose(target, trust_region_target(reference, 7.0 * gradient, radius), atol=1e-6)
    assert th.equal(trust_region_target(reference, th.zeros_like(gradient), radius), reference)


def test_target_is_the_best_of_the_ball():
    """For Q = w . a, against ten thousand maps within the radius."""
    rng = th.Generator().manual_seed(0)
    reference, w = th.randn(2, 1, 1, 6, generator=rng, dtype=th.float64)
    target = trust_region_target(reference, w, 0.5)
    others = th.randn(10_000, 6, generator=rng, dtype=th.float64)
    others = others / others.norm(dim=1, keepdim=True) * 0.5 * th.rand(10_000, 1, generator=rng, dtype=th.float64) ** (1 / 6)
    assert (target * w).sum() >= ((reference + others) * w).sum(-1).max()


def test_the_target_moves_actions_by_what_is_left_of_the_way():
    """|| X*_{r,1}(x) - X^off_{r,1}(x) || = (1 - r) eta before the clip: all of eta from noise, nothing at the end."""
    rng = th.Generator().manual_seed(0)
    reference, gradient, x = th.randn(3, 1, 50, 10, generator=rng, dtype=th.float64)
    r = th.rand(1, 50, 1, generator=rng, dtype=th.float64)
    target = trust_region_target(reference, gradient, 0.5)
    moved = (x + (1.0 - r) * target) - (x + (1.0 - r) * reference)
    assert th.allclose(moved.norm(dim=-1), 0.5 * (1.0 - r[..., 0]), atol=1e-7)


def test_adaptive_radius():
    q = th.tensor([[[1.0, 2.0, 3.0], [1.2, 1.0, 3.0]]])
    assert adaptive_radius(q, 1.0, 0.3)[0].tolist() == pytest.approx([0.869565, 0.571429, 1.0], abs=1e-6)
    assert adaptive_radius(q, 0.5, 0.3)[0].tolist() == pytest.approx([0.434783, 0.285714, 0.5], abs=1e-6)
    assert adaptive_radius(q, 0.5, 0.0)[0].tolist() == [0.5, 0.5, 0.5]


def online_agent(cls=FMQ, **kwargs):
    agent = cls(seed=0, device="cpu", batch_size=16, horizon=2, policy_kwargs={"net_arch": [16], "n_candidates": 4}, **kwargs)
    agent.learn_offline(random_dataset(), 3)
    agent.begin_online()
    return agent


def online_batch(agent, valid=1.0):
    batch = agent._draw(agent.batch_size)
    return batch | {"valid": th.full_like(batch["valid"], valid)}


def test_loss_at_the_offline_policy_is_the_squared_radius():
    agent = online_agent(eta=0.5, beta=0.0)
    loss, info = agent.online_actor_loss(online_batch(agent))
    assert loss.item() == pytest.approx(0.25 / 4, rel=1e-5)  # eta^2 / A
    assert info["trust_region"].item() == 0.0
    assert info["trust_region_bound"].item() == pytest.approx(0.5)


def test_adaptive_loss_at_the_offline_policy():
    agent = online_agent(eta=1.0, beta=0.3)
    batch = online_batch(agent)
    th.manual_seed(5)
    loss, _ = agent.online_actor_loss(batch)
    th.manual_seed(5)
    r = th.rand(1, 16, 1)
    x, _ = interpolated(th.randn(1, 16, 4), batch["actions"], r)
    *_, radius = agent.target_and_radius(batch["observations"], x, r, x)
    assert ((radius > 0.0) & (radius <= 1.0)).all()
    assert radius.std() > 0.0
    assert loss.item() == pytest.approx((radius.square().mean() / 4).item(), rel=1e-5)


def test_loss_with_a_mask():
    """Then it is sum_b eta_b^2 || g_b's valid entries ||^2 / (B A)."""
    agent = online_agent(eta=1.0, beta=0.3)
    batch = online_batch(agent)
    batch["valid"][:, ::2, 1] = 0.0
    th.manual_seed(5)
    loss, _ = agent.online_actor_loss(batch)
    th.manual_seed(5)
    r = th.rand(1, 16, 1)
    x, _ = interpolated(th.randn(1, 16, 4), batch["actions"], r)
    target, u_off, _ = agent.target_and_radius(batch["observations"], x, r, x)
    moved = (target - u_off).view(1, 16, 2, 2) * batch["valid"][..., None]
    assert loss.item() == pytest.approx((moved.square().sum() / (16 * 4)).item(), rel=1e-5)


def test_the_gradient_at_the_online_action():
    """The direction follows the map in training; the radius is still that of the offline map's actions (authors' code)."""
    agent = online_agent(eta=0.7, beta=0.5, gradient_at="online")
    observations, x, u = th.randn(1, 6, 3), th.randn(1, 6, 4), th.randn(1, 6, 4)
    r = th.rand(1, 6, 1)
    target, u_off, radius = agent.target_and_radius(observations, x, r, u)
    at = (x + (1.0 - r) * u).clamp(-1.0, 1.0).requires_grad_()
    (gradient,) = th.autograd.grad(agent.policy.critics(observations, at)[:, 0].sum(), at)
    with th.no_grad():
        q = agent.policy.critics(observations, (x + (1.0 - r) * u_off).clamp(-1.0, 1.0))
    assert th.allclose(radius, adaptive_radius(q, 0.7, 0.5), atol=1e-6)
    assert th.allclose(target, trust_region_target(u_off, gradient, radius), atol=1e-5)


def test_online_weights_of_the_offline_losses():
    """L_FMQ + lambda_diagonal L_diagonal + lambda_flow_map L_mf, whose noise is drawn after that of L_FMQ."""

    def parts(diagonal, flow_map):
        agent = online_agent(lambda_diagonal=diagonal, lambda_flow_map=flow_map, warmup=0, anneal_end=1)
        batch = {name: values[None, :16] for name, values in agent.replay_buffer.arrays.items()}
        th.manual_seed(5)
        loss, info = agent.online_actor_loss(batch)
        return loss.item(), info["guided_loss"].item()

    guided, alone = parts(0.0, 0.0)
    with_diagonal, with_map, with_both = (parts(*weights)[0] - guided for weights in ((2.0, 0.0), (0.0, 3.0), (4.0, 1.5)))
    assert guided == pytest.approx(alone)
    assert min(with_diagonal, with_map) > 0.1
    assert with_both == pytest.approx(2.0 * with_diagonal + 0.5 * with_map, rel=1e-4)


@pytest.mark.parametrize("cls", [FMQ, MVP])
def test_the_identity_is_learnt_after_the_warm_up(cls):
    agent = online_agent(cls, warmup=7)
    for steps, weight in ((0, 0.0), (7, 0.0), (8, 1.0)):
        agent.policy.steps.fill_(steps)
        loss, info = agent.offline_actor_loss(online_batch(agent))
        assert info["mf_loss"] > 0.0
        assert loss.item() == pytest.approx((info["diagonal_loss"] + weight * info["mf_loss"]).item())


def test_nothing_flows_into_critics_and_reference():
    agent = online_agent()
    agent.policy.zero_grad()
    agent.online_actor_loss(online_batch(agent))[0].backward()
    assert all(p.grad is not None for p in agent.policy.actor.parameters())
    for fixed in (agent.policy.critics, agent.policy.critics_target, agent.policy.reference):
        assert all(p.grad is None for p in fixed.parameters())
    assert all(p.requires_grad for p in agent.policy.critics.parameters())


def test_the_gradient_is_that_of_the_first_critic_at_the_clipped_action():
    agent = online_agent(eta=0.7, beta=0.0)
    observations, x = th.randn(1, 6, 3), 3.0 * th.randn(1, 6, 4)
    r = th.rand(1, 6, 1)
    target, u_off, _ = agent.target_and_radius(observations, x, r, x)
    at = (x + (1.0 - r) * u_off).clamp(-1.0, 1.0).requires_grad_()
    assert ((at.abs() == 1.0).any(-1)).any()
    q = agent.policy.critics(observations, at)[:, 0]
    (gradient,) = th.autograd.grad(q.sum(), at)
    direction = gradient / gradient.norm(dim=-1, keepdim=True)
    assert th.allclose((target - u_off) / 0.7, direction, atol=1e-5)


def test_online_training_stays_in_the_ball():
    """Not further than its target, and the log shows both."""
    agent = online_agent(eta=0.5, beta=0.0, learning_rate=3e-3)
    agent.replay_buffer.note_size()
    for number in range(800):
        info = agent.update(agent._draw, number)
    assert 0.3 < info["trust_region"].item() < 0.55


def test_some_members_of_an_ensemble():
    th.manual_seed(0)
    values = BatchedValues(3, 4, 5, (8, 8), xavier_uniform, activation_fn=GELU, layer_norm=True)
    inputs = th.randn(3, 7, 5)
    assert th.allclose(values(inputs, members=slice(1, 3)), values(inputs)[:, 1:3], atol=1e-6)


# ---------------------------------------------------------------------- the toy, from offline to online


def one_step_normal(mean, std, n=4096, seed=0):
    rng = np.random.default_rng(seed)
    actions = rng.normal(mean, std, (n, 1)).astype(np.float32)
    return {
        "observations": np.zeros((n, 1), np.float32), "next_observations": np.zeros((n, 1), np.float32), "actions": actions,
        "rewards": np.zeros(n, np.float32), "terminals": np.ones(n, bool),
    }  # fmt: skip


def toy_agent(distillation="mf", steps=4000):
    """A flow map of N(MU, S^2), outside of [-1, 1], learnt by the agent's own losses."""
    th.manual_seed(0)
    agent = FMQ(
        seed=0, device="cpu", horizon=1, learning_rate=1e-3, warmup=300, anneal_end=1500, distillation=distillation,
        policy_kwargs={"net_arch": [64, 64], "fourier": False},
    ).learn_offline(one_step_normal(0.0, 0.2), 1)  # fmt: skip
    agent.policy.actor = FlowNetwork(1, 1, 1, (64, 64), 2)
    optimizer = th.optim.Adam(agent.policy.actor.parameters(), 1e-3)
    observations, valid = th.zeros(1, 256, 1), th.ones(1, 256, 1)
    for step in range(steps):
        agent.policy.steps.fill_(step)
        optimizer.param_groups[0]["lr"] = 1e-3 if step < 3000 else 1e-4
        actions = MU + S * th.randn(1, 256, 1)
        diagonal, identity = agent.flow_map_losses(observations, actions, valid)
        optimizer.zero_grad()
        (diagonal + (step > 300) * identity).sum().backward()
        optimizer.step()
    return agent


@pytest.mark.slow
@pytest.mark.parametrize("distillation", ["mf", "lsd", "psd"])
def test_the_gaussian_is_learnt(distillation):
    """One jump, a hundred Euler steps along its own diagonal, and the exact map agree."""
    u = toy_agent(distillation).policy.actor
    x = th.randn(1, 4000, 1)
    s, end = th.zeros_like(x), th.ones_like(x)
    jump = lambda y, r, t: y + (t - r) * u(s, y, r * end, t * end)  # noqa: E731
    with th.no_grad():
        one, exact = jump(x, 0.0, 1.0), exact_jump(x, 0.0, 1.0)
        many = x
        for i in range(100):
            many = many + u(s, many, i / 100 * end, i / 100 * end) / 100
        two = jump(jump(x, 0.0, 0.5), 0.5, 1.0)
    rmse = lambda a, b: (a - b).square().mean().sqrt().item()  # noqa: E731
    assert one.mean().item() == pytest.approx(MU, abs=0.08)
    assert one.std().item() == pytest.approx(S, abs=0.08)
    assert max(rmse(one, exact), rmse(many, exact), rmse(one, many), rmse(two, one)) < 0.12


@pytest.mark.slow
def test_gaussian_bandit():
    """Data N(0, .2^2), Q(a) = -(a - 1)^2: online the policy moves by eta towards 1, and keeps its spread."""

    class Bandit(nn.Module):
        def forward(self, observations, actions, members=None):
            return -(actions[..., 0] - 1.0).square().unsqueeze(1)

    agent = FMQ(
        seed=0, device="cpu", horizon=1, learning_rate=1e-3, warmup=300, anneal_end=1500, eta=0.5, beta=0.0,
        policy_kwargs={"net_arch": [64, 64], "fourier": False, "n_candidates": 1},
    )  # fmt: skip
    agent.learn_offline(one_step_normal(0.0, 0.2), 4000)
    agent.begin_online()
    agent.policy.critics = Bandit()
    noise, s = th.randn(1, 4000, 1), th.zeros(1, 4000, 1)
    with th.no_grad():
        before = agent.policy.sample(s, noise)
        middle = agent.policy.velocity(s, noise, 0.6, 1.0)
        diagonal = agent.policy.velocity(s, noise, 0.6, 0.6)
    batch = online_batch(agent)
    assert agent.online_actor_loss(batch)[0].item() == pytest.approx(0.25, rel=1e-4)
    for _ in range(2000):
        loss, _ = agent.online_actor_loss(agent._draw(256))
        agent.actor_optimizer.zero_grad()
        loss.backward()
        agent.actor_optimizer.step()
    assert loss.item() < 1e-5
    with th.no_grad():
        after = agent.policy.sample(s, noise)
        assert (agent.policy.velocity(s, noise, 0.6, 1.0) - middle).mean().item() == pytest.approx(0.5, abs=0.02)
        assert (agent.policy.velocity(s, noise, 0.6, 0.6) - diagonal).mean().item() > 0.2  # untrained, it drifts
    assert (after.mean() - before.mean()).item() == pytest.approx(0.5, abs=0.01)
    assert after.std().item() == pytest.approx(before.std().item(), abs=0.02)


# ---------------------------------------------------------------------- the search


def search_policy(action_dim=2, horizon=2, **search):
    th.manual_seed(0)
    observations, actions = spaces.Box(-np.inf, np.inf, (3,), np.float32), spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
    return FlowMapPolicy(observations, actions, horizon=horizon, net_arch=(16,), inference="qgbs", search=search)


@pytest.mark.parametrize(("beams", "levels", "branches", "calls"), [(4, 1, 4, 20), (4, 2, 4, 36), (4, 0, 4, 4), (2, 3, 5, 32)])
@pytest.mark.parametrize("denoise", ["diagonal", "jump"])
def test_network_calls(beams, levels, branches, calls, denoise):
    policy = search_policy(beams=beams, levels=levels, branches=branches, denoise=denoise)
    policy.predict(np.zeros(3, np.float32))
    assert policy.network_calls == calls
    policy.predict(np.zeros((7, 3), np.float32))
    assert policy.network_calls == 8 * calls


@pytest.mark.parametrize(("inference", "calls"), [("plain", 1), ("best-of-n", 32)])
def test_network_calls_without_search(inference, calls):
    policy = FlowMapPolicy(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), net_arch=(8,), inference=inference)
    policy.predict(np.zeros(3, np.float32))
    assert policy.network_calls == calls


def test_plans_are_played_to_their_ends():
    """One call of the network for H steps; an environment whose episode begins gets a new plan, the others go on."""
    policy = FlowMapPolicy(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), net_arch=(8,), horizon=3, inference="plain")
    observations = np.zeros((2, 3), np.float32)
    first, plan = policy.predict(observations, None, np.ones(2, bool))
    second, plan = policy.predict(observations, plan, np.array([False, True]))
    assert policy.network_calls == 3
    assert np.array_equal(plan.played, [2, 1])
    _, plan = policy.predict(observations, plan, np.zeros(2, bool))
    _, plan = policy.predict(observations, plan, np.zeros(2, bool))
    assert policy.network_calls == 4
    assert np.array_equal(plan.played, [1, 3])
    assert not np.array_equal(first, second)


def seeded(policy, observations, search):
    th.manual_seed(3)
    return guided_beam_search(policy, observations, search)


def initial(policy, observations, beams):
    th.manual_seed(3)
    repeated = observations.repeat_interleave(beams, 1)
    return repeated, policy.sample(repeated, th.randn(1, repeated.shape[1], policy.chunk_dim))


def q_min(policy, observations, chunks):
    return policy.critics(observations, chunks).amin(1)


@pytest.mark.parametrize(
    "search",
    [
        Search(levels=0, step_size=0.0),
        Search(levels=1, step_size=0.0, snr=float("inf")),
        Search(5, 2, 3, 0.0, float("inf")),
    ],
)
def test_without_noise_and_steps_it_is_the_best_of_the_beams(search):
    policy, observations = search_policy(), th.randn(1, 6, 3)
    policy.rank_by("min")
    with th.no_grad():
        expected = policy.best(*initial(policy, observations, search.beams), search.beams)
    assert th.allclose(seeded(policy, observations, search), expected, atol=1e-6)


def test_what_is_found_lies_in_the_box():
    policy, observations = search_policy(), th.randn(1, 40, 3)
    for parameter in policy.actor.parameters():
        parameter.data.mul_(3.0)
    chunks = seeded(policy, observations, Search(levels=2, step_size=2.0))
    assert chunks.abs().max() == 1.0


@pytest.mark.parametrize("levels", [1, 3])
def test_incumbents_make_it_monotone(levels):
    policy, observations = search_policy(), th.randn(1, 40, 3)
    search = Search(levels=levels, keep_incumbents=True)
    chunks = seeded(policy, observations, search)
    with th.no_grad():
        repeated, beams = initial(policy, observations, search.beams)
        before = q_min(policy, repeated, beams).view(1, 40, -1).amax(-1)
        assert (q_min(policy, observations, chunks) >= before - 1e-6).all()
    assert chunks.abs().max() <= 1.0


def test_without_them_it_is_not_monotone(monkeypatch):
    """As published: where a step of eta passes the maximum, the result is worse than what it began with."""

    class Quadratic(nn.Module):
        def forward(self, observations, chunks, members=None):
            return -chunks.square().sum(-1).unsqueeze(1)

    policy, observations = search_policy(1, 1), th.zeros(1, 50, 3)
    policy.critics = Quadratic()
    monkeypatch.setattr(policy, "sample", lambda _, noise: 0.1 * noise)
    chunks = seeded(policy, observations, Search(branches=16))
    assert chunks.abs().max() <= 1.0
    best = q_min(policy, *initial(policy, observations, 4)).view(1, 50, -1).amax(-1)
    assert (q_min(policy, observations, chunks) < best).float().mean() > 0.9


@pytest.mark.parametrize(("denoise", "std", "at_one"), [("diagonal", 0.30, 1.56), ("jump", 0.50, 1.60)])
def test_denoisers_on_the_gaussian(denoise, std, at_one, monkeypatch):
    """From t' = .6, where the spread is .5: the posterior's mean contracts it, the jump keeps it."""

    class Toy:
        def velocity(self, observations, x, r, t):
            return EXACT(None, x, th.full_like(x, r), th.full_like(x, t))

    monkeypatch.setattr(th.Tensor, "clamp", lambda self, *_: self)
    search = Search(branches=1, denoise=denoise)
    assert search.time == pytest.approx(0.6)
    data = MU + S * th.randn(1, 200_000, 1, dtype=th.float64)
    assert renoised(Toy(), data, data, search).std().item() == pytest.approx(std, abs=0.005)
    monkeypatch.setattr(th, "randn_like", lambda x: th.full_like(x, (1.0 - 0.6 * 1.5) / 0.4))
    assert renoised(Toy(), data[:, :1], column(1.5), search).item() == pytest.approx(at_one, abs=1e-6)


@pytest.mark.parametrize("change", [{"beams": 0}, {"step_size": -1.0}, {"snr": 0.0}, {"denoise": "euler"}, {"branches": 0}])
def test_bad_searches_are_refused(change):
    with pytest.raises(ValueError, match=r"search|snr|denoise"):
        Search(**change)


# ---------------------------------------------------------------------- MVP


def test_mvp_imitates_the_best_of_its_own_samples(monkeypatch):
    agent, seen = online_agent(MVP), []
    losses = agent.flow_map_losses
    monkeypatch.setattr(agent, "flow_map_losses", lambda *args: seen.append(args) or losses(*args))
    batch = online_batch(agent, valid=0.0)
    th.manual_seed(1)
    loss, info = agent.online_actor_loss(batch)
    th.manual_seed(1)
    with th.no_grad():
        expected = agent.policy.best_of(batch["observations"], 4)
    assert th.equal(seen[0][1], expected)
    assert seen[0][2].min() == 1.0
    assert loss.item() == pytest.approx((info["mf_loss"] + info["diagonal_loss"]).item())
    assert info["trust_region"].item() == 0.0


def test_the_distances_of_mvp_and_fmq_are_measured_alike():
    """Between noise and the memory's chunks: both agents with the same weights log the same, up to their noise."""
    logged = []
    for cls in (FMQ, MVP):
        agent = online_agent(cls)
        th.manual_seed(2)
        for parameter in agent.policy.actor.parameters():
            parameter.data.add_(0.05 * th.randn_like(parameter))
        batch = {name: values[None, :1].expand(1, 20_000, *values.shape[1:]) for name, values in agent._memory.arrays.items()}
        logged.append(agent.online_actor_loss(batch)[1]["trust_region"].item())
    assert logged[0] == pytest.approx(logged[1], rel=0.01)


def test_offline_phases_of_fmq_and_mvp_are_the_same():
    small = {"seed": 0, "device": "cpu", "batch_size": 16, "horizon": 2, "policy_kwargs": {"net_arch": [16]}}
    first, second = (cls(**small).learn_offline(random_dataset(), 5) for cls in (FMQ, MVP))
    for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert th.equal(a, b)


# ---------------------------------------------------------------------- the critics


def test_targets_use_the_best_of_n_and_the_average():
    """y = R + gamma^H m agg_j Q'_j(s', a'), a' by the critics in training; one sample for target_candidates = 1."""
    for candidates, ranking in ((None, "mean"), (1, "min")):
        agent = FMQ(
            seed=0, device="cpu", batch_size=16, horizon=5, gamma=0.99, offline_ranking=ranking, target_candidates=candidates,
            policy_kwargs={"net_arch": [16], "n_candidates": 4},
        ).learn_offline(random_dataset(), 20)  # fmt: skip
        batch = agent._draw(8)
        th.manual_seed(0)
        y = agent.td_target(batch)
        th.manual_seed(0)
        with th.no_grad():
            following, n = batch["next_observations"], candidates or 4
            noise = th.randn(1, 8 * n, agent.policy.chunk_dim)
            samples = agent.policy.sample(following.repeat_interleave(n, 1), noise).view(8, n, -1)
            for row in range(8):
                of = following[:, row : row + 1].expand(1, n, -1)
                reduce = (lambda q: q.min(1).values) if ranking == "min" else (lambda q: q.mean(1))
                best = samples[row, reduce(agent.policy.critics(of, samples[row][None])).argmax()]
                q = reduce(agent.policy.critics_target(of[:, :1], best.view(1, 1, -1)))
                expected = batch["returns"][0, row] + 0.95099005 * batch["going_on"][0, row] * q
                assert y[0, row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_chunks_that_pass_an_end_do_not_count():
    agent = FMQ(seed=0, device="cpu", batch_size=16, horizon=2, policy_kwargs={"net_arch": [16]})
    agent.learn_offline(random_dataset(), 1)
    batch = online_batch(agent, valid=1.0) | {"targets": th.ones(1, 16)}
    whole = agent.critic_loss(batch)[0]
    batch["valid"][:, 8:, -1] = 0.0
    half = agent.critic_loss({k: v for k, v in batch.items()})[0]
    alone = agent.critic_loss({k: v[:, :8] for k, v in batch.items()})[0]
    assert half.item() == pytest.approx(alone.item() / 2.0, rel=1e-5)  # masked, not left out of the mean
    assert whole.item() > half.item()


def test_the_average_lags_by_a_step():
    """It follows the critics as they were before the step, as in the authors' code."""
    agent = FMQ(seed=0, device="cpu", batch_size=16, horizon=2, tau=0.5, policy_kwargs={"net_arch": [8]})
    agent.learn_offline(random_dataset(), 3)
    target = [p.clone() for p in agent.policy.critics_target.parameters()]
    before = [p.clone() for p in agent.policy.critics.parameters()]
    agent.update(agent._draw, 3)
    for new, old, critic in zip(agent.policy.critics_target.parameters(), target, before, strict=True):
        assert th.allclose(new, 0.5 * old + 0.5 * critic, atol=1e-7)


def test_critics_have_norms_after_their_activations():
    agent = FMQ(seed=0, device="cpu", horizon=2, policy_kwargs={"net_arch": [8, 8]}).learn_offline(random_dataset(), 1)
    kinds = [type(layer).__name__ for layer in agent.policy.critics.networks]
    assert kinds == ["BatchedLinear", "GELU", "BatchedLayerNorm"] * 2 + ["BatchedLinear"]
    assert [type(layer).__name__ for layer in agent.policy.actor.layers] == ["BatchedLinear", "GELU"] * 2 + ["BatchedLinear"]


@pytest.mark.parametrize("n", [1, 3])
def test_layer_norms_one_network_after_another(n):
    th.manual_seed(0)
    together = BatchedMLP(n, 4, (700, 700), 2, GELU, torch_default, layer_norm=True)
    for parameter in together.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = th.randn(n, 200, 4)
    with frozen(together):
        expected = nn.Sequential.forward(together, x)
    assert th.allclose(together(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (FMQ, {"eta": 0.0}), (FMQ, {"beta": -1.0}), (FMQ, {"distillation": "esd"}), (FMQ, {"gradient_at": "both"}),
        (FMQ, {"anneal_end": 10}), (FMQ, {"horizon": 0}), (FMQ, {"offline_ranking": "max"}), (FMQ, {"target_candidates": 0}),
        (MVP, {"lambda_diagonal": -1.0}), (FMQ, {"gradient_steps": 0}),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(cls, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        cls(**change)
