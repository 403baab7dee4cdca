"""Large tensors inside and outside of the block that keeps freed memory."""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch as th

from tether.agents.common.memory import freed_memory_kept

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")


def faults_of(work) -> int:
    """Pages that the system had to give while ``work`` ran."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def fill():
    for _ in range(5):
        th.ones(2**24)  # 64 MiB


def faults() -> tuple[int, int, int]:
    """Before, inside and after the block."""
    fill()
    before = faults_of(fill)
    with freed_memory_kept():
        fill()
        inside = faults_of(fill)
    return before, inside, faults_of(fill)


def test_pages_are_asked_for_once():
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # whose heap has no hole that an earlier test left
        before, inside, after = fresh.submit(faults).result()
    assert before > 1_000, "64 MiB are mapped anew every time"
    assert inside < before / 10
    assert after > 1_000, "and so they are after the block"
