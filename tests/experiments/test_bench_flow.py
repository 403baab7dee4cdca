"""`tether bench flow`: who takes part, and what is written."""

from __future__ import annotations

import json
import sys

import pytest

from tether.experiments.bench_flow import Size

TINY = Size((16, 16), 8, 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in {"SIZES": (TINY,), "ACTING_NET": (8,), "BATCHES": (1, 3), "PREDICTIONS": 0.0, "ROWS": 50}.items():
        monkeypatch.setattr(f"tether.experiments.bench_flow.{name}", value)


def test_all_of_it(tether, tmp_path):
    outcome = tether("bench", "flow", "--rounds", 2, "--seconds", 0.01, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "flow.json").read_text())
    rates = {(one["method"], one["name"]): one["updates/s"] for one in result["contestants"]}
    chunks = "chunks of 5, 2x16, batch 8"
    assert {
        ("FQL, 2x16, batch 8, one action", "Tether"),
        (chunks, "FQL"),
        (chunks, "FMQ online, targets of one sample"),
        (chunks, "MVP online, the best of 2"),
        (chunks, "FQL, 5 seeds at once"),
    } <= set(rates)
    assert all(len(of) == 2 and min(of) > 0 for of in rates.values())
    calls = {name: one["calls"] for name, one in result["acting"].items()}
    assert calls == {
        "FMQ, plain": 1, "QC, plain, FMQ's network": 10, "QC, plain": 10, "FQL": 1, "FMQ, best of 32": 32,
        "MVP, best of 32": 32, "FMQ, QGBS (M 4, K 1, B 4)": 20, "QC, best of 32": 320,
    }  # fmt: skip
    assert all(len(ms) == 2 for one in result["acting"].values() for ms in one["ms"].values())
    text = (tmp_path / "flow.md").read_text()
    assert "- FMQ, plain / QC, plain, FMQ's network, batch 1: " in text
    assert "| FQL, 2x16, batch 8, one action " in text


def test_only_some(tether):
    outcome = tether("bench", "flow", "--only", "acting", "--rounds", 1)
    assert outcome.code == 0, outcome.err
    assert "Milliseconds of `predict`" in outcome.out
    assert "Updates per second" not in outcome.out
    outcome = tether("bench", "flow", "--only", "FQL, 2x16, batch 8, one action", "--rounds", 1, "--seconds", 0.01)
    assert outcome.code == 0, outcome.err
    assert "Milliseconds of `predict`" not in outcome.out


AUTHORS = """
class FQLAgent:
    class network:
        params = ()

    @classmethod
    def create(cls, seed, observations, actions, config):
        assert observations.shape == (1, 28) and actions.shape == (1, 5)
        return cls()

    def update(self, batch):
        assert batch["masks"].shape == (8,)
        return self, {}


def get_config():
    return {}
"""


def test_the_authors_code_joins(tether, tmp_path, monkeypatch):
    for module, text in {"agents/__init__": "", "agents/fql": AUTHORS, "jax": "block_until_ready = print"}.items():
        path = tmp_path / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    before, modules = list(sys.path), dict(sys.modules)
    monkeypatch.setattr(sys, "modules", modules)
    group = "FQL, 2x16, batch 8, one action"
    outcome = tether("bench", "flow", "--only", group, "--rounds", 1, "--seconds", 0.01, "--fql", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "authors' JAX" in outcome.out
    assert sys.path == before


def test_refusals(tether, tmp_path):
    assert "There is no method 'actin'. Did you mean 'acting'?" in tether("bench", "flow", "--only", "actin").err
    assert "cannot be imported from" in tether("bench", "flow", "--fql", tmp_path).err
    assert "leave out --fql" in tether("bench", "offline", "--fql", tmp_path).err
    assert "leave out --env" in tether("bench", "flow", "--env", "CartPole-v1").err
    assert "leave out --device" in tether("bench", "flow", "--device", "cpu").err
