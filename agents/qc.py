"""QC: Q-learning with action chunks, a flow policy and best-of-N (Li, Zhou, Levine 2025, arXiv 2507.07969; authors' code)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from .common.chunk_policy import RankedChunkPolicy
from .common.flow import FlowNetwork, euler_flow, flow_matching_loss
from .common.offline import Batch
from .common.offline_to_online import OfflineToOnlineAgent
from .common.ranges import require_at_least


class QCPolicy(RankedChunkPolicy):
    """A flow's velocity and the critics.

    :param net_arch: hidden units of velocity and critics
    :param fourier: the time is read as Fourier features
    :param flow_steps: of Euler's method
    :param inference: "best-of-n", or "plain": one sample and no critic
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
        n_candidates: int = 32,
        inference: str = "best-of-n",
        ranking: str = "mean",
        fourier: bool = False,
        flow_steps: int = 10,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, seeds, horizon, net_arch, n_critics, n_candidates, inference,
            ranking, fourier=fourier, flow_steps=flow_steps,
        )  # fmt: skip
        require_at_least(1, flow_steps=flow_steps)
        self.flow_steps = flow_steps
        self.flow = FlowNetwork(seeds, self.obs_dim, self.chunk_dim, net_arch, 1, fourier)

    def sample(self, observations: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """Euler's method along the velocity."""
        self.count_calls(self.flow_steps * noise.shape[0] * noise.shape[1])
        return euler_flow(self.flow, observations, noise, self.flow_steps)


class QC(OfflineToOnlineAgent):
    """Q-learning with action chunks: the actor imitates data and replay, the critics choose among its samples.

    :param policy: MlpPolicy or a class derived from :class:`QCPolicy`
    :param env: to learn in online; None takes the spaces from the dataset
    :param learning_rate: of both Adams
    :param batch_size: chunks per gradient step
    :param horizon: H, actions of a chunk
    :param gamma: discount of a single step
    :param tau: of the Polyak average that makes the target critics
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

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": QCPolicy}
    policy: QCPolicy

    def __init__(
        self,
        policy: str | type[QCPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        horizon: int = 5,
        gamma: float = 0.99,
        tau: float = 0.005,
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
        super().__init__(
            policy, env, learning_rate, batch_size, horizon, gamma, tau, offline_ranking, online_ranking, target_candidates,
            buffer_size, learning_starts, gradient_steps, seeds, tensorboard_log, policy_kwargs, verbose, seed, device,
        )  # fmt: skip
        if _init_setup_model:
            self._setup_model()

    def _actor_parameters(self) -> list[th.nn.Parameter]:
        return list(self.policy.flow.parameters())

    def offline_actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """E || v(a_t, t, s) - (a_1 - a_0) ||^2 on the valid actions of a chunk."""
        loss = flow_matching_loss(self.policy.flow, batch["observations"], batch["actions"], batch["valid"]).sum()
        return loss, {"actor_loss": loss / self.seeds}
