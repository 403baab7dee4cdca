"""GIRL: imagination that knows its drift (arXiv 2604.07426), on a DreamerV3 world model.

Only the paper's abstract and digests of its body could be read. Verified by digests: a frozen embedding enters the prior
through a gated residual; a consistency loss of weight 0.1; beta as the dual variable of a bound on the drift KL(q || p);
the bound's start (mean drift of the first 10^4 steps), and that information gain raises it and performance loss lowers
it; an ensemble of 5; the masked state autoencoder for vectors. The formulas of all these complete it and are not
verified; each docstring says so. The world model and the behaviour are those of NM512/dreamerv3-torch, and
``grounding=None, trust_region=False, ensemble_members=0`` is that DreamerV3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from ..common.acceleration import CapturedCall, CompiledCall
from ..common.finite import check_finite_info
from ..common.meter import Meter
from ..common.off_policy import OffPolicyAgent
from ..common.ranges import require_above_zero, require_at_least, require_shares
from ..common.threads import threads_for, use_threads
from .drift import CONTEXT, Dream, Drift, Episode, dream, measure_drift
from .imagination import actor_loss, critic_loss, imagine
from .masked_autoencoder import RATE
from .networks import bernoulli_loss
from .normalized import normalized, scaled
from .policy import Belief, GIRLPolicy
from .replay import Batch, SequenceReplay
from .rssm import Filtered, State
from .signals import MASKED_AUTOENCODER, NAMES, Signals

DYNAMICS, REPRESENTATION = 0.5, 0.1  # weights of the two halves of the balanced KL (NM512)
FREE_NATS = 1.0
INDICES = ("causal", "literal")
PRECISIONS = ("auto", "float32", "bfloat16")
BEHAVIOUR = ("actor_optimizer", "critic_optimizer")
NEWEST = 1000  # steps that the performance loss looks at

Info = dict[str, th.Tensor]


class GIRL(OffPolicyAgent):
    """A DreamerV3 world model with grounding, an adaptive trust region on its drift, and the agent that learns inside it.

    :param policy: MlpPolicy, CnnPolicy or MultiInputPolicy; what the world model sees follows from the space
    :param env: environment, vector environment or registered id; Box or Discrete actions
    :param learning_rate: of the world model and the ensemble
    :param behaviour_learning_rate: of actor and critic
    :param buffer_size: rows of the replay memory
    :param learning_starts: uniformly random env steps before the first update
    :param pretrain_updates: updates at once after these
    :param batch_size: B, sequences per update
    :param batch_length: T, steps of a sequence
    :param train_ratio: replayed steps per env step: an update follows every B T / train_ratio of these
    :param horizon: H, imagined steps (NM512's 15 counts the state where they start: 14 steps)
    :param gamma: discount
    :param lambda_: of the returns
    :param entropy_coef: weight of the actor's entropy
    :param slow_critic_fraction: how far the slow critic follows the critic at an update
    :param grounding: the frozen encoder: "masked-autoencoder" for vectors; "efficientnet-lite0", "dinov2-small",
        "dinov2-base" or "random" (the control) for pictures; None; "auto" is the first, for pictures alone the second
    :param encoder_weights: folder of a DINOv2 model, as ``save_pretrained`` writes it
    :param distill: a student learns to give c, and takes the place of the pictures' encoder where it can (GIRL-Distill)
    :param distill_interval: updates between two of the student
    :param grounding_index: "causal": the prior of z_t sees c_{t-1}, and where nothing is observed f_psi(z_{t-1}); "literal":
        it sees c_t, which is made of o_t, so that the KL falls without better dynamics, and else f_psi of the likeliest z_t
    :param predicted_share: of a batch's sequences, rounded up, whose prior is trained on what imagination gives it, f_psi(z)
    :param consistency_coef: mu, weight of the consistency loss (digest: 0.1)
    :param encoder_updates: of the masked autoencoder's warm start
    :param trust_region: False: beta stays 1, free nats too, and there is no ensemble, which nothing would follow
    :param warmup_steps: env steps whose mean drift is delta_0, and before which beta is 1 (digest: 10^4)
    :param radius_interval: updates between two looks at information gain and performance loss
    :param beta_step_size: eta of the dual ascent
    :param beta_bounds: beta stays inside, from 1 on. Where the drift is below delta it falls, and lets the drift rise: with
        (1, 10) the region only ever adds to DreamerV3's weight of the KL
    :param tau_eig: how far the radius rises with the information gain
    :param tau_rpl: how far it falls with the performance loss
    :param ensemble_members: K; 0: no ensemble, and no part of the radius that follows it
    :param ensemble_interval: updates between two of the ensemble
    :param model_grad_norm: the world model's gradient is clipped to this norm
    :param behaviour_grad_norm: the same of actor and critic
    :param precision: "float32" or "bfloat16" for the networks' products; "auto" is the latter on a GPU
    :param compile_loss: run the two losses through ``torch.compile``, which takes minutes at first
    :param stats_window_size: episodes that ``rollout/ep_rew_mean`` averages
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of :class:`GIRLPolicy`
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    :raises ValueError: for an argument outside its range, in one sentence
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": GIRLPolicy, "CnnPolicy": GIRLPolicy, "MultiInputPolicy": GIRLPolicy,
    }  # fmt: skip
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "dreamerv3": {"grounding": None, "trust_region": False, "ensemble_members": 0},
        "no-grounding": {"grounding": None},
        "fixed-beta": {"beta_bounds": (1.0, 1.0)},  # free nats still follow delta, so that beta is all that differs
        "distill": {"distill": True, "distill_interval": 4, "ensemble_interval": 4},
    }
    captures: bool = True  # on a GPU an update is one CUDA graph
    policy: GIRLPolicy
    replay_buffer: SequenceReplay  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[GIRLPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        behaviour_learning_rate: float | Schedule = 3e-5,
        buffer_size: int = 1_000_000,
        learning_starts: int = 2500,
        pretrain_updates: int = 100,
        batch_size: int = 16,
        batch_length: int = 64,
        train_ratio: float = 512.0,
        horizon: int = 15,
        gamma: float = 0.997,
        lambda_: float = 0.95,
        entropy_coef: float = 3e-4,
        slow_critic_fraction: float = 0.02,
        grounding: str | None = "auto",
        encoder_weights: str | None = None,
        distill: bool = False,
        distill_interval: int = 1,
        grounding_index: str = "causal",
        predicted_share: float = 0.5,
        consistency_coef: float = 0.1,
        encoder_updates: int = 2000,
        trust_region: bool = True,
        warmup_steps: int = 10_000,
        radius_interval: int = 100,
        beta_step_size: float = 1e-3,
        beta_bounds: tuple[float, float] = (0.01, 10.0),
        tau_eig: float = 0.1,
        tau_rpl: float = 0.5,
        ensemble_members: int = 5,
        ensemble_interval: int = 1,
        model_grad_norm: float = 1000.0,
        behaviour_grad_norm: float = 100.0,
        precision: str = "auto",
        compile_loss: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        require_at_least(1, batch_size=batch_size, horizon=horizon, ensemble_interval=ensemble_interval)
        require_at_least(1, radius_interval=radius_interval, distill_interval=distill_interval)
        require_at_least(2, batch_length=batch_length)
        require_at_least(0, pretrain_updates=pretrain_updates, warmup_steps=warmup_steps, ensemble_members=ensemble_members)
        require_at_least(0, encoder_updates=encoder_updates, consistency_coef=consistency_coef, entropy_coef=entropy_coef)
        require_at_least(0, beta_step_size=beta_step_size, tau_eig=tau_eig, tau_rpl=tau_rpl)
        shares = {"gamma": gamma, "lambda_": lambda_, "slow_critic_fraction": slow_critic_fraction}
        require_shares(**shares, predicted_share=predicted_share)
        require_above_zero(
            train_ratio=train_ratio, model_grad_norm=model_grad_norm, behaviour_grad_norm=behaviour_grad_norm
        )
        low, high = _bounds(beta_bounds)
        if precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}.")
        if grounding_index not in INDICES:
            raise ValueError(f"grounding_index is one of {', '.join(INDICES)}, not {grounding_index!r}.")
        if grounding is not None and grounding not in NAMES:
            raise ValueError(f"grounding is one of {', '.join(NAMES)} or None, not {grounding!r}.")
        super().__init__(
            policy, env, learning_rate, buffer_size, learning_starts, batch_size, gamma=gamma, train_freq=1,
            gradient_steps=1, replay_buffer_class=SequenceReplay, policy_kwargs=policy_kwargs,  # type: ignore[arg-type]
            stats_window_size=stats_window_size, tensorboard_log=tensorboard_log, verbose=verbose, seed=seed, device=device,
            support_multi_env=True, sde_support=False, supported_action_spaces=(spaces.Box, spaces.Discrete),
        )  # fmt: skip
        for name in ("grounding", "embedding_dim", "distill", "literal", "ensemble_members"):
            if name in (policy_kwargs or {}):
                raise ValueError(f"{name} is an argument of the agent, and none of policy_kwargs.")
        self.behaviour_learning_rate = behaviour_learning_rate
        self.pretrain_updates, self.batch_length, self.train_ratio = pretrain_updates, batch_length, train_ratio
        self.horizon, self.lambda_, self.entropy_coef = horizon, lambda_, entropy_coef
        self.slow_critic_fraction = slow_critic_fraction
        self.grounding, self.grounding_index, self.predicted_share = grounding, grounding_index, predicted_share
        self.encoder_weights, self.distill, self.distill_interval = encoder_weights, distill, distill_interval
        self.consistency_coef = consistency_coef
        self.encoder_updates, self.trust_region, self.warmup_steps = encoder_updates, trust_region, warmup_steps
        self.radius_interval, self.beta_step_size, self.beta_bounds = radius_interval, beta_step_size, (low, high)
        self.tau_eig, self.tau_rpl = tau_eig, tau_rpl
        self.ensemble_members, self.ensemble_interval = ensemble_members if trust_region else 0, ensemble_interval
        self.model_grad_norm, self.behaviour_grad_norm = model_grad_norm, behaviour_grad_norm
        self.precision, self.compile_loss = precision, compile_loss
        self._debt = 0.0  # updates that are due
        self._warm = False  # whether delta_0 is set
        self._normalizes = False  # whether it learns from what a VecNormalize makes of observations
        self._belief: Belief | None = None
        self._meter = Meter()
        self._graphs: dict[tuple[bool, bool], CapturedCall] = {}
        self._phi_dim: int | None = None  # saved, so that a loaded agent acts without its encoder
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        discrete = isinstance(self.action_space, spaces.Discrete)
        action_dim = int(self.action_space.n) if discrete else spaces.flatdim(self.action_space)  # type: ignore[attr-defined]
        self.signals = Signals(self.grounding, self.encoder_weights, self.observation_space, self.device)
        if self.distill and self.signals.name in (None, MASKED_AUTOENCODER):
            raise ValueError(
                "A student (distill=True, GIRL-Distill) learns from an encoder of pictures: observe some, or leave it out."
            )
        if self._phi_dim is None:
            self._phi_dim = self.signals.width()
        self.replay_buffer_kwargs = {"action_dim": action_dim, "embedding_dim": self._phi_dim}
        own = self.policy_kwargs
        self.policy_kwargs = {
            **own, "grounding": self.signals.name, "embedding_dim": self._phi_dim, "distill": self.distill,
            "literal": self.grounding_index == "literal", "ensemble_members": self.ensemble_members,
        }  # fmt: skip
        super()._setup_model()
        self.policy_kwargs, self.signals.policy = own, self.policy
        self._check_room(self.replay_buffer)
        if self.env is not None:
            self._normalizes = self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs
        region = self.policy.trust_region
        region.step_size, region.bounds = self.beta_step_size, self.beta_bounds
        region.tau_eig, region.tau_rpl = self.tau_eig, self.tau_rpl
        self._behaviour_schedule = FloatSchedule(self.behaviour_learning_rate)
        rate, behaviour_rate = self.lr_schedule(1.0), self._behaviour_schedule(1.0)
        self.model_optimizer = self._adam(self.policy.model_parameters(), rate, 1e-8)
        self.actor_optimizer = self._adam(self.policy.actor.parameters(), behaviour_rate, 1e-5)
        self.critic_optimizer = self._adam(self.policy.critic.parameters(), behaviour_rate, 1e-5)
        if self.policy.ensemble is not None:
            self.ensemble_optimizer = self._adam(self.policy.ensemble.parameters(), rate, 1e-8)
        if self.policy.student is not None:
            self.student_optimizer = self._adam(self.policy.student.parameters(), rate, 1e-8)
        self._model_loss: Callable[[Batch], Any] = self.model_loss
        self._behaviour_losses: Callable[[Batch], Any] = self.behaviour_losses
        if self.compile_loss:
            self._model_loss, self._behaviour_losses = CompiledCall(self.model_loss), CompiledCall(self.behaviour_losses)

    def _check_room(self, memory: SequenceReplay) -> None:
        if memory.buffer_size < self.batch_length:
            raise ValueError(
                f"The replay memory has {memory.buffer_size} rows for each of {self.n_envs} environments, fewer than "
                f"batch_length={self.batch_length}: raise buffer_size, or lower batch_length."
            )

    @staticmethod
    def _adam(parameters: Iterable[th.nn.Parameter], rate: float, eps: float) -> th.optim.Adam:
        return th.optim.Adam(list(parameters), lr=rate, eps=eps, fused=True)

    # ------------------------------------------------------------------ the world model

    def conditions(self, c: th.Tensor | None, states: State, first: th.Tensor) -> th.Tensor | None:
        """What the prior of z_t is trained on: c of the step before (in literal mode of the same), but what imagination has
        in its place in ``predicted_share`` of the sequences, spread over the batch (proposal).

        A prior that only ever saw c leans on what it does not have in imagination. Not under no_grad: autocast may keep the
        short weights that it makes there, which have no gradient, for the consistency loss.
        """
        real, policy = self.policy.conditions(c, first), self.policy
        if real is None or not self.predicted_share:
            return real
        predicted = policy.imagined_condition(states.z, states.h)
        assert predicted is not None
        predicted = policy.conditions(predicted.detach().float(), first)
        chosen = self._with_prediction(first.shape[1]).unsqueeze(-1)
        return th.where(chosen, predicted, real)  # type: ignore[arg-type]

    def _with_prediction(self, sequences: int) -> th.Tensor:
        """Which of so many sequences have a prior that sees what imagination has in the place of c; bool."""
        upto = th.arange(sequences + 1, dtype=th.float64, device=self.device) * self.predicted_share
        return (upto - 1e-9).ceil().diff() > 0  # 50 times 0.3 is 15 and a last bit

    def observe(self, batch: Batch) -> Filtered:
        """Filter a batch of sequences, with its noise."""
        embeddings = self.policy.encoder(batch["observations"])
        return self.policy.rssm.observe(embeddings, batch["actions"], batch["first"], batch["noise"])

    def kl_loss(self, posterior: th.Tensor, prior: th.Tensor) -> tuple[th.Tensor, Info]:
        """mean( 0.5 max(free, KL(sg q || p)) + 0.1 max(free, KL(q || sg p)) ), the maximum of each element (NM512).

        free is 1 nat; in the trust region min(1, delta / 2), since a KL below it has no gradient (proposal).

        :return: the loss, and the drift, which is the mean of the KL without the maximum
        """
        latent = self.policy.latent
        free = self.policy.trust_region.free_nats if self.trust_region else FREE_NATS
        dynamics = latent.kl(posterior.detach(), prior)
        representation = latent.kl(posterior, prior.detach())
        loss = (DYNAMICS * dynamics.clamp(min=free) + REPRESENTATION * representation.clamp(min=free)).mean()
        return loss, {"trust_region": dynamics.detach().mean()}

    def model_loss(self, batch: Batch) -> tuple[th.Tensor, Info, Filtered]:
        """L = -log p(o|s) - log p(r|s) - log p(g|s) + beta KL + mu L_cm, means over the batch.

        The first three and the KL are NM512's; beta and mu from digests of the paper.
        """
        policy = self.policy
        filtered = self.observe(batch)
        c = self.signals.of_batch(batch)
        prior = policy.prior(filtered.states.h, self.conditions(c, filtered.states, batch["first"]))
        features = filtered.states.features
        terms = {
            "decoder_loss": policy.decoder.loss(features, batch["observations"]).mean(),
            "reward_loss": -policy.two_hot.log_prob(policy.reward(features), batch["rewards"]).mean(),
            "continue_loss": bernoulli_loss(policy.going_on(features).squeeze(-1), 1.0 - batch["terminals"]).mean(),
        }
        kl, info = self.kl_loss(filtered.posterior, prior)
        beta = policy.trust_region.beta if self.trust_region else 1.0
        loss = sum(terms.values()) + beta * kl
        info |= terms | {"kl_loss": kl}
        if c is not None and policy.grounding is not None:
            consistency = policy.grounding.consistency_loss(filtered.states.z, c).mean() * policy.grounded
            loss, info = loss + self.consistency_coef * consistency, info | {"consistency_loss": consistency}
        return loss, info, filtered

    def transitions(self, batch: Batch, filtered: Filtered) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """What the ensemble learns from: [z_t, h_t, a_t], the posterior at t + 1, and whether that is of the same episode;
        ((T - 1) B, ...) each, detached."""
        inputs = th.cat((filtered.states.features[:-1], batch["actions"][1:]), -1).detach().flatten(0, 1)
        return inputs, filtered.posterior[1:].detach().flatten(0, 1), (~batch["first"][1:]).float().flatten()

    # ------------------------------------------------------------------ the trust region

    def _refresh_radius(self) -> None:
        """Look at the expected information gain and at the performance loss, and set delta (proposal).

        D_new is the mean drift on the latest 1,000 steps, filtered with the present weights.
        """
        policy, region = self.policy, self.policy.trust_region
        newest = self.replay_buffer.newest(NEWEST, self.batch_length)
        with th.no_grad(), self._precision():
            rpl = region.relative_loss(self.drift_of(self._with_noise(newest)))
            eig = th.zeros_like(rpl)
            if policy.ensemble is not None:
                batch = self._draw()
                inputs, _, weight = self.transitions(batch, self.observe(batch))
                gain = policy.ensemble.information_gain(inputs, weight)
                eig = th.where(weight.any(), gain, region.eig_reference)  # a batch may have no transition
            region.set_radius(eig, rpl)
        self._meter.add({"information_gain": eig, "performance_loss": rpl})

    def drift_of(self, batch: Batch) -> th.Tensor:
        """Mean KL(q || p) of a batch of sequences, as the world model's loss has it: however many there are, those whose prior
        sees c and those whose prior does not have the weights that they have in ``batch_size`` sequences."""
        filtered = self.observe(batch)
        conditions = self.conditions(self.signals.of_batch(batch), filtered.states, batch["first"])
        kl = self.policy.latent.kl(filtered.posterior, self.policy.prior(filtered.states.h, conditions)).mean(0)
        chosen, share = self._with_prediction(len(kl)), self._with_prediction(self.batch_size).float().mean()
        weight = th.where(chosen, share / chosen.sum(), (1.0 - share) / (~chosen).sum())
        return (weight * kl).sum() / weight.sum()

    def measure_drift(self, episodes: Sequence[Episode], horizon: int, starts: int = 20, seed: int = 0) -> Drift:
        """DFM up to ``horizon`` on held-out episodes; arguments as those of :func:`.drift.measure_drift`."""
        self.policy.set_training_mode(False)
        return measure_drift(self.policy, episodes, horizon, self._signal_of_episode, starts, seed)

    def dream(self, episode: Episode, context: int = CONTEXT, horizon: int = 60, seed: int = 0) -> Dream:
        """An episode beside what the model imagines of it; arguments as those of :func:`.drift.dream`."""
        self.policy.set_training_mode(False)
        return dream(self.policy, episode, self._signal_of_episode, context, horizon, seed)

    def _signal_of_episode(self, observations: dict[str, th.Tensor]) -> th.Tensor | None:
        """Grounding vectors of observations as the policy sees them: encoders know them as the replay memory has them."""
        if self._normalizes and self._vec_normalize_env is None and self.signals.name is not None:
            raise ValueError(
                "The agent learnt from observations that a VecNormalize scaled, and has none now: give it its environment, as "
                "in GIRL.load(path, env=env)."
            )
        return self.signals.of_episode(scaled(observations, self._vec_normalize_env, back=True))

    # ------------------------------------------------------------------ behaviour

    def starts(self, filtered: Filtered) -> Batch:
        """Where imagination begins: all states of a batch, (N, ...), and the noise of H steps from there."""
        h, z = (part.detach().flatten(0, 1) for part in filtered.states)
        policy, size = self.policy, (self.horizon, len(h))
        return {
            "h": h, "z": z, "z_noise": policy.latent.noise(*size, device=h.device),
            "action_noise": policy.actor.noise(*size, device=h.device),
        }  # fmt: skip

    def behaviour_losses(self, starts: Batch) -> tuple[th.Tensor, th.Tensor, Info]:
        """The losses of actor and critic, on one imagined rollout; neither has a gradient for what the other trains."""
        imagined = imagine(self.policy, starts)
        loss_of_actor, info, returns, weights = actor_loss(self.policy, imagined, self.gamma, self.lambda_, self.entropy_coef)
        loss_of_critic, critic_info = critic_loss(self.policy, imagined.features.detach(), returns, weights)
        return loss_of_actor, loss_of_critic, info | critic_info

    # ------------------------------------------------------------------ training

    def _update(self, batch: Batch, with_ensemble: bool, with_student: bool) -> Info:
        """One update of everything, from one batch of sequences; reads nothing back."""
        info, filtered = self.update_model(batch, with_ensemble, with_student)
        info |= self.update_behaviour(self.starts(filtered))
        return {key: value.detach() for key, value in info.items()}

    def update_model(self, batch: Batch, with_ensemble: bool, with_student: bool) -> tuple[Info, Filtered]:
        """One update of the world model and beta, and where asked of ensemble and student; also the states of the batch."""
        policy = self.policy
        batch, distilled = self._distil(batch, with_student)
        with self._precision():
            loss, info, filtered = self._model_loss(batch)
        info |= distilled
        self._step(self.model_optimizer, loss, info, batch, self.model_grad_norm)
        if self.trust_region:
            policy.trust_region.update(info["trust_region"])
            info["trust_region_bound"], info["beta"] = policy.trust_region.bound, policy.trust_region.beta.clone()
        if with_ensemble:
            assert policy.ensemble is not None
            with self._precision():
                ensemble_loss = policy.ensemble.loss(*self.transitions(batch, filtered))
            self._step(self.ensemble_optimizer, ensemble_loss, {"ensemble_loss": ensemble_loss}, batch, self.model_grad_norm)
        return info, filtered

    def update_behaviour(self, starts: Batch) -> Info:
        """One update of actor and critics, on an imagined rollout from ``starts``; the world model stays as it is."""
        policy = self.policy
        with _fixed(policy.model_parameters()):
            with self._precision():
                actor_loss, critic_loss, terms = self._behaviour_losses(starts)
            self.actor_optimizer.zero_grad()
            self.critic_optimizer.zero_grad()
            (actor_loss + critic_loss).backward()
        self._follow(self.actor_optimizer, actor_loss, terms, starts, self.behaviour_grad_norm)
        self._follow(self.critic_optimizer, critic_loss, terms, starts, self.behaviour_grad_norm)
        with th.no_grad():
            slow: list[th.Tensor] = [*policy.slow_critic.parameters()]
            th._foreach_lerp_(slow, [*policy.critic.parameters()], self.slow_critic_fraction)
        return terms

    def _distil(self, batch: Batch, with_student: bool) -> tuple[Batch, Info]:
        """Put what the student says of a batch beside it, and let it learn from the encoder."""
        student, grounding = self.policy.student, self.policy.grounding
        if student is None or grounding is None:
            return batch, {}
        with self._precision(), th.set_grad_enabled(with_student):
            told = self.signals.told(batch["observations"])
        with_told = batch | {"told": told.detach().float()}
        if not with_student:
            return with_told, {}
        loss = student.loss(told, grounding.signal(batch["embeddings"]), batch["known"])
        self._step(self.student_optimizer, loss, {"distill_loss": loss}, batch, self.model_grad_norm)
        student.follow(loss, batch["known"])
        return with_told, {"distill_loss": student.average.clone(), "student_in_use": student.in_use.float()}

    def _precision(self) -> Any:
        """What the networks compute in; statistics, samples and losses are float32 in any case."""
        short = self.precision == "bfloat16" or (self.precision == "auto" and self.device.type == "cuda")
        return th.autocast(self.device.type, th.bfloat16, enabled=short)

    @property
    def first_work(self) -> str:
        """What is done at once after ``learning_starts``, in words; on a CPU it may take minutes."""
        encoder = self.encoder_updates if self.policy.masked_autoencoder is not None else 0
        work = {"updates of the masked autoencoder": encoder, "updates": self.pretrain_updates}
        return " and ".join(f"{number:,} {what}" for what, number in work.items() if number)

    def train(self, gradient_steps: int, batch_size: int = 0) -> None:
        """As many updates as ``train_ratio`` asks for after one step of every environment."""
        if not self.replay_buffer.can_draw(self.batch_length):
            return
        if self.pretrain_updates and not self._n_updates and not self._debt:
            self._debt = float(self.pretrain_updates)
            self._say(f"{self.pretrain_updates:,} updates at once on the first steps.")
        self._debt += gradient_steps * self.n_envs * self.train_ratio / (self.batch_size * self.batch_length)
        if self._debt < 1.0:
            return
        before = self.trust_region and not self._warm and self.num_timesteps >= self.warmup_steps
        if before and self.policy.trust_region.warm[1]:  # some drift was seen
            self.policy.trust_region.activate()
            self._warm = True
        updates = int(self._debt)
        self._debt -= updates
        self.improve(updates)

    def improve(self, updates: int) -> None:
        """So many updates on what the replay memory holds."""
        self._embed_waiting()
        self.policy.set_training_mode(True)
        self._set_rates()
        for _ in range(updates):
            self._meter.add(self._one_update())
            self._n_updates += 1
            if self.trust_region and self._warm and self._n_updates % self.radius_interval == 0:
                self._refresh_radius()

    def _one_update(self) -> Info:
        batch = self._draw()
        with_ensemble = self.policy.ensemble is not None and self.trust_region
        with_ensemble = with_ensemble and self._n_updates % self.ensemble_interval == 0
        with_student = self.policy.student is not None and self._n_updates % self.distill_interval == 0
        parts = with_ensemble, with_student
        if self.device.type != "cuda" or not self.captures:
            return self._update(batch, *parts)
        if parts not in self._graphs:
            optimizers = [self.model_optimizer, self.actor_optimizer, self.critic_optimizer]
            optimizers += [self.ensemble_optimizer] if with_ensemble else []
            optimizers += [self.student_optimizer] if with_student else []
            self._graphs[parts] = CapturedCall(lambda batch: self._update(batch, *parts), *optimizers)
        return self._graphs[parts](batch)

    def _draw(self) -> Batch:
        return self._with_noise(self.replay_buffer.draw(self.batch_size, self.batch_length))

    def _with_noise(self, batch: Batch) -> Batch:
        """A batch of the memory, normalised, with the noise of its latents."""
        noise = self.policy.latent.noise(*batch["first"].shape, device=self.device)
        return normalized(batch, self._vec_normalize_env) | {"noise": noise}

    def _set_rates(self) -> None:
        """Give the optimisers the learning rates of this step."""
        rate = self.lr_schedule(self._current_progress_remaining)
        behaviour_rate = self._behaviour_schedule(self._current_progress_remaining)
        for name in self._optimizers():
            update_learning_rate(getattr(self, name), behaviour_rate if name in BEHAVIOUR else rate)

    def _optimizers(self) -> list[str]:
        further = {"ensemble_optimizer": self.ensemble_members, "student_optimizer": self.distill}
        return ["model_optimizer", *BEHAVIOUR, *(name for name, there in further.items() if there)]

    # ------------------------------------------------------------------ grounding

    @property
    def grounding_name(self) -> str:
        """What reports say of the frozen encoder."""
        return "none" if self.signals.name is None else self.signals.encoder.name

    def _embed_waiting(self) -> None:
        """Give what was collected its embeddings; the first time a masked autoencoder learns before (proposal)."""
        policy = self.policy
        if policy.grounding is None:
            return
        if not policy.grounded:
            if policy.masked_autoencoder is not None:
                optimizer = self._adam(policy.masked_autoencoder.parameters(), RATE, 1e-8)

                def step(loss: th.Tensor) -> None:
                    self._step(optimizer, loss, {"encoder_loss": loss}, {})

                self._say(f"The masked autoencoder learns from the first steps, {self.encoder_updates:,} updates.")
                self._meter.add({"encoder_loss": self.signals.warm_start(self.replay_buffer, self.encoder_updates, step)})
            policy.grounded.fill_(True)
        self.signals.embed_waiting(self.replay_buffer)

    def _say(self, sentence: str) -> None:
        if self.verbose:
            print(sentence)

    # ------------------------------------------------------------------ experience

    def _sample_action(self, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> tuple[Any, Any]:
        """Random actions first, then those of the actor, which filters what it sees."""
        if self.num_timesteps < learning_starts:
            chosen = np.array([self.action_space.sample() for _ in range(n_envs)])
            return chosen, self.policy.to_model(chosen)
        rows, _ = self.policy.rows_of(self._last_obs)
        starts = np.ones(n_envs, bool) if self._belief is None else np.asarray(self._last_episode_starts, bool)
        actions, self._belief = self.policy.act(rows, self._belief, starts, deterministic=False)
        return self.policy.to_env(actions), actions

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._last_episode_starts = np.asarray(dones, bool)

    def _setup_learn(self, total_timesteps: int, callback: Any = None, reset_num_timesteps: bool = True, *args: Any) -> Any:
        if reset_num_timesteps or self._last_obs is None:
            self._forget_episodes()
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args)

    def _restart_environments(self) -> None:
        super()._restart_environments()
        self._forget_episodes()

    def _forget_episodes(self) -> None:
        """Before new ones begin."""
        self._belief = None
        self.replay_buffer.truncate_last_trajectory()

    @contextmanager
    def _torch_threads(self, batch_size: int) -> Iterator[None]:
        if self._threads is None:  # most of the work is imagination, from every step of every sequence
            self._threads = threads_for(self.policy, batch_size * self.batch_length * self.horizon)
        with use_threads(self._threads):
            yield

    def dump_logs(self) -> None:
        """As SB3's, with the means of the updates since the last time."""
        means = self._meter.take()
        if means:
            self._ask_guards()
            for name, value in check_finite_info(means, self.num_timesteps).items():
                self.logger.record(f"train/{name}", value)
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
            self.logger.record("train/learning_rate", self.lr_schedule(self._current_progress_remaining))
        super().dump_logs()

    # ------------------------------------------------------------------ files

    def rollout_state(self) -> dict[str, Any]:
        """As :meth:`OffPolicyAgent.rollout_state`, with what the agent remembers of the episodes under way."""
        self._ask_guards()
        meter = [[list(names), sums, count] for names, (sums, count) in self._meter.sums.items()]
        belief = None if self._belief is None else tuple(self._belief)
        return {**super().rollout_state(), "belief": belief, "meter": meter}

    def restore_rollout_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`rollout_state` gave."""
        super().restore_rollout_state(state)
        self._belief = None if state["belief"] is None else Belief(*state["belief"])
        self._meter.sums = {tuple(names): (sums.to(self.device), count) for names, sums, count in state["meter"]}

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True) -> None:
        """As SB3's, of what :meth:`save_replay_buffer` wrote; like that it is a pickle: read none that you do not trust.

        Embeddings are made again: another encoder's would say nothing.

        :param truncate_last_traj: the next row begins a new episode
        :raises ValueError: if the file holds no sequences, those of other spaces or of another number of environments, or has
            no room for one
        """
        memory = load_from_pkl(path, self.verbose)
        if not isinstance(memory, SequenceReplay):
            raise ValueError(f"{path} holds a {type(memory).__name__}, and a world model learns from a SequenceReplay.")
        for name in ("observation_space", "action_space", "n_envs"):
            theirs, ours = getattr(memory, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(f"{path} was made with {name} {theirs}, and this agent has {ours}: make both alike.")
        self._check_room(memory)
        memory.move_to(self.device)
        memory.renew_embeddings(self.replay_buffer.embeddings.shape[-1])
        self.replay_buffer = memory
        if truncate_last_traj:
            memory.truncate_last_trajectory()

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """As SB3's. What the memory holds is embedded again, as the masked autoencoder may be another one then."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._warm = bool(self.policy.trust_region.active)
        if self.policy.masked_autoencoder is not None:
            self.replay_buffer.renew_embeddings(self.replay_buffer.embeddings.shape[-1])

    def _excluded_save_params(self) -> list[str]:
        made = ("replay_buffer_class", "replay_buffer_kwargs", "_behaviour_schedule", "_model_loss", "_behaviour_losses")
        return [*super()._excluded_save_params(), "_belief", "_meter", "_graphs", "signals", *made]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *self._optimizers()], []


def _bounds(of_beta: Sequence[float]) -> tuple[float, float]:
    """The two numbers, which YAML gives as a list."""
    if len(of_beta) != 2 or not 0.0 <= of_beta[0] <= 1.0 <= of_beta[1]:
        raise ValueError(f"beta_bounds is (low, high), 0 <= low <= 1 <= high, as beta begins at 1: not {tuple(of_beta)}.")
    return of_beta[0], of_beta[1]


@contextmanager
def _fixed(parameters: list[th.nn.Parameter]) -> Iterator[None]:
    """Parameters without a gradient inside the block."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
