"""`OfflineDataset`: transitions of an offline data set as equally long arrays, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from .rows import Rows

Array = np.ndarray | Rows

BLOCK = 2**22  # bytes that are looked at at a time
_OVER = 1e-5  # by how much actions may pass 1
_FLAGS = ("terminals", "timeouts")
# Shape in words, numbers of dimensions, dtypes.
_FLOATS = ("(N,)", (1,), (np.float32,))
_OBSERVATIONS = ("(N, *o)", range(2, 6), (np.float32, np.uint8))
_FORMS: dict[str, tuple[str, Sequence[int], tuple[type, ...]]] = {
    "observations": _OBSERVATIONS,
    "next_observations": _OBSERVATIONS,
    "actions": ("(N, d)", (2,), (np.float32,)),
    "terminals": ("(N,)", (1,), (np.bool_,)),
    "timeouts": ("(N,)", (1,), (np.bool_,)),
    "costs": ("(N,) or (N, m)", (1, 2), (np.float32,)),
}
_SCALARS = ("rewards", "terminals", "timeouts", "costs", "constraint_values")


class DatasetError(ValueError):
    """A data set cannot be had or is not as it must be; the message is one sentence that says what to do."""


class Episodes(NamedTuple):
    """One entry per episode: sums of rewards (E,) and costs (E,) or (E, m) or None, both float64, and steps (E,) int64."""

    returns: np.ndarray
    costs: np.ndarray | None
    lengths: np.ndarray


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """N transitions, episode after episode.

    A row that is neither terminal nor timeout is followed by the next step of its episode. Where the last row ends no
    episode, the data were cut there: its ``timeouts`` is set, in a copy.

    :param observations: (N, *o) float32, images may be uint8
    :param actions: (N, d) float32 in [-1, 1]
    :param rewards: (N,) float32
    :param terminals: (N,) bool, the state reached has no future: do not bootstrap
    :param timeouts: (N,) bool, the episode was cut here: bootstrap from ``next_observations``
    :param next_observations: (N, *o) like ``observations``, often `Rows` of them
    :param costs: (N,) or (N, m) float32 >= 0; several are named in ``meta["cost_names"]``
    :param constraint_values: (N,) float32, positive where the constraint is violated (FISOR's h)
    :param meta: source, sha256, format, env_id, reference_min_return, reference_max_return, max_episode_steps,
        cost_names, action_low, action_high (bounds of the environment's actions, where they are not -1 and 1), ...
    :raises DatasetError: naming the source, the array and the first row that is wrong
    """

    observations: Array
    actions: Array
    rewards: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray
    next_observations: Array
    costs: np.ndarray | None = None
    constraint_values: np.ndarray | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = self._arrays()
        self._check_lengths(arrays)
        self._check_forms(arrays)
        self._check_values(arrays)
        if not self.terminals[-1] and not self.timeouts[-1]:
            timeouts = np.array(self.timeouts)
            timeouts[-1] = True
            object.__setattr__(self, "timeouts", timeouts)

    def _arrays(self) -> dict[str, Array]:
        names = ("observations", "actions", *_SCALARS, "next_observations")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _error(self, name: str, complaint: str) -> DatasetError:
        return DatasetError(f"{self.meta.get('source', 'The data set')}: '{name}' {complaint}.")

    def _check_lengths(self, arrays: dict[str, Array]) -> None:
        for name, array in arrays.items():
            if len(array) != len(self.rewards):
                wrong = f"has {len(array)} rows where 'rewards' has {len(self.rewards)}: give one row per transition"
                raise self._error(name, wrong)
        if not len(self.rewards):
            raise self._error("rewards", "has no rows: give at least one transition")

    def _check_forms(self, arrays: dict[str, Array]) -> None:
        for name, array in arrays.items():
            shape, ranks, dtypes = _FORMS.get(name, _FLOATS)
            if array.ndim not in ranks:
                raise self._error(name, f"has the shape {tuple(array.shape)}: it must be {shape}")
            if array.dtype not in dtypes:
                names = " or ".join(np.dtype(dtype).name for dtype in dtypes)
                raise self._error(name, f"is {array.dtype}: cast it to {names}")
        here, there = self.observations, self.next_observations
        if (here.shape, here.dtype) != (there.shape, there.dtype):
            wrong = f"is {there.dtype} {tuple(there.shape)} where 'observations' is {here.dtype} {tuple(here.shape)}"
            raise self._error("next_observations", f"{wrong}: give both in the same form")
        if self.costs is not None and self.costs.ndim == 2 and len(self.meta.get("cost_names", ())) != self.costs.shape[1]:
            raise self._error("costs", f"has {self.costs.shape[1]} columns: name each of them in meta['cost_names']")

    def _check_values(self, arrays: dict[str, Array]) -> None:
        for name, array in arrays.items():
            if array.dtype == np.float32:
                self._refuse(name, array, lambda part: ~np.isfinite(part), "is not finite at row {}: repair or drop it")
        outside = "leaves [-1, 1] at row {}: rescale the actions, or clip them"
        self._refuse("actions", self.actions, lambda part: np.abs(part) > 1 + _OVER, outside)
        if self.costs is not None:
            self._refuse("costs", self.costs, lambda part: part < 0, "is negative at row {}: costs must be 0 or more")
        if not self.terminals.any() and not self.timeouts.any():
            wrong = f"and 'timeouts' end no episode in rows 0 to {len(self) - 1}: mark the last row of each episode"
            raise self._error("terminals", wrong)

    def _refuse(self, name: str, array: Array, wrong: Callable[[np.ndarray], np.ndarray], complaint: str) -> None:
        """Raise for the first row with an element that is wrong."""
        rows = block_rows(array)
        for first in range(0, len(array), rows):
            marks = wrong(np.asarray(array[first : first + rows]))
            if marks.any():
                row = first + int(np.argmax(marks.reshape(len(marks), -1).any(axis=1)))
                raise self._error(name, complaint.format(row))

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def episode_ends(self) -> np.ndarray:
        """(E,) int64, the last row of each episode."""
        return np.flatnonzero(self.terminals | self.timeouts)

    @property
    def episode_starts(self) -> np.ndarray:
        """(E,) int64, the first row of each episode."""
        return np.concatenate([[0], self.episode_ends[:-1] + 1])

    def episodes(self) -> Episodes:
        """Return, cost and length of every episode."""
        starts = self.episode_starts
        costs = None if self.costs is None else np.add.reduceat(self.costs, starts, axis=0, dtype=np.float64)
        returns = np.add.reduceat(self.rewards, starts, dtype=np.float64)
        return Episodes(returns, costs, self.episode_ends + 1 - starts)

    @property
    def unsafe_transitions(self) -> int | None:
        """How many rows have a positive cost or constraint value; None where the data tell neither."""
        if self.costs is None and self.constraint_values is None:
            return None
        unsafe = np.zeros(len(self), bool)
        if self.costs is not None:
            unsafe |= (self.costs > 0).reshape(len(self), -1).any(axis=1)
        if self.constraint_values is not None:
            unsafe |= self.constraint_values > 0
        return int(unsafe.sum())

    def select(self, rows: np.ndarray | slice | Sequence[int]) -> OfflineDataset:
        """A subset, read into memory.

        :param rows: indices, mask or slice; an episode is cut (``timeouts``) where its next row does not follow
        """
        index = np.arange(len(self))[rows]
        parts: dict[str, Any] = {name: np.asarray(array[index]) for name, array in self._arrays().items()}
        follows = np.append(index[1:] == index[:-1] + 1, False)
        parts["timeouts"] = parts["timeouts"] | ~(follows | parts["terminals"])
        return replace(self, **parts)

    def select_episodes(self, numbers: np.ndarray | Sequence[int]) -> OfflineDataset:
        """A subset of whole episodes, in the order of their numbers (0 is the first), read into memory."""
        starts, stops = self.episode_starts, self.episode_ends + 1
        return self.select(np.concatenate([np.arange(starts[number], stops[number]) for number in np.asarray(numbers)]))

    def split(self, shares: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0) -> tuple[OfflineDataset, ...]:
        """Subsets of whole episodes that have none in common, drawn at random: by default to train, validate and test.

        Arguments as of :meth:`split_episodes`.
        """
        return tuple(map(self.select_episodes, self.split_episodes(shares, seed)))

    def split_episodes(self, shares: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0) -> tuple[np.ndarray, ...]:
        """The numbers of the episodes of each subset, ascending.

        :param shares: of the episodes; what is left of 1 is in none of them
        :raises DatasetError: where a share is not above 0, they add up to more than 1, or a part would be empty
        """
        if not all(share > 0.0 for share in shares) or sum(shares) > 1.0 + 1e-9:
            raise self._error("shares", f"are {tuple(shares)}: give numbers above 0 that add up to 1 at most")
        episodes = len(self.episode_ends)
        order = np.random.default_rng(seed).permutation(episodes)
        ends = np.rint(np.cumsum(shares) * episodes).astype(int)
        parts = [np.sort(part) for part in np.split(order, ends)[: len(shares)]]
        if any(not len(part) for part in parts):
            raise self._error("shares", f"{tuple(shares)} of {episodes} episodes leave a part without any: give more episodes")
        return tuple(parts)


def block_rows(array: Any) -> int:
    """How many rows of an array make a block of about four megabytes."""
    return max(1, BLOCK // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))


def as_field(name: str, block: np.ndarray) -> np.ndarray:
    """Rows of a file in the type of a field: flags bool, the rest float32, images uint8; (N, 1) scalars as (N,)."""
    if name in _SCALARS and block.ndim == 2 and block.shape[1] == 1:
        block = block[:, 0]
    if name in _FLAGS:
        return block != 0
    if block.dtype == np.uint8 and name.endswith("observations"):
        return block
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as not finite
        return block.astype(np.float32, copy=False)
