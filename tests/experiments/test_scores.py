"""Normalised scores: the constants, and where there are none."""

import numpy as np
import pytest

from tether.envs.procgen import GAMES
from tether.experiments.scores import ATARI, PROCGEN_EASY, normalized, score_range


def test_every_game_of_procgen_has_a_scale():
    assert set(PROCGEN_EASY) == set(GAMES)
    assert all(low < high for low, high in [*PROCGEN_EASY.values(), *ATARI.values()])


@pytest.mark.parametrize(
    ("env_id", "ends"),
    [
        ("procgen/bigfish-easy-v0", (1.0, 40.0)),
        ("procgen/bigfish-hard-v0", None),
        ("ALE/Qbert-v5", (163.9, 13455.0)),
        ("QbertNoFrameskip-v4", (163.9, 13455.0)),
        ("ALE/Pong-v5", None),
        ("HalfCheetah-v5", None),
    ],
)
def test_scale_of_an_environment(env_id, ends):
    assert score_range(env_id) == ends


def test_scores():
    assert normalized("procgen/bigfish-easy-v0", np.array([1.0, 40.0, 79.0])).tolist() == [0.0, 1.0, 2.0]
    assert normalized("Hopper-v5", np.array([1.0])) is None
