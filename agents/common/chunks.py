"""Chunks of H consecutive actions: cut out of a dataset, gathered step by step, and kept in a ring.

A chunk begins at every transition i and is valid up to the end of its episode:
    actions     a_i, ..., a_{i+H-1}                             (H d,), action by action
    valid       1 for actions before the episode's end or at it (H,)
    returns     sum_k gamma^k r_{i+k}, up to a terminal step    ()
    going_on    0 where the goal was reached in it, 1 otherwise ()
    next_observations   the one after its last step             (o,)
Values are learnt where all of it is valid (Li et al. 2025, arXiv 2507.07969).
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch as th

from .offline_data import OfflineData

ACTION_EDGE = 1e-5  # a dataset's actions are clipped to 1 - this, as in the authors' loader

Chunks = dict[str, th.Tensor]


def chunks_of(data: OfflineData, horizon: int, gamma: float) -> Chunks:
    """The chunks that begin at each of the N transitions of a dataset, tensors of N rows.

    A row follows the one before it in the same episode if it begins where that one ended and that one is no timeout: in
    play data an episode goes on after its goal, which is terminal for the values only. What a chunk collects after a
    terminal step does not count (the authors' code counts it: its episodes end there online, and so they should here).
    """
    n = len(data)
    follows = (data.next_observations[:-1] == data.observations[1:]).all(1) & (data.timeouts[:-1] == 0)
    follows = th.cat([follows.float(), follows.new_zeros(1).float()])
    rows = th.arange(n, device=follows.device)
    valid, alive = th.ones_like(data.rewards), th.ones_like(data.rewards)
    last, returns = rows, th.zeros_like(data.rewards)
    valids, actions = [], []
    for k in range(horizon):
        at = (rows + k).clamp(max=n - 1)
        if k:
            valid = valid * follows[(rows + k - 1).clamp(max=n - 1)]
        valids.append(valid)
        actions.append(data.actions[at])
        returns = returns + gamma**k * alive * valid * data.rewards[at]
        alive = alive * (1.0 - valid * data.terminals[at])
        last = th.where(valid > 0, at, last)
    return {
        "observations": data.observations,
        "actions": th.cat(actions, dim=1).clamp(ACTION_EDGE - 1.0, 1.0 - ACTION_EDGE),
        "returns": returns,
        "going_on": alive,
        "valid": th.stack(valids, dim=1),
        "next_observations": data.next_observations[last],
    }


class Transition(NamedTuple):
    """One step: observation (o,), action (d,) in [-1, 1], reward, whether it was terminal, next observation (o,)."""

    observation: np.ndarray
    action: np.ndarray
    reward: float
    terminal: bool
    next_observation: np.ndarray


class ChunkMemory:
    """A ring of chunks, in tensors on the training device, and the latest steps of every environment.

    :param rows: chunks that it holds
    :param obs_dim: o
    :param action_dim: d
    :param horizon: H
    :param gamma: discount of a single step
    :param n_envs: environments that :meth:`add` takes the steps of
    """

    def __init__(
        self, rows: int, obs_dim: int, action_dim: int, horizon: int, gamma: float, n_envs: int, device: th.device
    ) -> None:
        self.buffer_size, self.horizon, self.gamma = rows, horizon, gamma
        self.pos, self.full = 0, False
        shapes = {
            "observations": (obs_dim,), "actions": (horizon * action_dim,), "returns": (), "going_on": (),
            "valid": (horizon,), "next_observations": (obs_dim,),
        }  # fmt: skip
        self.arrays = {name: th.zeros(rows, *shape, device=device) for name, shape in shapes.items()}
        self._filled = th.zeros((), device=device, dtype=th.float64)  # a tensor, which a captured update reads
        self._windows: list[deque[Transition]] = [deque() for _ in range(n_envs)]

    def __len__(self) -> int:
        return self.buffer_size if self.full else self.pos

    def fill(self, chunks: Chunks) -> None:
        """Take in the chunks of a dataset, not more than there is room for."""
        n = len(chunks["returns"])
        for name, values in chunks.items():
            self.arrays[name][:n] = values
        self._move(n)

    def take_over(self, former: ChunkMemory) -> None:
        """Take in all that a smaller memory holds, which has never been full."""
        self.fill({name: values[: len(former)] for name, values in former.arrays.items()})
        self._windows = former._windows

    def note_size(self) -> None:
        """Let :meth:`draw` know of what was added; not inside a captured update."""
        self._filled.fill_(len(self))

    def draw(self, seeds: int, size: int) -> Chunks:
        """``size`` chunks for each seed, uniformly and with replacement, (S, size, ...) each."""
        uniform = th.rand(seeds * size, dtype=th.float64, device=self._filled.device)
        rows = (uniform * self._filled).long()
        return {name: v.index_select(0, rows).view(seeds, size, *v.shape[1:]) for name, v in self.arrays.items()}

    def add(self, env: int, step: Transition, done: bool) -> None:
        """Take in a step of an environment: it completes the chunk that began H - 1 steps earlier.

        :param done: the episode ends with it, so that the later chunks stay short
        """
        window = self._windows[env]
        window.append(step)
        while len(window) == self.horizon or (done and window):
            self._store(list(window))
            window.popleft()

    def _store(self, steps: list[Transition]) -> None:
        missing = self.horizon - len(steps)
        actions = np.concatenate([step.action for step in steps] + [steps[-1].action] * missing)
        chunk = {
            "observations": steps[0].observation,
            "actions": actions,
            "returns": sum(self.gamma**k * step.reward for k, step in enumerate(steps)),
            "going_on": float(not steps[-1].terminal),
            "valid": np.arange(self.horizon) < len(steps),
            "next_observations": steps[-1].next_observation,
        }
        for name, values in self.arrays.items():
            values[self.pos] = th.as_tensor(chunk[name], dtype=th.float32)
        self._move(1)

    def _move(self, rows: int) -> None:
        self.full |= self.pos + rows >= self.buffer_size
        self.pos = (self.pos + rows) % self.buffer_size

    def forget_unfinished(self) -> None:
        """Leave out the chunks that have begun: their environments begin new episodes."""
        for window in self._windows:
            window.clear()

    def unfinished(self) -> list[list[tuple]]:
        """The steps of the chunks that have begun, of every environment, for a checkpoint."""
        return [[tuple(step) for step in window] for window in self._windows]

    def restore_unfinished(self, windows: list[list[tuple]]) -> None:
        """Put back what :meth:`unfinished` gave."""
        self._windows = [deque(Transition(*step) for step in window) for window in windows]
