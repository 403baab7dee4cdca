"""The parts of a vector environment that a rollout steps one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.vec_env import VecEnv


@dataclass
class Part:
    """Environments that are stepped together: all of them, or one of two halves."""

    env: VecEnv
    envs: slice
    under_way: bool = False  # an action was sent, and what comes of it has not been taken in
    arrived: list[dict[str, Any]] | None = None  # the infos of a step that was taken in before its turn

    @property
    def first(self) -> int:
        """The number of its first environment."""
        return self.envs.start or 0

    def of(self, observations: Any) -> Any:
        """Its rows of everybody's observations."""
        return observations if self.envs.start is None else observations[self.envs]

    def into(self, observations: Any, own: Any) -> Any:
        """Everybody's observations with its own rows replaced."""
        if self.envs.start is None:
            return own
        observations[self.envs] = own
        return observations

    def wait(self) -> Any:
        """What its step gave."""
        self.under_way = False
        return self.env.step_wait()


def parts_of(env: VecEnv) -> list[Part]:
    """The parts of a vector environment. Only its own class is asked, because wrappers pass attributes on."""
    if not hasattr(type(env), "halves"):
        return [Part(env, slice(None))]
    first, second = env.halves  # type: ignore[attr-defined]
    n = first.num_envs
    return [Part(first, slice(0, n)), Part(second, slice(n, n + second.num_envs))]
