"""The offline baselines against their formulas; PRDC against the checks of its specification (numbers in brackets)."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from tests.kit.offline import SUBJECTS, one_step_tasks, random_dataset
from tests.kit.resume import everything
from tether.agents import BC, CPQ, IQL, PRDC, TD3BC, BCQLag, NonFiniteError
from tether.agents.common.neighbours import NearestNeighbour
from tether.agents.common.offline_data import OfflineData, cost_threshold
from tether.agents.common.vae import ActionVAE, divergence

BY_NAME = {subject.name: subject for subject in SUBJECTS}


def trained(cls, steps=3, dataset=None, **kwargs):
    return BY_NAME[cls.__name__].make(**kwargs).learn_offline(dataset or random_dataset(), steps)


def batch_of(agent, n=40):
    data = agent._prepare(OfflineData(random_dataset()))
    return {name: values[None, :n] for name, values in data.items()}


# ---------------------------------------------------------------------- the nearest neighbour


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 6))
def test_nearest_neighbours_are_exact(seed, n, dim):
    """(1) Against every distance, also where several points are equally near."""
    generator = th.Generator().manual_seed(seed)
    points = th.randint(-2, 3, (n, dim), generator=generator).float()
    queries = th.cat([points[:5], th.randint(-4, 5, (20, dim), generator=generator) / 2.0])
    distances = (queries[:, None] - points[None]).square().sum(-1)
    found = NearestNeighbour(points)(queries)
    assert th.equal(distances.gather(1, found[:, None])[:, 0], distances.amin(1))


@pytest.mark.parametrize("chunk", [1, 33 * 300, 2**30])
def test_nearest_neighbours_in_chunks_are_those_of_a_tree(chunk):
    points, queries = th.randn(1500, 4), th.randn(33, 4)
    nearest = th.from_numpy(cKDTree(points.numpy()).query(queries.numpy())[1])
    with mock.patch.dict("tether.agents.common.neighbours.CHUNK", cpu=chunk):
        assert th.equal(NearestNeighbour(points)(queries), nearest)


# ---------------------------------------------------------------------- PRDC


def test_a_large_beta_is_td3_bc():
    """(2) States of the data are their own nearest neighbours."""
    agent = trained(PRDC, beta=1e4)
    batch = batch_of(agent)
    assert th.equal(agent.anchor(batch, th.rand(1, 40, 2) * 2 - 1), batch["actions"])


def test_beta_zero_ignores_the_state():
    """(2) The nearest action anywhere."""
    agent = trained(PRDC, beta=0.0)
    batch, actions = batch_of(agent), th.rand(1, 40, 2) * 2 - 1
    everywhere = th.from_numpy(random_dataset()["actions"])
    nearest = everywhere[th.cdist(actions[0], everywhere).argmin(1)]
    assert th.equal(agent.anchor(batch, actions)[0], nearest)


def test_an_action_of_the_data_costs_nothing_and_anchors_carry_no_gradient():
    """(3), (4)"""
    agent = trained(PRDC)
    batch = batch_of(agent)
    assert th.equal(agent.anchor(batch, batch["actions"]), batch["actions"])
    batch["actions"].requires_grad_()
    assert not agent.anchor(batch, th.rand(1, 40, 2)).requires_grad


@pytest.mark.parametrize("cls", [TD3BC, PRDC])
def test_weight_of_q(cls):
    """(5) lambda mean |Q_1(s, pi)| = alpha, and the loss is that of the formula."""
    agent = trained(cls, alpha=1.7)
    batch = batch_of(agent)
    actions = agent.policy.actor(batch["observations"])
    q = agent.policy.critics(batch["observations"], actions)[:, 0]
    loss, info = agent.actor_loss(batch)
    assert info["q_weight"].item() * q.abs().mean().item() == pytest.approx(1.7, rel=1e-5)
    cloning = (actions - agent.anchor(batch, actions.detach())).square().mean()
    assert loss.item() == pytest.approx((cloning - info["q_weight"] * q.mean()).item(), rel=1e-5)


@pytest.mark.parametrize("cls", [TD3BC, PRDC])
def test_actor_and_targets_wait(cls):
    """(6) They move at every second step only."""
    agent = trained(cls, steps=2)

    def moved(steps):
        before = everything(agent)
        agent.learn_offline(random_dataset(), steps, reset_num_timesteps=False)
        after = everything(agent)
        changed = [name for name in before if not th.equal(before[name], after[name])]
        return {name.split(".")[2 if name.startswith(".policy") else 1] for name in changed}

    first = moved(1)
    assert "critics" in first
    assert not {"actor", "actor_target", "critics_target"} & first
    assert {"actor", "actor_target", "critics_target", "critics"} <= moved(1)


class Free(th.nn.Module):
    """A policy that is one number."""

    def __init__(self, start):
        super().__init__()
        self.value = th.nn.Parameter(th.tensor(start))

    def forward(self, observations):
        return self.value.expand(1, observations.shape[1], 1)


@pytest.mark.parametrize(
    ("cls", "alpha", "start", "golden"),
    [
        (PRDC, 0.6, -0.8, 1.0),
        (PRDC, 0.3, -0.8, -0.816228),
        (TD3BC, 0.6, -0.8, 0.547723),
        (TD3BC, 0.3, 0.5, 0.387298),
        (TD3BC, 2.0, 0.2, 1.0),
    ],
)
def test_bandit_of_two_modes(cls, alpha, start, golden):
    """(7) Actions -1 and +1 equally often, Q = a: PRDC changes the mode for alpha > 1/2, TD3+BC settles at sqrt(alpha / 2)."""
    dataset = one_step_tasks(40)
    dataset["actions"] = np.where(np.arange(40) % 2, 1.0, -1.0).astype(np.float32)[:, None]
    own = {"beta": 0.0} if cls is PRDC else {}
    agent = BY_NAME[cls.__name__].make(alpha=alpha, normalize=False, **own).learn_offline(dataset, 1)
    data = agent._prepare(OfflineData(dataset))
    batch = {name: values[None] for name, values in data.items()}
    agent.policy.actor = Free(start)
    agent.policy.critics = Identity()
    value = agent.policy.actor.value
    for _ in range(3000):
        loss, _ = agent.actor_loss(batch)
        (gradient,) = th.autograd.grad(loss, value)
        with th.no_grad():
            value.sub_(0.01 * gradient).clamp_(-1.0, 1.0)
    assert value.item() == pytest.approx(golden, abs=2e-3)


class Identity(th.nn.Module):
    """Q(s, a) = a, twice."""

    def forward(self, observations, actions):
        return actions.squeeze(-1).unsqueeze(1).expand(-1, 2, -1)


# ---------------------------------------------------------------------- TD3+BC, IQL


def test_td3_target():
    agent = trained(TD3BC, policy_noise=0.0)
    batch, policy = batch_of(agent), agent.policy
    following = batch["next_observations"]
    next_q = policy.critics_target(following, policy.actor_target(following).clamp(-1, 1))[0]
    y = batch["rewards"][0] + 0.99 * batch["going_on"][0] * th.minimum(next_q[0], next_q[1])
    q = policy.critics(batch["observations"], batch["actions"])[0]
    expected = sum(((q[i] - y) ** 2).mean() for i in (0, 1))
    assert agent.critic_loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("cls", [TD3BC, IQL, CPQ, BCQLag])
def test_time_limits_bootstrap(cls):
    going_on = trained(cls)._prepare(OfflineData(random_dataset()))["going_on"].numpy()
    assert np.array_equal(going_on == 0.0, random_dataset()["terminals"])


def test_observations_are_standardised():
    agent = trained(TD3BC)
    observations = random_dataset()["observations"]
    rows = agent._prepare(OfflineData(random_dataset()))["observations"].numpy()
    assert rows == pytest.approx((observations - observations.mean(0)) / (observations.std(0) + 1e-3), abs=1e-5)


def test_iql_losses():
    agent = trained(IQL, expectile=0.8, beta=2.0, reward_scale=3.0)
    batch, policy = batch_of(agent), agent.policy
    q = policy.critics_target(batch["observations"], batch["actions"])[0].amin(0)
    v = policy.value(batch["observations"])[0, 0]
    u = q - v
    expected = (th.abs(0.8 - (u < 0).float()) * u**2).mean()
    assert agent.value_loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    normal = th.distributions.Normal(policy.actor(batch["observations"]), policy.log_std.clamp(-5, 2).exp())
    log_prob = normal.log_prob(batch["actions"]).sum(-1)[0]
    expected = -((2.0 * u).exp().clamp(max=100.0).detach() * log_prob).mean()
    assert agent.actor_loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert batch["rewards"][0].numpy() == pytest.approx(3.0 * random_dataset()["rewards"][:40], rel=1e-6)


def test_iqls_actor_rate_follows_a_cosine():
    agent = trained(IQL)
    for left, factor in ((1.0, 1.0), (0.5, 0.5), (0.25, 0.5 * (1 - math.cos(math.pi / 4))), (0.0, 0.0)):
        agent._current_progress_remaining = left
        agent._set_rates()
        assert agent.actor_optimizer.param_groups[0]["lr"] == pytest.approx(3e-4 * factor, abs=1e-12)
        assert agent.value_optimizer.param_groups[0]["lr"] == 3e-4


# ---------------------------------------------------------------------- BC


def test_safe_cloning_takes_whole_safe_episodes():
    dataset = random_dataset()
    costs = dataset["costs"].reshape(30, 20).sum(1)
    limit = float(np.median(costs))
    rows = BY_NAME["BC"].make(cost_limit=limit)
    rows.learn_offline(dataset, 1)
    kept = rows._prepare(OfflineData(dataset))["actions"].numpy()
    assert np.array_equal(kept, dataset["actions"].reshape(30, 20, 2)[costs <= limit].reshape(-1, 2))
    with pytest.raises(ValueError, match="No episode's cost is at most -1"):
        BY_NAME["BC"].make(cost_limit=-1.0).learn_offline(dataset, 1)


def test_cloning_in_units_of_its_own():
    """Glucose in mg/dL saturates a network that is not normalised; standardised, the unit does not matter."""
    dataset = random_dataset()
    moved = dataset | {name: 1000.0 + 100.0 * dataset[name] for name in ("observations", "next_observations")}
    mine, theirs = (trained(BC, dataset=rows, steps=50, normalize=True) for rows in (dataset, moved))
    seen = dataset["observations"][:20]
    expected = mine.predict(seen)[0]
    assert theirs.predict(1000.0 + 100.0 * seen)[0] == pytest.approx(expected, abs=0.05)
    assert np.ptp(expected) > 0.2


def test_cloning_loss():
    agent = trained(BC)
    batch = batch_of(agent)
    expected = (agent.policy.actor(batch["observations"]) - batch["actions"]).square().mean()
    assert agent.actor_loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------------- costs


def test_threshold_of_discounted_costs():
    """OSRL's formula; 0.999957 of a cost of 1 per 100 steps over 1,000 steps (FISOR's specification, section 9)."""
    data = OfflineData(random_dataset() | {"meta": {"max_episode_steps": 1000}})
    assert cost_threshold(data, 10.0, 0.99) == pytest.approx(0.999957, abs=1e-6)
    assert cost_threshold(OfflineData(random_dataset()), 2.0, 0.5) == pytest.approx(2.0 * (1 - 0.5**20) / (0.5 * 20))


def test_vae_divergence_is_that_of_gaussians():
    mean, log_std = th.randn(2, 7, 4), th.randn(2, 7, 4)
    normal = th.distributions.Normal(mean, log_std.exp())
    expected = th.distributions.kl_divergence(normal, th.distributions.Normal(0.0, 1.0)).mean(-1)
    assert th.allclose(divergence(mean, log_std), expected, atol=1e-5)


def test_vae_decodes_into_the_box():
    vae = ActionVAE(2, 3, 2, width=8)
    with th.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(20)
    actions = vae.decode(th.randn(2, 50, 3) * 10)
    assert actions.shape == (2, 50, 2)
    assert actions.abs().max() <= 1.0


def test_cpq_gives_unsafe_futures_no_value():
    agent = trained(CPQ)
    batch, policy = batch_of(agent), agent.policy
    q = policy.critics(batch["observations"], batch["actions"])[0]
    for threshold, factor in ((1e9, 1.0), (-1e9, 0.0)):
        agent.threshold = threshold
        th.manual_seed(0)
        loss = agent.critic_loss(batch)[0].item()
        th.manual_seed(0)
        following = batch["next_observations"]
        next_q = policy.critics_target(following, policy.sample(following))[0].amin(0)
        y = batch["rewards"][0] + 0.99 * factor * batch["going_on"][0] * next_q
        assert loss == pytest.approx(sum(((q[i] - y) ** 2).mean() for i in (0, 1)).item(), rel=1e-5)


def test_cpqs_dual_rises_where_strange_actions_look_cheap():
    agent = trained(CPQ)
    batch = batch_of(agent)
    for threshold, sign in ((1e3, 1.0), (-1e3, -1.0)):
        agent.threshold = threshold
        before = agent.policy.log_alpha.clone()
        agent.cost_critic_loss(batch)
        agent.ascend()
        assert math.copysign(1.0, float(agent.policy.log_alpha - before)) == sign
    for threshold in (1e9, -1e9):
        agent.threshold = threshold
        agent.cost_critic_loss(batch)
        agent.ascend()
        assert abs(float(agent.policy.log_alpha)) == 5.0


def test_cpq_pushes_strange_actions_up_and_leaves_the_others():
    """The out-of-distribution term alone: the cost of the quarter farthest from the data rises along its gradient."""
    agent = trained(CPQ, n_samples=8)
    batch, policy = batch_of(agent), agent.policy
    th.manual_seed(0)
    loss, _ = agent.cost_critic_loss(batch)
    th.manual_seed(0)
    policy.sample(batch["next_observations"])
    repeated = batch["observations"].repeat(1, 8, 1)
    actions = policy.sample(repeated)
    distance = divergence(*policy.vae.encode(repeated, actions))
    outside = distance >= distance.quantile(0.75)
    assert outside.float().mean().item() == pytest.approx(0.25, abs=0.02)
    q = policy.cost_critics(repeated, actions).amin(1)
    excess = (outside * q).mean() - 1.5 * agent.threshold
    th.manual_seed(0)
    following = batch["next_observations"]
    y = batch["costs"] + 0.99 * policy.cost_critics_target(following, policy.sample(following)).amin(1)
    fit = (policy.cost_critics(batch["observations"], batch["actions"]) - y.unsqueeze(1)).square().mean(2).sum()
    assert loss.item() == pytest.approx((fit - policy.log_alpha.exp() * excess).item(), rel=1e-4)
    gradients = th.autograd.grad(loss - fit, policy.cost_critics.networks[-1].bias)[0]
    assert bool((gradients <= 0.0).all()), "a step down the loss raises the cost of strange actions"


def test_actors_of_cpq_and_bcq():
    agent = trained(CPQ)
    batch, policy = batch_of(agent), agent.policy
    agent.threshold = 0.0
    th.manual_seed(0)
    loss, info = agent.actor_loss(batch)
    th.manual_seed(0)
    actions = policy.sample(batch["observations"])
    safe = policy.cost_critics(batch["observations"], actions).amin(1) <= 0.0
    expected = -(safe * policy.critics(batch["observations"], actions).amin(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    agent = trained(BCQLag)
    batch, policy = batch_of(agent), agent.policy
    agent.threshold = -3.0  # so that the constraint is violated
    th.manual_seed(0)
    loss, info = agent.actor_loss(batch)
    th.manual_seed(0)
    actions = policy.perturbed(policy.actor, batch["observations"], policy.vae.decode(batch["observations"]))
    excess = policy.cost_critics(batch["observations"], actions).amin(1).mean() + 3.0
    expected = info["multiplier"] * excess - policy.critics(batch["observations"], actions).amin(1).mean()
    assert info["multiplier"].item() > 0.0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_refused_step_leaves_the_duals_alone():
    """The multiplier of a loss that is not finite is not moved on."""
    for cls, name, dual in ((CPQ, "cost_critic_loss", "log_alpha"), (BCQLag, "actor_loss", "integral")):
        agent = trained(cls)
        loss_of, before = getattr(agent, name), getattr(agent.policy, dual).clone()

        def broken(batch, loss_of=loss_of):
            loss, info = loss_of(batch)
            return loss * math.nan, info

        setattr(agent, name, broken)
        with pytest.raises(NonFiniteError):
            agent.learn_offline(random_dataset(), 1, reset_num_timesteps=False)
        assert th.equal(getattr(agent.policy, dual), before)


def test_bcq_mixes_minimum_and_maximum_of_its_candidates():
    agent = trained(BCQLag, lmbda=0.75)
    following = batch_of(agent)["next_observations"]
    th.manual_seed(0)
    best = agent.best_candidate(agent.policy.critics_target, *agent.candidates(following))
    th.manual_seed(0)
    policy = agent.policy
    repeated = following.repeat_interleave(agent.n_samples, 1)
    actions = policy.perturbed(policy.actor_target, repeated, policy.vae.decode(repeated))
    q = policy.critics_target(repeated, actions)[0].view(2, 2, 40, agent.n_samples).amin(1)
    mixed = 0.75 * th.minimum(q[0], q[1]) + 0.25 * th.maximum(q[0], q[1])
    assert th.allclose(best[0], mixed.amax(1), atol=1e-6)


def test_perturbations_are_bounded():
    agent = trained(BCQLag, policy_kwargs={"net_arch": [16], "vae_width": 16, "phi": 0.05})
    observations, actions = th.randn(1, 100, 3) * 100, th.rand(1, 100, 2) * 2 - 1
    moved = agent.policy.perturbed(agent.policy.actor, observations, actions)
    assert (moved - actions).abs().max() <= 0.05 + 1e-6
    assert moved.abs().max() <= 1.0


def test_controller_of_the_multiplier():
    """K_P = 0.1, K_I = 0.003, K_D = 0.001 on the errors 2, 3, -1, -100, 5; by hand."""
    agent = trained(BCQLag)
    agent.policy.integral.zero_()
    agent.policy.last_error.zero_()
    found = []
    for error in (2.0, 3.0, -1.0, -100.0, 5.0):
        agent._error = th.tensor([error])
        found.append(float(agent.multiplier(agent._error)))
        agent.move_on()
    expected = [0.2 + 0.006 + 0.002, 0.3 + 0.015 + 0.001, 0.012, 0.0, 0.5 + 0.015 + 0.105]
    assert found == pytest.approx(expected, abs=1e-6)
