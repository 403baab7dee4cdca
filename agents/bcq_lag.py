"""BCQ-Lag: batch-constrained Q-learning (Fujimoto et al. 2019) with a PID Lagrange multiplier (Stooke et al. 2020)."""

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
from .common.vae import ActionVAE


class BCQLagPolicy(OfflinePolicy):
    """A VAE of the data's actions, a bounded perturbation of them, four reward and four cost critics with averages.

    :param net_arch: hidden units of perturbation and critics
    :param vae_width: hidden units of the VAE
    :param phi: largest perturbation
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        net_arch: tuple[int, ...] = (256, 256),
        vae_width: int = 400,
        phi: float = 0.05,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, seeds, net_arch=net_arch, vae_width=vae_width, phi=phi)
        self.phi = phi
        pair = self.obs_dim + self.action_dim
        self.actor = BatchedMLP(seeds, pair, net_arch, self.action_dim, nn.Tanh)
        # Two pairs each: the minimum of a pair is one of the "two" critics that BCQ mixes (OSRL's num_q = 2).
        self.critics = BatchedValues(seeds, 4, pair, net_arch, torch_default)
        self.cost_critics = BatchedValues(seeds, 4, pair, net_arch, torch_default)
        self.vae = ActionVAE(seeds, self.obs_dim, self.action_dim, vae_width)
        self.actor_target = copy_of(self.actor)
        self.critics_target, self.cost_critics_target = copy_of(self.critics), copy_of(self.cost_critics)
        # The controller's integral and last error.
        self.integral = nn.Parameter(th.zeros(seeds), requires_grad=False)
        self.last_error = nn.Parameter(th.zeros(seeds), requires_grad=False)

    def perturbed(self, actor: nn.Module, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """clip(a + phi tanh(actor(s, a)))."""
        return (actions + self.phi * actor(th.cat([observations, actions], -1)).tanh()).clamp(-1.0, 1.0)

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """One decoded action, perturbed; ``deterministic`` decodes the latent 0."""
        latent = None
        if deterministic:
            latent = th.zeros(*observations.shape[:2], self.vae.latent_dim, device=observations.device)
        return self.perturbed(self.actor, observations, self.vae.decode(observations, latent))


class BCQLag(OfflineAgent):
    """BCQ with a PID-controlled Lagrange multiplier on the cost, with the defaults of OSRL's baseline.

    OSRL acts by one random latent; here ``deterministic`` takes the latent 0, the decoder's likeliest action. Rewards
    bootstrap at time limits, where OSRL's ``done`` holds, too. Reward and cost critics share a batch's candidates.

    :param policy: MlpPolicy or a class derived from :class:`BCQLagPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of all Adams
    :param batch_size: rows per gradient step
    :param gamma: discount
    :param tau: of the averages
    :param cost_limit: of an episode's cost
    :param lmbda: weight of the minimum in the mix with the maximum of the two critics
    :param beta: weight of the VAE's divergence
    :param pid: gains of the controller
    :param n_samples: candidates per next state
    :param reward_scale: what rewards are multiplied by
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": BCQLagPolicy}
    OPTIMIZERS = ("actor_optimizer", "critic_optimizer", "cost_critic_optimizer", "vae_optimizer")
    policy: BCQLagPolicy

    def __init__(
        self,
        policy: str | type[BCQLagPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-3,
        batch_size: int = 512,
        gamma: float = 0.99,
        tau: float = 0.005,
        cost_limit: float = 10.0,
        lmbda: float = 0.75,
        beta: float = 0.5,
        pid: tuple[float, float, float] = (0.1, 0.003, 0.001),
        n_samples: int = 10,
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
        require_at_least(0, cost_limit=cost_limit)
        if len(pid) != 3:
            raise ValueError(f"pid has three gains, K_P, K_I and K_D, not {pid}.")
        super().__init__(
            policy, env, learning_rate, batch_size, gamma, tau, seeds, tensorboard_log, policy_kwargs, verbose, seed, device
        )
        self.cost_limit, self.lmbda, self.beta, self.pid = cost_limit, lmbda, beta, pid
        self.n_samples, self.reward_scale = n_samples, reward_scale
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

    @th.no_grad()
    def candidates(self, following: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """n decoded, perturbed actions at each s', (S, B n, d), and s' as often."""
        repeated = following.repeat_interleave(self.n_samples, 1)
        return self.policy.perturbed(self.policy.actor_target, repeated, self.policy.vae.decode(repeated)), repeated

    @th.no_grad()
    def best_candidate(self, critics: nn.Module, actions: th.Tensor, repeated: th.Tensor) -> th.Tensor:
        """max over the candidates of lmbda min + (1 - lmbda) max of the two critics, (S, B)."""
        seeds, size = len(repeated), repeated.shape[1] // self.n_samples
        first, second = (pair.amin(1) for pair in critics(repeated, actions).chunk(2, 1))
        mixed = self.lmbda * th.minimum(first, second) + (1.0 - self.lmbda) * th.maximum(first, second)
        return mixed.view(seeds, size, self.n_samples).amax(2)

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """sum_i E[ (Q_i - (r + gamma (1 - d) best'))^2 ], see :meth:`best_candidate`."""
        best = self.best_candidate(self.policy.critics_target, batch["candidates"], batch["repeated"])
        y = batch["rewards"] + self.gamma * batch["going_on"] * best
        q = self.policy.critics(batch["observations"], batch["actions"])
        loss = (q - y.unsqueeze(1)).square().mean(2).sum()
        return loss, {"critic_loss": loss / self.seeds, "q": q.mean()}

    def cost_critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """The same for costs, which as in OSRL do not stop at an episode's end."""
        best = self.best_candidate(self.policy.cost_critics_target, batch["candidates"], batch["repeated"])
        y = batch["costs"] + self.gamma * best
        q = self.policy.cost_critics(batch["observations"], batch["actions"])
        loss = (q - y.unsqueeze(1)).square().mean(2).sum()
        return loss, {"cost_critic_loss": loss / self.seeds, "q_cost": q.mean()}

    @th.no_grad()
    def multiplier(self, error: th.Tensor) -> th.Tensor:
        """max(0, K_P max(0, e) + K_I max(0, integral + e) + K_D max(0, e - last)), all (S,).

        :param error: mean of Q_c over the batch, less the threshold
        """
        proportional, integral, derivative = self.pid
        total = (self.policy.integral + error).clamp(min=0.0)
        change = (error - self.policy.last_error).clamp(min=0.0)
        return (proportional * error.clamp(min=0.0) + integral * total + derivative * change).clamp(min=0.0)

    def move_on(self) -> None:
        """Let the controller remember the error (S,) of the latest actor loss."""
        self.policy.integral.add_(self._error).clamp_(min=0.0)
        self.policy.last_error.copy_(self._error)

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """-E[ Q(s, pi) ] + multiplier E[ Q_c(s, pi) - threshold ], minima of all critics."""
        policy, observations = self.policy, batch["observations"]
        with th.no_grad():
            decoded = policy.vae.decode(observations)
        actions = policy.perturbed(policy.actor, observations, decoded)
        with frozen(policy.critics, policy.cost_critics):
            q = policy.critics(observations, actions).amin(1)
            excess = policy.cost_critics(observations, actions).amin(1).mean(1) - self.threshold
        self._error = excess.detach()
        multiplier = self.multiplier(self._error)
        loss = (multiplier * excess - q.mean(1)).sum()
        return loss, {"actor_loss": loss / self.seeds, "multiplier": multiplier.mean()}

    # ------------------------------------------------------------------ training

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One step of VAE, critics, cost critics and perturbation, and the averages."""
        policy, batch = self.policy, draw(self.batch_size)
        infos = self._descend(batch, (self.vae_optimizer, self.vae_loss))
        batch["candidates"], batch["repeated"] = self.candidates(batch["next_observations"])
        infos |= self._descend(
            batch,
            (self.critic_optimizer, self.critic_loss),
            (self.cost_critic_optimizer, self.cost_critic_loss),
            (self.actor_optimizer, self.actor_loss),
        )
        self.move_on()
        for target, source in (
            (policy.critics_target, policy.critics),
            (policy.cost_critics_target, policy.cost_critics),
            (policy.actor_target, policy.actor),
        ):
            move_towards(target, source, self.tau)
        return infos

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_error"]
