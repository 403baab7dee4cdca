"""How many threads torch uses while an agent learns: a rule by the work of a gradient step, and nothing outside ``learn``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from torch import nn

# A thread more for every so many floating-point operations of a gradient step. Measured on two cores (batch and hidden
# units of two layers): 34 MFLOP (512 x 64) gained nothing from a second thread, 105 (64 x 256) 16 %, 136 and more 30 to
# 40 %. Threads that wait for one another spin, so on a busy machine a second one without work costs more than it gains.
FLOP_PER_THREAD = 1e8


def threads_for(network: nn.Module, batch_size: int) -> int:
    """One thread for every :data:`FLOP_PER_THREAD` of a step (6 a parameter and sample), at most the process's number."""
    size = sum(parameter.numel() for parameter in network.parameters())
    return max(1, min(th.get_num_threads(), int(6 * size * batch_size / FLOP_PER_THREAD)))


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """Use so many threads inside the block and put the former number back after it."""
    before = th.get_num_threads()
    th.set_num_threads(number)
    try:
        yield
    finally:
        th.set_num_threads(before)
