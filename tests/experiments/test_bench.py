"""`tether bench`: what is timed, how the table is made of it, and how it refuses."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from stable_baselines3 import PPO

from tether import agents
from tether.envs import make_vec
from tether.experiments.bench import _markdown, _timed, contestants

pytest.importorskip("envpool")


def test_a_small_race(tether, tmp_path: Path) -> None:
    """Two contestants, two rounds, real training; the table and the numbers behind it are left in the folder."""
    outcome = tether(
        "bench", "on-policy", "--env", "CartPole-v1", "--only", "PPO", "SB3 PPO", "--rounds", 2, "--seconds", 0.2,
        "--out", tmp_path / "speed",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    text = (tmp_path / "speed/on-policy.md").read_text()
    assert text == outcome.out[: len(text)]
    assert "## CartPole-v1" in text
    record = json.loads((tmp_path / "speed/on-policy.json").read_text())
    (result,) = record
    assert set(result["contestants"]) == {"PPO", "SB3 PPO"}
    assert len(result["random actions/s"]) == 2
    for row in result["contestants"].values():
        assert len(row["env steps/s"]) == 2
        for rate, share in zip(row["env steps/s"], row["us per env step"], strict=True):
            assert sum(share.values()) == pytest.approx(1e6 / rate, rel=1e-6)
            assert all(part > 0.0 for part in share.values())
    assert result["hardware"]["cpu"] in text
    words = ("--env", "Pendulum-v1", "--only", "PPO", "--rounds", 1, "--seconds", 0.1, "--out", tmp_path / "speed")
    assert tether("bench", "on-policy", *words).code == 0
    later = (tmp_path / "speed/on-policy.md").read_text()
    assert "## CartPole-v1" in later, "other environments keep their tables"
    assert "## Pendulum-v1" in later


def test_the_table_has_medians_of_ratios_within_rounds() -> None:
    share = {"env": 1.0, "policy": 2.0, "update": 3.0}

    def row(rates):
        return {"settings": "some", "env steps/s": rates, "us per env step": [share] * 3}

    result = {
        "env": "Some-v0",
        "command": "tether bench",
        "hardware": {"cpu": "Some CPU", "cores": 2, "gpu": None},
        "random actions/s": [100.0, 200.0, 400.0],
        "contestants": {"Ours": row([20.0, 60.0, 200.0]), "SB3 PPO": row([10.0, 20.0, 100.0])},
    }
    line = next(line for line in _markdown([result]).splitlines() if line.startswith("| Ours"))
    assert re.sub(" +", " ", line) == "| Ours | some | 60 [20, 200] | 1 | 2 | 3 | 0.30 | 2.00 |"


def test_what_is_not_known_is_refused(refused) -> None:
    sentence = refused("bench", "on-policy", "--only", "SB3 PP")
    assert "There is no contestant 'SB3 PP'. Did you mean 'SB3 PPO'?" in sentence


def test_everybody_of_the_issue_takes_part() -> None:
    names = {one.name for one in contestants()}
    assert {"MDPO", "BPO", "R2VPO", "PPO", "SB3 PPO", "SB3 PPO, defaults", "TRPO"} <= names


@pytest.mark.parametrize("halves", [False, True])
def test_the_clock_sees_both_halves_and_takes_itself_off(halves: bool) -> None:
    env = make_vec("CartPole-v1", 4, backend="envpool", halves=halves, seed=0)
    cls = agents.PPO if halves else PPO
    model = cls("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, device="cpu", seed=0)
    clock = {"env": 0.0, "update": 0.0}
    begun = time.perf_counter()
    with _timed(model, clock):
        model.learn(256)
    assert 0.0 < clock["env"] + clock["update"] < time.perf_counter() - begun
    assert min(clock.values()) > 0.0
    frozen = dict(clock)
    model.learn(128)
    assert clock == frozen
    env.close()
