"""Bounded Policy Optimization (Ao et al. 2026, "Bounded Ratio Reinforcement Learning", arXiv 2604.18578).

The paper's displayed equations 16, of theorem 4.1 and of section 4.6, and its appendix, could not be read for this
file: those formulas are reconstructed from the text, the authors' project page and their code, and proved by the
checks in ``tests/agents/test_bpo.py``. Where text and code disagree, the comment says which is followed.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecNormalize, unwrap_vec_normalize
from torch import nn
from torch.nn.functional import softplus

from .common.minibatch import MinibatchAgent
from .common.policies import ForDicts, ForImages, NormalizedActorCriticPolicy
from .common.updates import Batch

Number = float | th.Tensor

# A schedule may end at 0, where the bounds would leave no ratio but 1 and the optimum would be 0 / 0.
LEAST_CLIP_RANGE = 1e-4


def optimal_ratio(advantage: th.Tensor, lambda_: float, low: Number, high: Number) -> th.Tensor:
    """rho* = low + (high - low) sigmoid( A / lambda + log((1 - low) / (high - 1)) ), the ratio of the exact optimum.

    For low = 1 - eps, high = 1 + eps it is 1 + eps tanh(A / (2 lambda)): theorem 4.1 (as the authors' code has it). The
    form for other bounds is derived (the paper's section 4.6 could not be read): it maximises E[rho A - lambda H'(rho)]
    for H' = (rho - low) log((rho - low) / (1 - low)) + (high - rho) log((high - rho) / (high - 1)).

    :param advantage: A = Q - mu, in units of the return
    :param lambda_: temperature, in the same units; towards 0 every ratio is a bound, above it steps are gradients
    :param low: c_l in [0, 1)
    :param high: c_h > 1
    :return: shape of ``advantage``
    """
    return low + (high - low) * th.sigmoid(advantage / lambda_ + _shift(low, high))


def median_loss(residual: th.Tensor, temperature: float, low: Number, high: Number) -> th.Tensor:
    """T ( softplus(x + b) - p x ), x = residual / T, b = log((1 - low) / (high - 1)), p = (1 - low) / (high - low).

    Its mean over actions is least at the mu for which the ratios of :func:`optimal_ratio` at temperature T have mean 1.
    For symmetric bounds it is T g(x) with g(x) = softplus(x) - x / 2 = log(2 cosh(x / 2)) (paper, section 4.3), which is
    least at the median of the returns for T -> 0 and at their mean for T -> infinity; for others at a quantile.

    :param residual: R - mu, in units of the return
    :return: elementwise, shape of ``residual``
    """
    x = residual / temperature
    return temperature * (softplus(x + _shift(low, high)) - (1.0 - low) / (high - low) * x)


def _shift(low: Number, high: Number) -> Number:
    odds = (1.0 - low) / (high - 1.0)
    return odds.log() if isinstance(odds, th.Tensor) else math.log(odds)


class BPOPolicy(NormalizedActorCriticPolicy):
    """Policy, value and median heads; the median head is a network on the latent code of the value."""

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        # Hidden sizes as the policy's, every layer orthogonal with gain 1 (authors' code).
        arch = self.net_arch
        sizes = [self.mlp_extractor.latent_dim_vf, *(arch.get("pi", []) if isinstance(arch, dict) else arch)]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), self.activation_fn()]
        self.median_net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        if self.ortho_init:
            self.median_net.apply(lambda module: self.init_weights(module, gain=1.0))
        rate = lr_schedule(1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=rate, **self.optimizer_kwargs)  # type: ignore[call-arg]

    def evaluate_with_median_at(self, observations: Any) -> tuple[Any, th.Tensor, th.Tensor]:
        """pi(. | s), V(s) and mu(s), (B,) each, at standardised observations (B, *obs)."""
        latent_pi, latent_vf = self._latents_at(observations)
        distribution = self._get_action_dist_from_latent(latent_pi)
        return distribution, self.value_net(latent_vf).flatten(), self.median_net(latent_vf).flatten()


class BPOCnnPolicy(ForImages, BPOPolicy):
    """The policy for images."""


class BPOMultiInputPolicy(ForDicts, BPOPolicy):
    """The policy for dict observations."""


class BPO(MinibatchAgent):
    """Bounded Policy Optimization.

    Policy improvement under bounded ratios, 1 - eps <= pi / pi_0 <= 1 + eps, has an exact optimum with monotone
    improvement, rho* = 1 + eps tanh((Q - mu) / (2 lambda)) with mu near the median of Q. BPO regresses the ratio to it,
        L_P = mean[ (|R - V| + alpha) |rho - rho*| ],
    from both sides: PPO's clipped loss is the same with the samples that have passed their target left alone.

    Advantages are not normalised: lambda and the weight are in units of the return. With lambda = 0.001 and returns of
    size 1 and more, rho* is 1 +- eps for practically every sample; lambda = 10 (the authors' Hopper) is a soft setting.

    :param policy: MlpPolicy, CnnPolicy, MultiInputPolicy or a class derived from :class:`BPOPolicy`
    :param env: environment, vector environment or registered id; Box, Discrete, MultiDiscrete or MultiBinary actions
    :param learning_rate: Adam's, or a schedule of the remaining progress (1 to 0)
    :param n_steps: steps per environment and iteration
    :param batch_size: samples a gradient step
    :param n_epochs: passes over the rollout
    :param gamma: discount
    :param gae_lambda: trade-off of bias and variance in the returns R (the lambda-returns, GAE + V)
    :param clip_range: eps, or a schedule
    :param ratio_bounds: (c_l, c_h) in place of 1 -+ eps, 0 <= c_l < 1 < c_h; (0, 1 / kappa) refits the best kappa of the
        actions, as the cross-entropy method does
    :param lambda_: temperature of the optimum, in units of the return
    :param median_temperature: temperature of the loss of mu. 1.0 is the authors' code, which finds a median only where
        returns spread by much more than 1, else nearly their mean; "lambda" is what the theory needs for ratios of mean 1
    :param use_median: False takes V in place of mu, and leaves the median head at its initial weights (authors' code)
    :param tv_coef: alpha, weight of the plain total variation; 0 in the paper's experiments
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss
    :param median_coef: weight of the loss of mu
    :param max_grad_norm: global norm to which gradients are clipped
    :param normalize_observations: running moments of vector observations, inside the policy (the authors have none)
    :param time_limits: "correct" bootstraps at time limits (as the authors' code), "paper" does not
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
        "MlpPolicy": BPOPolicy,
        "CnnPolicy": BPOCnnPolicy,
        "MultiInputPolicy": BPOMultiInputPolicy,
    }
    policy: BPOPolicy

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
        clip_range: float | Schedule = 0.3,
        ratio_bounds: tuple[float, float] | None = None,
        lambda_: float = 0.001,
        median_temperature: float | str = 1.0,
        use_median: bool = True,
        tv_coef: float = 0.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        median_coef: float = 0.5,
        max_grad_norm: float = 1.0,
        normalize_observations: bool = False,
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
        if not lambda_ > 0.0:
            raise ValueError(f"lambda_ is a temperature in units of the return and must be positive, not {lambda_}.")
        if isinstance(clip_range, (int, float)) and not 0.0 < clip_range <= 1.0:
            raise ValueError(f"clip_range (eps) must lie in (0, 1], so that ratios stay positive, not {clip_range}.")
        if ratio_bounds is not None and not 0.0 <= ratio_bounds[0] < 1.0 < ratio_bounds[1]:
            raise ValueError(
                f"ratio_bounds must straddle 1, the ratio of an unchanged policy, and not be {tuple(ratio_bounds)}: "
                "choose 0 <= c_l < 1 < c_h."
            )
        if median_temperature != "lambda" and not (isinstance(median_temperature, (int, float)) and median_temperature > 0.0):
            raise ValueError(f"median_temperature must be 'lambda' or a positive number, not {median_temperature!r}.")
        self.clip_range, self.ratio_bounds, self.lambda_ = clip_range, ratio_bounds, lambda_
        self.median_temperature, self.use_median = median_temperature, use_median
        self.tv_coef, self.median_coef = tv_coef, median_coef
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
            normalize_rewards=False,
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
        normalizer = unwrap_vec_normalize(self.env) if self.env is not None else None
        if isinstance(normalizer, VecNormalize) and normalizer.norm_reward:
            warnings.warn(
                f"VecNormalize rescales the rewards, so lambda_={self.lambda_} is no longer in units of the env's return: "
                "wrap with norm_reward=False, or choose lambda_ for returns of size 1.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ the paper's equations

    def schedules(self) -> dict[str, float]:
        """The bounds of the ratio at this point of the training."""
        if self.ratio_bounds is not None:
            low, high = self.ratio_bounds
        else:
            eps = min(max(FloatSchedule(self.clip_range)(self._current_progress_remaining), LEAST_CLIP_RANGE), 1.0)
            low, high = 1.0 - eps, 1.0 + eps
        return {"lowest_ratio": float(low), "highest_ratio": float(high)}

    def target_ratio(self, returns: th.Tensor, baseline: th.Tensor, batch: Batch) -> th.Tensor:
        """rho*_hat = :func:`optimal_ratio` of R - mu (or R - V), constant; eq. 16.

        :param returns: R (B,)
        :param baseline: mu, or V without the median (B,)
        """
        return optimal_ratio(returns - baseline.detach(), self.lambda_, batch["lowest_ratio"], batch["highest_ratio"])

    def policy_loss(
        self, ratio: th.Tensor, target: th.Tensor, returns: th.Tensor, values: th.Tensor
    ) -> th.Tensor:
        """L_P = mean[ (|R - V| + alpha) |rho - rho*| ]; eq. 16, the advantage-weighted total variation.

        The weight has the mean advantage, the target the median one: the two may differ in sign, which follows from the
        formula. Only rho carries a gradient.

        :param ratio: rho (B,)
        :param target: rho*_hat (B,)
        """
        weight = (returns - values.detach()).abs() + self.tv_coef
        return (weight * (ratio - target).abs()).mean()

    def value_loss(self, values: th.Tensor, returns: th.Tensor) -> th.Tensor:
        """mean (R - V)^2, neither clipped nor halved (authors' code)."""
        return (returns - values).square().mean()

    def median_loss(self, medians: th.Tensor, returns: th.Tensor, batch: Batch) -> th.Tensor:
        """mean of :func:`median_loss` of R - mu at ``median_temperature``; section 4.3."""
        temperature = self.lambda_ if self.median_temperature == "lambda" else float(self.median_temperature)
        return median_loss(returns - medians, temperature, batch["lowest_ratio"], batch["highest_ratio"]).mean()

    def loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """L_P + c_v L_V + c_u L_mu - c_e H; V and mu are those of this minibatch's networks (authors' code)."""
        returns = batch["returns"]
        distribution, values, medians = self.policy.evaluate_with_median_at(batch["observations"])
        ratio = th.exp(distribution.log_prob(batch["actions"]) - batch["old_log_prob"])
        target = self.target_ratio(returns, medians if self.use_median else values, batch)
        policy_loss = self.policy_loss(ratio, target, returns, values)
        value_loss = self.value_loss(values, returns)
        loss = policy_loss + self.vf_coef * value_loss
        info = {"policy_gradient_loss": policy_loss, "value_loss": value_loss, "loss": loss}
        if self.use_median:
            info["median_loss"] = self.median_loss(medians, returns, batch)
            info["loss"] = loss = loss + self.median_coef * info["median_loss"]
        if self.ent_coef:
            info["loss"] = loss = loss - self.ent_coef * distribution.entropy().mean()
        return loss, info

    def trust_region(self, ratio: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """mean |rho - 1|, twice the total variation from pi_0, beside the wider of the two bounds."""
        bounds = self.schedules()
        widest = max(1.0 - bounds["lowest_ratio"], bounds["highest_ratio"] - 1.0)
        return (ratio - 1.0).abs().mean(), th.tensor(widest, device=ratio.device)
