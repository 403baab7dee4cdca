"""The online phase of the offline-to-online agents: exact resume, SB3's habits, what is collected, errors in words."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.kit.offline import SUBJECTS, OneStep, one_step_tasks, pendulum_dataset, random_dataset
from tests.kit.resume import StopAt, difference, everything
from tether.agents import FMQ, CheckpointError, NonFiniteError
from tether.agents.common.offline_to_online import OfflineToOnlineAgent
from tether.envs import make_vec

ONLINE = [subject for subject in SUBJECTS if issubclass(subject.cls, OfflineToOnlineAgent)]
each = pytest.mark.parametrize("subject", ONLINE, ids=lambda s: s.name)


def pendulum(n_envs=1, seed=0):
    return make_vec("Pendulum-v1", n_envs, backend="dummy", seed=seed)


def made(subject, env, **kwargs):
    """The agent after three gradient steps on data of Pendulum."""
    return subject.make(env=env, **{"learning_starts": 4, **kwargs}).learn_offline(pendulum_dataset(), 3)


@each
@pytest.mark.parametrize("n_envs", [1, 2])
def test_training_goes_on_bit_for_bit(subject, n_envs, tmp_path):
    """Stopped in the middle of a chunk; also where the ring has begun to forget the dataset."""
    total, small = 3 + 40 * n_envs, {"buffer_size": 420}
    whole = made(subject, pendulum(n_envs), **small).learn(40 * n_envs, reset_num_timesteps=False)
    half = made(subject, pendulum(n_envs), **small)
    half.learn(40 * n_envs, StopAt(3 + 23 * n_envs), reset_num_timesteps=False)
    assert half.num_timesteps == 3 + 23 * n_envs
    half.save_checkpoint(tmp_path)
    th.manual_seed(99)  # what a new process would have instead
    np.random.seed(99)  # noqa: NPY002
    resumed = subject.cls.load_checkpoint(tmp_path, pendulum(n_envs, seed=5), device="cpu")
    resumed.learn(total - resumed.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps == total
    assert difference(everything(whole), everything(resumed)) == 0.0
    for name, values in whole.replay_buffer.arrays.items():
        assert th.equal(values, resumed.replay_buffer.arrays[name])


def test_checkpoints_of_the_offline_phase_need_no_environment(tmp_path):
    agent = ONLINE[0].make().learn_offline(random_dataset(), 2)
    agent.save_checkpoint(tmp_path)
    loaded = FMQ.load_checkpoint(tmp_path, None, device="cpu")
    assert loaded.replay_buffer is None
    online = made(ONLINE[0], pendulum()).learn(5)
    online.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="give env"):
        FMQ.load_checkpoint(tmp_path, None, device="cpu")


@each
def test_save_and_load(subject, tmp_path):
    """A model's file has no replay: it goes on with what it is given, and with what it collects."""
    agent = made(subject, pendulum()).learn(12)
    agent.save(tmp_path / "model")
    loaded = subject.cls.load(tmp_path / "model", env=pendulum())
    assert difference(everything(agent), everything(loaded)) == 0.0
    assert loaded.policy.ranking == loaded.online_ranking
    with pytest.raises(ValueError, match="has begun to learn online"):
        loaded.learn_offline(pendulum_dataset(), 1)
    assert len(loaded.replay_buffer) == 0
    loaded.fill_replay(pendulum_dataset())
    loaded.learn(6, reset_num_timesteps=False)
    assert loaded.num_timesteps == 18
    assert len(loaded.replay_buffer) == 400 + 6 - loaded.horizon + 1


def test_the_replay_holds_the_dataset_and_what_is_collected():
    agent = made(ONLINE[0], pendulum())
    data = pendulum_dataset()
    agent.learn(10)
    ring = agent.replay_buffer
    assert len(ring) == 400 + 10 - agent.horizon + 1
    assert np.array_equal(ring.arrays["observations"][:400].numpy(), data["observations"])
    own = ring.arrays["actions"][400 : len(ring)].numpy()
    assert np.array_equal(own[1:, :1], own[:-1, 1:])  # chunks overlap
    assert np.abs(own).max() <= 1.0
    agent.learn(10, reset_num_timesteps=False)
    assert len(agent.replay_buffer) == 410 + 10 - agent.horizon + 1


def test_actions_are_scaled_to_the_environment():
    class Spy(BaseCallback):
        def _on_step(self):
            actions = self.locals["actions"][0]
            chosen = self.model._plan.actions[0, self.model._plan.played[0] - 1]
            assert np.allclose(actions, 2.0 * chosen)  # Pendulum's torque
            return True

    made(ONLINE[0], pendulum()).learn(10, Spy())


class Ends(gym.Env):
    """Ends by itself after three steps, by time after five; its observations count."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes += 1
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        terminated = self.episodes % 2 == 1 and self.t == 3
        info = {"success": terminated}
        return np.array([self.t], np.float32), -1.0, terminated, self.t == 5, info


def test_ends_of_episodes():
    """Terminal steps do not bootstrap, time limits do, and nothing of the next episode is in a chunk."""
    agent = FMQ(env=Ends(), seed=0, device="cpu", horizon=2, batch_size=8, policy_kwargs={"net_arch": [8]})
    agent.learn(8)
    arrays = {name: values[:8] for name, values in agent.replay_buffer.arrays.items()}
    assert arrays["observations"][:, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert arrays["next_observations"][:, 0].tolist() == [2, 3, 3, 2, 3, 4, 5, 5]
    assert arrays["valid"][:, 1].tolist() == [1, 1, 0, 1, 1, 1, 1, 0]
    assert arrays["going_on"].tolist() == [1, 0, 0, 1, 1, 1, 1, 1]
    assert arrays["returns"].tolist() == pytest.approx([-1.99, -1.99, -1.0, -1.99, -1.99, -1.99, -1.99, -1.0])


def test_a_new_training_begins_new_episodes():
    """Nothing of an episode that was left is in a chunk of the next."""
    agent = FMQ(env=Ends(), seed=0, device="cpu", horizon=3, batch_size=8, policy_kwargs={"net_arch": [8]})
    agent.learn(4)
    agent.learn(4)
    agent.set_env(make_vec_env(Ends, 1))
    agent.learn(8, reset_num_timesteps=False)
    arrays = {name: values[: len(agent.replay_buffer)] for name, values in agent.replay_buffer.arrays.items()}
    steps = arrays["next_observations"] - arrays["observations"]
    assert th.equal(steps[:, 0], arrays["valid"].sum(1))  # the state counts the steps of its episode


def test_without_a_dataset_it_learns_from_what_it_collects():
    agent = FMQ(env=pendulum(), seed=0, device="cpu", batch_size=8, learning_starts=5, policy_kwargs={"net_arch": [8]})
    agent.learn(20)
    assert agent._n_updates == 15
    assert len(agent.replay_buffer) == 16


@each
def test_callbacks_of_sb3(subject, tmp_path):
    steps = []

    class Counter(BaseCallback):
        def _on_step(self):
            steps.append(self.num_timesteps)
            assert {"infos", "dones", "rewards", "new_obs", "actions"} <= self.locals.keys()
            return True

    evaluation = EvalCallback(
        Monitor(OneStep()), n_eval_episodes=2, eval_freq=5, verbose=0, best_model_save_path=str(tmp_path)
    )
    agent = subject.make(env=OneStep()).learn_offline(one_step_tasks(200), 2)
    agent.learn(12, [Counter(), evaluation], progress_bar=True)
    assert steps == list(range(1, 13))
    assert (tmp_path / "best_model.zip").exists()


@pytest.mark.parametrize("subject", ONLINE[:2], ids=lambda s: s.name)
def test_the_log_shows_the_trust_region(subject, tmp_path):
    agent = subject.make(env=Monitor(OneStep()), tensorboard_log=str(tmp_path), learning_starts=0)
    agent.learn_offline(one_step_tasks(200), 2, log_interval=1)
    agent.learn(8, log_interval=2, reset_num_timesteps=False)
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = {"train/trust_region", "rollout/ep_rew_mean", "train/critic_loss"}
    tags |= {"train/trust_region_bound"} if subject.cls is FMQ else set()
    assert tags <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/trust_region")] == [4, 6, 8, 10]


def test_success_is_logged(tmp_path):
    agent = FMQ(env=Monitor(Ends()), seed=0, device="cpu", batch_size=8, policy_kwargs={"net_arch": [8]})
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(33, log_interval=4)
    rows = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    assert rows["rolloutsuccess_rate"].tolist() == [0.5, 0.5]


def test_evaluation_plays_whole_chunks():
    """SB3's `evaluate_policy` hands the plan back: one call of the network in H steps."""
    agent = made(ONLINE[0], pendulum(), horizon=4)
    before = agent.policy.network_calls
    evaluate_policy(agent, make_vec_env("Pendulum-v1", 2), 2)
    assert agent.policy.network_calls - before == 2 * 50 * agent.policy.n_candidates


@each
def test_errors_in_words(subject):
    with pytest.raises(ValueError, match="give it one with set_env"):
        subject.make().learn_offline(random_dataset(), 1).learn(5)
    together = subject.make(env=pendulum(), seeds=2).learn_offline(pendulum_dataset(), 1)
    with pytest.raises(ValueError, match=r"agent.split\(\) gives them one by one"):
        together.learn(5)
    for word in ("ranking", "horizon"):
        with pytest.raises(ValueError, match=word):
            subject.make(policy_kwargs={word: "min"})


@each
def test_agents_that_learnt_side_by_side_take_the_dataset_online(subject):
    together = subject.make(env=pendulum(), seeds=2).learn_offline(pendulum_dataset(), 1)
    for agent in together.split():
        agent.learn(6)
        assert len(agent.replay_buffer) == 400 + 6 - agent.horizon + 1


def test_numbers_that_are_not_finite():
    class Bad(OneStep):
        def step(self, action):
            return self.state, float("nan") if self.np_random.random() < 0.3 else 0.0, True, False, {}

    agent = ONLINE[0].make(env=Bad()).learn_offline(one_step_tasks(100), 1)
    with pytest.raises(NonFiniteError, match="reward"):
        agent.learn(50)
    agent = ONLINE[0].make(env=Bad()).learn_offline(one_step_tasks(100), 1)
    agent.on_nonfinite = "skip"
    agent.learn(30)
    assert agent._skipped > 0


def test_the_reference_is_the_offline_policy():
    agent = made(ONLINE[0], pendulum())
    before = [p.clone() for p in agent.policy.actor.parameters()]
    agent.learn(30)
    assert all(th.equal(a, b) for a, b in zip(before, agent.policy.reference.parameters(), strict=True))
    assert any(not th.equal(a, b) for a, b in zip(before, agent.policy.actor.parameters(), strict=True))
    agent.learn(5)
    assert all(th.equal(a, b) for a, b in zip(before, agent.policy.reference.parameters(), strict=True))


@pytest.mark.slow
@each
def test_learns_online_beyond_its_data(subject):
    """Data of small actions, and the reward 1 - |a - s| asks for larger ones: those who follow values get there online.

    QC imitates its replay, and FQL with this alpha has left the data before.
    """
    data = one_step_tasks()
    data["actions"] *= 0.4
    data["rewards"] = 1.0 - np.abs(data["actions"] - data["observations"])[:, 0]
    kwargs = {**subject.learns, "learning_starts": 100, "seed": 1, "batch_size": 128}
    agent = subject.make(env=make_vec_env(OneStep, 1), **kwargs).learn_offline(data, 700)
    before, _ = evaluate_policy(agent, make_vec_env(OneStep, 1), 200)
    agent.learn(1000)
    after, _ = evaluate_policy(agent, make_vec_env(OneStep, 1), 200)
    assert after > before + (0.02 if subject.name in ("FMQ", "MVP") else -0.02)
