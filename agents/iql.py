"""IQL: offline RL with implicit Q-learning (Kostrikov et al., ICLR 2022, arXiv 2110.06169)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from .common.batched import BatchedActor, BatchedValues, copy_of, move_towards, torch_default
from .common.expectile import expectile_loss
from .common.offline import Batch, Draw, OfflineAgent
from .common.offline_data import OfflineData, reward_scale
from .common.offline_policy import OfflinePolicy

LOG_STD = (-5.0, 2.0)
WEIGHT_CAP = 100.0


class IQLPolicy(OfflinePolicy):
    """A Gaussian actor with mean tanh(MLP(s)) and a free log-std, twin critics and their average, a value.

    :param net_arch: hidden units of each
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        net_arch: tuple[int, ...] = (256, 256),
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, seeds, net_arch=net_arch)
        self.actor = BatchedActor(seeds, self.obs_dim, self.action_dim, net_arch)
        self.log_std = nn.Parameter(th.zeros(seeds, 1, self.action_dim))
        self.critics = BatchedValues(seeds, 2, self.obs_dim + self.action_dim, net_arch, torch_default)
        self.critics_target = copy_of(self.critics)
        self.value = BatchedValues(seeds, 1, self.obs_dim, net_arch, torch_default)

    def log_prob(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Of the Gaussian, (S, B)."""
        log_std = self.log_std.clamp(*LOG_STD)
        z = (actions - self.actor(observations)) * (-log_std).exp()
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2.0 * math.pi)).sum(-1)

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """The mean, or a sample, clipped to [-1, 1]."""
        mean = self.actor(observations)
        if deterministic:
            return mean
        return (mean + self.log_std.clamp(*LOG_STD).exp() * th.randn_like(mean)).clamp(-1.0, 1.0)


class IQL(OfflineAgent):
    """Implicit Q-learning.

    :param policy: MlpPolicy or a class derived from :class:`IQLPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of all three Adams; the actor's follows a cosine to 0 over the training
    :param batch_size: rows per gradient step
    :param gamma: discount
    :param tau: of the critics' average
    :param expectile: of the value
    :param beta: inverse temperature of the advantage weights
    :param reward_scale: what rewards are multiplied by; None: T_max / (R_max - R_min) with the references of the dataset's
        ``meta``, or its own episodes (the paper: 1000 / (R_max - R_min) of its own episodes)
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": IQLPolicy}
    OPTIMIZERS = ("actor_optimizer", "critic_optimizer", "value_optimizer")
    policy: IQLPolicy

    def __init__(
        self,
        policy: str | type[IQLPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        gamma: float = 0.99,
        tau: float = 0.005,
        expectile: float = 0.7,
        beta: float = 3.0,
        reward_scale: float | None = None,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if not 0.5 <= expectile < 1.0:
            raise ValueError(f"expectile lies in [0.5, 1), where 0.5 is the mean, not {expectile}.")
        super().__init__(
            policy, env, learning_rate, batch_size, gamma, tau, seeds, tensorboard_log, policy_kwargs, verbose, seed, device
        )
        self.expectile, self.beta, self.reward_scale = expectile, beta, reward_scale
        if _init_setup_model:
            self._setup_model()

    def _make_optimizers(self) -> None:
        self.actor_optimizer = self._adam([*self.policy.actor.parameters(), self.policy.log_std])
        self.critic_optimizer = self._adam(self.policy.critics.parameters())
        self.value_optimizer = self._adam(self.policy.value.parameters())

    def _prepare(self, data: OfflineData) -> Batch:
        """Rewards scaled; time limits bootstrap."""
        scale = reward_scale(data) if self.reward_scale is None else self.reward_scale
        return {
            "observations": data.observations,
            "actions": data.actions,
            "rewards": data.rewards * scale,
            "next_observations": data.next_observations,
            "going_on": 1.0 - data.terminals,
        }

    # ------------------------------------------------------------------ losses

    def value_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """E[ L_tau(min_i Q_i'(s, a) - V(s)) ]."""
        with th.no_grad():
            q = self.policy.critics_target(batch["observations"], batch["actions"]).amin(1)
        v = self.policy.value(batch["observations"])[:, 0]
        loss = expectile_loss(q - v, self.expectile).mean(1).sum()
        return loss, {"value_loss": loss / self.seeds, "value": v.mean()}

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """sum_i E[ (r + gamma (1 - d) V(s') - Q_i(s, a))^2 ]."""
        with th.no_grad():
            y = batch["rewards"] + self.gamma * batch["going_on"] * self.policy.value(batch["next_observations"])[:, 0]
        q = self.policy.critics(batch["observations"], batch["actions"])
        loss = (q - y.unsqueeze(1)).square().mean(2).sum()
        return loss, {"critic_loss": loss / self.seeds, "q": q.mean()}

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """-E[ min(exp(beta (Q - V)), 100) log pi(a|s) ]."""
        with th.no_grad():
            q = self.policy.critics_target(batch["observations"], batch["actions"]).amin(1)
            weight = (self.beta * (q - self.policy.value(batch["observations"])[:, 0])).exp().clamp(max=WEIGHT_CAP)
        loss = -(weight * self.policy.log_prob(batch["observations"], batch["actions"])).mean(1).sum()
        return loss, {"actor_loss": loss / self.seeds, "weight": weight.mean()}

    # ------------------------------------------------------------------ training

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One step of the value, the actor, the critics and their average, in the order of the authors' code."""
        batch = draw(self.batch_size)
        infos = self._descend(
            batch,
            (self.value_optimizer, self.value_loss),
            (self.actor_optimizer, self.actor_loss),
            (self.critic_optimizer, self.critic_loss),
        )
        move_towards(self.policy.critics_target, self.policy.critics, self.tau)
        return infos

    def _set_rates(self) -> None:
        super()._set_rates()
        progress = self._current_progress_remaining
        rate = self.lr_schedule(progress) * 0.5 * (1.0 - math.cos(math.pi * progress))
        utils.update_learning_rate(self.actor_optimizer, rate)
