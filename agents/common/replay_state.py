"""The state of a replay buffer: its arrays as blocks, of which only those are looked at that were written to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer

from .blocks import BlockStore, rows_per_block

# These write at `pos` and nowhere else.
_SEQUENTIAL = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)


class _Written:
    """What the last checkpoint of a buffer wrote, so that the next one can leave it."""

    def __init__(self, position: int, steps: int, training: float, entries: dict[str, Any], store: BlockStore) -> None:
        self.position, self.steps, self.training, self.entries, self.folder = position, steps, training, entries, store.folder


_LAST: weakref.WeakKeyDictionary[Any, _Written] = weakref.WeakKeyDictionary()


def write_replay_buffer(buffer: Any, store: BlockStore, steps: int, training: float) -> dict[str, Any]:
    """Write a buffer's arrays to ``store``.

    :param steps: steps per environment so far, which tell how many rows were added since the last time
    :param training: tells one call of ``learn`` from another; rows that were changed otherwise than by it go unnoticed
        within one
    :return: everything else about it, for :func:`read_replay_buffer`
    :raises ValueError: if it keeps objects that are no plain data
    """
    size, position = buffer.buffer_size, buffer.pos
    rows = size if buffer.full else min(size, position + 1)
    touched = _touched(buffer, _LAST.get(buffer), store, steps, training)
    shape = (size, buffer.n_envs) if hasattr(buffer, "n_envs") else (size,)  # other arrays tell of environments
    entries: dict[str, Any] = {}
    for name, value in _arrays(buffer):
        array = _as_numpy(value)
        former = None if touched is None else _LAST[buffer].entries.get(name)
        clean = _unchanged(former, touched, rows_per_block(array))
        of_rows = array.shape[: len(shape)] == shape
        entries[name] = store.write(array, rows if of_rows else len(array), clean)
    _LAST[buffer] = _Written(position, steps, training, entries, store)
    return {"position": position, "full": buffer.full, "size": size, "arrays": entries, "rest": _rest(buffer)}


def read_replay_buffer(buffer: Any, state: dict[str, Any], store: BlockStore) -> None:
    """Fill a fresh buffer, made as the other one was.

    :raises DamagedError: naming a block that is missing or damaged
    """
    for name, value in _arrays(buffer):
        array = _as_numpy(value)
        store.read(state["arrays"][name], array)
        if isinstance(value, th.Tensor) and value.device.type != "cpu":
            value.copy_(th.from_numpy(array))
    vars(buffer).update(state["rest"])
    buffer.pos, buffer.full = state["position"], state["full"]


def end_last_trajectory(buffer: Any) -> None:
    """Mark the newest transitions as the last of their episodes, because the next ones begin new ones.

    Only buffers that read the transitions behind one another need it.
    """
    if hasattr(buffer, "truncate_last_trajectory"):
        buffer.truncate_last_trajectory()
    elif (getattr(buffer, "optimize_memory_usage", False) or isinstance(buffer, NStepReplayBuffer)) and buffer.size():
        last = (buffer.pos - 1) % buffer.buffer_size
        buffer.dones[last] = 1.0
        if buffer.handle_timeout_termination:
            buffer.timeouts[last] = 1.0


def blocks_of(state: dict[str, Any]) -> list[str]:
    """Names of the blocks of a buffer."""
    return [name for entry in state["arrays"].values() for name in entry["blocks"]]


def _touched(
    buffer: Any, last: _Written | None, store: BlockStore, steps: int, training: float
) -> np.ndarray | None:
    """Which rows may have been written to since the last time, (buffer_size,) bool; None: any of them."""
    if last is None or type(buffer) not in _SEQUENTIAL or last.folder != store.folder or last.training != training:
        return None
    added = steps - last.steps
    # An environment step adds one row, and the rows before the first checkpoint may be fewer than the steps.
    if not 0 <= added < buffer.buffer_size - 2 or (last.position + added - buffer.pos) % buffer.buffer_size:
        return None
    touched = np.zeros(buffer.buffer_size, bool)
    touched[np.arange(last.position - 1, last.position + added + 2) % buffer.buffer_size] = True
    return touched


def _unchanged(former: Any, touched: np.ndarray | None, per_block: int) -> Callable[[int, int], str | None]:
    """The function from rows (first, last) to the name of their block, where they are as they were; None otherwise."""

    def name(first: int, last: int) -> str | None:
        if former is None or touched is None or touched[first:last].any():
            return None
        return former["blocks"][first // per_block] if last == min(former["rows"], first + per_block) else None

    return name


def _arrays(buffer: Any) -> Iterator[tuple[str, np.ndarray | th.Tensor]]:
    """Name and array or tensor of everything large in a buffer, also in dicts."""
    for name, value in vars(buffer).items():
        parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        for full_name, part in parts.items():
            if isinstance(part, np.ndarray) and part.dtype == object:
                if getattr(buffer, "copy_info_dict", False):
                    kind = type(buffer).__name__
                    raise ValueError(f"A {kind} with copy_info_dict=True cannot be saved without pickle: leave it False.")
            elif isinstance(part, (np.ndarray, th.Tensor)) and part.ndim:
                yield full_name, part


def _as_numpy(value: np.ndarray | th.Tensor) -> np.ndarray:
    """The same memory, or a copy where it is on a GPU."""
    return value.cpu().numpy() if isinstance(value, th.Tensor) else value


def _rest(buffer: Any) -> dict[str, Any]:
    """Counters and flags."""
    return {name: value for name, value in vars(buffer).items() if isinstance(value, (bool, int, float, np.integer))}
