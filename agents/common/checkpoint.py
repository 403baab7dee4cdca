"""Checkpoints: all that a training needs to go on as if it had never stopped, in a folder that is always whole.

    <folder>/000003-00012288/     one checkpoint: number, env steps
        manifest.json             format, steps, total, score, checksums of the other files
        model.zip                 the agent, see `model_file.py`
        state.json, state.npz     random generators, environments, the rollout under way
    <folder>/blocks/              rows of the replay buffer, shared by the checkpoints, see `blocks.py`

The newest checkpoints and the one with the best score are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from .atomic import publish_folder, remove_folder
from .blocks import BlockStore, DamagedError
from .env_state import env_state, restore_env_state
from .finite import check_weights
from .known_objects import NoStateError, give_space, take_space
from .model_file import ModelFileError, build_model, read_model, set_normalizer, write_model
from .plain import Arrays, PlainDataError, decode, encode
from .replay_state import blocks_of, end_last_trajectory, read_replay_buffer, write_replay_buffer

logger = logging.getLogger("tether")

FORMAT = 1
# Version -> the function from a checkpoint's manifest and state in that format to those of the next one.
MIGRATIONS: dict[int, Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]] = {}

_NAME = re.compile(r"(\d{6,})-(\d{8,})")


class CheckpointError(ValueError):
    """There is no checkpoint, or none that can be read; the message is a sentence that says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on the disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def number(self) -> int:
        """Of the checkpoint in its run, from 1 on."""
        return int(self.folder.name.split("-")[0])

    @property
    def timesteps(self) -> int:
        """Env steps trained."""
        return int(self.manifest["timesteps"])

    @property
    def total(self) -> int:
        """Env steps of the whole training, which schedules follow."""
        return int(self.manifest["total"])

    @property
    def time(self) -> float:
        """The moment of its state, in seconds since the epoch."""
        return float(self.manifest["time"])


# ---------------------------------------------------------------------- writing


def save_checkpoint(model: BaseAlgorithm, folder: str | Path, keep: int = 2, score: float | None = None) -> Checkpoint:
    """Save everything about a training; between two steps, that is outside ``learn`` or in a callback of Tether's agents.

    For SB3's own agents: outside ``learn``, or at a callback's ``on_rollout_start``, because they lose what a rollout
    holds.

    :param folder: of the run's checkpoints
    :param keep: how many of the newest stay; the one with the best score stays besides
    :param score: how good the agent is now
    :raises NonFiniteError: if the weights are not finite
    :raises OSError: if it cannot be written; the former checkpoints are as they were
    """
    folder = Path(folder)
    if keep < 1:
        raise ValueError(f"keep is how many checkpoints stay: 1 or more, not {keep}.")
    check_weights(model)
    former = list_checkpoints(folder)
    number = 1 + max((int(path.name.split("-")[0]) for path in _folders(folder)), default=0)
    store = BlockStore(folder / "blocks")
    state = _state_of(model, store)
    moment = time.time()  # episodes that ended before are part of the state

    def fill(place: Path) -> None:
        write_model(model, place / "model.zip")
        arrays = Arrays()
        (place / "state.json").write_text(json.dumps(encode(state, arrays)), encoding="utf-8")
        np.savez(place / "state.npz", **arrays.packed())  # type: ignore[arg-type]
        manifest = {
            "format": FORMAT, "agent": type(model).__name__, "timesteps": int(model.num_timesteps),
            "total": int(model._total_timesteps), "time": moment, "score": None if score is None else float(score),
            "exact": state["env"] is not None or not _steps_environments(model),
            "blocks": blocks_of(state["replay"]) if state["replay"] else [],
            "files": {path.name: _checksum(path) for path in sorted(place.iterdir())},
        }  # fmt: skip
        (place / "manifest.json").write_text(_manifest_text(manifest), encoding="utf-8")

    place = folder / f"{number:06d}-{model.num_timesteps:08d}"
    publish_folder(place, fill)
    checkpoint = Checkpoint(place, _read_manifest(place) or {})
    _rotate(folder, [*former, checkpoint], keep, store)
    return checkpoint


def _state_of(model: BaseAlgorithm, store: BlockStore) -> dict[str, Any]:
    own, replay = getattr(model, "rollout_state", None), getattr(model, "replay_buffer", None)
    return {
        "rollout": None if own is None else own(),  # first, because it takes in the steps that are under way
        "env": _env_state(model),
        "action_space": take_space(model.action_space),
        "last": {name: getattr(model, name, None) for name in ("_last_obs", "_last_episode_starts", "_last_original_obs")},
        "replay": None if replay is None else _replay_state(model, replay, store),
        "random": random_state(),
    }


def _replay_state(model: BaseAlgorithm, replay: Any, store: BlockStore) -> dict[str, Any]:
    return write_replay_buffer(replay, store, model.num_timesteps // model.n_envs, model.start_time)


_TOLD: weakref.WeakSet[Any] = weakref.WeakSet()  # whose missing state was said


def _steps_environments(model: Any) -> bool:
    """Whether training goes on in environments; offline agents have none, or have one for its spaces only."""
    return getattr(model, "steps_environments", True)


def _env_state(model: BaseAlgorithm) -> Any:
    if model.env is None or model._last_obs is None:  # it has not begun
        return None
    try:
        return env_state(model.env)
    except NoStateError as error:
        if model.env not in _TOLD:
            logger.warning("After a resume the environments will begin new episodes: %s", error)
            _TOLD.add(model.env)
        return None


def _rotate(folder: Path, checkpoints: list[Checkpoint], keep: int, store: BlockStore) -> None:
    scored = [c for c in checkpoints if c.manifest.get("score") is not None]
    best = max(scored, key=lambda c: c.manifest["score"], default=None)
    kept = [c for c in checkpoints if c in checkpoints[-keep:] or c is best]
    for path in _folders(folder):
        if path not in [checkpoint.folder for checkpoint in kept]:  # also damaged ones, which a whole one now follows
            remove_folder(path)
    store.keep_only(name for checkpoint in kept for name in checkpoint.manifest["blocks"])
    for remains in [*folder.glob(".*.new"), *folder.glob(".*.old")]:  # of a kill
        shutil.rmtree(remains, ignore_errors=True)


# ---------------------------------------------------------------------- reading


def list_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """Complete checkpoints of a run, oldest first; what a kill left unfinished is not among them."""
    found = [(path, _read_manifest(path)) for path in _folders(Path(folder))]
    return [Checkpoint(path, manifest) for path, manifest in found if manifest is not None]


def _folders(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, whole or damaged, oldest first."""
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(named, key=lambda path: int(path.name.split("-")[0]))


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none, or it is not as it was written."""
    try:
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["checksum"]
        return manifest if _manifest_text(manifest) == text else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def find_checkpoint(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were written; damaged ones are passed over, with a warning.

    :raises CheckpointError: if there are checkpoints and all are damaged
    """
    folder = Path(folder)
    folders, first_damage = _folders(folder), ""
    for path in reversed(folders):
        checkpoint = Checkpoint(path, _read_manifest(path) or {})
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s, so an earlier checkpoint is taken.", damage)
        first_damage = first_damage or damage
    if folders:
        raise CheckpointError(f"Every checkpoint in {folder} is damaged ({first_damage}): put one back from a copy.")
    return None


def _damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, as the beginning of a sentence."""
    if not checkpoint.manifest:
        return f"{checkpoint.folder / 'manifest.json'} is missing or not as it was written"
    for name, checksum in checkpoint.manifest["files"].items():
        path = checkpoint.folder / name
        if not path.is_file() or _checksum(path) != checksum:
            return f"{path} is missing or not as it was written"
    for name in checkpoint.manifest["blocks"]:
        path = checkpoint.folder.parent / "blocks" / f"{name}.bin"
        if not path.is_file() or _checksum(path) != name:
            return f"{path} is missing or not as it was written"
    return None


def load_checkpoint(
    cls: type[BaseAlgorithm],
    folder: str | Path,
    env: Any,
    device: th.device | str = "auto",
    trust: bool = False,
    **kwargs: Any,
) -> Any:
    """The agent with everything else as it was saved; ``learn(total - model.num_timesteps, reset_num_timesteps=False)``
    goes on from there, bit for bit on the same CPU.

    :param cls: its class
    :param folder: of a run's checkpoints, of which the newest good one is taken, or of one checkpoint
    :param env: made as the training's was, with as many environments; None for agents that learn from data
    :param trust: the model may hold pickled objects, see :func:`read_model`
    :param kwargs: ``custom_objects``, and attributes to set otherwise
    :raises CheckpointError: if there is none that can be read
    """
    folder = Path(folder)
    _require_env(cls, env)
    one = Checkpoint(folder, _read_manifest(folder) or {})
    checkpoint = one if _NAME.fullmatch(folder.name) else find_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(f"There is no checkpoint in {folder}: name the folder that was given to save_checkpoint.")
    try:
        state = _read_state(checkpoint)
        file = read_model(checkpoint.folder / "model.zip", device, kwargs.pop("custom_objects", None), trust)
        model = build_model(cls, file, env, device, **kwargs)
        _require_env(model, env)
        _restore(model, checkpoint, state)
        if model._last_obs is None and file.normalizer is not None:  # what could not be restored with the environments
            set_normalizer(model.get_vec_normalize_env(), file.normalizer)
    except (ModelFileError, DamagedError, PlainDataError, OSError, KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{checkpoint.folder} cannot be loaded: {str(error).rstrip('.')}.") from error
    return model


def _require_env(model: Any, env: Any) -> None:
    if env is None and _steps_environments(model):
        raise CheckpointError("A training goes on in an environment: give env, made as the training's was.")


def _read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    damage = _damage(checkpoint)
    if damage is not None:
        raise CheckpointError(f"{damage}: load an earlier checkpoint, or put this one back from a copy.")
    with np.load(checkpoint.folder / "state.npz", allow_pickle=False) as arrays:
        state = decode(json.loads((checkpoint.folder / "state.json").read_text(encoding="utf-8")), dict(arrays))
    version, manifest = int(checkpoint.manifest["format"]), checkpoint.manifest
    while version != FORMAT:
        if version not in MIGRATIONS:
            raise CheckpointError(f"{checkpoint.folder} has format {version}, and this Tether reads {FORMAT}: update Tether.")
        manifest, state = MIGRATIONS[version](manifest, state)
        version += 1
    return state


def _restore(model: Any, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    last = state["last"]
    starts = last["_last_episode_starts"]
    if starts is not None and len(starts) != model.n_envs:
        raise CheckpointError(f"The checkpoint has {len(starts)} environments and env has {model.n_envs}: give as many.")
    if state["replay"] is not None:
        read_replay_buffer(model.replay_buffer, state["replay"], BlockStore(checkpoint.folder.parent / "blocks"))
    model._total_timesteps = checkpoint.total
    model._schedule_total = checkpoint.total
    if not _steps_environments(model):
        model.restore_rollout_state(state["rollout"])
    elif not _restore_env(model, state["env"]):
        if state["replay"] is not None:
            end_last_trajectory(model.replay_buffer)
    else:
        vars(model).update(last)
        if state["rollout"] is not None:
            model.restore_rollout_state(state["rollout"])
    give_space(model.action_space, state["action_space"])
    restore_random_state(state["random"])


def _restore_env(model: Any, state: Any) -> bool:
    """Put the environments where they were; where that is not possible they begin new episodes."""
    if state is not None:
        try:
            restore_env_state(model.env, state)
            return True
        except NoStateError as error:
            logger.warning("The environments begin new episodes: %s", error)
    if model.seed is not None:  # the seed of the start would repeat the first episodes
        model.env.seed(model.seed + model.num_timesteps)
    return False


# ---------------------------------------------------------------------- random generators


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - SB3 draws from the global generator
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_initialized() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put them back; a GPU's where there is one."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    th.set_rng_state(state["torch"])
    if th.cuda.is_available():
        th.cuda.set_rng_state_all(state["cuda"][: th.cuda.device_count()])


def _manifest_text(manifest: dict[str, Any]) -> str:
    """The manifest with its own checksum as its last entry."""
    checksum = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"checksum": checksum}, indent=2)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
