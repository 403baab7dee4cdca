"""The world that OGSRL imagines in: recorded transitions, and a guardian that says what lies outside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch as th

from ..common.guardian import KernelGuardian, scott
from ..common.min_max import MinMax
from ..common.nearest_model import NearestModel
from ..common.offline_data import OfflineData
from ..common.sublevel_set import SublevelSet

if TYPE_CHECKING:
    from .ogsrl import OGSRL

FROZEN_REWARD = -25.0  # of every step from the first one outside on, with mode="absorb"


class World:
    """The training data as a world: guardian and recorded transitions, in the units of the agent's networks.

    :param agent: whose settings it follows
    :param pairs: (N, o + d) recorded (s, a)
    """

    def __init__(self, agent: OGSRL, data: OfflineData, pairs: th.Tensor, scale: MinMax) -> None:
        self.scale, self.absorbs = scale, agent.mode == "absorb"
        self.guardian: KernelGuardian | SublevelSet | None = None
        if agent.guarded:
            if agent.guardian == "kernel":
                self.guardian = KernelGuardian.fit(pairs, agent.alpha, agent.bandwidth)
            else:
                self.guardian = SublevelSet.fit(pairs, agent.alpha, agent.degree)
        scaled = scale.scaled(pairs)
        bandwidth = agent.bandwidth or scott(*pairs.shape)
        self.model = NearestModel(scaled, bandwidth if agent.dynamics == "density" else None)
        costs = [data.cost_columns] if agent.constrained and data.cost_columns is not None else []
        following = th.cat([data.next_observations, data.actions], 1)
        self.following = scale.scaled(following)[:, : data.observations.shape[1]]
        self.signals = th.cat([data.rewards.unsqueeze(1), *costs], 1)
        # In the released code a pair is also outside where the transition that answers is.
        self.own_label = self.guardian.outside(pairs) if self.guardian is not None and self.absorbs else None
        self.terminals = data.terminals > 0.0
        self.frozen = th.tensor([FROZEN_REWARD] + [1.0] * len(agent.constraint_names), device=pairs.device)

    def step(
        self, states: th.Tensor, actions: th.Tensor, going: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """What follows (S, E, o) and (S, E, d), scaled, in the episodes that are going on (S, E); 0 in the others.

        Actions are clipped to the environment's bounds first. The authors do not clip them, so that what they imagine is
        not what would be done.

        :return: next states, signals (S, E, K), whether the pair lies outside (S, E), whether the episode ends (S, E)
        """
        pairs = self.scale.raw(th.cat([states, actions], 2)[going])
        pairs[:, states.shape[2] :].clamp_(-1.0, 1.0)  # as the policy's actions are where it acts
        rows = self.model.rows(self.scale.scaled(pairs))
        signals, outside = self.signals[rows], th.zeros(len(pairs), dtype=th.bool, device=pairs.device)
        if self.guardian is not None:
            outside = self.guardian.outside(pairs)
            if self.own_label is not None:
                outside = outside | self.own_label[rows]
            else:
                signals = th.cat([signals, outside.float().unsqueeze(1)], 1)
        parts = (self.following[rows], signals, outside, self.terminals[rows])
        following, values, out, ends = (_placed(part, going) for part in parts)
        return following, values, out, ends


def _placed(values: th.Tensor, going: th.Tensor) -> th.Tensor:
    """(n, ...) values in the n places where (S, E) ``going`` holds, 0 elsewhere."""
    places = values.new_zeros(*going.shape, *values.shape[1:])
    places[going] = values
    return places
