"""RL-Zoo's own experiment manager trains our agents after one call."""

import argparse

import pytest

import tether.agents.zoo
from tether.agents import GIRL, MDPO

zoo = pytest.importorskip("rl_zoo3.exp_manager", reason="RL-Zoo is not installed: pip install rl_zoo3")


GIRL_YML = """
  learning_starts: 60
  pretrain_updates: 1
  train_ratio: 1
  batch_size: 2
  batch_length: 6
  encoder_updates: 3
  policy_kwargs: "dict(size='small')"
"""


@pytest.mark.parametrize(("name", "cls", "arguments"), [("mdpo", MDPO, "  n_steps: 64\n"), ("girl", GIRL, GIRL_YML)])
def test_registered_agents_train_in_rl_zoo(tmp_path, name, cls, arguments):
    tether.agents.zoo.register()
    configuration = tmp_path / f"{name}.yml"
    configuration.write_text(f"Pendulum-v1:\n  policy: MlpPolicy\n  n_envs: 2\n  n_timesteps: 256\n{arguments}")

    manager = zoo.ExperimentManager(
        argparse.Namespace(),
        name,
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
    assert isinstance(model, cls)
    assert model.num_timesteps == 256
