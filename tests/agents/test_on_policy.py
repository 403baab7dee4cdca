"""The on-policy engine: SB3's buffers and wrappers are the oracles, a plain loop is the reference."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.kit.worlds import Broken, Identity
from tether.agents import MDPO
from tether.agents.common.advantages import discounted_sum, generalized_advantage
from tether.agents.common.finite import NonFiniteError, check_finite, check_finite_info
from tether.agents.common.normalization import RewardScaler, RunningMoments
from tether.agents.common.threads import threads_for


def advantages_of(rewards, values, dones, gamma, gae_lambda):
    tensors = (th.as_tensor(x) for x in (rewards, values, dones))
    return generalized_advantage(*tensors, gamma, gae_lambda).numpy()


def test_advantages_by_hand():
    """Two steps, no end: delta_1 = 1 + .9 * 3 - 2, delta_0 = 1 + .9 * 2 - 1, A_0 = delta_0 + .9 * .5 * delta_1."""
    rewards = np.ones((2, 1), np.float32)
    values = np.array([[1.0], [2.0], [3.0]], np.float32)
    dones = np.zeros((2, 1), bool)
    assert advantages_of(rewards, values, dones, 0.9, 0.5).ravel() == pytest.approx([1.8 + 0.45 * 1.7, 1.7])
    dones[0] = True  # V of the next episode must not leak into this one
    assert advantages_of(rewards, values, dones, 0.9, 0.5).ravel() == pytest.approx([0.0, 1.7])


@pytest.mark.parametrize("t", [1, 2, 3, 37, 64])
def test_scan_equals_the_plain_loop(t):
    """y_t = x_t + c_t y_{t+1}, for lengths that are powers of two and others, in double precision."""
    rng = np.random.default_rng(t)
    x, c = rng.normal(size=(t, 3)), rng.uniform(0.0, 1.1, (t, 3)) * (rng.random((t, 3)) > 0.1)
    expected, running = np.empty_like(x), np.zeros(3)
    for i in reversed(range(t)):
        running = x[i] + c[i] * running
        expected[i] = running
    assert discounted_sum(th.as_tensor(x), th.as_tensor(c)).numpy() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("t", [40, 2048])
def test_advantages_equal_sb3s(t):
    rng = np.random.default_rng(0)
    n = 3
    rewards, values = rng.normal(size=(t, n)).astype(np.float32), rng.normal(size=(t + 1, n)).astype(np.float32)
    dones = rng.random((t, n)) < 0.15
    space = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(t, space, space, device="cpu", gae_lambda=0.95, gamma=0.99, n_envs=n)
    starts = np.vstack([np.ones((1, n), bool), dones[:-1]])
    for i in range(t):
        zeros = np.zeros((n, 1), np.float32)
        buffer.add(zeros, zeros, rewards[i], starts[i], th.as_tensor(values[i]), th.zeros(n))
    buffer.compute_returns_and_advantage(th.as_tensor(values[-1]), dones[-1])
    assert advantages_of(rewards, values, dones, 0.99, 0.95) == pytest.approx(buffer.advantages, abs=1e-5)


def test_moments_equal_sb3s():
    rng = np.random.default_rng(1)
    ours, oracle = RunningMoments((3,)), RunningMeanStd(shape=(3,))
    for size in (7, 1, 50):
        batch = rng.normal(5.0, [0.1, 2.0, 30.0], size=(size, 3))
        ours.update(th.as_tensor(batch))
        oracle.update(batch)
    assert ours.mean.numpy() == pytest.approx(oracle.mean, rel=1e-12)
    assert ours.var.numpy() == pytest.approx(oracle.var, rel=1e-12)
    values = rng.normal(5.0, 100.0, size=(4, 3))
    expected = np.clip((values - oracle.mean) / np.sqrt(oracle.var + 1e-8), -10, 10)
    assert ours.standardizer(10.0)(th.as_tensor(values)).numpy() == pytest.approx(expected, rel=1e-5)


def test_scaled_rewards_use_the_std_of_vecnormalizes_returns():
    """After a rollout the statistics are those VecNormalize has, and the rewards are divided by their final std."""
    rng = np.random.default_rng(2)
    rewards, dones = rng.normal(3.0, 2.0, (30, 2)).astype(np.float32), rng.random((30, 2)) < 0.1
    venv = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2), norm_obs=False, gamma=0.9)
    scaler = RewardScaler(2, 0.9)
    for start in (0, 10):  # two rollouts: the return goes on over their border
        part = slice(start, start + 10 if start == 0 else 30)
        scaled = scaler.scale(th.as_tensor(rewards[part]), th.as_tensor(dones[part])).numpy()
    for r, d in zip(rewards, dones, strict=True):
        venv._update_reward(r)
        venv.returns[d] = 0
    assert scaler.moments.var.item() == pytest.approx(float(venv.ret_rms.var), rel=1e-6)
    std = np.sqrt(venv.ret_rms.var + venv.epsilon)
    assert scaled == pytest.approx(np.clip(rewards[10:] / std, -10, 10), rel=1e-5)
    assert scaler.returns.numpy() == pytest.approx(venv.returns, rel=1e-6)


class Ramp(gym.Env):
    """Observation counts the steps; ends after ``limit`` steps, as a time limit or truly."""

    observation_space = spaces.Box(0.0, 100.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, limit: int = 4, truncate: bool = True) -> None:
        self.limit, self.truncate = limit, truncate

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        over = self.steps >= self.limit
        return np.array([self.steps], np.float32), 1.0, over and not self.truncate, over and self.truncate, {}


def rollout_of(env, **kwargs):
    kwargs = {"normalize_observations": False, "normalize_rewards": False, "gamma": 0.9, "n_steps": 128, **kwargs}
    agent = MDPO("MlpPolicy", env, seed=0, **kwargs)
    agent._setup_learn(128)
    callback = CallbackList([])
    callback.init_callback(agent)
    agent.collect_rollouts(agent.env, callback)
    return agent


def value(agent, observation):
    with th.no_grad():
        return agent.policy.predict_values(th.tensor([[float(observation)]])).item()


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("time_limits", ["correct", "paper"])
def test_bootstrapping_at_time_limits(truncate, time_limits):
    """The last step of an episode: r + gamma V(terminal) - V only where a time limit cut it and the switch says so."""
    agent = rollout_of(DummyVecEnv([lambda: Ramp(truncate=truncate)]), time_limits=time_limits)
    batch = agent._rollout_batch()
    values, advantages = (batch[key].reshape(-1, 1).numpy() for key in ("old_values", "advantages"))
    assert agent.rollout.flat_observations()[:5].flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 0.0]
    assert values[2, 0] == pytest.approx(value(agent, 2.0), abs=1e-6)
    bootstrap = 0.9 * value(agent, 4.0) if truncate and time_limits == "correct" else 0.0
    assert advantages[3, 0] == pytest.approx(1.0 + bootstrap - value(agent, 3.0), abs=1e-5)
    delta = 1.0 + 0.9 * value(agent, 3.0) - value(agent, 2.0)
    assert advantages[2, 0] == pytest.approx(delta + 0.9 * 0.95 * advantages[3, 0], abs=1e-5)


def test_rollout_equals_a_plain_loop():
    """What the engine stores against stepping the same environments by hand with the same actions."""
    env = make_vec_env("Pendulum-v1", 3, seed=5)
    agent = rollout_of(env, normalize_observations=True, gamma=0.99)
    twin = make_vec_env("Pendulum-v1", 3, seed=0)  # seeded as the agent seeded the first
    observation = twin.reset()
    for t in range(128):
        assert np.array_equal(agent.rollout.observations[t].numpy(), observation)
        actions = agent.rollout.actions[t].numpy()
        observation, rewards, dones, _ = twin.step(np.clip(actions, -2.0, 2.0))
        assert np.array_equal(agent.rollout.rewards[t], rewards)
        assert np.array_equal(agent.rollout.dones[t], dones)
    assert np.abs(agent.rollout.actions.numpy()).max() > 2.0, "stored actions are the unclipped ones"
    assert np.array_equal(agent._last_obs, observation)


def test_normalizer_moves_after_the_update_and_predict_takes_raw_observations():
    agent = MDPO("MlpPolicy", "Pendulum-v1", n_steps=256, seed=0)
    agent.learn(512)
    stored = agent.rollout.flat_observations()
    assert agent.policy.moments.count.item() == pytest.approx(512, abs=1e-3)
    by_hand = (stored - agent.policy.moments.mean) / (agent.policy.moments.var + 1e-8).sqrt()
    features, _ = agent.policy.extract_features(stored)
    assert features.numpy() == pytest.approx(by_hand.clamp(-10, 10).numpy(), rel=1e-4, abs=1e-5)
    raw = stored[:5].numpy()
    with th.no_grad():
        latent = agent.policy.mlp_extractor.forward_actor(features[:5])
        mean = agent.policy.action_net(latent).numpy()
    assert agent.predict(raw, deterministic=True)[0] == pytest.approx(np.clip(mean, -2, 2), abs=1e-5)


def test_transition_is_kept_when_a_callback_stops():
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 50

    agent = MDPO("MlpPolicy", "Pendulum-v1", n_steps=256, seed=0)
    agent.learn(512, callback=Stop())
    assert agent.num_timesteps == 50
    assert np.abs(agent.rollout.rewards[49]).max() > 0.0
    assert not agent.rollout.rewards[50:].any()


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_the_first_number_that_is_not_finite_is_named(what):
    env = DummyVecEnv([lambda: Broken(what, at=10**9), lambda: Broken(what, at=7)])
    agent = MDPO("MlpPolicy", env, n_steps=64, seed=0)
    before = [p.clone() for p in agent.policy.parameters()]
    with pytest.raises(NonFiniteError, match=f"The {what} of env 1 is (inf|nan) at step 14"):
        agent.learn(1000)
    assert all(th.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))


def test_a_terminal_observation_that_is_not_finite_is_named():
    """It is the one observation that reaches the weights only through the bootstrap."""

    class Last(Ramp):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            return (observation * np.nan if truncated else observation), reward, terminated, truncated, info

    agent = MDPO("MlpPolicy", DummyVecEnv([Ramp, Last]), n_steps=64, seed=0)
    before = [p.clone() for p in agent.policy.parameters()]
    with pytest.raises(NonFiniteError, match="The terminal observation of env 1 is nan at step 8"):
        agent.learn(1000)
    assert all(th.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))


def test_returns_of_the_reward_scaler_start_anew_with_the_environments():
    agent = MDPO("MlpPolicy", "Pendulum-v1", n_steps=150, seed=0).learn(150)
    assert agent.reward_scaler.returns.abs().max() > 0.0
    seen, scale = [], agent.reward_scaler.scale

    def watched(rewards, dones):
        seen.append(agent.reward_scaler.returns.clone())
        return scale(rewards, dones)

    agent.reward_scaler.scale = watched
    agent.learn(300)
    assert seen[0].abs().max() == 0.0
    assert seen[1].abs().max() > 0.0


def test_finite_checks():
    check_finite(np.array([1, 2]), "reward", 0)
    check_finite({"a": np.ones((2, 2))}, "observation", 0)
    with pytest.raises(NonFiniteError, match="observation 'b' of env 1"):
        check_finite({"a": np.ones((2, 2)), "b": np.array([[0.0], [np.nan]])}, "observation", 3)
    info = {"loss": th.tensor(1.0), "value_loss": th.tensor(float("nan"))}
    with pytest.raises(NonFiniteError, match="'value_loss' of the update is nan at step 9"):
        check_finite_info(info, 9)
    assert check_finite_info({"a": th.tensor(0.5)}, 0) == {"a": 0.5}


def test_threads_are_put_back():
    before = th.get_num_threads()
    th.set_num_threads(2)
    seen = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            seen.append(th.get_num_threads())
            return True

    MDPO("MlpPolicy", "CartPole-v1", n_steps=128, seed=0).learn(128, callback=Look())
    assert set(seen) == {1}
    assert th.get_num_threads() == 2
    th.set_num_threads(before)


@pytest.mark.parametrize(("width", "batch_size", "threads"), [(64, 512, 1), (256, 32, 1), (256, 256, 4), (256, 4096, 8)])
def test_threads_follow_the_work_of_a_step(width, batch_size, threads):
    before = th.get_num_threads()
    th.set_num_threads(8)
    network = th.nn.Sequential(th.nn.Linear(17, width), *(th.nn.Linear(width, width) for _ in range(4)))
    try:
        assert threads_for(network, batch_size) == threads
    finally:
        th.set_num_threads(before)


def test_costs_do_not_disturb():
    MDPO("MlpPolicy", Identity(spaces.Discrete(2), cost=True), n_steps=128, seed=0).learn(128)


def test_the_callers_policy_kwargs_are_left_alone():
    kwargs = {"net_arch": [8]}
    agent = MDPO("MlpPolicy", "CartPole-v1", n_steps=128, policy_kwargs=kwargs)
    assert kwargs == {"net_arch": [8]}
    assert agent.policy.normalize_observations
