"""The state of environments: what :func:`env_state` takes from one, :func:`restore_env_state` gives to a fresh one.

An environment is walked attribute by attribute, through its wrappers and the vector around it: numbers, arrays,
containers, random generators, all of MuJoCo's ``MjData`` and the numbers of its model. An object in which something
cannot be read (a game engine in C++) must offer ``resumable_state()`` and ``resume_from(state)``, or there is no state.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import logging
import pathlib
import random
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.vec_env import SubprocVecEnv

from .plain import Arrays, PlainDataError, encode


class NoStateError(ValueError):
    """An environment whose state cannot be taken or given back; the message names the object in the way."""


class Resumable(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Lets the vector environment ask for an environment's state where it lives in another process.

    ``make_vec_env(..., vec_env_cls=SubprocVecEnv, wrapper_class=Resumable)``; elsewhere it is not needed.
    """

    def __init__(self, env: gym.Env) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def resumable_state(self) -> Any:
        """State of the environment inside, as :func:`env_state` gives it."""
        return env_state(self.env)

    def resume_from(self, state: Any) -> None:
        """Put the state into the environment inside, which must have been reset once."""
        restore_env_state(self.env, state)


# Neither state nor something that refers to it.
_NOTHING = (
    types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, functools.partial, io.IOBase,
    logging.Logger, re.Pattern, weakref.ref, threading.Event, type(threading.Lock()), type(threading.RLock()),
    EnvSpec, pathlib.PurePath, ResultsWriter,
)  # fmt: skip
# The same by name: these are not imported before an environment does it.
_NOTHING_NAMED = frozenset({"MujocoRenderer", "MjvCamera", "MjvOption", "MjvScene", "Renderer"})
# What was told to the last caller, constructor arguments, windows, and the clock of a monitor's file.
_LEFT_OUT = frozenset({
    "buf_infos", "reset_infos", "metadata", "spec", "_cached_spec", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs",
    "class_attributes", "t_start", "viewer", "screen", "clock", "_named", "_contexts", "render_kwargs",
})  # fmt: skip
CONSTANT = 2**24  # bytes; larger arrays are tables, which are compared and not saved
_ASSETS = re.compile(r"(mesh|tex|skin|name|path|text|bvh|oct)_|names|paths")  # of a model: large, and no task changes them


def env_state(env: Any) -> Any:
    """Everything that decides how ``env`` goes on: dicts, lists, numbers and arrays, for :func:`~.plain.encode`.

    :param env: a vector environment or a single one; between two steps
    :raises NoStateError: naming the object whose state is not to be had
    """
    return _Walk().take(env, type(env).__name__)


def restore_env_state(env: Any, state: Any) -> None:
    """Give ``env``, made as the other one was, the state of that one.

    :param env: is reset first
    :raises NoStateError: if the two do not match
    """
    if hasattr(env, "reset") and not _speaks_for_itself(env):
        env.reset()  # what an environment makes at its first reset must be there
    _Walk().give(env, state, type(env).__name__)


def _speaks_for_itself(thing: Any) -> bool:
    return hasattr(type(thing), "resumable_state")


class _Walk:
    """One way through an environment's objects; each is visited once."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}  # the objects themselves, or their numbers could be given to others

    def _first_visit(self, thing: Any) -> bool:
        first = id(thing) not in self.seen
        self.seen[id(thing)] = thing
        return first

    # ------------------------------------------------------------------ taking

    def take(self, thing: Any, path: str) -> Any:
        """State of one object: None if there is nothing in it."""
        if isinstance(thing, _NOTHING) or _is_nothing_by_name(type(thing)):
            return None
        if isinstance(thing, np.ndarray) and thing.nbytes > CONSTANT:
            return {"digest": _digest(thing)}
        for matches, read, _ in _SPECIAL:
            if matches(thing):
                return {"special": read(thing)} if self._first_visit(thing) else None
        if _is_plain(thing):
            return {"value": copy.deepcopy(thing)}
        if not self._first_visit(thing):
            return None
        if isinstance(thing, dict):
            return {"entries": [[key, self.take(part, f"{path}[{key!r}]")] for key, part in thing.items()]}
        if isinstance(thing, (list, tuple)):
            return {"items": [self.take(part, f"{path}[{i}]") for i, part in enumerate(thing)]}
        attributes = _attributes(thing, path)
        return {"class": type(thing).__qualname__, "attributes": {
            name: state for name, part in attributes if (state := self.take(part, f"{path}.{name}")) is not None
        }}  # fmt: skip

    # ------------------------------------------------------------------ giving

    def give(self, thing: Any, state: Any, path: str) -> None:
        """Put a state into an object that is no plain value."""
        if state is None:
            return
        if "digest" in state:
            if not isinstance(thing, np.ndarray) or _digest(thing) != state["digest"]:
                raise NoStateError(f"{path}, an array of over {CONSTANT:,} bytes, is not that of where the state was taken.")
            return
        if "special" in state:
            for matches, _, write in _SPECIAL:
                if matches(thing):
                    return self._try(functools.partial(write, thing, state["special"]), path)
            raise NoStateError(f"{path} is {type(thing).__name__} here and was another object where the state was taken.")
        if "entries" in state:
            parts = [(thing, key, part, f"{path}[{key!r}]") for key, part in state["entries"]]
        elif "items" in state:
            if not isinstance(thing, (list, tuple)) or len(thing) != len(state["items"]):
                raise NoStateError(f"{path} has another length than where the state was taken.")
            parts = [(thing, i, part, f"{path}[{i}]") for i, part in enumerate(state["items"])]
        else:
            if type(thing).__qualname__ != state["class"]:
                here = type(thing).__name__
                raise NoStateError(f"{path} is {here} here and was {state['class']} where the state was taken.")
            parts = [(vars(thing), name, part, f"{path}.{name}") for name, part in state["attributes"].items()]
        for holder, key, part, where in parts:
            self._give_part(holder, key, part, where)

    def _give_part(self, holder: Any, key: Any, state: Any, path: str) -> None:
        if state is None:
            return
        missing = isinstance(holder, dict) and key not in holder
        if "value" in state:
            present = None if missing else holder[key]
            if not _overwrite(present, state["value"]):
                self._try(lambda: holder.__setitem__(key, state["value"]), path)
        elif missing or holder[key] is None:
            made = _make_generator(state.get("special"))
            if made is None:
                raise NoStateError(f"{path} is missing here, and was there where the state was taken.")
            holder[key] = made
        else:
            self.give(holder[key], state, path)

    @staticmethod
    def _try(write: Callable[[], None], path: str) -> None:
        try:
            write()
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise NoStateError(f"{path} does not take the state ({error}).") from error


def _is_nothing_by_name(cls: type) -> bool:
    module = str(getattr(cls, "__module__", ""))
    return module.startswith("dm_control.mjcf") or ("mujoco" in module and cls.__name__ in _NOTHING_NAMED)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _is_plain(thing: Any) -> bool:
    try:
        encode(thing, Arrays())
    except (PlainDataError, RecursionError):
        return False
    return True


def _attributes(thing: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(thing, "__dict__") or any(_is_foreign(cls) for cls in type(thing).__mro__):
        raise NoStateError(f"{path} is a {type(thing).__qualname__}, whose state cannot be read.")
    return ((name, part) for name, part in vars(thing).items() if name not in _LEFT_OUT)


def _is_foreign(cls: type) -> bool:
    """Whether a class is written in C or C++, so that ``vars`` does not show what its objects hold."""
    bound = type(cls).__name__.startswith(("pybind11", "nb_"))
    return bound or (cls is not object and not cls.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE


def _overwrite(present: Any, value: Any) -> bool:
    """Write an array into the one that is there, which others may look at."""
    if not (isinstance(present, np.ndarray) and isinstance(value, np.ndarray) and present.flags.writeable):
        return False
    if (present.shape, present.dtype) != (value.shape, value.dtype):
        return False
    present[...] = value
    return True


# ---------------------------------------------------------------------- objects of which we know what is in them


def _take_generator(generator: np.random.Generator) -> Any:
    return {"generator": generator.bit_generator.state}


def _give_generator(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state["generator"]


def _make_generator(state: Any) -> np.random.Generator | None:
    """A generator in a state, where there is none yet."""
    if not isinstance(state, dict) or "generator" not in state:
        return None
    kind = {"PCG64": np.random.PCG64, "MT19937": np.random.MT19937, "Philox": np.random.Philox, "SFC64": np.random.SFC64}
    made = np.random.Generator(kind[state["generator"]["bit_generator"]]())
    _give_generator(made, state)
    return made


def take_space(space: spaces.Space) -> Any:
    """A space's random generator and those of its parts; everything else in it is constant."""
    parts = space.values() if isinstance(space, spaces.Dict) else space if isinstance(space, spaces.Tuple) else ()
    own = None if space._np_random is None else _take_generator(space._np_random)
    return {"random": own, "parts": [take_space(part) for part in parts]}


def give_space(space: spaces.Space, state: Any) -> None:
    """Put back what :func:`take_space` took."""
    parts = space.values() if isinstance(space, spaces.Dict) else space if isinstance(space, spaces.Tuple) else ()
    if state["random"] is None:
        space._np_random = None  # type: ignore[assignment]
    else:
        _give_generator(space.np_random, state["random"])
    for part, own in zip(parts, state["parts"], strict=True):
        give_space(part, own)


def _arrays_of(thing: Any) -> dict[str, np.ndarray]:
    """Arrays of a MuJoCo structure that have the same size at every step, by name."""
    names = _ARRAY_NAMES.get(type(thing))
    if names is None:
        names = [name for name in dir(thing) if not name.startswith(("_", "efc_")) and not _ASSETS.match(name)]
        names = _ARRAY_NAMES[type(thing)] = [n for n in names if isinstance(getattr(thing, n), np.ndarray)]
    return {name: getattr(thing, name) for name in names}


_ARRAY_NAMES: dict[type, list[str]] = {}


def _is_mujoco(thing: Any, name: str) -> bool:
    return type(thing).__name__ == name and type(thing).__module__.startswith("mujoco.")


def _take_data(data: Any) -> Any:
    """What the next step starts from, and every array derived from the last one: rewards read them before it."""
    import mujoco

    part = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.zeros(mujoco.mj_stateSize(data.model, part))
    mujoco.mj_getState(data.model, data, state, part)
    return {"integration": state, "arrays": {name: array.copy() for name, array in _arrays_of(data).items() if array.size}}


def _give_data(data: Any, state: Any) -> None:
    import mujoco

    part = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(data.model, data, state["integration"], part)
    mujoco.mj_forward(data.model, data)  # contacts and constraints, whose number differs from step to step
    mujoco.mj_setState(data.model, data, state["integration"], part)  # with the warm start as it was
    _give_arrays(data, state["arrays"])


def _give_arrays(thing: Any, arrays: dict[str, np.ndarray]) -> None:
    present = _arrays_of(thing)
    for name, array in arrays.items():
        if present[name].shape == array.shape or not _is_mujoco(thing, "MjData"):
            present[name][...] = array


def _take_model(model: Any) -> Any:
    """Sizes, masses, places: tasks draw some of them anew at every reset."""
    return {name: array.copy() for name, array in _arrays_of(model).items() if array.size}


def _take_atari(game: Any) -> Any:
    return {"atari": game.cloneState(include_rng=True).__getstate__()}


def _give_atari(game: Any, state: Any) -> None:
    from ale_py import ALEState

    game.restoreState(ALEState(state["atari"]))


def _refuse_mute(env: SubprocVecEnv) -> None:
    if not env.has_attr("resumable_state"):
        raise NoStateError("SubprocVecEnv's environments live in other processes: make them with wrapper_class=Resumable.")


def _take_subproc(env: SubprocVecEnv) -> Any:
    _refuse_mute(env)
    return {"envs": env.env_method("resumable_state"), "seeds": list(env._seeds), "options": list(env._options)}


def _give_subproc(env: SubprocVecEnv, state: Any) -> None:
    _refuse_mute(env)
    env.reset()
    for i, own in enumerate(state["envs"]):
        env.env_method("resume_from", own, indices=[i])
    env._seeds, env._options = list(state["seeds"]), list(state["options"])


_SPECIAL: list[tuple[Callable[[Any], bool], Callable[[Any], Any], Callable[[Any, Any], None]]] = [
    (_speaks_for_itself, lambda x: x.resumable_state(), lambda x, state: x.resume_from(state)),
    (lambda x: isinstance(x, SubprocVecEnv), _take_subproc, _give_subproc),
    (lambda x: type(x).__name__ == "ALEInterface", _take_atari, _give_atari),
    (lambda x: isinstance(x, np.random.Generator), _take_generator, _give_generator),
    (
        lambda x: isinstance(x, np.random.RandomState),
        lambda x: {"legacy": x.get_state(legacy=False)},
        lambda x, state: x.set_state(state["legacy"]),
    ),
    (
        lambda x: isinstance(x, random.Random),
        lambda x: {"python": x.getstate()},
        lambda x, state: x.setstate(state["python"]),
    ),
    (lambda x: isinstance(x, spaces.Space), take_space, give_space),
    (lambda x: _is_mujoco(x, "MjData"), _take_data, _give_data),
    (lambda x: _is_mujoco(x, "MjModel"), _take_model, _give_arrays),
]
