"""Objects in environments of which we know what is in them: generators, spaces, MuJoCo, Atari, environments elsewhere."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv

_ASSETS = re.compile(r"(mesh|tex|skin|name|path|text|bvh|oct)_|names|paths")  # of a model: large, and no task changes them


class NoStateError(ValueError):
    """An environment whose state cannot be taken or given back; the message names the object in the way."""


def speaks_for_itself(thing: Any) -> bool:
    """Whether an object offers ``resumable_state()`` and ``resume_from(state)``."""
    return hasattr(type(thing), "resumable_state")


def _take_generator(generator: np.random.Generator) -> Any:
    return {"generator": generator.bit_generator.state}


def _give_generator(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state["generator"]


def make_generator(state: Any) -> np.random.Generator | None:
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
    arrays = {name: array.copy() for name, array in _arrays_of(data).items() if array.size and array.dtype.kind == "f"}
    return {"integration": state, "arrays": arrays}


def _give_data(data: Any, state: Any) -> None:
    import mujoco

    part = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(data.model, data, state["integration"], part)
    mujoco.mj_forward(data.model, data)  # contacts and constraints, whose number differs from step to step
    mujoco.mj_setState(data.model, data, state["integration"], part)  # with the warm start as it was
    _give_arrays(data, state["arrays"])


def _give_arrays(thing: Any, arrays: dict[str, np.ndarray]) -> None:
    """Numbers alone are written: what is an index must be equal, because MuJoCo looks nothing up twice."""
    present = _arrays_of(thing)
    for name, array in arrays.items():
        if present[name].dtype.kind == "f" and present[name].shape == array.shape:
            present[name][...] = array


def _take_model(model: Any) -> Any:
    """Sizes, masses, places: tasks draw some of them anew at every reset."""
    arrays = {name: array.copy() for name, array in _arrays_of(model).items() if array.size}
    whole = b"".join(arrays.pop(name).tobytes() for name in sorted(arrays) if arrays[name].dtype.kind != "f")
    return {"arrays": arrays, "indices": hashlib.sha256(whole).hexdigest()}


def _give_model(model: Any, state: Any) -> None:
    if _take_model(model)["indices"] != state["indices"]:
        raise NoStateError("The environment's MuJoCo model is another than where the state was taken.")
    _give_arrays(model, state["arrays"])


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


# Which objects, what is taken from them, how it is given back; the first match wins.
KNOWN: list[tuple[Callable[[Any], bool], Callable[[Any], Any], Callable[[Any, Any], None]]] = [
    (speaks_for_itself, lambda x: x.resumable_state(), lambda x, state: x.resume_from(state)),
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
    (lambda x: _is_mujoco(x, "MjModel"), _take_model, _give_model),
]
