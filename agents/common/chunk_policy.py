"""Policies that choose H actions at once and play them one after the other, and the critics of such chunks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule

from .batched import BatchedValues, copy_of, xavier_uniform
from .gelu import GELU
from .offline_policy import OfflinePolicy


class Plan(NamedTuple):
    """What is left to do: chunks (n, H, d) in [-1, 1] of n environments, and how many of their actions are played (n,)."""

    actions: np.ndarray
    played: np.ndarray


def with_horizon(policy_kwargs: dict[str, Any] | None, horizon: int) -> dict[str, Any]:
    """An agent's ``policy_kwargs`` with its horizon.

    :raises ValueError: if they have one themselves
    """
    if "horizon" in (policy_kwargs or {}):
        raise ValueError("The horizon is an argument of the agent, and none of policy_kwargs.")
    return {**(policy_kwargs or {}), "horizon": horizon}


class ChunkPolicy(OfflinePolicy):
    """Base of the policies of action chunks; a subclass adds :meth:`chunk`.

    ``predict(observations, state, episode_start)`` plays chunks to their ends: its second result is the plan, which goes
    into the next call as ``state``, as SB3's ``evaluate_policy`` does. Without it every call makes a new chunk and returns
    its first action.

    :param horizon: H, actions of a chunk
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        horizon: int = 5,
        **arguments: Any,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, seeds, horizon=horizon, **arguments)
        self.horizon, self.chunk_dim = horizon, horizon * self.action_dim
        self._calls, self._made = [0], [0]
        low, high = action_space.low, action_space.high
        self._is_scaled = bool(np.all(low == -1.0) and np.all(high == 1.0))

    @property
    def network_calls(self) -> int:
        """Rows that the actor's network was evaluated for by :meth:`sample` and its like."""
        return self._calls[0]

    @property
    def chunks_made(self) -> int:
        """Chunks that :meth:`predict` made."""
        return self._made[0]

    def count_calls(self, rows: int) -> None:
        """Add to :attr:`network_calls`."""
        self._calls[0] += rows

    @abstractmethod
    def chunk(self, observations: th.Tensor) -> th.Tensor:
        """A chunk (S, B, H d) in [-1, 1] for each observation (S, B, o)."""

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """The first actions of new chunks; ``deterministic`` changes nothing, for the policy is its samples."""
        return self.chunk(observations)[..., : self.action_dim]

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """As SB3's, with a :class:`Plan` as state.

        :raises ValueError: for several agents side by side
        """
        self._refuse_several_seeds()
        self.set_training_mode(False)
        rows, vectorized = self._rows(observation)
        if state is None:
            plan = self._first(rows)
            actions = plan.actions[:, 0]
        else:
            plan = self._next(rows, state, episode_start)
            actions = plan.actions[np.arange(rows.shape[0]), plan.played - 1]
        if not self._is_scaled:
            actions = self.unscale_action(actions)
        if actions.shape[1:] != self.action_space.shape:
            actions = actions.reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        return (actions if vectorized else actions[0]), plan

    def _rows(self, observation: Any) -> tuple[th.Tensor, bool]:
        """Observations (n, o) on the device, and whether there may be several; a single one at once, SB3's way takes long."""
        if type(observation) is np.ndarray and observation.dtype == np.float32 and observation.shape == (self.obs_dim,):
            return th.from_numpy(observation).to(self.obs_mean.device).unsqueeze(0), False
        rows, vectorized = self.obs_to_tensor(observation)
        return rows.float().flatten(1), vectorized  # type: ignore[union-attr]

    def _chunks(self, rows: th.Tensor) -> np.ndarray:
        """New chunks (n, H, d) for observations (n, o)."""
        self._made[0] += rows.shape[0]
        with th.inference_mode():
            chunks = self.chunk(rows.unsqueeze(0))
        return chunks.view(-1, self.horizon, self.action_dim).cpu().numpy()

    def _first(self, rows: th.Tensor) -> Plan:
        """New plans with one action played."""
        return Plan(self._chunks(rows), np.ones(rows.shape[0], np.int64))

    def _next(self, rows: th.Tensor, former: Plan, begins: np.ndarray | None) -> Plan:
        """Plans with one more action played: new ones where the former are at their ends or an episode begins."""
        new = former.played == self.horizon
        new = new if begins is None else new | np.asarray(begins, bool)
        if new.all():
            return self._first(rows)
        actions = former.actions
        if new.any():
            actions = actions.copy()
            actions[new] = self._chunks(rows[th.as_tensor(new, device=rows.device)])
        return Plan(actions, np.where(new, 1, former.played + 1))


class RankedChunkPolicy(ChunkPolicy):
    """A chunk policy with an ensemble of critics and their average; a subclass adds :meth:`sample`.

    Layer norm comes after the activation (authors' code).

    :param net_arch: hidden units of the critics
    :param n_critics: E
    :param n_candidates: N of best-of-N
    :param inference: "best-of-n", or "plain": one sample, without the critics
    :param ranking: how values of the ensemble are one number, "mean" or "min"
    """

    INFERENCE: tuple[str, ...] = ("plain", "best-of-n")

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        horizon: int = 5,
        net_arch: tuple[int, ...] = (512, 512, 512, 512),
        n_critics: int = 2,
        n_candidates: int = 32,
        inference: str = "best-of-n",
        ranking: str = "mean",
        **arguments: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, seeds, horizon, net_arch=net_arch, n_critics=n_critics,
            n_candidates=n_candidates, inference=inference, ranking=ranking, **arguments,
        )  # fmt: skip
        if inference not in self.INFERENCE:
            raise ValueError(f"inference is one of {', '.join(self.INFERENCE)}, not {inference!r}.")
        if n_candidates < 1 or n_critics < 1:
            raise ValueError(f"n_candidates and n_critics are 1 or more, not {n_candidates} and {n_critics}.")
        self.n_candidates, self.inference, self.ranking = n_candidates, inference, ranking
        features = self.obs_dim + self.chunk_dim
        self.critics = BatchedValues(
            seeds, n_critics, features, net_arch, xavier_uniform, activation_fn=GELU, layer_norm=True
        )
        self.critics_target = copy_of(self.critics)

    @abstractmethod
    def sample(self, observations: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """Chunks (S, B, A) in [-1, 1] that the flow makes of normal noise (S, B, A)."""

    def rank_by(self, ranking: str) -> None:
        """Take the mean or the minimum of the ensemble from here on."""
        self.ranking = self.arguments["ranking"] = ranking

    def value(self, q: th.Tensor) -> th.Tensor:
        """One number of an ensemble's, (S, E, B) to (S, B)."""
        return q.amin(1) if self.ranking == "min" else q.mean(1)

    def chunk(self, observations: th.Tensor) -> th.Tensor:
        return self.best_of(observations, 1 if self.inference == "plain" else self.n_candidates)

    def best_of(self, observations: th.Tensor, n: int) -> th.Tensor:
        """argmax_i Q(s, a_i) of n samples for each observation (S, B, o); a sample, without the critics, for n = 1."""
        seeds, size, _ = observations.shape
        repeated = observations.repeat_interleave(n, 1) if n > 1 else observations
        chunks = self.sample(repeated, th.randn(seeds, size * n, self.chunk_dim, device=observations.device))
        return chunks if n == 1 else self.best(repeated, chunks, n)

    def best(self, repeated: th.Tensor, chunks: th.Tensor, n: int) -> th.Tensor:
        """Of every n consecutive chunks (S, B n, A) at their observations the one of the highest value, (S, B, A)."""
        seeds, rows, _ = chunks.shape
        q = self.value(self.critics(repeated, chunks)).view(seeds, rows // n, n)
        chosen = q.argmax(-1)[..., None, None].expand(-1, -1, 1, self.chunk_dim)
        return chunks.view(seeds, rows // n, n, -1).gather(2, chosen).squeeze(2)
