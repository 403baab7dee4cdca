"""robomimic's tasks of robosuite: a Panda lifts a cube, places a can, puts a square nut over its peg, hangs up a tool."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from .suite import EnvError, Suite, installed

# Steps of an episode are those of rollouts in robomimic, but for the can those of QC's offline-to-online runs.
STEPS = {"robomimic/lift-v0": 400, "robomimic/can-v0": 300, "robomimic/square-v0": 400, "robomimic/tool_hang-v0": 700}
NAMES = dict(zip(STEPS, ("Lift", "PickPlaceCan", "NutAssemblySquare", "ToolHang"), strict=True))  # robosuite's
LOW_DIM = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")

# robosuite's own controller of a Panda is that of `env_args` in robomimic's files of version 1.5, in other words: the world's
# frame is parallel to that of the robot's base, and `lite_physics` gives the same numbers without it and with it.
_ROBOMIMIC = {"robots": "Panda", "control_freq": 20, "reward_shaping": False}
_LOW_DIM_ONLY = {
    "use_object_obs": True, "use_camera_obs": False, "has_renderer": False, "has_offscreen_renderer": False,
    "renderer": "mujoco", "ignore_done": True, "hard_reset": True,
}  # fmt: skip

_MODULES = ("robosuite", "numba", "termcolor", "cv2")
_VERSION = "1.5.2"
_INSTALL = 'pip install "tether-rl[robosuite]"', f"pip install --no-deps robosuite=={_VERSION}"


class RobosuiteTask(gym.Env):
    """One task of robosuite 1.5.2, seen and steered as in robomimic's low-dimensional data.

    Observations are position (3,) and quaternion (4,) of the hand, the two fingers (2,), and what robosuite tells of the
    objects: (10,) for the cube, (14,) for the can and the nut, (44,) for the tool. Actions (7,) in [-1, 1] move the hand by
    up to 5 cm, turn it by up to 0.5 rad, and close the gripper where the last one is positive. The reward is 1.0 at
    success, which ends the episode with ``info["success"]``, and 0.0 before. An episode follows from its seed and its
    actions.

    :param name: robosuite's own
    :param render_mode: None or ``rgb_array``
    :param step_penalty: lower every reward by 1: -1.0 until success, whose reward is then 0.0
    :param kwargs: arguments of ``robosuite.make``, in the place of robomimic's
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, name: str, render_mode: str | None = None, step_penalty: bool = False, **kwargs: Any) -> None:
        self.render_mode, self.step_penalty = render_mode, step_penalty
        self._renderer: Any = None
        self.task = _imported().make(name, **{**_ROBOMIMIC, **kwargs, **_LOW_DIM_ONLY}, seed=0)
        low, high = self.task.action_spec
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self.observation_space = spaces.Box(-np.inf, np.inf, self._start(0).shape, np.float32)

    def _start(self, episode: int) -> np.ndarray:
        """Begin the episode of a number, which with the actions says all that happens in it."""
        self.episode, self.actions = episode, list[np.ndarray]()
        self._close_renderer()  # its model is made anew
        # robosuite's parts keep this generator itself, so that another one in its place would not reach them.
        self.task.rng.bit_generator.state = np.random.default_rng(episode).bit_generator.state
        return _joined(self.task.reset())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._start(int(self.np_random.integers(2**32))), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(np.array(action))
        observation, reward, _, info = self.task.step(action)
        success = bool(self.task._check_success())
        return _joined(observation), float(reward) - self.step_penalty, success, False, {**info, "success": success}

    def render(self) -> np.ndarray | None:
        """A picture (256, 256, 3) uint8 of the camera in front of the robot."""
        if self.render_mode != "rgb_array":
            return None
        import mujoco

        model, data = self.task.sim.model._model, self.task.sim.data._data
        if self._renderer is None:
            self._renderer = mujoco.Renderer(model, 256, 256)
        visible = mujoco.MjvOption()
        visible.geomgroup[0] = 0  # bodies as collisions see them
        self._renderer.update_scene(data, "agentview", visible)
        return self._renderer.render()

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def close(self) -> None:
        """Free the physics; may be called twice."""
        self._close_renderer()
        self.task.close()

    def resumable_state(self) -> dict[str, Any]:
        """What brings another `RobosuiteTask` to this point: the generator, and the episode's number and actions."""
        actions = np.stack(self.actions) if self.actions else np.zeros((0, *(self.action_space.shape or ())))
        return {"generator": self.np_random.bit_generator.state, "episode": self.episode, "actions": actions}

    def resume_from(self, state: dict[str, Any]) -> None:
        """Live through the episode of a state again."""
        self.np_random.bit_generator.state = state["generator"]
        self._start(state["episode"])
        for action in state["actions"]:
            self.step(action)


def _joined(observation: Mapping[str, Any]) -> np.ndarray:
    """robosuite's observation as robomimic's array (o,); its ``object`` is called ``object-state`` there."""
    parts = [observation["object-state" if key == "object" else key] for key in LOW_DIM]
    return np.concatenate(parts).astype(np.float32)


def _imported() -> Any:
    """robosuite, without its advice on other robots, and without the graphics library that it chooses for the process."""
    logging.getLogger("robosuite_logs").addFilter(_is_error)
    graphics = os.environ.get("MUJOCO_GL")
    import robosuite

    if graphics is not None:
        os.environ["MUJOCO_GL"] = graphics
    return robosuite


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _ids() -> list[str]:
    return list(STEPS) if installed(*_MODULES) else []


def _make(
    env_id: str, flatten: bool, render_mode: str | None, *, max_episode_steps: int | None = None, **kwargs: Any
) -> gym.Env:
    """Make a task; ``max_episode_steps`` is 300 to 700 by default, as `STEPS` has it."""
    if not installed(*_MODULES):
        raise EnvError(f"{env_id} needs two lines: type '{_INSTALL[0]}', and then '{_INSTALL[1]}'.")
    if env_id not in STEPS:
        raise gym.error.NameNotFound(env_id)
    if render_mode not in (None, "rgb_array"):
        raise EnvError(f"{env_id} has no render_mode '{render_mode}': use 'rgb_array'.")
    if _imported().__version__ != _VERSION:
        raise EnvError(f"{env_id} is not known to be the same in robosuite {_imported().__version__}: type '{_INSTALL[1]}'.")
    env = RobosuiteTask(NAMES[env_id], render_mode, **kwargs)
    limit = max_episode_steps or STEPS[env_id]
    env.spec = EnvSpec(env_id, max_episode_steps=limit)
    return gym.wrappers.TimeLimit(env, limit)


SUITE = Suite("robosuite", owns=lambda env_id: env_id.startswith("robomimic/"), ids=_ids, make=_make)
