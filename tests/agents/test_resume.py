"""Stopped anywhere, saved, loaded in a new process and finished: the same numbers as never stopped, to the last bit."""

import itertools
import random
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize

from tests.kit.agents import SUBJECTS
from tests.kit.resume import StopAt, difference, everything, finish_elsewhere
from tests.kit.worlds import DictIdentity, Identity, Pictures
from tether.agents import BPO, GIRL, MDPO, CheckpointError, OffPolicyMDPO, Resumable, load_checkpoint, save_checkpoint
from tether.envs import make_vec

TOTAL = 500  # rounded up to whole rollouts
TASKS = ("HalfCheetah-v5", "Ant-v5", "dm_control/cartpole-swingup-v0", "CartPole-v1")
BACKENDS = ("dummy", "envpool", "halves")
QUICK = {
    ("HalfCheetah-v5", "dummy"),
    ("Ant-v5", "dummy"),
    ("dm_control/cartpole-swingup-v0", "envpool"),
    ("CartPole-v1", "halves"),
}


def cases():
    for subject, task, backend in itertools.product(SUBJECTS, TASKS, BACKENDS):
        if subject.discrete and task != "CartPole-v1":
            continue
        marks = [] if (task, backend) in QUICK else [pytest.mark.slow]
        yield pytest.param(subject, task, backend, marks=marks, id=f"{subject.name}-{task}-{backend}")


@pytest.mark.parametrize(("subject", "task", "backend"), list(cases()))
def test_resume_equals_uninterrupted(subject, task, backend, tmp_path: Path):
    env = {"env_id": task, "n_envs": 2, "seed": 3, "backend": "envpool" if backend == "halves" else backend}
    env["halves"] = backend == "halves"
    whole = subject.make(make_vec(**env), seed=3).learn(TOTAL)
    stopped = subject.make(make_vec(**env), seed=3)
    stop = random.Random(f"{subject.name} {task} {backend}").randrange(4, TOTAL)
    stopped.learn(TOTAL, callback=StopAt(stop))
    assert stop <= stopped.num_timesteps <= stop + 2
    stopped.save_checkpoint(tmp_path)
    finished = finish_elsewhere(subject.name, env, TOTAL, tmp_path)
    assert finished["timesteps"] == whole.num_timesteps
    assert difference(finished["state"], everything(whole)) == 0.0, f"stopped at {stop}"


# ---------------------------------------------------------------------- everything that may be around an agent


class Corridor(gym.Env):
    """The action moves along a line; how far is drawn from the environment's own generators."""

    observation_space = spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        self.legacy, self.python = np.random.RandomState(5), random.Random(6)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.path = self.np_random.normal(size=2).astype(np.float32), []
        return self.place.copy(), {}

    def step(self, action):
        self.path.append(float(action[0]))
        noise = self.legacy.normal() + self.python.gauss(0, 1) + self.np_random.normal()
        self.place += np.float32([action[0], 0.1 * noise])
        return self.place.copy(), -float(np.abs(self.place).sum()), False, len(self.path) >= 23, {"path": tuple(self.path)}


def vec(env, n_envs=2, **kwargs):
    return make_vec_env(env, n_envs, seed=1, **kwargs)


SMALL = {"n_steps": 32, "policy_kwargs": {"net_arch": [8]}, "seed": 1, "device": "cpu"}
OFF = {
    "buffer_size": 150,
    "learning_starts": 20,
    "batch_size": 16,
    "policy_kwargs": {"net_arch": [8]},
    "seed": 1,
    "device": "cpu",
}
WORLD_MODEL = {
    "batch_size": 4, "batch_length": 8, "horizon": 3, "train_ratio": 4.0, "learning_starts": 60, "pretrain_updates": 2,
    "buffer_size": 150, "encoder_updates": 5, "warmup_steps": 120, "radius_interval": 5, "seed": 1, "device": "cpu",
    "policy_kwargs": {"size": "small", "deter": 16, "hidden": 16, "variables": 4, "classes": 4, "units": 16},
}  # fmt: skip
PICTURES = {**SMALL, "n_steps": 16, "batch_size": 16, "n_epochs": 1, "policy_kwargs": {}}
PROCESSES = {"vec_env_cls": SubprocVecEnv, "wrapper_class": Resumable}
WORLDS = {
    "own environment": lambda: (MDPO, "MlpPolicy", vec(Corridor), {**SMALL, "value_batch_size": 32}),
    "schedules": lambda: (
        BPO, "MlpPolicy", vec(Corridor),
        {**SMALL, "learning_rate": LinearSchedule(1e-3, 1e-5, 1.0), "clip_range": LinearSchedule(0.3, 0.1, 1.0)},
    ),
    "VecNormalize": lambda: (MDPO, "MlpPolicy", VecNormalize(vec(Corridor)), {**SMALL, "value_batch_size": 32}),
    "frame stack": lambda: (BPO, "MlpPolicy", VecFrameStack(vec(Corridor), 3), SMALL),
    "dict": lambda: (MDPO, "MultiInputPolicy", vec(DictIdentity), {**SMALL, "value_batch_size": 32}),
    "pictures": lambda: (BPO, "CnnPolicy", vec(Pictures), PICTURES),
    "processes": lambda: (MDPO, "MlpPolicy", vec(Corridor, **PROCESSES), {**SMALL, "value_batch_size": 32}),
    "replay wraps around": lambda: (OffPolicyMDPO, "MlpPolicy", vec(Corridor), OFF),
    "replay of half the memory": lambda: (
        OffPolicyMDPO, "MlpPolicy", vec(Corridor),
        {**OFF, "optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    ),
    "replay of dicts": lambda: (OffPolicyMDPO, "MultiInputPolicy", vec(DictIdentity), OFF),
    "world model of dicts": lambda: (GIRL, "MultiInputPolicy", vec(DictIdentity), WORLD_MODEL),
    "shared space": lambda: (OffPolicyMDPO, "MlpPolicy", vec(lambda: Identity(spaces.Discrete(3))), OFF),
    "every 7 steps": lambda: (OffPolicyMDPO, "MlpPolicy", vec(Corridor), {**OFF, "train_freq": 7, "gradient_steps": -1}),
    "whole episodes": lambda: (OffPolicyMDPO, "MlpPolicy", vec(Corridor, 1), {**OFF, "train_freq": (1, "episode")}),
    "noise with a memory": lambda: (
        OffPolicyMDPO, "MlpPolicy", vec(Corridor),
        {**OFF, "action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(1), np.full(1, 0.3)), "behaviour": "deterministic"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stops", [(1,), (64, 65), (30, 101, 250)], ids=str)
def test_resume_in_every_world(world, stops, tmp_path: Path):
    cls, policy, env, kwargs = WORLDS[world]()
    total = 300
    whole = cls(policy, env, **kwargs).learn(total)
    cls, policy, env, kwargs = WORLDS[world]()
    agent = cls(policy, env, **kwargs)
    for number, stop in enumerate(stops):
        agent.learn(total - agent.num_timesteps, callback=StopAt(stop), reset_num_timesteps=number == 0)
        agent.save_checkpoint(tmp_path)
        th.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
        env = WORLDS[world]()[2]
        agent = cls.load_checkpoint(tmp_path, env, device="cpu")
    agent.learn(total - agent.num_timesteps, reset_num_timesteps=False)
    assert agent.num_timesteps == whole.num_timesteps
    assert difference(everything(agent), everything(whole)) == 0.0
    env.close()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
@pytest.mark.parametrize("stop", [256, 512])
def test_stop_at_the_last_step_of_a_rollout_and_of_the_training(subject, stop, tmp_path: Path):
    """The update that follows must not be lost, although no step is left."""
    whole = subject.make(vec(subject.world)).learn(512)
    agent = subject.make(vec(subject.world)).learn(512, callback=StopAt(stop))
    agent.save_checkpoint(tmp_path)
    agent = subject.cls.load_checkpoint(tmp_path, vec(subject.world), device="cpu")
    agent.learn(512 - agent.num_timesteps, reset_num_timesteps=False)
    assert difference(everything(agent), everything(whole)) == 0.0


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_going_on_in_the_same_process(subject):
    """A callback that stops the training loses nothing; nobody has to save for that."""
    whole = subject.make(make_vec("CartPole-v1", 4, seed=2, halves=True)).learn(TOTAL)
    agent = subject.make(make_vec("CartPole-v1", 4, seed=2, halves=True)).learn(TOTAL, callback=StopAt(150))
    assert agent.num_timesteps == 152
    agent.learn(TOTAL - 152, reset_num_timesteps=False)
    assert difference(everything(agent), everything(whole)) == 0.0


class SaveAt(BaseCallback):
    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.folder, self.step = folder, step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            self.model.save_checkpoint(self.folder)
        return True


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_saving_in_a_callback_changes_nothing(subject, tmp_path: Path):
    """In the middle of a rollout, where one half of the environments is a step ahead."""
    whole = subject.make(make_vec("CartPole-v1", 4, seed=2, halves=True)).learn(TOTAL)
    saving = subject.make(make_vec("CartPole-v1", 4, seed=2, halves=True)).learn(TOTAL, callback=SaveAt(tmp_path, 100))
    assert difference(everything(saving), everything(whole)) == 0.0
    agent = subject.cls.load_checkpoint(tmp_path, make_vec("CartPole-v1", 4, halves=True), device="cpu")
    assert agent.num_timesteps == 100
    agent.learn(TOTAL - 100, reset_num_timesteps=False)
    assert difference(everything(agent), everything(whole)) == 0.0


class SaveAtRollout(SaveAt):
    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.step:
            save_checkpoint(self.model, self.folder, keep=1)
            self.step = 10**9

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (SB3PPO, {"n_steps": 32, "batch_size": 32}),
        (SAC, {"learning_starts": 20}),
        (TD3, {"learning_starts": 20}),
        (DQN, {"learning_starts": 20}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_sb3s_own_agents(cls, kwargs, tmp_path: Path):
    """Saved before a rollout, their training goes on exactly, too."""
    env = "CartPole-v1" if cls is DQN else "HalfCheetah-v5"
    kwargs |= {"seed": 1, "device": "cpu", "policy_kwargs": {"net_arch": [8]}}
    whole = cls("MlpPolicy", vec(env), **kwargs).learn(256, callback=SaveAtRollout(tmp_path, 100))
    agent = load_checkpoint(cls, tmp_path, vec(env), device="cpu")
    assert 100 <= agent.num_timesteps < 180
    agent.learn(256 - agent.num_timesteps, reset_num_timesteps=False)
    assert difference(everything(agent), everything(whole)) == 0.0


# ---------------------------------------------------------------------- what cannot be exact, and what is refused


def test_schedules_follow_the_total_of_the_checkpoint(tmp_path: Path):
    """What is left may be trained in parts."""
    kwargs = {**SMALL, "learning_rate": LinearSchedule(1e-3, 0.0, 1.0)}
    whole = BPO("MlpPolicy", vec(Corridor), **kwargs).learn(512)
    BPO("MlpPolicy", vec(Corridor), **kwargs).learn(512, callback=StopAt(100)).save_checkpoint(tmp_path)
    agent = BPO.load_checkpoint(tmp_path, vec(Corridor), device="cpu")
    for _ in range(2):
        agent.learn(128, reset_num_timesteps=False)
    agent.learn(512 - agent.num_timesteps, reset_num_timesteps=False)
    assert difference(everything(agent), everything(whole)) == 0.0


def test_processes_that_cannot_be_asked_begin_new_episodes(tmp_path: Path, caplog):
    env = vec(Corridor, vec_env_cls=SubprocVecEnv)
    BPO("MlpPolicy", env, **SMALL).learn(64).save_checkpoint(tmp_path)
    assert "make them with wrapper_class=Resumable" in caplog.text
    env.close()
    env = vec(Corridor, vec_env_cls=SubprocVecEnv)
    agent = BPO.load_checkpoint(tmp_path, env, device="cpu")
    assert agent._last_obs is None
    agent.learn(64, reset_num_timesteps=False)
    assert agent.num_timesteps == 128
    env.close()


def test_another_number_of_environments_is_refused(tmp_path: Path):
    BPO("MlpPolicy", vec(Corridor), **SMALL).learn(64).save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="has 2 environments and env has 4: give as many"):
        BPO.load_checkpoint(tmp_path, vec(Corridor, 4), device="cpu")


def test_an_environment_of_another_make_begins_new_episodes(tmp_path: Path, caplog):
    BPO("MlpPolicy", make_vec("CartPole-v1", 2, backend="dummy"), **SMALL).learn(64).save_checkpoint(tmp_path)
    agent = BPO.load_checkpoint(tmp_path, make_vec("CartPole-v1", 2, backend="envpool"), device="cpu")
    assert "The environments begin new episodes" in caplog.text
    agent.learn(64, reset_num_timesteps=False)


def test_before_the_first_step(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BPO("MlpPolicy", vec(Corridor), **SMALL).save_checkpoint(tmp_path)
        agent = BPO.load_checkpoint(tmp_path, vec(Corridor), device="cpu").learn(64)
    whole = BPO("MlpPolicy", vec(Corridor), **SMALL).learn(64)
    assert agent.num_timesteps == whole.num_timesteps
