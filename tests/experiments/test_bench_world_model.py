"""The race of the world models: who takes part, what the table says, what is refused."""

import json
import sys
from pathlib import Path

import pytest

from tether.experiments import bench_world_model
from tether.experiments.errors import UsageError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences and memories that take no time."""
    sizes = {"policy_kwargs": {"size": "small", "deter": 8, "hidden": 8, "units": 8, "cnn_depth": 2}, "horizon": 2}
    monkeypatch.setattr(bench_world_model, "SIZES", {"small": {**sizes, "batch_size": 2, "batch_length": 4}})
    monkeypatch.setattr(bench_world_model, "COLLECTED", 40)
    monkeypatch.setattr(bench_world_model, "COLLECTED_PICTURES", 20)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("words", "rival", "of"), [((), "GIRL", ""), (("--pictures",), "GIRL-Distill", "-pictures")])
def test_race(tether, tmp_path: Path, words: tuple[str, ...], rival: str, of: str) -> None:
    rounds = ("--rounds", 2, "--seconds", 0.01, "--size", "small", "--device", "cpu", "--out", tmp_path)
    run = tether("bench", "world-model", *words, *rounds, "--only", "DreamerV3 arm", rival)
    assert run.code == 0, run.err
    result = json.loads((tmp_path / f"world-model-small{of}.json").read_text())
    rates = result["updates per second"]
    assert list(rates) == ["DreamerV3 arm", rival]
    assert all(len(found) == 2 and min(found) > 0.0 for found in rates.values())
    ratio = sorted(a / b for a, b in zip(*rates.values(), strict=True))
    lines = (tmp_path / f"world-model-small{of}.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"| {rival} "))
    assert f"{sum(ratio) / 2:.2f} [{ratio[0]:.2f}, {ratio[1]:.2f}]" in line
    assert ("pictures 64 x 64" in run.out) == bool(words)


def test_the_trust_region_is_at_work(small: None) -> None:
    import torch as th

    agent, _ = bench_world_model._agent(bench_world_model.CONTESTANTS["GIRL"], "small", th.device("cpu"), pictures=False)
    assert bool(agent.policy.trust_region.active)
    assert agent._warm


MODELS = """
from networks import MLP

class WorldModel:
    def __init__(self, seen, actions, step, config):
        assert config.dyn_deter == 8 and config.dyn_stoch == 16 and config.imag_horizon == 3 and config.model_lr == 1e-4
        assert config.encoder == {"mlp_keys": ".*", "mlp_layers": 2, "mlp_units": 128, "cnn_depth": 2}
        assert MLP().device == "cpu"
        self.heads, self.dynamics = {}, None

    def to(self, device):
        return self

    def _train(self, batch):
        assert batch["state"].shape == (2, 4, 5) and batch["action"].shape == (2, 4, 1)
        return {}, {}, {}

class ImagBehavior(WorldModel):
    def __init__(self, config, model):
        assert isinstance(model, WorldModel)

    def _train(self, states, reward):
        assert callable(reward)
"""
NETWORKS = """
class MLP:
    def __init__(self, device="cuda"):
        self.device = device
"""
CONFIGS = """
defaults: {model_lr: 1e-4, encoder: {mlp_keys: '$^'}, decoder: {mlp_keys: '$^'}}
dmc_proprio: {encoder: {mlp_keys: '.*'}, decoder: {mlp_keys: '.*'}}
"""


@pytest.mark.usefixtures("small")
def test_the_peer_joins(tether, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"models.py": MODELS, "networks.py": NETWORKS, "configs.yaml": CONFIGS}.items():
        (tmp_path / name).write_text(text)
    before = list(sys.path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    words = ("--rounds", 1, "--seconds", 0.01, "--size", "small", "--device", "cpu", "--nm512", tmp_path)
    run = tether("bench", "world-model", *words, "--only", "DreamerV3 arm", "NM512/dreamerv3-torch")
    assert run.code == 0, run.err
    assert "| NM512/dreamerv3-torch |" in run.out
    assert sys.path == before


def test_who_takes_part() -> None:
    assert {"DreamerV3 arm", "+ grounding", "+ ensemble", "+ trust region", "GIRL"} <= set(bench_world_model.CONTESTANTS)
    assert {"+ grounding", "GIRL", "GIRL-Distill"} <= set(bench_world_model.PICTURES)


def test_refusals(refused, tmp_path: Path) -> None:
    sentence = refused("bench", "world-model", "--only", "TD-MPC2")
    assert "There is no contestant 'TD-MPC2': use some of DreamerV3 arm," in sentence
    with pytest.raises(UsageError, match="cannot be imported from"):
        bench_world_model.Peer(tmp_path, "small", "cpu", pictures=False)
    assert "leave out --nm512" in refused("bench", "flow", "--nm512", "x")
    assert "leave out --pictures" in refused("bench", "offline", "--pictures")
