"""The walker of the ant's mazes: SAC on an open plain, rewarded for going where it is told."""

from __future__ import annotations

import shutil
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .interrupts import stoppable

if TYPE_CHECKING:
    from tether.envs.datasets.ogbench_make import Walker

TRAIN_STEPS = 400_000  # as OGBench's expert
INTERVAL = 100  # steps between two directions
# Of OGBench's SAC, where SB3's has others; half an action's dimensions is its target of the entropy.
LEARNING_RATE, TARGET_ENTROPY, RANDOM_STEPS = 1e-4, -4.0, 10_000


def train_walker(cache: Path, steps: int | None, seed: int) -> Path:
    """Train the walker, or go on with it, or take the one that a former collection left.

    It sees the ant's state without its place and a unit vector, 27 and 2 numbers, and is rewarded with how far it went
    along it.

    :param cache: folder of trained behaviours
    :param steps: env steps; None: as many as OGBench's expert had
    :return: its file
    :raises KeyboardInterrupt: when it was asked to stop, after a checkpoint
    """
    from stable_baselines3 import SAC
    from stable_baselines3.common.vec_env import DummyVecEnv

    from tether.agents import CheckpointCallback, list_checkpoints, load_checkpoint
    from tether.agents.common.model_file import write_model

    from .callbacks import StopCallback

    steps = steps or TRAIN_STEPS
    path = cache / f"ogbench-ant-{steps}-{seed}.zip"
    if path.is_file():
        return path
    checkpoints = path.with_suffix(".partial")
    with stoppable() as stop, closing(DummyVecEnv([_plain])) as env:
        if list_checkpoints(checkpoints):
            model = load_checkpoint(SAC, checkpoints, env, "cpu")
        else:
            model = SAC(
                "MlpPolicy", env, LEARNING_RATE, buffer_size=min(steps, 1_000_000), target_entropy=TARGET_ENTROPY,
                learning_starts=min(RANDOM_STEPS, steps // 2), seed=seed, device="cpu",
            )  # fmt: skip
        print(f"  training the walker for {steps - model.num_timesteps:,} steps", flush=True)
        keeper = CheckpointCallback(checkpoints)
        keeper.init_callback(model)  # `save` may be called before `learn` does it
        callbacks = [StopCallback(stop, keeper.save), keeper]
        with stop.deferred():
            how: dict[str, Any] = {"reset_num_timesteps": False, "progress_bar": sys.stderr.isatty()}
            model.learn(steps - model.num_timesteps, callbacks, **how)
        if model.num_timesteps == steps:
            write_model(model, path)
            shutil.rmtree(checkpoints, ignore_errors=True)
        if stop.requested:
            raise KeyboardInterrupt
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

    from tether.envs.suite import cast_observations

    return cast_observations(GymXYWrapper(gym.make("online-ant-v0", disable_env_checker=True), resample_interval=INTERVAL))
