"""Clinical decisions: ICU-Sepsis."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from .suite import Suite, installed, require


def _ids() -> list[str]:
    if not installed("icu_sepsis"):
        return []
    import icu_sepsis  # noqa: F401  registers them

    return sorted(env_id for env_id in gym.registry if env_id.startswith("Sepsis/"))


def _make(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    require(env_id, "clinical", "icu_sepsis")
    import icu_sepsis  # noqa: F401

    return gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **kwargs)


SUITE = Suite("clinical", owns=lambda env_id: env_id.startswith("Sepsis/"), ids=_ids, make=_make)
