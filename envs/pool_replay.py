"""How an EnvPool environment, whose state cannot be read, is brought back to where it was: by living through it again.

An episode follows from the seed, from how many episodes came before it, and from its actions. That this is exact is
tested for every suite that EnvPool serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class EpisodeLog:
    """The resets so far of each environment of a pool, and the actions of the episodes under way.

    :param n_envs: number of environments
    """

    def __init__(self, n_envs: int) -> None:
        self.n_envs = n_envs
        self.begin([])

    def begin(self, seeds: Sequence[int]) -> None:
        """The pool was built, with these seeds."""
        self.seeds = list(seeds)
        self.resets = np.zeros(self.n_envs, np.int64)
        self.actions: list[np.ndarray] = []  # of all environments, since the longest episode under way began
        self.began = np.zeros(self.n_envs, np.int64)  # where in `actions` each one's episode began

    def reset(self, ids: np.ndarray) -> None:
        """These environments were reset."""
        self.resets[ids] += 1
        self.began[ids] = len(self.actions)
        past = int(self.began.min())
        if past:
            del self.actions[:past]
            self.began -= past

    def act(self, actions: np.ndarray) -> None:
        """All environments were given these actions, (n_envs, *act)."""
        self.actions.append(actions.copy())

    def state(self) -> dict[str, Any]:
        """Seeds, resets and actions, as plain data."""
        actions = np.stack(self.actions) if self.actions else np.zeros((0, self.n_envs), np.int64)
        return {"seeds": self.seeds, "resets": self.resets.copy(), "began": self.began.copy(), "actions": actions}

    def replay(
        self,
        state: dict[str, Any],
        reset: Callable[[np.ndarray], np.ndarray],
        step: Callable[[np.ndarray, np.ndarray], None],
    ) -> None:
        """Live through a state again; the pool must have been built with its seeds, and :meth:`begin` called.

        :param reset: resets the environments of the ids (n,) int32
        :param step: gives the environments of the ids their actions
        """
        resets, began, actions = state["resets"], state["began"], state["actions"]
        for past in range(int(resets.max())):
            reset(np.flatnonzero(resets > past).astype(np.int32))
        for t, joint in enumerate(actions):
            ids = np.flatnonzero(began <= t).astype(np.int32)
            step(ids, np.ascontiguousarray(joint[ids]))
        self.resets, self.began, self.actions = resets.copy(), began.copy(), list(actions)
