"""OGSRL and its model-free baselines against the checks of their specification."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th

from tests.kit.offline import random_dataset
from tests.kit.resume import difference, everything
from tether.agents import CQL, OGSRL, DataError
from tether.agents.common.advantages import generalized_advantage
from tether.agents.common.conjugate_gradient import conjugate_gradient
from tether.agents.common.offline_data import OfflineData
from tether.agents.ogsrl.rollout import Rollout
from tether.agents.ogsrl.world import FROZEN_REWARD
from tether.envs import OfflineDataset, linear_patient, make_env

SMALL = {"n_episodes": 8, "horizon": 5, "value_batch_size": 16, "policy_kwargs": {"net_arch": [16]}}


def prepared(dataset=None, **kwargs):
    """An agent with its world, as it is while it learns."""
    agent = OGSRL(seed=0, device="cpu", **{**SMALL, **kwargs})
    data = OfflineData(random_dataset() if dataset is None else dataset)
    agent._take_data(data)
    return agent


def treated(episodes: int = 200, seed: int = 0, steps: int = 20, limit: float = 0.6):
    """Random doses in the linear patient."""
    env, rng = make_env(linear_patient.ID, limit=limit, max_episode_steps=steps), np.random.default_rng(seed)
    rows = {name: [] for name in ("observations", "actions", "rewards", "costs", "next_observations", "terminals", "timeouts")}
    for k in range(episodes):
        state, _ = env.reset(seed=seed * 10_000 + k)
        done = False
        while not done:
            action = np.clip(0.5 * state + 0.4 * rng.normal(size=2), -1.0, 1.0).astype(np.float32)
            following, reward, dead, late, info = env.step(action)
            for name, value in zip(rows, (state, action, reward, info["costs"], following, dead, late), strict=True):
                rows[name].append(value)
            state, done = following, dead or late
    dtypes = {"terminals": bool, "timeouts": bool}
    arrays = {name: np.array(values, dtypes.get(name, np.float32)) for name, values in rows.items()}
    return OfflineDataset(**arrays, meta={"cost_names": ["deviation"], "max_episode_steps": steps})


# ---------------------------------------------------------------------- the world


def test_reward_costs_and_next_state_come_from_the_same_transition():
    dataset = random_dataset(200)
    numbers = np.arange(200, dtype=np.float32)
    dataset |= {"rewards": numbers, "costs": np.stack([numbers, 2 * numbers], 1)}
    dataset["next_observations"] = np.stack([numbers] * 3, 1)
    agent = prepared(dataset)
    states = agent.policy.normalized(th.from_numpy(dataset["observations"]))
    actions = (th.from_numpy(dataset["actions"]) - agent.policy.action_middle) / agent.policy.action_half
    going = th.ones(1, 200, dtype=th.bool)
    following, signals, outside, ends = agent._world.step(states[None], actions[None], going)
    raw = following[0] * agent.policy.obs_std + agent.policy.obs_mean
    assert th.allclose(raw[:, 0], th.from_numpy(numbers), atol=1e-3)
    assert th.equal(signals[0, :, 0], th.from_numpy(numbers))
    assert th.equal(signals[0, :, 2], 2 * th.from_numpy(numbers))
    assert th.equal(signals[0, :, 3], outside[0].float())
    assert th.equal(ends[0], th.from_numpy(dataset["terminals"]))
    assert float(outside.float().mean()) == pytest.approx(agent.alpha, abs=1 / 200)


def test_actions_are_clipped_as_they_are_when_acting():
    """At the bounds, and not where the data end: random_dataset's doses nearly fill [-1, 1]."""
    agent = prepared()
    states, going = th.zeros(1, 2, 3), th.ones(1, 2, dtype=th.bool)
    at_bound = (1.0 - agent.policy.action_middle) / agent.policy.action_half
    beyond, at = (agent._world.step(states, at_bound.expand(1, 2, 2) + more, going) for more in (5.0, 0.0))
    assert all(th.equal(a, b) for a, b in zip(beyond, at, strict=True))
    acted = agent.policy.act(states, deterministic=False)
    assert float(acted.abs().max()) <= 1.0


def test_only_episodes_that_go_on_are_answered():
    agent = prepared()
    going = th.tensor([[True, False, True]])
    following, signals, outside, ends = agent._world.step(th.zeros(1, 3, 3), th.zeros(1, 3, 2), going)
    assert bool((signals[0, 1] == 0).all() and (following[0, 1] == 0).all())
    assert not bool(outside[0, 1] | ends[0, 1])
    assert th.equal(following[0, 0], following[0, 2])


def test_policies_do_not_learn_from_what_was_left_out():
    """Neither scaler nor guardian, world and limits: poisoned episodes of the other parts change nothing."""
    dataset = treated(60)
    train = dataset.split((0.6,))[0]
    (numbers,) = dataset.split_episodes((0.6,))
    others = np.setdiff1d(np.arange(60), numbers)
    poisoned = {name: np.array(getattr(dataset, name)) for name in ("observations", "next_observations", "rewards", "costs")}
    starts, ends = dataset.episode_starts, dataset.episode_ends
    for k in others:
        for array in poisoned.values():
            array[starts[k] : ends[k] + 1] = 1e6
    other = OfflineDataset(
        **poisoned, actions=dataset.actions, terminals=dataset.terminals, timeouts=dataset.timeouts, meta=dataset.meta
    ).split((0.6,))[0]
    agents = [OGSRL(seed=0, device="cpu", **SMALL).learn_offline(part, 2) for part in (train, other)]
    assert difference(*map(everything, agents)) == 0.0
    assert float(agents[1].policy.obs_std.max()) < 10.0


def test_split_is_of_whole_episodes_and_complete():
    dataset = treated(50)
    parts = dataset.split_episodes()
    assert [len(part) for part in parts] == [30, 10, 10]
    assert sorted(np.concatenate(parts).tolist()) == list(range(50))
    assert all(np.array_equal(a, b) for a, b in zip(parts, dataset.split_episodes(), strict=True))
    assert not np.array_equal(parts[0], dataset.split_episodes(seed=1)[0])
    train = dataset.split()[0]
    assert np.array_equal(train.episodes().returns, dataset.episodes().returns[parts[0]])
    with pytest.raises(ValueError, match="give numbers above 0 that add up to 1 at most"):
        dataset.split((0.8, 0.4))
    with pytest.raises(ValueError, match="leave a part without any: give more episodes"):
        treated(2).split((0.1, 0.9))


def test_limits_are_what_the_data_cost():
    dataset = treated(40)
    agent = prepared(dataset, horizon=20)
    discounts = 0.99 ** np.concatenate([np.arange(n) for n in dataset.episodes().lengths])
    costs = float((dataset.costs[:, 0] * discounts).sum() / 40)
    assert agent._limits.tolist() == pytest.approx([costs, 0.05 * discounts.sum() / 40], rel=1e-5)
    given = prepared(dataset, cost_limits=[0.25], ood_limit=0.5)
    assert given._limits.tolist() == [0.25, 0.5]
    assert prepared(dataset, cost_limits=[0.25], ood_limit=0.5, tightening=0.2)._limits.tolist() == pytest.approx([0.2, 0.4])


# ---------------------------------------------------------------------- imagined episodes


def test_golden_cost_of_violating_at_every_step():
    """sum_{t < 20} 0.99^t = 18.2093."""
    ones = th.ones(20, 1, 4, 2)
    alive = th.ones(20, 1, 4, dtype=th.bool)
    rollout = Rollout(th.zeros(21, 1, 4, 3), th.zeros(20, 1, 4, 2), ones, alive, ~alive)
    assert prepared().expected(rollout)[0].tolist() == pytest.approx([18.2093] * 2, abs=5e-5)


def test_the_guardian_costs_and_leaves_the_reward_alone():
    agent = prepared(horizon=20)
    agent.policy.actor.log_std.data.fill_(1.0)  # far outside, often
    rollout = agent.imagine(agent._data["observations"][:8][None])
    outside = rollout.signals[..., -1]
    assert set(outside.unique().tolist()) == {0.0, 1.0}
    assert float(rollout.signals[..., 0].min()) > FROZEN_REWARD
    assert float(rollout.signals.min(dim=3).values[~rollout.alive].abs().max()) == 0.0
    # E sum ghat bounds the probability that an episode leaves the data at all.
    assert float((outside.sum(0) > 0).float().mean()) <= float(outside.sum(0).mean())
    by_hand = sum(0.99**t * outside[t, 0].mean() for t in range(20))
    assert float(agent.expected(rollout)[0, -1]) == pytest.approx(float(by_hand), rel=1e-5)


def test_episodes_end_once():
    rollout = prepared(horizon=30).imagine(prepared()._data["observations"][:8][None])
    assert int(rollout.ends.sum(0).max()) <= 1
    for t in range(29):
        assert th.equal(rollout.alive[t + 1], rollout.alive[t] & ~rollout.ends[t])


def test_absorbed_episodes_stay_where_they_are():
    agent = prepared(mode="absorb", horizon=20)
    agent.policy.actor.log_std.data.fill_(1.0)
    rollout = agent.imagine(agent._data["observations"][:8][None])
    frozen = rollout.signals[..., 0] == FROZEN_REWARD
    assert bool(frozen.any())
    first = frozen.float().argmax(0)
    for episode in range(8):
        if not bool(frozen[:, 0, episode].any()):
            continue
        t = int(first[0, episode])
        assert bool(frozen[t:, 0, episode].all())
        assert not bool(rollout.ends[t:, 0, episode].any())
        assert th.equal(rollout.signals[t:, 0, episode, 1], th.ones(20 - t))
        assert bool((rollout.observations[t:, 0, episode] == rollout.observations[t, 0, episode]).all())
        assert bool((rollout.actions[t:, 0, episode] == rollout.actions[t, 0, episode]).all())


def test_advantages_do_not_leak_between_episodes():
    """Episodes side by side give what each gives alone; an end does not bootstrap, the horizon does."""
    agent = prepared(horizon=20)
    rollout = agent.imagine(agent._data["observations"][:8][None])
    together, returns = agent.advantages(rollout)
    with th.no_grad():
        values = agent.policy.value(rollout.observations.movedim(1, 0).flatten(1, 2))
    values = values.view(1, 3, 21, 8)
    for episode in range(8):
        length = int(rollout.alive[:, 0, episode].sum())
        ends = rollout.ends[:length, 0, [episode]]
        for k in range(3):
            alone = generalized_advantage(
                rollout.signals[:length, 0, [episode], k], values[0, k, : length + 1, [episode]], ends, 0.99, 0.95
            )
            assert th.allclose(together[:length, 0, episode, k], alone[:, 0], atol=1e-5)
        last, ended = length - 1, bool(ends[-1])
        follows = 0.0 if ended else 0.99 * values[0, 0, length, episode]
        expected = rollout.signals[last, 0, episode, 0] + follows
        assert float(returns[last, 0, episode, 0]) == pytest.approx(float(expected), abs=1e-5)


# ---------------------------------------------------------------------- the policy's step


def test_surrogates_are_in_the_unit_of_their_constraint():
    """Weights of a constraint add up to the discounted advantages of an episode, those of the loss are standardised."""
    agent = prepared(horizon=5)
    rollout = agent.imagine(agent._data["observations"][:8][None])
    steps = agent.alive_steps(rollout)
    assert float(steps.alive.sum()) == pytest.approx(1.0)
    advantages, _ = agent.advantages(rollout)
    discounts = (0.99 ** th.arange(5.0))[:, None]
    for k in (1, 2):
        by_hand = (advantages[:, 0, :, k] * discounts * rollout.alive[:, 0]).sum() / 8
        assert float(steps.weights[0, k].sum()) == pytest.approx(float(by_hand), abs=1e-5)
    loss = steps.weights[0, 0]
    assert float(loss.sum()) == pytest.approx(0.0, abs=1e-5)
    assert float((loss * steps.alive.shape[1]).square().mean()) == pytest.approx(1.0, rel=0.05)


def test_steps_stay_in_the_region():
    dataset = treated()
    agent = OGSRL(seed=0, device="cpu", **{**SMALL, "horizon": 20, "n_episodes": 32})
    seen = []

    def watch(local, _):
        seen.append({key: float(value) for key, value in agent._latest.items()})
        return True

    original = agent.update
    agent.update = lambda draw, number: agent.__dict__.__setitem__("_latest", original(draw, number)) or agent._latest
    agent.learn_offline(dataset, 15, watch)
    assert max(info["trust_region"] for info in seen) <= agent.kl
    assert np.mean([info["accepted"] for info in seen]) > 0.8


@pytest.mark.parametrize("method", ["dual", "lagrangian"])
def test_unsafe_costs_fall(method):
    """With a limit of 0 J_C falls, from every first state of the data."""
    dataset = treated(200, limit=0.4)
    kwargs = {"guarded": False, "horizon": 20, "policy_kwargs": {"net_arch": [32]}, "method": method, "multiplier_rate": 1.0}
    agent = OGSRL(seed=0, device="cpu", cost_limits=0.0, **kwargs)

    def cost():
        agent._take_data(OfflineData(dataset))
        starts = agent._data["observations"][None]
        th.manual_seed(5)
        return float(agent.expected(agent.imagine(starts))[0, 1])

    agent.learn_offline(dataset, 1)
    before = cost()
    agent.learn_offline(dataset, 20, reset_num_timesteps=False)
    assert cost() < 0.7 * before


def test_without_limits_the_lagrangian_is_trpo_bit_for_bit():
    kwargs = {"method": "lagrangian", **SMALL}
    free, trpo = (OGSRL(seed=0, device="cpu", cost_limits=math.inf, ood_limit=math.inf, **kwargs) for _ in range(2))

    def plain_step(product, gradients, excess):
        solved = conjugate_gradient(product, gradients[:1], trpo.cg_iterations)[0]
        step = -solved * (2.0 * trpo.kl / (gradients[0] * solved).sum(1, keepdim=True)).sqrt()
        return step, th.tensor([[1.0, 0.0, 0.0]]), th.tensor([False])

    trpo._solve = plain_step
    for agent in (free, trpo):
        agent.learn_offline(random_dataset(), 4)
    assert difference(everything(free), everything(trpo)) == 0.0
    assert float(free.policy.nu.abs().max()) == 0.0


@pytest.mark.parametrize(("excess", "expected"), [(0.5, 0.25), (0.0, 0.2), (-0.5, 0.15), (-9.0, 0.0), (1e9, 100.0)])
def test_multipliers(excess, expected):
    agent = prepared(method="lagrangian")
    agent.policy.nu.fill_(0.2)
    gradients = th.randn(3, *agent.policy.actor.flat().shape)
    agent._solve(lambda v: v, gradients, th.full((1, 2), excess))
    assert agent.policy.nu.tolist() == [pytest.approx([expected] * 2)]


def test_the_step_of_the_lagrangian_fills_the_region():
    agent = prepared(method="lagrangian")
    gradients = th.randn(3, *agent.policy.actor.flat().shape)
    step, weights, _ = agent._solve(lambda v: 2.0 * v, gradients, th.tensor([[1.0, 2.0]]))
    assert float(step.square().sum()) == pytest.approx(agent.kl, rel=1e-4)  # x'Fx / 2 with F = 2
    direction = gradients[0] + 0.1 * gradients[1] + 0.2 * gradients[2]
    assert float(th.cosine_similarity(step.flatten(), -direction.flatten(), dim=0)) == pytest.approx(1.0, abs=1e-5)
    assert weights.tolist() == [pytest.approx([1.0, 0.1, 0.2])]


OTHERS = [{"guardian": "polynomial", "degree": 1}, {"dynamics": "density"}, OGSRL.VARIANTS["mb-trpo"]]


@pytest.mark.parametrize("kwargs", OTHERS)
def test_other_guardians_dynamics_and_variants_learn(kwargs):
    agent = OGSRL(seed=0, device="cpu", **SMALL, **kwargs).learn_offline(treated(40), 3)
    assert agent.num_timesteps == 3


def test_without_guardian_it_is_plain_constrained_optimisation():
    """An infinite ood_limit leaves the same constraint as guarded=False, and imagines the same episodes."""
    plain, free = (prepared(**kw) for kw in ({"guarded": False}, {"ood_limit": math.inf}))
    assert plain.constraint_names == ["cost"]
    assert free.constraint_names == ["cost", "ood"]
    starts = plain._data["observations"][:8][None]
    th.manual_seed(3)
    first = plain.imagine(starts)
    free.policy.actor.load_state_dict(plain.policy.actor.state_dict())
    th.manual_seed(3)
    second = free.imagine(starts)
    assert th.equal(first.signals, second.signals[..., :2])
    assert th.equal(first.observations, second.observations)


def test_data_without_costs_are_refused_where_they_are_constraints():
    dataset = {name: value for name, value in random_dataset().items() if name != "costs"}
    agent = OGSRL(seed=0, device="cpu", **SMALL)
    with pytest.raises(DataError, match=r"no 'costs' to constrain: give some, or take constrained=False"):
        agent.learn_offline(dataset, 1)
    assert not hasattr(agent, "policy")
    OGSRL(seed=0, device="cpu", constrained=False, **SMALL).learn_offline(dataset, 1)


def test_refused_data_change_nothing():
    agent = OGSRL(seed=0, device="cpu", guardian="polynomial", degree=1, **SMALL).learn_offline(random_dataset(), 1)
    before = everything(agent)
    with pytest.raises(ValueError, match="too few for 6 monomials"):
        agent.learn_offline(random_dataset(5), 1, reset_num_timesteps=False)
    assert difference(before, everything(agent)) == 0.0


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        ({"meta": {"cost_names": ["a", "b"]}}, {}, "has 2 names and 'costs' 1 columns: name each column"),
        ({}, {"cost_limits": [1.0, 2.0]}, "cost_limits has 2 numbers and 'costs' 1 columns: give one a column"),
        ({"costs": -np.ones(600, np.float32)}, {}, "'costs' is negative in row 0: costs are 0 or more"),
    ],
)
def test_costs_that_are_refused(change, arguments, sentence):
    agent = OGSRL(seed=0, device="cpu", **SMALL, **arguments)
    with pytest.raises(DataError, match=sentence):
        agent.learn_offline(random_dataset() | change, 1)
    assert not hasattr(agent, "policy")


def test_infinite_limits_are_logged_as_none():
    agent = OGSRL(seed=0, device="cpu", ood_limit=math.inf, **SMALL).learn_offline(random_dataset(), 2, log_interval=1)
    assert agent.num_timesteps == 2


def test_a_step_back_to_a_constraint_may_cost_reward():
    """Reward and cost rise together, one step: the best is at the limit, and policies above it come back."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.0, 1.0, (2000, 1)).astype(np.float32)
    states = rng.uniform(-1.0, 1.0, (2000, 1)).astype(np.float32)
    dataset = {
        "observations": states, "next_observations": states, "actions": actions, "rewards": actions[:, 0],
        "costs": (actions[:, 0] > 0.0).astype(np.float32), "terminals": np.ones(2000, bool),
    }  # fmt: skip
    kwargs = {"guarded": False, "horizon": 1, "n_episodes": 256, "cost_limits": 0.3, "policy_kwargs": {"net_arch": [16]}}
    agent, seen = OGSRL(seed=0, device="cpu", **kwargs), []
    original = agent.update

    def watched(draw, number):
        info = original(draw, number)
        seen.append((float(info["accepted"]), float(info["imagined/cost"])))
        return info

    agent.update = watched
    agent.learn_offline(dataset, 40)
    accepted, costs = np.array(seen[-20:]).T
    assert accepted.mean() > 0.9
    assert costs.mean() == pytest.approx(0.3, abs=0.05)


def test_another_number_of_costs_is_refused():
    agent = OGSRL(seed=0, device="cpu", **SMALL).learn_offline(random_dataset(), 1)
    with pytest.raises(DataError, match=r"constraints are \['cost_0', 'cost_1', 'ood'\], and the agent's \['cost', 'ood'\]"):
        agent.learn_offline(random_dataset() | {"costs": np.ones((600, 2), np.float32)}, 1)


# ---------------------------------------------------------------------- CQL


def test_penalty_of_equal_values_is_the_logarithm_of_their_number():
    agent = CQL(seed=0, device="cpu").learn_offline(random_dataset(), 1)
    for parameter in agent.policy.critic.parameters():
        parameter.data.zero_()
    agent.policy.critic.networks[-1].bias.data.fill_(0.7)
    observations = th.randn(1, 5, 3)
    candidates = agent.candidates(observations)
    assert candidates.shape == (1, 5, 24, 2)
    assert float(candidates.abs().max()) <= 1.0
    penalty = agent.penalty(observations, candidates, th.full((1, 5), 0.7))
    assert penalty[0].tolist() == pytest.approx([math.log(24.0)] * 5, abs=1e-5)
    assert math.log(24.0) == pytest.approx(3.178, abs=5e-4)


def test_penalty_of_the_datas_own_action_alone_is_nothing():
    """Neither a value nor a gradient."""
    agent = CQL(seed=0, device="cpu").learn_offline(random_dataset(), 1)
    agent.policy.zero_grad()
    observations, actions = th.randn(1, 5, 3), th.rand(1, 5, 2)
    q = agent.policy.critic(observations, actions)[:, 0]
    penalty = agent.penalty(observations, actions.unsqueeze(2), q)
    penalty.sum().backward()
    assert float(penalty.abs().max()) < 1e-6
    assert max(float(p.grad.abs().max()) for p in agent.policy.critic.parameters()) < 1e-6


def test_guarded_targets():
    agent = CQL(seed=0, device="cpu", guarded=True)
    data = OfflineData(random_dataset())
    agent._take_data(data)
    rows = {name: values[None, :64] for name, values in agent._data.items()}
    inside = agent.target(rows)
    agent._guardian.threshold = 1e9  # everything is outside
    outside = agent.target(rows)
    returns = data.per_episode(data.rewards)
    expected = rows["rewards"] + 0.99 * rows["going_on"] * float(2.0 * returns.min() - returns.max())
    assert th.allclose(outside, expected)
    assert not th.allclose(inside, outside)


def test_resampled_episodes_are_balanced_and_kept_once():
    """Nine of ten episodes have the doses (-1, -1): the tenth's kind is drawn as often, but each episode at most once."""
    dataset = random_dataset(2000)
    rare = np.arange(100) % 10 == 0
    dataset["actions"] = np.where(np.repeat(rare, 20)[:, None], 0.9, -0.9).astype(np.float32) * np.ones((1, 2), np.float32)
    agent = CQL(seed=0, device="cpu", resampled=True)
    kept = agent.resample(OfflineData(dataset)).numpy()
    assert kept[rare].all()
    assert 20 < kept[~rare].sum() < 50  # 50 draws of 90, with replacement
