"""Whatever else is registered with Gymnasium: classic control, Box2D, toy text, and the user's own ids."""

from __future__ import annotations

import re
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from .suite import PoolTask, Suite, installed

# Pendulum-v1 is not among them: EnvPool turns the pole by a speed that it should have clipped.
POOL = ("Acrobot-v1", "CartPole-v1", "MountainCar-v0", "MountainCarContinuous-v0")

_FAMILIES = {"box2d": "Box2D", "classic_control": "pygame", "toy_text": "pygame"}  # and what each needs
_OTHER_PACKAGES = ("ale_py", "glucosim", "gymnasium", "gymnasium_robotics", "icu_sepsis", "ogbench", "shimmy")


def _ids() -> list[str]:
    return sorted(spec.id for spec in gym.registry.values() if _belongs(spec))


def _belongs(spec: EnvSpec) -> bool:
    """Whether it is one of Gymnasium's families that run here, or the user's own."""
    place = spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, "__module__", "")
    package, *rest = re.split(r"[.:]", place)
    if package == "gymnasium" and rest[1:] and rest[1] in _FAMILIES:
        return installed(_FAMILIES[rest[1]])
    return package not in _OTHER_PACKAGES


def _make(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    if render_mode is not None:  # an environment of the user's need not have the argument
        kwargs["render_mode"] = render_mode
    return gym.make(env_id, **kwargs)


def _pool(env_id: str) -> PoolTask | None:
    return PoolTask(env_id, agrees=True) if env_id in POOL else None


SUITE = Suite("gymnasium", owns=lambda env_id: True, ids=_ids, make=_make, pool=_pool)
