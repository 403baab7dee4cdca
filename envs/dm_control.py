"""The DeepMind Control Suite, through Shimmy: flat float32 observations in the suite's own order, or pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from .distractors import DistractedPixels
from .mujoco import same_physics
from .suite import EnvError, PoolTask, Suite, installed

_FORM = re.compile(r"dm_control/(?P<domain>\w+)-(?P<task>\w+)-v0")

# Where the first camera does not show the body at 64 x 64, which others are used: by domain or id.
CAMERAS = {"quadruped": 2, "dm_control/dog-fetch-v0": 2}

# Tasks in which EnvPool's steps, rewards and starts are dm_control's; `tests/envs` compares exactly these. Left out are
# those whose state is not seen in the first observation, and those that differ: ball_in_cup (reward), the cartpoles of
# several poles (start), point_mass-hard (gains), lqr (model).
POOL = frozenset(
    f"dm_control/{domain}-{task}-v0"
    for domain, tasks in {
        "acrobot": "swingup swingup_sparse",
        "cartpole": "balance balance_sparse swingup swingup_sparse",
        "cheetah": "run",
        "finger": "spin turn_easy turn_hard",
        "hopper": "stand hop",
        "humanoid": "stand walk run run_pure_state",
        "humanoid_CMU": "stand walk run",
        "pendulum": "swingup",
        "point_mass": "easy",
        "quadruped": "walk run",
        "reacher": "easy hard",
        "swimmer": "swimmer6 swimmer15",
        "walker": "stand walk run",
    }.items()
    for task in tasks.split()
)


class FlatObservation(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Join the parts of the observation into one float32 Box, in the order in which dm_control gives them."""

    def __init__(self, env: gym.Env, names: tuple[str, ...]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, names=names)
        super().__init__(env)
        self.observation_names = names
        parts = [env.observation_space[name] for name in names]  # type: ignore[index]
        low = np.concatenate([part.low.ravel() for part in parts]).astype(np.float32)
        high = np.concatenate([part.high.ravel() for part in parts]).astype(np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)

    def observation(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(observation[name]) for name in self.observation_names], dtype=np.float32)


class PixelObservation(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Give a camera's picture, (size, size, 3) uint8, in the place of the observation.

    :param fast: no shadows, reflections and multisampling: many times as fast without a graphics card, other pictures
    """

    def __init__(self, env: gym.Env, size: int, camera_id: int, fast: bool) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, size=size, camera_id=camera_id, fast=fast)
        super().__init__(env)
        self._physics = env.unwrapped._env.physics  # type: ignore[attr-defined]
        self._arguments: dict[str, Any] = {"height": size, "width": size, "camera_id": camera_id}
        if fast:
            self._physics.model.vis.quality.offsamples = 0  # read when the first picture makes the renderer
            self._arguments["render_flag_overrides"] = {"shadow": False, "reflection": False}
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        return self._physics.render(**self._arguments)


class ActionRepeat(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Take each action several times, adding the rewards, until the episode ends."""

    def __init__(self, env: gym.Env, repeat: int) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, repeat=repeat)
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def _owns(env_id: str) -> bool:
    return env_id.startswith("dm_control/")


def _ids() -> list[str]:
    if not installed("dm_control", "shimmy"):
        return []
    from dm_control import suite

    return [f"dm_control/{domain}-{task}-v0" for domain, task in suite.ALL_TASKS]


def _make(
    env_id: str,
    flatten: bool,
    render_mode: str | None,
    *,
    from_pixels: bool = False,
    image_size: int = 64,
    camera_id: int | None = None,
    fast_render: bool = False,
    distraction: float = 0.0,
    action_repeat: int = 1,
    max_episode_steps: int | None = None,
) -> gym.Env:
    """Make a task.

    :param from_pixels: observe (image_size, image_size, 3) uint8 pictures of camera `camera_id`
    :param camera_id: also of `render`; None: the first, but where it does not show the body (:data:`CAMERAS`)
    :param fast_render: see `PixelObservation`
    :param distraction: strength of moving textures and drifting colours in the pictures, up to 1; see `DistractedPixels`
    :param action_repeat: the suite's steps per step, which divide the length of the episode
    :param max_episode_steps: a time limit, in steps of the result, shorter than the suite's own
    """
    match = _FORM.fullmatch(env_id)
    if match is None or env_id not in _ids():
        raise gym.error.NameNotFound(env_id)
    if not 0.0 <= distraction <= 1.0 or (distraction and not from_pixels):
        raise EnvError(f"distraction is a strength in [0, 1] and needs from_pixels=True, not {distraction}.")
    for name, value in {"action_repeat": action_repeat, "image_size": image_size}.items():
        if not isinstance(value, int) or value < 1:
            raise EnvError(f"{name} is a whole number above 0, not {value!r}.")
    from dm_control import suite
    from shimmy.dm_control_compatibility import DmControlCompatibilityV0

    # The LQR tasks draw their model from the seed at loading: the same model in every environment.
    task = suite.load(match["domain"], match["task"], task_kwargs={"random": 0})
    names = tuple(task.observation_spec())
    camera_id = CAMERAS.get(env_id, CAMERAS.get(match["domain"], 0)) if camera_id is None else camera_id
    cameras = task.physics.model.ncam
    if not isinstance(camera_id, int) or not -1 <= camera_id < cameras:
        raise EnvError(f"camera_id of {env_id} is -1 (the free camera) or one of its {cameras}, from 0 on: not {camera_id!r}.")
    env: gym.Env = DmControlCompatibilityV0(task, render_mode, {"camera_id": camera_id})
    env.np_random = np.random.RandomState()  # type: ignore[assignment]
    env.metadata = {**env.metadata, "render_fps": round(1 / (task.control_timestep() * action_repeat))}
    env.action_space = _inner_float32(env.action_space)
    limit = _limit(task, action_repeat, max_episode_steps)
    env.spec = EnvSpec(env_id, max_episode_steps=limit)
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    if from_pixels:
        env = PixelObservation(env, image_size, camera_id, fast_render)
        env = DistractedPixels(env, camera_id, distraction) if distraction else env
    elif flatten:
        env = FlatObservation(env, names)
    return gym.wrappers.TimeLimit(env, max_episode_steps) if max_episode_steps else env


def _limit(task: Any, action_repeat: int, max_episode_steps: int | None) -> int | None:
    """The time limit in steps; None for the LQR tasks, which have none."""
    limit = min(task._step_limit / action_repeat, max_episode_steps or np.inf)
    return None if np.isinf(limit) else int(np.ceil(limit))


def _inner_float32(space: spaces.Space) -> spaces.Box:
    """The Box in float32, with no bound rounded to outside of it."""
    assert isinstance(space, spaces.Box)
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    low = np.where(low < space.low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > space.high, np.nextafter(high, np.float32(-np.inf)), high)
    return spaces.Box(low, high, dtype=np.float32)


def _pool(env_id: str) -> PoolTask | None:
    match = _FORM.fullmatch(env_id)
    if match is None:
        return None
    words = f"{match['domain']}_{match['task']}".split("_")
    pool_id = "".join(word[:1].upper() + word[1:] for word in words) + "-v1"
    return PoolTask(pool_id, agrees=env_id in POOL and same_physics())


SUITE = Suite("dm_control", owns=_owns, ids=_ids, make=_make, pool=_pool)
