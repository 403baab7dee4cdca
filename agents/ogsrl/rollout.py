"""Imagined episodes, and the steps of them that happened."""

from __future__ import annotations

from typing import NamedTuple

import torch as th


class Rollout(NamedTuple):
    """Imagined episodes of T steps, E for each of S seeds; K signals: the reward, the costs, ghat.

    :param observations: (T + 1, S, E, o), scaled
    :param actions: (T, S, E, d), scaled
    :param signals: (T, S, E, K)
    :param alive: (T, S, E) bool, the episode has not ended before this step
    :param ends: (T, S, E) bool, it ends with this step
    """

    observations: th.Tensor
    actions: th.Tensor
    signals: th.Tensor
    alive: th.Tensor
    ends: th.Tensor


class Steps(NamedTuple):
    """The alive steps of a rollout, B of them and, where the seeds have not equally many, some that weigh nothing.

    :param observations: (S, B, o), scaled
    :param actions: (S, B, d), scaled
    :param weights: (S, K, B), what ratios are multiplied with to give the K surrogates
    :param returns: (S, K, B), what the values should be
    :param alive: (S, B), 1 over the number of steps where the step is one, 0 where it is not
    """

    observations: th.Tensor
    actions: th.Tensor
    weights: th.Tensor
    returns: th.Tensor
    alive: th.Tensor


def by_seed(values: th.Tensor) -> th.Tensor:
    """(T, S, E, n) as (S, T E, n)."""
    return values.movedim(1, 0).flatten(1, 2)
