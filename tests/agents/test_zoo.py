"""RL-Zoo's own experiment manager trains our agents after one call."""

import pytest

import tether.agents.zoo
from tether.agents import MDPO

zoo = pytest.importorskip("rl_zoo3.exp_manager", reason="RL-Zoo is not installed: pip install rl_zoo3")


def test_registered_agents_train_in_rl_zoo(tmp_path):
    tether.agents.zoo.register()
    configuration = tmp_path / "mdpo.yml"
    configuration.write_text("Pendulum-v1:\n  policy: MlpPolicy\n  n_envs: 2\n  n_steps: 64\n  n_timesteps: 256\n")
    import argparse

    manager = zoo.ExperimentManager(
        argparse.Namespace(),
        "mdpo",
        "Pendulum-v1",
        str(tmp_path / "logs"),
        n_timesteps=256,
        eval_freq=-1,
        save_freq=-1,
        seed=0,
        verbose=0,
        config=str(configuration),
        device="cpu",
    )
    model, _ = manager.setup_experiment()
    manager.learn(model)
    assert isinstance(model, MDPO)
    assert model.num_timesteps == 256
