"""A replay memory of sequences: rings of rows, one for each environment, in tensors.

A row is what was seen and how it came about: o_t, the action a_{t-1} that led to it, the reward r_t on arriving there,
whether an episode begins with it, whether it is terminal. An episode of n steps has n + 1 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer

from .networks import parts_of, seen

Batch = dict[str, Any]
IN_NUMPY = {th.uint8: np.uint8, th.float32: np.float32, th.float16: np.float16, th.bool: np.bool_, th.int32: np.int32}


def _zeros(shape: tuple[int, ...], dtype: th.dtype, device: th.device) -> th.Tensor:
    """On a CPU NumPy's, which take no memory before they are written."""
    if device.type == "cpu":
        return th.from_numpy(np.zeros(shape, IN_NUMPY[dtype]))
    return th.zeros(shape, device=device, dtype=dtype)


class SequenceReplay(BaseBuffer):
    """Sequences of consecutive rows, which may cross from one episode into the next: a ring is drawn, then one of it.

    :param buffer_size: rows of all environments together; a row of 64 x 64 RGB has 12 kB and 1,280 numbers of an embedding.
        On a CPU memory is taken as the rows are written, on a GPU at once
    :param observation_space: as the agent's
    :param action_space: as the agent's
    :param device: of the drawn batches, and of the memory itself
    :param n_envs: number of rings
    :param optimize_memory_usage: not used: every observation is stored once in any case
    :param action_dim: numbers of an action as the world model takes it
    :param embedding_dim: width of the frozen embeddings that are kept beside the rows, in float16; 0 for none
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        action_dim: int = 1,
        embedding_dim: int = 0,
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device, n_envs)
        self.buffer_size = max(1, buffer_size // n_envs)
        self.observations = {
            name: self._empty(part.shape, th.uint8 if part.dtype == np.uint8 else th.float32)
            for name, part in parts_of(observation_space).items()
        }
        self.actions = self._empty((action_dim,))
        self.rewards, self.terminals, self.first = self._empty(), self._empty(), self._empty(dtype=th.bool)
        self.ages = self._empty(dtype=th.int32)  # rows since the episode's first
        self.known = self._empty(dtype=th.bool)  # whether a row has its embedding
        self.totals = np.zeros(n_envs, np.int64)  # rows ever written
        self.looked = np.zeros(n_envs, np.int64)  # of these, how many :meth:`waiting` has given or passed over
        self.passed = False  # whether it passed over some
        self.renew_embeddings(embedding_dim)
        self.begins = np.ones(n_envs, bool)  # whether the next row is an episode's first

    def _empty(self, shape: tuple[int, ...] = (), dtype: th.dtype = th.float32) -> th.Tensor:
        return _zeros((self.buffer_size, self.n_envs, *shape), dtype, self.device)

    # ------------------------------------------------------------------ writing

    def add(self, obs: Any, next_obs: Any, action: np.ndarray, reward: Any, done: Any, infos: list[dict[str, Any]]) -> None:
        """Take in a step of every environment; arguments as in SB3's replay buffers.

        :param action: (n_envs, action_dim), as the world model takes it
        """
        before, after = seen(obs, self.observation_space), seen(next_obs, self.observation_space)
        for env in np.flatnonzero(self.begins).tolist():
            self._write(env, {name: value[env] for name, value in before.items()}, None, 0.0, False)
        for env in range(self.n_envs):
            terminal = bool(done[env]) and not infos[env].get("TimeLimit.truncated", False)
            row = {name: value[env] for name, value in after.items()}
            self._write(env, row, action[env], float(reward[env]), terminal)
        self.begins = np.asarray(done, bool).copy()

    def _write(self, env: int, parts: dict[str, Any], action: Any, reward: float, terminal: bool) -> None:
        row, first = int(self.totals[env] % self.buffer_size), action is None
        for name, value in parts.items():
            self.observations[name][row, env] = th.as_tensor(value)
        self.actions[row, env] = 0.0 if first else th.as_tensor(action, dtype=th.float32)
        self.rewards[row, env], self.terminals[row, env], self.first[row, env] = reward, float(terminal), first
        self.ages[row, env] = 0 if first else self.ages[row - 1, env] + 1
        self.known[row, env] = False
        self.totals[env] += 1
        self.pos, self.full = int(self.totals.max() % self.buffer_size), bool((self.totals >= self.buffer_size).any())

    def truncate_last_trajectory(self) -> None:
        """The next rows begin new episodes."""
        self.begins[:] = True

    def reset(self) -> None:
        """Forget everything."""
        self.pos, self.full = 0, False
        self.totals, self.looked = np.zeros(self.n_envs, np.int64), np.zeros(self.n_envs, np.int64)
        self.begins = np.ones(self.n_envs, bool)

    def move_to(self, device: th.device) -> None:
        """Keep the rows there."""
        self.device = device
        self.observations = {name: part.to(device) for name, part in self.observations.items()}
        for name in ("actions", "rewards", "terminals", "first", "ages", "embeddings", "known"):
            setattr(self, name, getattr(self, name).to(device))

    def renew_embeddings(self, dim: int) -> None:
        """Room for embeddings of this width, 0 for none, that are all still to come."""
        size = self.buffer_size if dim else 0
        self.embeddings = _zeros((size, self.n_envs, dim), th.float16, self.device)
        self.known[:], self.looked[:], self.passed = False, 0, False

    # ------------------------------------------------------------------ reading

    def size(self) -> int:
        """Rows of the longest ring."""
        return int(min(self.totals.max(), self.buffer_size))

    def lengths(self) -> np.ndarray:
        """Rows of each ring, (n_envs,)."""
        return np.minimum(self.totals, self.buffer_size)

    def can_draw(self, length: int) -> bool:
        """Whether every ring holds a sequence of this length."""
        return bool((self.lengths() >= length).all())

    def draw(self, batch_size: int, length: int) -> Batch:
        """``batch_size`` sequences, time-major (length, batch_size, ...) each.

        :return: observations by name, actions, rewards, terminals, first, and where embeddings are kept these, and which are
            ``known``
        """
        env = th.randint(self.n_envs, (batch_size,))
        room = th.as_tensor(self.lengths() - length + 1)[env]
        offset = (th.rand(batch_size, dtype=th.float64) * room).long()
        return self.sequences(env, self._oldest()[env] + offset, length)

    def newest(self, steps: int, length: int) -> Batch:
        """The latest rows of all rings, about ``steps``, cut into sequences: at least one of each ring."""
        of_each = min(max(1, steps // self.n_envs // length), int(self.lengths().min()) // length)
        env = th.arange(self.n_envs).repeat_interleave(of_each)
        back = length * (1 + th.arange(of_each)).repeat(self.n_envs)
        return self.sequences(env, th.as_tensor(self.totals)[env] - back, length)

    def _oldest(self) -> th.Tensor:
        """The number of the first row that is still there, of every ring."""
        return th.as_tensor(self.totals - self.lengths())

    def sequences(self, env: th.Tensor, start: th.Tensor, length: int) -> Batch:
        """The rows from number ``start`` (N,) of rings ``env`` (N,) on."""
        rows = (start + th.arange(length).unsqueeze(1)) % self.buffer_size
        flat = (rows * self.n_envs + env).flatten().to(self.device, non_blocking=True)
        batch: Batch = {
            "observations": {name: self._take(value, flat, length) for name, value in self.observations.items()},
            "actions": self._take(self.actions, flat, length),
            "rewards": self._take(self.rewards, flat, length),
            "terminals": self._take(self.terminals, flat, length),
            "first": self._take(self.first, flat, length),
        }
        if len(self.embeddings):
            batch["embeddings"] = self._take(self.embeddings, flat, length)
            batch["known"] = self._take(self.known, flat, length)
        return batch

    def _take(self, values: th.Tensor, flat: th.Tensor, length: int) -> th.Tensor:
        return values.flatten(0, 1).index_select(0, flat).view(length, -1, *values.shape[2:])

    def windows(self, env: th.Tensor, number: th.Tensor, width: int, names: list[str]) -> dict[str, th.Tensor]:
        """Some parts of the ``width`` rows up to row ``number`` (N,) of rings ``env`` (N,), (N, width, ...) by name.

        Before an episode's first row, or the first that is still there, stands that row again.
        """
        before = (number - self._oldest()[env]).to(self.device)
        number, env = number.to(self.device), env.to(self.device)
        age = self.ages[number % self.buffer_size, env].long().minimum(before)
        back = th.arange(width - 1, -1, -1, device=self.device).minimum(age.unsqueeze(1))
        rows = (number.unsqueeze(1) - back) % self.buffer_size
        return {name: self.observations[name][rows, env.unsqueeze(1)] for name in names}

    def waiting(self, every: int = 1) -> tuple[th.Tensor, th.Tensor]:
        """Rings and numbers (N,) of the rows that came since the last call and should get their embeddings.

        :param every: only one row in so many; the next call with 1 gives the others too
        """
        again = every == 1 and self.passed
        if again:
            self.looked[:] = 0
        begin = np.maximum(self.looked, self.totals - self.lengths())
        numbers = [np.arange(a, b) for a, b in zip(begin, self.totals, strict=True)]
        env = th.arange(self.n_envs).repeat_interleave(th.tensor([len(of) for of in numbers]))
        number = th.as_tensor(np.concatenate(numbers))
        self.looked = self.totals.copy()
        wanted = number % every == 0
        if again:
            rows = (number % self.buffer_size).to(self.device), env.to(self.device)
            wanted &= ~self.known[rows].cpu()
        self.passed = every > 1
        return env[wanted], number[wanted]

    def set_embeddings(self, env: th.Tensor, number: th.Tensor, embeddings: th.Tensor) -> None:
        """Keep the embeddings (N, D) of rows."""
        rows = (number % self.buffer_size).to(self.device), env.to(self.device)
        self.embeddings[rows], self.known[rows] = embeddings.half(), True

    def sample(self, batch_size: int, env: Any = None) -> Any:
        """Refused: sequences are drawn with :meth:`draw`."""
        raise ValueError("A SequenceReplay gives sequences: draw(batch_size, length).")

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        return self.sample(len(batch_inds))
