"""What every suite of environments tells the one door in `make.py`: a record, the error class, a cast to float32."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first


class EnvError(ValueError):
    """An environment cannot be made as asked; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class PoolTask:
    """How EnvPool serves one id.

    :param pool_id: EnvPool's own name
    :param agrees: whether the id passed the comparison with the reference, so that ``backend="auto"`` may take EnvPool
    :param arguments: our keyword arguments that EnvPool takes under the same name and with the same meaning
    :param config: EnvPool's own arguments that make it the same task as the reference
    """

    pool_id: str
    agrees: bool
    arguments: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)


def _no_pool(env_id: str) -> PoolTask | None:
    return None


@dataclass(frozen=True)
class Suite:
    """One suite of environments.

    :param name: as `list_envs` shows it
    :param owns: whether an id belongs to the suite by its form, installed or not
    :param ids: the ids that can be made now; empty where the suite's extra is not installed
    :param make: ``make(env_id, flatten, render_mode, **kwargs)`` gives one environment
    :param pool: EnvPool's task for an id, None where there is none; `EnvError` where only the installation lacks something
    :param vec_arguments: keyword arguments that `make_vec` adds
    :param frame_stack: how many observations `make_vec` stacks by default
    :param scoring: arguments under which returns are the scores that papers report, where training sees others
    :param collecting: arguments under which offline data are collected, where they should cover more than training sees
    :param cautious: arguments, by id, under which policies learn to be safe, where without them they would be so nearly
    :param behaviours: controllers (observations (B, o) to actions (B, d)) that make offline data without training
    :param clinician: a behaviour that may differ from episode to episode: from a seed and a number of episodes to the
        function from observations (B, o) and the numbers of their episodes (B,) to actions (B, d)
    :param unseen: arguments of the environments in which generalisation is measured, where training does not see all
    """

    name: str
    owns: Callable[[str], bool]
    ids: Callable[[], list[str]]
    make: Callable[..., gym.Env]
    pool: Callable[[str], PoolTask | None] = _no_pool
    vec_arguments: Mapping[str, Any] = field(default_factory=dict)
    frame_stack: int | None = None
    scoring: Mapping[str, Any] = field(default_factory=dict)
    collecting: Mapping[str, Any] = field(default_factory=dict)
    cautious: Callable[[str], Mapping[str, Any]] = lambda env_id: {}
    behaviours: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    clinician: Callable[[int, int], Callable[[np.ndarray, np.ndarray], np.ndarray]] | None = None
    unseen: Mapping[str, Any] | None = None


def installed(*modules: str) -> bool:
    """Whether all of the modules can be imported."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def require(env_id: str, extra: str, *modules: str) -> None:
    """Refuse an id whose modules are not installed."""
    if not installed(*modules):
        raise EnvError(f'{env_id} needs an extra: pip install "tether-rl[{extra}]".')


def unknown_argument(env_id: str, name: str, known: Iterable[str] = ()) -> EnvError:
    """The error that names an argument which the environment does not have, and the nearest that it has."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "leave it out, or look for its right name."
    return EnvError(f"{env_id} has no argument '{name}': {hint}")


def is_hwc_image(space: spaces.Space) -> TypeGuard[spaces.Box]:
    """Whether observations are images with the channels last."""
    return isinstance(space, spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space)


class Float32(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Give float64 observations as float32, in a Box or in the Boxes of a Dict: half the memory of every buffer."""

    def __init__(self, env: gym.Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.observation_space = float32_space(env.observation_space)

    def observation(self, observation: Any) -> Any:
        if isinstance(observation, dict):
            return {key: self.observation(value) for key, value in observation.items()}
        return observation.astype(np.float32) if observation.dtype == np.float64 else observation


def float32_space(space: spaces.Space) -> spaces.Space:
    """The space with every float64 Box in it as float32."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: float32_space(value) for key, value in space.items()})
    if isinstance(space, spaces.Box) and space.dtype == np.float64:
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    return space


def cast_observations(env: gym.Env) -> gym.Env:
    """Wrap the environment in `Float32` where its observations are float64."""
    return env if float32_space(env.observation_space) == env.observation_space else Float32(env)
