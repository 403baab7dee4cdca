"""A disk that is full at every byte of every file: the last good version stays, and training goes on or says why not."""

import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stable_baselines3.common.env_util import make_vec_env

from tests.kit.agents import SUBJECTS
from tests.kit.resume import difference, everything
from tether.agents import BPO, CheckpointCallback, OffPolicyMDPO, list_checkpoints
from tether.agents.common import atomic
from tether.agents.common.atomic import publish_folder, remove_folder, replace_file
from tether.experiments.cli import main


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """In the block the system refuses to write further than ``size`` bytes into any file, as a full disk would."""
    former, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


class Full(Exception):
    """Stands for a kill at a call of the system."""


@contextmanager
def dying_at(call: int) -> Iterator[list[int]]:
    """In the block the ``call``-th rename, sync or removal is the last thing that happens."""
    counter = [0]

    def count(original):
        def counted(*args, **kwargs):
            counter[0] += 1
            if counter[0] >= call:
                raise Full
            return original(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (atomic.os, "fsync"),
            (atomic.os, "replace"),
            (Path, "rename"),
            (Path, "unlink"),
            (shutil, "rmtree"),
        ):
            patch.setattr(module, name, count(getattr(module, name)))
        yield counter


def agent_of(subject):
    return subject.make(make_vec_env(subject.world, 2, seed=1), **subject.tiny)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_model(subject, tmp_path: Path):
    path = tmp_path / "it.zip"
    agent = agent_of(subject)
    agent.save(path)
    good = path.read_bytes()
    agent.learn(300)
    for size in [*range(0, len(good), max(1, len(good) // 23)), len(good) - 1]:
        with files_of_at_most(size), pytest.raises(OSError, match="File too large"):
            agent.save(path)
        assert path.read_bytes() == good
        assert list(tmp_path.iterdir()) == [path]
    agent.save(path)
    assert path.read_bytes() != good


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_checkpoint(subject, tmp_path: Path):
    agent = agent_of(subject).learn(300)
    agent.save_checkpoint(tmp_path)
    before = everything(agent)
    agent.learn(300, reset_num_timesteps=False)
    refused = 0
    for size in (0, 1, 100, 1_000, 5_000, 10_000, 20_000, 40_000):
        try:
            with files_of_at_most(size):
                agent.save_checkpoint(tmp_path)
        except OSError:
            refused += 1
            assert len(list_checkpoints(tmp_path)) == 1
            loaded = subject.cls.load_checkpoint(tmp_path, make_vec_env(subject.world, 2), device="cpu")
            assert difference(everything(loaded), before) == 0.0
        else:
            break
    assert refused >= 4
    agent.save_checkpoint(tmp_path)
    loaded = subject.cls.load_checkpoint(tmp_path, make_vec_env(subject.world, 2), device="cpu")
    assert difference(everything(loaded), everything(agent)) == 0.0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("cls", [BPO, OffPolicyMDPO])
def test_death_at_every_call_of_the_system(cls, tmp_path: Path):
    """Whatever was the last rename, sync or removal: there is a whole checkpoint, the old one or the new one."""
    kwargs = {"n_steps": 32, "batch_size": 32} if cls is BPO else {"buffer_size": 200, "learning_starts": 20}
    agent = cls(
        "MlpPolicy", make_vec_env("Pendulum-v1", 2, seed=1), seed=1, policy_kwargs={"net_arch": [4]}, device="cpu", **kwargs
    )
    agent.learn(64)
    for _ in range(3):
        agent.save_checkpoint(tmp_path, keep=1)
    known = [everything(agent)]
    call = 0
    while True:
        call += 1
        agent.learn(8, reset_num_timesteps=False)
        known.append(everything(agent))
        try:
            with dying_at(call):
                agent.save_checkpoint(tmp_path, keep=1)
        except Full:
            loaded = cls.load_checkpoint(tmp_path, make_vec_env("Pendulum-v1", 2), device="cpu")
            newest = [i for i, state in enumerate(known) if difference(everything(loaded), state) == 0.0]
            assert newest, "neither an old state nor the new one"
        else:
            break
    assert call > 8
    assert len(list_checkpoints(tmp_path)) == 1
    assert not list(tmp_path.glob(".*"))


def test_training_goes_on(tmp_path: Path, caplog):
    agent = BPO("MlpPolicy", make_vec_env("Pendulum-v1", 2), n_steps=32, batch_size=32, device="cpu")
    with files_of_at_most(1_000):
        agent.learn(256, CheckpointCallback(tmp_path / "checkpoints", seconds=1e-6))
    assert "No checkpoint was written ([Errno 27] File too large" in caplog.text
    assert not list_checkpoints(tmp_path / "checkpoints")
    agent.learn(64, CheckpointCallback(tmp_path / "checkpoints", seconds=1e-6), reset_num_timesteps=False)
    assert list_checkpoints(tmp_path / "checkpoints")


def test_run_says_it_and_goes_on_later(tmp_path: Path, capsys):
    """Logs cannot be written, so the run ends; the same command finishes it as if nothing had been."""
    words = [
        "train",
        "BPO",
        "--env",
        "CartPole-v1",
        "--backend",
        "dummy",
        "--n-envs",
        "2",
        "--steps",
        "512",
        "--eval-every",
        "128",
    ]
    words += ["--eval-episodes", "1", "--checkpoint-every", "1e-6", "--hp", "n_steps=32", "batch_size=32", "--out"]
    with files_of_at_most(9_000):
        assert main([*words, str(tmp_path / "parts")]) == 2
    assert "tether: [Errno 27] File too large" in capsys.readouterr().err
    for out in ("parts", "whole"):
        assert main([*words, str(tmp_path / out)]) == 0
    parts, whole = (tmp_path / out / "CartPole-v1/BPO/seed-0" for out in ("parts", "whole"))
    assert (parts / "evaluations.csv").read_text() == (whole / "evaluations.csv").read_text()


class TestAtomic:
    def test_a_link_stays_a_link(self, tmp_path: Path):
        (tmp_path / "real").write_text("old")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        replace_file(tmp_path / "link", "new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_text() == "new"

    def test_a_folder_that_fails_leaves_nothing(self, tmp_path: Path):
        def fail(place: Path) -> None:
            (place / "half").write_text("of it")
            raise ValueError

        with pytest.raises(ValueError):
            publish_folder(tmp_path / "it", fail)
        assert list(tmp_path.iterdir()) == []

    def test_removal(self, tmp_path: Path):
        publish_folder(tmp_path / "it", lambda place: (place / "file").write_text("x"))
        remove_folder(tmp_path / "it")
        assert list(tmp_path.iterdir()) == []
