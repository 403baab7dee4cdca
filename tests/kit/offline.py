"""Every offline agent of the library, and small datasets with known answers; new agents are added here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from tether.agents import BC, CPQ, CQL, FISOR, FMQ, FQL, IQL, MVP, OGSRL, PRDC, QC, TD3BC, BCQLag, FlowBC


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


def pendulum_dataset(n: int = 400, seed: int = 0) -> dict[str, Any]:
    """Random torques in Pendulum-v1, scaled to [-1, 1]; a cost where the speed is above 1."""
    env, rng = gym.make("Pendulum-v1"), np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "rewards", "next_observations", "timeouts")}
    observation, _ = env.reset(seed=seed)
    for _ in range(n):
        action = rng.uniform(-1.0, 1.0, 1).astype(np.float32)
        following, reward, _, truncated, _ = env.step(2.0 * action)
        for name, value in zip(rows, (observation, action, reward, following, truncated), strict=True):
            rows[name].append(value)
        observation = env.reset()[0] if truncated else following
    arrays = {name: np.array(values, bool if name == "timeouts" else np.float32) for name, values in rows.items()}
    costs = (np.abs(arrays["next_observations"][:, 2]) > 1.0).astype(np.float32)
    meta = {"action_low": -2.0, "action_high": 2.0, "max_episode_steps": 200}
    return arrays | {"costs": costs, "terminals": np.zeros(n, bool), "meta": meta}


class OneStep(gym.Env):
    """The environment of :func:`one_step_tasks`."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32)
        return self.state, {}

    def step(self, action):
        reward = 1.0 - float(np.abs(action - self.state)[0])
        return self.state, reward, True, False, {"cost": float(action[0] > 0.0)}


# ---------------------------------------------------------------------- the agents

Solved = Callable[[np.ndarray, np.ndarray], bool]


@dataclass(frozen=True)
class Subject:
    """An offline agent under test.

    :param small: arguments that make it quick
    :param learns: arguments and gradient steps with which it solves the one-step tasks
    :param rounding: what weights may differ by after four steps in other orders of summation
    :param solved: whether (states, actions) (N,) are its answer to them
    """

    cls: type
    small: dict[str, Any]
    learns: dict[str, Any]
    steps: int
    solved: Solved
    rounding: float = 2e-5

    @property
    def name(self) -> str:
        return self.cls.__name__

    def make(self, env: Any = None, **kwargs: Any) -> Any:
        """The agent, small, on the CPU, seed 0 unless told otherwise."""
        return self.cls(env=env, **{"seed": 0, "device": "cpu", **self.small, **kwargs})


def spreads(states: np.ndarray, actions: np.ndarray) -> bool:
    """As the data: uniform actions."""
    return bool(abs(actions.mean()) < 0.2 and abs(actions.std() - 3**-0.5) < 0.12)


def averages(states: np.ndarray, actions: np.ndarray) -> bool:
    """The mean of uniform actions."""
    return bool(np.abs(actions).max() < 0.25)


def follows(states: np.ndarray, actions: np.ndarray) -> bool:
    """The best reward, a = s, up to a pull towards the data's mean action."""
    return bool(np.corrcoef(states, actions)[0, 1] > 0.95 and np.ptp(actions) > 0.8)


def follows_where_safe(states: np.ndarray, actions: np.ndarray) -> bool:
    """a = s where that is safe. CPQ's actor has no gradient at actions that count as unsafe, and stays there."""
    return bool(np.abs(states - actions)[states < -0.1].max() < 0.2)


def safe(states: np.ndarray, actions: np.ndarray) -> bool:
    """Nearly no action above 0, which costs."""
    return bool(np.mean(actions <= 0.05) > 0.95)


def safe_or_nearly(states: np.ndarray, actions: np.ndarray) -> bool:
    """No action that costs much above 0, and a = s where that is safe."""
    return bool(actions.max() < 0.1 and np.abs(states - actions)[states < -0.1].max() < 0.3)


TINY = {"net_arch": [16]}
WIDE = {"net_arch": [64, 64]}
SUBJECTS = [
    Subject(BC, {"batch_size": 32, "policy_kwargs": TINY}, {"policy_kwargs": WIDE, "batch_size": 256}, 300, averages),
    Subject(TD3BC, {"batch_size": 32, "policy_kwargs": TINY}, {"policy_kwargs": WIDE, "learning_rate": 1e-3}, 1500, follows),
    Subject(PRDC, {"batch_size": 32, "policy_kwargs": TINY}, {"policy_kwargs": WIDE, "learning_rate": 1e-3}, 1500, follows),
    Subject(
        IQL,
        {"batch_size": 32, "policy_kwargs": TINY},
        {"policy_kwargs": WIDE, "learning_rate": 1e-3, "beta": 10.0, "reward_scale": 1.0},
        1500,
        follows,
    ),
    Subject(
        CPQ,
        {"batch_size": 32, "n_samples": 3, "policy_kwargs": {**TINY, "vae_width": 16}},
        {
            "policy_kwargs": {**WIDE, "vae_width": 32}, "actor_learning_rate": 1e-3, "cost_limit": 0.3, "batch_size": 128,
            "reward_scale": 1.0, "gamma": 0.0,
        },
        1500,
        follows_where_safe,
    ),
    Subject(
        BCQLag,
        {"batch_size": 32, "n_samples": 3, "policy_kwargs": {**TINY, "vae_width": 16}},
        {
            "policy_kwargs": {**WIDE, "vae_width": 32, "phi": 1.0}, "cost_limit": 0.1, "batch_size": 128, "reward_scale": 1.0,
            "gamma": 0.0, "pid": (1.0, 0.03, 0.01),
        },
        1500,
        safe,
    ),
    Subject(
        FISOR,
        {"batch_size": 32, "critic_batch_size": 16, "policy_kwargs": {**TINY, "width": 16, "n_blocks": 1}},
        {
            "learning_rate": 3e-3, "batch_size": 256, "critic_batch_size": 128, "tau": 0.05, "policy_tau": 0.02,
            "policy_kwargs": {**WIDE, "width": 64, "n_blocks": 1, "dropout": 0.0},
        },
        1500,
        safe,
    ),
    Subject(
        CQL,
        {"n_candidates": 3, "guarded": True, "resampled": True, "policy_kwargs": TINY},
        {"policy_kwargs": WIDE, "learning_rate": 1e-3, "batch_size": 256, "tau": 0.05, "conservatism": 0.05},
        1500,
        follows,
    ),
    Subject(
        OGSRL,
        {"n_episodes": 4, "horizon": 3, "value_batch_size": 16, "damping": 1.0, "policy_kwargs": TINY},
        {"policy_kwargs": WIDE, "n_episodes": 64, "horizon": 1, "gamma": 0.9, "cost_limits": 0.05},
        100,
        safe_or_nearly,
        1e-3,  # conjugate gradients amplify it
    ),
    *(
        Subject(
            cls,
            {"batch_size": 16, "horizon": 2, "policy_kwargs": {**TINY, "n_candidates": 3}},
            {
                "policy_kwargs": WIDE, "horizon": 1, "learning_rate": 1e-3, "batch_size": 256, "tau": 0.05,
                "target_candidates": 1, **schedule,
            },
            600,
            follows,
        )
        for cls, schedule in ((FMQ, {"warmup": 20, "anneal_end": 200}), (MVP, {"warmup": 20, "anneal_end": 200}), (QC, {}))
    ),
    Subject(
        FQL,
        {"batch_size": 16, "horizon": 2, "policy_kwargs": {**TINY, "flow_steps": 3}},
        {"policy_kwargs": WIDE, "horizon": 1, "learning_rate": 1e-3, "batch_size": 256, "tau": 0.05, "alpha": 0.1},
        1500,
        follows,
    ),
    Subject(
        FlowBC,
        {"batch_size": 16, "horizon": 2, "policy_kwargs": {**TINY, "flow_steps": 3}},
        {"policy_kwargs": WIDE, "horizon": 1, "learning_rate": 1e-3},
        600,
        spreads,
    ),
]  # fmt: skip
