"""Offline agents through the command: data, runs that go on, studies that collect, tables in units of safe RL."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from matplotlib.image import imread

from tests.kit.offline import OneStep, random_dataset
from tether.envs import OfflineDataset, load_dataset
from tether.envs.datasets import dsrl
from tether.experiments.behaviours import PENALTY, penalised
from tether.experiments.errors import UsageError
from tether.experiments.presets import preset
from tether.experiments.safe_scores import cost_limit, normalized_cost, normalized_reward

gym.register("KitTest/OneStep-v0", "tests.kit.offline:OneStep", max_episode_steps=1)

TINY = ["batch_size=16", "policy_kwargs.net_arch=[8]"]
TINY_FISOR = [*TINY, "critic_batch_size=8", "policy_kwargs.width=8", "policy_kwargs.n_blocks=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tether):
    """A small dataset of the point robot, and the outcome of the command."""
    folder = tmp_path_factory.mktemp("data")
    outcome = tether("collect", "PointRobot-v0", "--out", folder / "set.hdf5", "--steps", 2500)
    assert outcome.code == 0, outcome.err
    return folder, outcome


def run_words(data, out, *more, agent="BC", hp=TINY, steps=60):
    words = ["train", agent, "--env", "PointRobot-v0", "--dataset", data[0] / "set.hdf5", "--steps", steps, "--out", out]
    return [*words, "--eval-every", 30, "--eval-episodes", 1, "--hp", *hp, *more]


# ---------------------------------------------------------------------- collect


def test_collected_files_are_in_dsrls_format(data):
    with h5py.File(data[0] / "set.hdf5") as file:
        lengths = {key: len(file[key]) for key in file}
        assert set(lengths) == {
            "observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts", "constraint_values",
        }  # fmt: skip
        assert len(set(lengths.values())) == 1
        shares = json.loads(file.attrs["behaviours"])
    assert set(shares) == {"random", "reward", "safe"}
    dataset = load_dataset(data[0] / "set.hdf5")
    assert len(dataset) >= 2500
    assert dataset.meta["env_id"] == "PointRobot-v0"
    assert dataset.meta["max_episode_steps"] == 300
    returns, costs, _ = dataset.episodes()
    assert (dataset.meta["reference_min_return"], dataset.meta["reference_max_return"]) == (returns.min(), returns.max())
    assert (costs == 0).any()
    assert (costs > 0).any()
    assert np.array_equal(dataset.costs > 0, dataset.constraint_values > 0)


def test_next_observations_follow(data):
    dataset = load_dataset(data[0] / "set.hdf5")
    goes_on = ~(dataset.terminals | dataset.timeouts)[:-1]
    assert np.array_equal(np.asarray(dataset.next_observations)[:-1][goes_on], np.asarray(dataset.observations)[1:][goes_on])


def test_datasheet_and_picture(data):
    sheet = json.loads((data[0] / "set.json").read_text())
    dataset = load_dataset(data[0] / "set.hdf5")
    assert sheet["transitions"] == len(dataset)
    assert sheet["sha256"] == dataset.meta["sha256"]
    assert sum(part["transitions"] for part in sheet["behaviours"].values()) == len(dataset)
    assert sheet["cost"]["max"] == dataset.episodes().costs.max()
    assert (data[0] / "set.png").read_bytes().startswith(b"\x89PNG")
    assert f"{len(dataset):,} transitions, {sheet['episodes_without_cost']} of {sheet['episodes']} episodes" in data[1].out
    assert not list(data[0].glob(".*partial"))


def test_same_seed_same_file(data, tether, tmp_path):
    tether("collect", "PointRobot-v0", "--steps", 2500, "--out", tmp_path / "again.hdf5")
    assert (tmp_path / "again.hdf5").read_bytes() == (data[0] / "set.hdf5").read_bytes()


@pytest.fixture(scope="module")
def behaviours(tmp_path_factory, tether):
    """A folder with behaviours trained for a moment, on a task without costs, and the outcome of the command."""
    folder = tmp_path_factory.mktemp("behaviours")
    words = ["collect", "Pendulum-v1", "--steps", 9000, "--train-steps", 8192, "--cache", folder]
    return folder, words, tether(*words, "--out", folder / "set.hdf5")


def test_behaviours_are_trained_once(behaviours, tether, tmp_path):
    folder, words, first = behaviours
    assert first.code == 0, first.err
    assert "training behaviours of Pendulum-v1, 8,192 steps" in first.out
    assert "are not both in it" in first.out  # Pendulum has no costs
    shares = json.loads((folder / "set.json").read_text())["behaviours"]
    assert {"random", "novice", "reward", "safe"} <= set(shares)
    again = tether(*words, "--out", tmp_path / "again.hdf5")
    assert "training" not in again.out
    assert (tmp_path / "again.hdf5").read_bytes() == (folder / "set.hdf5").read_bytes()


def test_actions_of_other_bounds_are_scaled(behaviours):
    dataset = load_dataset(behaviours[0] / "set.hdf5")
    assert np.abs(np.asarray(dataset.actions)).max() <= 1.0
    assert np.asarray(dataset.meta["action_high"]).tolist() == [2.0]


def test_an_interrupted_collection_goes_on(data, tether, tmp_path, monkeypatch):
    """Rounds that are finished are not collected again, and the file is the same."""
    from tether.experiments import collect

    words = ["collect", "PointRobot-v0", "--steps", 2500]
    run, rounds = collect.run_round, []

    def interrupted(*arguments):
        if len(rounds) == 2:
            raise KeyboardInterrupt
        rounds.append(1)
        return run(*arguments)

    monkeypatch.setattr(collect, "run_round", interrupted)
    assert tether(*words, "--out", tmp_path / "set.hdf5").code == 130
    assert not (tmp_path / "set.hdf5").exists()
    random = ["--seed", 1, "--behaviour", "random"]
    other = tether("collect", "PointRobot-v0", "--steps", 500, *random, "--out", tmp_path / "set.hdf5")
    assert other.code == 2
    assert "rounds of another collection" in other.err
    rounds.clear()
    monkeypatch.setattr(collect, "run_round", lambda *arguments: rounds.append(1) or run(*arguments))
    assert tether(*words, "--out", tmp_path / "set.hdf5").code == 0
    assert (tmp_path / "set.hdf5").read_bytes() == (data[0] / "set.hdf5").read_bytes()
    assert 0 < len(rounds) < 2500 // 8


def test_a_folder_gets_a_file_named_by_dsrls_rule(tether, tmp_path):
    outcome = tether("collect", "PointRobot-v0", "--out", tmp_path, "--steps", 400, "--behaviour", "random")
    assert outcome.code == 0, outcome.err
    (path,) = tmp_path.glob("*.hdf5")
    _, costs, _ = load_dataset(path).episodes()
    assert path.name == f"PointRobot-v0-{int(np.ceil(costs.max()))}-{len(costs)}.hdf5"


def test_saved_agents_are_behaviours(behaviours, tether, tmp_path):
    model = next(behaviours[0].rglob("reward.zip"))
    outcome = tether("collect", "Pendulum-v1", "--out", tmp_path / "x.hdf5", "--steps", 2000, "--behaviour", model, "random")
    assert outcome.code == 0, outcome.err
    assert set(json.loads((tmp_path / "x.json").read_text())["behaviours"]) == {str(model), "random"}


def test_unknown_behaviours_are_refused(tether, tmp_path):
    outcome = tether("collect", "PointRobot-v0", "--out", tmp_path / "x.hdf5", "--behaviour", "rewards")
    assert (outcome.code, "Did you mean 'reward'" in outcome.err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_where_it_costs_there_is_no_reward():
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = penalised(DummyVecEnv([OneStep, OneStep]))
    env.seed(0)
    states = env.reset()
    _, rewards, _, infos = env.step(np.array([[-0.5], [0.5]], np.float32))
    raw = env.total / env.count
    assert [info["cost"] for info in infos] == [0.0, 1.0]
    assert rewards[0] == pytest.approx(1.0 - abs(-0.5 - states[0, 0]))
    assert rewards[1] == pytest.approx(-PENALTY * raw)


# ---------------------------------------------------------------------- train


@pytest.mark.parametrize(("agent", "hp"), [("BC", TINY), ("FISOR", TINY_FISOR)])
def test_a_run(data, tether, tmp_path, agent, hp):
    outcome = tether(*run_words(data, tmp_path, agent=agent, hp=hp))
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "PointRobot-v0" / agent / "seed-0"
    manifest = json.loads((folder / "manifest.json").read_text())
    dataset = load_dataset(data[0] / "set.hdf5")
    assert manifest["config"]["dataset"] == manifest["dataset"]["sha256"] == dataset.meta["sha256"]
    assert manifest["dataset"]["source"] == "set.hdf5"
    assert manifest["dataset"]["transitions"] == len(dataset)
    with open(folder / "evaluations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["timesteps"]) for row in rows] == [30, 60]
    assert all(float(row["mean_cost"]) >= 0.0 for row in rows)
    with open(folder / "progress.csv", newline="") as file:
        assert any("loss" in key and row[key] for row in csv.DictReader(file) for key in row)
    assert tether(*run_words(data, tmp_path, agent=agent, hp=hp)).out.startswith(f"{folder} is finished already")
    evaluated = tether("evaluate", folder, "--episodes", 2)
    assert evaluated.code == 0, evaluated.err
    assert "cost: mean" in evaluated.out


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(data, tether, tmp_path, monkeypatch):
    from tether.agents import BC

    whole = tether(*run_words(data, tmp_path / "whole"))
    assert whole.code == 0
    update, calls = BC.update, []

    def stop(self, draw, number):
        calls.append(number)
        if len(calls) == 25:
            signal.raise_signal(signal.SIGINT)
        return update(self, draw, number)

    monkeypatch.setattr(BC, "update", stop)
    assert tether(*run_words(data, tmp_path / "parts")).code == 130
    monkeypatch.setattr(BC, "update", update)
    assert tether(*run_words(data, tmp_path / "parts")).code == 0
    whole, parts = (tmp_path / name / "PointRobot-v0" / "BC" / "seed-0" for name in ("whole", "parts"))
    assert (whole / "evaluations.csv").read_text() == (parts / "evaluations.csv").read_text()
    import torch as th

    from tether.agents.common.model_file import read_model

    first, second = (read_model(folder / "model.zip").params["policy"] for folder in (whole, parts))
    assert all(th.equal(first[name], second[name]) for name in first)


def test_another_dataset_is_another_run(data, tether, tmp_path):
    assert tether(*run_words(data, tmp_path)).code == 0
    other = tmp_path / "other.hdf5"
    dsrl.write(other, load_dataset(data[0] / "set.hdf5").select(slice(0, 500)))
    words = run_words(data, tmp_path)
    words[words.index("--dataset") + 1] = other
    outcome = tether(*words)
    assert outcome.code == 2
    assert "another configuration ('dataset' was" in outcome.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "FISOR", "--env", "PointRobot-v0"], "FISOR learns from data: give --dataset FILE"),
        (["train", "MDPO", "--env", "PointRobot-v0", "--dataset", "x.hdf5"], "MDPO learns in its environment"),
        (["train", "BC", "--env", "PointRobot-v0", "--dataset", "no-such.hdf5"], "no-such.hdf5"),
    ],
)
def test_what_cannot_be_run_is_said(tether, tmp_path, words, sentence):
    outcome = tether(*words, "--out", tmp_path)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert not list(tmp_path.iterdir())


def test_data_that_an_agent_cannot_use_is_refused_in_a_sentence(data, tether, tmp_path):
    words = run_words(data, tmp_path, agent="BC-Safe", hp=[*TINY, "cost_limit=-1"])
    outcome = tether(*words)
    assert outcome.code == 2
    assert "No episode's cost is at most -1" in outcome.err
    words = run_words(data, tmp_path)
    words[words.index("PointRobot-v0")] = "Pendulum-v1"
    outcome = tether(*words)
    assert outcome.code == 2
    assert "observations have the shape (11,), and the agent's (3,)" in outcome.err


def test_limits_of_safe_cloning_follow_the_suite():
    assert preset("BC-Safe", "SafetyHalfCheetahVelocity-v1")["cost_limit"] == 10.0
    assert preset("BC-Safe", "SafetyBallRun-v0")["cost_limit"] == 5.0
    assert "cost_limit" not in preset("BC", "SafetyBallRun-v0")
    assert preset("FISOR", "PointRobot-v0")["cost_temperature"] == 2.0


# ---------------------------------------------------------------------- studies and reports


def test_a_study_collects_trains_and_reports(tether, tmp_path):
    study = tmp_path / "small.yaml"
    study.write_text(
        "agents: [BC, BC-Safe, FISOR]\nenvs: [PointRobot-v0]\nseeds: 1\nsteps: 20\neval_every: 20\neval_episodes: 1\n"
        "datasets: {PointRobot-v0: {steps: 600, seed: 3}}\n"
        "hp:\n  BC: {batch_size: 16}\n  BC-Safe: {batch_size: 16}\n"
        "  FISOR: {batch_size: 16, critic_batch_size: 8, policy_kwargs: {width: 8, n_blocks: 1, net_arch: [8]}}\n"
    )
    words = ["study", study, "--jobs", 2, "--out", tmp_path / "runs", "--measured", tmp_path / "measured"]
    outcome = tether(*words)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "collecting the dataset of PointRobot-v0" in outcome.out
    again = tether(*words)
    assert (again.code, "3 done before" in again.out) == (0, True)
    report = tether("report", tmp_path / "measured", "--out", tmp_path / "report").out
    assert "### PointRobot-v0, cost limit 5" in report
    (row,) = [line for line in report.split("cost limit 5")[1].splitlines() if line.startswith("| FISOR ")]
    assert row.count("|") == 10
    assert "](reward-cost.png)" in report
    assert imread(tmp_path / "report" / "reward-cost.png").shape[2] == 4


def test_studies_without_data_are_refused(tether, tmp_path):
    study = tmp_path / "small.yaml"
    study.write_text("agents: [BC]\nenvs: [PointRobot-v0]\nseeds: 1\nsteps: 20\n")
    outcome = tether("study", study, "--out", tmp_path / "runs", "--measured", tmp_path / "measured")
    assert (outcome.code, "'datasets' says nothing about PointRobot-v0" in outcome.err) == (2, True)


def test_scores_of_safe_rl():
    """Section 11 of FISOR's specification."""
    assert normalized_reward(7.0, -3.0, 7.0) == 1.0
    assert normalized_reward(-3.0, -3.0, 7.0) == 0.0
    assert normalized_cost(10.0, 10.0) == 1.0
    assert normalized_cost(0.0, 0.0) == 1.0
    assert normalized_cost(3.0, 0.0) == 4.0
    assert (cost_limit("SafetyHalfCheetahVelocity-v1"), cost_limit("SafetyBallRun-v0")) == (10.0, 5.0)


def test_published_numbers_are_read():
    from tether.experiments.published import read_published

    papers = read_published(Path(__file__).parents[2] / "results" / "published")
    fisor = [p for p in papers if p.agent == "FISOR" and p.metric == "normalized_cost"]
    assert {p.env: p.value for p in fisor}["SafetyCarCircle-v0"] == "0.11"


# ---------------------------------------------------------------------- the feasible region


def test_feasible_regions_are_drawn_and_compared(data, tether, tmp_path):
    assert tether(*run_words(data, tmp_path, agent="FISOR", hp=TINY_FISOR, steps=30)).code == 0
    folder, picture = tmp_path / "PointRobot-v0" / "FISOR" / "seed-0", tmp_path / "region.png"
    words = ["evaluate", folder, "--episodes", 1, "--feasibility", picture, "--dataset", data[0] / "set.hdf5"]
    outcome = tether(*words)
    assert outcome.code == 0, outcome.err
    assert "the sign of V_h agrees with the analytic set on" in outcome.out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_agreement_counts_signs(data):
    from types import SimpleNamespace

    import torch as th

    from tether.envs.point_robot import avoidable, states_of
    from tether.experiments.feasibility import agreement

    dataset = load_dataset(data[0] / "set.hdf5")
    truth = avoidable(states_of(np.asarray(dataset.observations)))

    def perfect(rows):
        signs = np.where(avoidable(states_of(rows[0].numpy())), -1.0, 1.0)
        return th.stack([th.zeros(len(signs)), th.from_numpy(signs)]).unsqueeze(0)

    def hopeful(rows):
        return -th.ones(1, 2, rows.shape[1])

    policy = SimpleNamespace(values=perfect, normalized=lambda x: x, device="cpu")
    model = SimpleNamespace(policy=policy)
    assert agreement(model, dataset)[1:] == (1.0, pytest.approx((~truth).mean()), 0.0, 0.0)
    policy.values = hopeful
    assert agreement(model, dataset)[1:] == (pytest.approx(truth.mean()), pytest.approx((~truth).mean()), 1.0, 0.0)


def test_datasets_in_memory_serve_too():
    """An OfflineDataset, a dict of arrays and an object with the attributes are the same to an agent."""
    from types import SimpleNamespace

    from tests.kit.resume import difference, everything
    from tether.agents import BC

    arrays = random_dataset()
    forms = (arrays, SimpleNamespace(**arrays), OfflineDataset(**arrays))
    weights = [everything(BC(seed=0, device="cpu", batch_size=16).learn_offline(form, 3)) for form in forms]
    assert difference(weights[0], weights[1]) == difference(weights[0], weights[2]) == 0.0


def test_other_numbers_of_candidates_are_compared(data, tether, tmp_path, monkeypatch):
    from tether.experiments import candidates

    assert tether(*run_words(data, tmp_path, agent="FISOR", hp=TINY_FISOR, steps=30)).code == 0
    assert tether(*run_words(data, tmp_path, agent="BC", hp=TINY, steps=30)).code == 0
    runs = [tmp_path / "PointRobot-v0" / agent / "seed-0" for agent in ("FISOR", "BC")]
    words = ["candidates", str(runs[0]), "--counts", "1", "2", "--episodes", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    candidates.main()
    (row,) = [line for line in (tmp_path / "candidates.md").read_text().splitlines() if line.startswith("| PointRobot-v0 ")]
    assert row.count("|") == 7
    scores = candidates.candidates([runs[0]], [1, 2], 1)
    assert scores == candidates.candidates([runs[0]], [1, 2], 1)  # the same states, the same draws
    with pytest.raises(UsageError, match="Candidates are 1 or more, not 0"):
        candidates.candidates([runs[0]], [0], 1)
    monkeypatch.setattr("sys.argv", ["candidates", str(runs[1])])
    with pytest.raises(SystemExit, match="a BC, which chooses among no candidates"):
        candidates.main()
