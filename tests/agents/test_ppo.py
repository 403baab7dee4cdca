"""PPO on the engine against SB3's: one update from the same weights on the same rollout gives the same weights."""

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from tests.kit.rollouts import collected
from tether.agents import PPO


def both(**kwargs):
    """Ours after its first rollout, and SB3's agent with equal weights and the same rollout in its buffer."""
    arguments = {"n_steps": 64, "batch_size": 64, "n_epochs": 3, "seed": 0, "device": "cpu", **kwargs}
    ours = PPO("MlpPolicy", make_vec_env("Pendulum-v1", 4, seed=0), **arguments)
    theirs = sb3.PPO("MlpPolicy", make_vec_env("Pendulum-v1", 4, seed=0), **arguments)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    batch = collected(ours, 256)
    theirs._setup_learn(256)
    buffer = theirs.rollout_buffer
    buffer.reset()
    buffer.observations[:] = ours.rollout.observations.numpy()
    buffer.actions[:] = ours.rollout.actions.numpy()
    buffer.rewards[:] = ours.rollout.rewards
    buffer.episode_starts[:] = np.vstack([np.ones((1, 4)), ours.rollout.dones[:-1]])
    buffer.values[:] = batch["old_values"].reshape(64, 4).numpy()
    buffer.log_probs[:] = batch["old_log_prob"].reshape(64, 4).numpy()
    with th.no_grad():
        last = theirs.policy.predict_values(th.as_tensor(ours._last_obs)).flatten()
    buffer.compute_returns_and_advantage(last, ours.rollout.dones[-1])
    buffer.full = True
    return ours, theirs, batch


def in_order(n):
    """The order in which SB3's buffer (environment by environment) must be read to give our (step by step) rows."""
    return np.arange(n).reshape(4, 64).T.ravel()


def test_the_rollout_is_valued_as_sb3s():
    _, theirs, batch = both()
    assert batch["advantages"].reshape(64, 4).numpy() == pytest.approx(theirs.rollout_buffer.advantages, abs=2e-4)
    assert batch["returns"].reshape(64, 4).numpy() == pytest.approx(theirs.rollout_buffer.returns, abs=2e-4)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"ent_coef": 0.01, "clip_range_vf": 0.1}, {"normalize_advantage": False, "clip_range": 0.05, "vf_coef": 1.0}],
)
def test_an_update_equals_sb3s(kwargs, monkeypatch):
    """Three epochs of four minibatches with the order of samples fixed: weights agree to 1e-5, and they moved by 1e-3."""
    ours, theirs, batch = both(**kwargs)
    generator = np.random.default_rng(3)
    orders = [generator.permutation(256) for _ in range(3)]
    ours_orders, their_orders = iter(orders), iter(orders)
    monkeypatch.setattr(th, "randperm", lambda n, device=None: th.as_tensor(next(ours_orders)))
    monkeypatch.setattr(np.random, "permutation", lambda n: in_order(n)[next(their_orders)])
    before = [p.clone() for p in ours.policy.parameters()]
    info = ours.update.run(batch, 3)
    theirs.train()
    moved = max((a - b).abs().max().item() for a, b in zip(before, ours.policy.parameters(), strict=True))
    assert moved > 1e-3
    for (name, a), b in zip(ours.policy.named_parameters(), theirs.policy.parameters(), strict=True):
        assert (a - b).abs().max().item() < 1e-5, name
    logged = theirs.logger.name_to_value
    assert info["policy_gradient_loss"].item() == pytest.approx(logged["train/policy_gradient_loss"], abs=1e-5)
    assert info["value_loss"].item() == pytest.approx(logged["train/value_loss"], rel=1e-4)


def test_target_kl_ends_the_update():
    agent = PPO("MlpPolicy", "Pendulum-v1", n_steps=256, n_epochs=50, learning_rate=3e-3, target_kl=0.01, seed=0)
    epochs = []
    after = agent.after_epoch
    agent.after_epoch = lambda batch, info: epochs.append(1) or after(batch, info)
    agent.learn(256)
    assert 1 <= len(epochs) == agent._n_updates < 50


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"clip_range": 0.0}, "clip_range must be positive"),
        ({"clip_range_vf": -1.0}, "clip_range_vf must be positive"),
        ({"target_kl": 0.0}, "target_kl must be positive"),
        ({"n_steps": 100}, "does not divide the rollout"),
    ],
)
def test_bad_arguments_are_refused_in_words(kwargs, words):
    with pytest.raises(ValueError, match=words):
        PPO("MlpPolicy", "CartPole-v1", **kwargs)
