"""A dataset as tensors: what every offline agent reads, checked, and the numbers that some of them take from it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

REQUIRED = ("observations", "actions", "rewards", "next_observations", "terminals")
OPTIONAL = ("timeouts", "costs", "constraint_values")
ACTIONS_OVER = 1e-4  # by how much actions may leave [-1, 1]


class DataError(ValueError):
    """A dataset that an agent cannot learn from; the message is a sentence that says what to do."""


class OfflineData:
    """A dataset as float32 tensors on one device, N rows each; on the CPU they share the memory of its arrays.

    It is made of any object with these attributes, or a mapping: ``observations`` (N, o), ``actions`` (N, d) in [-1, 1],
    ``rewards`` (N,), ``next_observations`` (N, o), ``terminals`` (N,); where there are, ``timeouts`` (N,), ``costs`` (N,)
    or (N, m), ``constraint_values`` (N,), and ``meta``, a mapping. ``tether.envs.datasets`` reads them from files.

    ``cost_columns`` is (N, m), ``costs`` (N,) the sum of its columns; both are None where there are no costs.

    :raises DataError: for what is missing, not as long, not a vector or not finite, naming the array and the row
    """

    def __init__(self, dataset: Any, device: th.device | str = "cpu") -> None:
        get = dataset.get if isinstance(dataset, Mapping) else lambda name: getattr(dataset, name, None)
        missing = [name for name in REQUIRED if get(name) is None]
        if missing:
            raise DataError(f"The dataset lacks {', '.join(missing)}: offline agents read {', '.join(REQUIRED)}.")
        self.meta: dict[str, Any] = {key: value for key, value in (get("meta") or {}).items() if value is not None}
        arrays: dict[str, Any] = {name: get(name) for name in (*REQUIRED, *OPTIONAL) if get(name) is not None}
        length = len(arrays["observations"])
        for name, array in arrays.items():
            if len(array) != length or length == 0:
                raise DataError(f"'{name}' has {len(array)} rows and 'observations' {length}: give equally many, and some.")
        for name in ("observations", "next_observations", "actions"):
            if len(arrays[name].shape) != 2:
                raise DataError(f"'{name}' has the shape {arrays[name].shape}: offline agents take vectors, (N, n).")
        if arrays["next_observations"].shape != arrays["observations"].shape:
            theirs = arrays["next_observations"].shape
            raise DataError(f"'next_observations' has the shape {theirs} and 'observations' {arrays['observations'].shape}.")
        for name in ("rewards", "terminals", "timeouts", "constraint_values"):
            if name in arrays and np.size(arrays[name]) != length:
                raise DataError(f"'{name}' has the shape {arrays[name].shape}: it is one number a row, (N,).")
        tensors: dict[str, th.Tensor] = {name: _tensor(array).to(device) for name, array in arrays.items()}
        for name, values in tensors.items():
            _refuse(name, values, ~th.isfinite(values), "is not finite", "repair the dataset, or leave that episode out")
        outside = tensors["actions"].abs() > 1.0 + ACTIONS_OVER
        _refuse("actions", tensors["actions"], outside, "leaves [-1, 1]", "rescale them, and say the bounds in meta")
        self.observations, self.next_observations = tensors["observations"], tensors["next_observations"]
        self.actions, self.rewards = tensors["actions"], tensors["rewards"].reshape(-1)
        self.terminals = tensors["terminals"].reshape(-1)
        self.timeouts = tensors.get("timeouts", th.zeros_like(self.terminals)).reshape(-1)
        if "costs" in tensors:
            costs = tensors["costs"]
            _refuse("costs", costs, costs < 0.0, "is negative", "costs are 0 or more, such as 1 where it is unsafe")
        columns = tensors.get("costs")
        self.cost_columns = None if columns is None else columns.reshape(length, -1)
        self.costs = None if self.cost_columns is None else self.cost_columns.sum(1)
        signed = tensors.get("constraint_values")
        self.constraint_values = None if signed is None else signed.reshape(-1)

    def __len__(self) -> int:
        """N, the number of transitions."""
        return len(self.rewards)

    @property
    def ends(self) -> th.Tensor:
        """(N,) bool: the last row of its episode."""
        ends = (self.terminals + self.timeouts) > 0
        ends[-1] = True
        return ends

    @property
    def episode_of(self) -> th.Tensor:
        """(N,) number of each row's episode, from 0 on."""
        return self.ends.long().cumsum(0) - self.ends.long()

    @property
    def step_of(self) -> th.Tensor:
        """(N,) number of each row within its episode, from 0 on."""
        rows = th.arange(len(self), device=self.rewards.device)
        return rows - rows[self.ends.roll(1)][self.episode_of]

    def per_episode(self, values: th.Tensor) -> th.Tensor:
        """Sums of ``values`` (N,) over episodes, (episodes,) float64."""
        sums = th.zeros(int(self.ends.sum()), dtype=th.float64, device=values.device)
        return sums.index_add_(0, self.episode_of, values.double())

    def spaces(self) -> tuple[spaces.Box, spaces.Box]:
        """Of observations and actions; ``meta["action_low"]`` and ``meta["action_high"]`` say what +-1 stands for."""
        low, high = (np.asarray(self.meta.get(f"action_{end}", sign), np.float32) for end, sign in (("low", -1), ("high", 1)))
        shape = (self.actions.shape[1],)
        actions = spaces.Box(np.broadcast_to(low, shape).copy(), np.broadcast_to(high, shape).copy(), dtype=np.float32)
        return spaces.Box(-np.inf, np.inf, (self.observations.shape[1],), np.float32), actions

    def safe_costs(self) -> th.Tensor:
        """The costs (N,), for agents that learn from safe and unsafe rows.

        :raises DataError: if there are none, or the rows are of one kind only
        """
        if self.costs is None:
            raise DataError("The dataset has no 'costs': a safe agent needs them, so take data of a task that reports costs.")
        self.refuse_one_class("costs", self.costs > 0)
        return self.costs

    def refuse_one_class(self, name: str, unsafe: th.Tensor) -> None:
        """:raises DataError: if ``unsafe`` (N,) bool, found in the array ``name``, holds for no row or for all of them"""
        count = int(unsafe.sum())
        if count in (0, len(self)):
            kind = "safe" if count == 0 else "unsafe"
            raise DataError(
                f"By '{name}' every one of the {len(self)} rows is {kind}, so there is nothing to tell safe from unsafe by: "
                "mix data of several behaviours, as `tether collect` does."
            )


def _tensor(array: Any) -> th.Tensor:
    array = np.asarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written to
        return th.from_numpy(np.ascontiguousarray(array, np.float32))


def _refuse(name: str, values: th.Tensor, wrong: th.Tensor, complaint: str, advice: str) -> None:
    if bool(wrong.any()):
        row = int(wrong.reshape(len(values), -1).any(1).nonzero()[0])
        raise DataError(f"'{name}' {complaint} in row {row}: {advice}.")


def reward_scale(data: OfflineData) -> float:
    """T_max / (R_max - R_min): the dataset's references in its ``meta``, or what its own episodes show.

    :raises DataError: if all episodes have one return
    """
    returns = data.per_episode(data.rewards)
    low = data.meta.get("reference_min_return", returns.min())
    high = data.meta.get("reference_max_return", returns.max())
    longest = data.meta.get("max_episode_steps", data.per_episode(th.ones_like(data.rewards)).max())
    if not float(high) > float(low):
        raise DataError(f"Every episode of the dataset returns {float(low):.3g}: give reward_scale, the factor of rewards.")
    return float(longest) / (float(high) - float(low))


def cost_threshold(data: OfflineData, cost_limit: float, gamma: float) -> float:
    """The discounted cost of an episode that spends ``cost_limit`` evenly: limit (1 - gamma^T) / ((1 - gamma) T).

    T is the longest episode, of the dataset's ``meta`` or of its rows.
    """
    longest = data.meta.get("max_episode_steps", data.per_episode(th.ones_like(data.rewards)).max())
    return cost_limit * (1.0 - gamma ** float(longest)) / ((1.0 - gamma) * float(longest))
