"""The on-policy engine: collect a rollout, value it, improve the policy. An agent adds its losses and its schedule."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from .advantages import generalized_advantage
from .agent import Agent
from .finite import check_finite, check_finite_info
from .memory import freed_memory_kept
from .normalization import RewardScaler
from .parts import Part, parts_of
from .policies import NormalizedActorCriticPolicy
from .rollout import Rollout, stacked
from .updates import Batch, in_chunks

SelfOnPolicyAgent = TypeVar("SelfOnPolicyAgent", bound="OnPolicyAgent")


class OnPolicyAgent(Agent, OnPolicyAlgorithm):
    """Base of the on-policy agents: everything but the losses.

    It differs from SB3's ``OnPolicyAlgorithm`` in what it does per step: only the policy is evaluated there; the values
    of the whole rollout are computed in one batch afterwards, and log-probabilities where the loss needs them. A
    transition is stored before a callback may stop the training.

    :param policy: a subclass of :class:`NormalizedActorCriticPolicy` or one of the agent's aliases
    :param env: environment, vector environment or registered id
    :param learning_rate: step of the optimisers, or a schedule of the remaining progress (1 to 0)
    :param n_steps: steps per environment and iteration
    :param gamma: discount
    :param gae_lambda: trade-off of bias and variance in the advantages
    :param max_grad_norm: gradients of the policy are clipped to this global norm
    :param normalize_observations: keep running moments of vector observations inside the policy
    :param normalize_rewards: divide rewards by the running std of the discounted return, clip at 10
    :param time_limits: "correct" bootstraps with V(terminal observation) where an episode is cut by its time limit,
        "paper" takes the cut for a true end
    :param compile_loss: run the losses through ``torch.compile``
    :param ent_coef: weight of an entropy bonus, for the losses that have one
    :param vf_coef: weight of the value loss, where one optimiser trains both networks
    :param supported_action_spaces: what the agent's losses can handle
    """

    policy: NormalizedActorCriticPolicy
    rollout: Rollout
    reward_scaler: RewardScaler

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule,
        n_steps: int,
        gamma: float,
        gae_lambda: float,
        max_grad_norm: float,
        normalize_observations: bool,
        normalize_rewards: bool,
        time_limits: str,
        compile_loss: bool = False,
        ent_coef: float = 0.0,
        vf_coef: float = 1.0,
        use_sde: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        supported_action_spaces: tuple[type[spaces.Space[Any]], ...] | None = None,
    ) -> None:
        name = type(self).__name__
        if use_sde:
            raise ValueError(f"{name} has no state-dependent exploration (gSDE): leave use_sde=False.")
        if time_limits not in ("correct", "paper"):
            raise ValueError(f"time_limits must be 'correct' or 'paper', not {time_limits!r}.")
        if n_steps < 1:
            raise ValueError(f"n_steps is the number of steps per environment and iteration: give 1 or more, not {n_steps}.")
        if device == "auto" and policy in ("MlpPolicy", self.policy_aliases["MlpPolicy"]):
            device = "cpu"  # small networks are bound by overhead, not arithmetic: a GPU slows them down
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs={"normalize_observations": normalize_observations, **(policy_kwargs or {})},
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=supported_action_spaces,
        )
        if not issubclass(self.policy_class, NormalizedActorCriticPolicy):
            raise ValueError(
                f"{name} needs one of its own policies ({', '.join(self.policy_aliases)}) or a class derived from them, "
                f"not {self.policy_class.__name__}."
            )
        self.normalize_rewards = normalize_rewards
        self.time_limits = time_limits
        self.compile_loss = compile_loss
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)
        self.reward_scaler = RewardScaler(self.n_envs, self.gamma).to(self.device)
        self.rollout = Rollout(self.n_steps, self.n_envs, self.observation_space, self.action_space, self.device)
        self._position = 0  # steps of the rollout that are done
        self._parts: list[Part] = []
        self._between_steps = True

    # ------------------------------------------------------------------ experience

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *_: Any, **__: Any) -> bool:
        """Fill ``self.rollout`` with ``n_steps`` steps of every environment, from where it was left.

        Where the class of ``env`` offers ``halves``, two vector environments that together are the whole, they are
        stepped alternately in that order: one half's physics run while the other half's actions are computed. Each
        action still comes from its own last observation, and the noise of the rollout is drawn beforehand, so the
        transitions are those of stepping both together. Callbacks then see step t while the first halves of step
        t + 1 are under way; nothing is under way at the end of a rollout.

        :return: False if a callback stopped the training; the next call goes on after the last step it saw
        :raises NonFiniteError: naming the environment and step of the first reward or observation that is not finite
        """
        self.policy.set_training_mode(False)
        if self._position == 0:
            self.rollout.reset()
            self._parts = parts_of(env)
            callback.on_rollout_start()
            check_finite(self._last_obs, "observation", self.num_timesteps)
            noise = self.policy.draw_noise((self.n_steps, env.num_envs))
            self._noise = noise.numpy() if noise.device.type == "cpu" else noise
        # Moments and weights do not change within a rollout.
        self._standardize, self._sample = self.policy.standardizer(), self.policy.sampler()
        try:
            going_on = self._step_through(self._parts, env.num_envs, callback)
        except BaseException:
            self._land() if self._between_steps else self._abandon()
            raise
        self._land()
        if going_on:
            callback.on_rollout_end()
            self._position = 0
        return going_on

    def _step_through(self, parts: list[Part], n_envs: int, callback: BaseCallback) -> bool:
        ahead = len(parts) > 1
        while self._position < self.n_steps:
            t, self._between_steps = self._position, False
            for part in parts:
                if not part.under_way and part.arrived is None:
                    self._send(part, t)
            infos: list[dict[str, Any]] = []
            if ahead:
                self._last_obs = self._last_obs.copy()  # type: ignore[union-attr] # what callbacks were given stays as it was
            for part in parts:
                infos += self._receive(part, t)
                if ahead and t + 1 < self.n_steps:
                    self._send(part, t + 1)
            self.num_timesteps += n_envs
            self._position, self._between_steps = t + 1, True
            rewards, dones, new_obs = self.rollout.rewards[t].copy(), self.rollout.dones[t].copy(), self._last_obs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        return True

    def _send(self, part: Part, t: int) -> None:
        """Choose the actions of step t for a part of the environments and set it going."""
        observations = self.rollout.observe(t, part.envs, part.of(self._last_obs))
        actions = self._sample(observations, self._noise[t, part.envs])
        check_finite(actions, "action", self.num_timesteps, part.first)
        self.rollout.act(t, part.envs, actions)
        part.env.step_async(self._to_env(actions))
        part.under_way = True

    def _receive(self, part: Part, t: int) -> list[dict[str, Any]]:
        """Wait for a part of the environments and store what came of its step t."""
        if part.arrived is not None:
            infos, part.arrived = part.arrived, None
            return infos
        new_obs, rewards, dones, infos = part.wait()
        steps = self.num_timesteps + self.n_envs
        check_finite(rewards, "reward", steps, part.first)
        check_finite(new_obs, "observation", steps, part.first)
        for env, terminal in self.rollout.outcome(t, part.envs, rewards, dones, infos):
            check_finite(stacked((terminal,)), "terminal observation", steps, env)
        self._last_obs = part.into(self._last_obs, new_obs)
        self._last_episode_starts[part.envs] = dones  # type: ignore[index]
        if dones.any():
            self._update_info_buffer(infos, dones)
        return infos

    def _land(self) -> None:
        """Take in the steps under way, so that the environments are at rest; their turn comes when the rollout goes on."""
        if any(part.under_way for part in self._parts):
            self._last_obs = self._last_obs.copy()  # type: ignore[union-attr] # what callbacks were given stays as it was
        for part in self._parts:
            if part.under_way:
                part.arrived = self._receive(part, self._position)

    def _abandon(self) -> None:
        """After an error in the middle of a step: nothing is under way, and the environments must be reset."""
        for part in self._parts:
            if part.under_way:
                with suppress(Exception):
                    part.wait()
        self._forget_rollout()
        self._last_obs = None

    def _forget_rollout(self) -> None:
        """Begin the next rollout at its first step."""
        self._parts, self._position = [], 0

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in SB3; a rollout that was interrupted is forgotten."""
        super().set_env(env, force_reset)
        self._forget_rollout()

    def rollout_state(self) -> dict[str, Any]:
        """The rollout under way and what else is in no file of the model, for a checkpoint; lands what is under way."""
        self._land()
        state: dict[str, Any] = {"position": self._position, "returns": self.reward_scaler.returns}
        if self._position:
            arrived = [part.arrived for part in self._parts]
            state |= {"rollout": self.rollout.state(self._position + 1), "noise": self._noise, "arrived": arrived}
        return state

    def restore_rollout_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`rollout_state` gave."""
        self.reward_scaler.returns.copy_(state["returns"])
        self._position = state["position"]
        if self._position:
            self.rollout.restore(state["rollout"])
            self._noise = state["noise"]
            self._parts = parts_of(self.env)  # type: ignore[arg-type]
            for part, infos in zip(self._parts, state["arrived"], strict=True):
                part.arrived = infos

    def _to_env(self, actions: np.ndarray) -> np.ndarray:
        """What the environment is given: the sampled action, clipped where the space is a box."""
        if isinstance(self.action_space, spaces.Box):
            return np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)
        return actions

    @th.no_grad()
    def _advantages(self, values: th.Tensor) -> th.Tensor:
        """Advantages of the rollout (T * E,), in units of the scaled reward.

        :param values: V of its observations (T * E,)
        """
        rollout = self.rollout
        last = self._values(self._last_obs)
        rewards = th.as_tensor(rollout.rewards, device=self.device)
        dones = th.as_tensor(rollout.dones, device=self.device)
        if self.normalize_rewards:
            rewards = self.reward_scaler.scale(rewards, dones)
        if self.time_limits == "correct" and rollout.timeouts:
            steps, envs, observations = zip(*rollout.timeouts, strict=True)
            rewards = rewards.clone()
            rewards[list(steps), list(envs)] += self.gamma * self._values(stacked(observations))
        values = values.reshape(rewards.shape)
        with_last = th.cat([values, last[None]])
        return generalized_advantage(rewards, with_last, dones, self.gamma, self.gae_lambda).flatten()

    def _values(self, observations: Any) -> th.Tensor:
        """V (n,) of raw observations from the host."""
        return self.policy.values_at(self._standardize(obs_as_tensor(observations, self.device)))

    def reseed(self, seed: int) -> None:
        """Other random numbers from here on, also for the rest of the rollout under way."""
        super().reseed(seed)
        if self._position:
            rest = self.policy.draw_noise((self.n_steps - self._position, self.n_envs))
            self._noise[self._position :] = rest.numpy() if isinstance(self._noise, np.ndarray) else rest  # type: ignore[assignment]

    # ------------------------------------------------------------------ improvement

    @th.no_grad()
    def _rollout_batch(self) -> Batch:
        """What the losses read, one row per transition; constant during the update.

        observations (N, *obs) standardised, actions (N, *act) unclipped, old_log_prob, old_values, advantages and
        returns = advantages + old_values, (N,) each.
        """
        observations = self._standardize(self.rollout.flat_observations())
        actions = self.rollout.flat_actions()
        log_prob, values = self._evaluate_rollout(observations, actions)
        advantages = self._advantages(values)
        return {
            "observations": observations,
            "actions": actions,
            "old_log_prob": log_prob,
            "old_values": values,
            "advantages": advantages,
            "returns": advantages + values,
        }

    def _evaluate_rollout(self, observations: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """log pi(actions) and V, (N,) each, in one pass: an encoder that both share is evaluated once."""

        def evaluate(part: Batch) -> th.Tensor:
            distribution, values = self.policy.evaluate_at(part["observations"])
            return th.stack([distribution.log_prob(part["actions"]), values], dim=1)

        log_prob, values = in_chunks(evaluate, {"observations": observations, "actions": actions}).unbind(1)
        return log_prob, values

    def _evaluate(self, observations: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """log pi(actions) and entropy, (N,) each, for the whole rollout."""

        def evaluate(part: Batch) -> th.Tensor:
            distribution = self.policy.distribution_at(part["observations"])
            return th.stack([distribution.log_prob(part["actions"]), distribution.entropy()], dim=1)

        log_prob, entropy = in_chunks(evaluate, {"observations": observations, "actions": actions}).unbind(1)
        return log_prob, entropy

    def _record_update(self, info: dict[str, th.Tensor], batch: Batch) -> None:
        """Log the scalars of an update, moved to the host in one transfer, and stop at the first that is not finite."""
        returns, values = batch["returns"], batch["old_values"]
        unexplained = (returns - values).var(unbiased=False) / returns.var(unbiased=False)
        if hasattr(self.policy, "log_std"):
            info = {**info, "std": self.policy.log_std.detach().exp().mean()}
        numbers = check_finite_info({**info, "unexplained": unexplained}, self.num_timesteps, may_be_nan=("unexplained",))
        numbers["explained_variance"] = 1.0 - numbers.pop("unexplained")
        for key, value in numbers.items():
            self.logger.record(f"train/{key}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # ------------------------------------------------------------------ training

    def samples_per_step(self) -> int:
        """How many samples a gradient step reads; the number of threads follows from it."""
        return self.n_steps * self.n_envs

    def learn(
        self: SelfOnPolicyAgent,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOnPolicyAgent:
        """Train for ``total_timesteps`` env steps, rounded up to whole rollouts; arguments as in SB3."""
        if reset_num_timesteps or self._last_obs is None:
            self.reward_scaler.returns.zero_()  # the environments start new episodes
            self._forget_rollout()
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        convolutions = self.device.type == "cpu" and any(isinstance(m, th.nn.Conv2d) for m in self.policy.modules())
        with self._torch_threads(self.samples_per_step()), freed_memory_kept() if convolutions else nullcontext():
            callback.on_training_start(locals(), globals())
            # A rollout that a callback interrupted is finished in any case, as it would have been without.
            while self.num_timesteps < total_timesteps or self._position:
                going_on = self._guarded(lambda: self.collect_rollouts(self.env, callback), "collect")  # type: ignore[arg-type]
                if going_on is None:
                    self._forget_rollout()
                    self._restart_environments()
                    self.reward_scaler.returns.zero_()
                    continue
                if not going_on:
                    break
                self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
                self._guarded(self.train, "train")
                # The normaliser moves after the update: until then old policy and behaviour policy are one function.
                self.policy.update_moments(self.rollout.flat_observations())
                iteration = self.num_timesteps // (self.n_steps * self.n_envs)
                if log_interval and iteration % log_interval == 0:
                    self.dump_logs(iteration)
            callback.on_training_end()
        return self

    def _excluded_save_params(self) -> list[str]:
        own = ["rollout", "update", "policy_update", "value_update"]
        own += ["_standardize", "_sample", "_noise", "_parts", "_position", "_between_steps"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "reward_scaler"], []
