"""The command line run inside the test process, and one finished run that several files look at."""

from __future__ import annotations

import csv
import io
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tether.experiments.callbacks import CostCallback
from tether.experiments.cli import main


class Outcome(NamedTuple):
    """What a command did: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Tether = Callable[..., Outcome]

# Arguments that make an agent small, and a run of it short.
SMALL = {
    "MDPO": ["n_steps=64", "value_batch_size=32", "policy_steps=2", "policy_kwargs.net_arch=[8]"],
    "PPO": ["n_steps=64", "batch_size=64", "n_epochs=2", "policy_kwargs.net_arch=[8]"],
    "SB3-PPO": ["n_steps=64", "batch_size=64", "n_epochs=2", "policy_kwargs.net_arch=[8]"],
    "SAC": ["learning_starts=40", "batch_size=8", "train_freq=8", "policy_kwargs.net_arch=[8]"],
    "OffPolicyMDPO": ["learning_starts=40", "batch_size=8", "train_freq=8", "policy_kwargs.net_arch=[8]"],
    "DQN": ["learning_starts=40", "batch_size=8", "train_freq=8", "gradient_steps=1", "policy_kwargs.net_arch=[8]"],
}


@pytest.fixture(scope="session")
def tether() -> Tether:
    """``tether("train", "MDPO", ...)`` runs the command and returns its :class:`Outcome`."""

    def run(*words: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(word) for word in words])
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


def _short_run(agent: str, env: str, out: Path, *more: object, steps: int = 300, hp: tuple[str, ...] = ()) -> list[str]:
    words = ["train", agent, "--env", env, "--steps", steps, "--out", out, "--backend", "dummy", "--eval-every", 100]
    return [str(w) for w in [*words, "--eval-episodes", 1, "--n-envs", 1, *more, "--hp", *SMALL[agent], *hp]]


@pytest.fixture(scope="session")
def short_run() -> Callable[..., list[str]]:
    """``short_run(agent, env, out, *more, hp=())``: the words of a training command that takes about a second."""
    return _short_run


@pytest.fixture(scope="session")
def refused(tether: Tether) -> Callable[..., str]:
    """Run a command that must be refused: exit code 2 and one sentence on stderr, which is returned."""

    def run(*words: object) -> str:
        code, _, err = tether(*words)
        assert code == 2
        assert err.startswith("tether: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return run


class Killed(BaseException):
    """Stands for ``kill -9``: no handler of the run sees it."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[dict[str, Any]]]:
    """``with stop_at(step)``: training in the block gets Ctrl-C, or an error, at that step; gives the model it was at."""

    @contextmanager
    def arrange(step: int, error: type[BaseException] | None = None) -> Iterator[dict[str, Any]]:
        caught: dict[str, Any] = {}
        original = CostCallback._on_step

        def stop(self: CostCallback) -> bool:
            if self.num_timesteps >= step and not caught:
                caught["model"] = self.model
                if error is not None:
                    raise error
                signal.raise_signal(signal.SIGINT)
            return original(self)

        with monkeypatch.context() as patch:
            patch.setattr(CostCallback, "_on_step", stop)
            yield caught

    return arrange


@pytest.fixture
def killed() -> type[BaseException]:
    return Killed


@pytest.fixture(scope="session")
def finished(tether: Tether, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Outcome]:
    """A finished run of MDPO: its folder, the words of its command, what the command printed."""
    out = tmp_path_factory.mktemp("runs")
    words = _short_run("MDPO", "CartPole-v1", out, "--seed", 3)
    outcome = tether(*words)
    assert outcome.code == 0, outcome.err
    return out / "CartPole-v1" / "MDPO" / "seed-3", words, outcome


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, str]]]:
    """Read a CSV file as a list of dicts."""
    return read_rows


@pytest.fixture(scope="session")
def manifest() -> Callable[[Path], dict[str, Any]]:
    """Read the manifest of a run's folder."""
    return lambda folder: json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
