"""What runs of world models show of imagination: columns, films and charts, in real event files."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tether.agents.girl.drift import Dream
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
