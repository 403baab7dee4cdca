"""The on-policy engine: collect a rollout, value it, improve the policy. An agent adds its losses and its schedule."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from .finite import check_finite
from .normalization import RewardScaler
from .policies import NormalizedActorCriticPolicy
from .rollout import Rollout, generalized_advantage
from .threads import torch_threads

SelfOnPolicyAgent = TypeVar("SelfOnPolicyAgent", bound="OnPolicyAgent")


class OnPolicyAgent(OnPolicyAlgorithm):
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
            ent_coef=0.0,
            vf_coef=1.0,
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
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)
        self.reward_scaler = RewardScaler(self.n_envs, self.gamma)
        self.rollout = Rollout(self.n_steps, self.n_envs, self.observation_space, self.action_space, self.device)

    # ------------------------------------------------------------------ experience

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *_: Any, **__: Any) -> bool:
        """Fill ``self.rollout`` with ``n_steps`` steps of every environment.

        :return: False if a callback stopped the training
        :raises NonFiniteError: naming the environment and step of the first reward or observation that is not finite
        """
        rollout = self.rollout
        self.policy.set_training_mode(False)
        rollout.reset()
        callback.on_rollout_start()
        check_finite(self._last_obs, "observation", self.num_timesteps)
        while rollout.position < self.n_steps:
            observations = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
            with th.no_grad():
                actions = self.policy._predict(observations).reshape(-1, *self.action_space.shape)  # type: ignore[misc]
            new_obs, rewards, dones, infos = env.step(self._to_env(actions.cpu().numpy()))
            self.num_timesteps += env.num_envs
            check_finite(rewards, "reward", self.num_timesteps)
            check_finite(new_obs, "observation", self.num_timesteps)
            rollout.add(observations, actions, rewards, dones, infos)
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
            if dones.any():
                self._update_info_buffer(infos, dones)
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        callback.on_rollout_end()
        return True

    def _to_env(self, actions: np.ndarray) -> np.ndarray:
        """What the environment is given: the sampled action, clipped where the space is a box."""
        if isinstance(self.action_space, spaces.Box):
            return np.clip(actions, self.action_space.low, self.action_space.high)
        return actions

    @th.no_grad()
    def _value_rollout(self) -> tuple[np.ndarray, np.ndarray]:
        """Values and advantages of the rollout, from one batched evaluation of the value network.

        :return: values (T, E) and advantages (T, E), float32, in units of the scaled reward
        """
        rollout = self.rollout
        values = self._predict_values(rollout.flat_observations()).reshape(rollout.n_steps, rollout.n_envs)
        last = self._predict_values(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        rewards = rollout.rewards
        if self.normalize_rewards:
            rewards = self.reward_scaler.scale(rewards, rollout.dones)
        if self.time_limits == "correct" and rollout.timeouts:
            steps, envs, observations = zip(*rollout.timeouts, strict=True)
            final = self._predict_values(self._stack(observations))
            rewards = rewards.copy()
            rewards[list(steps), list(envs)] += self.gamma * final
        advantages = generalized_advantage(
            rewards, np.vstack([values, last[None]]), rollout.dones, self.gamma, self.gae_lambda
        )
        return values, advantages

    def _predict_values(self, observations: Any) -> np.ndarray:
        return self.policy.predict_values(observations).flatten().cpu().numpy()

    def _stack(self, observations: tuple[Any, ...]) -> Any:
        """Single observations (arrays or dicts) as one batch on the device."""
        if isinstance(observations[0], dict):
            return obs_as_tensor({k: np.stack([o[k] for o in observations]) for k in observations[0]}, self.device)
        return obs_as_tensor(np.stack(observations), self.device)

    # ------------------------------------------------------------------ improvement

    def _step(self, optimizer: th.optim.Optimizer, loss: th.Tensor, max_grad_norm: float | None = None) -> None:
        """One optimiser step on ``loss``, its gradient clipped to ``max_grad_norm``."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if max_grad_norm is not None:
            th.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
        optimizer.step()

    def _record_update(self, info: dict[str, float], values: np.ndarray, returns: np.ndarray) -> None:
        for key, value in info.items():
            self.logger.record(f"train/{key}", value)
        self.logger.record("train/explained_variance", float(explained_variance(values.ravel(), returns.ravel())))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.detach().exp().mean().item())

    # ------------------------------------------------------------------ training

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
        with torch_threads(self.policy):
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
            )
            callback.on_training_start(locals(), globals())
            iteration = 0
            while self.num_timesteps < total_timesteps:
                if not self.collect_rollouts(self.env, callback):  # type: ignore[arg-type]
                    break
                iteration += 1
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                self.train()
                # The normaliser moves after the update: until then old policy and behaviour policy are one function.
                self.policy.update_moments(self.rollout.flat_observations())
                if log_interval and iteration % log_interval == 0:
                    self.dump_logs(iteration)
            callback.on_training_end()
        return self

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "rollout"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "reward_scaler"], []
