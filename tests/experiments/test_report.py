"""Reading runs and reporting on them, with real files in the formats of `tether train` and Stable-Baselines3."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from stable_baselines3.common.logger import configure

from tether.experiments.diagnostics import ROWS, export_diagnostics, read_diagnostics
from tether.experiments.errors import UsageError
from tether.experiments.figures import _draw_log, _layout, _place_legend
from tether.experiments.published import COLUMNS, read_published
from tether.experiments.report import SUMMARY_COLUMNS, report
from tether.experiments.runs import RunError, group, load_runs
from tether.experiments.statistics import interval, iqm

HEADER = "timesteps,mean_reward,std_reward,mean_cost,ep_length,episodes"
RESULTS = Path(__file__).parents[2] / "results"


def write_run(
    root: Path,
    agent: str = "MDPO",
    env: str = "Ant-v4",
    seed: int = 0,
    returns: tuple[float, ...] = (10.0, 50.0, 100.0),
    costs: tuple[float, ...] | None = None,
    steps: int = 300_000,
    exported: bool = False,
    **manifest: Any,
) -> Path:
    """A run folder, or an exported run, with evaluations at every 100,000 steps; returns its place."""
    lines = [HEADER]
    for i, value in enumerate(returns):
        lines.append(f"{(i + 1) * 100_000},{value},1.5,{costs[i] if costs else ''},1000.0,10")
    data = {
        "agent": agent,
        "env": env,
        "seed": seed,
        "steps": steps,
        "status": "finished",
        "timesteps": len(returns) * 100_000,
        "wall_seconds": 100.0 * (seed + 1),
        "command": f"tether train {agent} --env {env} --seed {seed} --out {root}",
        "config": {"agent": agent, "env": env, "seed": seed, "n_envs": 1, "arguments": {"learning_rate": 3e-4}},
        "versions": {"python": "3.11.7", "mujoco": "3.6.0"},
        "hardware": {"cpu": "A CPU", "cores": 2, "gpu": None},
        "git": {"revision": "0123456789abcdef", "dirty": False},
    } | manifest
    place = root / env.replace("/", "--") / agent / f"seed-{seed}"
    if exported:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_name(f"seed-{seed}.csv").write_text("\n".join(lines) + "\n")
        place.with_name(f"seed-{seed}.json").write_text(json.dumps(data))
        return place.with_name(f"seed-{seed}.csv")
    place.mkdir(parents=True)
    (place / "evaluations.csv").write_text("\n".join(lines) + "\n")
    (place / "manifest.json").write_text(json.dumps(data))
    return place


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The first Markdown table below a heading."""
    lines = text.split(f"## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:stop])
    return [dict(zip(header, cells, strict=True)) for cells in body]


def summary(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))


class TestLoadRuns:
    def test_run_folder(self, tmp_path: Path) -> None:
        place = write_run(tmp_path, env="dm_control/cheetah-run-v0", seed=3, costs=(3.0, 2.0, 1.0))
        (run,) = load_runs([place])
        assert (run.agent, run.env, run.seed, run.steps) == ("MDPO", "dm_control/cheetah-run-v0", 3, 300_000)
        assert run.finished
        assert run.source == "evaluation"
        assert run.timesteps.dtype == np.int64
        np.testing.assert_array_equal(run.timesteps, [100_000, 200_000, 300_000])
        np.testing.assert_array_equal(run.mean_reward, [10, 50, 100])
        np.testing.assert_array_equal(run.mean_cost, [3, 2, 1])
        np.testing.assert_array_equal(run.episodes, [10, 10, 10])
        assert run.steps_per_second == 300_000 / 400.0

    def test_no_costs_are_nan(self, tmp_path: Path) -> None:
        (run,) = load_runs([write_run(tmp_path)])
        assert np.isnan(run.mean_cost).all()

    def test_tree_folder_and_exported_runs_mix(self, tmp_path: Path) -> None:
        single = write_run(tmp_path / "a", seed=0)
        write_run(tmp_path / "runs", seed=1)
        write_run(tmp_path / "measured" / "study", seed=2, exported=True)
        file = write_run(tmp_path / "b", seed=3, exported=True)
        runs = load_runs([single, tmp_path / "runs", str(tmp_path / "measured"), file, file.with_suffix(".json")])
        assert sorted(run.seed for run in runs) == [0, 1, 2, 3]

    def test_checkpoints_inside_a_run_are_no_runs(self, tmp_path: Path) -> None:
        place = write_run(tmp_path)
        (place / "checkpoint").mkdir()
        (place / "checkpoint" / "manifest.json").write_text("{}")
        assert len(load_runs([tmp_path])) == 1

    def test_a_run_and_its_export_count_once(self, tmp_path: Path) -> None:
        write_run(tmp_path / "runs")
        write_run(tmp_path / "measured", exported=True)
        assert len(load_runs([tmp_path / "runs", tmp_path / "measured", tmp_path])) == 1

    def test_the_finished_copy_counts(self, tmp_path: Path) -> None:
        write_run(tmp_path / "runs", returns=(1.0,), status="running")
        write_run(tmp_path / "measured", exported=True)
        (run,) = load_runs([tmp_path / "runs", tmp_path / "measured"])
        assert run.finished
        assert run.mean_reward[-1] == 100.0

    def test_other_settings_are_another_run(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", config={"n_envs": 8})
        assert len(load_runs([tmp_path])) == 2

    def test_evaluation_at_the_same_step_counts_once(self, tmp_path: Path) -> None:
        place = write_run(tmp_path)
        with (place / "evaluations.csv").open("a") as file:
            file.write("300000,111.0,1.0,,1000.0,10\n")
        (run,) = load_runs([place])
        np.testing.assert_array_equal(run.mean_reward, [10, 50, 111])

    def test_progress_of_a_run_without_evaluations(self, tmp_path: Path) -> None:
        place = write_run(tmp_path, status="running")
        (place / "evaluations.csv").write_text(HEADER + "\n")
        (place / "progress.csv").write_text(
            "rollout/ep_rew_mean,time/total_timesteps,train/loss\n,1024,\n5.5,2048,0.1\n,3072,0.2\n7.5,4096,\n"
        )
        (run,) = load_runs([place])
        assert run.source == "training"
        np.testing.assert_array_equal(run.timesteps, [2048, 4096])
        np.testing.assert_array_equal(run.mean_reward, [5.5, 7.5])

    @pytest.mark.parametrize("formats", [["tensorboard"], ["csv"], ["csv", "tensorboard"]])
    def test_folder_of_stable_baselines3(self, tmp_path: Path, formats: list[str]) -> None:
        folder = tmp_path / "Ant-v4" / "SAC_2"
        logger = configure(str(folder), formats)
        for step in (1000, 2000):
            logger.record("rollout/ep_rew_mean", step / 100)
            logger.record("rollout/ep_cost_mean", 3.0)
            logger.record("time/total_timesteps", step, exclude="tensorboard")
            logger.dump(step)
        logger.close()
        (run,) = load_runs([tmp_path])
        assert (run.agent, run.env, run.seed, run.source, run.finished) == ("SAC", "Ant-v4", 2, "training", True)
        np.testing.assert_array_equal(run.timesteps, [1000, 2000])
        np.testing.assert_allclose(run.mean_reward, [10, 20])
        np.testing.assert_allclose(run.mean_cost, [3, 3])

    def test_logged_evaluations_come_before_training_returns(self, tmp_path: Path) -> None:
        logger = configure(str(tmp_path / "Ant-v4" / "PPO" / "seed-4"), ["tensorboard"])
        logger.record("rollout/ep_rew_mean", 1.0)
        logger.record("eval/mean_reward", 2.0)
        logger.dump(998_400)
        logger.close()
        (run,) = load_runs([tmp_path])
        assert (run.agent, run.env, run.seed, run.source) == ("PPO", "Ant-v4", 4, "evaluation")
        assert run.steps == 1_000_000  # no manifest tells the budget
        assert run.mean_reward[-1] == 2.0


class TestErrors:
    def test_nothing_there(self, tmp_path: Path) -> None:
        for place in (tmp_path, tmp_path / "missing"):
            with pytest.raises(RunError, match="holds no run"):
                load_runs([place])
        assert issubclass(RunError, UsageError)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("manifest.json", '{"agent": "MDPO", ', "not readable JSON"),
            ("manifest.json", '{"agent": "MDPO"}', "does not name env, seed"),
            ("manifest.json", "[]", "does not name agent, env, seed"),
            ("evaluations.csv", HEADER + "\n100000,ten,1,,1000,10\n", "damaged in line 2"),
            ("evaluations.csv", HEADER + "\n100000,10,1,,1000,10\n200000,1", "damaged in line 3"),
            ("evaluations.csv", "a,b\n1,2\n", "has no column timesteps"),
            ("evaluations.csv", HEADER + "\n100000,nan,1,,1000,10\n", "not finite"),
            ("evaluations.csv", HEADER + "\n200000,1,1,,1000,10\n100000,1,1,,1000,10\n", "go back"),
        ],
    )
    def test_damaged_file_is_named(self, tmp_path: Path, name: str, content: str, message: str) -> None:
        place = write_run(tmp_path)
        (place / name).write_text(content)
        with pytest.raises(RunError, match=message) as error:
            load_runs([tmp_path])
        assert str(place) in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("suffix", [".csv", ".json"])
    def test_half_an_export_is_named(self, tmp_path: Path, suffix: str) -> None:
        write_run(tmp_path, exported=True).with_suffix(suffix).unlink()
        with pytest.raises(RunError, match=rf"seed-0\{suffix} is missing"):
            load_runs([tmp_path])

    def test_published_numbers(self, tmp_path: Path) -> None:
        write_run(tmp_path / "runs")
        with pytest.raises(RunError, match="not a folder"):
            report([tmp_path / "runs"], published=tmp_path / "missing")
        (tmp_path / "paper.csv").write_text("agent,value\nMDPO,1\n")
        with pytest.raises(RunError, match="must have the columns"):
            read_published(tmp_path)
        (tmp_path / "paper.csv").write_text(",".join(COLUMNS) + "\nMDPO,Ant-v2,1e7,return,high,,,,\n")
        with pytest.raises(RunError, match="line 2"):
            read_published(tmp_path)

    def test_unknown_environment(self, tmp_path: Path) -> None:
        write_run(tmp_path)
        with pytest.raises(RunError, match="no run on Hopper-v4"):
            report([tmp_path], envs=["Hopper-v4"])


class TestGroups:
    def test_seeds_form_a_row(self, tmp_path: Path) -> None:
        for seed in (2, 0, 1):
            write_run(tmp_path, seed=seed, returns=(1.0, 10.0 * seed), costs=(9.0, 1.0 * seed))
        (row,) = group(load_runs([tmp_path]))
        np.testing.assert_array_equal(row.returns, [0, 10, 20])
        np.testing.assert_array_equal(row.costs, [0, 1, 2])

    def test_settings_and_budgets_are_not_mixed(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", seed=0)
        write_run(tmp_path / "a", seed=1)
        write_run(tmp_path / "b", seed=0, config={"n_envs": 1, "arguments": {"learning_rate": 1e-3}})
        write_run(tmp_path / "c", seed=5, steps=1_000_000)
        rows = {(row.label, row.steps): [run.seed for run in row.runs] for row in group(load_runs([tmp_path]))}
        assert rows == {
            ("MDPO (learning_rate=0.0003)", 300_000): [0, 1],
            ("MDPO (learning_rate=0.001)", 300_000): [0],
            ("MDPO", 1_000_000): [5],
        }

    def test_what_does_not_make_another_experiment(self, tmp_path: Path) -> None:
        write_run(tmp_path, seed=0, config={"seed": 0, "eval_episodes": 10, "backend": "auto", "n_envs": 1})
        write_run(tmp_path, seed=1, config={"seed": 1, "eval_episodes": 20, "backend": "dummy", "n_envs": 1})
        assert len(group(load_runs([tmp_path]))) == 1


class TestReport:
    @pytest.fixture
    def study(self, tmp_path: Path) -> Path:
        """Two agents on two environments, one with costs."""
        for seed in range(5):
            write_run(tmp_path, "MDPO", seed=seed, returns=(10.0, 50.0, 100.0 + seed))
            write_run(tmp_path, "PPO", seed=seed, returns=(10.0, 40.0, 80.0 + 10 * seed))
            for agent, cost in (("MDPO", 20.0), ("PPO", 50.0)):
                returns, costs = (1.0, 2.0, 3.0 + seed), (90.0, 60.0, cost + seed)
                write_run(tmp_path, agent, "SafetyAnt-v1", seed, returns, costs)
        return tmp_path

    def test_table_of_an_environment(self, study: Path) -> None:
        mdpo, ppo = table(report([study]), "Ant-v4")
        low, high = interval(np.arange(100.0, 105.0))
        assert mdpo["agent"] == "MDPO"
        assert (mdpo["seeds"], mdpo["steps"], mdpo["mean"], mdpo["std"]) == ("5", "300k", "102.0", "1.58")
        assert mdpo["return (IQM)"] == "102.0"
        assert mdpo["95 % interval"] == f"[{low:.1f}, {high:.1f}]"
        assert mdpo["steps/s"] == "1000"  # the median of 3000, 1500, 1000, 750, 600
        assert ppo["return (IQM)"] == "100.0"
        assert not any("cost" in column for column in mdpo)

    def test_costs_have_columns_where_they_exist(self, study: Path) -> None:
        rows = {row["agent"]: row for row in table(report([study]), "SafetyAnt-v1")}
        assert rows["MDPO"]["cost (IQM)"] == "22.0"
        assert rows["MDPO"]["cost, 95 % interval"].startswith("[2")
        assert rows["PPO"]["mean cost"] == "52.0"

    def test_probability_of_improvement(self, study: Path) -> None:
        (pair,) = table(report([study]), "Probability of improvement")
        assert (pair["X"], pair["Y"], pair["environments"], pair["runs X / Y"]) == ("MDPO", "PPO", "2", "10 / 10")
        # On Ant 15 of 25 pairs (80 and 90 lose to all, 100 ties once and loses 4 times), on SafetyAnt one half.
        assert pair["P(X has the higher return)"] == f"{((5 + 5 + 4.5) / 25 + 0.5) / 2:.2f}"
        costs = report([study]).split("P(X has the lower cost)")[1].splitlines()[2]
        assert costs.split("|")[3].strip() == "1.00"

    def test_how_it_was_made(self, study: Path) -> None:
        text = report([study]).split("## How it was made")[1]
        assert "tether train MDPO --env Ant-v4 --seed K        # seed 0-4" in text
        assert "Evaluation: deterministic actions, 10 episodes." in text
        assert "mujoco 3.6.0" in text
        assert "Hardware: cpu A CPU, cores 2." in text
        assert "Code: 0123456789ab." in text

    def test_files(self, study: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        text = report([study], out=out)
        assert sorted(path.name for path in out.iterdir()) == ["curves.png", "report.md", "summary.csv"]
        assert (out / "report.md").read_text() == text
        assert "](curves.png)" in text
        assert "curves.png" not in report([study])
        lines = summary(out)
        assert tuple(lines[0]) == SUMMARY_COLUMNS
        finals = [
            float(line["value"])
            for line in lines
            if (line["env"], line["agent"], line["statistic"], line["quantity"]) == ("Ant-v4", "PPO", "final", "return")
        ]
        assert finals == [80, 90, 100, 110, 120]
        (line,) = (x for x in lines if (x["env"], x["agent"], x["statistic"]) == ("Ant-v4", "PPO", "iqm"))
        assert float(line["value"]) == iqm(finals)
        assert (float(line["low"]), float(line["high"])) == interval(finals)
        improvement = [line for line in lines if line["statistic"] == "probability_of_improvement"]
        assert [(x["agent"], x["versus"], x["quantity"]) for x in improvement] == [
            ("MDPO", "PPO", "return"),
            ("MDPO", "PPO", "cost"),
        ]

    def test_picture_shows_both_agents_in_their_colours(self, study: Path, tmp_path: Path) -> None:
        report([study], out=tmp_path / "out")
        picture = imread(tmp_path / "out" / "curves.png")
        assert min(picture.shape[:2]) > 600
        for colour in (0x1F5FD0, 0x4D5560):
            rgb = np.array([colour >> 16, colour >> 8 & 255, colour & 255]) / 255
            assert (np.abs(picture[..., :3] - rgb).max(axis=-1) < 0.02).sum() > 1000

    def test_only_some_environments(self, study: Path) -> None:
        text = report([study], envs=["Ant-v4"])
        assert "## Ant-v4" in text
        assert "SafetyAnt" not in text

    def test_a_new_run_beside_committed_peers(self, tmp_path: Path) -> None:
        new = write_run(tmp_path / "runs", "MDPO", returns=(70.0,), steps=100_000)
        for seed in range(3):
            write_run(tmp_path / "measured", "PPO", seed=seed, returns=(60.0 + seed,), steps=100_000, exported=True)
            write_run(tmp_path / "measured", "PPO", "Hopper-v5", seed=seed, exported=True)
        text = report([new, tmp_path / "measured"], envs=["Ant-v4"], out=tmp_path / "out")
        assert [(row["agent"], row["seeds"]) for row in table(text, "Ant-v4")] == [("MDPO", "1"), ("PPO", "3")]
        assert table(text, "Ant-v4")[0]["95 % interval"] == "-"
        assert table(text, "Probability of improvement")[0]["P(X has the higher return)"] == "1.00"
        assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000

    def test_failed_writing_leaves_the_former_file(self, tmp_path: Path, monkeypatch: Any) -> None:
        run, out = write_run(tmp_path), tmp_path / "out"
        report([run], out=out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        write_bytes = Path.write_bytes

        def full_disk(path: Path, data: bytes) -> int:
            write_bytes(path, data[:100])
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space"):
            report([run], out=out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


class TestFootnotes:
    def test_unfinished_runs_are_left_out(self, tmp_path: Path) -> None:
        write_run(tmp_path, seed=0)
        write_run(tmp_path, seed=1, returns=(1.0,), status="interrupted")
        text = report([tmp_path])
        assert table(text, "Ant-v4")[0]["seeds"] == "1"
        assert "MDPO: unfinished runs are left out (seed 1 at 100k of 300k steps)." in text

    def test_unfinished_runs_count_if_there_is_nothing_else(self, tmp_path: Path) -> None:
        write_run(tmp_path, seed=0, returns=(1.0, 7.0), status="running")
        write_run(tmp_path, seed=1, returns=(), status="running")
        write_run(tmp_path, "PPO")
        text = report([tmp_path], out=tmp_path / "out")
        row = next(row for row in table(text, "Ant-v4") if row["agent"] == "MDPO")
        assert (row["seeds"], row["return (IQM)"]) == ("1", "7")
        assert "MDPO: **no run has finished**" in text
        assert "(seed 0 at 200k of 300k steps, seed 1 at 0 of 300k steps)" in text
        assert "Probability of improvement" not in text

    def test_a_run_that_has_only_begun(self, tmp_path: Path) -> None:
        write_run(tmp_path, returns=(), status="running")
        text = report([tmp_path], out=tmp_path / "out")
        assert table(text, "Ant-v4")[0]["return (IQM)"] == "-"
        assert not (tmp_path / "out" / "curves.png").exists()

    def test_unfinished_runs_without_a_common_step_can_be_drawn(self, tmp_path: Path) -> None:
        place = write_run(tmp_path, seed=0, returns=(1.0,), status="running")
        (place / "evaluations.csv").write_text(f"{HEADER}\n50000,1,1,,1000,10\n")
        write_run(tmp_path, seed=1, returns=(1.0, 2.0), status="running")
        report([tmp_path], out=tmp_path / "out")
        assert (tmp_path / "out" / "curves.png").exists()

    def test_different_lengths(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", seed=0)
        write_run(tmp_path / "b", seed=0, steps=1_000_000)
        text = report([tmp_path])
        assert [row["steps"] for row in table(text, "Ant-v4")] == ["300k", "1M"]
        assert "runs of different lengths (300k, 1M steps) are not mixed" in text

    def test_mujoco_versions(self, tmp_path: Path) -> None:
        write_run(tmp_path, "MDPO")
        write_run(tmp_path, "PPO", versions={"mujoco": "3.3.0"})
        warning = "this table mixes MuJoCo versions, whose dynamics differ** (3.3.0: PPO; 3.6.0: MDPO)"
        assert warning in report([tmp_path])
        write_run(tmp_path / "other", "PPO", "Hopper-v5", versions={"mujoco": "3.3.0"})
        assert "mixes MuJoCo" not in report([tmp_path / "Ant-v4" / "MDPO", tmp_path / "other"])

    def test_training_returns_are_kept_apart(self, tmp_path: Path) -> None:
        write_run(tmp_path, "PPO", seed=0)
        logger = configure(str(tmp_path / "tb" / "Ant-v4" / "PPO_1"), ["tensorboard"])
        logger.record("rollout/ep_rew_mean", 5.0)
        logger.dump(300_000)
        logger.close()
        text = report([tmp_path])
        assert [row["agent"] for row in table(text, "Ant-v4")] == ["PPO", "PPO (training)"]
        assert "PPO (training): returns of training episodes" in text
        assert "Evaluation: deterministic actions, sampled actions during training, 10 episodes." in text
        assert "Without a manifest: 1 of 2 runs" in text


class TestPublished:
    def test_numbers_stand_in_their_own_column(self, tmp_path: Path) -> None:
        for agent in ("MDPO", "PPO", "SAC"):
            write_run(tmp_path / "runs", agent)
        (tmp_path / "mdpo.csv").write_text((RESULTS / "published/mdpo.csv").read_text())
        text = report([tmp_path / "runs"], published=tmp_path)
        column = {row["agent"]: row["published (Ant-v2, 10M steps)"] for row in table(text, "Ant-v4")}
        assert column == {"MDPO": "5211 ± 43", "PPO": "59 ± 133", "SAC": "-"}
        assert "Published MDPO on Ant-v2, 10M steps: 5211 ± 43 (95% CI over 5 seeds)" in text
        assert "arXiv:2005.09814v5, Table 1 p. 8" in text

    def test_other_budgets_are_said_in_the_cells(self, tmp_path: Path) -> None:
        lines = ["A,Ant-v2,1e6,return,10,,,paper,", "PPO,Ant-v3,3e6,return,20,1,std,paper,", "A,Ant-v2,1e6,cost,5,,,p,"]
        (tmp_path / "paper.csv").write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
        write_run(tmp_path / "runs", "A")
        write_run(tmp_path / "runs", "PPO")
        text = report([tmp_path / "runs"], published=tmp_path)
        column = {row["agent"]: row["published"] for row in table(text, "Ant-v4")}
        assert column == {"A": "10 (Ant-v2, 1M steps)", "PPO": "20 ± 1 (Ant-v3, 3M steps)"}

    def test_a_number_of_the_same_budget_stands_alone(self, tmp_path: Path) -> None:
        lines = [f"PPO,Ant-v4,{steps},return,{value},,,paper," for steps, value in ((300_000, 10), (1_000_000, 20))]
        (tmp_path / "paper.csv").write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
        write_run(tmp_path / "runs", "PPO")
        text = report([tmp_path / "runs"], published=tmp_path)
        assert [row["published (Ant-v4, 300k steps)"] for row in table(text, "Ant-v4")] == ["10"]
        assert "20" not in text.split("Published PPO")[1].splitlines()[0]

    def test_no_column_without_numbers(self, tmp_path: Path) -> None:
        write_run(tmp_path, env="Pendulum-v1")
        assert "published" not in report([tmp_path], published=RESULTS / "published")

    def test_committed_numbers(self) -> None:
        papers = {(paper.agent, paper.env): paper for paper in read_published(RESULTS / "published")}
        mdpo = papers["MDPO", "Ant-v2"]
        assert (mdpo.value, mdpo.spread, mdpo.steps) == ("5211", "43", 10_000_000)
        assert papers["OffPolicyMDPO", "HumanoidStandup-v2"].number == "165882 ± 16604"
        assert papers["SAC", "HalfCheetah-v2"].number == "11928"
        assert papers["SAC", "HalfCheetah-v2"].steps is None
        assert all(paper.source for paper in papers.values())


def test_reporting_is_light_to_import() -> None:
    code = (
        "import sys, tether.experiments.report; print({'torch', 'tensorboard', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


class TestUnseenLevelsAndTrustRegion:
    def write(self, root: Path, agent: str, seed: int, exported: bool) -> Path:
        place = write_run(root, agent, "procgen/bigfish-easy-v0", seed, exported=exported)
        table = place if exported else place / "evaluations.csv"
        lines = table.read_text().splitlines()
        unseen = [f"{line},{20.5 + seed},1.0" for line in lines[1:]]
        table.write_text("\n".join([lines[0] + ",unseen_mean_reward,unseen_std_reward", *unseen]) + "\n")
        if exported:
            logged = ["timesteps,approx_kl,clip_fraction", *(f"{t},0.0{t},0.{t}" for t in range(1, 6))]
            place.with_suffix(".diagnostics.csv").write_text("\n".join(logged) + "\n")
        return place

    def test_unseen_returns_scores_and_picture(self, tmp_path: Path) -> None:
        for agent in ("HyperPPO", "HyperPPO-Euclidean"):
            for seed in (0, 1):
                self.write(tmp_path / "runs", agent, seed, exported=True)
        text = report([tmp_path / "runs"], published=RESULTS / "published", out=tmp_path / "out")
        table = next(line for line in text.splitlines() if line.startswith("| HyperPPO "))
        assert [cell.strip() for cell in table.split("|")][4:9] == ["100.0", "[100.0, 100.0]", "100.0", "0", "21.0"]
        score = [line for line in text.splitlines() if line.startswith("| HyperPPO ")][1]
        cells = [cell.strip() for cell in score.split("|")]
        assert cells[3:6] == ["1", "2", f"{(100 - 1) / 39:.3f}"]
        assert cells[7] == f"{(21.0 - 1) / 39:.3f}"
        assert "Published HyperPPO, unseen levels, procgen easy (16 games), 25M steps: 0.41." in text
        assert "trust-region.png" in text
        assert imread(tmp_path / "out" / "trust-region.png").shape[2] == 4

    def test_distances_from_the_offline_policy(self, tmp_path: Path) -> None:
        """FMQ's and MVP's log has distances, and one of them a radius; rows of the offline phase have neither."""
        for agent, bound in (("FMQ", ",0.8"), ("MVP", ""), ("GIRL-NoGrounding", ",1.6"), ("GIRL-FixedBeta", ",1.5")):
            for seed in (0, 1):
                place = write_run(tmp_path / "runs", agent, "cube-v0", seed, exported=True)
                names = "timesteps,trust_region" + (",trust_region_bound" if bound else "")
                logged = [f"{t},0.{t}{bound}" for t in range(1, 6)]
                place.with_suffix(".diagnostics.csv").write_text("\n".join([names, "0,", *logged]) + "\n")
        text = report([tmp_path / "runs"], out=tmp_path / "out")
        assert "distances.png" in text
        assert "trust-region.png" not in text
        picture = imread(tmp_path / "out" / "distances.png")
        assert picture.shape[2] == 4
        assert picture[:, [0, -1]].min() == 1.0  # a legend that is too wide is cut off there

    def test_legends_of_any_length_are_whole(self) -> None:
        """Long names stand below each other, and what is too long for a line of its own is broken."""
        for words in (1, 8, 30):
            figure = Figure(figsize=(4.7, 3.6), dpi=150, layout="constrained")
            figure.subplots()
            names = [f"GIRL ({', '.join([f'argument_{i}=value'] * words)})" for i in range(4)]
            _place_legend(figure, [Line2D([], [], label=name) for name in names], 4)
            box = figure.legends[0].get_window_extent()
            assert len(figure.legends) == 1
            assert box.width <= figure.bbox.width
            told = [" ".join(text.get_text().split()) for text in figure.legends[0].get_texts()]
            assert told == names

    def test_logs_without_a_step_in_common(self) -> None:
        """Each is drawn as it is."""
        axis = Figure().subplots()
        logs = [{"timesteps": np.array(steps), "x": np.array(steps)} for steps in ([1000.0, 2000.0], [3000.0, 4000.0])]
        _draw_log(axis, logs, "x", {"color": "k"})
        assert [line.get_xdata().tolist() for line in axis.get_lines()] == [[1000.0, 2000.0], [3000.0, 4000.0]]

    def test_no_picture_without_diagnostics(self, tmp_path: Path) -> None:
        write_run(tmp_path / "runs")
        text = report([tmp_path / "runs"], out=tmp_path / "out")
        assert "trust-region" not in text
        assert not (tmp_path / "out" / "trust-region.png").exists()

    def test_export_thins_and_keeps_the_largest(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        logger = configure(str(folder), ["csv"])
        for step in range(1, 1_001):
            logger.record("time/total_timesteps", step)
            logger.record("train/approx_kl", 0.5)
            logger.record("train/embedding_norm_max", 9.0 if step == 503 else 1.0)
            logger.record("train/loss", 3.0)
            logger.dump(step)
        logger.close()
        export_diagnostics(folder, tmp_path / "seed-0.csv")
        series = read_diagnostics(tmp_path / "seed-0.csv")
        assert set(series) == {"timesteps", "approx_kl", "embedding_norm_max"}
        assert len(series["timesteps"]) == ROWS
        assert series["timesteps"][-1] == 1_000
        assert series["embedding_norm_max"].max() == 9.0
        assert (series["approx_kl"] == 0.5).all()
        assert read_diagnostics(tmp_path / "seed-1.csv") == {}


class TestOfflineToOnline:
    """Success rates, and runs of two phases."""

    def write(self, root: Path, agent: str, seed: int, rates: tuple[float, ...], env: str = "cube-v0", **more: Any) -> Path:
        place = write_run(root, agent, env, seed, returns=(-9.0, -8.0, -5.0), **more)
        file = place if place.suffix == ".csv" else place / "evaluations.csv"
        head, *rows = file.read_text().splitlines()
        text = [f"{row},{rate}" for row, rate in zip(rows, rates, strict=True)]
        file.write_text("\n".join([f"{head},success_rate", *text]) + "\n")
        return place

    def phases(self, root: Path, agent: str, seed: int, rates: tuple[float, ...], **more: Any) -> Path:
        config = {"agent": agent, "env": "cube-v0", "seed": seed, "online_steps": 200_000, **more.pop("config", {})}
        return self.write(root, agent, seed, rates, steps=100_000, online_steps=200_000, config=config, **more)

    def test_a_run_of_two_phases(self, tmp_path: Path) -> None:
        (run,) = load_runs([self.phases(tmp_path, "FMQ", 0, (0.1, 0.2, 0.5), exported=True)])
        assert (run.steps, run.reached, run.switch) == (300_000, 300_000, 100_000)
        np.testing.assert_array_equal(run.success_rate, [0.1, 0.2, 0.5])
        (other,) = load_runs([write_run(tmp_path / "other")])
        assert other.switch is None
        assert np.isnan(other.success_rate).all()

    def test_seeds_that_begin_with_models_of_their_own_are_one_row(self, tmp_path: Path) -> None:
        for seed in range(3):
            config = {"init_from": f"digest-{seed}"}
            start = {"source": "model.zip", "agent": "FMQ", "timesteps": 100_000, "sha256": f"digest-{seed}"}
            self.phases(tmp_path, "MVP", seed, (0.1, 0.2, 0.3), config=config, init_from=start)
        (row,) = group(load_runs([tmp_path]))
        assert len(row.runs) == 3
        assert row.label == "MVP"
        self.phases(tmp_path / "scratch", "MVP", 0, (0.1, 0.2, 0.3))
        assert sorted(row.label for row in group(load_runs([tmp_path]))) == ["MVP", "MVP (init_from=FMQ)"]

    def test_tables_and_picture(self, tmp_path: Path) -> None:
        for seed in range(4):
            self.phases(tmp_path / "runs", "FMQ", seed, (0.0, 0.5, 0.2 * seed + 0.3))
            self.phases(tmp_path / "runs", "MVP", seed, (0.0, 0.2, 0.1 * seed))
            self.write(tmp_path / "runs", "FMQ", seed, (0.0, 0.2, 0.1 * seed), env="scene-v0", steps=300_000)
        text = report([tmp_path / "runs"], out=tmp_path / "out")
        (fmq, mvp) = table(text, "cube-v0")
        rates = np.array([0.3, 0.5, 0.7, 0.9])
        assert (fmq["agent"], mvp["agent"], fmq["steps"]) == ("FMQ", "MVP", "300k")
        assert fmq["success (IQM)"] == f"{iqm(rates):.3g}"
        assert fmq["mean success"] == "0.6"
        assert "- FMQ: the first 100k steps are gradient steps on data, the others are env steps." in text
        (pair, *_) = table(text, "Success")
        assert (pair["agent"], pair["environments"], pair["runs"], pair["mean"]) == ("FMQ", "2", "8", "0.375")
        rows = [row for row in summary(tmp_path / "out") if row["quantity"] == "success"]
        assert {row["statistic"] for row in rows} == {"final", "iqm", "mean", "std", "probability_of_improvement"}
        assert imread(tmp_path / "out" / "curves.png").shape[0] > 1000  # two rows of panels
        layout, _ = _layout(group(load_runs([tmp_path / "runs"])))
        assert layout == [(["cube-v0", "scene-v0"], "return"), (["cube-v0", "scene-v0"], "success rate")]

    def test_published_success_is_said_to_be_one(self, tmp_path: Path) -> None:
        self.write(tmp_path / "runs", "FMQ", 0, (0.0, 0.5, 0.9))
        (tmp_path / "papers").mkdir()
        line = "FMQ,cube-v0,1000000,success_rate,0.95,0.02,std,A paper,"
        (tmp_path / "papers" / "p.csv").write_text(f"{','.join(COLUMNS)}\n{line}\n")
        (row,) = table(report([tmp_path / "runs"], published=tmp_path / "papers"), "cube-v0")
        assert row["published (cube-v0, 1M steps)"] == "0.95 ± 0.02 success"

    def test_success_in_the_logs_of_sb3(self, tmp_path: Path) -> None:
        logger = configure(str(tmp_path / "Fetch-v0" / "SAC_1"), ["csv"])
        for step in (100, 200):
            logger.record("time/total_timesteps", step)
            logger.record("eval/mean_reward", -5.0)
            logger.record("eval/success_rate", step / 400)
            logger.dump(step)
        (run,) = load_runs([tmp_path])
        np.testing.assert_array_equal(run.success_rate, [0.25, 0.5])
