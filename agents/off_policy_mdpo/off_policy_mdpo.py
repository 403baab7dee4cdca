"""Mirror Descent Policy Optimization, off-policy (Tomar et al., ICLR 2022, arXiv 2005.09814).

With c = 1 / t_k, entropy weight lambda and the q-logarithm lq = ln_{2-q} (log at q = 1), an actor step minimises
    E_{s ~ D, a ~ pi}[ c lq pi(a|s) + q (lambda - c) lq pi_k(a|s) - Q_1(s, a) ]
where pi_k is an anchor, refreshed every ``anchor_interval`` env steps. c = lambda removes the anchor: SAC's loss.
The paper gives the unregularised form; the soft one is derived, and is what the authors' code computes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import polyak_update
from torch.nn import functional as F

from ..common.divergences import log_q
from ..common.finite import check_finite_info
from ..common.off_policy import OffPolicyAgent
from .policies import (
    MLP,
    MDPOActor,
    OffPolicyMDPOCnnPolicy,
    OffPolicyMDPOMultiInputPolicy,
    OffPolicyMDPOPolicy,
)

DENSITY_FLOOR = 1e-6


def squashed_log_density(u: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """log density of a = tanh(u), u ~ N(mean, std^2), per dimension; shape of ``u``.

    The two small constants are those of the authors' code, and so is the clip of the Jacobian, which passes
    gradients straight through.
    """
    normal = -0.5 * (((u - mean) / (log_std.exp() + 1e-6)).square() + 2.0 * log_std + math.log(2.0 * math.pi))
    jacobian = 1.0 - u.tanh().square()
    jacobian = jacobian + (jacobian.clamp(0.0, 1.0) - jacobian).detach()
    return normal - (jacobian + 1e-6).log()


def floored_log_q(log_density: th.Tensor, q: float) -> th.Tensor:
    """ln_{2-q}(max(x, 1e-6)) of densities given by their logarithm: no gradient below the floor (authors' code)."""
    log_density = log_density.clamp(min=math.log(DENSITY_FLOOR))
    return log_density if q == 1.0 else th.expm1((q - 1.0) * log_density) / (q - 1.0)


class OffPolicyMDPO(OffPolicyAgent):
    """Mirror Descent Policy Optimization (off-policy), with the V-network critic of the authors' code.

    :param policy: MlpPolicy, CnnPolicy, MultiInputPolicy or a class derived from :class:`OffPolicyMDPOPolicy`
    :param env: environment, vector environment or registered id; Box or Discrete actions
    :param learning_rate: of both Adams
    :param buffer_size: transitions in the replay buffer
    :param learning_starts: uniformly random env steps before the first update
    :param batch_size: transitions per update
    :param tau: of the Polyak average that makes the target value network
    :param gamma: discount
    :param train_freq: env steps between training calls
    :param gradient_steps: updates per training call
    :param step_size: t_k, the Bregman step size, constant; the authors' ``klcoeff`` is 1 / step_size
    :param ent_coef: lambda, the weight of the MDP's entropy, fixed; step_size * ent_coef = 1 is SAC's actor loss
    :param anchor_interval: m, env steps between refreshes of the anchor pi_k
    :param tsallis_q: order q in [1, 2] of entropy and divergence alike; 1 is Shannon and KL. For boxes the q-logarithm
        is taken per action dimension and summed, as in the authors' code (the joint one only at q = 1)
    :param behaviour: "stochastic", or "deterministic" as the authors' released file, which explores only by the
        random first steps and by the change of the policy
    :param regularization: weight of mean(mu^2) + mean(log_std^2) in the actor loss (authors' code; boxes only)
    :param action_noise: added to actions while collecting
    :param replay_buffer_class: as in SB3
    :param replay_buffer_kwargs: as in SB3
    :param optimize_memory_usage: as in SB3
    :param use_sde: not supported, must be False
    :param stats_window_size: episodes that ``rollout/ep_rew_mean`` averages
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    :raises ValueError: for an argument outside its range, in one sentence
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": OffPolicyMDPOPolicy,
        "CnnPolicy": OffPolicyMDPOCnnPolicy,
        "MultiInputPolicy": OffPolicyMDPOMultiInputPolicy,
    }
    policy: OffPolicyMDPOPolicy
    actor: MDPOActor
    critic: MLP

    def __init__(
        self,
        policy: str | type[OffPolicyMDPOPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 10_000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        step_size: float = 1.0,
        ent_coef: float = 0.2,
        anchor_interval: int = 1000,
        tsallis_q: float = 1.0,
        behaviour: str = "stochastic",
        regularization: float = 1e-3,
        action_noise: Any = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        use_sde: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if use_sde:
            raise ValueError("OffPolicyMDPO has no state-dependent exploration (gSDE): leave use_sde=False.")
        if not 1.0 <= tsallis_q <= 2.0:
            raise ValueError(f"tsallis_q must lie in [1, 2] (1 is KL), not {tsallis_q}.")
        if not step_size > 0.0 or not ent_coef >= 0.0 or step_size * ent_coef > 1.0 + 1e-9:
            raise ValueError(
                f"A mirror step needs step_size > 0, ent_coef >= 0 and step_size * ent_coef <= 1 (SAC is at 1), "
                f"not step_size={step_size} and ent_coef={ent_coef}."
            )
        if behaviour not in ("stochastic", "deterministic"):
            raise ValueError(f"behaviour must be 'stochastic' or 'deterministic', not {behaviour!r}.")
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            support_multi_env=True,
            sde_support=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete),
        )
        self.step_size = step_size
        self.ent_coef = ent_coef
        self.anchor_interval = anchor_interval
        self.tsallis_q = tsallis_q
        self.behaviour = behaviour
        self.regularization = regularization
        self._anchor_period = 0
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self.actor, self.critic = self.policy.actor, self.policy.critic

    # ------------------------------------------------------------------ the paper's equations

    def actor_loss(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """mean[ c lq pi(a) + q (lambda - c) lq pi_k(a) - Q_1(s, a) ], reparameterised (Box) or an exact sum (Discrete).

        Gradient flows through a into both densities and Q_1; the parameters of pi_k and Q_1 are fixed. Q_1 alone is
        used, min(Q_1, Q_2) only in the value target (authors' code).

        :param observations: (B, *obs)
        :return: scalar loss; y_V (B,) = E_a[ min(Q_1, Q_2) - lambda lq pi ], the target of the value network, from the
            same sample and the actor before its step; terms for the log
        """
        terms = self._discrete_terms if self.actor.discrete else self._box_terms
        lq, lq_anchor, q1, q_min, regularizer = terms(observations)
        c = 1.0 / self.step_size
        loss = (c * lq + self.tsallis_q * (self.ent_coef - c) * lq_anchor - q1).mean() + self.regularization * regularizer
        value_target = (q_min - self.ent_coef * lq).detach()
        return loss, value_target, {"actor_loss": loss, "entropy": -lq.mean()}

    def _box_terms(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        """Per-sample lq pi(a), lq pi_k(a), Q_1, min(Q_1, Q_2), (B,) each, and mean(mu^2) + mean(log_std^2)."""
        mean, log_std = self.actor.mean_and_log_std(observations)
        u = mean + log_std.exp() * th.randn_like(mean)
        actions = th.tanh(u)
        lq = floored_log_q(squashed_log_density(u, mean, log_std), self.tsallis_q).sum(dim=1)
        lq_anchor = self._anchor_log_q(observations, u, self.tsallis_q)
        q1, q2 = self._critic_without_gradient(observations, actions)
        q_min = th.minimum(q1.detach(), q2.detach())
        return lq, lq_anchor, q1, q_min, mean.square().mean() + log_std.square().mean()

    def _anchor_log_q(self, observations: PyTorchObs, u: th.Tensor, q: float) -> th.Tensor:
        """lq pi_k at the pre-tanh actions ``u`` (B, d), with gradient into ``u`` alone; (B,)."""
        with th.no_grad():
            mean, log_std = self.policy.anchor.mean_and_log_std(observations)
        return floored_log_q(squashed_log_density(u, mean, log_std), q).sum(dim=1)

    def _critic_without_gradient(self, observations: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Q_1 and Q_2 (B,), with gradient into the actions but not into the critics."""
        self.critic.requires_grad_(False)
        q1, q2 = (q.flatten() for q in self.critic(observations, actions))
        self.critic.requires_grad_(True)
        return q1, q2

    def _discrete_terms(self, observations: PyTorchObs) -> tuple[th.Tensor, ...]:
        """The same quantities as exact expectations over actions (derived; the authors' code has boxes only)."""
        log_p = F.log_softmax(self.actor.logits(observations), dim=-1)
        p = log_p.exp()
        with th.no_grad():
            p_anchor = F.softmax(self.policy.anchor.logits(observations), dim=-1).clamp(min=DENSITY_FLOOR)
            q1, q2 = self.critic(observations)
        lq_actions = log_p if self.tsallis_q == 1.0 else log_q(p, self.tsallis_q)
        lq, lq_anchor = (p * lq_actions).sum(-1), (p * log_q(p_anchor, self.tsallis_q)).sum(-1)
        q_min = (p.detach() * th.minimum(q1, q2)).sum(-1)
        return lq, lq_anchor, (p * q1).sum(-1), q_min, th.zeros((), device=self.device)

    def critic_loss(self, replay: Any, value_target: th.Tensor) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """1/2 [ (Q_1 - y_Q)^2 + (Q_2 - y_Q)^2 + (V - y_V)^2 ], means over the batch.

        y_Q = r + gamma (1 - terminated) V_target(s'); time limits bootstrap.

        :param replay: samples of the replay buffer
        :param value_target: y_V (B,), constant
        """
        with th.no_grad():
            next_value = self.policy.value_target(replay.next_observations)[0]
            target = (replay.rewards + (1.0 - replay.dones) * self.gamma * next_value).flatten()
        if self.actor.discrete:
            q1, q2 = (q.gather(1, replay.actions.long()).flatten() for q in self.critic(replay.observations))
        else:
            q1, q2 = (q.flatten() for q in self.critic(replay.observations, replay.actions))
        value = self.policy.value(replay.observations)[0].flatten()
        q_loss = 0.5 * (F.mse_loss(q1, target) + F.mse_loss(q2, target))
        value_loss = 0.5 * F.mse_loss(value, value_target)
        return q_loss + value_loss, {"critic_loss": q_loss, "value_loss": value_loss, "q_mean": q1.mean()}

    # ------------------------------------------------------------------ training

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """``gradient_steps`` updates: actor, critics, target; then the anchor where its period has passed."""
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        for _ in range(gradient_steps):
            replay = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            actor_loss, value_target, info = self.actor_loss(replay.observations)
            self._step(self.actor.optimizer, actor_loss, info, replay._asdict())
            critic_loss, critic_info = self.critic_loss(replay, value_target)
            self._step(self.critic.optimizer, critic_loss, critic_info, replay._asdict())
            polyak_update(self.policy.value.parameters(), self.policy.value_target.parameters(), self.tau)
        self._n_updates += gradient_steps
        # The authors refresh the anchor at the end of every env step (counted from 0) that m divides.
        period = (self.num_timesteps - 1) // self.anchor_interval
        if period > self._anchor_period:
            self._record_update({**info, **critic_info, **self.trust_region(replay.observations)})
            self.policy.sync_anchor()
            self._anchor_period = period

    @th.no_grad()
    def trust_region(self, observations: PyTorchObs) -> dict[str, th.Tensor]:
        """How far the policy went from its anchor, and how far the mirror step lets it go.

        The size is D = E_pi[log pi - log pi_k], the bound t ( E_pi[f] - E_{pi_k}[f] ) with f = Q_1 - lambda log pi_k:
        a policy whose loss is below the anchor's keeps D below it (derived, exact for q = 1 without regulariser).
        """
        critic, actor, anchor = self.critic, self.actor, self.policy.anchor
        if self.actor.discrete:
            log_p = F.log_softmax(actor.logits(observations), dim=-1)
            log_anchor = F.log_softmax(anchor.logits(observations), dim=-1)
            f = critic(observations, first=True)[0] - self.ent_coef * log_anchor
            size = (log_p.exp() * (log_p - log_anchor)).sum(-1).mean()
            gain = ((log_p.exp() - log_anchor.exp()) * f).sum(-1).mean()
            return {"trust_region": size, "trust_region_bound": self.step_size * gain}
        means = []
        for policy in (actor, anchor):
            mean, log_std = policy.mean_and_log_std(observations)
            u = mean + log_std.exp() * th.randn_like(mean)
            log_anchor = self._anchor_log_q(observations, u, 1.0)
            f = critic(observations, u.tanh(), first=True)[0].flatten() - self.ent_coef * log_anchor
            size = floored_log_q(squashed_log_density(u, mean, log_std), 1.0).sum(dim=1) - log_anchor
            means.append((size.mean(), f.mean()))
        (size, f_new), (_, f_anchor) = means
        return {"trust_region": size, "trust_region_bound": self.step_size * (f_new - f_anchor)}

    def _record_update(self, info: dict[str, th.Tensor]) -> None:
        """Log the terms of one update: once an anchor period, so that the inner loop never waits for the device."""
        numbers = check_finite_info(info, self.num_timesteps)
        self._ask_guards()
        for key, value in numbers.items():
            self.logger.record(f"train/{key}", value)
        self.logger.record("train/step_size", self.step_size)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # ------------------------------------------------------------------ experience

    def _sample_action(self, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> tuple[Any, Any]:
        if self.behaviour == "stochastic" or self.num_timesteps < learning_starts:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        action, _ = self.predict(self._last_obs, deterministic=True)  # type: ignore[arg-type]
        return action, self.policy.scale_action(action) if isinstance(self.action_space, spaces.Box) else action

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "critic"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []
