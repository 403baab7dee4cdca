"""`tether bench offline`, `inference` and `guardian`: who takes part, and what is written."""

from __future__ import annotations

import json

import numpy as np

from tether.experiments.bench_offline import OBS

OBSERVATION = np.zeros(OBS, np.float32)


def test_offline_speed(tether, tmp_path):
    outcome = tether("bench", "offline", "--only", "BC", "FISOR, reduced", "--rounds", 2, "--seconds", 0.05, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "offline.json").read_text())
    rates = {(one["method"], one["name"]): one["updates/s"] for one in result["contestants"]}
    assert {("BC", "Tether"), ("BC", "Tether, 5 seeds at once"), ("FISOR, reduced", "Tether")} <= set(rates)
    assert all(len(of) == 2 and min(of) > 0 for of in rates.values())
    assert result["GFLOP per update"]["FISOR, reduced"] > 0.5
    assert "| BC " in (tmp_path / "offline.md").read_text()
    assert "There is no method 'BCC'" in tether("bench", "offline", "--only", "BCC").err


def test_time_to_act(tether, tmp_path, monkeypatch):
    size = "tether.experiments.bench_offline._milliseconds"
    monkeypatch.setattr(size, lambda agent: float(agent.predict(OBSERVATION)[0].size))
    outcome = tether("bench", "inference", "--rounds", 1, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "| FISOR, reduced (16 candidates, 5 steps) " in (tmp_path / "inference.md").read_text()
    assert "leave out --only" in tether("bench", "inference", "--only", "BC").err


def test_speed_of_the_guardian(tether, tmp_path, monkeypatch):
    for name, value in {"REFERENCES": 400, "QUERIES": {"cpu": 300, "cuda": 300}, "ITERATIONS": 2}.items():
        monkeypatch.setattr(f"tether.experiments.bench_guardian.{name}", value)
    outcome = tether("bench", "guardian", "--rounds", 1, "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "guardian.json").read_text())
    assert {"Tether, exact densities", "Tether, labels", "OGSRL, iterations"} <= set(result["per second"])
    hours = 20_000 / result["per second"]["OGSRL, iterations"][0] / 3600
    assert f"the published 20,000 take {hours:.2f} [{hours:.2f}, {hours:.2f}]" in (tmp_path / "guardian.md").read_text()
    assert "leave out --only" in tether("bench", "guardian", "--only", "BC").err
    assert "leave out --device" in tether("bench", "safety", "--device", "cuda").err
