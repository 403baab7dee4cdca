"""Whatever else is registered with Gymnasium: classic control, Box2D, toy text, and the user's own ids."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from .suite import Suite


def _ids() -> list[str]:
    return sorted(gym.registry)


def _make(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    return gym.make(env_id, render_mode=render_mode, **kwargs)


SUITE = Suite("gymnasium", owns=lambda env_id: True, ids=_ids, make=_make)
