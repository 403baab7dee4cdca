"""Training runs: what the folder holds, and how a run stops, goes on, and refuses."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from filelock import FileLock
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.results_plotter import load_results
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tether.agents import MDPO, CheckpointCallback, list_checkpoints, load_checkpoint
from tether.agents.common.checkpoint import find_checkpoint
from tether.agents.common.model_file import read_model
from tether.agents.common.plain import decode
from tether.envs import make_vec
from tether.experiments import callbacks
from tether.experiments.callbacks import COLUMNS, ConfigurationCallback
from tether.experiments.catalogue import OURS
from tether.experiments.interrupts import stoppable
from tether.experiments.logs import STEP, ProgressWriter, drop_episodes_after
from tether.experiments.run_config import RunConfig
from tether.experiments.runs import load_runs
from tether.experiments.train import train


class Costly(gym.Env):
    """Episodes of 10 steps; every third step costs 1 and says so, the others say nothing of costs."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        info = {"cost": 1.0} if self.steps % 3 == 0 else {}
        return np.zeros(2, np.float32), 2.0, self.steps == 10, False, info


class Broken(Costly):
    """Its 150th reward is infinite."""

    total = 0

    def step(self, action):
        self.total += 1
        observation, reward, *rest = super().step(action)
        return observation, float("inf") if self.total == 150 else reward, *rest


class Pictures(Costly):
    """Frames as observations."""

    observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        return np.zeros((36, 36, 3), np.uint8), {}

    def step(self, action):
        return np.zeros((36, 36, 3), np.uint8), *super().step(action)[1:]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    for cls in (Costly, Broken, Pictures):
        gym.register(f"TrainTest/{cls.__name__}-v0", entry_point=cls)
    yield
    for cls in (Costly, Broken, Pictures):
        del gym.registry[f"TrainTest/{cls.__name__}-v0"]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def steps_of(accumulator: EventAccumulator, tag: str) -> list[int]:
    """In order: files that one process makes in the same second are read by their names, ".10" before ".9"."""
    return sorted(event.step for event in accumulator.Scalars(tag))


class TestRunFolder:
    @pytest.fixture
    def folder(self, finished) -> Path:
        return finished[0]

    def test_manifest(self, folder: Path, manifest) -> None:
        m = manifest(folder)
        assert (m["agent"], m["env"], m["seed"], m["status"]) == ("MDPO", "CartPole-v1", 3, "finished")
        assert m["timesteps"] == 320  # the first whole number of rollouts of 64 above 300
        assert m["steps"] == 300
        assert m["wall_seconds"] > 0
        assert m["deterministic"] is True
        assert m["config"]["arguments"]["n_steps"] == 64
        assert m["config"]["arguments"]["policy_kwargs"] == {"net_arch": [8]}
        assert m["config"]["eval_every"] == 100
        assert {"python", "torch", "gymnasium", "stable-baselines3", "tether-rl"} <= set(m["versions"])
        assert m["hardware"]["cores"] == os.cpu_count()
        assert m["backend"] == "DummyVecEnv"
        assert m["device"] == "cpu"
        assert m["parameters"] == sum(p.numel() for p in MDPO.load(folder / "model.zip").policy.parameters())

    def test_command_can_be_typed_again(self, finished, manifest) -> None:
        folder, words, _ = finished
        command = manifest(folder)["command"]
        printed = subprocess.run(["sh", "-c", f"set -- {command}; printf '%s\\n' \"$@\""], capture_output=True, text=True)
        assert printed.stdout.splitlines() == ["tether", *words]

    def test_git_revision(self, folder: Path, manifest) -> None:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        if head.returncode:
            pytest.skip("not a checkout")
        git = manifest(folder)["git"]
        assert len(git["revision"]) == len(head.stdout.strip())
        assert isinstance(git["dirty"], bool)

    def test_evaluations(self, folder: Path, rows, manifest) -> None:
        text = (folder / "evaluations.csv").read_text()
        assert text.splitlines()[0] == "timesteps,mean_reward,std_reward,mean_cost,ep_length,episodes" == ",".join(COLUMNS)
        table = rows(folder / "evaluations.csv")
        assert [int(row["timesteps"]) for row in table] == [100, 200, 320]
        assert manifest(folder)["timesteps"] == 320
        for row in table:
            assert float(row["mean_reward"]) == float(row["ep_length"])  # CartPole gives 1 a step
            assert row["std_reward"] == "0.0"
            assert row["mean_cost"] == ""
            assert row["episodes"] == "1"

    def test_last_evaluation_is_of_the_final_policy(self, folder: Path, rows) -> None:
        """Not of the one before the last update, although both stand at the same step."""
        from tether.experiments.evaluate import evaluate

        env = make_vec("CartPole-v1", 1, backend="dummy", seed=3 + 10_000 + 320)  # seed and step give the episodes
        length = evaluate(MDPO.load(folder / "model.zip"), env, 1).lengths[0]
        assert length == float(rows(folder / "evaluations.csv")[-1]["ep_length"])

    def test_progress(self, folder: Path, rows) -> None:
        table = rows(folder / "progress.csv")
        assert [int(row[STEP]) for row in table] == [64, 100, 128, 192, 200, 256, 320]
        assert {"rollout/ep_rew_mean", "train/trust_region", "train/trust_region_bound", "eval/mean_reward"} <= set(table[0])
        assert float(table[-1]["rollout/ep_rew_mean"]) > 0
        assert float(table[-1]["eval/mean_reward"]) == float(rows(folder / "evaluations.csv")[-1]["mean_reward"])
        assert "hparams" not in table[0]

    def test_tensorboard(self, folder: Path) -> None:
        accumulator = events(folder)
        assert steps_of(accumulator, "rollout/ep_rew_mean") == [64, 128, 192, 256, 320]
        assert steps_of(accumulator, "eval/mean_reward") == [100, 200, 320]
        assert "_hparams_/session_start_info" in accumulator.PluginTagToContent("hparams")
        text = accumulator.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "n_steps: 64" in text
        assert "env: CartPole-v1" in text

    def test_monitor(self, folder: Path) -> None:
        table = load_results(str(folder))
        assert (table["r"] == table["l"]).all()
        assert 200 < table["l"].sum() <= 320

    def test_models(self, folder: Path) -> None:
        for name in ("model.zip", "best_model.zip"):
            model = MDPO.load(folder / name)
            action, _ = model.predict(np.zeros(4, np.float32), deterministic=True)
            assert action in (0, 1)
        assert MDPO.load(folder / "model.zip").num_timesteps == 320

    def test_report_reads_it(self, folder: Path) -> None:
        (run,) = load_runs([folder])
        assert (run.agent, run.env, run.seed, run.finished) == ("MDPO", "CartPole-v1", 3, True)
        assert (run.steps, run.reached) == (300, 320)

    def test_nothing_is_left_over(self, folder: Path) -> None:
        names = {p.name for p in folder.iterdir() if not p.name.startswith("events.out.tfevents")}
        tables = {"progress.csv", "monitor.csv", "evaluations.csv"}
        assert names == {".lock", "manifest.json", "model.zip", "best_model.zip", "checkpoint"} | tables
        assert {p.name for p in (folder / "checkpoint").iterdir()} == {"000001-00000320"}

    def test_the_same_command_says_that_it_is_done(self, finished, tether) -> None:
        folder, words, first = finished
        assert f"{folder}: 320 steps in" in first.out
        before = snapshot(folder)
        code, out, err = tether(*words)
        assert code == 0
        assert out == f"{folder} is finished already (320 steps): nothing to do.\n"
        assert err == ""
        assert snapshot(folder) == before

    @pytest.mark.parametrize(
        ("more", "key"),
        [
            (["--hp", "n_steps=128", "value_batch_size=32"], "n_steps"),
            (["--steps", "301"], "steps"),
            (["--eval-every", "150"], "eval_every"),
            (["--n-envs", "2"], "n_envs"),
            (["--env-kwargs", "sutton_barto_reward=true"], "env_kwargs.sutton_barto_reward"),
        ],
    )
    def test_another_configuration_is_refused(self, finished, refused, more: list[str], key: str) -> None:
        folder, words, _ = finished
        before = snapshot(folder)
        sentence = refused(*words, *more)
        assert f"holds a run with another configuration ('{key}' was " in sentence
        assert snapshot(folder) == before

    def test_other_device_folder_or_pace_is_the_same_run(self, finished, tether) -> None:
        _, words, _ = finished
        assert tether(*words, "--device", "cpu", "--checkpoint-every", 5).code == 0


class TestInterrupt:
    def test_saves_and_goes_on(self, tether, short_run, stop_at, tmp_path: Path, manifest, rows) -> None:
        words = short_run("MDPO", "CartPole-v1", tmp_path / "runs")
        folder = tmp_path / "runs/CartPole-v1/MDPO/seed-0"
        with stop_at(150) as caught:
            code, out, _ = tether(*words)
        assert code == 130
        assert "Stopped at step 150 and saved. To go on:\n  tether train MDPO --env CartPole-v1" in out
        first = manifest(folder)
        assert (first["status"], first["timesteps"]) == ("interrupted", 150)
        assert find_checkpoint(folder / "checkpoint").timesteps == 150
        saved = MDPO.load(folder / "model.zip")
        assert saved.num_timesteps == 150
        for name, value in caught["model"].policy.state_dict().items():
            th.testing.assert_close(saved.policy.state_dict()[name], value, rtol=0, atol=0)

        code, out, _ = tether(*words)
        assert code == 0
        assert f"continuing {folder} at step 150 of 300" in out
        second = manifest(folder)
        assert (second["status"], second["timesteps"]) == ("finished", 320)
        assert second["wall_seconds"] > first["wall_seconds"]
        assert (second["command"], second["started"]) == (first["command"], first["started"])
        evaluated = [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")]
        assert evaluated == [100, 200, 320]
        logged = [int(row[STEP]) for row in rows(folder / "progress.csv")]
        assert logged == [64, 100, 128, 192, 200, 256, 320]
        accumulator = events(folder)
        assert steps_of(accumulator, "eval/mean_reward") == evaluated
        assert steps_of(accumulator, "rollout/ep_rew_mean") == [64, 128, 192, 256, 320]
        assert load_results(str(folder))["l"].sum() <= 320
        assert (folder / "1.monitor.csv").is_file()

    def test_interrupt_before_the_first_step(
        self, tether, short_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        words = short_run("MDPO", "CartPole-v1", tmp_path)
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        with monkeypatch.context() as patch:
            patch.setattr(MDPO, "_setup_learn", interrupt)
            assert tether(*words).code == 130
        assert (manifest(folder)["status"], manifest(folder)["timesteps"]) == ("interrupted", 0)
        assert tether(*words).code == 0
        assert manifest(folder)["timesteps"] == 320

    def test_interrupt_during_the_last_evaluation(
        self, tether, short_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest, rows
    ) -> None:
        from tether.experiments.callbacks import EvaluationCallback

        def finish(self: EvaluationCallback) -> None:
            self.evaluate()
            raise KeyboardInterrupt

        words = short_run("MDPO", "CartPole-v1", tmp_path)
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        with monkeypatch.context() as patch:
            patch.setattr(EvaluationCallback, "finish", finish)
            assert tether(*words).code == 130
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [100, 200, 320]
        assert tether(*words).code == 0
        assert manifest(folder)["timesteps"] == 320
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [100, 200, 320]

    def test_killed_run_goes_on_from_its_checkpoint(
        self, tether, short_run, stop_at, killed, tmp_path: Path, manifest, rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was logged after the checkpoint is dropped, so that every curve is one line."""
        words = short_run("MDPO", "CartPole-v1", tmp_path)
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        save_once_at(monkeypatch, 130)
        with stop_at(290, killed), pytest.raises(killed):
            tether(*words)
        assert manifest(folder)["status"] == "running"
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [100, 200]
        assert manifest(folder)["timesteps"] == 130
        code, out, _ = tether(*words)
        assert code == 0
        assert "at step 130 of 300" in out
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [100, 200, 320]
        logged = [int(row[STEP]) for row in rows(folder / "progress.csv")]
        assert logged == [64, 100, 128, 192, 200, 256, 320]
        accumulator = events(folder)
        assert steps_of(accumulator, "eval/mean_reward") == [100, 200, 320]
        assert steps_of(accumulator, "train/loss") == [64, 128, 192, 256, 320]
        episodes = load_results(str(folder))
        assert 130 < episodes["l"].sum() <= 320
        assert {p.name for p in folder.glob("*monitor.csv")} == {"monitor.csv", "1.monitor.csv"}

    def test_killed_before_its_first_checkpoint_starts_anew(
        self, tether, short_run, stop_at, killed, tmp_path: Path, rows
    ) -> None:
        words = short_run("MDPO", "CartPole-v1", tmp_path)
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        with stop_at(150, killed), pytest.raises(killed):
            tether(*words)
        assert steps_of(events(folder), "eval/mean_reward") == [100]
        (folder / "log.txt").write_text("a study's log stays")
        assert tether(*words).code == 0
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [100, 200, 320]
        assert steps_of(events(folder), "eval/mean_reward") == [100, 200, 320]
        assert load_results(str(folder))["l"].sum() <= 320
        assert (folder / "log.txt").is_file()

    def test_replay_buffer_and_random_state_come_back(self, tether, short_run, stop_at, tmp_path: Path) -> None:
        words = short_run("SAC", "Pendulum-v1", tmp_path)
        folder = tmp_path / "Pendulum-v1/SAC/seed-0"
        with stop_at(100) as caught:
            assert tether(*words).code == 130
        draws = []
        for _ in range(2):
            model = load_checkpoint(SAC, folder / "checkpoint", make_vec("Pendulum-v1", 1, backend="dummy"), "cpu")
            draws.append((random.random(), np.random.random(), th.rand(3).tolist()))  # noqa: NPY002
        assert draws[0] == draws[1]
        before = caught["model"].replay_buffer
        assert model.replay_buffer.size() == before.size() == 104  # saved before the step in which it stopped
        for name in ("observations", "actions", "rewards", "next_observations", "dones"):
            np.testing.assert_array_equal(getattr(model.replay_buffer, name)[:104], getattr(before, name)[:104])
        assert model.replay_buffer.buffer_size == 300  # never more than the run collects
        for mine, other in zip(model.actor.optimizer.state.values(), before_states(caught["model"]), strict=True):
            assert th.equal(mine["exp_avg"], other["exp_avg"])
        with capture_start() as start:
            assert tether(*words).code == 0
        assert start["size"] == start["timesteps"] == 104

    def test_normaliser_of_a_peer_comes_back(self, tether, short_run, stop_at, tmp_path: Path) -> None:
        words = short_run("SB3-PPO", "Pendulum-v1", tmp_path, hp=("normalize=true",))
        folder = tmp_path / "Pendulum-v1/SB3-PPO/seed-0"
        with stop_at(100) as caught:
            assert tether(*words).code == 130
        before = caught["model"].get_vec_normalize_env()
        model = load_checkpoint(PPO, folder / "checkpoint", make_vec("Pendulum-v1", 1, backend="dummy", normalize=True), "cpu")
        after = model.get_vec_normalize_env()
        assert after.obs_rms.count == before.obs_rms.count - 1 > 100  # it stopped in the step after the checkpoint
        with capture_start() as start:
            assert tether(*words).code == 0
        assert start["count"] == after.obs_rms.count
        best, last = (read_model(folder / name).normalizer for name in ("best_model.zip", "model.zip"))
        assert decode(best["obs_rms"]).count <= decode(last["obs_rms"]).count  # a model's statistics are those of its moment
        assert not list(folder.glob("*.pkl"))

    def test_evaluations_normalise_as_the_training_does(
        self, tether, short_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original, counts = callbacks.evaluate, []

        def spy(model: PPO, env: VecNormalize, *how: Any) -> Any:
            counts.append([env.obs_rms.count, model.get_vec_normalize_env().obs_rms.count])
            result = original(model, env, *how)
            counts[-1].append(env.obs_rms.count)  # evaluations move no statistics
            return result

        monkeypatch.setattr(callbacks, "evaluate", spy)
        assert tether(*short_run("SB3-PPO", "Pendulum-v1", tmp_path, steps=128, hp=("normalize=true",))).code == 0
        assert len(counts) == 2
        for before, training, after in counts:
            assert before == training == after >= 100

    @pytest.mark.parametrize("agent", ["MDPO", "OffPolicyMDPO", "SB3-PPO", "DQN"])
    def test_resumed_run_is_the_uninterrupted_one(self, tether, short_run, stop_at, tmp_path: Path, agent: str, rows) -> None:
        """Weights, evaluations and logs; peers are stopped where SB3's loop loses nothing."""
        words = [short_run(agent, "CartPole-v1", tmp_path / out) for out in ("whole", "parts")]
        assert tether(*words[0]).code == 0
        for step in (90, 170, 171, 260):
            with stop_at(step):
                assert tether(*words[1]).code in (0, 130)  # a peer's last rollout may be under way
        assert tether(*words[1]).code == 0
        whole, parts = (tmp_path / out / f"CartPole-v1/{agent}/seed-0" for out in ("whole", "parts"))
        weights = [read_model(folder / "model.zip", "cpu").params["policy"] for folder in (whole, parts)]
        assert all(th.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert rows(whole / "evaluations.csv") == rows(parts / "evaluations.csv")
        if agent in OURS:  # SB3 logs an update with the next rollout, and a new logger does not know it
            logged = [[_without_time(row) for row in rows(folder / "progress.csv")] for folder in (whole, parts)]
            assert logged[0] == logged[1]
        returns = [sorted(load_results(str(folder))["r"]) for folder in (whole, parts)]
        assert returns[0] == returns[1]

    def test_sigterm_and_a_live_lock(self, short_run, refused, tmp_path: Path, manifest) -> None:
        """A real process: while it runs nobody else may, and ``kill`` makes it save itself."""
        words = short_run("MDPO", "CartPole-v1", tmp_path, steps=10_000_000)
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        process = subprocess.Popen(
            [sys.executable, "-m", "tether", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            wait_for(lambda: (folder / "evaluations.csv").is_file(), process)
            assert "is in use by a run that is still going" in refused(*words)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "Traceback" not in err
        assert "and saved. To go on:\n  tether train MDPO" in out
        m = manifest(folder)
        assert m["status"] == "interrupted"
        assert m["timesteps"] >= 100
        assert MDPO.load(folder / "model.zip").num_timesteps == m["timesteps"]
        assert list_checkpoints(folder / "checkpoint")[-1].timesteps == m["timesteps"]


def save_once_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the periodic checkpoint fall on one step, instead of on a moment of the clock."""

    def on_step(self: CheckpointCallback) -> bool:
        if self.num_timesteps == step:
            self.save()
        return True

    monkeypatch.setattr(CheckpointCallback, "_on_step", on_step)


def _without_time(row: dict[str, str]) -> dict[str, str]:
    """Without what the clock decides."""
    return {key: value for key, value in row.items() if key not in ("time/fps", "time/time_elapsed", "time/iterations")}


def before_states(model: Any) -> list[dict[str, th.Tensor]]:
    return list(model.actor.optimizer.state.values())


@contextmanager
def capture_start() -> Iterator[dict[str, Any]]:
    """What the model of a training in the block is when it starts."""
    seen: dict[str, Any] = {}
    original = ConfigurationCallback._on_training_start

    def capture(callback: ConfigurationCallback) -> None:
        model = callback.model
        seen["timesteps"] = model.num_timesteps
        seen["observation"] = np.array(model._last_obs)
        if getattr(model, "replay_buffer", None) is not None:
            seen["size"] = model.replay_buffer.size()
        if model.get_vec_normalize_env() is not None:
            seen["count"] = model.get_vec_normalize_env().obs_rms.count
        original(callback)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigurationCallback, "_on_training_start", capture)
        yield seen


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.1)


class TestCheckpoint:
    def test_damaged(self, tether, short_run, stop_at, tmp_path: Path, caplog) -> None:
        """A damaged checkpoint is passed over; where all are, the run is refused and nothing is lost."""
        words = short_run("MDPO", "CartPole-v1", tmp_path)
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        for step in (70, 140):
            with stop_at(step):
                assert tether(*words).code == 130
        _, second = list_checkpoints(folder / "checkpoint")
        (second.folder / "model.zip").write_bytes(b"no such thing")
        with stop_at(75):
            assert "at step 70 of 300" in tether(*words).out
        assert f"{second.folder / 'model.zip'} is missing or not as it was written" in caplog.text

    @pytest.mark.parametrize("name", ["model.zip", "state.npz", "state.json"])
    def test_every_one_damaged(self, tether, refused, short_run, stop_at, tmp_path: Path, name: str, manifest) -> None:
        words = short_run("MDPO", "CartPole-v1", tmp_path)
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        with stop_at(70):
            assert tether(*words).code == 130
        (only,) = list_checkpoints(folder / "checkpoint")
        (only.folder / name).write_bytes(b"no such thing")
        before = snapshot(folder)
        assert f"Every checkpoint in {folder / 'checkpoint'} is damaged" in refused(*words)
        assert snapshot(folder) == before
        assert manifest(folder)["status"] == "interrupted"

    def test_damaged_replay_buffer(self, tether, refused, short_run, stop_at, tmp_path: Path) -> None:
        words = short_run("SAC", "Pendulum-v1", tmp_path)
        folder = tmp_path / "Pendulum-v1/SAC/seed-0/checkpoint"
        with stop_at(20):
            assert tether(*words).code == 130
        block = next((folder / "blocks").glob("*.bin"))
        os.truncate(block, 100)
        assert f"{block} is missing or not as it was written" in refused(*words)

    def test_checkpoint_of_an_older_version(self, tether, refused, short_run, stop_at, tmp_path: Path) -> None:
        words = short_run("MDPO", "CartPole-v1", tmp_path)
        with stop_at(70):
            assert tether(*words).code == 130
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        shutil.rmtree(folder / "checkpoint")
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint/state.json").write_text('{"timesteps": 70}')
        before = snapshot(folder)
        assert "was begun with an older Tether" in refused(*words)
        assert snapshot(folder) == before


class TestFolder:
    def test_file_in_the_way(self, refused, short_run, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("I am a file")
        sentence = refused(*short_run("MDPO", "CartPole-v1", tmp_path / "runs"))
        assert f"{tmp_path / 'runs/CartPole-v1/MDPO/seed-0'} cannot be written (" in sentence
        assert [p.name for p in tmp_path.iterdir()] == ["runs"]
        assert (tmp_path / "runs").read_text() == "I am a file"

    def test_lock(self, refused, short_run, tmp_path: Path) -> None:
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        folder.mkdir(parents=True)
        with FileLock(folder / ".lock"):
            sentence = refused(*short_run("MDPO", "CartPole-v1", tmp_path))
        assert f"{folder} is in use by a run that is still going" in sentence
        assert [p.name for p in folder.iterdir()] == [".lock"]

    @pytest.mark.parametrize("text", ["{", '"words"', "[1]", "null", '{"agent": "MDPO"}', "\xff"])
    def test_damaged_manifest(self, refused, short_run, tmp_path: Path, text: str) -> None:
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(text, encoding="latin-1")
        sentence = refused(*short_run("MDPO", "CartPole-v1", tmp_path))
        assert str(folder / "manifest.json") in sentence
        assert f"delete {folder} to start the run anew" in sentence
        assert [p.name for p in folder.iterdir()] == ["manifest.json"]

    def test_folder_of_an_id_with_a_slash(self) -> None:
        config = RunConfig("MDPO", "dm_control/cheetah-run-v0", seed=4, out=Path("r"))
        assert config.folder == Path("r/dm_control--cheetah-run-v0/MDPO/seed-4")

    def test_what_lies_there_without_a_manifest_is_replaced(self, tether, short_run, finished, tmp_path: Path) -> None:
        folder = tmp_path / "CartPole-v1/MDPO/seed-0"
        folder.mkdir(parents=True)
        shutil.copytree(finished[0], folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        code, out, _ = tether(*short_run("MDPO", "CartPole-v1", tmp_path))
        assert code == 0
        assert "continuing" not in out
        assert steps_of(events(folder), "eval/mean_reward") == [100, 200, 320]


class TestCosts:
    def test_costs_are_evaluated_and_logged(self, tether, short_run, tmp_path: Path, rows) -> None:
        words = short_run("MDPO", "TrainTest/Costly-v0", tmp_path)
        assert tether(*words, "--eval-episodes", 3, "--n-envs", 2).code == 0
        folder = tmp_path / "TrainTest--Costly-v0/MDPO/seed-0"
        for row in rows(folder / "evaluations.csv"):
            assert (row["mean_cost"], row["mean_reward"], row["ep_length"]) == ("3.0", "20.0", "10.0")
        logged = [row["rollout/ep_cost_mean"] for row in rows(folder / "progress.csv") if row["rollout/ep_cost_mean"]]
        assert logged
        assert set(map(float, logged)) == {3.0}
        assert {event.value for event in events(folder).Scalars("eval/mean_cost")} == {3.0}
        (run,) = load_runs([folder])
        assert (run.mean_cost == 3.0).all()


class TestNonFinite:
    @pytest.mark.parametrize("agent", ["MDPO", "PPO", "SB3-PPO"])
    def test_stops_at_the_first_reward(
        self, tether, refused, short_run, tmp_path: Path, agent: str, manifest, rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_once_at(monkeypatch, 130)
        words = short_run(agent, "TrainTest/Broken-v0", tmp_path)
        folder = tmp_path / f"TrainTest--Broken-v0/{agent}/seed-0"
        sentence = refused(*words)
        assert "The reward of env 0 is inf at step 150, so training stopped" in sentence
        assert manifest(folder)["status"] == "failed"
        assert list_checkpoints(folder / "checkpoint")[-1].timesteps == 130
        assert [int(row["timesteps"]) for row in rows(folder / "evaluations.csv")] == [100]
        assert (folder / "best_model.zip").is_file()
        assert [int(row[STEP]) for row in rows(folder / "progress.csv")] == [64, 100, 128]
        assert not load_runs([folder])[0].finished

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_normalised_reward_of_a_peer(self, refused, short_run, tmp_path: Path) -> None:
        """VecNormalize clips rewards, which must not hide an infinite one."""
        words = short_run("SB3-PPO", "TrainTest/Broken-v0", tmp_path, hp=("normalize=true",))
        assert "at step 150, so training stopped" in refused(*words)


class TestPolicies:
    @pytest.mark.parametrize("agent", ["MDPO", "PPO", "SB3-PPO"])
    def test_pictures_get_a_network_for_pictures(self, tether, short_run, tmp_path: Path, agent: str, rows, manifest) -> None:
        words = short_run(agent, "TrainTest/Pictures-v0", tmp_path, steps=64)
        outcome = tether(*words)
        assert outcome.code == 0, outcome.err
        folder = tmp_path / f"TrainTest--Pictures-v0/{agent}/seed-0"
        assert manifest(folder)["parameters"] > 50_000
        assert rows(folder / "evaluations.csv")[-1]["mean_reward"] == "20.0"

    def test_noise_of_td3(self, tether, stop_at, tmp_path: Path) -> None:
        words = ["train", "TD3", "--env", "Pendulum-v1", "--steps", 50, "--out", tmp_path, "--backend", "dummy"]
        with stop_at(10) as caught:
            assert tether(*words, "--hp", "noise_std=0.25", "policy_kwargs.net_arch=[8]").code == 130
        assert caught["model"].action_noise._sigma == pytest.approx([0.25])


def interrupted_by(number: signal.Signals) -> None:
    with stoppable():
        os.kill(os.getpid(), number)
        time.sleep(1)


class TestInterrupts:
    def test_handlers_are_put_back(self) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupted_by(signal.SIGTERM)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_also_an_ignored_interrupt(self) -> None:
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup tether train ... &` starts it
        try:
            with pytest.raises(KeyboardInterrupt):
                interrupted_by(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, former)

    def test_training_in_another_thread(self, short_run, tmp_path: Path) -> None:
        """Handlers belong to the main thread; elsewhere a run works without them."""
        config = RunConfig(
            "MDPO", "CartPole-v1", steps=64, eval_every=64, eval_episodes=1, backend="dummy", n_envs=1, out=tmp_path,
            hp={"n_steps": 64, "value_batch_size": 32},
        )  # fmt: skip
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(train(config, verbose=0)))
        thread.start()
        thread.join()
        assert results[0].finished
        assert results[0].manifest["timesteps"] == 64


class TestLogs:
    def test_configuration_without_tensorboard(self, tmp_path: Path) -> None:
        """Loggers of another make are none of the callback's business."""
        model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
        for logger in (configure(str(tmp_path), ["csv", "json", "log"]), Logger(None, [])):
            model.set_logger(logger)
            model.learn(8, callback=ConfigurationCallback({"gamma": 0.9}, "text"))
            logger.close()

    def test_episodes_after_a_checkpoint_are_dropped(self, tmp_path: Path) -> None:
        lines = ['#{"t_start": 1000.0, "env_id": "X"}', "r,l,t", "1.0,10,5.0", "2.0,20,9.5", "3.0,30,12.0", "4.0,4"]
        (tmp_path / "monitor.csv").write_text("\n".join(lines))  # the kill cut the last row
        drop_episodes_after(tmp_path, 1010.0)
        assert (tmp_path / "monitor.csv").read_text().splitlines() == lines[:4]
        assert load_results(str(tmp_path))["l"].tolist() == [10, 20]

    def test_progress_keeps_what_it_had(self, tmp_path: Path, rows) -> None:
        path = tmp_path / "progress.csv"
        writer = ProgressWriter(path, 0)
        writer.write({"a": 1.5, STEP: 10}, {"a": (), STEP: ()}, 10)
        values = {"b": np.float32(2.0), "hidden": 3, "picture": np.zeros(2)}
        writer.write(values, {"b": (), "hidden": ("csv",), "picture": ()}, 10)
        writer.write({"a": float("nan"), "c": "words, with a comma"}, {"a": (), "c": ()}, 20)
        writer.write({"a": 2.5}, {"a": ()}, 30)
        assert rows(path) == [
            {STEP: "10", "a": "1.5", "b": "2.0", "c": ""},
            {STEP: "20", "a": "nan", "b": "", "c": "words, with a comma"},
            {STEP: "30", "a": "2.5", "b": "", "c": ""},
        ]
        ProgressWriter(path, 20).write({"a": 3.5}, {"a": ()}, 25)
        assert [(row[STEP], row["a"], row["c"]) for row in rows(path)] == [
            ("10", "1.5", ""), ("20", "nan", "words, with a comma"), ("25", "3.5", ""),
        ]  # fmt: skip
        ProgressWriter(path, 0)
        assert path.read_text() == ""


def test_callbacks_of_sb3_still_apply(tmp_path: Path) -> None:
    """The logger is SB3's, so an agent with it takes any callback."""

    class Count(BaseCallback):
        calls = 0

        def _on_step(self) -> bool:
            self.calls += 1
            return True

    from tether.experiments.logs import make_logger

    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    model.set_logger(make_logger(tmp_path, 0, verbose=False))
    count = Count()
    model.learn(16, callback=count)
    model.logger.close()
    assert count.calls == 16
    assert (tmp_path / "progress.csv").read_text().startswith(STEP)


@pytest.mark.skipif(th.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_no_cpu(tether, tmp_path: Path) -> None:
    run = tether("train", "MDPO", "--env", "CartPole-v1", "--steps", 64, "--device", "cuda", "--out", tmp_path)
    assert run.code == 2
    assert "--device cuda finds no GPU here" in run.err
    assert not list(tmp_path.rglob("manifest.json"))
