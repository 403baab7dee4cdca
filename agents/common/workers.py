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
    """Inside the block the death of an environment's process raises :class:`WorkerError`, and ends the others."""
    try:
        yield
    except GONE as error:
        who = _obituary(env)
        close(env)
        raise WorkerError(
            f"{who}: mend what it printed above, or what killed it (memory, perhaps), and go on from the last checkpoint."
        ) from error


def _obituary(env: Any) -> str:
    dead: list[str] = []
    for i, process in enumerate(_processes(env)):
        process.join(timeout=0.0 if dead else 1.0)  # its end may be news to us
        if not process.is_alive():
            dead.append(f"{i} (exit code {process.exitcode})")
    return f"The process of environment {', '.join(dead)} died" if dead else "The process of an environment died"


def _processes(env: Any) -> list[Any]:
    inner = getattr(env, "unwrapped", None)
    return inner.processes if isinstance(inner, SubprocVecEnv) else []


def close(env: Any) -> None:
    """Close an environment, also one whose processes are partly dead: SB3's own ``close`` waits for their answers."""
    processes = _processes(env)
    if any(not process.is_alive() for process in processes):
        for process in processes:
            process.kill()
            process.join(timeout=5.0)
        env.unwrapped.closed = True
    with suppress(*GONE, OSError):
        env.close()
