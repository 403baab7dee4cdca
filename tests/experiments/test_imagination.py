"""What runs of world models show of imagination: columns, films and charts, in real event files."""

import importlib.util
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tether.agents.girl.drift import Dream
from tether.experiments import drift_causes
from tether.experiments.imagination import NUMBERS_SHOWN, chart, film

TINY = (
    "batch_size=2", "batch_length=6", "horizon=3", "train_ratio=1", "learning_starts=40", "pretrain_updates=1",
    "buffer_size=300", "encoder_updates=3", "policy_kwargs={size: small, deter: 16, hidden: 16, units: 16, cnn_depth: 4}",
)  # fmt: skip


def images(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def test_states_are_charted(tether, tmp_path: Path) -> None:
    run = tether(
        "train", "GIRL", "--env", "Pendulum-v1", "--steps", 120, "--eval-every", 60, "--eval-episodes", 1, "--out", tmp_path,
        "--hp", *TINY,
    )  # fmt: skip
    assert run.code == 0, run.err
    folder = tmp_path / "Pendulum-v1" / "GIRL" / "seed-0"
    accumulator = images(folder)
    assert [event.step for event in accumulator.Images("imagination/chart")] == [60, 120]
    picture = iio.imread(accumulator.Images("imagination/chart")[0].encoded_image_string)
    assert picture.std() > 10
    header = (folder / "evaluations.csv").read_text().splitlines()[0].split(",")
    assert {"dfm", "dfm_real", "dfm_none", "dfm_short", "decoder_error"} <= set(header)
    assert [event.step for event in accumulator.Scalars("eval/dfm")] == [60, 120]
    assert len((folder / "drift.csv").read_text().splitlines()) == 101


def test_a_run_too_short_to_learn_says_so(tether, refused, tmp_path: Path) -> None:
    hp = [argument for argument in TINY if not argument.startswith(("buffer_size", "learning_starts"))]
    words = ["train", "GIRL", "--env", "Pendulum-v1", "--steps", 5, "--eval-every", 5, "--eval-episodes", 1, "--hp", *hp]
    run = tether(*words, "learning_starts=4", "batch_length=8", "--out", tmp_path / "one")  # a memory of one sequence
    assert run.code == 0, run.err
    assert "learning_starts" not in run.out
    assert "GIRL acts at random for 4 steps; then come 3 updates of the masked autoencoder and 1 updates at once." in run.out
    assert "GIRL learns from sequences of 8 steps (batch_length): this run is shorter." in run.out
    run = tether(*words, "learning_starts=5", "--out", tmp_path / "two")
    assert run.code == 0, run.err
    assert "GIRL learns after its first 5 steps (learning_starts): this run ends before." in run.out
    assert "batch_length" not in run.out
    assert "at once" not in run.out
    assert "steps is 9 in --hp and 5 as an option" in refused(*words, "steps=9", "--out", tmp_path / "three")
    sentence = refused(*words[:5], 9, *words[6:], "learning_starts=5", "--out", tmp_path / "two")
    assert "configuration ('steps' was 5, now 9; 'buffer_size' was " in sentence


def test_pictures_are_filmed(tether, tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    run = tether(
        "train", "GIRL", "--env", "ALE/Pong-v5", "--env-kwargs", "max_episode_steps=100", "--steps", 60, "--eval-every", 60,
        "--eval-episodes", 1, "--out", tmp_path, "--hp", *TINY, "grounding=null",
    )  # fmt: skip
    assert run.code == 0, run.err
    accumulator = images(next((tmp_path).glob("*/GIRL/seed-0")))
    event = accumulator.Images("imagination/film")[0]
    frames = iio.imread(event.encoded_image_string, extension=".gif")
    assert frames.shape[1:] == (84, 3 * 84, 3)
    assert len(frames) > 5
    assert frames[5:].std() > 5


def test_film_shows_real_imagined_and_difference() -> None:
    real, imagined = np.zeros((9, 6, 8, 8), np.float32), np.ones((9, 6, 8, 8), np.float32)
    frames = film(Dream({"a": real, "b": real[:, :1]}, {"a": imagined, "b": imagined[:, :1]}, 4))
    assert frames is not None
    assert frames.shape == (9, 16, 24, 3)
    assert [int(frames[-1, 4, x, 0]) for x in (4, 12, 20)] == [0, 255, 255]
    edges = (frames[:, 0, 0] == (60, 200, 90)).all(-1)
    assert edges.tolist() == [True] * 4 + [False] * 5
    assert film(Dream({"x": real[:, 0, 0]}, {"x": real[:, 0, 0]}, 4)) is None


def test_chart_shows_the_first_numbers() -> None:
    real, imagined = np.random.default_rng(0).normal(size=(2, 20, 15))
    figure = chart(Dream({"x": real}, {"x": imagined}, 5))
    assert figure is not None
    lines = [axis.get_lines() for axis in figure.axes if axis.get_visible()]
    assert len(lines) == NUMBERS_SHOWN
    np.testing.assert_array_equal(lines[3][0].get_ydata(), real[:, 3])
    np.testing.assert_array_equal(lines[3][1].get_ydata(), imagined[:, 3])
    pictures = np.zeros((9, 3, 8, 8))
    assert chart(Dream({"a": pictures}, {"a": pictures}, 4)) is None


def exported(folder: Path, agent: str, seed: int, dfm: list[float], returns: list[float], **manifest: object) -> None:
    place = folder / "dm_control--cartpole-swingup-v0" / agent
    place.mkdir(parents=True, exist_ok=True)
    known = {"agent": agent, "env": "dm_control/cartpole-swingup-v0", "seed": seed, "steps": 600, "status": "finished"}
    config = {"env_kwargs": {"action_repeat": 2}}
    (place / f"seed-{seed}.json").write_text(json.dumps({**known, "config": config, **manifest}))
    evaluations = zip(range(100, 700, 100), dfm, returns, strict=True)
    rows = [f"{step},{r},0,,500,5,{d},{d},{2 * d},{d / 4},{d / 10}" for step, d, r in evaluations]
    columns = "timesteps,mean_reward,std_reward,mean_cost,ep_length,episodes,dfm,dfm_real,dfm_none,dfm_short,decoder_error"
    (place / f"seed-{seed}.csv").write_text("\n".join([columns, *rows]) + "\n")


def test_report_compares_drift_and_steps(tether, tmp_path: Path) -> None:
    """Means over the last four of six evaluations, then over seeds; steps are the suite's own."""
    rising = [100.0, 400.0, 600.0, 760.0, 700.0, 800.0]
    exported(tmp_path, "DreamerV3", 0, [9.0, 9.0, 2.0, 4.0, 6.0, 8.0], rising, grounding="none")
    exported(tmp_path, "DreamerV3", 1, [9.0, 9.0, 7.0, 7.0, 7.0, 7.0], [100.0] * 5 + [510.0], grounding="none")
    exported(tmp_path, "GIRL", 0, [9.0, 9.0, 3.0, 3.0, 3.0, 3.0], [100.0] * 6, grounding="masked-autoencoder")
    run = tether("report", tmp_path, "--out", tmp_path / "out")
    assert run.code == 0, run.err
    section = (tmp_path / "out" / "report.md").read_text().partition("## Imagination")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith(("| Dreamer", "| GIRL"))]
    arm, girl = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert arm == [
        "DreamerV3", "none", "2", "6 [5, 7]", "1.00", "6 [5, 7]", "12 [10, 14]", "1.5 [1.25, 1.75]", "0.6 [0.5, 0.7]", "1.00",
        "900", "- (1 of 2)",
    ]  # fmt: skip
    assert girl == ["GIRL", "masked-autoencoder", "1", "3", "0.50", "3", "6", "0.75", "0.3", "0.50", *["- (0 of 1)"] * 2]
    assert iio.imread(tmp_path / "out" / "imagination.png").std() > 10


def test_report_compares_within_one_world(tether, tmp_path: Path) -> None:
    """States beside distracted pictures: each has its own arm, and nothing is compared across; False is as if not given."""
    far, same = [50.0] * 6, {"config": {"env_kwargs": {"action_repeat": 2, "distraction": 1.0, "fast_render": False}}}
    exported(tmp_path, "DreamerV3", 0, [2.0] * 6, [500.0] * 6)
    exported(tmp_path, "GIRL", 0, [3.0] * 6, [600.0] * 6)
    exported(tmp_path, "DreamerV3", 1, [8.0] * 6, far, config={"env_kwargs": {"action_repeat": 2, "distraction": 1.0}})
    exported(tmp_path, "GIRL", 1, [4.0] * 6, far, **same)
    exported(tmp_path, "SAC", 0, [1.0] * 6, far, config={"env_kwargs": {}})
    run = tether("report", tmp_path)
    assert run.code == 0, run.err
    section = run.out.partition("## Imagination")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in section.splitlines() if line.startswith("|")]
    shares = {of[1]: of[5] for of in cells}
    assert shares["GIRL (action_repeat=2)"] == "1.50"
    assert shares["GIRL (action_repeat=2, distraction=1.0, fast_render=False)"] == "0.50"
    compared = run.out.partition("## Probability of improvement")[2]
    pairs = [line for line in compared.splitlines() if line.startswith(("| D", "| G", "| S"))]
    assert len(pairs) == 2
    assert not any("SAC" in line for line in pairs)
    exported(tmp_path, "SAC", 0, [1.0] * 6, far, config={"env_kwargs": {"action_repeat": 2}})
    assert " SAC " in tether("report", tmp_path).out.partition("## Probability of improvement")[2]


def cells_of(text: str) -> dict[str, list[str]]:
    section = text.partition("## Imagination")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_report_with_holes(tether, tmp_path: Path) -> None:
    """What is not known is left out; of two arms none is the arm, and runs of other budgets say theirs."""
    nan, returns = float("nan"), [500.0] * 6
    exported(tmp_path, "DreamerV3", 0, [8.0] * 6, returns)
    exported(tmp_path, "GIRL", 0, [3.0, 3.0, 4.0, 4.0, nan, 4.0], returns, config={"env_kwargs": {"action_repeat": 2}})
    exported(tmp_path, "GIRL", 1, [nan] * 6, returns)
    exported(tmp_path, "GIRL", 2, [2.0] * 6, returns, steps=700)
    found = cells_of(tether("report", tmp_path).out)
    assert found["GIRL, 600"][2:4] == ["3.75", "0.47"]
    assert found["GIRL, 700"][2:4] == ["2", "-"]  # its budget is not the arm's
    exported(tmp_path, "DreamerV3", 1, [6.0] * 6, returns, config={"env_kwargs": {"action_repeat": 2}, "arguments": {"a": 1}})
    assert cells_of(tether("report", tmp_path).out)["GIRL, 600"][2:4] == ["3.75", "-"]
    exported(tmp_path, "SAC", 0, [nan] * 6, returns, config={"env_kwargs": None})
    assert tether("report", tmp_path).code == 0


def test_an_encoder_whose_package_is_missing(refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    words = ("--env", "dm_control/cartpole-swingup-v0", "--env-kwargs", "from_pixels=true", "--out", tmp_path)
    sentence = refused("train", "GIRL", *words, "--hp", "grounding=dinov2-small")
    assert "grounding='dinov2-small' needs transformers: pip install 'tether-rl[vision]'" in sentence


def test_causes_of_drift(tether, tmp_path: Path, capsys) -> None:
    short = ("--steps", 100, "--eval-episodes", 1, "--out", tmp_path, "--hp")
    run = tether("train", "DreamerV3", "--env", "Pendulum-v1", "--env-kwargs", "max_episode_steps=40", *short, *TINY)
    assert run.code == 0, run.err
    folder = tmp_path / "Pendulum-v1" / "DreamerV3" / "seed-0"
    kinds = ["DreamerV3 arm", "GIRL", "grounding alone"]
    words = [str(folder), "--updates", "9", "--out", str(tmp_path / "out"), "--only", *kinds, "--seeds"]
    assert drift_causes.main([*words, "1"]) == 0
    words.append("2")
    assert drift_causes.main(words) == 0
    path = tmp_path / "out" / "drift-causes.json"
    result = json.loads(path.read_text())
    numbers = result["numbers"]
    assert list(numbers) == kinds
    path.write_text(json.dumps({**result, "numbers": {kinds[0]: numbers[kinds[0]], kinds[2]: numbers[kinds[2]][:1]}}))
    assert drift_causes.main(words) == 0  # goes on where an interrupted one stopped
    assert json.loads(path.read_text())["numbers"] == {name: [pytest.approx(row) for row in numbers[name]] for name in kinds}
    assert drift_causes.main(words) == 0
    assert "All of it is in" in capsys.readouterr().out
    assert json.loads(path.read_text())["command"].endswith(" --seeds 2 --only 'DreamerV3 arm' GIRL 'grounding alone'")
    assert json.loads(path.read_text())["earlier"][0]["revision"] == result["revision"]
    assert "| DFM(40) |" in " ".join((tmp_path / "out" / "drift-causes.md").read_text().split())
    assert all(row["dfm"] > 0.0 and row["error"] > 0.0 for rows in numbers.values() for row in rows)
    assert numbers["GIRL"][0] != numbers["GIRL"][1]
    assert "dfm_real" not in numbers["DreamerV3 arm"][0]
    assert "| grounding alone |" in (tmp_path / "out" / "drift-causes.md").read_text()
    assert drift_causes.main([str(folder), "--only", "nothing"]) == 2
    assert "There is no kind 'nothing': use some of 'DreamerV3 arm'," in capsys.readouterr().err
    assert drift_causes.main([str(folder), "--updates", "7"]) == 2
    assert "--updates is 8 or more, not 7" in capsys.readouterr().err
    (folder / "checkpoint").rename(folder / "elsewhere")
    assert drift_causes.main([str(folder), "--updates", "9"]) == 2
    assert "There is no checkpoint in" in capsys.readouterr().err
    other = tether("train", "SB3-PPO", "--env", "CartPole-v1", *short, "n_steps=32", "batch_size=32")
    assert other.code == 0, other.err
    assert drift_causes.main([str(tmp_path / "CartPole-v1" / "SB3-PPO" / "seed-0")]) == 2
    assert "which has no world model: give a run of GIRL" in capsys.readouterr().err


@pytest.mark.parametrize(("env", "module"), [("AdroitHandDoor-v1", "gymnasium_robotics"), ("Meta-World/reach-v3", "envpool")])
def test_robots(tether, tmp_path: Path, env: str, module: str) -> None:
    """A world model of a hand and of an arm: success is told beside the drift."""
    pytest.importorskip(module)
    steps = ("--steps", 60, "--eval-every", 60, "--eval-episodes", 1, "--env-kwargs", "max_episode_steps=40")
    run = tether("train", "GIRL", "--env", env, *steps, "--out", tmp_path, "--hp", *TINY)
    assert run.code == 0, run.err
    header, row = next(tmp_path.glob("*/GIRL/seed-0/evaluations.csv")).read_text().splitlines()
    told = dict(zip(header.split(","), row.split(","), strict=True))
    assert told["episodes"] == "1"
    assert 0.0 <= float(told["success_rate"]) <= 1.0
    assert float(told["dfm"]) > 0.0
