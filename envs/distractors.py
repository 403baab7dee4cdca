"""Visual distractors: moving textures in the place of the background, and colours that drift, made from a seed alone.

What Distracting Control does with films and cameras is here done with sums of travelling waves, so that nothing has to be
downloaded.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

WAVES = 8
CYCLES = (1.0, 5.0)  # waves across the picture
SPEED = 0.5  # radians a step, at most
COLOUR = 0.4  # how far the colours of what is not background drift
PLANE, GEOM = 0, 5  # MuJoCo's mjGEOM_PLANE and mjOBJ_GEOM


class MovingTexture:
    """A picture (size, size, 3) that moves: for each channel a sum of plane waves, each with its own way and speed.

    :param size: pixels of a side
    :param rng: decides which waves
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        angle = rng.uniform(0.0, 2.0 * np.pi, WAVES)
        number = 2.0 * np.pi * rng.uniform(*CYCLES, WAVES) / size
        along = np.arange(size)
        x, y = (part[:, None] * along for part in (number * np.cos(angle), number * np.sin(angle)))
        self.phases = (y[:, :, None] + x[:, None, :]).reshape(WAVES, -1).astype(np.float32)
        self.starts, self.speeds = rng.uniform(0.0, 2.0 * np.pi, WAVES), rng.uniform(-SPEED, SPEED, WAVES)
        colours = rng.normal(size=(WAVES, 3))
        self.colours = (110.0 * colours / np.abs(colours).sum(0)).astype(np.float32)
        self.size = size

    def picture(self, step: int) -> np.ndarray:
        """At a step of the episode, uint8."""
        angles = (self.starts + self.speeds * step).astype(np.float32)
        waves = np.sin(self.phases + angles[:, None])
        return (127.0 + waves.T @ self.colours).astype(np.uint8).reshape(self.size, self.size, 3)


class DistractedPixels(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Pictures of a dm_control task in which sky and floor are a moving texture, and the colours of all else drift.

    Each episode has another texture; both follow from the seed of ``reset``. The task and its rewards are as without.

    :param env: whose observations are pictures of its physics, (size, size, 3) uint8
    :param camera_id: of these pictures
    :param strength: in (0, 1]: share of the texture in the background, and of the drift of the colours
    """

    def __init__(self, env: gym.Env, camera_id: int, strength: float) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, camera_id=camera_id, strength=strength)
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Box)
        self.size, self.camera_id, self.strength = env.observation_space.shape[0], camera_id, strength
        self._physics = env.unwrapped._env.physics  # type: ignore[attr-defined]
        self._planes = np.flatnonzero(self._physics.model.geom_type == PLANE)
        self.rng = np.random.default_rng()
        self._begin()

    def _begin(self) -> None:
        self.texture = MovingTexture(self.size, self.rng)
        self.tints = self.rng.uniform(0.0, 2.0 * np.pi, 3), self.rng.uniform(0.01, 0.1, 3)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self._begin()
        picture, info = self.env.reset(seed=seed, options=options)
        return self.distracted(picture), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        picture, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        return self.distracted(picture), float(reward), terminated, truncated, info

    def background(self) -> np.ndarray:
        """Where there is nothing, or a plane, (size, size) bool."""
        kinds = self._physics.render(self.size, self.size, camera_id=self.camera_id, segmentation=True)
        number, kind = kinds[..., 0], kinds[..., 1]
        return (kind < 0) | ((kind == GEOM) & np.isin(number, self._planes))

    def distracted(self, picture: np.ndarray) -> np.ndarray:
        """The picture with its background and colours of this step."""
        start, speed = self.tints
        tint = 1.0 + COLOUR * self.strength * np.sin(start + speed * self.steps)
        behind = (1.0 - self.strength) * picture + self.strength * self.texture.picture(self.steps)
        before = np.minimum(picture * tint, 255.0)
        return np.where(self.background()[..., None], behind, before).astype(np.uint8)
