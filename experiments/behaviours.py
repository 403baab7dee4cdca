"""Policies that make offline data: at random, half trained, trained for the reward, and then to avoid costs.

The trained ones are snapshots of one run of MDPO, first on the reward, then where a step that costs is punished: one
lineage, whose policies differ in what they dare and not in how they move. They are kept by environment, seed and length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError, nearest

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

# Name -> when it is taken, in lengths of the training for the reward (None: not trained), and its share of a mixture's steps.
BEHAVIOURS: dict[str, tuple[float | None, float]] = {
    "random": (None, 0.05),
    "novice": (0.25, 0.15),
    "reward": (1.0, 0.35),
    "cautious": (1.15, 0.15),
    "safe": (1.4, 0.30),
}
PENALTY = 3.0  # of a unit of cost, in mean absolute rewards of a step
# Env steps of the training for the reward: with the rest of it less than five minutes on two cores.
TRAIN_STEPS = {"Velocity": 800_000, "Safety": 200_000, "PointRobot": 300_000}


@dataclass(frozen=True)
class Behaviour:
    """A policy in a mixture.

    :param model: file of a saved agent; None acts at random
    :param share: of the steps
    """

    name: str
    model: Path | None
    share: float


def train_steps(env_id: str) -> int:
    """How long behaviours of an environment are trained for the reward by default."""
    return next((steps for word, steps in TRAIN_STEPS.items() if word in env_id), 300_000)


def make_behaviours(
    env_id: str, names: list[str], seed: int, steps: int, folder: Path, env_kwargs: Mapping[str, Any]
) -> list[Behaviour]:
    """The behaviours of a mixture, trained where they are not there yet.

    :param names: of :data:`BEHAVIOURS`, or paths of saved agents and run folders; none: all of them
    :param steps: of the training for the reward
    :param folder: where trained behaviours are kept
    :raises UsageError: for a name that is neither
    """
    if names:
        chosen = [_named(name, 1.0 / len(names)) for name in names]
    else:
        chosen = [Behaviour(name, None, share) for name, (_, share) in BEHAVIOURS.items()]
    place = folder / env_id.replace("/", "--") / f"seed-{seed}-{steps}"
    trained = {b.name: place / f"{b.name}.zip" for b in chosen if BEHAVIOURS.get(b.name, (None,))[0] is not None}
    if not all(path.is_file() for path in trained.values()):
        print(f"training behaviours of {env_id}, {steps:,} steps for the reward and then for safety", flush=True)
        _train(env_id, seed, steps, place, env_kwargs)
    return [Behaviour(b.name, trained.get(b.name, b.model), b.share) for b in chosen]


def _named(name: str, share: float) -> Behaviour:
    if name in BEHAVIOURS:
        return Behaviour(name, None, share)
    path = Path(name) / "model.zip" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UsageError(f"There is no behaviour '{name}', nor a saved agent there.{nearest(name, BEHAVIOURS)}")
    return Behaviour(name, path, share)


def _train(env_id: str, seed: int, steps: int, place: Path, env_kwargs: Mapping[str, Any]) -> None:
    """Train the lineage and save its snapshots, in their order."""
    from tether.agents import MDPO
    from tether.agents.common.threads import use_threads
    from tether.envs import make_vec

    from .presets import build_arguments, preset

    arguments = preset("MDPO", env_id)
    env: VecEnv = make_vec(env_id, arguments["n_envs"], backend="dummy", seed=seed, env_kwargs=env_kwargs)
    agent = MDPO("MlpPolicy", env, seed=seed, device="cpu", **build_arguments("MDPO", arguments))
    with use_threads(1):
        for name, (when, _) in BEHAVIOURS.items():
            if when is None:
                continue
            if when > 1.0 and agent.env is env:
                agent.set_env(penalised(env))
            agent.learn(int(steps * when) - agent.num_timesteps, reset_num_timesteps=False)
            agent.save(place / f"{name}.zip")
    env.close()


def penalised(env: VecEnv) -> VecEnv:
    """``env`` where a step that costs gives no reward, but :data:`PENALTY` times the mean absolute reward as punishment."""
    from stable_baselines3.common.vec_env import VecEnvWrapper

    class Penalised(VecEnvWrapper):
        total, count = 0.0, 0

        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            observations, rewards, dones, infos = self.venv.step_wait()
            self.total, self.count = self.total + float(np.abs(rewards).sum()), self.count + len(rewards)
            costs = np.array([info.get("cost", 0.0) for info in infos], np.float32)
            punishment = PENALTY * self.total / self.count * costs
            return observations, np.where(costs > 0.0, -punishment, rewards), dones, infos

    return Penalised(env)
