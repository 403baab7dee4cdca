"""CPQ: constraints penalized Q-learning for safe offline RL (Xu et al., AAAI 2022, arXiv 2107.09003)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from .common.batched import BatchedMLP, BatchedValues, copy_of, frozen, move_towards, torch_default
from .common.offline import Batch, Draw, OfflineAgent
from .common.offline_data import OfflineData, cost_threshold
from .common.offline_policy import OfflinePolicy
from .common.ranges import require_at_least
from .common.vae import ActionVAE, divergence

LOG_STD = (-20.0, 2.0)
LOG_ALPHA = 5.0
OOD_QUANTILE = 0.75


class CPQPolicy(OfflinePolicy):
    """A squashed Gaussian actor, twin reward and cost critics with averages, a VAE of the data's actions, the dual.

    :param net_arch: hidden units of actor and critics
    :param vae_width: hidden units of the VAE
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        net_arch: tuple[int, ...] = (256, 256),
        vae_width: int = 400,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, seeds, net_arch=net_arch, vae_width=vae_width)
        self.actor = BatchedMLP(seeds, self.obs_dim, net_arch, 2 * self.action_dim)
        pair = self.obs_dim + self.action_dim
        self.critics = BatchedValues(seeds, 2, pair, net_arch, torch_default)
        self.cost_critics = BatchedValues(seeds, 2, pair, net_arch, torch_default)
        self.critics_target, self.cost_critics_target = copy_of(self.critics), copy_of(self.cost_critics)
        self.vae = ActionVAE(seeds, self.obs_dim, self.action_dim, vae_width)
        self.log_alpha = nn.Parameter(th.zeros(seeds), requires_grad=False)

    def sample(self, observations: th.Tensor) -> th.Tensor:
        """tanh of a Gaussian sample, reparameterised, (S, B, d)."""
        mean, log_std = self.actor(observations).chunk(2, -1)
        return (mean + log_std.clamp(*LOG_STD).exp() * th.randn_like(mean)).tanh()

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """tanh of the mean, or a sample."""
        return self.actor(observations).chunk(2, -1)[0].tanh() if deterministic else self.sample(observations)


class CPQ(OfflineAgent):
    """Constraints penalized Q-learning, with the defaults and twin minima of OSRL's baseline.

    Two things follow the paper where OSRL's code departs from it: the out-of-distribution term has a gradient into the
    cost critic (in OSRL it has none), and the actions that it is evaluated at are squashed by tanh. Rewards bootstrap at
    time limits, where OSRL's ``done`` holds, too. As in OSRL the term is a mean over all samples with zeros for those
    inside the data, about a quarter of the mean over those outside.

    :param policy: MlpPolicy or a class derived from :class:`CPQPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of critics and VAE
    :param actor_learning_rate: of the actor, and of the dual
    :param batch_size: rows per gradient step
    :param gamma: discount
    :param tau: of the averages
    :param cost_limit: of an episode's cost
    :param beta: weight of the VAE's divergence
    :param n_samples: actions per state of the out-of-distribution term
    :param ood_scale: times the threshold: the cost that such actions are pushed above
    :param reward_scale: what rewards are multiplied by
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": CPQPolicy}
    OPTIMIZERS = ("actor_optimizer", "critic_optimizer", "cost_critic_optimizer", "vae_optimizer")
    policy: CPQPolicy

    def __init__(
        self,
        policy: str | type[CPQPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-3,
        actor_learning_rate: float = 1e-4,
        batch_size: int = 512,
        gamma: float = 0.99,
        tau: float = 0.005,
        cost_limit: float = 10.0,
        beta: float = 0.5,
        n_samples: int = 10,
        ood_scale: float = 1.5,
        reward_scale: float = 0.1,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        require_at_least(1, n_samples=n_samples)
        require_at_least(0, cost_limit=cost_limit, actor_learning_rate=actor_learning_rate)
        super().__init__(
            policy, env, learning_rate, batch_size, gamma, tau, seeds, tensorboard_log, policy_kwargs, verbose, seed, device
        )
        self.actor_learning_rate, self.cost_limit, self.beta = actor_learning_rate, cost_limit, beta
        self.n_samples, self.ood_scale, self.reward_scale = n_samples, ood_scale, reward_scale
        self.threshold = cost_limit  # of a discounted cost value, once the data tells how long episodes are
        if _init_setup_model:
            self._setup_model()

    def _make_optimizers(self) -> None:
        self.actor_optimizer = self._adam(self.policy.actor.parameters())
        self.critic_optimizer = self._adam(self.policy.critics.parameters())
        self.cost_critic_optimizer = self._adam(self.policy.cost_critics.parameters())
        self.vae_optimizer = self._adam(self.policy.vae.parameters())

    def _prepare(self, data: OfflineData) -> Batch:
        """Rewards scaled; time limits bootstrap."""
        self.threshold = cost_threshold(data, self.cost_limit, self.gamma)
        return {
            "observations": data.observations,
            "actions": data.actions,
            "rewards": data.rewards * self.reward_scale,
            "costs": data.safe_costs(),
            "next_observations": data.next_observations,
            "going_on": 1.0 - data.terminals,
        }

    # ------------------------------------------------------------------ losses

    def vae_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """Reconstruction and divergence of the data's actions."""
        loss = self.policy.vae.loss(batch["observations"], batch["actions"], self.beta).sum()
        return loss, {"vae_loss": loss / self.seeds}

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """sum_i E[ (Q_i - y)^2 ], y = r + gamma (1 - d) 1[Q_c' <= threshold] Q': unsafe futures are worth nothing."""
        with th.no_grad():
            following = batch["next_observations"]
            actions = self.policy.sample(following)
            q = self.policy.critics_target(following, actions).amin(1)
            safe = self.policy.cost_critics_target(following, actions).amin(1) <= self.threshold
            y = batch["rewards"] + self.gamma * batch["going_on"] * safe * q
        q = self.policy.critics(batch["observations"], batch["actions"])
        loss = (q - y.unsqueeze(1)).square().mean(2).sum()
        return loss, {"critic_loss": loss / self.seeds, "q": q.mean()}

    def cost_critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """sum_i E[ (Q_c,i - (c + gamma Q_c'))^2 ] - alpha (E_ood[ Q_c ] - scale threshold).

        E_ood is over the policy's actions whose divergence in the VAE lies in the upper quarter, so that they count as
        costly; alpha ascends on the same term, see :meth:`ascend`. As in OSRL the cost does not stop at an episode's end.
        """
        policy, observations = self.policy, batch["observations"]
        with th.no_grad():
            following = batch["next_observations"]
            y = batch["costs"] + self.gamma * policy.cost_critics_target(following, policy.sample(following)).amin(1)
            repeated = observations.repeat(1, self.n_samples, 1)
            actions = policy.sample(repeated)
            distance = divergence(*policy.vae.encode(repeated, actions))
            outside = distance >= distance.quantile(OOD_QUANTILE, 1, keepdim=True)
        q = policy.cost_critics(observations, batch["actions"])
        q_outside = (outside * policy.cost_critics(repeated, actions).amin(1)).mean(1)
        excess = q_outside - self.ood_scale * self.threshold
        alpha = policy.log_alpha.exp()
        loss = ((q - y.unsqueeze(1)).square().mean(2).sum(1) - alpha * excess).sum()
        self._excess = excess.detach()
        return loss, {"cost_critic_loss": loss / self.seeds, "q_cost": q.mean(), "alpha": alpha.mean()}

    def ascend(self) -> None:
        """log alpha <- clip(log alpha - rate alpha excess, -5, 5), with the excess (S,) of the latest cost loss."""
        alpha = self.policy.log_alpha
        alpha.add_(-self.actor_learning_rate * alpha.exp() * self._excess).clamp_(-LOG_ALPHA, LOG_ALPHA)

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """-E[ 1[Q_c(s, pi) <= threshold] Q(s, pi) ]."""
        observations, policy = batch["observations"], self.policy
        actions = policy.sample(observations)
        with frozen(policy.critics):
            q = policy.critics(observations, actions).amin(1)
        with th.no_grad():
            safe = policy.cost_critics(observations, actions).amin(1) <= self.threshold
        loss = -(safe * q).mean(1).sum()
        return loss, {"actor_loss": loss / self.seeds, "safe": safe.float().mean()}

    # ------------------------------------------------------------------ training

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One step of VAE, critics, cost critics and actor, and the averages."""
        infos = self._descend(
            draw(self.batch_size),
            (self.vae_optimizer, self.vae_loss),
            (self.critic_optimizer, self.critic_loss),
            (self.cost_critic_optimizer, self.cost_critic_loss),
            (self.actor_optimizer, self.actor_loss),
        )
        self.ascend()
        move_towards(self.policy.critics_target, self.policy.critics, self.tau)
        move_towards(self.policy.cost_critics_target, self.policy.cost_critics, self.tau)
        return infos

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_excess"]

    def _set_rates(self) -> None:
        super()._set_rates()
        self.actor_optimizer.param_groups[0]["lr"] = self.actor_learning_rate
