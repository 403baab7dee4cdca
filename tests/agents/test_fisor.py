"""FISOR against closed forms, fixed points and golden numbers; section numbers are those of its specification."""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from tests.kit.offline import one_step_tasks, random_dataset
from tether.agents import FISOR
from tether.agents.common.diffusion import Diffusion
from tether.agents.common.expectile import expectile_loss, reversed_expectile_loss
from tether.agents.common.mish import mish
from tether.agents.common.offline_data import OfflineData, reward_scale
from tether.agents.fisor import feasible_target, policy_weight

GAMMA, M = 0.99, 25.0
SMALL = {"batch_size": 32, "critic_batch_size": 16, "policy_kwargs": {"net_arch": [16], "width": 16, "n_blocks": 1}}


def small(**kwargs):
    return FISOR(**{"seed": 0, "device": "cpu", **SMALL, **kwargs})


def trained(dataset, steps=3, **kwargs):
    return small(**kwargs).learn_offline(dataset, steps)


# ---------------------------------------------------------------------- expectiles


def expectile(values, tau):
    """By bisection of tau E[(x - e)+] = (1 - tau) E[(e - x)+]."""
    x = np.asarray(values, float)
    return brentq(lambda e: tau * np.maximum(x - e, 0).mean() - (1 - tau) * np.maximum(e - x, 0).mean(), x.min(), x.max())


@pytest.mark.parametrize(
    ("values", "tau", "usual", "reversed_"),
    [((0, 1), 0.9, 0.9, 0.1), ((-1, 25), 0.9, 22.4, 1.6), ((-1, 0, 25), 0.9, 224 / 11, 16 / 19), ((0, 1, 5), 0.5, 2.0, 2.0)],
)
def test_expectiles(values, tau, usual, reversed_):
    """The minimiser of each loss, found by gradient descent on the loss itself."""
    x = th.tensor(values, dtype=th.float64)
    for loss, golden, level in ((expectile_loss, usual, tau), (reversed_expectile_loss, reversed_, 1 - tau)):
        v = th.zeros((), dtype=th.float64, requires_grad=True)
        optimizer = th.optim.LBFGS([v], lr=1.0, max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-15)

        def closure(loss=loss, v=v, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(x - v, tau).mean()
            value.backward()
            return value

        optimizer.step(closure)
        assert v.item() == pytest.approx(golden, abs=1e-6)
        assert v.item() == pytest.approx(expectile(values, level), abs=1e-6)


# ---------------------------------------------------------------------- the feasible Bellman operator


def operator(q, h, following, going_on=1.0):
    """One application to a table: q, h (states, actions), ``following`` the next state; the minimum is exact."""
    q, h = th.as_tensor(q, dtype=th.float64), th.as_tensor(h, dtype=th.float64)
    return feasible_target(h, q.amin(1)[th.as_tensor(following)], th.as_tensor(going_on, dtype=th.float64), GAMMA)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31))
def test_operator_is_a_contraction_and_monotone(seed):
    rng = np.random.default_rng(seed)
    following, h = rng.integers(6, size=(6, 3)), rng.normal(size=(6, 3)) * 10
    first, second = rng.normal(size=(2, 6, 3)) * 10
    gap = (operator(first, h, following) - operator(second, h, following)).abs().max()
    assert gap <= GAMMA * np.abs(first - second).max() + 1e-12
    higher = operator(first, h + rng.random((6, 3)), following)
    assert bool((operator(first, h, following) <= higher + 1e-12).all())


@pytest.mark.parametrize(
    ("steps", "golden"),
    [(0, 25.0), (1, 24.74), (2, 24.4826), (10, 22.51393), (324, 0.001789), (325, -0.008229)],
)
def test_chain_to_a_violation(steps, golden):
    """A violation ``steps`` ahead that ends the episode: (1 + M) gamma^steps - 1, which changes sign after 324 steps."""
    value = feasible_target(th.tensor(M), th.tensor(-7.0), th.tensor(0.0), GAMMA)  # the end: V_h(s') does not matter
    for _ in range(steps):
        value = feasible_target(th.tensor(-1.0, dtype=th.float64), value.double(), th.tensor(1.0), GAMMA)
    assert float(value) == pytest.approx(golden, abs=5e-6)
    assert float(value) == pytest.approx((1 + M) * GAMMA**steps - 1, abs=1e-9)


def test_five_states():
    """Right moves on, left back; state 4 is the hazard, which both actions of 3 lead into."""
    following = np.array([[1, 0], [2, 0], [3, 1], [4, 4], [4, 4]])
    h = np.where(following == 4, M, -1.0)
    q = th.zeros(5, 2, dtype=th.float64)
    for _ in range(4000):
        q = operator(q, h, following)
    golden = [[-1, -1], [-1, -1], [24.74, -1], [25, 25], [25, 25]]
    assert q.numpy() == pytest.approx(np.array(golden), abs=1e-9)
    assert (q.amin(1) <= 0).tolist() == [True, True, True, False, False]


def test_no_violation_in_reach():
    following = np.array([[1], [0]])
    q = th.full((2, 1), 3.0, dtype=th.float64)
    for _ in range(5000):
        q = operator(q, np.full((2, 1), -1.0), following)
    assert q.numpy() == pytest.approx(np.full((2, 1), -1.0), abs=1e-9)


def test_fixed_point_nears_the_worst_step_as_gamma_nears_one():
    h, following = th.tensor([[0.3], [-2.0], [1.5], [-1.0]], dtype=th.float64), [1, 2, 3, 3]
    q = th.zeros(4, 1, dtype=th.float64)
    for _ in range(40_000):
        q = feasible_target(h, q.amin(1)[following].unsqueeze(1), th.ones(4, 1, dtype=th.float64), 0.9999)
    assert q.flatten().tolist() == pytest.approx([1.5, 1.5, 1.5, -1.0], abs=3e-2)


# ---------------------------------------------------------------------- the policy's weight


@pytest.mark.parametrize(
    ("v_h", "q_h", "advantage", "floor", "golden"),
    [
        (-0.5, -0.2, 0.3, 0.0, 2.459603),
        (-0.5, 0.1, 9.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 1.0),
        (0.5, 0.4, 7.0, 0.0, 1.648721),
        (0.5, 0.6, 7.0, 0.0, 0.606531),
        (0.5, 0.6, 7.0, 1.0, 1.0),
        (2.0, 0.0, 0.0, 0.0, 150.0),
        (-1.0, -1.0, 2.0, 0.0, 100.0),
        (-1.0, 0.5, 1e6, 0.0, 0.0),
        (-1.0, -0.5, 1e6, 0.0, 100.0),
        (1e6, -1e6, 0.0, 1.0, 150.0),
    ],
)
def test_weights(v_h, q_h, advantage, floor, golden):
    weight = policy_weight(*map(th.tensor, (advantage, q_h, v_h)), floor=floor)
    assert float(weight) == pytest.approx(golden, abs=1e-6)


def test_weights_use_minimum_of_targets_and_maximum_of_safety():
    agent = trained(random_dataset())
    rows = OfflineData(random_dataset())
    batch = {"observations": rows.observations[None, :50], "actions": rows.actions[None, :50]}
    q = agent.policy.critics_target(batch["observations"], batch["actions"])
    v, v_h = agent.policy.values(batch["observations"]).unbind(1)
    expected = policy_weight(th.minimum(q[:, 0], q[:, 1]) - v, th.maximum(q[:, 2], q[:, 3]), v_h)
    assert th.equal(agent.policy_weights(batch), expected)
    assert not agent.policy_weights(batch).requires_grad


# ---------------------------------------------------------------------- diffusion


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_schedule(steps):
    diffusion = Diffusion(steps)
    assert float(diffusion.abar[-1]) == pytest.approx(math.exp(-5.05), rel=1e-5)
    assert bool((diffusion.alpha.diff() < 0).all())
    if steps == 5:
        beta = [0.195875, 0.458818, 0.635781, 0.754878, 0.835031]
        abar = [0.804125, 0.435178, 0.158500, 0.038852, 0.006409]
        assert (1 - diffusion.alpha).tolist() == pytest.approx(beta, abs=1e-6)
        assert diffusion.abar.tolist() == pytest.approx(abar, abs=1e-6)


def test_noising_keeps_unit_variance():
    diffusion, x = Diffusion(5), th.randn(4000, 50, generator=th.Generator().manual_seed(0))
    noise = th.randn(4000, 50, generator=th.Generator().manual_seed(1))
    for k in range(5):
        assert float(diffusion.noised(x, th.full((4000,), k), noise).var()) == pytest.approx(1.0, abs=0.01)


def test_sampler_with_an_oracle_gives_the_point():
    """All data at one point: eps = (x - sqrt(abar) a0) / sqrt(1 - abar), and the last step returns a0 exactly."""
    diffusion, a0 = Diffusion(5), th.tensor([0.3, -0.7, 0.99])

    def oracle(x, k):
        abar = diffusion.abar[k]
        return (x - abar.sqrt() * a0) / (1.0 - abar).sqrt()

    samples = diffusion.sample(oracle, th.randn(1, 200, 3))
    assert (samples - a0).abs().max() < 1e-6
    wild = diffusion.sample(lambda x, k: 100.0 * th.randn_like(x), th.randn(1, 500, 3))
    assert wild.abs().max() <= 1.0


def test_network_is_that_of_the_paper():
    """The time index's shortcut against the plain form: all features of every row through the same weights."""
    network = trained(random_dataset()).policy.noise.eval()
    observations, noisy, k = th.randn(1, 40, 3), th.randn(1, 40, 2), th.randint(5, (1, 40))
    phase = 2 * math.pi * k.float().unsqueeze(-1) * network.fourier
    x = network.first(th.cat([noisy, observations, network.time(th.cat([phase.cos(), phase.sin()], -1))], -1))
    for block in network.blocks:
        y = th.nn.functional.layer_norm(x, (16,), block.norm.weight[0, 0], block.norm.bias[0, 0], 1e-6)
        y = block.wide(y)
        x = x + block.narrow(y * th.tanh(th.nn.functional.softplus(y)))
    plain = network.last(x * th.tanh(th.nn.functional.softplus(x)))
    assert th.allclose(network(observations, noisy, k), plain, atol=1e-5)


def test_acting_samples_with_the_averaged_network():
    policy = trained(random_dataset()).policy.eval()
    observations = th.randn(1, 30, 3)
    th.manual_seed(3)
    fast = policy.sample(observations)
    th.manual_seed(3)
    network = policy.noise_average
    start = th.randn(1, 30, 2)
    plain = policy.diffusion.sample(lambda x, k: network(observations, x, th.full((1, 30), k)), start)
    assert th.allclose(fast, plain, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weight_of_a_sample_scales_its_gradient(weight):
    agent = trained(random_dataset())
    agent.policy.train(False)
    batch = {"observations": th.randn(1, 8, 3), "actions": th.rand(1, 8, 2) * 2 - 1, "weights": th.ones(1, 8)}
    batch["weights"][0, 3] = weight
    gradients = []
    for rows in (batch, {name: value[:, [0, 1, 2, 4, 5, 6, 7]] for name, value in batch.items()}):
        th.manual_seed(1)
        k, noise = th.randint(5, (1, 8)), th.randn(1, 8, 2)
        keep = list(range(8)) if rows["actions"].shape[1] == 8 else [0, 1, 2, 4, 5, 6, 7]
        k, noise = k[:, keep], noise[:, keep]
        predicted = agent.policy.noise(rows["observations"], agent.policy.diffusion.noised(rows["actions"], k, noise), k)
        loss = (rows["weights"] * (predicted - noise).square().sum(-1)).sum()
        gradients.append(th.autograd.grad(loss, agent.policy.noise.last.weight)[0])
    assert th.allclose(*gradients, atol=1e-6) is (weight == 0.0)
    th.manual_seed(1)
    k, noise = th.randint(5, (1, 8)), th.randn(1, 8, 2)
    predicted = agent.policy.noise(batch["observations"], agent.policy.diffusion.noised(batch["actions"], k, noise), k)
    th.manual_seed(1)
    loss, _ = agent.policy_loss(batch)
    expected = (batch["weights"] * (predicted - noise).square().sum(-1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------------- selection


def test_the_safest_candidate_of_each_row_is_taken(monkeypatch):
    """With Q_h = |a - s| the action nearest to the own state wins, and rows never mix their candidates."""
    policy = trained(random_dataset(action_dim=1)).policy.eval()
    drawn = []
    sample = policy.sample

    def remember(observations):
        drawn.append(sample(observations))
        return drawn[-1]

    def known(observations, actions):
        return th.zeros(actions.shape[:2]), (actions[..., 0] - observations[..., 0]).abs()

    monkeypatch.setattr(policy, "sample", remember)
    monkeypatch.setattr(policy, "reward_and_feasibility", known)
    observations = th.linspace(-1, 1, 7).repeat(3, 1).T.unsqueeze(0)
    actions = policy.act(observations, True)[0, :, 0]
    candidates = drawn[0].view(7, 16)
    for row in range(7):
        gaps = (candidates[row] - observations[0, row, 0]).abs()
        assert float(actions[row]) == float(candidates[row, gaps.argmin()])


# ---------------------------------------------------------------------- the loop


def test_target_networks_move_by_their_rates():
    agent = trained(random_dataset(), tau=0.3, policy_tau=0.2, policy_steps=1)
    before = {n: p.clone() for n, p in agent.policy.named_parameters()}
    agent.learn_offline(random_dataset(), 1, reset_num_timesteps=False)
    after = dict(agent.policy.named_parameters())
    for average, source, tau in (("critics_target", "critics", 0.3), ("noise_average", "noise", 0.2)):
        for name in before:
            if name.startswith(f"{average}."):
                new = after[name.replace(average, source, 1)]
                assert th.allclose(after[name], (1 - tau) * before[name] + tau * new, atol=1e-7)


def test_order_of_an_update():
    """The policy first and twice, on disjoint halves and with the former critics; then values, then critics."""
    agent, calls = trained(random_dataset()), []
    for name in ("policy_weights", "policy_loss", "value_loss", "critic_loss"):
        method = getattr(agent, name)

        def remember(batch, name=name, method=method):
            calls.append((name, batch["observations"].clone()))
            return method(batch)

        setattr(agent, name, remember)
    agent._data = agent._prepare(OfflineData(random_dataset()))
    agent.update(agent._draw, 0)
    assert [name for name, _ in calls] == ["policy_weights", "policy_loss", "policy_loss", "value_loss", "critic_loss"]
    whole = calls[0][1]
    assert th.equal(calls[1][1], whole[:, :16])
    assert th.equal(calls[2][1], whole[:, 16:])
    assert th.equal(calls[3][1], whole[:, :16])
    assert th.equal(calls[4][1], whole[:, :16])


def test_losses_are_those_of_the_formulas():
    agent = trained(random_dataset())
    agent.policy.train(False)
    data = agent._prepare(OfflineData(random_dataset()))
    batch = {name: values[None, :40] for name, values in data.items()}
    policy = agent.policy
    q = policy.critics_target(batch["observations"], batch["actions"])[0]
    v, v_h = policy.values(batch["observations"])[0]
    u, u_h = th.minimum(q[0], q[1]) - v, th.maximum(q[2], q[3]) - v_h
    expected = (th.abs(0.9 - (u < 0).float()) * u**2).mean() + (th.abs(0.9 - (u_h > 0).float()) * u_h**2).mean()
    assert float(agent.value_loss(batch)[0]) == pytest.approx(float(expected), rel=1e-5)
    v, v_h = policy.values(batch["next_observations"])[0]
    h, on = batch["h"][0], batch["going_on"][0]
    y = batch["rewards"][0] + GAMMA * on * v
    y_h = th.where(on > 0, (1 - GAMMA) * h + GAMMA * th.maximum(h, v_h), h)
    q = policy.critics(batch["observations"], batch["actions"])[0]
    expected = ((q[:2] - y) ** 2).mean() + ((q[2:] - y_h) ** 2).mean()
    assert float(agent.critic_loss(batch)[0]) == pytest.approx(float(expected), rel=1e-5)


def test_cosine_schedule_of_the_policy():
    agent = trained(random_dataset(), steps=1, decay_steps=3_000_000)
    for updates, factor in ((0, 1.0), (1_000_000, 0.25), (1_500_000, 0.0), (9_000_000, 0.0)):
        agent._n_updates = updates
        agent._set_rates()
        assert agent.policy_optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 * factor, abs=1e-12)
        assert agent.critic_optimizer.param_groups[0]["lr"] == 3e-4


# ---------------------------------------------------------------------- the data


def test_costs_become_constraint_values_and_masks():
    dataset = random_dataset()
    prepared = small()._prepare(OfflineData(dataset))
    assert set(prepared["h"].tolist()) == {-1.0, 25.0}
    assert np.array_equal(prepared["h"].numpy() > 0, dataset["costs"] > 0)
    ends = dataset["terminals"] | dataset["timeouts"]
    assert np.array_equal(prepared["going_on"].numpy() == 0.0, ends)
    bootstrapping = small(timeouts_terminal=False)._prepare(OfflineData(dataset))
    assert np.array_equal(bootstrapping["going_on"].numpy() == 0.0, dataset["terminals"])


def test_signed_constraint_values_are_taken_as_they_are():
    dataset = random_dataset()
    dataset["constraint_values"] = np.random.default_rng(1).normal(size=600).astype(np.float32)
    assert np.array_equal(small()._prepare(OfflineData(dataset))["h"].numpy(), dataset["constraint_values"])


def test_rewards_are_scaled_by_the_references():
    dataset = random_dataset()
    dataset["meta"] = {"reference_min_return": -3.0, "reference_max_return": 7.0, "max_episode_steps": 200}
    prepared = small()._prepare(OfflineData(dataset))
    assert prepared["rewards"].numpy() == pytest.approx(dataset["rewards"] * 20.0, rel=1e-6)
    returns = dataset["rewards"].reshape(30, 20).sum(1)
    assert reward_scale(OfflineData(random_dataset())) == pytest.approx(20 / (returns.max() - returns.min()), rel=1e-5)


@pytest.mark.parametrize(("costs", "kind"), [(np.zeros(600), "safe"), (np.ones(600), "unsafe")])
def test_data_of_one_class_is_refused(costs, kind):
    dataset = random_dataset() | {"costs": costs.astype(np.float32)}
    with pytest.raises(ValueError, match=f"'costs' every one of the 600 rows is {kind}"):
        small().learn_offline(dataset, 1)


def test_learns_the_best_safe_action_where_that_is_feasible():
    """Only a > 0.8 costs, a tenth of the data, so that V_h < 0 everywhere: the reward decides, a = s, up to the boundary."""
    dataset = one_step_tasks()
    dataset["costs"] = (dataset["actions"][:, 0] > 0.8).astype(np.float32)
    small_network = {"net_arch": [64, 64], "width": 64, "n_blocks": 1, "dropout": 0.0}
    kwargs = {"learning_rate": 3e-3, "batch_size": 256, "critic_batch_size": 128, "tau": 0.05, "policy_tau": 0.02}
    states = np.linspace(-0.9, 0.7, 200, dtype=np.float32)[:, None]
    errors = {}
    for temperature in (30.0, 0.0):
        agent = small(policy_kwargs=small_network, reward_temperature=temperature, **kwargs).learn_offline(dataset, 1500)
        v_h = agent.policy.values(th.from_numpy(states)[None])[0, 1].detach()
        assert float(v_h.max()) < 0.0
        agent.policy.n_candidates = 1  # the sampler itself, and not the choice of the safest
        th.manual_seed(0)
        actions, _ = agent.predict(states)
        assert np.mean(actions <= 0.85) > 0.97
        errors[temperature] = float(np.abs(actions - states).mean())
    assert errors[30.0] < 0.25 < errors[0.0], f"mean distances to the best action: {errors}"


def test_learns_the_safe_action_of_one_step_tasks():
    """Half the data cost, so that V_h > 0 everywhere: safety alone decides, a <= 0, and BC's would be anything."""
    agent = small(
        learning_rate=3e-3,
        batch_size=256,
        critic_batch_size=128,
        tau=0.05,
        policy_tau=0.02,
        policy_kwargs={"net_arch": [64, 64], "width": 64, "n_blocks": 1, "dropout": 0.0},
    ).learn_offline(one_step_tasks(), 1500)
    states = np.linspace(-0.9, 0.9, 200, dtype=np.float32)[:, None]
    th.manual_seed(0)
    actions, _ = agent.predict(states)
    assert np.mean(actions <= 0.0) > 0.97, f"{np.mean(actions <= 0.0):.2f} of the actions are safe"
    v_h = agent.policy.values(th.from_numpy(states)[None])[0, 1].detach()
    assert float(v_h.mean()) == pytest.approx(1.6, abs=0.5), "the 0.1-expectile of {-1, 25}, half and half"


# ---------------------------------------------------------------------- mish


def test_mish_and_its_derivative():
    x = th.cat([th.linspace(-30, 30, 2001), th.tensor([-1e4, -100.0, 0.0, 88.0, 1e4])]).requires_grad_()
    (slope,) = th.autograd.grad(mish(x).sum(), x)
    (reference,) = th.autograd.grad(th.nn.functional.mish(x).sum(), x)
    assert th.allclose(mish(x), th.nn.functional.mish(x), atol=2e-6, rtol=1e-6)
    assert th.allclose(slope, reference, atol=2e-6)
    assert th.autograd.gradcheck(mish, th.linspace(-5, 5, 23, dtype=th.float64).requires_grad_())
    assert not mish(x.detach()).requires_grad
