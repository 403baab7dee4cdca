"""A linear "patient" with Gaussian noise, whose safe states are known and whose policies can be judged in closed form.

A state is (s_0, s_1), two deviations from health without a unit. s_0 grows by itself; the first dose lowers it and raises
s_1, which decays and which the second dose lowers. The functions take whole batches of states, (B, 2) float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .suite import EnvError

ID = "tether/LinearPatient-v0"
STEPS = 20  # time limit
COST_NAMES = ("deviation",)
A = np.array([[1.05, 0.1], [0.0, 0.9]])
B = np.array([[-0.3, 0.0], [0.1, -0.3]])
NOISE = 0.05  # standard deviation of each coordinate, per step
LIMIT = 1.0  # safe where s_0 <= LIMIT; from about 0.2 down the constraint opposes the reward
BOUND = 3.0  # the episode ends where |s| is above
START_MEAN = np.array([0.6, 0.0])
START_COV = np.diag([0.04, 0.04])

# ---------------------------------------------------------------------- motion, reward, constraint


def dynamics(states: np.ndarray, actions: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """s' = A s + B a + w.

    :param states: (B, 2)
    :param actions: (B, 2), not clipped
    :param noise: w, (B, 2)
    :return: (B, 2) float64
    """
    return states @ A.T + actions @ B.T + noise


def rewards(states: np.ndarray) -> np.ndarray:
    """r(s) = 1 - |s|^2 of the states in which actions are taken, (B, 2) -> (B,)."""
    return 1.0 - (states**2).sum(axis=1)


def costs(states: np.ndarray, limit: float = LIMIT) -> np.ndarray:
    """c(s) = 1[s_0 > limit] of the states in which actions are taken, (B, 2) -> (B,) float32."""
    return (states[:, 0] > limit).astype(np.float32)


def ended(states: np.ndarray) -> np.ndarray:
    """Whether |s| > 3, (B, 2) -> (B,) bool."""
    return np.linalg.norm(states, axis=1) > BOUND


# ---------------------------------------------------------------------- linear policies in closed form


def expected_cost(
    K: np.ndarray,
    start_mean: np.ndarray,
    start_cov: np.ndarray,
    steps: int,
    gamma: float,
    noise: float = NOISE,
    limit: float = LIMIT,
) -> float:
    """J_c = sum_{t < steps} gamma^t P(s_t0 > limit) of the policy a = K s, whose actions are not clipped.

    It is exact for `dynamics`. Episodes of `LinearPatient` differ where actions leave [-1, 1] or |s| passes 3.

    :param K: (2, 2)
    :param start_mean: mean (2,) of the first state, which is Gaussian
    :param start_cov: its covariance (2, 2)
    :param steps: length of an episode
    :param gamma: discount factor
    :param noise: standard deviation of w
    :param limit: s_0 that costs above it
    :raises EnvError: where K or the start has another shape
    """
    moments = _moments(K, start_mean, start_cov, steps, noise)
    return sum(gamma**t * _tail(limit - mean[0], covariance[0, 0]) for t, (mean, covariance) in enumerate(moments))


def expected_return(
    K: np.ndarray, start_mean: np.ndarray, start_cov: np.ndarray, steps: int, gamma: float, noise: float = NOISE
) -> float:
    """J_r = sum_{t < steps} gamma^t (1 - |m_t|^2 - tr S_t), with the arguments and the limits of `expected_cost`."""
    moments = _moments(K, start_mean, start_cov, steps, noise)
    return sum(gamma**t * float(1.0 - mean @ mean - np.trace(covariance)) for t, (mean, covariance) in enumerate(moments))


def _moments(
    K: np.ndarray, mean: np.ndarray, covariance: np.ndarray, steps: int, noise: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """m_t and S_t of the states: m' = M m, S' = M S M^T + noise^2 I with M = A + B K."""
    K, mean, covariance = (np.asarray(part, dtype=np.float64) for part in (K, mean, covariance))
    shapes = (K.shape, mean.shape, covariance.shape)
    if shapes != ((2, 2), (2,), (2, 2)):
        raise EnvError(f"K, start_mean and start_cov have the shapes {shapes}: give (2, 2), (2,) and (2, 2).")
    step = A + B @ K
    for _ in range(steps):
        yield mean, covariance
        mean, covariance = step @ mean, step @ covariance @ step.T + noise**2 * np.eye(2)


def _tail(gap: float, variance: float) -> float:
    """P(x > gap) for x ~ N(0, variance)."""
    return 0.5 * math.erfc(gap / math.sqrt(2.0 * variance)) if variance > 0.0 else float(gap < 0.0)


# ---------------------------------------------------------------------- the environment


class LinearPatient(gym.Env):
    """Keep two deviations small, and the first of them below a limit.

    Observations (2,) float32 are the state, actions (2,) in [-1, 1] the doses. Reward and costs are those of the state in
    which the action is taken: 1 - |s|^2, and ``info["costs"]``, (1,) float32, 1 where s_0 > limit, whose sum is
    ``info["cost"]``. The episode ends where the next state has |s| > 3, with ``info["death"]``. It starts at N((0.6, 0),
    0.2^2 I), from where s_0 passes 1 in some ten steps without treatment; ``reset(options={"state": s})`` starts at s.

    :param noise: standard deviation of w
    :param limit: s_0 that costs above it
    :param max_episode_steps: time limit, a truncation
    :raises EnvError: for an argument out of its range
    """

    metadata = {"render_modes": []}  # noqa: RUF012
    cost_names = COST_NAMES

    def __init__(
        self, noise: float = NOISE, limit: float = LIMIT, max_episode_steps: int = STEPS, render_mode: str | None = None
    ) -> None:
        if not 0.0 <= noise < math.inf:
            raise EnvError(f"noise is {noise}: use a standard deviation of 0 or more.")
        if not math.isfinite(limit):
            raise EnvError(f"limit is {limit}: use a finite number.")
        if not (isinstance(max_episode_steps, (int, np.integer)) and max_episode_steps >= 1):
            raise EnvError(f"max_episode_steps is {max_episode_steps!r}: use a whole number from 1 on.")
        if render_mode is not None:
            raise EnvError(f"{ID} has no render_mode '{render_mode}': leave it out.")
        self.noise, self.limit, self.render_mode = noise, limit, render_mode
        self.max_episode_steps = max_episode_steps
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.state, self.steps = START_MEAN.copy(), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        drawn = self.np_random.multivariate_normal(START_MEAN, START_COV)
        self.state, self.steps = np.array((options or {}).get("state", drawn), dtype=np.float64), 0
        if self.state.shape != (2,) or not np.isfinite(self.state).all():
            raise EnvError(f"The state to start in is {self.state.tolist()}: give two finite numbers.")
        return self.state.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        before, doses = self.state[None], np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)[None]
        after = dynamics(before, doses, self.np_random.normal(0.0, self.noise, (1, 2)))
        self.state, self.steps = after[0], self.steps + 1
        dead, cost = bool(ended(after)[0]), costs(before, self.limit)
        truncated = self.steps >= self.max_episode_steps and not dead
        info = {"costs": cost, "cost": float(cost[0]), "death": dead}
        return self.state.astype(np.float32), float(rewards(before)[0]), dead, truncated, info
