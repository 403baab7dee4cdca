"""The walker of the ant's mazes: SAC on an open plain, rewarded for going where it is told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tether.envs.datasets.ogbench_make import Walker

TRAIN_STEPS = 400_000  # as OGBench's expert
INTERVAL = 100  # steps between two directions


def train_walker(cache: Path, steps: int | None, seed: int) -> Path:
    """Train the walker, or take the one that a former collection left.

    It sees the ant's state without its place and a unit vector, 27 and 2 numbers, and is rewarded with how far it went
    along it.

    :param cache: folder of trained behaviours
    :param steps: env steps; None: as many as OGBench's expert had
    :return: its file
    """
    from stable_baselines3 import SAC

    from tether.agents.common.model_file import write_model

    steps = steps or TRAIN_STEPS
    path = cache / f"ogbench-ant-{steps}-{seed}.zip"
    if not path.is_file():
        print(f"  training the walker for {steps:,} steps", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        env = _plain()
        try:
            model = SAC("MlpPolicy", env, seed=seed, device="cpu", learning_starts=min(10_000, steps // 2))
            write_model(model.learn(steps), path)
        finally:
            env.close()
    return path


def load_walker(path: Path) -> Walker:
    """The likeliest actions of a trained walker."""
    from stable_baselines3 import SAC

    from tether.agents.common.model_file import build_model, read_model

    model: Any = build_model(SAC, read_model(path, "cpu"), device="cpu")
    return lambda observation: model.predict(observation.astype(np.float32), deterministic=True)[0]


def _plain() -> Any:
    """The open plain, with directions."""
    import gymnasium as gym
    import ogbench.online_locomotion  # noqa: F401  registers it
    from ogbench.online_locomotion.wrappers import GymXYWrapper

    return GymXYWrapper(gym.make("online-ant-v0", disable_env_checker=True), resample_interval=INTERVAL)
