"""OGSRL's metrics by hand, and the audit of real runs from a real collection."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tether.agents.common.guardian import KernelGuardian
from tether.envs import OfflineDataset, load_dataset, sepsis
from tether.envs.suite import installed
from tether.experiments import audit as audits
from tether.experiments.audit import BEHAVIOUR, Data, RecordedWorld, audit, pairs_of, run_folders
from tether.experiments.audit_report import markdown, picture
from tether.experiments.errors import UsageError
from tether.experiments.treatment_metrics import change, concordance, intensification, mortality, reduction

# ---------------------------------------------------------------------- metrics


def test_concordance():
    logged = np.random.default_rng(0).normal(size=(50, 2))
    assert concordance(logged, logged, 0.1) == 1.0
    assert concordance(logged + np.array([0.2, 0.0]), logged, 0.1) == 0.0
    assert concordance(np.where(np.arange(50)[:, None] < 20, logged, logged + 1.0), logged, 0.1) == 0.4


def test_intensification():
    recommended = np.array([[0.5, 0.0], [0.1, 0.9], [0.6, 0.6], [0.0, 0.0]])
    reference, need = np.full((4, 2), 0.2), np.array([True, True, True, True])
    assert intensification(recommended, reference, need) == 0.75
    assert intensification(recommended, reference, need, margin=0.35) == 0.5
    assert intensification(recommended, reference, need, both=True) == 0.25
    assert intensification(recommended, reference, np.array([False, False, True, True])) == 0.5
    assert np.isnan(intensification(recommended, reference, np.zeros(4, bool)))


def test_change():
    assert change(np.ones((6, 2)), np.arange(6) == 5).tolist() == [0.0, 0.0]
    actions = np.array([[0.0, 0.0], [1.0, 0.5], [9.0, 9.0], [9.0, 8.0]])
    assert change(actions, np.array([False, True, False, True])).tolist() == [0.5, 0.75]  # not across episodes
    assert np.isnan(change(actions[:2], np.array([True, True]))).all()


def test_mortality_and_reduction():
    assert mortality(np.array([False, False])) == 0.0
    assert mortality(np.array([True, False, False, True])) == 0.5
    assert reduction(0.05, 0.1) == pytest.approx(50.0)
    assert reduction(0.2, 0.1) == pytest.approx(-100.0)
    assert np.isnan(reduction(0.1, 0.0))


# ---------------------------------------------------------------------- the recorded world


def corridor() -> OfflineDataset:
    """Two episodes of three steps on a line, of which the second one ends in death."""
    states = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]], np.float32)
    ends = np.arange(6) % 3 == 2
    return OfflineDataset(
        observations=states, next_observations=states + 1.0, actions=np.where(states > 5.0, 0.5, 0.0).astype(np.float32),
        rewards=np.arange(1.0, 7.0, dtype=np.float32), costs=(np.arange(6) == 4).astype(np.float32), terminals=ends,
        timeouts=np.zeros(6, bool), meta={"cost_names": ["pain"], "died": [False, True], "max_episode_steps": 3},
    )  # fmt: skip


def test_recorded_episodes_are_replayed():
    dataset = corridor()
    world = RecordedWorld(dataset, np.array([False, True]))
    guardian = KernelGuardian.fit(pairs_of(dataset.observations, dataset.actions), 0.2)

    def act(observations, _):
        return np.where(observations > 5.0, 0.5, 0.0).astype(np.float32)

    found = world.imagine(act, np.array([[0.0], [10.0]]), 5, guardian)
    values = [1 + 0.99 * 2 + 0.99**2 * 3, 4 + 0.99 * 5 + 0.99**2 * 6]
    assert found["value"] == pytest.approx(np.mean(values), rel=1e-6)
    assert found["costs"].tolist() == pytest.approx([0.99 / 2])
    assert (found["death"], found["length"], found["unsafe"].tolist()) == (0.5, 3.0, pytest.approx([1 / 6]))
    short = world.imagine(act, np.array([[10.0]]), 2, guardian)
    assert (short["death"], short["length"]) == (0.0, 2.0)


@pytest.mark.parametrize(("died", "death"), [([False, False], 0.0), ([True, True], 1.0), (None, np.nan)])
def test_mortality_of_a_lookup(died, death):
    """Of one in which all survive it is 0, and where the data do not say who died it is not a number."""
    dataset = corridor()
    world = RecordedWorld(dataset, None if died is None else np.array(died))
    guardian = KernelGuardian.fit(pairs_of(dataset.observations, dataset.actions), 0.2)
    found = world.imagine(lambda o, _: np.zeros((len(o), 1), np.float32), np.array([[0.0], [1.0]]), 5, guardian)
    assert found["death"] == pytest.approx(death, nan_ok=True)


def test_limits_are_of_the_training_part():
    dataset = corridor()
    data = Data.of(dataset, 0.5)
    assert len(data.unseen) == 1
    assert data.limits()[0] == pytest.approx(0.0 if data.unseen[0] == 1 else 0.99)
    with pytest.raises(UsageError, match=r"none is left: train with --train-share 0\.6"):
        Data.of(dataset, 1.0)


# ---------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Some runs on collected data: folder and dataset."""
    if not installed("icu_sepsis"):
        pytest.skip("icu-sepsis is not installed")
    from tether.experiments.cli import main

    folder = tmp_path_factory.mktemp("lab")
    data = folder / "sepsis.hdf5"
    assert main(["collect", "Sepsis/ICU-Sepsis-v2", "--out", str(data), "--steps", "1500"]) == 0
    common = ["--env", "Sepsis/ICU-Sepsis-v2", "--dataset", str(data), "--train-share", "0.6", "--out", str(folder)]
    common += ["--eval-episodes", "2", "--eval-every", "100"]
    for agent, steps in (("OGSRL", 2), ("MB-TRPO", 2), ("BC", 5)):
        assert main(["train", agent, *common, "--steps", str(steps)]) == 0
    return folder, data


def test_collected_data(lab):
    _, path = lab
    data = load_dataset(path)
    assert data.meta["cost_names"] == ["spo2", "urine"]
    assert (data.observations.shape[1], data.actions.shape[1], data.costs.shape[1]) == (13, 2, 2)
    assert len(data.meta["died"]) == len(data.episode_ends)
    died = np.array(data.meta["died"])
    assert data.terminals[data.episode_ends[died]].all()
    assert 0.1 < died.mean() < 0.3
    sheet = json.loads(path.with_suffix(".json").read_text())
    assert list(sheet["behaviours"]) == ["clinician"]
    assert "died" not in sheet


def test_runs_learn_from_their_share(lab):
    folder, path = lab
    manifest = json.loads((folder / "Sepsis--ICU-Sepsis-v2" / "OGSRL" / "seed-0" / "manifest.json").read_text())
    train = load_dataset(path).split((0.6,))[0]
    assert manifest["config"]["train_share"] == 0.6
    assert manifest["config"]["env_kwargs"] == {"representation": "features"}  # the preset's
    assert manifest["dataset"]["transitions"] == len(train)
    assert manifest["parameters"] > 0


def test_the_audit_of_real_runs(lab, monkeypatch):
    monkeypatch.setattr(audits, "EPISODES", 50)
    monkeypatch.setattr(audits, "SIMULATED", 20)
    folder, path = lab
    about, judged = audit(run_folders([folder]), path)
    assert [one["agent"] for one in judged] == [BEHAVIOUR, "BC", "MB-TRPO", "OGSRL"]
    behaviour = judged[0]
    exact = sepsis.truth(sepsis.process().clinician)
    assert behaviour["real"]["value"] == pytest.approx(exact.value, rel=0.02)
    assert behaviour["real"]["inadmissible"] == 0.0
    assert behaviour["concordance"][-1] > behaviour["concordance"][0]
    assert judged[2]["real"]["inadmissible"] > 0.3  # hardly trained, it acts nearly at random
    assert about["exact"]
    assert 0.5 < about["guardian"]["auc"] < 1.0
    assert about["guardian"]["precision"] > np.mean(~sepsis.process().admissible)
    assert 0.0 < about["guardian"]["recall"] < 1.0
    narrow = audit([folder / "Sepsis--ICU-Sepsis-v2" / "BC" / "seed-0"], path, bandwidth=0.3)[0]
    assert narrow["bandwidth"] == 0.3 < about["bandwidth"]
    assert narrow["guardian"]["recall"] > about["guardian"]["recall"]
    text = "\n".join(markdown(about, judged, "command"))
    for heading in ("## Value and death", "### spo2, limit", "### urine, limit", "## Support", "What the estimate shows"):
        assert heading in text
    assert picture(judged).startswith(b"\x89PNG")
    json.dumps(audits.plain({"policies": judged, **about}))


def test_the_command(lab, monkeypatch, capsys):
    monkeypatch.setattr(audits, "EPISODES", 20)
    monkeypatch.setattr(audits, "SIMULATED", 5)
    folder, path = lab
    out = folder / "report"
    runs = folder / "Sepsis--ICU-Sepsis-v2" / "BC"
    monkeypatch.setattr("sys.argv", ["audit", str(runs), "--dataset", str(path), "--out", str(out)])
    audits.main()
    assert {p.name for p in out.iterdir()} == {"audit.md", "audit.json", "audit.png"}
    assert "| BC " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["audit", str(folder / "nothing"), "--dataset", str(path)])
    with pytest.raises(SystemExit, match="There is no finished run in what was named"):
        audits.main()
    monkeypatch.setattr("sys.argv", ["audit", str(runs), "--dataset", str(path), "--bandwidth", "-1"])
    with pytest.raises(SystemExit, match="A bandwidth is above 0, not -1"):
        audits.main()


def test_the_same_audit_twice(lab, monkeypatch):
    monkeypatch.setattr(audits, "EPISODES", 20)
    monkeypatch.setattr(audits, "SIMULATED", 5)
    folder, path = lab
    first = audit([folder / "Sepsis--ICU-Sepsis-v2" / "OGSRL" / "seed-0"], path)[1][1]
    second = audit([folder / "Sepsis--ICU-Sepsis-v2" / "OGSRL" / "seed-0"], path)[1][1]
    assert audits.plain(first) == audits.plain(second)


def test_days_of_the_diabetic(tether, tmp_path):
    if not installed("glucosim"):
        pytest.skip("glucosim is not installed")
    outcome = tether("collect", "tether/Glucose-v0", "--out", tmp_path / "days.hdf5", "--steps", 1000)
    assert outcome.code == 0, outcome.err
    data = load_dataset(tmp_path / "days.hdf5")
    assert data.meta["cost_names"] == ["hypoglycaemia", "hyperglycaemia"]
    assert (data.episodes().lengths == 96).all()
    assert data.timeouts[data.episode_ends].all()
    basal = np.array([data.actions[start : end + 1, 0].mean() for start, end in zip(
        data.episode_starts, data.episode_ends, strict=True)])  # fmt: skip
    assert basal.std() > 0.05  # every clinician has habits of its own
