"""Ratio-Variance Regularized Policy Optimization (Luo et al. 2026, arXiv 2605.26784; R2VPO).

RECONSTRUCTED. Only the abstract could be read: the clip is dropped, the variance of the policy ratio is constrained
as a local form of the trust region, and the multiplier is found by a primal-dual method. The surrogate, the second
moment about 1 in place of the batch variance, the dual step and every default below are this library's choice;
published numbers for control were not available, so nothing here claims to reproduce them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from .common.minibatch import MinibatchAgent
from .common.policies import NormalizedActorCriticPolicy, NormalizedCnnPolicy, NormalizedMultiInputPolicy
from .common.updates import Batch

LOG_RATIO_CLIP = 10.0


class Multiplier(nn.Module):
    """The Lagrange multiplier nu, saved and moved like weights.

    :param value: at the start
    """

    value: th.Tensor

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", th.tensor(float(value)))


class R2VPO(MinibatchAgent):
    """Ratio-variance regularised policy optimisation for control (reconstructed, see the module).

        maximise E[rho A]   subject to   E[(rho - 1)^2] <= delta,      rho = pi / pi_old, A normalised
    through the Lagrangian with a multiplier that ascends after each update. A sample's pull is rho (A - 2 nu (rho - 1)):
    a soft brake that turns round at rho* = 1 + A / (2 nu), where PPO's clip stops dead on one side. As E[rho] = 1,
    E[(rho - 1)^2] is the variance of the ratio, which is chi^2(pi || pi_old), about twice the KL for small steps.

    :param policy: MlpPolicy, CnnPolicy, MultiInputPolicy or a class derived from theirs
    :param env: environment, vector environment or registered id; Box, Discrete, MultiDiscrete or MultiBinary actions
    :param learning_rate: Adam's, or a schedule of the remaining progress (1 to 0)
    :param n_steps: steps per environment and iteration
    :param batch_size: samples a gradient step
    :param n_epochs: passes over the rollout
    :param gamma: discount
    :param gae_lambda: trade-off of bias and variance in the advantages
    :param delta: bound of the ratio's variance; about twice a target KL
    :param multiplier_init: nu at the start; above 0, because without a clip the first epochs must already be held
    :param multiplier_lr: step of nu, per update
    :param normalize_advantage: to mean 0 and standard deviation 1 in every minibatch
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss
    :param max_grad_norm: global norm to which gradients are clipped
    :param normalize_observations: running moments of vector observations, inside the policy
    :param normalize_rewards: rewards divided by the running std of the discounted return
    :param time_limits: "correct" bootstraps at time limits, "paper" does not
    :param compile_loss: run losses through ``torch.compile``: updates take a quarter less time, after some 10 to 30 seconds
        once; needs a C++ compiler. Pays from about a million steps on
    :param use_sde: not supported, must be False
    :param stats_window_size: episodes that ``rollout/ep_rew_mean`` averages
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the CPU for MlpPolicy, else the GPU where there is one
    :param _init_setup_model: build the networks at once
    :raises ValueError: for an argument outside its range, in one sentence
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": NormalizedActorCriticPolicy,
        "CnnPolicy": NormalizedCnnPolicy,
        "MultiInputPolicy": NormalizedMultiInputPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        delta: float = 0.02,
        multiplier_init: float = 1.0,
        multiplier_lr: float = 10.0,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
        time_limits: str = "correct",
        compile_loss: bool = False,
        use_sde: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if not delta > 0.0:
            raise ValueError(f"delta bounds the ratio's variance and must be positive, not {delta}.")
        if multiplier_init < 0.0 or multiplier_lr < 0.0:
            raise ValueError(
                f"multiplier_init and multiplier_lr must not be negative: {multiplier_init} and {multiplier_lr} were given."
            )
        self.delta, self.multiplier_init, self.multiplier_lr = delta, multiplier_init, multiplier_lr
        self.normalize_advantage = normalize_advantage
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            max_grad_norm=max_grad_norm,
            normalize_observations=normalize_observations,
            normalize_rewards=normalize_rewards,
            time_limits=time_limits,
            compile_loss=compile_loss,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            use_sde=use_sde,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        self.dual = Multiplier(self.multiplier_init).to(self.device)

    @property
    def multiplier(self) -> th.Tensor:
        """nu, a scalar."""
        return self.dual.value

    def policy_loss(
        self, log_ratio: th.Tensor, advantages: th.Tensor, multiplier: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """L(theta; nu) = -mean(rho A) + nu ( mean((rho - 1)^2) - delta ), and the second moment in it.

        The second moment about 1 and not the batch variance, which would not see a drift common to all samples. The
        log-ratio is clipped at +-10 against overflow only.

        :param log_ratio: log rho (B,)
        :param advantages: A (B,)
        :param multiplier: nu, scalar
        """
        ratio = log_ratio.clamp(-LOG_RATIO_CLIP, LOG_RATIO_CLIP).exp()
        variance = (ratio - 1.0).square().mean()
        return multiplier * (variance - self.delta) - (ratio * advantages).mean(), variance

    def dual_step(self, variance: th.Tensor) -> None:
        """nu <- max(0, nu + eta ( E[(rho - 1)^2] - delta )), once an update.

        Not per epoch: the first epochs start at rho = 1 and would pull nu down, so that the finished step, which is what
        the constraint is about, would settle at about twice delta.

        :param variance: second moment of the ratios
        """
        self.multiplier.add_(self.multiplier_lr * (variance - self.delta)).clamp_(min=0.0)

    def loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """L(theta; nu) + c_v L_V - c_e H, with the value loss mean (V - R)^2."""
        advantages = batch["advantages"]
        if self.normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        distribution, values = self.policy.evaluate_at(batch["observations"])
        log_ratio = distribution.log_prob(batch["actions"]) - batch["old_log_prob"]
        policy_loss, variance = self.policy_loss(log_ratio, advantages, batch["multiplier"])
        value_loss = (values - batch["returns"]).square().mean()
        loss = policy_loss + self.vf_coef * value_loss
        if self.ent_coef:
            loss = loss - self.ent_coef * distribution.entropy().mean()
        return loss, {
            "policy_gradient_loss": policy_loss,
            "value_loss": value_loss,
            "ratio_variance": variance,
            "loss": loss,
        }

    def _rollout_batch(self) -> Batch:
        return {**super()._rollout_batch(), "multiplier": self.multiplier.clone()}

    def after_update(self, measured: dict[str, th.Tensor]) -> None:
        """The dual step, on the second moment of the finished update over the whole rollout."""
        measured["multiplier"] = self.multiplier.clone()
        size, bound = measured["trust_region"], measured["trust_region_bound"]
        self.dual_step(th.where(size.isfinite(), size, bound))  # the guard says so later; the multiplier stays as it is

    def trust_region(self, ratio: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """E[(rho - 1)^2] beside delta."""
        return (ratio - 1.0).square().mean(), th.tensor(self.delta, device=ratio.device)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*names, "dual"], variables
