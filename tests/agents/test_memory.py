"""Large tensors inside and outside of the block that keeps freed memory."""

import resource
import sys

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


def test_pages_are_asked_for_once():
    fill()
    outside = faults_of(fill)
    with freed_memory_kept():
        fill()
        inside = faults_of(fill)
    assert outside > 1_000, "64 MiB are mapped anew every time"
    assert inside < outside / 10
    assert faults_of(fill) > 1_000, "and so they are after the block"
