"""TD3+BC: a minimalist approach to offline RL (Fujimoto and Gu, NeurIPS 2021, arXiv 2106.06860)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from .common.batched import BatchedActor, BatchedValues, copy_of, frozen, move_towards, torch_default
from .common.offline import Batch, Draw, OfflineAgent
from .common.offline_data import OfflineData
from .common.offline_policy import OfflinePolicy


class TD3BCPolicy(OfflinePolicy):
    """A deterministic actor, twin critics, and the averages of both.

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
        self.critics = BatchedValues(seeds, 2, self.obs_dim + self.action_dim, net_arch, torch_default)
        self.actor_target, self.critics_target = copy_of(self.actor), copy_of(self.critics)

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """The actor's action, (S, B, d)."""
        return self.actor(observations)


class TD3BC(OfflineAgent):
    """TD3 with behaviour cloning.

    :param policy: MlpPolicy or a class derived from :class:`TD3BCPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of both Adams
    :param batch_size: rows per gradient step
    :param gamma: discount
    :param tau: of the averages
    :param alpha: weight of the normalised Q in the actor's loss
    :param policy_noise: standard deviation of the target action's noise
    :param noise_clip: bound of that noise
    :param policy_delay: critic steps per step of the actor and the averages
    :param normalize: standardise observations with the dataset's mean and standard deviation
    :param reward_scale: what rewards are multiplied by, before ``reward_shift`` is added
    :param reward_shift: added to rewards
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": TD3BCPolicy}
    OPTIMIZERS = ("actor_optimizer", "critic_optimizer")
    policy: TD3BCPolicy

    def __init__(
        self,
        policy: str | type[TD3BCPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        gamma: float = 0.99,
        tau: float = 0.005,
        alpha: float = 2.5,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_delay: int = 2,
        normalize: bool = True,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if alpha <= 0.0 or policy_delay < 1:
            raise ValueError(f"alpha must be above 0 and policy_delay 1 or more, not {alpha} and {policy_delay}.")
        super().__init__(
            policy, env, learning_rate, batch_size, gamma, tau, seeds, tensorboard_log, policy_kwargs, verbose, seed, device
        )
        self.alpha, self.policy_noise, self.noise_clip = alpha, policy_noise, noise_clip
        self.policy_delay = self._period = policy_delay
        self.normalize, self.reward_scale, self.reward_shift = normalize, reward_scale, reward_shift
        if _init_setup_model:
            self._setup_model()

    def _make_optimizers(self) -> None:
        self.actor_optimizer = self._adam(self.policy.actor.parameters())
        self.critic_optimizer = self._adam(self.policy.critics.parameters())

    def _prepare(self, data: OfflineData) -> Batch:
        """Observations standardised; time limits bootstrap."""
        if self.normalize:
            self.policy.standardize(data.observations)
        return {
            "observations": self.policy.normalized(data.observations),
            "actions": data.actions,
            "rewards": data.rewards * self.reward_scale + self.reward_shift,
            "next_observations": self.policy.normalized(data.next_observations),
            "going_on": 1.0 - data.terminals,
        }

    # ------------------------------------------------------------------ losses

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """sum_i E[ (Q_i(s, a) - y)^2 ], y = r + gamma (1 - d) min_i Q_i'(s', a'), a' = clip(pi'(s') + clip(noise))."""
        with th.no_grad():
            noise = (th.randn_like(batch["actions"]) * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
            next_actions = (self.policy.actor_target(batch["next_observations"]) + noise).clamp(-1.0, 1.0)
            next_q = self.policy.critics_target(batch["next_observations"], next_actions).amin(1)
            y = batch["rewards"] + self.gamma * batch["going_on"] * next_q
        q = self.policy.critics(batch["observations"], batch["actions"])
        loss = (q - y.unsqueeze(1)).square().mean(2).sum()
        return loss, {"critic_loss": loss / self.seeds, "q": q.mean()}

    def anchor(self, batch: Batch, actions: th.Tensor) -> th.Tensor:
        """The actions (S, B, d) that the actor's ``actions`` are pulled to: the data's own at the same states."""
        return batch["actions"]

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """-lambda E[ Q_1(s, pi(s)) ] + E[ (pi(s) - anchor)^2 ], lambda = alpha / mean |Q_1|, detached.

        The second mean is over batch and dimensions.
        """
        actions = self.policy.actor(batch["observations"])
        with frozen(self.policy.critics):
            q = self.policy.critics(batch["observations"], actions)[:, 0]
        weight = self.alpha / q.detach().abs().mean(1)
        cloning = (actions - self.anchor(batch, actions.detach())).square().mean((1, 2))
        loss = (cloning - weight * q.mean(1)).sum()
        return loss, {"actor_loss": loss / self.seeds, "cloning": cloning.mean(), "q_weight": weight.mean()}

    # ------------------------------------------------------------------ training

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One step of the critics; every ``policy_delay`` of them one of the actor and of all averages."""
        batch = draw(self.batch_size)
        loss, info = self.critic_loss(batch)
        self._step(self.critic_optimizer, loss, info, batch)
        if (number + 1) % self.policy_delay:
            return info
        loss, actor_info = self.actor_loss(batch)
        self._step(self.actor_optimizer, loss, actor_info, batch)
        move_towards(self.policy.actor_target, self.policy.actor, self.tau)
        move_towards(self.policy.critics_target, self.policy.critics, self.tau)
        return {**info, **actor_info}
