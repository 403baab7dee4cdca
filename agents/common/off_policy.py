"""The off-policy engine: act, store, and train on what is stored. An agent adds its losses in ``train``."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import should_collect_more_steps
from stable_baselines3.common.vec_env import VecEnv

from .agent import Agent
from .finite import check_finite
from .replay_state import end_last_trajectory
from .rollout import stacked

SelfOffPolicyAgent = TypeVar("SelfOffPolicyAgent", bound="OffPolicyAgent")


class OffPolicyAgent(Agent, OffPolicyAlgorithm):
    """Base of the off-policy agents: everything but the losses.

    It differs from SB3's ``OffPolicyAlgorithm`` in the order of a step: a transition is stored before a callback may stop
    the training, and a training that goes on does so in the middle of ``train_freq``.
    """

    def _setup_model(self) -> None:
        inner = self._vec_normalize_env  # the replay memory holds what it saw before it normalised
        if inner is not None and _shapes(inner.observation_space) != _shapes(self.observation_space):
            raise ValueError(
                "VecNormalize lies below a wrapper that changes the shape of observations (a frame stack, or SB3's turning of "
                "pictures to channels first): put it outermost, as in VecNormalize(VecFrameStack(env, 4)) or "
                "VecNormalize(VecTransposeImage(env))."
            )
        super()._setup_model()
        self._collected = [0, 0]  # steps and episodes since the last call of `train`

    # ------------------------------------------------------------------ experience

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """Collect steps or episodes until ``train_freq`` is reached, from where it was left; arguments as in SB3.

        :raises NonFiniteError: naming the environment and step of the first action, reward or observation that is not finite
        """
        if train_freq.frequency < 1:
            raise ValueError(f"train_freq must be at least one step or episode, not {train_freq.frequency}.")
        if env.num_envs > 1 and train_freq.unit == TrainFrequencyUnit.EPISODE:
            raise ValueError("train_freq counts episodes of one environment: count steps, or use one environment.")
        self.policy.set_training_mode(False)
        if self._collected == [0, 0]:
            callback.on_rollout_start()
        while should_collect_more_steps(train_freq, *self._collected):
            actions, buffer_actions = self._sample_action(learning_starts, action_noise, env.num_envs)
            check_finite(np.asarray(actions), "action", self.num_timesteps)
            new_obs, rewards, dones, infos = env.step(actions)
            self.num_timesteps += env.num_envs
            self._collected[0] += 1
            self._update_info_buffer(infos, dones)
            self._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
            self._on_step()
            self._end_episodes(np.flatnonzero(dones), action_noise, log_interval)
            num_collected_steps, num_collected_episodes = self._collected
            callback.update_locals(locals())
            if not callback.on_step():
                return RolloutReturn(self._collected[0] * env.num_envs, self._collected[1], continue_training=False)
        callback.on_rollout_end()
        (steps, episodes), self._collected = self._collected, [0, 0]
        return RolloutReturn(steps * env.num_envs, episodes, continue_training=True)

    def _end_episodes(self, ended: np.ndarray, action_noise: ActionNoise | None, log_interval: int | None) -> None:
        for env in ended.tolist():
            self._collected[1] += 1
            self._episode_num += 1
            if action_noise is not None:
                action_noise.reset(**({"indices": [env]} if self.n_envs > 1 else {}))
            if log_interval is not None and self._episode_num % log_interval == 0:
                self.dump_logs()

    def _store_transition(
        self, replay_buffer: ReplayBuffer, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        check_finite(reward, "reward", self.num_timesteps)
        check_finite(new_obs, "observation", self.num_timesteps)
        for env in np.flatnonzero(dones).tolist():
            terminal = infos[env].get("terminal_observation")
            if terminal is not None:
                check_finite(stacked((terminal,)), "terminal observation", self.num_timesteps, env)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def rollout_state(self) -> dict[str, Any]:
        """What is in no file of the model, for a checkpoint."""
        return {"collected": list(self._collected)}

    def restore_rollout_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`rollout_state` gave."""
        self._collected = list(state["collected"])

    # ------------------------------------------------------------------ training

    def learn(
        self: SelfOffPolicyAgent,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOffPolicyAgent:
        """Train for ``total_timesteps`` env steps; arguments as in SB3."""
        if self._last_obs is None and self.replay_buffer is not None:
            end_last_trajectory(self.replay_buffer)
        if reset_num_timesteps or self._last_obs is None:
            self._collected = [0, 0]
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        with self._torch_threads(self.batch_size):
            callback.on_training_start(locals(), globals())
            # What a callback interrupted is finished in any case, as it would have been without.
            while self.num_timesteps < total_timesteps or self._collected != [0, 0]:
                rollout = self._guarded(lambda: self._collect(callback, log_interval), "collect")
                if rollout is None:
                    self._collected = [0, 0]
                    end_last_trajectory(self.replay_buffer)
                    self._restart_environments()
                    continue
                if not rollout.continue_training:
                    break
                gradient_steps = self.gradient_steps if self.gradient_steps >= 0 else rollout.episode_timesteps
                if self.num_timesteps > self.learning_starts and gradient_steps > 0:
                    self._guarded(lambda steps=gradient_steps: self.train(steps, self.batch_size), "train")  # type: ignore[misc]
            callback.on_training_end()
        return self

    def _collect(self, callback: BaseCallback, log_interval: int) -> RolloutReturn:
        return self.collect_rollouts(
            self.env,  # type: ignore[arg-type]
            callback,
            self.train_freq,  # type: ignore[arg-type]
            self.replay_buffer,  # type: ignore[arg-type]
            self.action_noise,
            self.learning_starts,
            log_interval,
        )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_collected"]


def _shapes(space: spaces.Space) -> Any:
    return {name: part.shape for name, part in space.spaces.items()} if isinstance(space, spaces.Dict) else space.shape
