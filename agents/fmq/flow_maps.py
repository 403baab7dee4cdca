"""Flow maps: one network that jumps between any two times of a flow, and how it learns to from data.

    X_{r,t}(x | s) = x + (t - r) u(x, r, t, s),   r <= t,   time 0 is noise and 1 is data.
On the diagonal, u(x, t, t, s) is the flow's velocity b; off it, it is the mean velocity on the way from r to t, which a flow
map teaches itself by one of three identities. Equations are those of "Aligning Flow Map Policies with Optimal Q-Guidance"
(arXiv 2605.12416), sections 3.1 and 3.2, by its released code and by notes of others: its text was not read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from ..common.batched import copy_of
from ..common.chunk_policy import RankedChunkPolicy
from ..common.flow import FlowNetwork, flow_matching_loss, interpolated, masked_mean, uniform_times
from ..common.offline import Batch
from ..common.offline_to_online import OfflineToOnlineAgent
from ..common.ranges import require_at_least
from .search import Search, guided_beam_search

Samples = tuple[th.Tensor, th.Tensor, th.Tensor]  # a_r and v, (S, B, A) each, and the mask (S, B, H)
DISTILLATIONS = ("mf", "lsd", "psd")


# ---------------------------------------------------------------------- the paper's equations


def time_pairs(first: th.Tensor, second: th.Tensor, progress: th.Tensor | float) -> tuple[th.Tensor, th.Tensor]:
    """(r, t), r <= t, of two uniform draws: about their middle, as far apart as ``progress`` in [0, 1] lets them."""
    middle, half = (first + second) / 2.0, (first - second).abs() / 2.0 * progress
    return middle - half, middle + half


def mean_flow_loss(u: FlowNetwork, observations: th.Tensor, data: Samples, r: th.Tensor, t: th.Tensor) -> th.Tensor:
    """``mf``, the Eulerian identity (Eq. 5; MeanFlow): || u(a_r, r, t) - sg[ v + (t - r) d/dr u(a_r + (.) v, r, t) ] ||^2.

    The derivative is along (a_r, r, t) -> (v, 1, 0) with the conditional velocity v = a_1 - a_0: the teacher is affine in it,
    so that its mean is the one with the velocity b. Agents take :func:`diagonal_and_mean_flow_loss`, which is faster.

    :return: (S,)
    """
    x, velocity, valid = data
    value, derivative = u.with_tangent(observations, x, (r, t), velocity, (th.ones_like(r), th.zeros_like(t)))
    return masked_mean((value - (velocity + (t - r) * derivative)).square(), valid)


def lagrangian_loss(u: FlowNetwork, observations: th.Tensor, data: Samples, r: th.Tensor, t: th.Tensor) -> th.Tensor:
    """``lsd`` (Eq. 4): || d/dt X_{r,t}(a_r) - sg[ u_{t,t}(X_{r,t}(a_r)) ] ||^2, (S,).

    The released code stops the gradient at the other term, so that u off the diagonal is not trained at all.
    """
    x, _, valid = data

    def jump(end: th.Tensor) -> th.Tensor:
        return x + (end - r) * u.smooth(observations, x, r, end)

    arrived, rate = th.func.jvp(jump, (t,), (th.ones_like(t),))[:2]
    with th.no_grad():
        velocity = u(observations, arrived, t, t)
    return masked_mean((rate - velocity).square(), valid)


def progressive_loss(u: FlowNetwork, observations: th.Tensor, data: Samples, r: th.Tensor, t: th.Tensor) -> th.Tensor:
    """``psd`` (Eq. 6), the semigroup: || u(a_r, r, t) - sg[ g u(a_r, r, w) + (1 - g) u(X_{r,w}(a_r), w, t) ] ||^2, (S,).

    w = r + g (t - r) with g uniform.
    """
    x, _, valid = data
    share = uniform_times(x)
    w = r + share * (t - r)
    with th.no_grad():
        first = u(observations, x, r, w)
        teacher = share * first + (1.0 - share) * u(observations, x + (w - r) * first, w, t)
    return masked_mean((u(observations, x, r, t) - teacher).square(), valid)


def diagonal_and_mean_flow_loss(
    u: FlowNetwork, observations: th.Tensor, diagonal: Samples, time: th.Tensor, data: Samples, r: th.Tensor, t: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """Flow matching on the diagonal and :func:`mean_flow_loss` in one pass through the network, (S,) each."""
    x = th.cat([diagonal[0], data[0]], dim=1)
    starts, ends = th.cat([time, r], dim=1), th.cat([time, t], dim=1)
    directions = (th.ones_like(r), th.zeros_like(t))
    both = th.cat([observations, observations], dim=1)
    value, derivative = u.with_tangent(both, x, (starts, ends), data[1], directions)
    on, off = value.chunk(2, dim=1)
    teacher = data[1] + (t - r) * derivative
    return masked_mean((on - diagonal[1]).square(), diagonal[2]), masked_mean((off - teacher).square(), data[2])


# ---------------------------------------------------------------------- the policy


class FlowMapPolicy(RankedChunkPolicy):
    """A flow map, the one it was at the end of the offline phase, and the critics.

    :param net_arch: hidden units of flow map and critics
    :param fourier: times are read as Fourier features
    :param inference: "best-of-n"; "qgbs", :func:`guided_beam_search`; "plain", one sample and no critic
    :param search: arguments of :class:`Search`, for "qgbs"
    """

    INFERENCE = ("plain", "best-of-n", "qgbs")
    steps: th.Tensor

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
        fourier: bool = True,
        search: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, seeds, horizon, net_arch, n_critics, n_candidates, inference,
            ranking, fourier=fourier, search=search,
        )  # fmt: skip
        self.search = Search(**(search or {}))
        self.actor = FlowNetwork(seeds, self.obs_dim, self.chunk_dim, net_arch, 2, fourier)
        self.reference = copy_of(self.actor)
        # A tensor, because a captured update does not see new Python numbers.
        self.register_buffer("steps", th.zeros((), dtype=th.float64))

    def velocity(self, observations: th.Tensor, x: th.Tensor, r: float, t: float) -> th.Tensor:
        """u(x, r, t, s) at the same times for all samples, counted in ``network_calls``."""
        self.count_calls(x.shape[0] * x.shape[1])
        return self.actor.at(observations, x, r, t)

    def sample(self, observations: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """clip(X_{0,1}(a_0 | s)): one call of the network."""
        return (noise + self.velocity(observations, noise, 0.0, 1.0)).clamp(-1.0, 1.0)

    def chunk(self, observations: th.Tensor) -> th.Tensor:
        if self.inference == "qgbs":
            return guided_beam_search(self, observations, self.search)
        return super().chunk(observations)


# ---------------------------------------------------------------------- the offline phase


class FlowMapAgent(OfflineToOnlineAgent):
    """Base of the agents whose actor is a flow map: the offline phase; a subclass adds the online one.

    :param distillation: "mf", "lsd" or "psd", how u learns off the diagonal
    :param warmup: gradient steps on the diagonal only
    :param anneal_end: gradient steps after which the two times are as far apart as two uniform draws are
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": FlowMapPolicy}
    policy: FlowMapPolicy

    def __init__(
        self,
        policy: str | type[FlowMapPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule,
        batch_size: int,
        horizon: int,
        gamma: float,
        tau: float,
        distillation: str,
        warmup: int,
        anneal_end: int,
        *rest: Any,
    ) -> None:
        if distillation not in DISTILLATIONS:
            raise ValueError(f"distillation is one of {', '.join(DISTILLATIONS)}, not {distillation!r}.")
        require_at_least(0, warmup=warmup)
        require_at_least(warmup, anneal_end=anneal_end)
        super().__init__(policy, env, learning_rate, batch_size, horizon, gamma, tau, *rest)
        self.distillation, self.warmup, self.anneal_end = distillation, warmup, anneal_end

    def _actor_parameters(self) -> list[th.nn.Parameter]:
        return list(self.policy.actor.parameters())

    def flow_map_losses(
        self, observations: th.Tensor, actions: th.Tensor, valid: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """The loss on the diagonal (Eq. 3) and that of the identity off it, on noise of their own, (S,) each.

        :param actions: a_1, (S, B, A)
        """
        u, (r, t) = self.policy.actor, self._times(actions)
        x, velocity = interpolated(th.randn_like(actions), actions, r)
        data = x, velocity, valid
        if self.distillation == "mf":
            time = uniform_times(actions)
            diagonal = (*interpolated(th.randn_like(actions), actions, time), valid)
            return diagonal_and_mean_flow_loss(u, observations, diagonal, time, data, r, t)
        diagonal_loss = flow_matching_loss(lambda s, x, t: u(s, x, t, t), observations, actions, valid)
        identity = lagrangian_loss if self.distillation == "lsd" else progressive_loss
        return diagonal_loss, identity(u, observations, data, r, t)

    def _times(self, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Two times by the curriculum: equal until ``warmup``, and farther apart from there to ``anneal_end``."""
        progress = (self.policy.steps - self.warmup) / max(self.anneal_end - self.warmup, 1)
        return time_pairs(uniform_times(actions), uniform_times(actions), progress.clamp(0.0, 1.0).float())

    def offline_actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """L_diagonal + c L_identity, c = 1 after the warm-up and 0 before."""
        diagonal, identity = self.flow_map_losses(batch["observations"], batch["actions"], batch["valid"])
        loss = (diagonal + (self.policy.steps > self.warmup) * identity).sum()
        return loss, {
            "actor_loss": loss / self.seeds,
            "diagonal_loss": diagonal.mean(),
            f"{self.distillation}_loss": identity.mean(),
        }

    def update(self, draw: Any, number: int) -> dict[str, th.Tensor]:
        """As :meth:`OfflineToOnlineAgent.update`; the curriculum counts on."""
        infos = super().update(draw, number)
        self.policy.steps.add_(1)
        return infos

    def _freeze_reference(self) -> None:
        self.policy.reference.load_state_dict(self.policy.actor.state_dict())
