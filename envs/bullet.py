"""Bullet-Safety-Gym's Run and Circle tasks for a ball, a car, a drone and an ant, with episodes that follow from a seed."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from .suite import EnvError, Suite, installed, unknown_argument

ROBOTS = {"Ball": "Ball", "Car": "RaceCar", "Drone": "Drone", "Ant": "Ant"}  # our names and the package's
TASKS = {"Run": ("RunTask", "Plane200"), "Circle": ("CircleTask", "Octagon")}  # its task and its world
STEPS = {
    "SafetyBallRun-v0": 100, "SafetyCarRun-v0": 200, "SafetyDroneRun-v0": 200, "SafetyAntRun-v0": 200,
    "SafetyBallCircle-v0": 200, "SafetyCarCircle-v0": 300, "SafetyDroneCircle-v0": 300, "SafetyAntCircle-v0": 500,
}  # fmt: skip

# The package registers its other tasks as well once it is imported.
_FORM = re.compile(rf"Safety({'|'.join(ROBOTS)})(Run|Circle|Reach|Push|Gather)-v\d+")
_PACKAGES = ("pybullet", "bullet_safety_gym")
_INSTALL = "pip install pybullet==3.2.7", "pip install --no-deps bullet-safety-gym==1.4.0"


class BulletTask(gym.Env):
    """One task of bullet-safety-gym 1.4.0.

    Run: move along x between two lines; ``info["cost"]`` is 1.0 where |y| > 2 m or the speed in the plane is above the
    robot's limit (2.5 m/s for the ball, else 1.5 m/s), else 0.0. Circle: run along a circle; the cost is 1.0 where
    |x| > 6 m. Observations are float64 here and float32 from `make_env`; actions are in [-1, 1].

    The package draws starts from NumPy's and Python's global generators, and its car and drone start with the motors as
    the last episode left them. Here they start as after an action of zeros, and the global generators stay as they are:
    an episode follows from its seed and its actions.

    :param robot: ``Ball``, ``Car``, ``Drone`` or ``Ant``
    :param task: ``Run`` or ``Circle``
    :param render_mode: None or ``rgb_array``
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, robot: str, task: str, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        kind, world = TASKS[task]
        with _global_generators(0), _plain_streams(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "overflow encountered in cast", RuntimeWarning)  # bounds given as float32
            from bullet_safety_gym.envs.builder import EnvironmentBuilder

            self.builder = EnvironmentBuilder(ROBOTS[robot], kind, {}, {"name": world, "factor": 1})
            self.builder.reset()  # keeps the state of the physics that every later reset starts from
        self.observation_space, self.action_space = self.builder.observation_space, self.builder.action_space
        self._start(0)

    def _start(self, episode: int) -> np.ndarray:
        """Begin the episode of a number, which with the actions says all that happens in it."""
        self.episode, self.actions = episode, list[np.ndarray]()
        self.builder.agent.apply_action(np.zeros(self.builder.agent.act_dim))
        self.builder.bc.stepSimulation()  # uses up the forces, so that only the motors' targets stay
        with _global_generators(episode):
            return self.builder.reset()[0]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._start(int(self.np_random.integers(2**32))), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(np.array(action))
        observation, reward, terminated, _, info = self.builder.step(action)
        return observation, float(reward), bool(terminated), False, {**info, "cost": float(info["cost"])}

    def render(self) -> np.ndarray | None:
        """A picture (360, 480, 3) uint8."""
        return self.builder.render("rgb_array").astype(np.uint8) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Disconnect from the physics; may be called twice."""
        self.builder.close()

    def resumable_state(self) -> dict[str, Any]:
        """What brings another `BulletTask` to this point: the generator, and the episode's number and actions."""
        actions = np.stack(self.actions) if self.actions else np.zeros((0, self.builder.agent.act_dim))
        return {"generator": self.np_random.bit_generator.state, "episode": self.episode, "actions": actions}

    def resume_from(self, state: dict[str, Any]) -> None:
        """Live through the episode of a state again."""
        self.np_random.bit_generator.state = state["generator"]
        self._start(state["episode"])
        for action in state["actions"]:
            self.step(action)


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Seed NumPy's and Python's global generators for a while."""
    before, before_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
        random.setstate(before_python)


@contextmanager
def _plain_streams() -> Iterator[None]:
    """Put the process's own output behind ``sys.stdout`` and ``sys.stderr`` for a while.

    The package silences PyBullet by the streams' file descriptors, which notebooks and pytest's streams do not have.
    """
    with open(1, "w", closefd=False) as out, open(2, "w", closefd=False) as err, redirect_stdout(out), redirect_stderr(err):
        yield


def _ids() -> list[str]:
    return list(STEPS) if installed(*_PACKAGES) else []


def _make(
    env_id: str, flatten: bool, render_mode: str | None, *, max_episode_steps: int | None = None, **kwargs: Any
) -> gym.Env:
    """Make a task; ``max_episode_steps`` is 100 to 500 by default, as `STEPS` has it."""
    if not installed(*_PACKAGES):
        raise EnvError(f"{env_id} needs two packages: type '{_INSTALL[0]}', and then '{_INSTALL[1]}'.")
    if env_id not in STEPS:
        raise EnvError(f"{env_id} is not among the tasks whose starts follow a seed: use one of {', '.join(STEPS)}.")
    for name in kwargs:
        raise unknown_argument(env_id, name, ("max_episode_steps",))
    if render_mode not in (None, "rgb_array"):
        raise EnvError(f"{env_id} has no render_mode '{render_mode}': use 'rgb_array'.")
    robot, task = next((robot, task) for robot in ROBOTS for task in TASKS if env_id == f"Safety{robot}{task}-v0")
    env = BulletTask(robot, task, render_mode)
    limit = max_episode_steps or STEPS[env_id]
    env.spec = EnvSpec(env_id, max_episode_steps=limit)
    return gym.wrappers.TimeLimit(env, limit)


SUITE = Suite("bullet", owns=lambda env_id: _FORM.fullmatch(env_id) is not None, ids=_ids, make=_make)
