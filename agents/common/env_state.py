"""The state of environments: what :func:`env_state` takes from one, :func:`restore_env_state` gives to a fresh one.

An environment is walked attribute by attribute, through its wrappers and the vector around it: numbers, arrays,
containers, random generators, all of MuJoCo's ``MjData`` and the numbers of its model. An object in which something
cannot be read (a game engine in C++) must offer ``resumable_state()`` and ``resume_from(state)``, or there is no state.
"""

from __future__ import annotations

import copy
import enum
import functools
import hashlib
import io
import logging
import pathlib
import re
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecMonitor

from .known_objects import KNOWN, NoStateError, make_generator, speaks_for_itself
from .plain import Arrays, PlainDataError, encode


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
    types.ModuleType, type, functools.partial, io.IOBase, logging.Logger, re.Pattern, weakref.ref,
    threading.Event, type(threading.Lock()), type(threading.RLock()), EnvSpec, pathlib.PurePath, ResultsWriter,
)  # fmt: skip
# The same by name: these are not imported before an environment does it.
_NOTHING_NAMED = frozenset({"MujocoRenderer", "MjvCamera", "MjvOption", "MjvScene", "Renderer"})
# What was told to the last caller, and constructor arguments.
_LEFT_OUT = frozenset({
    "buf_infos", "reset_infos", "metadata", "spec", "_cached_spec", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs",
    "class_attributes", "render_kwargs",
})  # fmt: skip
_WINDOWS = frozenset({"viewer", "screen", "clock", "_named", "_contexts"})  # left out where they are objects
CONSTANT = 2**24  # bytes; larger arrays are tables, which are compared and not saved


def env_state(env: Any) -> Any:
    """What decides how ``env`` goes on: dicts, lists, numbers and arrays, for :func:`~.plain.encode`.

    State in closures, in modules and in classes is not seen; what lies in plain lists and dicts is taken for values.
    Objects may refer to one another as they like, as long as an environment made anew has the same objects.

    :param env: a vector environment or a single one; between two steps
    :raises NoStateError: naming the object whose state is not to be had
    """
    return _Taking().take(env, type(env).__name__)


def restore_env_state(env: Any, state: Any) -> None:
    """Give ``env``, made as the other one was, the state of that one.

    :param env: is reset first
    :raises NoStateError: if the two do not match; nothing was written then
    """
    if hasattr(env, "reset") and not speaks_for_itself(env):
        env.reset()  # what an environment makes at its first reset must be there
    giving = _Giving()
    giving.give(env, state, type(env).__name__)
    for path, write in giving.writes:
        try:
            write()
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise NoStateError(f"{path} does not take the state ({error}).") from error


class _Taking:
    """One way through an environment's objects. Each that can change has a number, and is described where it is met first."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []  # the objects, or their ids could be given to others

    def take(self, thing: Any, path: str) -> Any:
        """State of one object; None if there is nothing in it."""
        if isinstance(thing, _NOTHING) or _is_nothing_by_name(type(thing)):
            return None
        if isinstance(thing, (types.FunctionType, types.BuiltinFunctionType)):
            return {"function": thing.__qualname__}
        if isinstance(thing, types.MethodType):
            return self.take(thing.__self__, f"{path}.__self__")
        if isinstance(thing, enum.Enum):
            return {"enum": thing.name}
        if not _can_change(thing):
            return self._value(thing, path)
        if id(thing) in self.numbers:
            return {"same": self.numbers[id(thing)]}
        self.numbers[id(thing)] = number = len(self.kept)
        self.kept.append(thing)
        return {"number": number, **self._describe(thing, path)}

    def _value(self, thing: Any, path: str) -> Any:
        try:
            encode(thing, Arrays())
        except PlainDataError:
            if type(thing) is tuple:
                return {"items": [self.take(part, f"{path}[{i}]") for i, part in enumerate(thing)]}
            raise NoStateError(f"{path} is a {type(thing).__qualname__}, whose state cannot be read.") from None
        return {"value": thing}

    def _describe(self, thing: Any, path: str) -> dict[str, Any]:
        for matches, read, _ in KNOWN:
            if matches(thing):
                return {"special": read(thing)}
        if isinstance(thing, np.ndarray) and thing.dtype != object:
            return {"digest": _digest(thing)} if thing.nbytes > CONSTANT else {"value": thing.copy(order="K")}
        if isinstance(thing, th.Tensor):
            return {"value": thing.detach().clone()}
        if type(thing) in (list, dict, deque, OrderedDict, set):
            return self._describe_container(thing, path)
        attributes = {}
        for name, part in _attributes(thing, path).items():
            try:
                state = self.take(part, f"{path}.{name}")
            except NoStateError:
                if name in _WINDOWS:
                    continue
                raise
            if state is not None:
                attributes[name] = state
        return {"classes": _class_names(thing), "attributes": attributes}

    def _describe_container(self, thing: Any, path: str) -> dict[str, Any]:
        with suppress(PlainDataError):
            encode(thing, Arrays())
            return {"value": copy.deepcopy(thing)}
        if isinstance(thing, dict):
            return {"entries": [[key, self.take(part, f"{path}[{key!r}]")] for key, part in thing.items()]}
        return {"items": [self.take(part, f"{path}[{i}]") for i, part in enumerate(thing)]}


class _Giving:
    """The same way through another environment. What is to be written is gathered, and written when all of it fits."""

    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.writes: list[tuple[str, Callable[[], None]]] = []

    def give(self, thing: Any, state: Any, path: str) -> None:
        """Prepare to put a state into an object that can change."""
        if state is None:
            return
        if isinstance(thing, types.MethodType):
            thing = thing.__self__
        if "same" in state or "number" in state:
            number = state["same"] if "same" in state else state["number"]
            if self.objects.setdefault(number, thing) is not thing or self.numbers.setdefault(id(thing), number) != number:
                raise NoStateError(f"{path} refers to another object here than where the state was taken.")
        if "same" not in state:
            self._put(thing, state, path)

    def _put(self, thing: Any, state: Any, path: str) -> None:
        if "special" in state:
            write = next((write for matches, _, write in KNOWN if matches(thing)), None)
            if write is None:
                raise NoStateError(f"{path} is {type(thing).__name__} here and was another object where the state was taken.")
            self.writes.append((path, functools.partial(write, thing, state["special"])))
        elif "digest" in state:
            if not isinstance(thing, np.ndarray) or _digest(thing) != state["digest"]:
                raise NoStateError(f"{path}, an array of over {CONSTANT:,} bytes, is not that of where the state was taken.")
        elif "value" in state:
            self.writes.append((path, functools.partial(_overwrite, thing, state["value"])))
        elif "entries" in state or "items" in state:
            self._give_container(thing, state, path)
        else:
            here, there = _class_names(thing), state["classes"]
            if here[0] not in there and there[0] not in here:  # libraries replace Gymnasium's wrappers by their own
                raise NoStateError(f"{path} is {here[0]} here and was {there[0]} where the state was taken.")
            attributes = _attributes(thing, path)
            for name, part in state["attributes"].items():
                self._give_part(attributes, name, part, f"{path}.{name}")

    def _give_container(self, thing: Any, state: Any, path: str) -> None:
        if "entries" in state:
            if not isinstance(thing, dict) or list(thing) != [key for key, _ in state["entries"]]:
                raise NoStateError(f"{path} has other entries than where the state was taken.")
            parts = state["entries"]
        else:
            if not isinstance(thing, (list, tuple, deque)) or len(thing) != len(state["items"]):
                raise NoStateError(f"{path} has another length than where the state was taken.")
            parts = enumerate(state["items"])
        for key, part in parts:
            self._give_part(thing, key, part, f"{path}[{key!r}]")

    def _give_part(self, holder: Any, key: Any, state: Any, path: str) -> None:
        if state is None:
            return
        present: Any = holder.get(key) if isinstance(holder, (dict, _Attributes)) else holder[key]
        if "function" in state:
            if getattr(present, "__qualname__", None) != state["function"]:
                raise NoStateError(f"{path} is another function here than where the state was taken.")
        elif "enum" in state:
            self.writes.append((path, lambda: holder.__setitem__(key, type(present)[state["enum"]])))
        elif "value" in state and ("number" not in state or not _fits(present, state["value"])):
            # A number, a word, or a container that is not there yet.
            self.writes.append((path, lambda: holder.__setitem__(key, state["value"])))
        elif present is None and "special" in state:
            made = make_generator(state["special"])
            if made is None:
                raise NoStateError(f"{path} is missing here, and was there where the state was taken.")
            self.writes.append((path, lambda: holder.__setitem__(key, made)))
        else:
            self.give(present, state, path)


class _Attributes:
    """An object's own attributes as a mapping, those in slots too."""

    def __init__(self, thing: Any) -> None:
        slots = {name for cls in type(thing).__mro__ for name in _as_tuple(vars(cls).get("__slots__", ()))}
        self.thing, self.slots = thing, {name for name in slots if hasattr(thing, name) and not name.startswith("__")}

    def items(self) -> Iterator[tuple[str, Any]]:
        """Name and value of each."""
        named = {**{name: getattr(self.thing, name) for name in self.slots}, **getattr(self.thing, "__dict__", {})}
        return ((name, part) for name, part in named.items() if not self._is_left_out(name))

    def _is_left_out(self, name: str) -> bool:
        of_monitor = name == "t_start" and isinstance(self.thing, (Monitor, VecMonitor))  # the clock of its file
        return name in _LEFT_OUT or of_monitor

    def get(self, name: str) -> Any:
        """The value, None where there is none."""
        return getattr(self.thing, name, None) if name in self.slots else vars(self.thing).get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self.slots:
            setattr(self.thing, name, value)
        else:
            vars(self.thing)[name] = value


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _attributes(thing: Any, path: str) -> _Attributes:
    attributes = _Attributes(thing)
    bare = not hasattr(thing, "__dict__") and not attributes.slots
    if bare or any(_is_foreign(cls) for cls in type(thing).__mro__):
        raise NoStateError(f"{path} is a {type(thing).__qualname__}, whose state cannot be read.")
    return attributes


def _class_names(thing: Any) -> list[str]:
    """Of an object's class and its bases but the most general ones."""
    general = (object, gym.Env, gym.Wrapper, gym.utils.RecordConstructorArgs)
    return [cls.__qualname__ for cls in type(thing).__mro__ if cls not in general]


def _is_foreign(cls: type) -> bool:
    """Whether a class is written in C or C++, so that ``vars`` does not show what its objects hold."""
    bound = type(cls).__name__.startswith(("pybind11", "nb_"))
    return bound or (cls is not object and not cls.__flags__ & (1 << 9))  # Py_TPFLAGS_HEAPTYPE


def _is_nothing_by_name(cls: type) -> bool:
    module = str(getattr(cls, "__module__", ""))
    return module.startswith("dm_control.mjcf") or ("mujoco" in module and cls.__name__ in _NOTHING_NAMED)


def _can_change(thing: Any) -> bool:
    """Whether an object may be another tomorrow, so that it matters who refers to it."""
    unchanging = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset, np.generic, np.dtype, th.device)
    return not isinstance(thing, unchanging)


def _fits(present: Any, value: Any) -> bool:
    """Whether :func:`_overwrite` can write ``value`` into what is there."""
    if isinstance(value, (np.ndarray, th.Tensor)):
        same = type(present) is type(value) and (present.shape, present.dtype) == (value.shape, value.dtype)
        return same and (isinstance(value, th.Tensor) or bool(present.flags.writeable))
    return type(present) is type(value) and getattr(present, "maxlen", None) == getattr(value, "maxlen", None)


def _overwrite(present: Any, value: Any) -> None:
    """Write a value into the array or container that is there, which others may look at."""
    if isinstance(value, np.ndarray):
        present[...] = value
    elif isinstance(value, th.Tensor):
        present.data.copy_(value)
    else:
        present.clear()
        present.update(value) if isinstance(value, (dict, set)) else present.extend(value)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
