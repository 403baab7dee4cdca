"""HyperDDQN: its target by hand on two states, the authors' switch, the histogram per action, and the networks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env

from tests.kit.worlds import Pictures
from tether.agents import HyperDDQN
from tether.agents.common.hyperbolic import HyperboloidRegression


def tiny(**kwargs):
    arguments = {"buffer_size": 500, "learning_starts": 50, "embedding_dim": 8, "seed": 0, "device": "cpu", **kwargs}
    return HyperDDQN("MlpPolicy", make_vec_env("CartPole-v1", 1, seed=0), **{"policy_kwargs": {"net_arch": [8]}, **arguments})


class Table(th.nn.Module):
    """Q-values of two states, the observation being the state's number."""

    def __init__(self, rows):
        super().__init__()
        self.rows = th.tensor(rows)

    def forward(self, observations):
        return self.rows[observations.long().flatten()]


def replay(states, rewards, next_states, dones):
    columns = (states, rewards, next_states, dones)
    observations, rewards, next_observations, dones = (th.tensor(c, dtype=th.float32).reshape(-1, 1) for c in columns)
    return SimpleNamespace(
        observations=observations, rewards=rewards, next_observations=next_observations, dones=dones,
        actions=th.zeros(len(states), 1),
    )  # fmt: skip


@pytest.mark.parametrize(("next_action", "following"), [("next", 30.0), ("current", 40.0)])
def test_target_by_hand(next_action, following):
    """From state 0 to 1 and then the end; online prefers action 1 in state 0, and action 0 in state 1."""
    agent = tiny(next_action=next_action, gamma=0.9)
    agent.q_net, agent.q_net_target = Table([[1.0, 2.0], [4.0, 3.0]]), Table([[10.0, 20.0], [30.0, 40.0]])
    samples = replay([0, 1], [1.0, 5.0], [1, 0], [0.0, 1.0])
    assert agent.target(samples).tolist() == pytest.approx([1.0 + 0.9 * following, 5.0])


def test_targets_are_clamped_to_the_histogram():
    value = tiny().q_net.q_net.value
    assert th.equal(value.probabilities(th.tensor([1e3])), value.probabilities(th.tensor([10.0])))


def test_loss_is_the_cross_entropy_of_the_taken_action():
    agent = tiny().learn(60)
    samples = agent.replay_buffer.sample(16)
    loss, info = agent.loss(samples)
    _, outputs = agent.q_net.outputs(samples.observations)
    value, target = agent.q_net.q_net.value, agent.target(samples)
    by_hand = 0.0
    for target_of_one, own, action in zip(target, outputs, samples.actions, strict=True):
        by_hand -= (value.probabilities(target_of_one[None])[0] * own[int(action)].log_softmax(-1)).sum().item() / 16
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    assert outputs.shape == (16, 2, 51)
    assert th.allclose(value.expectation(outputs), agent.q_net(samples.observations))
    assert info["embedding_norm_max"] <= agent.q_net.features_extractor.bound


def test_the_published_network():
    class Frames(Pictures):
        observation_space = spaces.Box(0, 255, (84, 84, 4), np.uint8)
        action_space = spaces.Discrete(6)

        def _frame(self):
            super()._frame()
            return np.zeros((84, 84, 4), np.uint8)

    agent = HyperDDQN("CnnPolicy", Frames(), buffer_size=10, device="cpu")
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    embedding = agent.q_net.features_extractor
    assert (count(embedding.trunk), count(embedding.last), count(embedding.gate)) == (77_984, 1_606_144, 513)
    assert [tuple(p.shape) for p in agent.q_net.q_net.parameters()] == [(306, 512), (306, 1)]
    assert isinstance(agent.q_net.q_net.head, HyperboloidRegression)
    assert embedding.bound == pytest.approx(1.8317808, rel=2e-6)
    assert agent.policy.optimizer.defaults["eps"] == 1e-5
    assert (agent.batch_size, agent.train_freq.frequency, agent.learning_starts) == (32, 4, 80_000)
    assert (agent.target_update_interval, agent.tau, agent.gamma) == (1000, 1.0, 0.99)


def test_logs_both_sides_of_the_gradient_and_the_largest_norm():
    agent = tiny(train_freq=1).learn(250)
    logged = agent.logger.name_to_value
    assert 0.0 < logged["train/embedding_norm_max"] <= logged["train/embedding_norm_bound"]
    assert logged["train/grad_norm_encoder"] > 0.0 < logged["train/grad_norm_head"]


def test_is_sb3s_dqn_in_everything_else():
    agent = tiny()
    assert isinstance(agent, DQN)
    agent.learn(400)
    assert agent.exploration_rate == pytest.approx(0.01)
    assert agent._n_updates == 88  # every fourth step after the first 50


@pytest.mark.parametrize("name", list(HyperDDQN.VARIANTS))
def test_target_network_is_copied(name):
    """Whole: with spectral norm, its singular vectors too."""
    agent = tiny(target_update_interval=100, learning_rate=1e-2, **HyperDDQN.VARIANTS[name]).learn(380)
    observations = th.randn(20, 4)
    agent.policy.set_training_mode(False)
    with th.no_grad():
        apart = (agent.q_net(observations) - agent.q_net_target(observations)).abs().max()
        while agent._n_calls % 100 != 99:
            agent._on_step()
        agent._on_step()
        together = (agent.q_net(observations) - agent.q_net_target(observations)).abs().max()
    assert together == 0.0 < apart


@pytest.mark.parametrize("name", list(HyperDDQN.VARIANTS))
def test_variants_learn_and_are_saved(name, tmp_path):
    agent = tiny(**HyperDDQN.VARIANTS[name]).learn(200)
    agent.save(tmp_path / "it")
    loaded = HyperDDQN.load(tmp_path / "it", device="cpu")
    observations = th.randn(20, 4)
    assert th.equal(agent.q_net(observations), loaded.q_net(observations))
    for other in (agent, tiny(policy_kwargs={}, **HyperDDQN.VARIANTS[name])):
        policy = type(other.policy)(**other.policy._get_constructor_parameters())
        policy.load_state_dict(other.policy.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"next_action": "s"}, "next_action must be 'next'"),
        ({"embedding_dim": 0}, "embedding_dim >= 1"),
        ({"use_sde": True}, "no state-dependent exploration"),
        ({"geometry": "flat"}, "geometry must be one of"),
    ],
)
def test_refuses_in_words(kwargs, word):
    with pytest.raises(ValueError, match=word):
        tiny(**kwargs)
