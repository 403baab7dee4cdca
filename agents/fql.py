"""FQL: flow Q-learning (Park, Li, Levine, ICML 2025, arXiv 2502.02538; authors' code), with chunks QC's QC-FQL.

A flow imitates the data; a one-step actor mu(s, z) imitates what the flow makes of the same noise z, and maximises Q.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from .common.batched import frozen
from .common.chunk_policy import RankedChunkPolicy
from .common.flow import FlowNetwork, euler_flow, flow_matching_loss
from .common.offline import Batch
from .common.offline_to_online import OfflineToOnlineAgent
from .common.ranges import require_at_least


class FQLPolicy(RankedChunkPolicy):
    """The flow's velocity, the one-step actor, which acts, and the critics.

    :param net_arch: hidden units of all networks
    :param flow_steps: of Euler's method
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        horizon: int = 5,
        net_arch: tuple[int, ...] = (512, 512, 512, 512),
        n_critics: int = 2,
        n_candidates: int = 1,
        inference: str = "plain",
        ranking: str = "mean",
        flow_steps: int = 10,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, seeds, horizon, net_arch, n_critics, n_candidates, inference,
            ranking, flow_steps=flow_steps,
        )  # fmt: skip
        require_at_least(1, flow_steps=flow_steps)
        self.flow_steps = flow_steps
        self.flow = FlowNetwork(seeds, self.obs_dim, self.chunk_dim, net_arch, 1)
        self.actor = FlowNetwork(seeds, self.obs_dim, self.chunk_dim, net_arch, 0)

    def sample(self, observations: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """clip(mu(s, z)): one call of the network."""
        self.count_calls(noise.shape[0] * noise.shape[1])
        return self.actor(observations, noise).clamp(-1.0, 1.0)


class FQL(OfflineToOnlineAgent):
    """Flow Q-learning.

    :param policy: MlpPolicy or a class derived from :class:`FQLPolicy`
    :param env: to learn in online; None takes the spaces from the dataset
    :param learning_rate: of both Adams
    :param batch_size: chunks per gradient step
    :param horizon: H, actions of a chunk; FQL's own is 1
    :param gamma: discount of a single step
    :param tau: of the Polyak average that makes the target critics
    :param alpha: weight of the distillation, by the task: 10 to 1000 in the authors' runs (300 on cube and scene)
    :param offline_ranking: "mean" or "min" of the target critics
    :param online_ranking: the same online
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

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": FQLPolicy}
    policy: FQLPolicy

    def __init__(
        self,
        policy: str | type[FQLPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        horizon: int = 5,
        gamma: float = 0.99,
        tau: float = 0.005,
        alpha: float = 100.0,
        offline_ranking: str = "mean",
        online_ranking: str = "mean",
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
        require_at_least(0.0, alpha=alpha)
        super().__init__(
            policy, env, learning_rate, batch_size, horizon, gamma, tau, offline_ranking, online_ranking, None, buffer_size,
            learning_starts, gradient_steps, seeds, tensorboard_log, policy_kwargs, verbose, seed, device,
        )  # fmt: skip
        self.alpha = alpha
        if _init_setup_model:
            self._setup_model()

    def _actor_parameters(self) -> list[th.nn.Parameter]:
        return [*self.policy.flow.parameters(), *self.policy.actor.parameters()]

    def offline_actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """L_flow + alpha E || mu(s, z) - flow(s, z) ||^2 - E[ mean_j Q_j(s, clip(mu(s, z))) ]."""
        policy, observations, actions = self.policy, batch["observations"], batch["actions"]
        imitation = flow_matching_loss(policy.flow, observations, actions, batch["valid"])
        noise = th.randn_like(actions)
        with th.no_grad():
            teacher = euler_flow(policy.flow, observations, noise, policy.flow_steps)
        chosen = policy.actor(observations, noise)
        distillation = (chosen - teacher).square().mean((1, 2))
        with frozen(policy.critics):
            q = policy.critics(observations, chosen.clamp(-1.0, 1.0)).mean((1, 2))
        loss = (imitation + self.alpha * distillation - q).sum()
        return loss, {
            "actor_loss": loss / self.seeds,
            "flow_loss": imitation.mean(),
            "distillation_loss": distillation.mean(),
            "actor_q": q.mean(),
        }
