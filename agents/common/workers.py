"""Environments in other processes: when one dies, that is said, and nothing hangs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv

# What reading from or writing to a process gives that is no more.
GONE = (EOFError, BrokenPipeError, ConnectionResetError, ConnectionRefusedError)


class WorkerError(RuntimeError):
    """The process of an environment died; the message names which."""


@contextmanager
def watched(env: Any) -> Iterator[None]:
    """Inside the block the death of an environment's process raises :class:`WorkerError`."""
    try:
        yield
    except GONE as error:
        raise WorkerError(
            f"{_obituary(env)}: mend what it printed above, or what killed it (memory, perhaps), and go on from the last "
            "checkpoint."
        ) from error


def _obituary(env: Any) -> str:
    dead: list[str] = []
    for i, process in enumerate(getattr(_subproc(env), "processes", ())):
        process.join(timeout=1.0 if not dead else 0.0)  # its end may be news to us
        if not process.is_alive():
            dead.append(f"{i} (exit code {process.exitcode})")
    return f"The process of environment {', '.join(dead)} died" if dead else "The process of an environment died"


def _subproc(env: Any) -> SubprocVecEnv | None:
    inner = getattr(env, "unwrapped", None)
    return inner if isinstance(inner, SubprocVecEnv) else None


def close(env: Any) -> None:
    """Close an environment, also one whose processes are partly dead."""
    with suppress(*GONE, OSError):
        env.close()
    for process in getattr(_subproc(env), "processes", ()):
        if process.is_alive():
            process.terminate()
        process.join(timeout=5.0)
