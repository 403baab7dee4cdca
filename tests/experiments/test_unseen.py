"""ProcGen through the command: training levels and all levels, sampled actions, the diagnostics of Hyper++."""

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th

from tether.envs import scoring_arguments, unseen_arguments
from tether.envs.procgen import build
from tether.experiments.cli import main
from tether.experiments.evaluate import unseen_arguments as unseen_for

ENV = "procgen/bigfish-easy-v0"
SMALL = "policy_kwargs={features_extractor_kwargs: {trunk: nature, trunk_kwargs: {channels: [4, 4, 4]}}}"
WORDS = ["train", "HyperPPO", "--env", ENV, "--n-envs", "4", "--steps", "256", "--eval-every", "128", "--eval-episodes", "2"]
WORDS += ["--hp", "n_steps=16", SMALL, "--device", "cpu"]

needs_procgen = pytest.mark.skipif(build() is None, reason="needs EnvPool with Qt, or OpenAI's build of ProcGen")


def test_arguments_of_the_suites():
    assert unseen_arguments(ENV) == {"num_levels": 0, "start_level": 0}
    assert unseen_arguments("HalfCheetah-v5") is None
    assert unseen_for(ENV, {"num_levels": 0, "start_level": 0}) is None, "nothing is unseen where all levels are trained on"
    assert scoring_arguments("ALE/Pong-v5") == {"clip_reward": False, "terminal_on_life_loss": False}
    assert scoring_arguments(ENV) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert main([*WORDS, "--out", str(out)]) == 0
    return out / "procgen--bigfish-easy-v0" / "HyperPPO" / "seed-0"


@needs_procgen
class TestRun:
    def test_both_sets_of_levels_are_evaluated(self, folder: Path):
        rows = list(csv.DictReader(open(folder / "evaluations.csv")))  # noqa: SIM115
        assert [row["timesteps"] for row in rows] == ["128", "256"]
        assert all(np.isfinite(float(row["unseen_mean_reward"])) for row in rows)

    def test_actions_are_sampled(self, folder: Path):
        assert json.loads((folder / "manifest.json").read_text())["deterministic"] is False

    def test_the_bound_of_the_feature_is_logged_and_kept(self, folder: Path):
        rows = [row for row in csv.DictReader(open(folder / "progress.csv")) if row["train/approx_kl"]]  # noqa: SIM115
        assert len(rows) == 4
        for row in rows:
            assert 0.0 < float(row["train/embedding_norm"]) <= float(row["train/embedding_norm_max"])
            assert float(row["train/embedding_norm_max"]) <= float(row["train/embedding_norm_bound"]) < 1.3951
            assert {"train/clip_fraction", "train/gate", "train/conformal_factor_max", "train/grad_norm_encoder"} <= set(row)

    def test_evaluate_shows_both_and_the_score(self, folder: Path, capsys):
        assert main(["evaluate", str(folder), "--episodes", "2"]) == 0
        out = capsys.readouterr().out
        assert f"HyperPPO on {ENV} as in training, sampled actions" in out
        assert f"HyperPPO on {ENV} with num_levels=0, start_level=0, sampled actions" in out
        assert out.count("normalised score: mean") == 2
        assert main(["evaluate", str(folder), "--episodes", "2", "--deterministic"]) == 0
        assert "sampled" not in capsys.readouterr().out


@needs_procgen
def test_evaluations_change_nothing_in_the_training(tmp_path: Path):
    """Sampled evaluations draw numbers, but not those of the training."""
    weights = []
    for every in ("128", "1000"):
        words = [*WORDS, "--out", str(tmp_path / every)]
        words[words.index("--eval-every") + 1] = every
        assert main(words) == 0
        with zipfile.ZipFile(tmp_path / every / "procgen--bigfish-easy-v0" / "HyperPPO" / "seed-0" / "model.zip") as archive:
            weights.append(th.load(archive.open("policy.pth"), weights_only=True))
    assert all(th.equal(weights[0][name], weights[1][name]) for name in weights[0])
