"""Python objects as plain data: JSON and arrays, from which they are made again without running anything of the file.

What JSON lacks is a dict with a ``"type"``. Classes and functions are names, looked up in a table of what this library
knows and what the user has registered: a file never causes an import.
"""

from __future__ import annotations

import base64
import enum
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import buffers, noise, torch_layers, utils
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from .flat_adam import FlatAdam


class Arrays:
    """Arrays on their way to a file: all of one dtype in one, because a file of thousands of small ones takes long."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}
        self.sizes: dict[str, int] = {}

    def put(self, array: np.ndarray) -> dict[str, Any]:
        """Take an array in; what :func:`decode` needs to find it."""
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        kind, shape = array.dtype.str[1:], list(array.shape)
        first = self.sizes.setdefault(kind, 0)
        self.parts.setdefault(kind, []).append(array.ravel())
        self.sizes[kind] += array.size
        return {"kind": kind, "first": first, "shape": shape}

    def packed(self) -> dict[str, np.ndarray]:
        """One long array for each dtype, for ``numpy.savez``."""
        return {kind: np.concatenate(parts) for kind, parts in self.parts.items()}


# An array that holds one value everywhere is written as that value; a file must not make gigabytes of a few bytes.
LARGEST_FILL = 2**26  # bytes


_KINDS_OF_ARRAYS = "biufcSU"


class PlainDataError(ValueError):
    """An object that is not plain data, or data that is not one of our objects; a sentence that says what to do."""


class _Form(NamedTuple):
    """How the objects of a class are taken apart and made again."""

    take: Callable[[Any], Any]
    make: Callable[[Any], Any]


_NAMED: dict[str, Any] = {}  # name -> class or function
_NAMES: dict[Any, str] = {}  # and back
_FORMS: dict[type, _Form] = {}


def register(thing: Any, name: str | None = None) -> Any:
    """Let saved files name a class or a function of yours: a policy, features extractor, activation, optimiser, schedule.

    Call it once in every program that saves or loads them, before it does; also as a decorator. Objects of a registered
    class are saved with what ``vars`` gives, which must be plain data.

    :param thing: class or function
    :param name: in the files; None: module and name of ``thing``
    :return: ``thing``
    """
    if not callable(thing):
        raise PlainDataError(f"register takes a class or a function, not {thing!r}.")
    name = name or _full_name(thing)
    _NAMED[name], _NAMES[thing] = thing, name
    return thing


def _full_name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{thing.__qualname__}"


def registered_name(thing: Any) -> str | None:
    """The name under which files know a class or function; None where it is not registered."""
    try:
        return _NAMES.get(thing)
    except TypeError:  # not hashable
        return None


# ---------------------------------------------------------------------- writing


def encode(value: Any, arrays: Arrays | None = None) -> Any:
    """What ``json.dumps`` takes.

    :param value: numbers, words, containers, arrays, tensors, spaces, schedules, noise, what is registered
    :param arrays: where arrays are put, and the result refers to them; None: they are in the result, as base64
    :raises PlainDataError: naming what is not plain data
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"type": "float", "value": repr(value)}
    if type(value) is list:
        return [encode(item, arrays) for item in value]
    if type(value) is dict:
        return _encode_dict(value, arrays)
    for kind, (matches, write, _) in _KINDS.items():
        if matches(value):
            return {"type": kind, **write(value, arrays)}
    name = registered_name(value)
    if name is not None:
        return {"type": "name", "name": name}
    name = registered_name(type(value))
    if name is not None:
        form = _FORMS.get(type(value))
        return {"type": "object", "class": name, "state": encode(form.take(value) if form else vars(value), arrays)}
    raise PlainDataError(_refusal(value))


def _refusal(value: Any) -> str:
    what = f"{_full_name(value)} is" if hasattr(value, "__qualname__") else f"an object of {_full_name(type(value))} is"
    return (
        f"{what} not plain data, so it cannot be saved without pickle: define it in a module and call "
        "tether.agents.register(...) for it"
    )


def _encode_dict(value: dict[Any, Any], arrays: Arrays | None) -> dict[str, Any]:
    if "type" not in value and all(type(key) is str for key in value):
        return {key: encode(item, arrays) for key, item in value.items()}
    return {"type": "dict", "items": [[encode(key), encode(item, arrays)] for key, item in value.items()]}


def _write_array(value: np.ndarray, arrays: Arrays | None) -> dict[str, Any]:
    if value.dtype.kind not in _KINDS_OF_ARRAYS:
        raise PlainDataError(f"an array of {value.dtype} is not plain data: only numbers and words are")
    axes = _memory_order(value)
    if axes is not None:
        return {"axes": axes, "transposed": {"type": "array", **_write_array(value.transpose(axes), arrays)}}
    shape, data = list(value.shape), np.ascontiguousarray(value)
    if arrays is not None and value.size > 8:
        return {"at": arrays.put(data)}
    fill = value.size > 8 and value.nbytes <= LARGEST_FILL and data.tobytes() == data.ravel()[:1].tobytes() * value.size
    content = data.ravel()[:1] if fill else data
    return {
        "dtype": value.dtype.str,
        "shape": shape,
        "fill" if fill else "data": base64.b64encode(content.tobytes()).decode(),
    }


def _memory_order(value: np.ndarray) -> list[int] | None:
    """The order of the axes in memory, where it is another than C's: convolutions round otherwise for it."""
    if value.flags.c_contiguous or value.size < 2:
        return None
    axes = np.argsort([-stride for stride in value.strides], kind="stable")
    return axes.tolist() if value.transpose(axes).flags.c_contiguous else None


# ---------------------------------------------------------------------- reading


class _Source:
    """The arrays of a file, and how many bytes it may still make of single values."""

    def __init__(self, arrays: Mapping[str, np.ndarray] | None) -> None:
        self.arrays, self.left = arrays, LARGEST_FILL


def decode(data: Any, arrays: Mapping[str, np.ndarray] | _Source | None = None) -> Any:
    """The object that :func:`encode` took apart.

    :param arrays: of :meth:`Arrays.packed`
    :raises PlainDataError: for data that is none, or a name that is not registered here
    """
    if not isinstance(arrays, _Source):
        arrays = _Source(arrays)
    if isinstance(data, list):
        return [decode(item, arrays) for item in data]
    if not isinstance(data, dict):
        return data
    if "type" not in data:
        return {key: decode(item, arrays) for key, item in data.items()}
    kind = data["type"]
    try:
        if kind == "dict":
            return {decode(key, arrays): decode(item, arrays) for key, item in data["items"]}
        if kind == "float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[data["value"]]
        if kind == "name":
            return _named(data["name"])
        if kind == "object":
            return _make_object(_named(data["class"]), decode(data["state"], arrays))
        if kind in _KINDS:
            return _KINDS[kind][2](data, arrays)
    except PlainDataError:
        raise
    except Exception as error:  # whatever a constructor says to values that no object has
        raise PlainDataError(f"the data of a '{kind}' makes no object ({type(error).__name__}: {error})") from error
    raise PlainDataError(f"there is no kind of data '{kind}': the file is damaged, or a later version of Tether wrote it")


def _named(name: Any) -> Any:
    if name not in _NAMED:
        raise PlainDataError(
            f"'{name}' is not known here: import it and call tether.agents.register(...) for it before loading, or give "
            "the object that used it with custom_objects={...}"
        )
    return _NAMED[name]


def _make_object(cls: Any, state: Any) -> Any:
    if not isinstance(cls, type):
        raise PlainDataError(f"{cls!r} is no class, so the data makes no object of it")
    if cls in _FORMS:
        return _FORMS[cls].make(state)
    made: Any = object.__new__(cls)
    vars(made).update(state)
    return made


def _read_array(data: dict[str, Any], source: _Source) -> np.ndarray:
    if "axes" in data:
        return decode(data["transposed"], source).transpose(np.argsort(data["axes"]))
    arrays = source.arrays
    if "at" in data:
        place, shape = data["at"], tuple(data["at"]["shape"])
        if arrays is None or place["kind"] not in arrays:
            raise PlainDataError(f"the arrays of '{place['kind']}' are missing")
        return arrays[place["kind"]][place["first"] : place["first"] + math.prod(shape)].reshape(shape).copy()
    dtype, shape = np.dtype(data["dtype"]), tuple(data["shape"])
    if dtype.kind not in _KINDS_OF_ARRAYS:
        raise PlainDataError(f"an array of {dtype} is not plain data")
    content = np.frombuffer(base64.b64decode(data["fill" if "fill" in data else "data"], validate=True), dtype)
    if "fill" not in data:
        return content.reshape(shape).copy()
    source.left -= math.prod(shape) * dtype.itemsize
    if source.left < 0:
        raise PlainDataError(f"an array of shape {shape} is too large")
    return np.full(shape, content[0], dtype)


# Each kind: which values, what is written of them, how they are made again. The order decides, the first match wins.
_KINDS: dict[str, tuple[Callable[[Any], bool], Callable[..., dict[str, Any]], Callable[..., Any]]] = {
    "train_freq": (
        lambda v: isinstance(v, TrainFreq),
        lambda v, _: {"frequency": v.frequency, "unit": v.unit.value},
        lambda d, _: TrainFreq(int(d["frequency"]), TrainFrequencyUnit(d["unit"])),
    ),
    "tuple": (
        lambda v: type(v) is tuple,
        lambda v, a: {"items": [encode(item, a) for item in v]},
        lambda d, a: tuple(decode(d["items"], a)),
    ),
    "deque": (
        lambda v: type(v) is deque,
        lambda v, a: {"items": [encode(item, a) for item in v], "maxlen": v.maxlen},
        lambda d, a: deque(decode(d["items"], a), maxlen=d["maxlen"]),
    ),
    "ordered": (
        lambda v: type(v) is OrderedDict,
        lambda v, a: {"items": [[encode(key), encode(item, a)] for key, item in v.items()]},
        lambda d, a: OrderedDict((decode(key, a), decode(item, a)) for key, item in d["items"]),
    ),
    "set": (
        lambda v: type(v) in (set, frozenset),
        lambda v, a: {"items": [encode(item, a) for item in sorted(v, key=repr)]},
        lambda d, a: set(decode(d["items"], a)),
    ),
    "bytes": (
        lambda v: type(v) is bytes,
        lambda v, _: {"data": base64.b64encode(v).decode()},
        lambda d, _: base64.b64decode(d["data"], validate=True),
    ),
    "array": (lambda v: type(v) is np.ndarray, _write_array, _read_array),
    "number": (
        lambda v: isinstance(v, np.generic) and v.dtype.kind in "biufc",
        lambda v, _: _write_array(np.asarray(v), None),
        lambda d, a: _read_array(d, a)[()],
    ),
    "dtype": (
        lambda v: isinstance(v, np.dtype) or (isinstance(v, type) and issubclass(v, np.generic)),
        lambda v, _: {"name": np.dtype(v).str},
        lambda d, _: np.dtype(d["name"]),
    ),
    "tensor": (
        lambda v: isinstance(v, th.Tensor) and v.dtype != th.bfloat16,
        lambda v, a: {"array": {"type": "array", **_write_array(v.detach().cpu().numpy(), a)}},
        lambda d, a: th.from_numpy(np.array(decode(d["array"], a))),
    ),
    "device": (
        lambda v: isinstance(v, th.device),
        lambda v, _: {"name": str(v)},
        lambda d, _: th.device(d["name"]),
    ),
    "enum": (
        lambda v: isinstance(v, enum.Enum) and registered_name(type(v)) is not None,
        lambda v, _: {"class": registered_name(type(v)), "name": v.name},
        lambda d, _: _named(d["class"])[d["name"]],
    ),
    "subclass": (  # an int or a float of another class, as some environments count with
        lambda v: isinstance(v, (int, float)),
        lambda v, _: {"value": encode(float(v)) if isinstance(v, float) else int(v)},
        lambda d, a: decode(d["value"], a),
    ),
}


# ---------------------------------------------------------------------- what the library knows


def _know(cls: type, take: Callable[[Any], Any] | None = None, make: Callable[[Any], Any] | None = None) -> None:
    register(cls, cls.__name__)  # without the module, so that files do not depend on where a class lives
    if take is not None and make is not None:
        _FORMS[cls] = _Form(take, make)


def _arguments(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda thing: {name: getattr(thing, name) for name in names}


def _make_box(state: dict[str, Any]) -> spaces.Box:
    low, high = state["low"], state["high"]
    if not (isinstance(low, np.ndarray) and isinstance(high, np.ndarray)):
        raise PlainDataError("the bounds of a Box are arrays")
    return spaces.Box(low, high, dtype=state["dtype"])


def _know_spaces() -> None:
    for cls, names in (
        (spaces.Discrete, ("n", "start")),
        (spaces.MultiDiscrete, ("nvec", "start", "dtype")),
        (spaces.MultiBinary, ("n",)),
    ):
        _know(cls, _arguments(*names), lambda state, cls=cls: cls(**state))  # type: ignore[misc]
    _know(spaces.Box, _arguments("low", "high", "dtype"), _make_box)
    # In pairs, because Gymnasium sorts the keys of a plain dict, and networks read the parts in their order.
    _know(spaces.Dict, lambda s: [[k, v] for k, v in s.spaces.items()], lambda pairs: spaces.Dict([(k, v) for k, v in pairs]))
    _know(spaces.Tuple, lambda s: list(s.spaces), spaces.Tuple)


def _know_the_rest() -> None:
    _know(utils.ConstantSchedule, _arguments("val"), lambda s: utils.ConstantSchedule(s["val"]))
    _know(utils.FloatSchedule, _arguments("value_schedule"), lambda s: utils.FloatSchedule(s["value_schedule"]))
    _know(
        utils.LinearSchedule,
        _arguments("start", "end", "end_fraction"),
        lambda s: utils.LinearSchedule(s["start"], s["end"], s["end_fraction"]),
    )
    for cls in (noise.NormalActionNoise, noise.OrnsteinUhlenbeckActionNoise, noise.VectorizedActionNoise, RunningMeanStd):
        _know(cls)
    for cls in (
        torch_layers.FlattenExtractor, torch_layers.NatureCNN, torch_layers.CombinedExtractor,
        buffers.ReplayBuffer, buffers.DictReplayBuffer, buffers.NStepReplayBuffer, HerReplayBuffer,
        buffers.RolloutBuffer, buffers.DictRolloutBuffer,
        th.optim.Adam, th.optim.AdamW, th.optim.SGD, th.optim.RMSprop, FlatAdam,
        *(getattr(th.nn.modules.activation, name) for name in th.nn.modules.activation.__all__),
    ):  # fmt: skip
        _know(cls)


_know_spaces()
_know_the_rest()
