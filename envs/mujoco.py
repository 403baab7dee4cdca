"""Gymnasium's MuJoCo tasks, versions 4 and 5."""

from __future__ import annotations

import re
from typing import Any

import gymnasium as gym

from .suite import PoolTask, Suite

TASKS = (
    "Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum",
    "Pusher", "Reacher", "Swimmer", "Walker2d",
)  # fmt: skip

_FORM = re.compile(rf"({'|'.join(TASKS)})-v[45]")


def _owns(env_id: str) -> bool:
    return _FORM.fullmatch(env_id) is not None


def _ids() -> list[str]:
    return [f"{task}-{version}" for version in ("v5", "v4") for task in TASKS]


def _make(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    return gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **kwargs)


def _pool(env_id: str) -> PoolTask | None:
    return PoolTask(env_id, agrees=True)


SUITE = Suite("mujoco", owns=_owns, ids=_ids, make=_make, pool=_pool)
