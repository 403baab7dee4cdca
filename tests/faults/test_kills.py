"""Killed again and again, a training loses at most what came after its last checkpoint, and ends with the same weights."""

from pathlib import Path

import pytest

from tests.faults.kills import survive


def test_ten_kills(tmp_path: Path):
    tally = survive(10, tmp_path, seed=1)
    assert tally.kills == 10
    assert tally.finished >= 1


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path):
    tally = survive(100, tmp_path, seed=2)
    assert tally.kills == 100
    assert tally.finished >= 1  # how many depends on how fast the machine is; the committed figure has every kind of run
