"""Off-policy MDPO against the specification's independent checks (section 10 b, c, f, i) on the real losses."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy.stats import norm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from torch import nn

from tests.kit.worlds import Bandit, Identity
from tether.agents import OffPolicyMDPO
from tether.agents.off_policy_mdpo.off_policy_mdpo import floored_log_q, squashed_log_density

OLD = th.tensor([0.1, 0.2, 0.3, 0.4])
Q = th.tensor([1.0, -1.0, 0.5, 0.0])


def discrete_agent(**kwargs):
    """One state, four arms: critics that say Q, an anchor that is OLD, a linear actor that starts there."""
    agent = OffPolicyMDPO(
        "MlpPolicy", Bandit(), buffer_size=100, policy_kwargs={"net_arch": []}, seed=0, device="cpu", **kwargs
    )
    with th.no_grad():
        for network in agent.critic.networks:
            network[0].weight.zero_()
            network[0].bias.copy_(Q)
        for actor in (agent.actor, agent.policy.anchor):
            actor.network[0].weight.zero_()
            actor.network[0].bias.copy_(OLD.log())
    return agent


def minimise(agent, parameters, loss):
    optimizer = th.optim.LBFGS(parameters, max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


@pytest.mark.parametrize(
    ("step_size", "ent_coef", "golden"),
    [
        (0.5, 0.2, [0.169725, 0.116514, 0.355290, 0.358471]),
        (5.0, 0.2, [0.918385, 0.000042, 0.075386, 0.006188]),
        (0.5, 0.0, [0.153887, 0.113224, 0.359541, 0.373348]),
    ],
)
def test_soft_mirror_step_reaches_the_closed_form(step_size, ent_coef, golden):
    """10 b: pi_{k+1} proportional to pi_k^(1 - lambda t) exp(t Q); at lambda t = 1 softmax(Q / lambda), whatever pi_k."""
    agent = discrete_agent(step_size=step_size, ent_coef=ent_coef)
    state = th.zeros(1, 1, dtype=th.long)
    bias = agent.actor.network[0].bias
    minimise(agent, [bias], lambda: agent.actor_loss(state)[0])
    assert bias.detach().softmax(0).tolist() == pytest.approx(golden, abs=1e-4)


def test_tsallis_mirror_step_is_the_projection_on_the_simplex():
    """10 h, q = 2, lambda = 0: Euclidean projection of pi_k + (t/2) A = [.291667 0 .366667 .341667]."""
    agent = discrete_agent(step_size=0.5, ent_coef=0.0, tsallis_q=2.0)
    state = th.zeros(1, 1, dtype=th.long)
    bias = agent.actor.network[0].bias
    minimise(agent, [bias], lambda: agent.actor_loss(state)[0])
    assert bias.detach().softmax(0).tolist() == pytest.approx([0.291667, 0.0, 0.366667, 0.341667], abs=2e-3)


def test_discrete_value_target():
    """y_V = sum_a pi (min(Q1, Q2) - lambda log pi), of the actor before its step."""
    agent = discrete_agent(ent_coef=0.2)
    with th.no_grad():
        agent.critic.networks[1][0].bias.copy_(Q + th.tensor([-0.5, 0.5, 0.0, 0.3]))
    _, target, _ = agent.actor_loss(th.zeros(1, 1, dtype=th.long))
    expected = (OLD * (th.tensor([0.5, -1.0, 0.5, 0.0]) - 0.2 * OLD.log())).sum()
    assert target.shape == (1,)
    assert target.item() == pytest.approx(expected.item(), rel=1e-5)


class QuadraticCritic(nn.Module):
    """Q(u) = -(h/2)(u - a0)^2 of the action before the tanh, minus lambda log|da/du|: the squashed problem then has the
    optimum of the unsquashed one, because the Jacobian's weight in the loss is c + (lambda - c) = lambda."""

    def __init__(self, ent_coef: float, h: float = 2.0, a0: float = 1.0) -> None:
        super().__init__()
        self.ent_coef, self.h, self.a0 = ent_coef, h, a0

    def forward(self, _, actions, first=False):
        actions = actions.clamp(-1 + 1e-7, 1 - 1e-7)
        log_jacobian = (1.0 - actions.square() + 1e-6).log()
        q = -0.5 * self.h * (actions.atanh() - self.a0).square() - self.ent_coef * log_jacobian
        return [q] if first else [q, q]


@pytest.mark.parametrize(
    ("step_size", "ent_coef", "mean", "std"), [(1.0, 0.0, 0.533333, 0.408248), (1.25, 0.2, 0.618182, 0.426401)]
)
def test_gaussian_closed_form(step_size, ent_coef, mean, std):
    """10 c: pi_k = N(.3, .5^2), h = 2, a0 = 1: precision (1 - lambda t)/s_k^2 + t h, mean as given."""
    env = Identity(spaces.Box(-1.0, 1.0, (1,), np.float32))
    agent = OffPolicyMDPO(
        "MlpPolicy", env, buffer_size=100, policy_kwargs={"net_arch": []}, seed=0, device="cpu",
        step_size=step_size, ent_coef=ent_coef, regularization=0.0,
    )  # fmt: skip
    agent.critic = QuadraticCritic(ent_coef)
    for actor in (agent.actor, agent.policy.anchor):
        with th.no_grad():
            actor.network[0].weight.zero_()
            actor.network[0].bias.copy_(th.tensor([0.3, math.log(0.5)]))
    bias = agent.actor.network[0].bias
    states = th.zeros(20_000, 1)

    def loss():  # the same normal numbers at every evaluation: a fixed sample of the expectation
        th.manual_seed(7)
        return agent.actor_loss(states)[0]

    minimise(agent, [bias], loss)
    # 20,000 samples leave a standard error of about 0.004.
    assert bias[0].item() == pytest.approx(mean, abs=0.015)
    assert bias[1].exp().item() == pytest.approx(std, abs=0.015)


@pytest.fixture
def box_agent():
    def make(**kwargs):
        return OffPolicyMDPO(
            "MlpPolicy", "Pendulum-v1", buffer_size=1000, seed=0, device="cpu", policy_kwargs={"net_arch": [32]}, **kwargs
        )

    return make


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_at_the_sac_limit_the_anchor_does_not_matter(box_agent, q):
    """10 f: c = lambda makes the loss independent of pi_k, for every q."""
    agent = box_agent(step_size=5.0, ent_coef=0.2, tsallis_q=q)
    states = th.randn(64, 3)
    losses = []
    for _ in range(2):
        th.manual_seed(1)
        losses.append(agent.actor_loss(states)[0].item())
        with th.no_grad():
            for p in agent.policy.anchor.parameters():
                p.add_(th.randn_like(p))
    assert losses[0] == losses[1]
    agent.step_size = 1.0
    th.manual_seed(1)
    assert agent.actor_loss(states)[0].item() != pytest.approx(losses[0], rel=1e-3)


def test_sac_limit_is_sacs_loss(box_agent):
    """lambda log pi - Q_1 with SB3's own squashed Gaussian, on the same noise (regulariser off)."""
    from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

    agent = box_agent(step_size=5.0, ent_coef=0.2, regularization=0.0)
    states = th.randn(256, 3)
    th.manual_seed(2)
    ours = agent.actor_loss(states)[0].item()
    mean, log_std = agent.actor.mean_and_log_std(states)
    th.manual_seed(2)
    u = mean + log_std.exp() * th.randn_like(mean)
    distribution = SquashedDiagGaussianDistribution(1).proba_distribution(mean, log_std)
    log_prob = distribution.log_prob(u.tanh(), u)
    q1 = agent.critic(states, u.tanh())[0].flatten()
    assert ours == pytest.approx((0.2 * log_prob - q1).mean().item(), rel=1e-4)


def test_at_the_anchor_the_pathwise_parts_cancel(box_agent):
    """10 f: theta = theta_k, lambda = 0: what is left of the KL gradient is the score function, whose mean is zero."""
    agent = box_agent(step_size=1.0, ent_coef=0.0, regularization=0.0)
    states = th.zeros(100_000, 3)

    class Zero(nn.Module):
        def forward(self, _, actions, first=False):
            q = 0.0 * actions
            return [q, q]

    agent.critic = Zero()
    loss, _, _ = agent.actor_loss(states)
    assert abs(loss.item()) < 1e-6  # log pi - log pi_k, sample by sample
    bias = agent.actor.network[-1].bias
    (gradient,) = th.autograd.grad(loss, [bias])
    # score with respect to (mean, log_std): variance 1 / std^2 and 2; five standard errors
    std = agent.actor.mean_and_log_std(states[:1])[1].exp().item()
    assert abs(gradient[0].item()) < 5.0 / std / math.sqrt(1e5)
    assert abs(gradient[1].item()) < 5.0 * math.sqrt(2.0 / 1e5)


def test_squash_correction_cancels_in_the_divergence():
    """10 f: log pi - log pi_k has the same value with and without the tanh Jacobian, away from the floors."""
    u, mean, mean_old = th.randn(50, 2), th.randn(50, 2) * 0.3, th.randn(50, 2) * 0.3
    log_std, log_std_old = th.full((50, 2), -0.5), th.full((50, 2), -0.2)
    squashed = squashed_log_density(u, mean, log_std) - squashed_log_density(u, mean_old, log_std_old)
    plain = th.distributions.Normal(mean, log_std.exp()).log_prob(u) - th.distributions.Normal(
        mean_old, log_std_old.exp()
    ).log_prob(u)
    assert (squashed - plain).abs().max() < 1e-4


def test_density_is_that_of_the_squashed_normal():
    """Against the change of variables done by scipy."""
    u = np.linspace(-2.0, 2.0, 9)
    expected = norm(0.3, 0.7).logpdf(u) - np.log(1.0 - np.tanh(u) ** 2)
    got = squashed_log_density(th.as_tensor(u), th.tensor(0.3), th.tensor(math.log(0.7)))
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("q", [1.0, 1.4, 2.0])
def test_floor_of_the_density(q):
    """ln_{2-q}(max(x, 1e-6)): equal to the definition above the floor, constant without gradient below it."""
    x = th.tensor([1e-9, 1e-7, 1e-5, 0.3, 4.0], dtype=th.float64)
    log_x = x.log().requires_grad_()
    value = floored_log_q(log_x, q)
    floored = x.clamp(min=1e-6)
    expected = floored.log() if q == 1.0 else (floored.pow(q - 1.0) - 1.0) / (q - 1.0)
    assert value.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    (gradient,) = th.autograd.grad(value.sum(), log_x)
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert (gradient[2:] > 0).all()


def test_gradients_stop_where_they_must(box_agent):
    """The actor step leaves critics, value and anchor without gradient; the critic step leaves the actor."""
    agent = box_agent()
    agent.learning_starts = 50
    agent.learn(60)
    states = th.randn(16, 3)
    agent.policy.zero_grad()
    loss, target, _ = agent.actor_loss(states)
    assert not target.requires_grad
    loss.backward()
    assert all(p.grad is not None for p in agent.actor.parameters())
    others = [*agent.critic.parameters(), *agent.policy.value.parameters(), *agent.policy.anchor.parameters()]
    assert all(p.grad is None for p in others)
    agent.policy.zero_grad()
    replay = agent.replay_buffer.sample(16)
    loss, _ = agent.critic_loss(replay, th.zeros(16))
    loss.backward()
    assert all(p.grad is None for p in [*agent.actor.parameters(), *agent.policy.value_target.parameters()])
    assert all(p.grad is not None for p in [*agent.critic.parameters(), *agent.policy.value.parameters()])


def test_critic_loss_by_hand(box_agent):
    """.5 mean (Q1 - y)^2 + .5 mean (Q2 - y)^2 + .5 mean (V - y_V)^2, y = r + (1 - term) gamma V_target(s')."""
    agent = box_agent()
    agent.learning_starts = 50
    agent.learn(60)
    replay = agent.replay_buffer.sample(32)
    value_target = th.randn(32)
    loss, _ = agent.critic_loss(replay, value_target)
    with th.no_grad():
        following = agent.policy.value_target(replay.next_observations)[0].flatten()
        y = replay.rewards.flatten() + (1 - replay.dones.flatten()) * 0.99 * following
        q1, q2 = (q.flatten() for q in agent.critic(replay.observations, replay.actions))
        v = agent.policy.value(replay.observations)[0].flatten()
        expected = 0.5 * ((q1 - y) ** 2).mean() + 0.5 * ((q2 - y) ** 2).mean() + 0.5 * ((v - value_target) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_time_limits_bootstrap_and_ends_do_not():
    """The replay buffer's ``dones`` are terminations alone: Pendulum's cuts at 200 steps are not among them."""
    agent = OffPolicyMDPO("MlpPolicy", "Pendulum-v1", buffer_size=1000, learning_starts=1000, seed=0, device="cpu")
    agent.learn(450)
    assert agent.replay_buffer.sample(400).dones.sum().item() == 0.0
    agent = OffPolicyMDPO("MlpPolicy", "CartPole-v1", buffer_size=1000, learning_starts=1000, seed=0, device="cpu")
    agent.learn(450)
    assert agent.replay_buffer.sample(400).dones.sum().item() > 0.0


def test_anchor_moves_only_when_its_period_passes(box_agent):
    """10 i: at the end of env steps (counted from 0) that m divides, after the gradient step."""
    agent = box_agent(learning_starts=5, anchor_interval=10)
    synced = []
    sync = agent.policy.sync_anchor

    def spied():
        sync()
        synced.append(agent.num_timesteps - 1)
        same = zip(agent.actor.parameters(), agent.policy.anchor.parameters(), strict=True)
        assert all(th.equal(a, b) for a, b in same)

    agent.policy.sync_anchor = spied
    agent.learn(45)
    assert synced == [10, 20, 30, 40]
    different = zip(agent.actor.parameters(), agent.policy.anchor.parameters(), strict=True)
    assert any(not th.equal(a, b) for a, b in different)


def test_actions_are_stored_normalised():
    """Specification, trap 16: warm-up and policy actions share one scale, [-1, 1], whatever the Box."""
    agent = OffPolicyMDPO("MlpPolicy", "Pendulum-v1", buffer_size=200, learning_starts=60, seed=0, device="cpu")
    agent.learn(120)
    assert agent.env.action_space.high.item() == 2.0
    stored = agent.replay_buffer.actions[:120]
    assert np.abs(stored).max() <= 1.0
    assert np.abs(stored[:60]).max() > 0.8


def test_deterministic_behaviour():
    agent = OffPolicyMDPO("MlpPolicy", "Pendulum-v1", learning_starts=10, seed=0, device="cpu", buffer_size=100,
                          behaviour="deterministic")  # fmt: skip
    agent.learn(20)
    actions = [agent._sample_action(10)[0] for _ in range(3)]
    assert all(np.array_equal(actions[0], a) for a in actions[1:])
    agent.behaviour = "stochastic"
    assert not np.array_equal(agent._sample_action(10)[0], agent._sample_action(10)[0])


def test_trust_region_of_a_minimiser_is_below_its_bound():
    """D <= t (E_pi f - E_k f) for any policy whose loss is below the anchor's; here the exact minimiser."""
    agent = discrete_agent(step_size=0.5, ent_coef=0.2)
    state = th.zeros(1, 1, dtype=th.long)
    zero = agent.trust_region(state)
    assert abs(zero["trust_region"].item()) < 1e-7
    bias = agent.actor.network[0].bias
    minimise(agent, [bias], lambda: agent.actor_loss(state)[0])
    after = agent.trust_region(state)
    p = bias.detach().softmax(0)
    assert after["trust_region"].item() == pytest.approx((p * (p.log() - OLD.log())).sum().item(), rel=1e-4)
    assert 0.0 < after["trust_region"].item() < after["trust_region_bound"].item()


def test_networks_are_the_papers():
    policy = OffPolicyMDPO("MlpPolicy", gym.make("Pendulum-v1"), device="cpu", buffer_size=10).policy
    shapes = [tuple(p.shape) for p in policy.actor.parameters()]
    assert shapes == [(256, 3), (256,), (256, 256), (256,), (2, 256), (2,)]
    first = policy.actor.network[0].weight
    assert first.abs().max().item() <= math.sqrt(6.0 / (256 + 3)) + 1e-6
    assert all(p.abs().max() == 0 for n, p in policy.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"step_size": 10.0, "ent_coef": 0.2}, "step_size \\* ent_coef <= 1"),
        ({"tsallis_q": 3.0}, "tsallis_q"),
        ({"behaviour": "greedy"}, "behaviour"),
        ({"use_sde": True}, "gSDE"),
    ],
)
def test_bad_arguments_are_refused_in_words(kwargs, words):
    with pytest.raises(ValueError, match=words):
        OffPolicyMDPO("MlpPolicy", "Pendulum-v1", buffer_size=10, **kwargs)


def test_normalisation_below_a_frame_stack_is_refused():
    """The replay memory would hold what the normalisation saw, unstacked."""
    env = VecFrameStack(VecNormalize(make_vec_env("Pendulum-v1", 1)), 2)
    with pytest.raises(ValueError, match="put it outermost, as in VecNormalize"):
        OffPolicyMDPO("MlpPolicy", env, buffer_size=10)
    OffPolicyMDPO("MlpPolicy", VecNormalize(VecFrameStack(make_vec_env("Pendulum-v1", 1), 2)), buffer_size=10)


def test_unsupported_actions_are_refused():
    with pytest.raises(AssertionError, match="MultiDiscrete"):
        OffPolicyMDPO("MlpPolicy", Identity(spaces.MultiDiscrete([2, 2])), buffer_size=10)
