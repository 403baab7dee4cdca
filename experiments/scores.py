"""Normalised scores: 0 is the worst or a random policy, 1 the best possible or a human, so that games can be averaged."""

from __future__ import annotations

import re

import numpy as np

# ProcGen's easy mode, (R_min, R_max): Cobbe et al. 2020, arXiv 1912.01588, as public code quotes it.
PROCGEN_EASY = {
    "bigfish": (1.0, 40.0), "bossfight": (0.5, 13.0), "caveflyer": (3.5, 12.0), "chaser": (0.5, 13.0),
    "climber": (2.0, 12.6), "coinrun": (5.0, 10.0), "dodgeball": (1.5, 19.0), "fruitbot": (-1.5, 32.4),
    "heist": (3.5, 10.0), "jumper": (3.0, 10.0), "leaper": (3.0, 10.0), "maze": (5.0, 10.0), "miner": (1.5, 13.0),
    "ninja": (3.5, 10.0), "plunder": (4.5, 30.0), "starpilot": (2.5, 64.0),
}  # fmt: skip
# Atari, (random, human): the values of the Nature DQN paper's successors, of the five games of Atari-5.
ATARI = {
    "BattleZone": (2360.0, 37187.5), "DoubleDunk": (-18.6, -16.4), "NameThisGame": (2292.3, 8049.0),
    "Phoenix": (761.4, 7242.6), "Qbert": (163.9, 13455.0),
}  # fmt: skip


def score_range(env_id: str) -> tuple[float, float] | None:
    """The returns that count as 0 and 1 in an environment; None where there is no convention."""
    if match := re.fullmatch(r"procgen/(\w+)-easy-v0", env_id):
        return PROCGEN_EASY.get(match[1])
    if match := re.fullmatch(r"(?:ALE/)?([A-Za-z]+?)(?:NoFrameskip)?-v\d", env_id):
        return ATARI.get(match[1])
    return None


def normalized(env_id: str, returns: np.ndarray) -> np.ndarray | None:
    """(R - R_min) / (R_max - R_min), or None where there is no convention; neither end is clipped."""
    ends = score_range(env_id)
    return None if ends is None else (returns - ends[0]) / (ends[1] - ends[0])
