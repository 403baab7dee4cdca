"""`tether collect` of OGBench's data: the same files in any number of processes and after any interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tether.envs import load_dataset
from tether.envs.datasets import ogbench_make
from tether.experiments import cli, collect_ogbench
from tether.experiments.collect import CollectConfig
from tether.experiments.errors import UsageError

pytest.importorskip("ogbench")
NAME = "pointmaze-medium-navigate-v0"


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def same(first: Path, second: Path) -> bool:
    a, b = arrays(first), arrays(second)
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_the_same_in_one_process_and_in_two(tmp_path: Path) -> None:
    paths = [
        collect_ogbench.collect_ogbench(CollectConfig(NAME, tmp_path / str(jobs), steps=2500, seed=1), jobs=jobs)
        for jobs in (1, 2)
    ]
    assert same(*paths)
    assert same(*(path.with_name(f"{NAME}-val.npz") for path in paths))
    assert len(arrays(paths[0])["terminals"]) == 3 * 1001
    assert len(arrays(paths[0].with_name(f"{NAME}-val.npz"))["terminals"]) == 1001
    assert not list(tmp_path.glob("*/.*"))


def test_an_interrupted_collection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CollectConfig(NAME, tmp_path / "a" / "mine.npz", steps=3000, seed=2)
    made: list[int] = []

    def counted(shards: Path, seed: int, number: int) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        original(shards, seed, number)

    original = collect_ogbench._episode
    monkeypatch.setattr(collect_ogbench, "_episode", counted)
    with pytest.raises(KeyboardInterrupt):
        collect_ogbench.collect_ogbench(config, jobs=1)
    assert not config.out.exists()
    with pytest.raises(UsageError, match="episodes of another collection"):
        collect_ogbench.collect_ogbench(replace(config, seed=3), jobs=1)
    made.clear()
    made.append(-1)  # two more are left
    monkeypatch.setattr(collect_ogbench, "_episode", lambda *args: (made.append(args[2]), original(*args)))
    collect_ogbench.collect_ogbench(config, jobs=1)
    assert made == [-1, 2, 3]
    monkeypatch.undo()
    whole = collect_ogbench.collect_ogbench(replace(config, out=tmp_path / "b"), jobs=1)
    assert same(config.out, whole)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["collect", "cube-single-play-v0", "--out", str(tmp_path), "--steps", "1000"]) == 0
    assert "1,000 transitions; validation part and datasheet beside it" in capsys.readouterr().out
    sheet = json.loads((tmp_path / "cube-single-play-v0.json").read_text())
    assert (sheet["name"], sheet["episodes"], sheet["transitions"]) == ("cube-single-play-v0", 1, 1000)
    dataset = load_dataset(tmp_path / "cube-single-play-v0.npz", task="cube-single-play-singletask-task2-v0")
    assert len(dataset) == 1000
    assert dataset.meta["sha256"] == sheet["sha256"]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["collect", "humanoidmaze-medium-navigate-v0", "--out", str(tmp_path)]) == 2
    assert "cannot be made here" in capsys.readouterr().err
    assert cli.main(["collect", NAME, "--out", str(tmp_path), "--behaviour", "safe"]) == 2
    assert "leave out --behaviour" in capsys.readouterr().err


@pytest.mark.slow
def test_the_walker_is_trained_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ant that learnt for a few hundred steps: its data have the format, its file is kept for the next collection."""
    short = replace(ogbench_make.recipe("antmaze-medium-navigate-v0"), length=41)
    monkeypatch.setattr(ogbench_make, "recipe", lambda _: short)
    config = CollectConfig("antmaze-medium-navigate-v0", tmp_path / "a", steps=40, train_steps=300, cache=tmp_path)
    first = collect_ogbench.collect_ogbench(config, jobs=1)
    (walker,) = tmp_path.glob("ogbench-ant-300-0.zip")
    before = walker.stat().st_mtime_ns
    second = collect_ogbench.collect_ogbench(replace(config, out=tmp_path / "b"), jobs=1)
    assert walker.stat().st_mtime_ns == before
    assert same(first, second)
    assert len(load_dataset(first, task="antmaze-medium-navigate-singletask-task1-v0")) == 40
