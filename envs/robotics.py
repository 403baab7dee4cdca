"""Manipulation and navigation: Gymnasium-Robotics (Adroit, Fetch, hands, mazes, kitchen), Meta-World, OGBench."""

from __future__ import annotations

import re
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from .pool_env import PoolEnv
from .suite import EnvError, PoolTask, Suite, installed, require, unknown_argument

# ---------------------------------------------------------------------- Gymnasium-Robotics

_FARAMA = re.compile(r"(AdroitHand|Fetch|HandManipulate|HandReach|FrankaKitchen|PointMaze_|AntMaze_)\w*-v\d+")


def _farama_ids() -> list[str]:
    if not installed("gymnasium_robotics"):
        return []
    _register_farama()
    return sorted(env_id for env_id in gym.registry if _FARAMA.fullmatch(env_id))


def _register_farama() -> None:
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)


def _make_farama(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    require(env_id, "robotics", "gymnasium_robotics")
    _register_farama()
    return gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **kwargs)


ROBOTICS = Suite("robotics", owns=lambda env_id: bool(_FARAMA.fullmatch(env_id)), ids=_farama_ids, make=_make_farama)

# ---------------------------------------------------------------------- Meta-World

_META = "Meta-World/"
_META_STEPS = 500


def _meta_ids() -> list[str]:
    if not installed("envpool"):
        return []
    import envpool

    names = [name.removeprefix("MetaWorld/") for name in envpool.list_all_envs() if name.startswith("MetaWorld/")]
    return sorted(_META + re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower() for name in names)


def _meta_pool_id(env_id: str) -> str:
    words, version = env_id.removeprefix(_META).rsplit("-", 1)
    return f"MetaWorld/{''.join(word.capitalize() for word in words.split('-'))}-{version}"


def _make_meta(
    env_id: str, flatten: bool, render_mode: str | None, *, max_episode_steps: int = _META_STEPS, **kwargs: Any
) -> gym.Env:
    """Make a task of EnvPool's port: observations (39,) float32 without the goal, ``info["success"]``, 500 steps."""
    require(env_id, "envpool", "envpool")
    if env_id not in _meta_ids():
        raise gym.error.NameNotFound(env_id)
    for name in kwargs:
        raise unknown_argument(env_id, name, ("max_episode_steps",))
    if render_mode is not None:
        raise EnvError(f"{env_id} gives no pictures here: leave out render_mode.")
    observations = spaces.Box(-np.inf, np.inf, (39,), np.float32)
    env = PoolEnv(_meta_pool_id(env_id), observations, spaces.Box(-1, 1, (4,), np.float32), {})
    env.spec = EnvSpec(env_id, max_episode_steps=max_episode_steps)
    return gym.wrappers.TimeLimit(env, max_episode_steps)


def _meta_pool(env_id: str) -> PoolTask | None:
    return PoolTask(_meta_pool_id(env_id), agrees=True)  # with itself: `make_env` takes EnvPool as well


META_WORLD = Suite("meta-world", owns=lambda env_id: env_id.startswith(_META), ids=_meta_ids, make=_make_meta, pool=_meta_pool)

# ---------------------------------------------------------------------- OGBench

_OGBENCH = re.compile(r"(visual-)?(pointmaze|antmaze|humanoidmaze|antsoccer|cube|scene|puzzle|powderworld)-.*-?v\d+")


def _ogbench_ids() -> list[str]:
    """The single-task names of OGBench's default datasets."""
    if not installed("ogbench"):
        return []
    import ogbench  # noqa: F401  registers them

    names = [env_id for env_id in gym.registry if _OGBENCH.fullmatch(env_id) and "-singletask-" in env_id]
    return sorted(
        name.replace("-singletask-", f"-{'navigate' if re.search('maze|soccer', name) else 'play'}-singletask-")
        for name in names
    )


class SparseReward(gym.RewardWrapper):
    """-1 until nothing is left to do, and 0 then, in the place of how much is left."""

    def reward(self, reward: Any) -> float:
        return -1.0 if reward != 0.0 else 0.0


def _make_ogbench(env_id: str, flatten: bool, render_mode: str | None, sparse: bool = False, **kwargs: Any) -> gym.Env:
    """Make the environment that belongs to a dataset's name, as ``ogbench.make_env_and_datasets`` takes it.

    :param sparse: of scene and puzzles: :class:`SparseReward`, as in QC's and FMQ's runs
    """
    if sparse:
        return SparseReward(_make_ogbench(env_id, flatten, render_mode, **kwargs))
    require(env_id, "ogbench", "ogbench")
    import ogbench

    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    if env_id in gym.registry:
        return gym.make(env_id, disable_env_checker=True, **kwargs)
    return ogbench.make_env_and_datasets(env_id, env_only=True, disable_env_checker=True, **kwargs)


OGBENCH = Suite("ogbench", owns=lambda env_id: bool(_OGBENCH.fullmatch(env_id)), ids=_ogbench_ids, make=_make_ogbench)
