"""The one door to every environment: `make_env` for one, `make_vec` for a Stable-Baselines3 `VecEnv` of many."""

from __future__ import annotations

import difflib
import logging
import multiprocessing
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from . import atari, bullet, clinical, dm_control, mujoco, point_robot, procgen, registered, robosuite, robotics, safety, tree
from .envpool_vec import available_cores
from .halves import HalvesVecEnv
from .suite import EnvError, PoolTask, Suite, cast_observations, installed, is_hwc_image, unknown_argument

logger = logging.getLogger("tether")

# The last one owns whatever the others do not.
SUITES: tuple[Suite, ...] = (
    mujoco.SUITE,
    dm_control.SUITE,
    procgen.SUITE,
    atari.SUITE,
    robotics.ROBOTICS,
    robotics.META_WORLD,
    robotics.OGBENCH,
    robosuite.SUITE,
    clinical.SEPSIS,
    clinical.GLUCOSE,
    clinical.LINEAR_PATIENT,
    safety.SUITE,
    bullet.SUITE,
    point_robot.SUITE,
    tree.SUITE,
    registered.SUITE,
)
BACKENDS = ("auto", "dummy", "subproc", "envpool")


def list_envs() -> dict[str, list[str]]:
    """The ids that can be made with what is installed, by suite."""
    suites: dict[str, list[str]] = {}
    for suite in SUITES:
        suites.setdefault(suite.name, []).extend(env_id for env_id in suite.ids() if _suite_of(env_id) is suite)
    return {name: ids for name, ids in suites.items() if ids}


def make_env(env_id: str, *, flatten: bool = True, render_mode: str | None = None, **kwargs: Any) -> gym.Env:
    """Make one environment.

    :param env_id: an id of `list_envs`, or any id registered with Gymnasium, also as ``module:EnvId``
    :param flatten: give a dm_control task's observation as one float32 Box; False keeps its Dict
    :param render_mode: as in ``gymnasium.make``
    :param kwargs: the environment's own arguments; ``max_episode_steps`` is the time limit of every one
    :return: observations are float32 where the environment itself gives float64, images HWC uint8
    :raises EnvError: for an id or argument that is not known, or an id whose extra is not installed
    """
    try:
        env = _suite_of(env_id).make(env_id, flatten, render_mode, **kwargs)
    except gym.error.DependencyNotInstalled as error:
        raise EnvError(f"{env_id} cannot be made: {str(error).rstrip('.')}.") from error
    except gym.error.Error as error:
        if env_id in gym.registry:
            raise
        raise EnvError(_unknown_id(env_id)) from error
    except ModuleNotFoundError as error:
        name = error.name or env_id.partition(":")[0]
        raise EnvError(f"{env_id} needs the module '{name}': install it, or correct its name.") from error
    except TypeError as error:
        argument = re.search(r"(?:unexpected keyword|multiple values for) argument '(\w+)'", str(error))
        if argument is None or argument[1] not in kwargs:
            raise
        raise unknown_argument(env_id, argument[1]) from error
    return cast_observations(env)


def make_vec(
    env_id: str,
    n_envs: int = 1,
    *,
    backend: str = "auto",
    seed: int | None = None,
    normalize: bool | Mapping[str, Any] = False,
    monitor_file: str | Path | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    frame_stack: int | None = None,
    num_threads: int | None = None,
    halves: bool = False,
    wrapper_class: Callable[[gym.Env], gym.Env] | None = None,
) -> VecEnv:
    """Make a vector of environments whose ``info["episode"]`` tells return and length at every episode's end.

    :param env_id: as in `make_env`
    :param n_envs: number of environments
    :param backend: ``dummy`` (one process), ``subproc`` (a process each), ``envpool`` (C++ threads), or ``auto``: the
        fastest of them that gives the same observations and rewards; see `resolve_backend`
    :param seed: environment i is seeded with ``seed + i``, the action space with ``seed``
    :param normalize: wrap in ``VecNormalize``; a mapping gives its arguments
    :param monitor_file: where to write SB3's ``monitor.csv``
    :param env_kwargs: arguments for `make_env`
    :param frame_stack: number of observations to stack along the last axis, of images along the first; 0 for none. By
        default 4 for Atari, whose games also get SB3's ``AtariWrapper``, and none elsewhere
    :param num_threads: threads of EnvPool; by default one per environment, at most one per core
    :param halves: on EnvPool, with an even ``n_envs`` and no ``normalize``, give a `HalvesVecEnv`, whose two halves
        Tether's on-policy agents step alternately; elsewhere it changes nothing
    :param wrapper_class: put around every environment, which then runs in Python
    :return: images are CHW uint8, everything else as `make_env` gives it
    :raises EnvError: as `make_env`, and for a backend that is not known or cannot serve the id, or ``n_envs < 1``
    """
    if wrapper_class is not None and backend == "envpool":
        raise EnvError("EnvPool's environments live in C++ and take no wrapper_class: use backend='dummy' or 'subproc'.")
    chosen = "dummy" if wrapper_class and backend == "auto" else resolve_backend(env_id, n_envs, backend, env_kwargs)
    logger.info("%s: %d environment(s) on backend '%s'", env_id, n_envs, chosen)
    suite = _suite_of(env_id)
    kwargs = {**suite.vec_arguments, **(env_kwargs or {})}
    stack = frame_stack if frame_stack is not None else suite.frame_stack or 0
    if halves and chosen == "envpool" and n_envs % 2 == 0 and normalize is False:
        threads = max(1, (num_threads or available_cores()) // 2)
        pools = [_monitored(_make_pool(env_id, n_envs // 2, threads, dict(kwargs)), path) for path in (monitor_file, None)]
        pools[1].results_writer, pools[1].t_start = pools[0].results_writer, pools[0].t_start  # one monitor.csv for both
        venv: VecEnv = HalvesVecEnv(*(_arranged(pool, stack) for pool in pools))
    elif chosen == "envpool":
        venv = _arranged(_monitored(_make_pool(env_id, n_envs, num_threads, kwargs), monitor_file), stack)
    else:
        venv = _arranged(_monitored(_make_python(env_id, n_envs, chosen, kwargs, wrapper_class), monitor_file), stack)
    if normalize is not False:
        venv = VecNormalize(venv, **(normalize if isinstance(normalize, Mapping) else {}))
    if seed is not None:
        venv.seed(seed)
        venv.action_space.seed(seed)
    return venv


def _monitored(venv: VecEnv, monitor_file: str | Path | None) -> VecMonitor:
    return VecMonitor(venv, None if monitor_file is None else str(monitor_file))


def _arranged(venv: VecEnv, frame_stack: int) -> VecEnv:
    """Images as CHW, frames stacked."""
    if is_hwc_image(venv.observation_space):
        venv = VecTransposeImage(venv)
    return VecFrameStack(venv, frame_stack) if frame_stack else venv


def resolve_backend(env_id: str, n_envs: int = 1, backend: str = "auto", env_kwargs: Mapping[str, Any] | None = None) -> str:
    """The backend that `make_vec` takes for these arguments: ``dummy``, ``subproc`` or ``envpool``.

    ``auto`` is ``envpool`` for several environments whose agreement with the reference is tested and whose arguments
    EnvPool knows, else ``dummy``: most steps are shorter than what ``subproc`` costs to pass them between processes.

    :raises EnvError: for a backend that is not known or cannot serve the id, or ``n_envs < 1``
    """
    if backend not in BACKENDS:
        raise EnvError(f"There is no backend '{backend}': use one of {', '.join(BACKENDS)}.")
    if n_envs < 1:
        raise EnvError(f"n_envs is {n_envs}: use 1 or more.")
    if backend in ("dummy", "subproc"):
        return backend
    refusal = _pool_refusal(env_id, env_kwargs or {})
    if backend == "envpool" and refusal:
        raise EnvError(refusal)
    if backend == "auto" and (refusal or n_envs == 1 or not _pool_task(env_id).agrees):
        return "dummy"
    return "envpool"


def scoring_arguments(env_id: str) -> Mapping[str, Any]:
    """Arguments for `make_vec`'s ``env_kwargs`` under which returns are scores: whole games with Atari's own points."""
    return _suite_of(env_id).scoring


def collecting_arguments(env_id: str) -> Mapping[str, Any]:
    """Arguments for `make_env` under which offline data are collected: random starts, where an environment has one start."""
    return _suite_of(env_id).collecting


def cautious_arguments(env_id: str) -> Mapping[str, Any]:
    """Arguments for `make_env` under which policies learn to be safe in the environment without them."""
    return _suite_of(env_id).cautious(env_id)


def scripted_behaviours(env_id: str) -> Mapping[str, Callable[[Any], Any]]:
    """Controllers that make offline data of an environment without training, by name; none for most."""
    return _suite_of(env_id).behaviours


def clinician_of(env_id: str) -> Callable[[int, int], Callable[[Any, Any], Any]] | None:
    """What treats the patients of an environment, see `Suite.clinician`; None elsewhere."""
    return _suite_of(env_id).clinician


def unseen_arguments(env_id: str) -> Mapping[str, Any] | None:
    """Arguments for `make_env` with which generalisation is measured: all levels of a ProcGen game; None elsewhere."""
    return _suite_of(env_id).unseen


def _suite_of(env_id: str) -> Suite:
    return next(suite for suite in SUITES if suite.owns(env_id))


def _unknown_id(env_id: str) -> str:
    known = _suite_of(env_id).ids()
    near = difflib.get_close_matches(env_id, known, n=1)
    if not near:
        near = difflib.get_close_matches(env_id, [name for ids in list_envs().values() for name in ids], n=1)
    hint = f"did you mean '{near[0]}'?" if near else "list_envs() gives those that are known."
    return f"There is no environment '{env_id}': {hint}"


def _pool_task(env_id: str) -> PoolTask:
    task = _suite_of(env_id).pool(env_id)
    if task is None:
        raise EnvError(f"EnvPool does not have {env_id}: use backend='dummy' or backend='subproc'.")
    return task


def _pool_refusal(env_id: str, env_kwargs: Mapping[str, Any]) -> str | None:
    """Why EnvPool cannot serve the id with these arguments, in a sentence; None where it can."""
    if not installed("envpool"):
        return 'EnvPool is not installed: pip install "tether-rl[envpool]".'
    try:
        task = _pool_task(env_id)
    except EnvError as error:
        return str(error)
    for name in env_kwargs:
        if name not in task.arguments | {"max_episode_steps"}:
            return f"EnvPool's {env_id} does not take '{name}': leave it out, or use backend='dummy'."
    return None


def _make_python(
    env_id: str, n_envs: int, backend: str, kwargs: dict[str, Any], wrapper_class: Callable[[gym.Env], gym.Env] | None
) -> VecEnv:
    def make() -> gym.Env:
        if multiprocessing.parent_process() is not None and backend == "subproc":
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which then saves their state
        env = make_env(env_id, **kwargs)
        return env if wrapper_class is None else wrapper_class(env)

    if backend == "subproc":
        make().close()  # what is wrong is said here, in one sentence, and not by a worker that dies
        return SubprocVecEnv([make] * n_envs)
    return DummyVecEnv([make] * n_envs)


def _make_pool(env_id: str, n_envs: int, num_threads: int | None, kwargs: dict[str, Any]) -> VecEnv:
    from .envpool_vec import EnvPoolVecEnv

    reference = make_env(env_id, **kwargs)
    kwargs.pop("max_episode_steps", None)  # the adapter has it from the reference's spec
    try:
        return EnvPoolVecEnv(_pool_task(env_id), reference, n_envs, num_threads, **kwargs)
    finally:
        reference.close()
