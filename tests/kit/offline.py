"""Small datasets with known answers, for the tests of offline agents."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_dataset(n: int = 600, obs_dim: int = 3, action_dim: int = 2, episode: int = 20, seed: int = 0) -> dict[str, Any]:
    """Numbers without meaning in the right shapes; a fifth of the rows has a cost, episodes end by time and otherwise."""
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(n + 1, obs_dim)).astype(np.float32)
    ends = np.arange(n) % episode == episode - 1
    by_time = ends & (np.arange(n) // episode % 2 == 0)
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": rng.uniform(-1.0, 1.0, (n, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "costs": (rng.random(n) < 0.2).astype(np.float32),
        "terminals": ends & ~by_time,
        "timeouts": by_time,
        "meta": {},
    }


def one_step_tasks(n: int = 4000, seed: int = 0) -> dict[str, Any]:
    """Episodes of one step whose reward is 1 - |a - s|, and whose cost is 1 where a > 0: known best actions, safe and not."""
    rng = np.random.default_rng(seed)
    observations = rng.uniform(-1.0, 1.0, (n, 1)).astype(np.float32)
    actions = rng.uniform(-1.0, 1.0, (n, 1)).astype(np.float32)
    return {
        "observations": observations,
        "next_observations": observations,
        "actions": actions,
        "rewards": 1.0 - np.abs(actions - observations)[:, 0],
        "costs": (actions[:, 0] > 0.0).astype(np.float32),
        "terminals": np.ones(n, bool),
        "timeouts": np.zeros(n, bool),
        "meta": {"max_episode_steps": 1, "reference_min_return": 0.0, "reference_max_return": 1.0},
    }
