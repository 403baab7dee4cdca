"""A trained agent as one file: SB3's zip layout, with nothing in it that runs when it is read.

``data`` is plain JSON (see ``plain.py``), weights are torch's files, read with ``weights_only=True``, the statistics of a
``VecNormalize`` are in ``vec_normalize.json``, and the zip's comment is a checksum of all before it. SB3's
``load_from_zip_file`` and ``set_parameters`` read it too.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pathlib
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.save_util import load_from_zip_file, recursive_getattr, recursive_setattr
from stable_baselines3.common.utils import check_for_correct_spaces, get_device, get_system_info
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from .atomic import replace_file
from .plain import PlainDataError, decode, encode

FORMAT = 1
ModelPath = str | pathlib.Path | io.BufferedIOBase

_COMMENT = b"tether sha256 "
_DIGEST = 64  # hexadecimal digits at the file's end
# Made again by the constructor, or states of a rollout, which a checkpoint keeps.
_LEFT_OUT = frozenset({"lr_schedule", "_last_obs", "_last_original_obs", "_last_episode_starts"})
_NORMALIZER = (
    "clip_obs", "clip_reward", "gamma", "epsilon", "norm_obs", "norm_reward", "norm_obs_keys", "training", "ret_rms",
)  # fmt: skip


class ModelFileError(ValueError):
    """A file that is no model, is damaged, or needs trust; the message is a sentence that says what to do."""


@dataclass
class ModelFile:
    """What is in a model's file.

    :param data: attributes of the agent
    :param params: state dicts of its modules and optimisers
    :param variables: single tensors
    :param normalizer: of a ``VecNormalize`` around the training environment; None where there was none
    :param classes: names of the agent's class and its bases, as :func:`class_name` gives them; none where SB3 wrote the file
    """

    data: dict[str, Any]
    params: dict[str, Any]
    variables: dict[str, Any] | None
    normalizer: dict[str, Any] | None = None
    classes: tuple[str, ...] = ()

    def wrap(self, env: VecEnv) -> VecEnv:
        """``env`` inside the ``VecNormalize`` of the training, if there was one and ``env`` has none."""
        return env if self.normalizer is None or _normalizer_of(env) else restore_normalizer(env, self.normalizer)


def class_name(cls: type) -> str:
    """Package and name, without the module in between: ``tether.MDPO``, ``stable_baselines3.PPO``."""
    return f"{cls.__module__.split('.')[0]}.{cls.__name__}"


# ---------------------------------------------------------------------- writing


def write_model(
    model: BaseAlgorithm, path: ModelPath, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None
) -> None:
    """Save an agent; a file that is replaced stays whole until the new one is.

    :param path: ``.zip`` is added where it has no suffix; or an open binary file
    :param exclude: attributes to leave out
    :param include: attributes to save that would be left out
    """
    params = model.get_parameters()
    names = model._get_torch_save_params()[1]
    variables = {name: recursive_getattr(model, name) for name in names} if names is not None else None
    content = _pack(model, _attributes(model, exclude, include), params, variables)
    if isinstance(path, io.BufferedIOBase):
        path.write(content)
    else:
        path = with_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)


def with_suffix(path: str | pathlib.Path) -> pathlib.Path:
    """The path with SB3's suffix, where it has none."""
    path = pathlib.Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.zip")


def _attributes(model: BaseAlgorithm, exclude: Iterable[str] | None, include: Iterable[str] | None) -> dict[str, Any]:
    names, variables = model._get_torch_save_params()
    of_torch = {name.split(".")[0] for name in [*names, *variables]}
    left_out = ({*(exclude or ()), *model._excluded_save_params(), *_LEFT_OUT} - {*(include or ())}) | of_torch
    return {name: _attribute(model, name, value) for name, value in vars(model).items() if name not in left_out}


def _attribute(model: BaseAlgorithm, name: str, value: Any) -> Any:
    if name == "policy_class":
        alias = next((alias for alias, cls in model.policy_aliases.items() if cls is value), None)
        if alias is not None:
            return {"type": "policy", "name": alias}
    try:
        return encode(value)
    except PlainDataError as error:
        sentence = f"{name} is not in the saved model: {error}; or give it again at loading, with custom_objects."
        warnings.warn(sentence, stacklevel=2)
        return {"type": "unsaved", "reason": str(error)}


def _pack(model: BaseAlgorithm, data: dict[str, Any], params: dict[str, Any], variables: Any) -> bytes:
    bases = [class_name(cls) for cls in type(model).__mro__ if issubclass(cls, BaseAlgorithm)]
    header = {"format": FORMAT, "classes": bases}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tether.json", json.dumps(header))
        archive.writestr("data", json.dumps(data, indent=4))
        for name, state in [*params.items(), *([("pytorch_variables", variables)] if variables is not None else [])]:
            with archive.open(f"{name}.pth", "w", force_zip64=True) as member:
                th.save(_python_numbers(state), member)
        normalizer = model.get_vec_normalize_env()
        if normalizer is not None:
            archive.writestr("vec_normalize.json", json.dumps(normalizer_state(normalizer)))
        archive.writestr("_stable_baselines3_version", sb3.__version__)
        archive.writestr("system_info.txt", get_system_info(print_info=False)[1])
        archive.comment = _COMMENT + b"0" * _DIGEST
    body = file.getvalue()[:-_DIGEST]
    return body + hashlib.sha256(body).hexdigest().encode()


def _python_numbers(state: Any) -> Any:
    """A state dict without NumPy's numbers, which ``weights_only`` does not read."""
    if isinstance(state, dict):
        return {key: _python_numbers(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_python_numbers(value) for value in state)
    return state.item() if isinstance(state, np.generic) else state


# ---------------------------------------------------------------------- reading


def read_model(
    path: ModelPath, device: th.device | str = "auto", custom_objects: dict[str, Any] | None = None, trust: bool = False
) -> ModelFile:
    """Read a model's file.

    :param device: where the weights are put
    :param custom_objects: attributes to take from here instead of from the file
    :param trust: also read what SB3 itself wrote, which runs code that the file chooses, and files without a checksum
    :raises ModelFileError: for what is no model, damaged, or asks for trust
    :raises FileNotFoundError: if there is no file
    """
    if isinstance(path, io.BufferedIOBase):
        path.seek(0)
        content = path.read()
    else:
        content = _existing(path).read_bytes()
    named = "the file" if isinstance(path, io.BufferedIOBase) else str(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            if not trust:
                _check(content, archive, names, named)
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ModelFileError(f"{named} is compressed, as no file of Tether's is: take another copy.")
            data = json.loads(archive.read("data"))
            if trust and _is_pickled(data):
                theirs = load_from_zip_file(io.BytesIO(content), device=device, custom_objects=custom_objects)
                return ModelFile(theirs[0] or {}, theirs[1], theirs[2])
            place = get_device(device)
            params = {name.removesuffix(".pth"): _weights(archive, name, place) for name in names if name.endswith(".pth")}
            normalizer = json.loads(archive.read("vec_normalize.json")) if "vec_normalize.json" in names else None
            header: dict[str, Any] = {"format": FORMAT, "classes": []}
            if "tether.json" in names:
                header = json.loads(archive.read("tether.json"))
            if header["format"] != FORMAT:
                raise ModelFileError(f"{named} has format {header['format']}, and this Tether reads {FORMAT}: update Tether.")
            variables, classes = params.pop("pytorch_variables", None), tuple(header["classes"])
            return ModelFile(_decoded(data, custom_objects or {}), params, variables, normalizer, classes)
    except ModelFileError:
        raise
    except PlainDataError as error:
        raise ModelFileError(f"{named} cannot be loaded: {error}.") from error
    except Exception as error:  # zipfile, json and torch each have many for a damaged file
        reason = f"{type(error).__name__}: {_short(error)}"
        raise ModelFileError(f"{named} is not a saved model, or is damaged ({reason}): take another copy.") from error


def _existing(path: str | pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(path)
    return path if path.is_file() else with_suffix(path)


def _check(content: bytes, archive: zipfile.ZipFile, names: list[str], named: str) -> None:
    """Refuse what we did not write, and what is no longer as we wrote it."""
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if body.endswith(_COMMENT) and hashlib.sha256(body).hexdigest().encode() == digest:
        return
    if "tether.json" in names:
        raise ModelFileError(f"{named} is damaged, or was changed since it was written (the checksum differs): take another.")
    if "data" in names and _is_pickled(json.loads(archive.read("data"))):
        raise ModelFileError(
            f"{named} holds pickled objects, which run code of the file's author when they are loaded: if you trust its "
            "origin, load it with trust=True, and save it again to have it without."
        )
    raise ModelFileError(f"{named} was not written by Tether: if you trust its origin, load it with trust=True.")


def _is_pickled(data: Any) -> bool:
    return isinstance(data, dict) and any(isinstance(value, dict) and ":serialized:" in value for value in data.values())


def _weights(archive: zipfile.ZipFile, name: str, device: th.device) -> Any:
    return th.load(io.BytesIO(archive.read(name)), map_location=device, weights_only=True)


def _decoded(data: dict[str, Any], custom_objects: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for name, value in data.items():
        if name in custom_objects:
            result[name] = custom_objects[name]
        elif isinstance(value, dict) and ":serialized:" in value:
            raise ModelFileError(f"'{name}' is pickled: if you trust the file's origin, load it with trust=True.")
        elif isinstance(value, dict) and value.get("type") == "unsaved":
            how = f"load it with custom_objects={{'{name}': ...}}"
            raise ModelFileError(f"'{name}' is not in the file ({value['reason']}): {how}.")
        else:
            result[name] = value if _is_alias(value) else decode(value)
    return result


def _is_alias(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "policy"


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200].rstrip(". ")


# ---------------------------------------------------------------------- making the agent again


def build_model(
    cls: type[BaseAlgorithm],
    file: ModelFile,
    env: Any = None,
    device: th.device | str = "auto",
    force_reset: bool = True,
    **kwargs: Any,
) -> Any:
    """The agent that a file describes.

    :param cls: its class
    :param env: environment to go on with; it is wrapped in the ``VecNormalize`` of the training where it has none
    :param force_reset: let ``learn`` reset the environment first
    :param kwargs: attributes to set otherwise than in the file
    :raises ModelFileError: if the file is of another class
    :raises ValueError: if ``env`` has other spaces
    """
    data = dict(file.data)
    if file.classes and class_name(cls) not in file.classes and file.classes[0] not in map(class_name, cls.__mro__):
        raise ModelFileError(f"The file holds a {file.classes[0]}: load it with that class, not with {class_name(cls)}.")
    if missing := {"policy_class", "observation_space", "action_space", "verbose"} - set(data):
        raise ModelFileError(f"The file is no model of {cls.__name__}: it lacks {', '.join(sorted(missing))}.")
    if methods := [name for name in data if callable(getattr(cls, name, None))]:
        raise ModelFileError(f"The file is no model of {cls.__name__}: '{methods[0]}' is a method, and no attribute to save.")
    if _is_alias(data["policy_class"]):
        data["policy_class"] = data["policy_class"]["name"]
    if kwargs.get("policy_kwargs", data.get("policy_kwargs")) != data.get("policy_kwargs"):
        raise ValueError(f"policy_kwargs are those of the saved networks, {data['policy_kwargs']}: leave them out.")
    if env is not None:
        env = file.wrap(cls._wrap_env(maybe_make_env(env, data["verbose"]), data["verbose"]))
        data |= getattr(cls, "spaces_of", lambda env, data: {})(env, data)
        check_for_correct_spaces(env, data["observation_space"], data["action_space"])
        # The environment's own spaces, so that agent and environment share a random generator as before.
        data |= {"n_envs": env.num_envs, "observation_space": env.observation_space, "action_space": env.action_space}
        if force_reset:
            data["_last_obs"] = None
    _refuse_giants(data.get("policy_kwargs"), file)
    model = _make(cls, env, device, data | kwargs)
    try:
        model.set_parameters(file.params, exact_match=True, device=device)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelFileError(f"The file's weights are not those of a {cls.__name__} ({_short(error)}).") from error
    for name, value in (file.variables or {}).items():
        if value is not None:
            recursive_setattr(model, f"{name}.data", value.data)
    return model


def _refuse_giants(policy_kwargs: Any, file: ModelFile) -> None:
    """Networks that the file has no weights for would fill the memory before they are found to be others."""
    weights = sum(value.numel() for value in file.params.get("policy", {}).values() if isinstance(value, th.Tensor))
    if _least_size(policy_kwargs) > max(weights, 10_000):
        raise ModelFileError(f"The file's policy_kwargs ask for larger networks than its {weights:,} weights.")


def _least_size(value: Any) -> int:
    """How many weights the widths in nested containers mean at least: those between neighbours of a list."""
    if isinstance(value, dict):
        return sum(map(_least_size, value.values()))
    if isinstance(value, (list, tuple)):
        pairs = itertools.pairwise(value)
        return sum(map(_least_size, value)) + sum(a * b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    return abs(value) if isinstance(value, int) else 0


def _make(cls: type[BaseAlgorithm], env: Any, device: th.device | str, attributes: dict[str, Any]) -> Any:
    """An agent with these attributes, its networks as they are at the start."""
    alias = attributes["policy_class"]
    policy = cls.policy_aliases.get(alias, alias)  # SB3 refuses "MlpPolicy" for Dict spaces, and one class may have all names
    try:
        model: Any = cls(policy=policy, env=env, device=device, _init_setup_model=False)  # type: ignore[call-arg]
        foreign = set(attributes) & set(model._excluded_save_params())
        if foreign:
            raise ModelFileError(f"The file is no model of {cls.__name__}: '{min(foreign)}' is never saved.")
        vars(model).update(attributes, policy_class=model.policy_class)
        model._setup_model()
    except ModelFileError:
        raise
    except Exception as error:  # whatever constructors say to values that no agent has
        of = f", whose policy is {alias.__module__}.{alias.__name__}" if isinstance(alias, type) else ""
        raise ModelFileError(f"No {cls.__name__} can be made with the attributes of the file{of}: {_short(error)}.") from error
    if model.use_sde:
        model.policy.reset_noise()  # the matrix of SB3's state-dependent exploration, on the right device
    return model


# ---------------------------------------------------------------------- VecNormalize


def _normalizer_of(env: VecEnv) -> VecNormalize | None:
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    return unwrap_vec_normalize(env)


def normalizer_state(normalizer: VecNormalize) -> dict[str, Any]:
    """Arguments and statistics of a ``VecNormalize``, as JSON."""
    return {name: encode(getattr(normalizer, name)) for name in (*_NORMALIZER, *(["obs_rms"] if normalizer.norm_obs else []))}


def restore_normalizer(env: VecEnv, state: dict[str, Any]) -> VecNormalize:
    """``env`` in a ``VecNormalize`` with these arguments and statistics."""
    arguments = {name: decode(value) for name, value in state.items() if not name.endswith("_rms")}
    normalizer = VecNormalize(env, **arguments)
    set_normalizer(normalizer, state)
    return normalizer


def set_normalizer(normalizer: VecNormalize, state: dict[str, Any]) -> None:
    """Give a ``VecNormalize`` these statistics."""
    vars(normalizer).update({name: decode(value) for name, value in state.items() if name.endswith("_rms")})
