"""``tether evaluate``: runs, models of ours and of SB3, videos."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from tether.envs import make_vec
from tether.experiments.catalogue import AGENTS, PEERS, agent_class
from tether.experiments.evaluate import Evaluation, evaluate, load_trained, summary


class Countdown(gym.Env):
    """Episode k (from 0) lasts k + 1 steps; each step gives 1 and costs 0.5. It cannot be rendered."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.length = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.length, self.left = self.length + 1, self.length + 1
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(2, np.float32), 1.0, self.left == 0, False, {"cost": 0.5}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    gym.register("EvaluateTest/Countdown-v0", entry_point=Countdown)
    yield
    del gym.registry["EvaluateTest/Countdown-v0"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that SB3 saved, with nothing beside it."""
    path = tmp_path_factory.mktemp("bare") / "mine.zip"
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=0, device="cpu").save(path)
    return path


NUMBERS = re.compile(
    r"return over (\d+) episodes: mean ([-\d.]+) \(std ([\d.]+)\), IQM ([-\d.]+) \[([-\d.]+), ([-\d.]+)\], length (\d+)"
)


class TestPrinted:
    def test_run_folder(self, tether, finished) -> None:
        code, out, err = tether("evaluate", finished[0], "--episodes", 6)
        assert (code, err) == (0, "")
        assert out.startswith("MDPO on CartPole-v1\n")
        found = NUMBERS.search(out)
        assert found
        episodes, mean, _, iqm, low, high, length = map(float, found.groups())
        assert episodes == 6
        assert low <= iqm <= high
        assert length == pytest.approx(mean, abs=0.5)

    def test_mean_is_that_of_the_episodes(self, tether, finished) -> None:
        out = tether("evaluate", finished[0] / "best_model.zip", "--episodes", 4, "--seed", 5).out
        env = make_vec("CartPole-v1", 4, backend="dummy", seed=5)
        returns, _ = evaluate_policy(
            agent_class("MDPO").load(finished[0] / "best_model.zip"), env, 4, return_episode_rewards=True
        )
        assert f"mean {np.mean(returns):.1f} (std {np.std(returns):.1f})" in out

    def test_one_episode_has_no_interval(self) -> None:
        text = summary(Evaluation(np.array([7.0]), np.array([3]), None), "CartPole-v1")
        assert text == "return over 1 episode: mean 7.0 (std 0.0), IQM 7.0, length 3"

    def test_summary(self) -> None:
        returns = np.array([0.0, 10.0, 20.0, 1000.0])
        text = summary(Evaluation(returns, np.array([1, 2, 3, 4]), np.array([0.0, 1.0, 1.0, 2.0])), "CartPole-v1")
        assert "return over 4 episodes: mean 257.5 (std 428.7), IQM 15.0 [" in text
        assert text.splitlines()[1].startswith("cost: mean 1.00, IQM 1.00 [")


class TestEpisodes:
    def test_costs_and_lengths_are_per_episode(self) -> None:
        env = make_vec("EvaluateTest/Countdown-v0", 2, backend="dummy")
        model = PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu")
        result = evaluate(model, env, 6)
        assert sorted(result.lengths) == sorted(result.returns) == [1, 1, 2, 2, 3, 3]
        assert result.costs is not None
        np.testing.assert_array_equal(result.costs, result.lengths * 0.5)
        assert result.row == {
            "mean_reward": 2.0, "std_reward": pytest.approx(np.sqrt(2 / 3)), "mean_cost": 1.0, "ep_length": 2.0, "episodes": 6,
        }  # fmt: skip

    def test_no_costs(self) -> None:
        env = make_vec("CartPole-v1", 1, backend="dummy")
        result = evaluate(PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu"), env, 1)
        assert result.costs is None
        assert result.row["mean_cost"] == ""


class TestBareModels:
    def test_sb3_zip(self, tether, bare: Path) -> None:
        code, out, _ = tether("evaluate", bare, "--trust", "--env", "CartPole-v1", "--episodes", 2)
        assert code == 0
        assert out.startswith("SB3-PPO on CartPole-v1\nreturn over 2 episodes:")

    @pytest.mark.parametrize("agent", AGENTS)
    def test_every_agent_is_recognised(self, agent: str, tmp_path: Path) -> None:
        cls = agent_class(agent)
        small = {"buffer_size": 100} if hasattr(cls, "save_replay_buffer") else {}
        env_id = "CartPole-v1" if "DQN" in agent else "Pendulum-v1"
        model = cls("MlpPolicy", env_id, device="cpu", **small)
        model.save(tmp_path / "it.zip")
        trained = load_trained(tmp_path / "it.zip", env_id, trust=agent in PEERS)
        assert type(trained.model) is cls
        env = trained.make_env(1, 0)
        observation = env.reset()
        actions = []
        for one in (trained.model, model):
            th.manual_seed(0)  # FISOR's policy is its samples
            actions.append(one.predict(observation, deterministic=True)[0])
        np.testing.assert_array_equal(*actions)

    def test_a_pickled_model_asks_for_trust(self, refused, bare: Path) -> None:
        assert "load it with trust=True" in refused("evaluate", bare, "--env", "CartPole-v1")

    def test_agent_that_is_not_in_the_catalogue(self, refused, tmp_path: Path) -> None:
        A2C("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "a2c.zip")
        sentence = refused("evaluate", tmp_path / "a2c.zip", "--trust", "--env", "CartPole-v1")
        assert f"{tmp_path / 'a2c.zip'} was saved by none of BPO, GIRL, HyperDDQN, HyperPPO, MDPO, " in sentence

    def test_without_env(self, refused, bare: Path) -> None:
        sentence = refused("evaluate", bare, "--trust")
        assert f"No manifest.json beside {bare} names its environment: give it with --env." in sentence

    @pytest.mark.parametrize("content", [b"no zip", b""])
    def test_no_model(self, refused, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.zip").write_bytes(content)
        assert f"{tmp_path / 'x.zip'} is not a saved model" in refused("evaluate", tmp_path / "x.zip", "--env", "CartPole-v1")

    def test_other_spaces(self, refused, bare: Path) -> None:
        sentence = refused("evaluate", bare, "--trust", "--env", "Pendulum-v1")
        assert "The agent was trained in other spaces than those of Pendulum-v1" in sentence

    def test_unknown_env(self, refused, bare: Path) -> None:
        assert "did you mean 'CartPole-v1'?" in refused("evaluate", bare, "--trust", "--env", "CartPol-v1")


def trained_in_short_episodes(run: Path, copy: Path) -> None:
    """A copy of a run whose episodes had five steps."""
    shutil.copytree(run, copy)
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["env_kwargs"] = {"max_episode_steps": 5}
    path.write_text(json.dumps(manifest))


class TestRunFolders:
    def test_missing(self, refused, tmp_path: Path) -> None:
        assert f"There is no model at {tmp_path / 'model.zip'}" in refused("evaluate", tmp_path)
        assert f"There is no model at {tmp_path / 'no.zip'}" in refused("evaluate", tmp_path / "no.zip")

    def test_damaged_model(self, refused, finished, tmp_path: Path) -> None:
        shutil.copy(finished[0] / "manifest.json", tmp_path)
        (tmp_path / "model.zip").write_bytes(b"no zip")
        assert f"{tmp_path / 'model.zip'} is not a saved model, or is damaged (" in refused("evaluate", tmp_path)

    def test_damaged_manifest(self, refused, finished, tmp_path: Path) -> None:
        shutil.copy(finished[0] / "model.zip", tmp_path)
        (tmp_path / "manifest.json").write_text("{")
        assert str(tmp_path / "manifest.json") in refused("evaluate", tmp_path)

    def test_arguments_of_the_environment_are_those_of_training(self, tether, finished, tmp_path: Path) -> None:
        trained_in_short_episodes(finished[0], tmp_path / "run")
        assert "mean 5.0 (std 0.0)" in tether("evaluate", tmp_path / "run", "--episodes", 3).out
        frames = tether("evaluate", tmp_path / "run", "--episodes", 1, "--video", tmp_path / "v.mp4").out
        assert frames.endswith("v.mp4: 5 frames\n")
        assert load_trained(tmp_path / "run", "Acrobot-v1").env_kwargs == {}
        three = ("--episodes", 3, "--env-kwargs", "max_episode_steps=3")
        assert "mean 3.0 (std 0.0)" in tether("evaluate", tmp_path / "run", *three).out

    def test_what_another_environment_does_not_get_is_said(self, tether, finished, tmp_path: Path) -> None:
        trained_in_short_episodes(finished[0], tmp_path / "run")
        words = ("evaluate", tmp_path / "run", "--env", "CartPole-v0", "--episodes", 1)
        assert "CartPole-v0 is made without max_episode_steps=5, unlike in training: --env-kwargs" in tether(*words).out
        run = tether(*words, "--env-kwargs", "max_episode_steps=4")
        assert "is made without" not in run.out
        assert "mean 4.0" in run.out

    def test_normaliser(self, tether, short_run, tmp_path: Path) -> None:
        """An agent that was trained on normalised observations gets them, and its returns are the raw ones."""
        assert tether(*short_run("SB3-PPO", "Pendulum-v1", tmp_path, steps=64, hp=("normalize=true",))).code == 0
        folder = tmp_path / "Pendulum-v1/SB3-PPO/seed-0"
        trained = load_trained(folder)
        env = trained.make_env(1, 0)
        assert isinstance(env, VecNormalize)
        before = env.obs_rms.count
        found = NUMBERS.search(tether("evaluate", folder, "--episodes", 2).out)
        assert found
        assert float(found[2]) < -100  # Pendulum's raw returns are around -1000
        env.reset()
        assert env.obs_rms.count == before
        assert tether("evaluate", folder / "best_model.zip", "--episodes", 1).code == 0


class TestVideo:
    def test_it_has_every_frame_of_one_episode(self, tether, finished, tmp_path: Path) -> None:
        path = tmp_path / "new" / "episode.mp4"
        code, out, _ = tether("evaluate", finished[0], "--episodes", 1, "--seed", 11, "--video", path)
        assert code == 0
        trained = load_trained(finished[0])
        length = int(evaluate(trained.model, trained.make_env(1, 11), 1).lengths[0])
        assert out.endswith(f"{path}: {length} frames\n")
        with imageio.get_reader(path) as reader:
            frames = [np.asarray(frame) for frame in reader.iter_data()]
            assert reader.get_meta_data()["fps"] == 50  # CartPole's own pace
        assert len(frames) == length
        assert frames[0].shape == (400, 600, 3)
        assert not np.array_equal(frames[0], frames[-1])
        assert [p.name for p in path.parent.iterdir()] == ["episode.mp4"]

    @pytest.mark.filterwarnings("ignore:.*render_mode='rgb_array' that is not in the possible:UserWarning")
    def test_environment_without_pictures(self, refused, tmp_path: Path) -> None:
        model = PPO("MlpPolicy", "EvaluateTest/Countdown-v0", n_steps=8, batch_size=8, device="cpu")
        model.save(tmp_path / "it.zip")
        words = ["evaluate", tmp_path / "it.zip", "--env", "EvaluateTest/Countdown-v0", "--video", tmp_path / "v.mp4"]
        words.append("--trust")
        assert "EvaluateTest/Countdown-v0 does not render to pictures" in refused(*words)
        assert [p.name for p in tmp_path.iterdir()] == ["it.zip"]

    def test_other_format(self, refused, bare: Path) -> None:
        words = ["evaluate", bare, "--env", "CartPole-v1", "--video", "v.gif"]
        assert "--video takes a name that ends in .mp4, not 'v.gif'" in refused(*words)
