"""Presets: per agent a YAML file of constructor arguments by env id or suite, checked against the constructor."""

from __future__ import annotations

import copy
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import yaml

from .catalogue import VARIANTS, agent_class, canonical_name
from .errors import UsageError, nearest

# Keys of a preset that the training command takes itself.
RUN_KEYS: dict[str, Any] = {
    "policy": str, "n_envs": int, "normalize": bool, "steps": int, "noise_std": float, "deterministic": bool,
    "env_kwargs": dict,
}  # fmt: skip
# Arguments of the constructor that a run sets, not a preset.
RESERVED = {"self", "policy", "env", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model"}

# How plain data of each type is called in messages.
WORDS: dict[Any, str] = {
    float: "a number", int: "a whole number", str: "a word", bool: "true or false", dict: "a mapping",
    list: "a list", tuple: "a list", type(None): "null", Callable: "a schedule such as lin_3e-4",
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """``yaml.safe_load`` that also reads 3e-4 as a number (YAML 1.1 wants 3.0e-4 and would give a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def read_yaml(text: str, name: str) -> Any:
    """Parse YAML, nothing but data.

    :param name: of the source, for the message
    :raises UsageError: with the line of the first mistake
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise UsageError(f"{name} cannot be read{where}: {problem}.") from error


def suite_of(env_id: str) -> str:
    """The suite whose preset applies to an env id: mujoco, dm_control, procgen, atari, safety, bullet or other."""
    for prefix, suite in (("dm_control/", "dm_control"), ("procgen/", "procgen"), ("ALE/", "atari")):
        if env_id.startswith(prefix):
            return suite
    if match := re.match(r"Safety\w+?(Velocity|Run|Circle)-v\d+$", env_id):
        return "safety" if match[1] == "Velocity" else "bullet"
    mujoco = r"(HalfCheetah|Hopper|Walker2d|Ant|Humanoid|HumanoidStandup|Swimmer|Reacher|Pusher|Inverted\w*Pendulum)-v\d+$"
    return "mujoco" if re.match(mujoco, env_id) else "other"


def read_presets(agent: str) -> dict[str, dict[str, Any]]:
    """All presets of an agent: key ("default", a suite, an env id with or without version or single task) -> arguments."""
    path = resources.files(__package__) / "presets" / f"{agent.lower()}.yaml"
    if not path.is_file():
        return {}
    presets = read_yaml(path.read_text(encoding="utf-8"), f"The preset file {path.name}") or {}
    if not (isinstance(presets, dict) and all(isinstance(arguments, dict) for arguments in presets.values())):
        raise UsageError(f"The preset file {path.name} must map env ids and suites to mappings of arguments.")
    return presets


def preset(agent: str, env_id: str) -> dict[str, Any]:
    """The arguments for an agent on an env: default, the suite's, those of all its single tasks, its own; later ones win."""
    name = canonical_name(agent)
    base, variant = VARIANTS.get(name, (name, None))
    bare = re.sub(r"-v\d+$", "", env_id)
    merged: dict[str, Any] = {}
    for presets in map(read_presets, dict.fromkeys((base, name))):  # a variant may have a file beside its base's
        for key in ("default", suite_of(env_id), re.sub(r"-singletask(-task\d)?$", "", bare), bare, env_id):
            merged.update(presets.get(key, {}))
    if variant is None:
        return merged
    return agent_class(base).VARIANTS[variant] | merged  # type: ignore[attr-defined]


def parse_assignments(pairs: list[str], option: str) -> dict[str, Any]:
    """``key=value`` words as a dict; values are YAML, dots in a key go into nested dicts."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} takes key=value, not '{pair}'.")
        *parents, last = key.split(".")
        both = f"{option} gives '{{}}' a value and also something inside it: use one of the two."
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageError(both.format(parent))
        if isinstance(place.get(last), dict):
            raise UsageError(both.format(last))
        place[last] = read_yaml(text, f"The value of {option} {key}")
    return result


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``overrides``; dicts inside are merged, not replaced."""
    merged = dict(base)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def check_arguments(agent: str, arguments: Mapping[str, Any]) -> None:
    """Check names and types of arguments against the constructor's signature.

    :raises UsageError: for an unknown or ill-typed key, with the nearest right name
    """
    hints = _argument_types(agent)
    known = set(hints) - RESERVED
    for key, value in arguments.items():
        if key in RUN_KEYS:
            hint = RUN_KEYS[key]
        elif key in known:
            hint = hints[key]
        elif key in RESERVED:
            raise UsageError(f"{agent}'s argument '{key}' is set by the run itself: see `tether train --help`.")
        else:
            raise UsageError(f"{agent} has no argument '{key}'.{nearest(key, [*known, *RUN_KEYS])}")
        if not _fits(value, hint):
            raise UsageError(f"{agent}'s argument '{key}' must be {_words(hint)}, not {value!r}.")


def build_arguments(agent: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments from plain data: "lin_3e-4" becomes a linear schedule, "ReLU" a class of ``torch.nn``."""
    # A copy, because agents add to their policy_kwargs, and the plain data is what a run's manifest records.
    hints = _argument_types(agent)
    own = set(hints) - RESERVED  # TD3BC's `normalize` is its own, MDPO's that of the run
    built = copy.deepcopy({key: value for key, value in arguments.items() if key in own or key not in RUN_KEYS})
    for key, value in built.items():
        start = _linear_start(value, hints[key])
        if start is not None:
            from stable_baselines3.common.utils import LinearSchedule

            built[key] = LinearSchedule(start, 0.0, 1.0)
        elif isinstance(value, list) and tuple in _kinds(hints[key]):
            built[key] = tuple(value)
    policy_kwargs = built.get("policy_kwargs")
    if policy_kwargs and isinstance(policy_kwargs.get("activation_fn"), str):
        from torch import nn

        activation = policy_kwargs["activation_fn"]
        if not (isinstance(getattr(nn, activation, None), type) and issubclass(getattr(nn, activation), nn.Module)):
            raise UsageError(f"policy_kwargs.activation_fn names a class of torch.nn such as ReLU, not '{activation}'.")
        built["policy_kwargs"] = {**policy_kwargs, "activation_fn": getattr(nn, activation)}
    return built


def _argument_types(agent: str) -> dict[str, Any]:
    """Annotations of the constructor, resolved one by one (SB3's type of ``env`` cannot be resolved at run time)."""
    constructor = agent_class(agent).__init__
    types_of: dict[str, Any] = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
        try:
            types_of[name] = typing.get_type_hints(holder, constructor.__globals__)[name]
        except NameError:
            types_of[name] = Any
    return types_of


def _kinds(hint: Any) -> list[Any]:
    """The types that an annotation allows, without their parameters: ``tuple[int, str] | None`` gives tuple and None's."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if is_union else (hint,))]


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data can stand for an annotated argument."""
    kinds = _kinds(hint)
    if Any in kinds or _linear_start(value, hint) is not None:
        return True
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float in kinds or (int in kinds and isinstance(value, int))
    if isinstance(value, list):
        return list in kinds or tuple in kinds
    return type(value) in kinds and type(value) in WORDS


def _linear_start(value: Any, hint: Any) -> float | None:
    """The start of RL-Zoo's "lin_<start>", where the argument may be a schedule; else None."""
    number = re.fullmatch(r"lin_(\d*\.?\d+(?:[eE][-+]?\d+)?)", value) if isinstance(value, str) else None
    return float(number[1]) if number and Callable in _kinds(hint) else None


def _words(hint: Any) -> str:
    return " or ".join(dict.fromkeys(WORDS[kind] for kind in _kinds(hint) if kind in WORDS)) or "left to Python code"
