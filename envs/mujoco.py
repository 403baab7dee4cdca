"""Gymnasium's MuJoCo tasks, versions 4 and 5."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version
from typing import Any

import gymnasium as gym

from .suite import EnvError, PoolTask, Suite

TASKS = (
    "Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum",
    "Pusher", "Reacher", "Swimmer", "Walker2d",
)  # fmt: skip

_FORM = re.compile(rf"({'|'.join(TASKS)})-v[2345]")

# EnvPool has these under the same names; Pusher and Reacher name their weights otherwise.
_POOL_ARGUMENTS = frozenset({
    "contact_cost_weight", "ctrl_cost_weight", "exclude_current_positions_from_observation", "forward_reward_weight",
    "healthy_reward", "reset_noise_scale", "terminate_when_unhealthy",
})  # fmt: skip


def _owns(env_id: str) -> bool:
    return _FORM.fullmatch(env_id) is not None


def _ids() -> list[str]:
    return [f"{task}-{number}" for number in ("v5", "v4") for task in TASKS if (task, number) != ("Pusher", "v4")]


def _make(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    if env_id not in _ids():
        raise EnvError(f"{env_id} runs on MuJoCo 2 only: use {env_id[:-1]}5.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)  # v4 is asked for by name
        return gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **kwargs)


def _pool(env_id: str) -> PoolTask | None:
    if env_id not in _ids():
        return None
    # Gymnasium fills the contact forces in version 4 as well; EnvPool does so for version 5 only, unless told.
    config = {"post_constraint": True} if re.fullmatch(r"Humanoid(Standup)?-v4", env_id) else {}
    return PoolTask(env_id, agrees=same_physics(), arguments=_POOL_ARGUMENTS, config=config)


def same_physics() -> bool:
    """EnvPool is built on MuJoCo 3.6; with versions before it, Hopper moves otherwise."""
    major, minor = version("mujoco").split(".")[:2]
    return (int(major), int(minor)) >= (3, 6)


SUITE = Suite("mujoco", owns=_owns, ids=_ids, make=_make, pool=_pool)
