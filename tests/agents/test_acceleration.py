"""Epochs and offline updates as CUDA graphs: the same weights as plain calls. Needs a GPU."""

import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from tests.kit.offline import SUBJECTS as OFFLINE
from tests.kit.offline import pendulum_dataset, random_dataset
from tests.kit.resume import difference, everything
from tests.kit.rollouts import collected
from tests.kit.worlds import Pictures
from tether.agents import BPO, GIRL, MDPO, PPO, R2VPO
from tether.agents.common.offline_to_online import OfflineToOnlineAgent

ONLINE = [subject for subject in OFFLINE if issubclass(subject.cls, OfflineToOnlineAgent)]
pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device to capture a graph")


@pytest.mark.parametrize("cls", [PPO, BPO, R2VPO])
def test_a_captured_epoch_gives_the_weights_of_plain_calls(cls):
    """Eight epochs (three to warm up, one captured, four replayed) against eight plain ones, on the GPU."""
    agents = [cls("MlpPolicy", "Pendulum-v1", n_steps=256, seed=0, device="cuda") for _ in range(2)]
    batch = {key: value.to("cuda") for key, value in collected(agents[0], 256).items()}
    agents[1].update._epoch = agents[1].update.epoch
    for agent in agents:
        th.manual_seed(0)
        agent.update.run(batch, 8)
    for a, b in zip(agents[0].policy.parameters(), agents[1].policy.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_schedules_reach_the_graph():
    """A learning rate annealed to nothing stops the weights, though the graph was captured with another."""
    agent = PPO("MlpPolicy", "Pendulum-v1", n_steps=256, seed=0, device="cuda", learning_rate=lambda progress: 1e-3 * progress)
    agent.learn(256 * 4)
    before = [p.clone() for p in agent.policy.parameters()]
    agent._current_progress_remaining = 0.0
    agent.train()
    assert all(th.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))


@pytest.mark.parametrize("cls", [PPO, BPO, R2VPO, MDPO])
def test_training_on_the_gpu(cls):
    agent = cls("MlpPolicy", "CartPole-v1", n_steps=256, seed=0, device="cuda").learn(256 * 6)
    assert all(th.isfinite(p).all() for p in agent.policy.parameters())


@pytest.mark.parametrize("subject", OFFLINE, ids=lambda s: s.name)
def test_captured_offline_updates_give_the_weights_of_plain_ones(subject):
    """Eight calls of ten updates, three to warm up, one captured, four replayed, random draws included."""
    weights = []
    for captured in (True, False):
        agent = subject.make(device="cuda", seeds=2)
        if not captured:
            agent._updates = lambda steps, agent=agent: [agent.update(agent._draw, i) for i in range(steps)][-1]
        agent.learn_offline(random_dataset(), 80)
        weights.append(everything(agent))
        assert agent.num_timesteps == 80
    assert difference(*weights) < 1e-4


@pytest.mark.parametrize(("distill", "latent"), [(False, "categorical"), (True, "categorical"), (False, "gaussian")])
def test_captured_updates_of_a_world_model_give_the_losses_of_plain_ones(distill, latent):
    """Every second update also trains the ensemble, every third the student: each kind is a graph of its own."""
    env, policy = (Pictures(), "CnnPolicy") if distill else ("Pendulum-v1", "MlpPolicy")
    told = []
    for captured in (True, False):
        agent = GIRL(
            policy, env, batch_size=4, batch_length=8, horizon=3, learning_starts=40, train_ratio=1e-6, pretrain_updates=0,
            encoder_updates=5, precision="float32", seed=0, device="cuda", policy_kwargs={"size": "small", "latent": latent},
            buffer_size=200, distill=distill, ensemble_interval=2, distill_interval=3,
        ).learn(60)  # fmt: skip
        agent._embed_waiting()
        agent.policy.set_training_mode(True)
        agent.captures = captured
        losses = []
        for _ in range(36):
            losses.append({name: float(value) for name, value in agent._one_update().items()})
            agent._n_updates += 1
        graphs = [call.graph for call in agent._graphs.values()]
        assert len(graphs) == captured * (4 if distill else 2)
        assert all(graph is not None for graph in graphs)
        told.append(losses)
    for one, other in zip(*told, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("subject", ONLINE, ids=lambda s: s.name)
def test_captured_online_updates_give_the_weights_of_plain_ones(subject):
    """One update after every env step, on a replay memory that grows under the graph."""
    weights = []
    for captured in (True, False):
        agent = subject.make(env=make_vec_env("Pendulum-v1", 1, seed=0), device="cuda", learning_starts=4)
        agent.learn_offline(pendulum_dataset(), 20)
        if not captured:
            agent._updates = lambda steps, agent=agent: [agent.update(agent._draw, i) for i in range(steps)][-1]
        agent.learn(40)
        weights.append(everything(agent))
        assert agent._n_updates == 20 + 36
    assert difference(*weights) < 1e-4
