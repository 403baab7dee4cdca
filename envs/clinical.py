"""Clinical decisions: ICU-Sepsis as its package has it or with features, type-1 diabetes, and a linear patient."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from . import glucose, linear_patient, sepsis
from .suite import EnvError, Suite, installed, require, unknown_argument

REPRESENTATIONS = ("states", "features")


def _sepsis_ids() -> list[str]:
    if not installed("icu_sepsis"):
        return []
    import icu_sepsis  # noqa: F401  registers them

    return sorted(env_id for env_id in gym.registry if env_id.startswith("Sepsis/"))


def _make_sepsis(
    env_id: str, flatten: bool, render_mode: str | None, *, representation: str = "states", **kwargs: Any
) -> gym.Env:
    """Make the package's environment unchanged, or with ``representation="features"`` a `sepsis.SepsisFeatures`."""
    require(env_id, "clinical", "icu_sepsis")
    import icu_sepsis  # noqa: F401

    if representation not in REPRESENTATIONS:
        raise EnvError(f"There is no representation '{representation}': use one of {', '.join(REPRESENTATIONS)}.")
    if representation == "states":
        return gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **kwargs)
    if env_id not in gym.registry:
        raise gym.error.NameNotFound(env_id)
    return _specified(env_id, sepsis.SepsisFeatures(render_mode=render_mode, **_known(env_id, kwargs, "reward")))


def _known(env_id: str, kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    """``kwargs``, if they are the time limit and ``names`` only."""
    for name in kwargs:
        if name not in (*names, "max_episode_steps"):
            raise unknown_argument(env_id, name, (*names, "max_episode_steps"))
    return kwargs


def _specified(env_id: str, env: Any) -> gym.Env:
    """The environment with the spec from which others learn its id and time limit, which it keeps by itself."""
    env.spec = EnvSpec(env_id, max_episode_steps=env.max_episode_steps)
    return env


def _make_glucose(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    known = _known(env_id, kwargs, "patient", "patient_id", "meals")
    return _specified(env_id, glucose.Glucose(render_mode=render_mode, **known))


def _make_linear(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    known = _known(env_id, kwargs, "noise", "limit")
    return _specified(env_id, linear_patient.LinearPatient(render_mode=render_mode, **known))


SEPSIS = Suite(
    "clinical",
    owns=lambda env_id: env_id.startswith("Sepsis/"),
    ids=_sepsis_ids,
    make=_make_sepsis,
    collecting={"representation": "features"},
    clinician=sepsis.Clinician,
)
GLUCOSE = Suite(
    "clinical",
    owns=lambda env_id: env_id == glucose.ID,
    ids=lambda: [glucose.ID] if installed("glucosim") else [],
    make=_make_glucose,
    clinician=glucose.Clinician,
)
LINEAR_PATIENT = Suite(
    "clinical", owns=lambda env_id: env_id == linear_patient.ID, ids=lambda: [linear_patient.ID], make=_make_linear
)
