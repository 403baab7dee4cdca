"""Runs that learn from data first and in their environment afterwards, that begin with a model, and that report success."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.results_plotter import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tether.agents import FMQ, MVP, CheckpointCallback, list_checkpoints, load_checkpoint
from tether.agents.common.model_file import read_model
from tether.envs import OfflineDataset, load_dataset, make_vec
from tether.envs.datasets import dsrl
from tether.experiments import cli
from tether.experiments import study as study_module
from tether.experiments.callbacks import COLUMNS
from tether.experiments.catalogue import OFFLINE_TO_ONLINE
from tether.experiments.collect import CollectConfig
from tether.experiments.evaluate import evaluate, summary
from tether.experiments.logs import STEP
from tether.experiments.presets import parse_assignments
from tether.experiments.run_config import RunConfig, identity_of
from tether.experiments.runs import load_runs
from tether.experiments.starting import dataset_of, fill_replay_buffer, start_from
from tether.experiments.study import Study

STEPS, ONLINE = 20, 30
TINY = ["batch_size=16", "horizon=2", "learning_starts=4", "policy_kwargs.net_arch=[8]", "policy_kwargs.n_candidates=2"]
TINY_SAC = ["batch_size=8", "learning_starts=10", "policy_kwargs.net_arch=[8]"]


class Reach(gym.Env):
    """Come near to a goal on a line within 8 steps: every step before costs 1, and the last one says whether it was reached.

    Actions lie in [-2, 2], of which a quarter is the step.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32), 0
        return self.state.copy(), {}

    def step(self, action):
        self.steps += 1
        self.state[0] += np.float32(action[0] / 4.0)
        success = bool(abs(self.state[0] - self.state[1]) < 0.3)
        return self.state.copy(), float(success) - 1.0, success, self.steps == 8, {"success": success}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    gym.register("OnlineTest/Reach-v0", entry_point=Reach)
    yield
    del gym.registry["OnlineTest/Reach-v0"]


def played(episodes: int = 20) -> OfflineDataset:
    """Random play, with actions scaled to [-1, 1]."""
    env, rng = Reach(), np.random.default_rng(0)
    rows: dict[str, list[Any]] = {name: [] for name in (
        "observations", "actions", "rewards", "next_observations", "terminals", "timeouts"
    )}  # fmt: skip
    for episode in range(episodes):
        observation, ended = env.reset(seed=episode)[0], False
        while not ended:
            action = rng.uniform(-1.0, 1.0, 1).astype(np.float32)
            following, reward, terminal, timeout, _ = env.step(2.0 * action)
            ended = terminal or timeout
            step = (observation, action, reward, following, terminal, timeout and not terminal)
            for name, value in zip(rows, step, strict=True):
                rows[name].append(value)
            observation = following
    flags = ("terminals", "timeouts")
    arrays: dict[str, Any] = {k: np.array(v, bool if k in flags else np.float32) for k, v in rows.items()}
    meta = {"env_id": "OnlineTest/Reach-v0", "action_low": -2.0, "action_high": 2.0}
    return OfflineDataset(**arrays, costs=np.zeros(len(arrays["rewards"]), np.float32), meta=meta)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The file of a small dataset."""
    return dsrl.write(tmp_path_factory.mktemp("data") / "reach.hdf5", played())


def run_words(data: Path, out: Path, *more: object, agent: str = "FMQ", hp: list[str] = TINY, online: int = ONLINE) -> list:
    words = ["train", agent, "--env", "OnlineTest/Reach-v0", "--dataset", data, "--steps", STEPS, "--out", out]
    words += ["--online-steps", online] if online else []
    return [*words, "--backend", "dummy", "--eval-every", 15, "--eval-episodes", 2, *more, "--hp", *hp]


def folder_of(out: Path, agent: str = "FMQ") -> Path:
    return out / "OnlineTest--Reach-v0" / agent / "seed-0"


def tensors(path: Path) -> dict[str, th.Tensor]:
    """All weights and states of optimisers in a model's file."""
    flat = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, th.Tensor):
            flat[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{name}.{key}")

    walk(read_model(path, "cpu").params, "")
    return flat


def same(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return set(first) == set(second) and all(th.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(data, tether, tmp_path_factory) -> tuple[Path, str]:
    """The folder of an uninterrupted run of FMQ, and what the command printed."""
    out = tmp_path_factory.mktemp("whole")
    outcome = tether(*run_words(data, out))
    assert outcome.code == 0, outcome.err
    return folder_of(out), outcome.out


# ---------------------------------------------------------------------- both phases


class TestBothPhases:
    def test_the_run_is_one_curve(self, whole, rows, manifest) -> None:
        folder, printed = whole
        m = manifest(folder)
        assert (m["steps"], m["online_steps"], m["timesteps"], m["status"]) == (STEPS, ONLINE, STEPS + ONLINE, "finished")
        assert m["config"]["online_steps"] == ONLINE
        assert f"{folder}: 50 steps in" in printed
        # 20, the switch, is no multiple of 15.
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [15, 20, 30, 45, 50]
        logged = [int(row[STEP]) for row in rows(folder / "progress.csv")]
        assert logged == sorted(set(logged))
        assert {15, 20, 45, 50} <= set(logged)
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        assert [e.step for e in accumulator.Scalars("eval/mean_reward")] == [15, 20, 30, 45, 50]
        assert len(accumulator.Tensors("configuration/text_summary")) == 1
        model = FMQ.load(folder / "model.zip")
        assert (model.num_timesteps, model.online_steps, model.steps_environments) == (50, ONLINE, True)

    def test_the_episodes_of_training_are_monitored(self, whole) -> None:
        lengths = load_results(str(whole[0]))["l"]
        assert 20 < lengths.sum() <= ONLINE

    def test_the_same_command_says_that_it_is_done(self, whole, data, tether) -> None:
        outcome = tether(*run_words(data, whole[0].parents[2]))
        assert (outcome.code, "is finished already (50 steps)" in outcome.out) == (0, True)

    @pytest.mark.parametrize("agent", sorted(set(OFFLINE_TO_ONLINE) - {"FMQ"}))
    def test_every_agent_goes_online(self, data, tether, tmp_path: Path, agent: str, manifest) -> None:
        hp = TINY if agent != "FQL" else [word for word in TINY if "n_candidates" not in word]
        outcome = tether(*run_words(data, tmp_path, agent=agent, hp=hp, online=12))
        assert outcome.code == 0, outcome.err
        assert manifest(folder_of(tmp_path, agent))["timesteps"] == STEPS + 12

    def test_several_environments(self, data, tether, stop_at, tmp_path: Path, manifest, rows) -> None:
        words = [run_words(data, tmp_path / out, "--n-envs", 3) for out in ("whole", "parts")]
        assert tether(*words[0]).code == 0
        for step in (10, STEPS, STEPS + 3, STEPS + 18):
            with stop_at(step):
                assert tether(*words[1]).code == 130
        assert tether(*words[1]).code == 0
        assert manifest(folder_of(tmp_path / "whole"))["timesteps"] == STEPS + ONLINE
        self._is_the_same(*(folder_of(tmp_path / out) for out in ("whole", "parts")), rows)

    @pytest.mark.parametrize("stops", [(7,), (STEPS - 1,), (STEPS,), (STEPS + 1,), (STEPS + 9,), (5, 12, 20, 21, 33, 49)])
    def test_interrupted_anywhere_it_is_the_uninterrupted_one(
        self, whole, data, tether, stop_at, tmp_path: Path, rows, stops: tuple[int, ...]
    ) -> None:
        words = run_words(data, tmp_path)
        for step in stops:
            with stop_at(step):
                assert tether(*words).code == 130
            assert json.loads((folder_of(tmp_path) / "manifest.json").read_text())["timesteps"] == step
        assert tether(*words).code == 0
        self._is_the_same(whole[0], folder_of(tmp_path), rows)

    @pytest.mark.parametrize("saved", [6, STEPS - 1, STEPS, STEPS + 1, STEPS + 9])
    def test_killed_in_either_phase_it_is_the_uninterrupted_one(
        self, whole, data, tether, stop_at, killed, tmp_path: Path, rows, monkeypatch: pytest.MonkeyPatch, saved: int
    ) -> None:
        """Nothing is saved after ``saved``, so that it goes on from there."""
        words = run_words(data, tmp_path)
        original = CheckpointCallback._on_step
        save = lambda self: self.num_timesteps != saved or self.save() is None  # noqa: E731
        monkeypatch.setattr(CheckpointCallback, "_on_step", save)
        with stop_at(saved + 7, killed), pytest.raises(killed):
            tether(*words)
        (checkpoint,) = list_checkpoints(folder_of(tmp_path) / "checkpoint")
        assert checkpoint.timesteps == saved
        assert checkpoint.total == STEPS + ONLINE
        monkeypatch.setattr(CheckpointCallback, "_on_step", original)
        assert tether(*words).code == 0
        self._is_the_same(whole[0], folder_of(tmp_path), rows)

    def _is_the_same(self, whole: Path, parts: Path, rows) -> None:
        assert same(whole / "model.zip", parts / "model.zip")
        assert (whole / "evaluations.csv").read_text() == (parts / "evaluations.csv").read_text()
        logged = [rows(folder / "progress.csv") for folder in (whole, parts)]
        for one, other in zip(*logged, strict=True):
            assert one | {"time/fps": ""} == other | {"time/fps": ""}
        assert sorted(load_results(str(whole))["r"]) == sorted(load_results(str(parts))["r"])

    def test_rates_fall_over_both_phases(self, data, tether, stop_at, tmp_path: Path) -> None:
        words = run_words(data, tmp_path, hp=[*TINY, "learning_rate=lin_1e-3"])
        for step in (10, STEPS, STEPS + 10):
            with stop_at(step) as caught:
                assert tether(*words).code == 130
            rate = caught["model"].actor_optimizer.param_groups[0]["lr"]
            assert rate == pytest.approx(1e-3 * (1 - step / (STEPS + ONLINE)), abs=1.01e-3 / (STEPS + ONLINE))

    def test_without_online_steps_nothing_is_stepped(self, data, tether, tmp_path: Path, manifest) -> None:
        assert tether(*run_words(data, tmp_path, online=0)).code == 0
        folder = folder_of(tmp_path)
        assert manifest(folder)["timesteps"] == STEPS
        assert "online_steps" not in {*manifest(folder), *manifest(folder)["config"]}
        assert not list(folder.glob("*monitor.csv"))

    def test_a_longer_online_phase_is_another_run(self, whole, data, refused) -> None:
        words = run_words(data, whole[0].parents[2], online=ONLINE + 1)
        assert "another configuration ('online_steps' was 30, now 31)" in refused(*words)

    @pytest.mark.parametrize("agent", ["BC", "SAC", "MDPO"])
    def test_agents_that_do_not_go_on(self, data, refused, tmp_path: Path, agent: str) -> None:
        words = ["train", agent, "--env", "OnlineTest/Reach-v0", "--out", tmp_path / "runs", "--online-steps", 5]
        words += ["--dataset", data] if agent == "BC" else []
        assert f"--online-steps is for FMQ, FQL, MVP, QC: leave it out for {agent}." in refused(*words)
        assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- beginning with a model


class TestInitFrom:
    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, data, tether, tmp_path_factory) -> Path:
        """A folder of runs with FMQ after its offline phase."""
        out = tmp_path_factory.mktemp("trained")
        assert tether(*run_words(data, out, online=0)).code == 0
        return out

    @staticmethod
    def template(trained: Path) -> str:
        return f"{trained}/{{env}}/FMQ/seed-{{seed}}/model.zip"

    @pytest.mark.parametrize("agent", ["FMQ", "MVP"])
    def test_it_goes_online_at_once(self, trained, data, tether, tmp_path: Path, agent: str, rows, manifest) -> None:
        outcome = tether(*run_words(data, tmp_path, "--init-from", self.template(trained), agent=agent))
        assert outcome.code == 0, outcome.err
        folder, model = folder_of(tmp_path, agent), folder_of(trained) / "model.zip"
        m, digest = manifest(folder), hashlib.sha256(model.read_bytes()).hexdigest()
        assert m["config"]["init_from"] == digest
        assert m["init_from"] == {"source": "model.zip", "agent": "FMQ", "timesteps": STEPS, "sha256": digest}
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [20, 30, 45, 50]
        last = rows(folder_of(trained) / "evaluations.csv")[-1]
        assert {**rows(folder / "evaluations.csv")[0]} == last  # of the same policy, on the same episodes
        assert {"FMQ": FMQ, "MVP": MVP}[agent].load(folder / "model.zip")._n_updates > STEPS
        assert load_results(str(folder))["l"].sum() > 20

    def test_more_gradient_steps_come_first(self, trained, data, tether, tmp_path: Path, rows) -> None:
        words = run_words(data, tmp_path, "--init-from", self.template(trained), agent="MVP")
        words[words.index("--steps") + 1] = 33
        assert tether(*words).code == 0
        assert [int(row["timesteps"]) for row in rows(folder_of(tmp_path, "MVP") / "evaluations.csv")] == [30, 33, 45, 60, 63]

    @pytest.mark.parametrize("step", [STEPS + 1, STEPS + 11])
    def test_it_resumes(self, trained, data, tether, stop_at, tmp_path: Path, step: int, manifest) -> None:
        words = [run_words(data, tmp_path / out, "--init-from", self.template(trained)) for out in ("whole", "parts")]
        assert tether(*words[0]).code == 0
        with stop_at(step):
            assert tether(*words[1]).code == 130
        assert tether(*words[1]).code == 0
        folders = [folder_of(tmp_path / out) for out in ("whole", "parts")]
        assert same(*(folder / "model.zip" for folder in folders))
        assert (folders[0] / "evaluations.csv").read_text() == (folders[1] / "evaluations.csv").read_text()
        assert manifest(folders[0])["init_from"] == manifest(folders[1])["init_from"]

    def test_optimisers_are_taken_over(self, trained) -> None:
        config, _ = RunConfig("MVP", "OnlineTest/Reach-v0", 30, dataset="x", init_from=self.template(trained)).resolve()
        assert config.init_from == str(folder_of(trained) / "model.zip")
        kwargs = {"batch_size": 16, "horizon": 2, "policy_kwargs": {"net_arch": [8], "n_candidates": 2}, "device": "cpu"}
        model = MVP(env=make_vec("OnlineTest/Reach-v0", backend="dummy"), **kwargs)
        start_from(model, config)
        saved = read_model(config.init_from, "cpu").params
        mine = model.get_parameters()
        for name in ("actor_optimizer", "critic_optimizer"):
            for key, state in saved[name]["state"].items():
                assert all(th.equal(mine[name]["state"][key][part], value) for part, value in state.items())
        assert all(th.equal(mine["policy"][name], value) for name, value in saved["policy"].items())
        assert (model.num_timesteps, model._n_updates) == (STEPS, STEPS)

    @pytest.mark.parametrize(
        ("agent", "change", "sentence"),
        [
            ("FMQ", ["--hp", *TINY, "policy_kwargs.net_arch=[9]"], "8) in it, and (2, 4, 9) here. Give --hp"),
            ("FMQ", ["--hp", *TINY, "policy_kwargs.net_arch=[8,8]"], "it lacks 'actor."),
            ("FQL", ["--hp", *TINY[:-1]], "Take a model of the same networks."),
            ("BC", ["--hp", "batch_size=16", "policy_kwargs.net_arch=[8]"], "BC has no 'critic_optimizer'."),
            ("FMQ", ["--steps", STEPS - 1], "has learnt for 20 steps, which --steps counts, and it is 19: give more"),
            ("FMQ", ["--init-from", "no/such/{env}.zip"], "names no/such/OnlineTest--Reach-v0.zip, which cannot"),
            ("FMQ", ["--init-from", "{task}.zip"], "--init-from takes {env}, {seed} and {agent} in braces, not '{task}.zip'."),
            ("FMQ", ["--init-from", "{data}"], ""),
        ],
    )
    def test_refusals(self, trained, data, refused, tmp_path: Path, agent: str, change: list, sentence: str) -> None:
        online = 0 if agent == "BC" else ONLINE
        words = run_words(data, tmp_path / "runs", "--init-from", self.template(trained), agent=agent, online=online)
        change = [str(word).replace("{data}", str(data)) for word in change]
        assert sentence in refused(*words, *change)
        assert not list(tmp_path.iterdir())

    def test_offline_with_nothing_left(self, trained, data, refused, tmp_path: Path) -> None:
        words = run_words(data, tmp_path / "runs", "--init-from", self.template(trained), online=0)
        assert "has learnt for 20 steps, which --steps counts, and it is 20: give more, or --online-steps" in refused(*words)

    def test_only_for_offline_agents(self, trained, refused, tmp_path: Path) -> None:
        words = ["train", "MDPO", "--env", "CartPole-v1", "--out", tmp_path / "runs", "--init-from", self.template(trained)]
        assert "--init-from is for offline agents of ours: leave it out for MDPO." in refused(*words)

    def test_another_model_is_another_run(self, trained, data, tether, refused, tmp_path: Path) -> None:
        model = tmp_path / "model.zip"
        model.write_bytes((folder_of(trained) / "model.zip").read_bytes())
        words = run_words(data, tmp_path / "runs", "--init-from", model, online=5)
        assert tether(*words).code == 0
        loaded = FMQ.load(model)
        loaded.num_timesteps = 19
        loaded.save(model)
        assert "another configuration ('init_from' was" in refused(*words)


def test_identities_of_before_stay_valid() -> None:
    config, arguments = RunConfig("IQL", "OnlineTest/Reach-v0", 10, dataset="x").resolve()
    identity = identity_of(config, arguments, dataset="digest", init_from=None)
    assert not {"online_steps", "init_from", "train_share"} & set(identity)
    assert identity["dataset"] == "digest"


# ---------------------------------------------------------------------- peers with data


class TestPeers:
    def test_the_buffer_begins_with_the_dataset(self, data, tether, tmp_path: Path, manifest, rows) -> None:
        words = run_words(data, tmp_path, agent="SAC", hp=TINY_SAC, online=0)
        outcome = tether(*words)
        assert outcome.code == 0, outcome.err
        folder, n = folder_of(tmp_path, "SAC"), len(played())
        m = manifest(folder)
        assert m["dataset"]["transitions"] == n
        assert m["config"]["dataset"] == m["dataset"]["sha256"]
        assert m["config"]["arguments"]["buffer_size"] == n + STEPS
        env = make_vec("OnlineTest/Reach-v0", backend="dummy")
        model = load_checkpoint(SAC, folder / "checkpoint", env, "cpu")
        assert model.replay_buffer.pos == n + STEPS - model.replay_buffer.full * (n + STEPS)
        np.testing.assert_array_equal(model.replay_buffer.observations[:n, 0], played().observations)
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [15, STEPS]

    def test_it_is_the_buffer_that_play_would_fill(self) -> None:
        """Against SB3's own ``add`` of the same steps, whose actions its policies scale."""
        dataset, env = played(), make_vec("OnlineTest/Reach-v0", backend="dummy")
        mine, theirs = (SAC("MlpPolicy", env, buffer_size=500, device="cpu") for _ in range(2))
        fill_replay_buffer(mine, dataset, "SAC")
        for i in range(len(dataset)):
            done = dataset.terminals[i : i + 1] | dataset.timeouts[i : i + 1]
            action = theirs.policy.scale_action(2.0 * np.asarray(dataset.actions[i : i + 1]))
            infos = [{"TimeLimit.truncated": bool(dataset.timeouts[i])}]
            rows = (np.asarray(array[i : i + 1]) for array in (dataset.observations, dataset.next_observations))
            theirs.replay_buffer.add(*rows, action, dataset.rewards[i : i + 1], done, infos)
        assert (mine.replay_buffer.pos, mine.replay_buffer.full) == (theirs.replay_buffer.pos, False)
        assert dataset.timeouts.any()
        assert dataset.terminals.any()
        for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
            np.testing.assert_allclose(getattr(mine.replay_buffer, name), getattr(theirs.replay_buffer, name), atol=1e-6)

    def test_several_environments_share_it(self) -> None:
        dataset, env = played(), make_vec("OnlineTest/Reach-v0", 3, backend="dummy")
        model = SAC("MlpPolicy", env, buffer_size=600, n_steps=3, device="cpu")
        assert type(model.replay_buffer) is NStepReplayBuffer
        fill_replay_buffer(model, dataset, "SAC")
        rows = len(dataset) // 3
        assert model.replay_buffer.pos == rows
        for k in range(3):  # each has whole stretches of play, and its last step there leads to no step of the run's
            part = slice(k * rows, (k + 1) * rows)
            np.testing.assert_array_equal(model.replay_buffer.observations[:rows, k], dataset.observations[part])
        assert model.replay_buffer.dones[rows - 1].all()

    def test_it_resumes_with_the_dataset(self, data, tether, stop_at, tmp_path: Path) -> None:
        words = [run_words(data, tmp_path / out, agent="SAC", hp=TINY_SAC, online=0) for out in ("whole", "parts")]
        assert tether(*words[0]).code == 0
        with stop_at(13):
            assert tether(*words[1]).code == 130
        assert tether(*words[1]).code == 0
        folders = [folder_of(tmp_path / out, "SAC") for out in ("whole", "parts")]
        assert same(*(folder / "model.zip" for folder in folders))

    @pytest.mark.parametrize("agent", ["TD3", "TQC", "CrossQ"])
    def test_others(self, data, tether, tmp_path: Path, agent: str) -> None:
        outcome = tether(*run_words(data, tmp_path, agent=agent, hp=TINY_SAC, online=0))
        assert outcome.code == 0, outcome.err

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (["--env", "Pendulum-v1"], "The dataset's observations have the shape (2,), and those of the environment (3,)."),
            (["--hp", *TINY_SAC, "buffer_size=50"], "and the replay buffer room for 50: give a larger buffer_size"),
            (["--hp", *TINY_SAC, "optimize_memory_usage=true", "replay_buffer_kwargs.handle_timeout_termination=false"],
             "A dataset goes into SB3's plain replay buffer: leave out what makes SAC use another."),
        ],
    )  # fmt: skip
    def test_refusals(self, data, refused, tmp_path: Path, more: list, sentence: str) -> None:
        assert sentence in refused(*run_words(data, tmp_path / "runs", agent="SAC", hp=TINY_SAC, online=0), *more)
        assert not list(tmp_path.iterdir())

    def test_on_policy_agents_take_none(self, data, refused, tmp_path: Path) -> None:
        words = ["train", "SB3-PPO", "--env", "OnlineTest/Reach-v0", "--dataset", data, "--out", tmp_path / "runs"]
        assert "SB3-PPO learns in its environment: leave out --dataset." in refused(*words)


# ---------------------------------------------------------------------- success


class TestSuccess:
    def test_it_is_a_column_and_a_curve(self, whole, rows, tether) -> None:
        folder = whole[0]
        table = rows(folder / "evaluations.csv")
        assert list(table[0]) == [*COLUMNS, "success_rate"]
        for row in table:
            # An episode without success has a return of -8.
            assert float(row["success_rate"]) in (0.0, 0.5, 1.0)
            assert (float(row["success_rate"]) == 0.0) == (float(row["mean_reward"]) == -8.0)
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        assert [e.value for e in accumulator.Scalars("eval/success_rate")] == [float(row["success_rate"]) for row in table]
        assert "success rate: " in tether("evaluate", folder, "--episodes", 4).out

    @pytest.mark.parametrize("key", ["success", "is_success"])
    def test_the_last_step_counts(self, key: str) -> None:
        """Episode k lasts k + 1 steps, and says "success" in its first and, if k is odd, in its last."""

        class Says(gym.Env):
            observation_space, action_space = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Discrete(2)
            episode = -1

            def reset(self, *, seed: int | None = None, options: Any = None):
                self.episode, self.steps = self.episode + 1, 0
                return np.zeros(2, np.float32), {}

            def step(self, action):
                self.steps += 1
                done = self.steps > self.episode
                return np.zeros(2, np.float32), 1.0, done, False, {key: self.episode % 2 if done else 1.0}

        env = VecMonitor(DummyVecEnv([Says]))
        result = evaluate(PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu"), env, 5)
        assert result.lengths.tolist() == [1, 2, 3, 4, 5]
        assert result.successes.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
        assert result.row["success_rate"] == 0.4
        assert summary(result, "Mine-v0").splitlines()[-1].startswith("success rate: 0.400 [0.000, ")

    def test_an_environment_without_success(self, finished) -> None:
        assert (finished[0] / "evaluations.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


# ---------------------------------------------------------------------- studies


CUBE = "cube-single-play-singletask-task{}-v0"


class TestStudies:
    @pytest.fixture
    def write(self, tmp_path: Path):
        """Write a study with some keys changed."""

        def study_file(**changes: Any) -> Path:
            keys = {"agents": ["FMQ", "FlowBC", "SAC"], "envs": ["OnlineTest/Reach-v0"], "seeds": 1, "backend": "dummy"}
            keys |= {"steps": 9, "online_steps": 6, "datasets": {"OnlineTest/Reach-v0": "reach.hdf5"}, "eval_episodes": 1}
            path = tmp_path / "two.yaml"
            path.write_text(yaml.safe_dump(keys | changes))
            return path

        return study_file

    def test_who_gets_which_steps_and_data(self, write) -> None:
        study = Study.read(write(agents=["FMQ", "FlowBC", "SAC", "SB3-PPO"], init_from="x/{seed}.zip"))
        jobs = [job.config for job in study.jobs(Path("runs"))]
        assert [(c.steps, c.online_steps) for c in jobs] == [(9, 6), (9, 0), (6, 0), (6, 0)]
        assert [c.dataset for c in jobs] == ["reach.hdf5"] * 3 + [None]
        assert [c.init_from for c in jobs] == ["x/{seed}.zip"] * 2 + [None] * 2
        for job in study.jobs(Path("runs")):
            args = cli.build_parser().parse_args(job.command())
            assert (args.steps, args.online_steps) == (job.config.steps, job.config.online_steps)
            assert (args.init_from, args.dataset) == (job.config.init_from, job.config.dataset)

    def test_without_online_steps_peers_have_no_data(self, write) -> None:
        path = write()
        path.write_text(path.read_text().replace("online_steps: 6\n", ""))
        jobs = [job.config for job in Study.read(path).jobs(Path("runs"))]
        assert [(c.steps, c.online_steps, c.dataset) for c in jobs] == [
            (9, 0, "reach.hdf5"), (9, 0, "reach.hdf5"), (9, 0, None),
        ]  # fmt: skip

    def test_data_of_ogbench_serve_all_their_tasks(self, write) -> None:
        envs = [CUBE.format(1), CUBE.format(2)]
        named = Study.read(write(agents=["FMQ"], envs=envs, datasets={"cube-single-play-v0": "cube.npz"}))
        assert [job.config.dataset for job in named.jobs(Path("runs"))] == ["cube.npz"] * 2
        made = Study.read(write(agents=["FMQ"], envs=envs, datasets={"cube-single-play-v0": {"steps": 500}}))
        (first, second) = (job.config.dataset for job in made.jobs(Path("runs")))
        assert first == second
        assert re.fullmatch(r"runs/datasets/cube-single-play-v0-[0-9a-f]{8}\.npz", first)
        by_task = Study.read(write(agents=["FMQ"], envs=envs[:1], datasets={envs[0]: {"steps": 500}}))
        assert next(by_task.jobs(Path("runs"))).config.dataset == first

    def test_data_of_ogbench_are_made_once(self, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[CollectConfig] = []

        def collect(config: CollectConfig, command: str) -> None:
            asked.append(config)
            config.out.parent.mkdir(parents=True)
            config.out.write_bytes(b"")

        monkeypatch.setattr("tether.experiments.collect.collect", collect)
        envs, datasets = [CUBE.format(1), CUBE.format(2)], {"cube-single-play-v0": {"steps": 500, "seed": 3}}
        study = Study.read(write(agents=["FMQ"], envs=envs, datasets=datasets, env_kwargs={"max_episode_steps": 9}))
        study.collect(tmp_path / "runs", envs)
        (config,) = asked
        assert (config.env, config.steps, config.seed, config.env_kwargs) == ("cube-single-play-v0", 500, 3, {})
        assert str(config.out) == next(study.jobs(tmp_path / "runs")).config.dataset

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"online_steps": 0}, "'online_steps' must be a whole number above 0, not 0"),
            ({"init_from": 3}, "'init_from' must be a path, in which {env}, {seed} and {agent} may stand, not 3"),
            ({"init_from": "no/{env}.zip"}, "--init-from names no/OnlineTest--Reach-v0.zip, which cannot be read"),
            ({"datasets": {}}, "'datasets' says nothing about OnlineTest/Reach-v0"),
        ],
    )
    def test_refusals(self, write, refused, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
        path = write(**changes)
        assert reason in refused("study", path, "--out", tmp_path / "runs", "--measured", tmp_path / "measured")
        assert [p.name for p in tmp_path.iterdir()] == ["two.yaml"]

    def test_another_online_phase_is_said(self, write, data, tether, refused, monkeypatch: pytest.MonkeyPatch) -> None:
        """A study that runs, whose second form asks for more."""
        monkeypatch.setattr(study_module, "_start", EndedRun)
        hp, datasets = {"FMQ": as_hp(TINY), "SAC": as_hp(TINY_SAC)}, {"OnlineTest/Reach-v0": str(data)}
        path = write(hp=hp, datasets=datasets, agents=["FMQ", "SAC"])
        places = ["--out", path.parent / "runs", "--measured", path.parent / "measured"]
        outcome = tether("study", path, *places)
        assert outcome.code == 0, outcome.out + outcome.err
        runs = {run.agent: run for run in load_runs([path.parent / "measured"])}
        assert (runs["FMQ"].steps, runs["FMQ"].switch, runs["SAC"].steps) == (15, 9, 6)
        assert np.isfinite(runs["FMQ"].success_rate).all()
        assert "2 done before" in tether("study", path, *places).out
        path = write(hp=hp, datasets=datasets, agents=["FMQ", "SAC"], online_steps=7)
        sentence = refused("study", path, *places)
        assert "was run for 9 steps and 6 online, the study now asks for 9 steps and 7 online" in sentence


def as_hp(words: list[str]) -> dict[str, Any]:
    return parse_assignments(words, "--hp")


class EndedRun:
    """A stand-in for the process of a run, that has ended when it has begun."""

    def __init__(self, job: Any, core: int | None) -> None:
        self.returncode = cli.main(job.command())

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None:
        """It has ended already."""

    def wait(self) -> int:
        return self.returncode


# ---------------------------------------------------------------------- OGBench


def test_data_of_ogbench_get_the_rewards_of_the_runs_task(tmp_path: Path) -> None:
    """Against the reader's own relabelling; a run elsewhere, or on data of another format, is left as it is."""
    pytest.importorskip("ogbench")
    rng, n, ends = np.random.default_rng(0), 40, np.arange(40) % 10 == 9
    task = "pointmaze-medium-navigate-singletask-task1-v0"
    arrays = {
        "observations": rng.normal(size=(n, 2)), "actions": rng.uniform(-1, 1, (n, 2)), "terminals": ends,
        "qpos": rng.normal(size=(n, 2)), "qvel": rng.normal(size=(n, 2)),
    }  # fmt: skip
    path = tmp_path / "pointmaze-medium-navigate-v0.npz"
    np.savez(path, **{name: values.astype(bool if name == "terminals" else np.float32) for name, values in arrays.items()})
    relabelled = dataset_of(RunConfig("FMQ", task, 1, dataset=str(path)))
    np.testing.assert_array_equal(relabelled.rewards, load_dataset(path, task=task).rewards)
    assert (relabelled.rewards == -1.0).any()
    assert relabelled.meta["env_id"] == task
    assert not dataset_of(RunConfig("FMQ", "Pendulum-v1", 1, dataset=str(path))).rewards.any()
    other = dsrl.write(tmp_path / "reach.hdf5", played())
    assert len(dataset_of(RunConfig("FMQ", task, 1, dataset=str(other)))) == len(played())
