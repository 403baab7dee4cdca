"""Mirror Descent Policy Optimization, on-policy (Tomar et al., ICLR 2022, arXiv 2005.09814).

Where the paper and the authors' code differ, the comment says which is followed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from .common.divergences import bregman
from .common.on_policy import OnPolicyAgent
from .common.policies import ForDicts, ForImages, NormalizedActorCriticPolicy
from .common.updates import Batch, Update, side_by_side


class MDPOPolicy(NormalizedActorCriticPolicy):
    """Policy and value network without common parameters, each with its own Adam."""

    value_optimizer: th.optim.Optimizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.setdefault("share_features_extractor", False):
            raise ValueError(
                "MDPO improves policy and value with two optimisers, so they cannot share a features extractor: "
                "leave share_features_extractor=False."
            )
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        value_modules = (self.vf_features_extractor, self.mlp_extractor.value_net, self.value_net)
        value_parameters = [p for module in value_modules for p in module.parameters()]
        of_value = {id(p) for p in value_parameters}
        policy_parameters = [p for p in self.parameters() if id(p) not in of_value]
        rate = lr_schedule(1)
        self.optimizer = self.optimizer_class(policy_parameters, lr=rate, **self.optimizer_kwargs)  # type: ignore[call-arg]
        # The value's Adam has eps 1e-8 in the authors' code, the policy's SB3's 1e-5.
        value_kwargs = {k: v for k, v in self.optimizer_kwargs.items() if k != "eps"}
        self.value_optimizer = self.optimizer_class(value_parameters, lr=rate, **value_kwargs)  # type: ignore[call-arg]


class MDPOCnnPolicy(ForImages, MDPOPolicy):
    """The policy for images."""


class MDPOMultiInputPolicy(ForDicts, MDPOPolicy):
    """The policy for dict observations."""


def annealed_step_size(iteration: int, n_iterations: int) -> float:
    """t_k = 1 - (k - 1) / n for k = 0 .. n: from 1 + 1/n down to 1/n, never 0 (authors' code; the paper says 1 to 0)."""
    return 1.0 - (iteration - 1) / n_iterations


class MDPO(OnPolicyAgent):
    """Mirror Descent Policy Optimization (on-policy).

    Each iteration takes ``policy_steps`` gradient steps, each on the whole rollout, on the mirror-descent objective
        Psi(theta) = E_{s,a ~ pi_k}[ pi_theta(a|s) / pi_k(a|s) A_k(s, a) ] - (1 / t_k) E_s[ B(pi_theta, pi_k)(s) ]
    where B is KL(pi_theta || pi_k) - new first, the opposite of TRPO's - or its Tsallis generalisation, and the step
    size t_k is annealed over the training. No ratio clipping, no line search, no entropy bonus.

    The defaults are the paper's "loaded" setting: 2048 samples an iteration when one environment is used (with
    several, keep ``n_steps * n_envs = 2048``, as the presets do).

    :param policy: MlpPolicy, CnnPolicy, MultiInputPolicy or a class derived from :class:`MDPOPolicy`
    :param env: environment, vector environment or registered id; any observation space of SB3; Box, Discrete,
        MultiDiscrete or MultiBinary actions
    :param learning_rate: Adam's, policy and value alike; constant in the authors' code (the paper lists annealing)
    :param n_steps: steps per environment and iteration
    :param policy_steps: m, gradient steps on the policy per iteration; m = 1 is vanilla policy gradient
    :param value_epochs: passes over the rollout for the value network
    :param value_batch_size: minibatch of the value network; a last partial one is dropped
    :param step_size: t_k: "annealed" (see :func:`annealed_step_size`), or a constant
    :param tsallis_q: order q in [1, 2] of the Bregman divergence; 1 is KL. Orders above 1 are not in the paper's
        on-policy experiments: the divergence is exact here, per action dimension (the authors' code has a sampled
        form without importance weights, whose sign at q = 1 is that of -KL(old || new), and is not followed)
    :param gamma: discount
    :param gae_lambda: trade-off of bias and variance in the advantages
    :param clip_range_vf: the value moves at most this far from its old prediction per iteration; None: no limit
    :param max_grad_norm: global norm to which the policy's gradient is clipped
    :param normalize_observations: running moments of vector observations, inside the policy
    :param normalize_rewards: rewards divided by the running std of the discounted return
    :param time_limits: "correct" bootstraps at time limits, "paper" does not (as the authors' code)
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
        "MlpPolicy": MDPOPolicy,
        "CnnPolicy": MDPOCnnPolicy,
        "MultiInputPolicy": MDPOMultiInputPolicy,
    }
    policy: MDPOPolicy

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        policy_steps: int = 10,
        value_epochs: int = 5,
        value_batch_size: int = 128,
        step_size: float | str = "annealed",
        tsallis_q: float = 1.0,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range_vf: float | None = 0.2,
        max_grad_norm: float = 0.5,
        normalize_observations: bool = True,
        normalize_rewards: bool = True,
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
        if policy_steps < 1:
            raise ValueError(f"policy_steps (m) must be at least 1, not {policy_steps}.")
        if not 1.0 <= tsallis_q <= 2.0:
            raise ValueError(f"tsallis_q must lie in [1, 2] (1 is KL), not {tsallis_q}.")
        if step_size != "annealed" and not (isinstance(step_size, (int, float)) and step_size > 0.0):
            raise ValueError(f"step_size must be 'annealed' or a positive number, not {step_size!r}.")
        self.policy_steps = policy_steps
        self.value_epochs = value_epochs
        self.value_batch_size = value_batch_size
        self.step_size = step_size
        self.tsallis_q = tsallis_q
        self.clip_range_vf = clip_range_vf
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            max_grad_norm=max_grad_norm,
            normalize_observations=normalize_observations,
            normalize_rewards=normalize_rewards,
            time_limits=time_limits,
            compile_loss=compile_loss,
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
        samples = self.n_steps * self.n_envs
        if self.env is not None and samples < self.value_batch_size:
            raise ValueError(
                f"An iteration has n_steps * n_envs = {samples} samples, fewer than value_batch_size="
                f"{self.value_batch_size}: collect more steps or lower value_batch_size."
            )
        super()._setup_model()
        optimizer, of_value = self.policy.optimizer, self.policy.value_optimizer
        network, compiled = self.policy, self.compile_loss
        self.policy_update = Update(self.policy_loss, optimizer, None, self.max_grad_norm, network, compiled)
        self.value_update = Update(self.value_loss, of_value, self.value_batch_size, None, network, compiled)

    # ------------------------------------------------------------------ the paper's equations

    def current_step_size(self) -> float:
        """t_k of the iteration whose rollout was just collected."""
        if self.step_size != "annealed":
            return float(self.step_size)
        samples = self.n_steps * self.n_envs
        iteration = self.num_timesteps // samples - 1
        return annealed_step_size(iteration, max(1, self._total_timesteps // samples))

    def policy_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """-Psi(theta) = -( mean[ ratio A ] - mean[ B(pi_theta, pi_k) ] / t_k ); paper section 4, on-policy objective.

        :param batch: observations (B, *obs) standardised, actions (B, *act) unclipped, advantages (B,) normalised,
            old, the parameters of pi_k at the observations, old_log_prob = log pi_k(actions) (B,), step_size t_k
        :return: scalar loss and its terms
        """
        new = self.policy.distribution_at(batch["observations"])
        old = self.policy.action_dist.proba_distribution(**batch["old"])
        ratio = th.exp(new.log_prob(batch["actions"]) - batch["old_log_prob"])
        surrogate = (ratio * batch["advantages"]).mean()
        divergence = bregman(new, old, self.tsallis_q).mean()
        loss = -(surrogate - divergence / batch["step_size"])
        return loss, {"policy_gradient_loss": -surrogate, "trust_region": divergence, "loss": loss}

    def value_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """mean max((V - R)^2, (V_clip - R)^2), V_clip = V_old + clip(V - V_old, -c, c); no factor 1/2 (authors' code).

        :param batch: observations (B, *obs) standardised, old_values V_old (B,), returns R = A + V_old (B,)
        """
        values, old, returns = self.policy.values_at(batch["observations"]), batch["old_values"], batch["returns"]
        error = (values - returns).square()
        if self.clip_range_vf is not None:
            clipped = old + (values - old).clamp(-self.clip_range_vf, self.clip_range_vf)
            error = th.maximum(error, (clipped - returns).square())
        loss = error.mean()
        return loss, {"value_loss": loss}

    # ------------------------------------------------------------------ one iteration

    def train(self) -> None:
        """m full-batch steps on the policy, then minibatch epochs on the value network; old policy and values fixed."""
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.policy.optimizer, self.policy.value_optimizer])
        batch = self._rollout_batch()
        of_value = {key: batch[key] for key in ("observations", "old_values", "returns")}
        of_policy, info = side_by_side(
            lambda: self._improve_policy(batch),
            lambda: self.value_update.run(of_value, self.value_epochs),
            threads=self.device.type == "cpu" and not self.compile_loss,
        )
        self._n_updates += self.policy_steps
        info["value_grad_norm"] = info.pop("grad_norm")
        self._record_update(of_policy | info, batch)

    def _improve_policy(self, batch: Batch) -> dict[str, th.Tensor]:
        advantages = batch["advantages"]
        with th.no_grad():
            mirror = {
                "observations": batch["observations"],
                "actions": batch["actions"],
                # The authors divide by the bare standard deviation; the epsilon only keeps a constant batch from being NaN.
                "advantages": (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8),
                "old": self.policy.distribution_at(batch["observations"]).parameters,
                "old_log_prob": batch["old_log_prob"],
                "step_size": th.tensor(self.current_step_size(), device=self.device),
            }
        norm = self.policy_update.run(mirror, self.policy_steps)["grad_norm"]
        with th.no_grad():
            _, info = self.policy_loss(mirror)
        # A mirror step improves Psi, so the divergence it may spend is t_k times the surrogate gain (Psi(pi_k) = 0).
        bound = -info["policy_gradient_loss"] * mirror["step_size"]
        return {**info, "trust_region_bound": bound, "step_size": mirror["step_size"], "grad_norm": norm}

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*names, "policy.value_optimizer"], variables
