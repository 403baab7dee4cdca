"""Velocity-constrained MuJoCo: Safety-Gymnasium's Safe Velocity tasks, version 1, on Gymnasium's own tasks."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from . import mujoco
from .suite import EnvError, Suite


class SpeedLimit(NamedTuple):
    """What a robot's speed is and where its limit lies.

    :param threshold: the highest speed that costs nothing, in m/s
    :param planar: whether the speed is the length of the velocity in the plane; otherwise it is the velocity along x, so
        that running backwards is never too fast
    """

    threshold: float
    planar: bool


# safety_gymnasium/tasks/safe_velocity/safety_*_velocity_v1.py. Version 0 differs in the thresholds, and its Swimmer's speed
# was planar. The documentation speaks of |x_velocity| for robots without a y velocity: the code, followed here, does not.
LIMITS = {
    "Ant": SpeedLimit(2.6222, planar=True),
    "HalfCheetah": SpeedLimit(3.2096, planar=False),
    "Hopper": SpeedLimit(0.7402, planar=False),
    "Humanoid": SpeedLimit(1.4149, planar=True),
    "Swimmer": SpeedLimit(0.2282, planar=False),
    "Walker2d": SpeedLimit(2.3415, planar=False),
}

_FORM = re.compile(rf"Safety({'|'.join(LIMITS)})Velocity-v\d+")


class VelocityCost(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Tell in ``info["cost"]`` whether the step was too fast: 1.0 where its speed is above the threshold, else 0.0.

    The speed is the mean velocity over the step, from the task's own ``info["x_velocity"]`` and ``info["y_velocity"]``:
    of the torso (Ant), the centre of mass (Humanoid), or the root (the others). Observations, rewards and ends of episodes
    stay those of the task.

    :param env: a locomotion task of Gymnasium
    :param threshold: the highest speed that costs nothing, in m/s
    :param planar: as in `SpeedLimit`
    """

    def __init__(self, env: gym.Env, threshold: float, planar: bool) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, threshold=threshold, planar=planar)
        super().__init__(env)
        self.threshold, self.planar = threshold, planar

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        speed = math.hypot(info["x_velocity"], info["y_velocity"]) if self.planar else info["x_velocity"]
        return observation, reward, terminated, truncated, {**info, "cost": float(speed > self.threshold)}


def _ids() -> list[str]:
    return [f"Safety{robot}Velocity-v1" for robot in LIMITS]


def _make(
    env_id: str,
    flatten: bool,
    render_mode: str | None,
    *,
    velocity_threshold: float | None = None,
    margin: float = 0.0,
    **kwargs: Any,
) -> gym.Env:
    """Make a task from Gymnasium's version 4, as Safety-Gymnasium does: Ant's observation is without contact forces.

    :param velocity_threshold: takes the place of the robot's own, in m/s
    :param margin: part of the threshold that it is lowered by, in [0, 1)
    :param kwargs: arguments of Gymnasium's task, and ``max_episode_steps``, 1,000 by default
    """
    if env_id not in _ids():
        raise gym.error.NameNotFound(env_id)
    if velocity_threshold is not None and not velocity_threshold >= 0.0:
        raise EnvError(f"velocity_threshold is {velocity_threshold}: give a speed in m/s, 0 or more.")
    if not 0.0 <= margin < 1.0:
        raise EnvError(f"margin is {margin}: give a part of the threshold, from 0 up to 1.")
    robot = env_id.removeprefix("Safety").removesuffix("Velocity-v1")
    limit = LIMITS[robot]
    env = mujoco.SUITE.make(f"{robot}-v4", flatten, render_mode, **kwargs)
    task = env.unwrapped
    task.spec = EnvSpec(env_id, max_episode_steps=task.spec.max_episode_steps if task.spec else None)
    threshold = limit.threshold if velocity_threshold is None else velocity_threshold
    return VelocityCost(env, (1.0 - margin) * threshold, limit.planar)


def _cautious(env_id: str) -> dict[str, Any]:
    """A gait's speed swings, so that one near the threshold passes it now and then; and falling must be no way out."""
    falls = not env_id.startswith(("SafetyHalfCheetah", "SafetySwimmer"))
    return {"margin": 0.2, **({"terminate_when_unhealthy": False} if falls else {})}


SUITE = Suite(
    "safety",
    owns=lambda env_id: _FORM.fullmatch(env_id) is not None,
    ids=_ids,
    make=_make,
    cautious=_cautious,
)
