"""`tether collect` of OGBench's data: the same files in any number of processes and after any interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from tether.envs import load_dataset
from tether.envs.datasets import ogbench_make
from tether.envs.datasets.cache import file_sha256
from tether.experiments import cli, collect_ogbench, walker
from tether.experiments.collect import CollectConfig
from tether.experiments.errors import UsageError

package = pytest.importorskip("ogbench")
NAME = "pointmaze-medium-navigate-v0"


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def same(first: Path, second: Path) -> bool:
    """To the last byte."""
    return first.read_bytes() == second.read_bytes()


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
    seeds: list[int] = []
    original = ogbench_make.Generator.episode

    def interrupted(generator: ogbench_make.Generator, seed: int) -> ogbench_make.Arrays:
        if len(seeds) == 2:
            raise KeyboardInterrupt
        seeds.append(seed)
        return original(generator, seed)

    with monkeypatch.context() as patch:
        patch.setattr(ogbench_make.Generator, "episode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect_ogbench.collect_ogbench(config, jobs=1)
        assert not config.out.exists()
        with pytest.raises(UsageError, match="episodes of another collection"):
            collect_ogbench.collect_ogbench(replace(config, seed=3), jobs=1)
        seeds = [0]  # so that the next interruption comes after one more
        with pytest.raises(KeyboardInterrupt):
            collect_ogbench.collect_ogbench(config, jobs=1)
        assert seeds == [0, 2 + 3 * collect_ogbench.EPISODE]
    collect_ogbench.collect_ogbench(config, jobs=1)
    whole = collect_ogbench.collect_ogbench(replace(config, out=tmp_path / "b"), jobs=1)
    assert same(config.out, whole)


def test_the_whole_is_what_numpy_would_write(tmp_path: Path) -> None:
    path = collect_ogbench.collect_ogbench(CollectConfig(NAME, tmp_path, steps=2000), jobs=1)
    np.savez_compressed(tmp_path / "numpys.npz", **arrays(path))
    assert same(path, tmp_path / "numpys.npz")


def test_ctrl_c_ends_all_processes_and_the_command_goes_on(tmp_path: Path) -> None:
    """A real signal, real processes; an episode that a power cut left empty is made again."""
    config = CollectConfig(NAME, tmp_path / "a", steps=10**6, seed=1)
    shards = config.out / f".{NAME}.npz.partial" / f"{NAME}-1-None"

    def interrupt() -> None:
        while len(list(shards.glob("0*.npz"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        collect_ogbench.collect_ogbench(config, jobs=2)
    assert active_children() == []
    assert not list(config.out.glob("*.npz"))
    (shards / "000001.npz").write_bytes(b"")
    pieces = [
        collect_ogbench.collect_ogbench(replace(config, out=out, steps=3000), jobs=1) for out in (config.out, tmp_path / "b")
    ]
    assert same(*pieces)


@pytest.mark.slow
def test_processes_end_with_the_first_one(tmp_path: Path) -> None:
    """However that one ends: episodes of a killed collection would be written under those of the next."""
    words = [sys.executable, "-m", "tether", "collect", NAME, "--out", str(tmp_path), "--steps", "1000000"]
    first = subprocess.Popen(words, start_new_session=True)
    while not list(tmp_path.glob(".*/*/0*.npz")):
        time.sleep(0.1)
    first.kill()
    first.wait()
    deadline = time.monotonic() + 30.0
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(first.pid, 0)
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
        raise AssertionError("processes outlived the first one")


def test_a_process_that_dies_is_said(tmp_path: Path) -> None:
    config = CollectConfig("antmaze-medium-navigate-v0", tmp_path, steps=2000)
    with pytest.raises(UsageError, match=r"A process that made episodes died: .* the same command again, which goes on"):
        collect_ogbench._make(config, tmp_path, [0, 1], tmp_path / "nowhere.zip", jobs=2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are found by OGBench's own loader, and the same command again leaves them as they are."""
    words = ["collect", NAME, "--out", str(tmp_path), "--steps", "1000"]
    assert cli.main(words) == 0
    assert "1,000 transitions; validation part and datasheet beside it" in capsys.readouterr().out
    path, task = tmp_path / f"{NAME}.npz", "pointmaze-medium-navigate-singletask-task2-v0"
    sheet = json.loads(path.with_suffix(".json").read_text())
    assert (sheet["name"], sheet["episodes"], sheet["transitions"]) == (NAME, 1, 1000)
    dataset = load_dataset(path, task=task)
    assert dataset.meta["sha256"] == sheet["sha256"]
    _, train, val = package.make_env_and_datasets(task, dataset_dir=str(tmp_path))
    np.testing.assert_array_equal(np.asarray(dataset.rewards), train["rewards"])
    assert len(dataset) == len(train["rewards"]) == len(val["rewards"]) == 1000
    with monkeypatch.context() as patch:
        patch.setattr(collect_ogbench, "_make", None)
        assert cli.main(words) == 0
    for part in (path, tmp_path / f"{NAME}-val.npz"):
        part.write_bytes(b"damaged")
        assert cli.main(words) == 0
        assert file_sha256(path) == sheet["sha256"]
        assert file_sha256(tmp_path / f"{NAME}-val.npz") == sheet["validation_sha256"]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["collect", "humanoidmaze-medium-navigate-v0", "--out", str(tmp_path)]) == 2
    assert "cannot be made here" in capsys.readouterr().err
    assert cli.main(["collect", NAME, "--out", str(tmp_path), "--behaviour", "safe"]) == 2
    assert "leave out --behaviour" in capsys.readouterr().err
    assert cli.main(["collect", NAME, "--out", str(tmp_path / "a.hdf5")]) == 2
    assert f"give --out a folder, or {tmp_path / 'a.npz'}" in capsys.readouterr().err


def test_the_walker_is_trained_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ant that learnt for a few steps: its data have the format, its file is kept for the next collection."""
    short = replace(ogbench_make.recipe("antmaze-medium-navigate-v0"), length=41)
    monkeypatch.setattr(ogbench_make, "recipe", lambda _: short)
    config = CollectConfig("antmaze-medium-navigate-v0", tmp_path / "a", steps=40, train_steps=60, cache=tmp_path)
    first = collect_ogbench.collect_ogbench(config, jobs=1)
    (file,) = tmp_path.glob("ogbench-ant-60-0.*")
    before = file.stat().st_mtime_ns
    second = collect_ogbench.collect_ogbench(replace(config, out=tmp_path / "b"), jobs=1)
    assert file.stat().st_mtime_ns == before
    assert same(first, second)
    assert json.loads(first.with_suffix(".json").read_text())["train_steps"] == 60
    assert len(load_dataset(first, task="antmaze-medium-navigate-singletask-task1-v0")) == 40


def test_the_walkers_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of it: the same command ends with the same weights."""
    from ogbench.online_locomotion.wrappers import GymXYWrapper

    whole = walker.train_walker(tmp_path / "whole", 60, seed=3)
    steps, step = iter(range(1000)), GymXYWrapper.step

    def interrupted(env, action):
        if next(steps) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return step(env, action)

    with monkeypatch.context() as patch:
        patch.setattr(GymXYWrapper, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            walker.train_walker(tmp_path / "parts", 60, seed=3)
    assert not list((tmp_path / "parts").glob("*.zip"))
    parts = walker.train_walker(tmp_path / "parts", 60, seed=3)
    observations = np.random.default_rng(0).normal(size=(5, 29))
    np.testing.assert_array_equal(*(walker.load_walker(path)(observations) for path in (whole, parts)))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [parts.name]
