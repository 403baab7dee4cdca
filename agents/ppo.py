"""Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347): SB3's PPO on Tether's engine.

It is here as the yardstick of the other agents: what they gain over PPO is then the method's, not the engine's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule

from .common.minibatch import MinibatchAgent
from .common.policies import NormalizedActorCriticPolicy, NormalizedCnnPolicy, NormalizedMultiInputPolicy
from .common.updates import Batch


class PPO(MinibatchAgent):
    """Proximal Policy Optimization with the clipped objective, SB3's arguments, defaults and mathematics.

    It differs from SB3's class in these points. The batch size must divide the rollout. ``target_kl`` is looked at
    after each epoch, over the whole rollout, and not after each minibatch, so that the update reads nothing back in
    between. Observations and rewards can be normalised inside. There is no gSDE, and the rollout's memory is the engine's
    (no ``rollout_buffer_class``): name the arguments, their order is not SB3's after ``max_grad_norm``.

    :param policy: MlpPolicy, CnnPolicy, MultiInputPolicy or a class derived from theirs
    :param env: environment, vector environment or registered id
    :param learning_rate: Adam's, or a schedule of the remaining progress (1 to 0)
    :param n_steps: steps per environment and iteration
    :param batch_size: samples a gradient step
    :param n_epochs: passes over the rollout
    :param gamma: discount
    :param gae_lambda: trade-off of bias and variance in the advantages
    :param clip_range: epsilon of the clipped ratio, or a schedule
    :param clip_range_vf: the value moves at most this far from its old prediction; None: no limit; or a schedule
    :param normalize_advantage: to mean 0 and standard deviation 1 in every minibatch
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss
    :param max_grad_norm: global norm to which gradients are clipped
    :param target_kl: end the update after an epoch with approx_kl > 1.5 target_kl; None: never
    :param normalize_observations: running moments of vector observations, inside the policy
    :param normalize_rewards: rewards divided by the running std of the discounted return
    :param time_limits: "correct" bootstraps at time limits (as SB3), "paper" does not
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
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
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
        for name, value in (("clip_range", clip_range), ("clip_range_vf", clip_range_vf), ("target_kl", target_kl)):
            if isinstance(value, (int, float)) and value <= 0.0:
                raise ValueError(f"{name} must be positive, not {value}.")
        self.clip_range, self.clip_range_vf = clip_range, clip_range_vf
        self.normalize_advantage, self.target_kl = normalize_advantage, target_kl
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

    def schedules(self) -> dict[str, float]:
        """The clip ranges at this point of the training."""
        progress = self._current_progress_remaining
        ranges = {"clip_range": self.clip_range, "clip_range_vf": self.clip_range_vf}
        return {key: FloatSchedule(value)(progress) for key, value in ranges.items() if value is not None}

    def standardized(self, advantages: th.Tensor) -> th.Tensor:
        """(A - mean) / (std + 1e-8) over the minibatch (B,), where ``normalize_advantage`` says so."""
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8) if self.normalize_advantage else advantages

    def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, clip_range: th.Tensor) -> th.Tensor:
        """-L^CLIP = -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A); eq. 7.

        The minimum is rho A with rho stopped at 1 + eps where A > 0, and at 1 - eps where A < 0.

        :param ratio: rho = pi / pi_old (B,)
        :param advantages: A (B,)
        :param clip_range: eps, scalar
        """
        rises, unbounded = advantages > 0.0, th.full_like(clip_range, th.inf)
        lowest = th.where(rises, -unbounded, 1.0 - clip_range)
        highest = th.where(rises, 1.0 + clip_range, unbounded)
        return -(ratio.clamp(lowest, highest) * advantages).mean()

    def value_loss(self, values: th.Tensor, batch: Batch) -> th.Tensor:
        """mean (V - R)^2, V held within the clip range of V_old where there is one (as SB3: the clipped error alone).

        :param values: V (B,)
        """
        if self.clip_range_vf is not None:
            reach, old = batch["clip_range_vf"], batch["old_values"]
            values = old + th.minimum(th.maximum(values - old, -reach), reach)
        return (values - batch["returns"]).square().mean()

    def loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """-L^CLIP + c_v L^V - c_e H; eq. 9 (the paper maximises its negative)."""
        distribution, values = self.policy.evaluate_at(batch["observations"])
        ratio = th.exp(distribution.log_prob(batch["actions"]) - batch["old_log_prob"])
        policy_loss = self.policy_loss(ratio, self.standardized(batch["advantages"]), batch["clip_range"])
        value_loss = self.value_loss(values, batch)
        loss = policy_loss + self.vf_coef * value_loss
        if self.ent_coef:
            loss = loss - self.ent_coef * distribution.entropy().mean()
        return loss, {"policy_gradient_loss": policy_loss, "value_loss": value_loss, "loss": loss}

    def trust_region(self, ratio: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """mean |rho - 1|, twice the total variation from pi_old, beside eps, at which a sample stops to push."""
        eps = self.schedules()["clip_range"]
        return (ratio - 1.0).abs().mean(), th.tensor(eps, device=ratio.device)

    def violations(self, ratio: th.Tensor) -> dict[str, th.Tensor]:
        """Share of the samples whose ratio lies beyond the clip range."""
        return {"clip_fraction": ((ratio - 1.0).abs() > self.schedules()["clip_range"]).float().mean()}

    def after_epoch(self, batch: Batch, info: dict[str, th.Tensor]) -> bool:
        """Whether the update left the neighbourhood that ``target_kl`` allows."""
        return self.target_kl is not None and self.measure(batch)["approx_kl"].item() > 1.5 * self.target_kl
