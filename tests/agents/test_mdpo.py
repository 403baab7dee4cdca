"""MDPO against the specification's independent checks (section 10 a, d, e, g, i, j) on the real losses."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.kit.worlds import Bandit, Identity
from tether.agents import MDPO
from tether.agents.mdpo import annealed_step_size

OLD = th.tensor([0.1, 0.2, 0.3, 0.4])
Q = th.tensor([1.0, -1.0, 0.5, 0.0])


def bandit_agent(**kwargs):
    """MDPO on the bandit with pi_k = OLD: a single linear layer on the constant one-hot state."""
    agent = MDPO("MlpPolicy", Bandit(), n_steps=128, policy_kwargs={"net_arch": []}, seed=0, **kwargs)
    with th.no_grad():
        agent.policy.action_net.weight.zero_()
        agent.policy.action_net.bias.copy_(OLD.log())
    return agent


def mirror_batch(observations, actions, advantages, old, step_size):
    """What `policy_loss` reads."""
    with th.no_grad():
        return {
            "observations": observations, "actions": actions, "advantages": advantages,
            "old": old.parameters, "old_log_prob": old.log_prob(actions), "step_size": th.tensor(step_size),
        }  # fmt: skip


def exact_batch():
    """Ten samples whose action frequencies are OLD: means over them are exact expectations under pi_k."""
    actions = th.tensor([0] + [1] * 2 + [2] * 3 + [3] * 4)
    return th.zeros(10, dtype=th.long), actions, (Q - (OLD * Q).sum())[actions]


@pytest.mark.parametrize(
    ("q", "step_size", "golden"),
    [
        (1.0, 0.5, [0.153887, 0.113224, 0.359541, 0.373348]),
        (1.0, 1.0, [0.219213, 0.059334, 0.398878, 0.322575]),
        (2.0, 0.5, [0.291667, 0.0, 0.366667, 0.341667]),
    ],
)
def test_mirror_step_reaches_the_closed_form(q, step_size, golden):
    """10 a: pi_{k+1} proportional to pi_k exp(t A); 10 h: at q = 2 the Euclidean projection of pi_k + (t/2) A."""
    agent = bandit_agent(tsallis_q=q)
    observations, actions, advantages = exact_batch()
    with th.no_grad():
        old = agent.policy.get_distribution(observations)
    batch = mirror_batch(observations, actions, advantages, old, step_size)
    bias = agent.policy.action_net.bias
    optimizer = th.optim.LBFGS([bias], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = agent.policy_loss(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    # The projection's zero lies at minus infinity in the logits, which a finite optimisation only approaches.
    assert bias.detach().softmax(0).tolist() == pytest.approx(golden, abs=1e-4 if q == 1.0 else 2e-3)


@pytest.fixture
def after_rollout():
    """An agent on a continuous task whose first rollout is collected, and the pieces of its first policy step."""
    agent = MDPO("MlpPolicy", "Pendulum-v1", n_steps=256, seed=3)
    agent._setup_learn(256)
    from stable_baselines3.common.callbacks import CallbackList

    callback = CallbackList([])
    callback.init_callback(agent)
    agent.collect_rollouts(agent.env, callback)
    batch = agent._rollout_batch()
    advantages = th.randn(256, generator=th.Generator().manual_seed(0))
    advantages = (advantages - advantages.mean()) / advantages.std(unbiased=False)
    with th.no_grad():
        old = agent.policy.distribution_at(batch["observations"])
    return agent, mirror_batch(batch["observations"], batch["actions"], advantages, old, 1.0)


def gradient(agent, loss):
    return th.cat([g.flatten() for g in th.autograd.grad(loss, agent.policy.optimizer.trained)])


@pytest.mark.parametrize("step_size", [1.0, 0.01])
def test_at_the_old_policy_the_step_is_vanilla_policy_gradient(after_rollout, step_size):
    """10 d: ratio 1, KL 0 with zero gradient, grad L = -grad mean(A log pi) = PPO's, whatever t_k."""
    agent, batch = after_rollout
    advantages, old_log_prob = batch["advantages"], batch["old_log_prob"]
    loss, info = agent.policy_loss({**batch, "step_size": th.tensor(step_size)})
    ours = gradient(agent, loss)
    assert abs(info["trust_region"].item()) < 1e-6
    log_prob = agent.policy.distribution_at(batch["observations"]).log_prob(batch["actions"])
    assert th.equal(log_prob.detach(), old_log_prob)  # the ratio is one to the last bit
    vanilla = gradient(agent, -(advantages * log_prob).mean())
    assert (ours - vanilla).abs().max() < 1e-6

    _, log_prob, _ = agent.policy.evaluate_actions(agent.rollout.flat_observations(), batch["actions"])
    ratio = th.exp(log_prob - old_log_prob)
    ppo = -th.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)).mean()
    assert (ours - gradient(agent, ppo)).abs().max() < 1e-6


def test_divergence_weighs_one_over_the_step_size(after_rollout):
    agent, batch = after_rollout
    with th.no_grad():
        for p in agent.policy.optimizer.trained:
            p.add_(0.05 * th.randn_like(p))
    (one, info), (half, _) = (agent.policy_loss({**batch, "step_size": th.tensor(t)}) for t in (1.0, 0.5))
    assert info["trust_region"].item() > 1e-3
    assert (half - one).item() == pytest.approx(info["trust_region"].item(), rel=1e-4)
    ratio = th.exp(agent.policy.distribution_at(batch["observations"]).log_prob(batch["actions"]) - batch["old_log_prob"])
    assert info["policy_gradient_loss"].item() == pytest.approx(-(ratio * batch["advantages"]).mean().item(), rel=1e-5)


def test_gradient_by_finite_differences(after_rollout, monkeypatch):
    """The whole policy loss in float64 against central differences along random directions."""
    agent, batch = after_rollout
    # SB3 casts observations to float32 on the way in: that steps aside here.
    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", lambda obs, *_, **__: obs)
    policy = agent.policy.double()
    observations, actions, advantages = (batch[key].double() for key in ("observations", "actions", "advantages"))
    parameters = policy.optimizer.trained
    with th.no_grad():
        batch = mirror_batch(observations, actions, advantages, policy.distribution_at(observations), 0.3)
        for p in parameters:
            p.add_(0.02 * th.randn_like(p))

    def loss():
        return agent.policy_loss(batch)[0]

    analytic = gradient(agent, loss())
    for seed in range(5):
        generator = th.Generator().manual_seed(seed)
        direction = [th.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        flat = th.cat([d.flatten() for d in direction])
        values = []
        for sign in (1.0, -2.0):
            with th.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(sign * 1e-6 * d)
            values.append(loss().item())
        with th.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(1e-6 * d)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((analytic @ flat).item(), rel=1e-5, abs=1e-7)


def test_schedule():
    """10 g: n = 4882: t_0 = 1.000205, t_1 = 1, t_2442 = .5, t_4882 = .000205; never zero."""
    n = int(1e7 / 2048)
    assert n == 4882
    values = [annealed_step_size(k, n) for k in (0, 1, 2442, 4882)]
    assert values == pytest.approx([1.000205, 1.0, 0.5, 0.000205], abs=5e-7)
    assert min(annealed_step_size(k, n) for k in range(n + 1)) > 0.0


def test_schedule_follows_the_training():
    """k counts rollouts from 0; where 2048 does not divide the total there are n + 1 iterations and the last t is 1/n."""
    seen = []

    class Watched(MDPO):
        def train(self):
            seen.append(self.current_step_size())
            super().train()

    Watched("MlpPolicy", "CartPole-v1", n_steps=128, seed=0).learn(128 * 4 + 1)
    assert seen == pytest.approx([1.25, 1.0, 0.75, 0.5, 0.25])
    seen.clear()
    agent = Watched("MlpPolicy", "CartPole-v1", n_steps=128, seed=0, step_size=0.3)
    agent.learn(256)
    assert seen == [0.3, 0.3]


def watch_steps(agent):
    """Counts the steps of both updates."""
    counts = {"policy": 0, "value": 0}
    for name, update in (("policy", agent.policy_update), ("value", agent.value_update)):

        def step(*args, name=name, plain=update.step):
            counts[name] += 1
            return plain(*args)

        update.step = step
    return counts


def test_update_counters():
    """10 i: m = 10 policy steps, and 5 x 16 = 80 value steps per 2048 samples; the first policy step starts at KL = 0."""
    agent = MDPO("MlpPolicy", "CartPole-v1", seed=0)
    steps, divergences, plain = watch_steps(agent), [], agent.policy_update.loss

    def watched(batch):
        loss, info = plain(batch)
        divergences.append(info["trust_region"].item())
        return loss, info

    agent.policy_update.loss = watched
    agent.learn(2048)
    assert steps == {"policy": 10, "value": 80}
    assert agent._n_updates == 10
    assert abs(divergences[0]) < 1e-7, "old and new policy must be in step at the start (specification, trap 3)"
    assert min(divergences[1:]) > 0.0


def test_policy_and_value_have_no_common_parameters():
    policy = MDPO("MlpPolicy", "Pendulum-v1", seed=0).policy
    groups = [{id(p) for p in o.trained} for o in (policy.optimizer, policy.value_optimizer)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in policy.parameters()}
    assert [o.param_groups[0]["eps"] for o in (policy.optimizer, policy.value_optimizer)] == [1e-5, 1e-8]
    with pytest.raises(ValueError, match="cannot share"):
        MDPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"share_features_extractor": True})


def test_network_is_the_papers():
    """2 x 64 tanh, orthogonal gain sqrt 2, mean head 0.01, log_std 0."""
    policy = MDPO("MlpPolicy", "Pendulum-v1", seed=0).policy
    assert [tuple(p.shape) for p in policy.mlp_extractor.policy_net.parameters()] == [(64, 3), (64,), (64, 64), (64,)]
    assert th.linalg.svdvals(policy.mlp_extractor.policy_net[2].weight.detach()).tolist() == pytest.approx(
        [np.sqrt(2)] * 64, rel=1e-5
    )
    assert policy.action_net.weight.norm().item() == pytest.approx(0.01, rel=1e-5)
    assert policy.log_std.tolist() == [0.0]


def test_value_clip():
    """10 j: within the range plain MSE; beyond it no gradient where the clipped branch is larger, else 2 (V - R) / B."""
    agent = MDPO("MlpPolicy", "Pendulum-v1", n_steps=128, seed=0)
    observations = th.randn(64, 3)
    values = agent.policy.values_at(observations)
    seen = {}
    values_fn = agent.policy.values_at

    def spied(obs):
        seen["values"] = values_fn(obs)
        seen["values"].retain_grad()
        return seen["values"]

    def value_loss(old_values, returns):
        return agent.value_loss({"observations": observations, "old_values": old_values, "returns": returns})[0]

    agent.policy.values_at = spied
    near = values.detach() + 0.1
    returns = th.randn(64)
    assert value_loss(near, returns).item() == pytest.approx((values - returns).square().mean().item(), rel=1e-6)
    # V is far above V_old. With R above V the clipped error is larger: no gradient. With R below V_old the plain one is.
    far = values.detach() - 1.0
    above, below = values.detach() + 2.0, values.detach() - 2.0
    value_loss(far, above).backward()
    assert seen["values"].grad.abs().max().item() == 0.0
    value_loss(far, below).backward()
    assert seen["values"].grad.flatten().tolist() == pytest.approx([2 * 2.0 / 64] * 64, rel=1e-4)
    agent.clip_range_vf = None
    assert value_loss(far, above).item() == pytest.approx(4.0, rel=1e-5)


def test_last_partial_value_batch_is_dropped():
    agent = MDPO("MlpPolicy", Identity(spaces.Discrete(2)), n_steps=300, seed=0)
    steps = watch_steps(agent)
    agent.learn(300)
    assert steps["value"] == 5 * (300 // 128)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"policy_steps": 0}, "policy_steps"),
        ({"tsallis_q": 2.5}, "tsallis_q"),
        ({"tsallis_q": 0.5}, "tsallis_q"),
        ({"step_size": -1.0}, "step_size"),
        ({"step_size": "linear"}, "annealed"),
        ({"time_limits": "ignore"}, "'correct' or 'paper'"),
        ({"use_sde": True}, "gSDE"),
        ({"n_steps": 0}, "n_steps"),
        ({"n_steps": 64}, "value_batch_size"),
    ],
)
def test_bad_arguments_are_refused_in_words(kwargs, words):
    with pytest.raises(ValueError, match=words):
        MDPO("MlpPolicy", "CartPole-v1", **kwargs)


def test_foreign_policy_is_refused_in_words():
    from stable_baselines3.common.policies import ActorCriticPolicy

    with pytest.raises(ValueError, match="MlpPolicy, CnnPolicy, MultiInputPolicy"):
        MDPO(ActorCriticPolicy, "CartPole-v1")


def test_logged_trust_region_stays_near_its_bound():
    """The divergence after m steps lies below t_k times the surrogate gain: the mirror step improved its objective."""
    agent = MDPO("MlpPolicy", DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 4), n_steps=512, seed=0)
    agent.learn(2048 * 3, log_interval=None)
    logged = agent.logger.name_to_value
    assert 0.0 < logged["train/trust_region"] < logged["train/trust_region_bound"]
