"""How many threads torch uses while an agent learns: a rule by network size, and nothing outside ``learn``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from torch import nn

# Below this many parameters a second thread costs more in synchronisation than it saves (measured: PPO with two
# 64-unit layers collapsed now and then with two threads, never with one).
SMALL_NETWORK = 100_000


def threads_for(network: nn.Module) -> int:
    """One thread for small networks, the process's current number for the others."""
    size = sum(parameter.numel() for parameter in network.parameters())
    return 1 if size < SMALL_NETWORK else th.get_num_threads()


@contextmanager
def torch_threads(network: nn.Module) -> Iterator[None]:
    """Use :func:`threads_for` threads inside the block and put the former number back after it."""
    before = th.get_num_threads()
    th.set_num_threads(threads_for(network))
    try:
        yield
    finally:
        th.set_num_threads(before)
