"""Runs of chunk policies evaluated in several ways of acting."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from tether.envs import OfflineDataset
from tether.envs.datasets import dsrl
from tether.experiments import acting, cli
from tether.experiments.acting import Score, markdown
from tether.experiments.errors import UsageError


class Near(gym.Env):
    """Two steps on a line; success is to end near 0."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32), 0
        return self.state, {}

    def step(self, action):
        self.state, self.steps = (self.state + action).astype(np.float32), self.steps + 1
        return self.state, -float(abs(self.state[0])), False, self.steps == 2, {"success": abs(self.state[0]) < 0.5}


class Silent(Near):
    """Without success."""

    def step(self, action):
        return *super().step(action)[:4], {}


for name, cls in (("ActingNear-v0", Near), ("ActingSilent-v0", Silent)):
    gym.register(name, cls)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny runs of four agents."""
    folder, rng, n = tmp_path_factory.mktemp("acting"), np.random.default_rng(0), 200
    observations = rng.uniform(-1.0, 1.0, (n + 1, 1)).astype(np.float32)
    dataset = OfflineDataset(
        observations=observations[:-1], next_observations=observations[1:], rewards=rng.normal(size=n).astype(np.float32),
        actions=rng.uniform(-1.0, 1.0, (n, 1)).astype(np.float32), terminals=np.zeros(n, bool), costs=np.zeros(n, np.float32),
        timeouts=np.arange(n) % 2 == 1,
    )  # fmt: skip
    dsrl.write(folder / "data.hdf5", dataset, {})
    near = [(agent, "ActingNear-v0") for agent in ("FMQ", "QC", "FQL", "FlowBC", "BC")]
    for agent, env in (*near, ("FMQ", "ActingSilent-v0")):
        hp = ["batch_size=8", "policy_kwargs.net_arch=[8]"] + (["horizon=2"] if agent != "BC" else [])
        hp += ["policy_kwargs.n_candidates=3"] if agent in ("FMQ", "QC") else []
        words = ["train", agent, "--env", env, "--dataset", folder / "data.hdf5", "--steps", 5, "--eval-episodes", 2]
        assert cli.main([*map(str, words), "--out", str(folder), "--hp", *hp]) == 0
    return folder


def test_every_way_that_a_policy_has(runs: Path) -> None:
    folders = [runs / "ActingNear-v0" / agent / "seed-0" for agent in ("FMQ", "QC", "FQL", "FlowBC")]
    scores = acting.acting(folders, list(acting.WAYS), 4)
    calls = {(score.agent, score.way): score.calls for score in scores}
    assert calls == {
        ("FMQ", "plain"): 1, ("FMQ", "best-of-n"): 3, ("FMQ", "qgbs"): 20, ("FMQ", "qgbs-jump"): 20,
        ("FMQ", "qgbs-elitist"): 20, ("QC", "plain"): 10, ("QC", "best-of-n"): 30, ("FQL", "plain"): 1,
        ("FlowBC", "plain"): 10,
    }  # fmt: skip
    assert all(0.0 <= score.success_rate <= 1.0 and score.mean_reward < 0.0 for score in scores)
    assert acting.acting(folders[:1], ["plain"], 4) == [s for s in scores if (s.agent, s.way) == ("FMQ", "plain")]


def test_the_command(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "ActingNear-v0" / "FMQ" / "seed-0"
    words = ["acting", run, "--ways", "plain", "qgbs", "--episodes", 3, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    acting.main()
    assert capsys.readouterr().out.strip() == (tmp_path / "acting.md").read_text().strip()
    with open(tmp_path / "acting.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["agent"], row["way"], row["seed"]) for row in rows] == [("FMQ", "plain", "0"), ("FMQ", "qgbs", "0")]


def test_the_table() -> None:
    scores = [Score("A-v0", "FMQ", "plain", seed, rate, -1.0, 1.0) for seed, rate in enumerate((0.2, 0.4, 0.6))]
    scores += [Score("B-v0", "FMQ", "plain", 0, 1.0, -1.0, 1.0), Score("A-v0", "QC", "plain", 0, 0.5, -1.0, 10.0)]
    lines = list(markdown(scores, ["plain"], 50))
    first, second = ([cell.strip() for cell in line.split("|")][1:-1] for line in lines[-2:])
    assert first == ["FMQ", "plain", "1", "0.40 [0.20, 0.60]", "1.00", "0.7"]
    assert "--ways plain --episodes 50`" in "".join(lines)
    assert second == ["QC", "plain", "10", "0.50", "-", "-"]


def test_refusals(runs: Path) -> None:
    with pytest.raises(UsageError, match="no run of an agent with action chunks"):
        acting.acting([runs / "ActingNear-v0" / "BC" / "seed-0"], ["plain"], 2)
    with pytest.raises(UsageError, match="ActingSilent-v0 reports no success"):
        acting.acting([runs / "ActingSilent-v0" / "FMQ" / "seed-0"], ["plain"], 2)
