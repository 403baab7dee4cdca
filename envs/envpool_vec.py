"""EnvPool's C++ environments as a Stable-Baselines3 `VecEnv` with the whole contract.

EnvPool's own interface differs from what SB3 needs in six ways, which this file sets right:

- it resets on the step *after* the end: here the ended environments are reset at once, by their ids;
- it reports an end at the time limit as a truncation even if the task ended in that very step: here EnvPool gets no
  time limit, the adapter counts the steps itself, and `TimeLimit.truncated` is true for time limits only;
- observations are float64, some in pieces: here they are the reference environment's, in its order and dtype;
- the bounds of some spaces are wrong: here the spaces are the reference's;
- it seeds at construction only: here `seed` rebuilds the pool at the next `reset`;
- its state cannot be read: here it is lived through again, see `pool_replay.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from .pool_env import NO_LIMIT
from .pool_replay import EpisodeLog
from .suite import EnvError, PoolTask, is_hwc_image


def available_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EnvPoolVecEnv(VecEnv):
    """A vector of EnvPool environments.

    Observations are (n_envs, *shape) in the dtype of ``reference.observation_space``, images CHW; rewards are (n_envs,)
    float32, dones (n_envs,) bool. Only the infos of ended episodes have entries: ``terminal_observation``,
    ``TimeLimit.truncated`` and the last values of what EnvPool reports (``success``, ``x_velocity``, ...).

    :param task: EnvPool's task
    :param reference: an environment of `make_env` whose spaces, spec and time limit are taken over; it is not stepped
    :param n_envs: number of environments
    :param num_threads: threads that step them; by default one per environment, at most one per core
    :param kwargs: the task's arguments, from ``task.arguments``
    """

    def __init__(self, task: PoolTask, reference: gym.Env, n_envs: int, num_threads: int | None = None, **kwargs: Any) -> None:
        self._task, self._kwargs = task, kwargs
        self._num_threads = num_threads or min(n_envs, available_cores())
        self._limit = (reference.spec and reference.spec.max_episode_steps) or NO_LIMIT
        self._attributes = {"render_mode": None, "spec": reference.spec, "metadata": reference.metadata}
        self._obs_keys = ["obs"]
        if reference.has_wrapper_attr("observation_names"):
            self._obs_keys = [f"obs:{name}" for name in reference.get_wrapper_attr("observation_names")]
        self.spec = reference.spec
        self.metadata = reference.metadata
        space = reference.observation_space
        if is_hwc_image(space):
            space = VecTransposeImage.transpose_space(space)
        super().__init__(n_envs, space, reference.action_space)
        self._ids = np.arange(n_envs, dtype=np.int32)
        self._lengths = np.zeros(n_envs, dtype=np.int64)
        self._pool: Any = None
        self._log = EpisodeLog(n_envs)
        self.seed()

    def _build(self, seeds: Sequence[int]) -> None:
        import envpool

        self._log.begin([int(seed) for seed in seeds])
        self._pool = envpool.make_gymnasium(
            self._task.pool_id,
            num_envs=self.num_envs,
            num_threads=self._num_threads,
            env_seed=[seed % 2**31 for seed in seeds],
            max_episode_steps=NO_LIMIT,
            **{**self._task.config, **self._kwargs},
        )
        keys = list(self._pool._state_keys)
        self._columns = {key: keys.index(key) for key in ("reward", "done")}
        self._info_columns = {
            key.removeprefix("info:"): index
            for index, key in enumerate(keys)
            if key.startswith("info:") and not key.endswith("env_id")
        }
        self._obs_columns = [keys.index(key) for key in self._obs_keys]
        self._action_type = self._pool._spec._action_spec[-1][0]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed environment i with ``seed + i``; this takes effect at the next `reset`."""
        return super().seed(seed)

    def reset(self) -> np.ndarray:
        """Reset all environments.

        :return: (n_envs, *shape) observations
        :raises EnvError: if options were set, which EnvPool cannot take
        """
        if any(self._options):
            raise EnvError("EnvPool's environments take no reset options: use backend='dummy' or backend='subproc'.")
        if self._seeds[0] is not None:
            self._build([seed or 0 for seed in self._seeds])
            self._reset_seeds()
        self._lengths[:] = 0
        return self._reset(self._ids)

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions, (n_envs, d) or (n_envs,) where they are discrete; the physics runs from here on."""
        self._log.act(actions := np.ascontiguousarray(actions, dtype=self._action_type))
        # The pool's `send` and `recv` build trees of dicts around these two calls, which take a quarter of a step.
        self._pool._send([self._ids, self._ids, actions])

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step that `step_async` began; see the class for what comes back."""
        state = self._pool._recv()
        observations = self._observations(state)
        rewards, terminated = state[self._columns["reward"]], state[self._columns["done"]]
        self._lengths += 1
        dones = terminated | (self._lengths >= self._limit)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            self._end_episodes(np.flatnonzero(dones).astype(np.int32), state, observations, terminated, infos)
        return observations, rewards, dones, infos

    def _end_episodes(
        self,
        ended: np.ndarray,
        state: list[np.ndarray],
        observations: np.ndarray,
        terminated: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Reset the ended environments; write their first observations into `observations` and fill their infos."""
        for i in ended:
            infos[i] = {name: state[column][i] for name, column in self._info_columns.items()}
            infos[i]["terminal_observation"] = observations[i].copy()
            infos[i]["TimeLimit.truncated"] = not bool(terminated[i])
        observations[ended] = self._reset(ended)
        self._lengths[ended] = 0

    def _reset(self, ids: np.ndarray) -> np.ndarray:
        self._log.reset(ids)
        self._pool._reset(ids)
        return self._observations(self._pool._recv())

    def _observations(self, state: list[np.ndarray]) -> np.ndarray:
        """(n, *shape) observations in the dtype of the space, in fresh memory."""
        dtype = self.observation_space.dtype
        if len(self._obs_columns) == 1:
            return state[self._obs_columns[0]].astype(dtype, copy=False)  # EnvPool gives every step its own memory
        count = len(state[self._columns["done"]])
        return np.concatenate([state[c].reshape(count, -1) for c in self._obs_columns], axis=1, dtype=dtype)

    def resumable_state(self) -> dict[str, Any]:
        """Where the environments are, as plain data; between two steps."""
        return {"log": self._log.state(), "lengths": self._lengths.copy(), "seeds": list(self._seeds)}

    def resume_from(self, state: dict[str, Any]) -> None:
        """Bring the environments to where :meth:`resumable_state` found them, see :class:`EpisodeLog`."""
        if state["log"]["seeds"]:
            self._build(state["log"]["seeds"])
            self._log.replay(state["log"], self._reset, self._step_some)
        self._lengths[:] = state["lengths"]
        self._seeds = list(state["seeds"])

    def _step_some(self, ids: np.ndarray, actions: np.ndarray) -> None:
        self._pool._send([ids, ids, actions])
        self._pool._recv()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """``render_mode``, ``spec`` or ``metadata``, once per environment; there is no other attribute to read."""
        if attr_name not in self._attributes:
            raise AttributeError(
                f"EnvPool's environments live in C++ and have no attribute '{attr_name}': use backend='dummy'."
            )
        return [self._attributes[attr_name] for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: the environments live in C++."""
        raise EnvError(f"EnvPool's environments live in C++, so '{attr_name}' cannot be set: use backend='dummy'.")

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kw: Any) -> list[Any]:
        """Refused: the environments live in C++."""
        raise EnvError(f"EnvPool's environments live in C++, so '{method_name}' cannot be called: use backend='dummy'.")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """False for each: no Python wrapper is around an environment in C++."""
        return [False for _ in self._get_indices(indices)]

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
