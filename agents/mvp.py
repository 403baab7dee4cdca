"""MVP: mean-flow policies with value-guided best-of-N, the one-step rival of FMQ (by notes on its paper, and FMQ's code).

A flow map as in :mod:`.fmq.flow_maps`, whose teacher online is the best of N of its own samples: no gradient of the critics
ever reaches it. The offline phase is FMQ's with "mf", so that both may start from one model; that its targets are the data's
actions there is an assumption.
"""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from .common.flow import uniform_times
from .common.offline import Batch
from .common.ranges import require_at_least
from .fmq.flow_maps import FlowMapAgent, FlowMapPolicy


class MVP(FlowMapAgent):
    """Mean-flow policies that imitate the best of their own samples.

    Its log has ``train/trust_region``, the mean distance to the offline policy, which nothing bounds.

    :param policy: MlpPolicy or a class derived from :class:`FlowMapPolicy`
    :param env: to learn in online; None takes the spaces from the dataset
    :param learning_rate: of both Adams
    :param batch_size: chunks per gradient step
    :param horizon: H, actions of a chunk
    :param gamma: discount of a single step
    :param tau: of the Polyak average that makes the target critics
    :param distillation: as in FMQ; MVP's own is "mf"
    :param warmup: as in FMQ
    :param anneal_end: as in FMQ
    :param lambda_diagonal: weight online of the instantaneous velocity's loss beside that of the mean velocity
    :param offline_ranking: "mean" or "min" of the critics, in targets and best-of-N
    :param online_ranking: the same online
    :param target_candidates: N of the best-of-N that is bootstrapped from; None: the policy's ``n_candidates``
    :param buffer_size: chunks that the replay memory holds at most, but the dataset's at least
    :param learning_starts: env steps before the first online update
    :param gradient_steps: updates per step of the (vector) environment
    :param seeds: agents that are trained side by side offline
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    :raises ValueError: for an argument outside its range, in one sentence
    """

    def __init__(
        self,
        policy: str | type[FlowMapPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        horizon: int = 5,
        gamma: float = 0.99,
        tau: float = 0.005,
        distillation: str = "mf",
        warmup: int = 5000,
        anneal_end: int = 50_000,
        lambda_diagonal: float = 1.0,
        offline_ranking: str = "mean",
        online_ranking: str = "mean",
        target_candidates: int | None = None,
        buffer_size: int = 2_000_000,
        learning_starts: int = 5000,
        gradient_steps: int = 1,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        require_at_least(0.0, lambda_diagonal=lambda_diagonal)
        super().__init__(
            policy, env, learning_rate, batch_size, horizon, gamma, tau, distillation, warmup, anneal_end, offline_ranking,
            online_ranking, target_candidates, buffer_size, learning_starts, gradient_steps, seeds, tensorboard_log,
            policy_kwargs, verbose, seed, device,
        )  # fmt: skip
        self.lambda_diagonal = lambda_diagonal
        if _init_setup_model:
            self._setup_model()

    def online_actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """L_identity + lambda L_diagonal with a_1 = a*, the best of N of the present policy at s by the critics."""
        observations = batch["observations"]
        with th.no_grad():
            best = self.policy.best_of(observations, self.policy.n_candidates)
        # Every action of a* is the policy's own: none lies behind an episode's end.
        diagonal, identity = self.flow_map_losses(observations, best, th.ones_like(batch["valid"]))
        loss = (identity + self.lambda_diagonal * diagonal).sum()
        return loss, {
            "actor_loss": loss / self.seeds,
            "diagonal_loss": diagonal.mean(),
            f"{self.distillation}_loss": identity.mean(),
            "trust_region": self._distance(observations, batch["actions"]),
        }

    @th.no_grad()
    def _distance(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Mean || u - u_off || of jumps to the end from between noise and the memory's chunks, as FMQ logs it."""
        r = uniform_times(actions)
        x, end = (1.0 - r) * th.randn_like(actions) + r * actions, th.ones_like(r)
        both = (network(observations, x, r, end) for network in (self.policy.actor, self.policy.reference))
        u, u_off = both
        return (u - u_off).norm(dim=-1).mean()
