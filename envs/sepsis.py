"""ICU-Sepsis as a patient with features, two doses and two constraints, whose every policy has a value that is known.

The package's own environment is a discrete Markov decision process clustered from MIMIC-III (Choudhary et al. 2024). Here
its states are seen through 13 of their 47 centroid columns, those of OGSRL (arXiv 2505.16242) in the order of its code, so
that methods for continuous data can be judged exactly. The columns are normalised, and physical thresholds cannot be
recovered from them: the constraints are proxies, and nothing here is a statement about patients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .suite import EnvError, require

STEPS = 20  # time limit, of the paper's 4-hour windows
FEATURES = {  # name -> column of the centroids
    "gender": 0, "re_admission": 3, "age": 4, "mechvent": 1, "GCS": 6, "FiO2": 13, "paO2": 26, "PaO2_FiO2": 34,
    "bilirubin": 41, "output_4hourly": 46, "output_total": 45, "input_total": 43, "SpO2": 36,
}  # fmt: skip
COST_NAMES = ("spo2", "urine")
REWARDS = ("inverse_sofa", "sofa", "survival")
LEVELS = 5  # of each dose
JITTER = 0.05  # of observations, in standard deviations of their column over the states
DOSE_NOISE = 0.1  # standard deviation of the clinician's doses in [-1, 1], cut at two, where a level is still the same
LOW_QUANTILE = 0.1  # of SpO2 and urine output over the states, below which a state costs
_LIVING, _DEATH, _SURVIVAL = 713, 713, 714


class Process(NamedTuple):
    """The decision process behind the features, of the 713 states of living patients.

    :param features: (713, 13) float64
    :param transitions: (713, 25, 716); states 713 and 714 are death and survival
    :param start: (713,)
    :param admissible: (713, 25) bool, actions that clinicians took often enough
    :param clinician: (713, 25), the shipped policy of the clinicians, on admissible actions only
    :param expert: (713, 25), the same as it is shipped, with inadmissible actions in an eighth of its steps
    :param sofa: (713,)
    :param costs: (713, 2), whether SpO2, and urine output, is in the lowest tenth of the states
    """

    features: np.ndarray
    transitions: np.ndarray
    start: np.ndarray
    admissible: np.ndarray
    clinician: np.ndarray
    expert: np.ndarray
    sofa: np.ndarray
    costs: np.ndarray


@cache
def process() -> Process:
    """The package's matrices; an inadmissible action has the mean transition of the admissible ones.

    :raises EnvError: where icu-sepsis is not installed
    """
    require("Sepsis/ICU-Sepsis-v2", "clinical", "icu_sepsis")
    import icu_sepsis  # noqa: F401  registers it

    package: Any = gym.make("Sepsis/ICU-Sepsis-v2", disable_env_checker=True).unwrapped
    features = np.asarray(package.state_cluster_centers, np.float64)[:_LIVING, list(FEATURES.values())]
    admissible = np.zeros((_LIVING, LEVELS**2), bool)
    for state in range(_LIVING):
        admissible[state, package.dynamics["admissible_actions"][state]] = True
    expert = package.expert_policy[:_LIVING]
    clean = np.where(admissible, expert, 0.0)
    watched = features[:, [list(FEATURES).index(name) for name in ("SpO2", "output_4hourly")]]
    return Process(
        features, package.dynamics["tx_mat"][:_LIVING], package.dynamics["d_0"][:_LIVING], admissible,
        clean / clean.sum(1, keepdims=True), expert, np.asarray(package.sofa_scores, np.float64)[:_LIVING],
        (watched < np.quantile(watched, LOW_QUANTILE, axis=0)).astype(np.float64),
    )  # fmt: skip


def rewards(kind: str) -> np.ndarray:
    """r(s) of the living states, (713,).

    ``inverse_sofa`` is 1 / max(SOFA, 1), as the paper's text has it: each step of life is worth the more the healthier.
    ``sofa`` is -SOFA clipped to [-12.5, -2.5], as its code has it: an early death then saves the rest of the penalties,
    and the policy of the highest return lets more patients die than the clinicians. ``survival`` is the package's own +1
    on survival, 0 here.
    """
    sofa = process().sofa
    of = {"inverse_sofa": 1.0 / np.maximum(sofa, 1.0), "sofa": -sofa.clip(2.5, 12.5), "survival": np.zeros(_LIVING)}
    return of[kind]


def action_index(doses: np.ndarray) -> np.ndarray:
    """The package's action, 5 fluid + vasopressor, of doses [vasopressor, fluid] in [-1, 1]: (..., 2) to (...,) int64."""
    levels = np.rint(2.0 * (np.clip(doses, -1.0, 1.0) + 1.0)).astype(np.int64)
    return LEVELS * levels[..., 1] + levels[..., 0]


def doses_of(index: np.ndarray) -> np.ndarray:
    """Doses in the middle of an action's levels, (...,) to (..., 2) float64."""
    return np.stack([index % LEVELS, index // LEVELS], -1) / 2.0 - 1.0


def observe(states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Features of living states with a jitter, which tells them apart still: (B,) to (B, 13) float32."""
    features = process().features
    noise = JITTER * features.std(0) * rng.standard_normal((len(states), features.shape[1]))
    return (features[states] + noise).astype(np.float32)


# ---------------------------------------------------------------------- what is true of a policy


class Truth(NamedTuple):
    """What a policy really does, expectations over an episode; ``value`` and ``costs`` are discounted.

    :param inadmissible: share of the steps with an action that clinicians hardly ever took
    :param length: steps
    :param truncated: probability that the patient is alive in the end, and in hospital
    :param sofa: mean of the steps
    """

    value: float
    costs: np.ndarray
    death: float
    survival: float
    truncated: float
    inadmissible: float
    length: float
    sofa: float


def policy_matrix(act: Callable[[np.ndarray], np.ndarray], draws: int = 256, seed: int = 0) -> np.ndarray:
    """pi(action | state), (713, 25), of a policy that sees jittered features, by so many draws of the jitter.

    :param act: observations (B, 13) float32 to doses (B, 2); may sample
    """
    rng, counts, states = np.random.default_rng(seed), np.zeros((_LIVING, LEVELS**2)), np.arange(_LIVING)
    for _ in range(draws):
        np.add.at(counts, (states, action_index(act(observe(states, rng)))), 1.0)
    return counts / draws


def truth(policy: np.ndarray, reward: str = "inverse_sofa", gamma: float = 0.99, steps: int | None = STEPS) -> Truth:
    """The exact values of a policy (713, 25).

    :param steps: time limit, or None for the linear solve (I - gamma P)^-1 of episodes without one; of those lengths,
        deaths and survivals are not discounted either way
    """
    known = process()
    moves = np.einsum("sa,sat->st", policy, known.transitions)
    # Expected visits of every state, plain and discounted.
    if steps is None:
        visits, discounted = (
            np.linalg.solve(np.eye(_LIVING) - g * moves[:, :_LIVING].T, known.start) for g in (1.0, gamma)
        )
        alive = np.zeros(_LIVING)
    else:
        alive, visits, discounted = known.start, np.zeros(_LIVING), np.zeros(_LIVING)
        for step in range(steps):
            visits, discounted = visits + alive, discounted + gamma**step * alive
            alive = alive @ moves[:, :_LIVING]
    survived = moves[:, _SURVIVAL] if reward == "survival" else np.zeros(_LIVING)
    length = float(visits.sum())
    return Truth(
        float(discounted @ (rewards(reward) + survived)), discounted @ known.costs, float(visits @ moves[:, _DEATH]),
        float(visits @ moves[:, _SURVIVAL]), float(alive.sum()),
        float(visits @ np.where(known.admissible, 0.0, policy).sum(1)) / length, length, float(visits @ known.sofa) / length,
    )  # fmt: skip


# ---------------------------------------------------------------------- the environment


class SepsisFeatures(gym.Env):
    """Choose vasopressor and fluid every four hours.

    Observations (13,) float32 are named in :data:`FEATURES`; when the episode has ended they are 0. Actions (2,) in [-1, 1]
    are the doses of vasopressor and fluid, each rounded to one of five levels. Reward (see :func:`rewards`) and
    ``info["costs"]`` (2,) are those of the state in which the action is taken, ``info["cost"]`` is their sum. ``info`` also
    has ``admissible``, whether clinicians took that action there, ``state``, ``sofa`` and, at the end, ``death``.

    :param reward: one of :data:`REWARDS`
    :param max_episode_steps: time limit, a truncation
    :raises EnvError: for an argument out of its range, or where icu-sepsis is not installed
    """

    metadata = {"render_modes": []}  # noqa: RUF012
    cost_names = COST_NAMES

    def __init__(self, reward: str = "inverse_sofa", max_episode_steps: int = STEPS, render_mode: str | None = None) -> None:
        if reward not in REWARDS:
            raise EnvError(f"There is no reward '{reward}': use one of {', '.join(REWARDS)}.")
        if not (isinstance(max_episode_steps, int) and max_episode_steps >= 1):
            raise EnvError(f"max_episode_steps is {max_episode_steps!r}: use a whole number from 1 on.")
        if render_mode is not None:
            raise EnvError(f"Sepsis with features has no render_mode '{render_mode}': leave it out.")
        self.reward, self.max_episode_steps, self.render_mode = reward, max_episode_steps, render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (len(FEATURES),), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._rewards = rewards(reward)
        self.state, self.steps = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.steps = int(self.np_random.choice(_LIVING, p=process().start)), 0
        return observe(np.array([self.state]), self.np_random)[0], {"state": self.state}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        known, before, index = process(), self.state, int(action_index(np.asarray(action)))
        self.state = int(self.np_random.choice(len(known.transitions[0, 0]), p=known.transitions[before, index]))
        self.steps += 1
        ended = self.state >= _LIVING
        reward = self._rewards[before] + float(self.reward == "survival" and self.state == _SURVIVAL)
        costs = known.costs[before].astype(np.float32)
        info = {
            "costs": costs, "cost": float(costs.sum()), "admissible": bool(known.admissible[before, index]),
            "state": self.state, "sofa": float(known.sofa[before]), "death": self.state == _DEATH,
        }  # fmt: skip
        seen = np.zeros(len(FEATURES), np.float32) if ended else observe(np.array([self.state]), self.np_random)[0]
        return seen, float(reward), ended, not ended and self.steps >= self.max_episode_steps, info


class Clinician:
    """The clinicians' policy as a behaviour to collect data with: admissible actions, doses spread within their level.

    :param seed: of its choices
    :param episodes: not used; every patient is treated alike
    """

    def __init__(self, seed: int, episodes: int = 1) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, observations: np.ndarray, episodes: np.ndarray | None = None) -> np.ndarray:
        """Doses (B, 2) float32 for observations (B, 13); the state is the one whose features are nearest."""
        known, scale = process(), process().features.std(0)
        seen, centres = observations / scale, known.features / scale
        states = ((seen[:, None, :] - centres) ** 2).sum(2).argmin(1)
        chosen = (known.clinician[states].cumsum(1) > self.rng.random((len(states), 1))).argmax(1)
        noise = DOSE_NOISE * self.rng.standard_normal((len(states), 2)).clip(-2.0, 2.0)
        return np.clip(doses_of(chosen) + noise, -1.0, 1.0).astype(np.float32)
