"""A task that is nothing but a hierarchy: walk down a tree to the leaf whose code is shown."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .suite import Suite, unknown_argument

ID = "tether/Tree-v0"
_DEFAULTS = {"depth": 5, "branching": 3, "features": 32}


class Tree(gym.Env):
    """From the root, choose child after child; the way to the shown leaf is the only right one.

    A node's code is the sum of random directions of itself and its ancestors, halved at every level, so that leaves with
    a long common way look alike. The observation holds the code of the leaf and that of the node one stands on,
    (2 * features,) float32. A right step earns 1 / depth, a wrong one ends the episode: the best return is 1, and that of
    random actions (1 - b^-depth) / ((b - 1) depth), 0.10 with the defaults.

    :param depth: levels below the root
    :param branching: b, children of a node and number of actions
    :param features: length of a code
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, depth: int = 5, branching: int = 3, features: int = 32, render_mode: str | None = None) -> None:
        self.depth, self.branching, self.render_mode = depth, branching, render_mode
        rng = np.random.default_rng(0)  # the tree is the same in every environment
        self.codes = [np.zeros((1, features))]
        for level in range(depth):
            directions = rng.normal(size=(branching ** (level + 1), features)) * 0.5**level
            self.codes.append(np.repeat(self.codes[-1], branching, axis=0) + directions)
        largest = max(float(np.abs(codes).max()) for codes in self.codes)
        self.observation_space = spaces.Box(-largest, largest, (2 * features,), np.float32)
        self.action_space = spaces.Discrete(branching)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.leaf, self.node, self.level = int(self.np_random.integers(self.branching**self.depth)), 0, 0
        return self._look(), {}

    def _look(self) -> np.ndarray:
        return np.concatenate([self.codes[-1][self.leaf], self.codes[self.level][self.node]]).astype(np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.node, self.level = self.node * self.branching + int(action), self.level + 1
        right = self.node == self.leaf // self.branching ** (self.depth - self.level)
        return self._look(), right / self.depth, not right or self.level == self.depth, False, {}


def _make(env_id: str, flatten: bool, render_mode: str | None, **kwargs: Any) -> gym.Env:
    """Make the tree; arguments are those of `Tree`, and ``max_episode_steps``."""
    limit = kwargs.pop("max_episode_steps", None)
    for name in kwargs:
        if name not in _DEFAULTS:
            raise unknown_argument(env_id, name, _DEFAULTS)
    env: gym.Env = Tree(render_mode=render_mode, **kwargs)
    env.spec = gym.envs.registration.EnvSpec(env_id, max_episode_steps=limit)
    return gym.wrappers.TimeLimit(env, limit) if limit else env


SUITE = Suite("tether", owns=lambda env_id: env_id == ID, ids=lambda: [ID], make=_make)
