"""Makes the golden files, once for every format: `python -m tests.agents.golden.write`. Those of old formats stay."""

from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from tests.kit.agents import SUBJECTS
from tests.kit.offline import SUBJECTS as OFFLINE_SUBJECTS
from tests.kit.offline import random_dataset
from tests.kit.resume import StopAt
from tether.agents import BPO

if __name__ == "__main__":
    observations = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    for subject in SUBJECTS:
        path = Path(__file__).parent / f"{subject.name}.zip"
        if not path.exists():
            agent = subject.make(subject.world, **subject.tiny).learn(300)
            agent.save(path)
            np.save(path.with_suffix(".npy"), agent.predict(observations, deterministic=True)[0])
    for offline in OFFLINE_SUBJECTS:
        path = Path(__file__).parent / f"{offline.name}.zip"
        if not path.exists():
            agent = offline.make().learn_offline(random_dataset(), 5)
            agent.save(path)
            th.manual_seed(0)
            np.save(path.with_suffix(".npy"), agent.predict(observations, deterministic=True)[0])
    folder = Path(__file__).parent / "checkpoint"
    if not folder.exists():
        env = make_vec_env("Pendulum-v1", 2, seed=1)
        agent = BPO("MlpPolicy", env, n_steps=32, batch_size=32, policy_kwargs={"net_arch": [4]}, seed=1, device="cpu")
        agent.learn(128, StopAt(40)).save_checkpoint(folder)
