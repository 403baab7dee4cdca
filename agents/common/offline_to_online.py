"""The engine of agents that learn action chunks from a dataset first, and from their environment afterwards.

An agent adds the losses of its actor in both phases. The critics of chunks, which these agents share, are here: they treat
a chunk of H actions as one action of a step that takes H times as long (Li et al. 2025, arXiv 2507.07969).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import safe_mean

from .batched import move_towards
from .chunk_policy import Plan, RankedChunkPolicy, with_horizon
from .chunks import ChunkMemory, Transition, chunks_of
from .finite import check_finite
from .offline import Batch, Draw, OfflineAgent
from .offline_data import OfflineData
from .ranges import require_at_least
from .rollout import stacked

SelfOfflineToOnlineAgent = TypeVar("SelfOfflineToOnlineAgent", bound="OfflineToOnlineAgent")
RANKINGS = ("mean", "min")


class OfflineToOnlineAgent(OfflineAgent):
    """Base of the offline-to-online agents: everything but the actor.

    ``learn_offline`` leaves its dataset in the replay memory, to which ``learn`` adds what it collects: both are drawn from
    alike. ``num_timesteps`` counts gradient steps offline and env steps online; ``learn(..., reset_num_timesteps=False)``
    counts on. Chunks are played to their ends while collecting, without further noise.

    :param policy: of the agent's ``policy_aliases``, or a class
    :param env: to learn in online; None takes the spaces from the dataset
    :param learning_rate: of both Adams
    :param batch_size: chunks per gradient step
    :param horizon: H, actions of a chunk
    :param gamma: discount of a single step
    :param tau: of the Polyak average that makes the target critics
    :param offline_ranking: how values of the ensemble are one, "mean" or "min", in targets and in best-of-N, offline
    :param online_ranking: the same online
    :param target_candidates: N of the best-of-N whose value is bootstrapped from; None: the policy's ``n_candidates``
    :param buffer_size: chunks that the replay memory holds at most, but the dataset's at least
    :param learning_starts: env steps of the online phase before its first update
    :param gradient_steps: updates per step of the (vector) environment
    :param seeds: agents that are trained side by side offline
    :raises ValueError: for an argument outside its range
    """

    OPTIMIZERS: ClassVar[tuple[str, ...]] = ("actor_optimizer", "critic_optimizer")
    policy: RankedChunkPolicy

    def __init__(
        self,
        policy: str | type[RankedChunkPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule,
        batch_size: int,
        horizon: int,
        gamma: float,
        tau: float,
        offline_ranking: str,
        online_ranking: str,
        target_candidates: int | None,
        buffer_size: int,
        learning_starts: int,
        gradient_steps: int,
        seeds: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
    ) -> None:
        require_at_least(1, horizon=horizon, buffer_size=buffer_size, gradient_steps=gradient_steps)
        require_at_least(0, learning_starts=learning_starts)
        if target_candidates is not None:
            require_at_least(1, target_candidates=target_candidates)
        for name, ranking in (("offline_ranking", offline_ranking), ("online_ranking", online_ranking)):
            if ranking not in RANKINGS:
                raise ValueError(f"{name} is one of {', '.join(RANKINGS)}, not {ranking!r}.")
        if "ranking" in (policy_kwargs or {}):
            raise ValueError("The critics' ranking is no argument of the policy here: give offline_ranking, online_ranking.")
        policy_kwargs = with_horizon(policy_kwargs, horizon)
        super().__init__(
            policy, env, learning_rate, batch_size, gamma, tau, seeds, tensorboard_log, policy_kwargs, verbose, seed, device
        )
        self.horizon, self.offline_ranking, self.online_ranking = horizon, offline_ranking, online_ranking
        self.target_candidates, self.buffer_size = target_candidates, buffer_size
        self.learning_starts, self.gradient_steps = learning_starts, gradient_steps
        self.online_steps = 0  # env steps of the online phase
        self._memory: ChunkMemory | None = None
        self._memory_rows = 0
        self._plan: Plan | None = None

    def _setup_model(self) -> None:
        super()._setup_model()
        if hasattr(self, "policy"):
            self.policy.rank_by(self.online_ranking if self.steps_environments else self.offline_ranking)

    def _make_optimizers(self) -> None:
        self.actor_optimizer = self._adam(self._actor_parameters())
        self.critic_optimizer = self._adam(self.policy.critics.parameters())

    @abstractmethod
    def _actor_parameters(self) -> list[th.nn.Parameter]:
        """What the losses of the actor train."""

    def _prepare(self, data: OfflineData) -> Batch:
        """The chunks of a dataset."""
        return chunks_of(data, self.horizon, self.gamma)

    # ------------------------------------------------------------------ losses

    @abstractmethod
    def offline_actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """Of the actor while it learns from a dataset."""

    def online_actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """Of the actor while it learns in its environment: the same, on data and what was collected alike, unless an agent
        has another."""
        return self.offline_actor_loss(batch)

    @th.no_grad()
    def td_target(self, batch: Batch) -> th.Tensor:
        """y = R_H + gamma^H m_H Q'(s_H, a'), (S, B); a' is the best of N of the present policy (authors' code), or one sample.

        The critics in training choose a', their averages value it.
        """
        policy, following = self.policy, batch["next_observations"]
        candidates = policy.n_candidates if self.target_candidates is None else self.target_candidates
        actions = policy.best_of(following, candidates)
        q = policy.value(policy.critics_target(following, actions))
        return batch["returns"] + self.gamma**self.horizon * batch["going_on"] * q

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """mean_{j, b} valid_H (Q_j(s, a) - y)^2: chunks that pass the end of an episode count as 0."""
        q = self.policy.critics(batch["observations"], batch["actions"])
        errors = (q - batch["targets"].unsqueeze(1)).square() * batch["valid"][..., -1].unsqueeze(1)
        loss = errors.mean((1, 2)).sum()
        return loss, {"critic_loss": loss / self.seeds, "q": q.mean()}

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One step of actor and critics on one batch, both from the weights before it; the average follows the critics
        that were, as in the authors' code."""
        batch = draw(self.batch_size)
        batch["targets"] = self.td_target(batch)
        actor_loss = self.online_actor_loss if self.steps_environments else self.offline_actor_loss
        infos = self._descend(batch, (self.actor_optimizer, actor_loss))
        move_towards(self.policy.critics_target, self.policy.critics, self.tau)
        return infos | self._descend(batch, (self.critic_optimizer, self.critic_loss))

    # ------------------------------------------------------------------ offline

    def learn_offline(
        self: SelfOfflineToOnlineAgent, dataset: Any, gradient_steps: int, *args: Any, **kwargs: Any
    ) -> SelfOfflineToOnlineAgent:
        """As :meth:`OfflineAgent.learn_offline`; the dataset stays in the replay memory.

        :raises ValueError: after the online phase began
        """
        if self.steps_environments:
            raise ValueError(f"This {type(self).__name__} has begun to learn online: go on with learn, or make a new one.")
        return super().learn_offline(dataset, gradient_steps, *args, **kwargs)

    def fill_replay(self, dataset: Any) -> None:
        """Put a dataset into the replay memory, where that is empty: of an agent that was loaded and goes online.

        :raises DataError: if the agent cannot learn from it
        """
        if not self._data and not self._memory:  # none, or an empty one
            self._memory = None
            self._take_data(OfflineData(dataset, self.device))

    def split(self: SelfOfflineToOnlineAgent) -> list[SelfOfflineToOnlineAgent]:
        """As :meth:`OfflineAgent.split`; each takes the dataset with it into its online phase."""
        parts = super().split()
        for part in parts:
            part._data = self._data
        return parts

    def _forget_data(self) -> None:
        self._graph = None
        if hasattr(self, "policy"):
            self.policy.set_training_mode(False)

    # ------------------------------------------------------------------ online

    def begin_online(self, steps: int = 0) -> None:
        """Enter the online phase, which :meth:`learn` does by itself.

        :param steps: transitions for which there must be room beside the dataset
        """
        if not self.steps_environments:
            self.steps_environments = True
            self.policy.rank_by(self.online_ranking)
            self._freeze_reference()
        former = self._memory
        rows = len(former) if former is not None else len(self._data["returns"]) if self._data else 0
        room = min(rows + steps, max(self.buffer_size, rows + 1))
        if former is None or (room > former.buffer_size and not former.full):
            self._memory_rows, self._graph = max(1, room), None
            self._memory = self._make_memory()
            if former is not None:
                self._memory.take_over(former)
            elif self._data:
                self._memory.fill(self._data)
            self._data = {}
        self._memory.note_size()  # type: ignore[union-attr]

    def _freeze_reference(self) -> None:
        """What an agent keeps of its policy at the end of the offline phase."""

    def _make_memory(self) -> ChunkMemory:
        policy = self.policy
        return ChunkMemory(
            self._memory_rows, policy.obs_dim, policy.action_dim, self.horizon, self.gamma, self.n_envs, self.device
        )

    @property
    def replay_buffer(self) -> Any:
        """The replay memory of the online phase, a :class:`ChunkMemory`; None before it."""
        if self._memory is None and self.steps_environments and self._memory_rows:
            self._memory = self._make_memory()
        return self._memory

    def _draw(self, size: int) -> Batch:
        return self._memory.draw(self.seeds, size) if self._memory is not None else super()._draw(size)

    @property
    def _updates_per_call(self) -> int:
        return self.gradient_steps if self.steps_environments else super()._updates_per_call

    def learn(
        self: SelfOfflineToOnlineAgent,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineToOnlineAgent:
        """Train for ``total_timesteps`` env steps, on what is collected and on the dataset; arguments as in SB3.

        A callback's ``on_step`` comes after the updates that follow an env step.

        :param log_interval: episodes between two rows of the log
        :raises ValueError: without an environment, or for several seeds side by side
        :raises NonFiniteError: naming the first action, reward, observation, loss or gradient that is not finite
        """
        if self.env is None:
            raise ValueError(f"{type(self).__name__} learns online in an environment: give it one with set_env.")
        if self.seeds > 1:
            raise ValueError(f"{self.seeds} agents side by side learn from data only: agent.split() gives them one by one.")
        if self._last_obs is None or reset_num_timesteps:
            self._forget_episodes()
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        self.begin_online(total_timesteps - self.num_timesteps + self.n_envs)
        try:
            with self._torch_threads(self.batch_size):
                callback.on_training_start(locals(), globals())
                while self.num_timesteps < total_timesteps and self._step_environments(callback, log_interval):
                    pass
                callback.on_training_end()
        finally:
            self._forget_data()
        return self

    def _step_environments(self, callback: BaseCallback, log_interval: int) -> bool:
        """One step of every environment and the updates after it; whether to go on."""
        callback.on_rollout_start()
        step = self._guarded(self._collect, "collect")
        if step is None:
            self._restart_environments()
            self._forget_episodes()
            return True
        actions, new_obs, rewards, dones, infos = step
        self.online_steps += self.n_envs
        if self.online_steps > self.learning_starts and len(self.replay_buffer):
            self.replay_buffer.note_size()
            self._improve(self.gradient_steps)
        self.num_timesteps += self.n_envs
        before, self._episode_num = self._episode_num, self._episode_num + int(dones.sum())
        if self._episode_num // log_interval > before // log_interval:
            self._dump()
        callback.update_locals(locals())
        going_on = callback.on_step()
        callback.on_rollout_end()
        return going_on

    def _forget_episodes(self) -> None:
        """Before new ones begin: what is left of the plans, and the chunks that are not complete."""
        self._plan = None
        if self._memory is not None:
            self._memory.forget_unfinished()

    def _collect(self) -> tuple[Any, ...]:
        """Play the plans' next actions and remember what comes of them."""
        assert self.env is not None
        before, memory = np.asarray(self._last_obs), self.replay_buffer
        new_obs: Any
        actions, self._plan = self.policy.predict(before, self._plan, self._last_episode_starts)
        check_finite(actions, "action", self.num_timesteps)
        chosen = self._plan.actions[np.arange(self.n_envs), self._plan.played - 1]
        new_obs, rewards, dones, infos = self.env.step(actions)
        check_finite(rewards, "reward", self.num_timesteps)
        check_finite(new_obs, "observation", self.num_timesteps)
        for env, done in enumerate(dones.tolist()):
            following = new_obs[env]
            if done and infos[env].get("terminal_observation") is not None:
                following = infos[env]["terminal_observation"]
                check_finite(stacked((following,)), "terminal observation", self.num_timesteps, env)
            terminal = done and not infos[env].get("TimeLimit.truncated", False)
            memory.add(env, Transition(before[env], chosen[env], float(rewards[env]), terminal, following), done)
        self._last_obs, self._last_episode_starts = new_obs, dones
        self._update_info_buffer([{"is_success": info.get("success"), **info} for info in infos], dones)
        return actions, new_obs, rewards, dones, infos

    def _dump(self) -> None:
        for name, key in (("ep_rew_mean", "r"), ("ep_len_mean", "l")):
            if self.ep_info_buffer:
                self.logger.record(f"rollout/{name}", safe_mean([info[key] for info in self.ep_info_buffer]))
        if self.ep_success_buffer:
            self.logger.record("rollout/success_rate", safe_mean(self.ep_success_buffer))
        super()._dump()

    # ------------------------------------------------------------------ files

    def rollout_state(self) -> dict[str, Any]:
        """As :meth:`OfflineAgent.rollout_state`, with the plans and the chunks that have begun."""
        plan = None if self._plan is None else tuple(self._plan)
        unfinished = [] if self._memory is None else self._memory.unfinished()
        return {**super().rollout_state(), "plan": plan, "unfinished": unfinished}

    def restore_rollout_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`rollout_state` gave."""
        super().restore_rollout_state(state)
        self._plan = None if state["plan"] is None else Plan(*state["plan"])
        if self.replay_buffer is not None:
            self.replay_buffer.restore_unfinished(state["unfinished"])

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_memory", "_plan"]
