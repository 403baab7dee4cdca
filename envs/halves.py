"""Two vector environments that together are one: the halves can be stepped alternately, so that one's physics run
while the other's actions are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, is_vecenv_wrapped
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn


class HalvesVecEnv(VecEnv):
    """``first`` and ``second`` side by side, environment for environment what one vector of both would be.

    Tether's on-policy agents step :attr:`halves` themselves; for everybody else it is an ordinary vector environment.

    :param first: a vector environment with array observations
    :param second: another with the same spaces
    :raises ValueError: if their spaces differ
    """

    def __init__(self, first: VecEnv, second: VecEnv) -> None:
        if (first.observation_space, first.action_space) != (second.observation_space, second.action_space):
            raise ValueError("The halves of a vector environment need equal observation and action spaces.")
        self._halves = (first, second)
        self.spec, self.metadata = getattr(first, "spec", None), getattr(first, "metadata", {"render_modes": []})
        super().__init__(first.num_envs + second.num_envs, first.observation_space, first.action_space)

    @property
    def halves(self) -> tuple[VecEnv, VecEnv]:
        """The two vector environments; whoever steps one of them must finish that step before stepping the whole."""
        return self._halves

    def reset(self) -> np.ndarray:
        """First observations of all environments, (n_envs, *obs)."""
        return np.concatenate([half.reset() for half in self._halves])

    def step_async(self, actions: np.ndarray) -> None:
        """Send every environment its action."""
        n = self._halves[0].num_envs
        self._halves[0].step_async(actions[:n])
        self._halves[1].step_async(actions[n:])

    def step_wait(self) -> VecEnvStepReturn:
        """Observations, rewards, dones and infos of all environments."""
        (obs, rewards, dones, infos), (obs2, rewards2, dones2, infos2) = (half.step_wait() for half in self._halves)
        joined = (np.concatenate([obs, obs2]), np.concatenate([rewards, rewards2]), np.concatenate([dones, dones2]))
        return *joined, [*infos, *infos2]

    def close(self) -> None:
        """Close both."""
        for half in self._halves:
            half.close()

    def _ask(self, indices: VecEnvIndices, ask: Callable[[VecEnv, list[int]], Sequence[Any]]) -> list[Any]:
        """One answer per chosen environment, in their order, from the half that has it."""
        n = self._halves[0].num_envs
        places = [(self._halves[i >= n], i if i < n else i - n) for i in self._get_indices(indices)]
        return [ask(half, [i])[0] for half, i in places]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of each chosen environment, in their order."""
        return self._ask(indices, lambda half, own: half.get_attr(attr_name, own))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of each chosen environment."""
        self._ask(indices, lambda half, own: [half.set_attr(attr_name, value, own)])

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kw: Any) -> list[Any]:
        """Call a method of each chosen environment."""
        return self._ask(indices, lambda half, own: half.env_method(method_name, *method_args, indices=own, **kw))

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether each environment has the wrapper; a half inside ``VecMonitor`` counts as monitored."""

        def ask(half: VecEnv, own: list[int]) -> list[bool]:
            monitored = wrapper_class is Monitor and is_vecenv_wrapped(half, VecMonitor)
            return [True] if monitored else half.env_is_wrapped(wrapper_class, own)

        return self._ask(indices, ask)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed environment i with ``seed + i``; this takes effect at the next `reset`."""
        seeds = super().seed(seed)
        self._halves[0].seed(seeds[0])
        self._halves[1].seed(seeds[self._halves[0].num_envs])
        return seeds

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Options of the next `reset`, for all environments or one dict each."""
        super().set_options(options)
        n = self._halves[0].num_envs
        self._halves[0].set_options(self._options[:n])
        self._halves[1].set_options(self._options[n:])
