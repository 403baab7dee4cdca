"""Policies that make offline data: at random, half trained, trained for the reward, trained to avoid costs.

The trained ones come from two runs of MDPO, one on the reward and one that is punished where it costs, with a snapshot on
the way of each. They are kept by environment, seed and length, and trained once.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError, nearest

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

# Name -> which training it comes from (None: none), the part of it, and its share of the steps of a mixture.
BEHAVIOURS: dict[str, tuple[str | None, float, float]] = {
    "random": (None, 0.0, 0.10),
    "novice": ("reward", 0.2, 0.15),
    "reward": ("reward", 1.0, 0.30),
    "cautious": ("safe", 0.4, 0.15),
    "safe": ("safe", 1.0, 0.30),
}
PENALTY = 3.0  # of a unit of cost, in mean absolute rewards of a step
# Env steps of each training: what two cores do in less than five minutes, and where safe and unsafe episodes differ.
TRAIN_STEPS = {"Bullet": 250_000, "PointRobot": 300_000, "Velocity": 800_000}


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
    """How long the behaviours of an environment are trained by default."""
    known = (steps for word, steps in TRAIN_STEPS.items() if word in env_id)
    return next(known, TRAIN_STEPS["Bullet"])


def make_behaviours(
    env_id: str, names: list[str], seed: int, steps: int, folder: Path, env_kwargs: Mapping[str, Any]
) -> list[Behaviour]:
    """The behaviours of a mixture, trained where they are not there yet.

    :param names: of :data:`BEHAVIOURS`, or paths of saved agents and run folders; none: all of them
    :param steps: of each training
    :param folder: where trained behaviours are kept
    :raises UsageError: for a name that is neither
    """
    if not names:
        chosen = [Behaviour(name, None, share) for name, (_, _, share) in BEHAVIOURS.items()]
    else:
        chosen = [_named(name, 1.0 / len(names)) for name in names]
    place = folder / env_id.replace("/", "--") / f"seed-{seed}-{steps}"
    trainings = {BEHAVIOURS[b.name][0] for b in chosen if b.model is None and b.name in BEHAVIOURS} - {None}
    missing = sorted(t for t in trainings if t and not all(path.is_file() for path in _snapshots(place, t)))
    if missing:
        print(f"training {' and '.join(missing)} behaviours of {env_id}, {steps:,} steps each", flush=True)
        with ProcessPoolExecutor(len(missing), mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(_train, training, env_id, seed, steps, place, dict(env_kwargs)) for training in missing]
            for job in jobs:
                job.result()
    return [Behaviour(b.name, b.model or _model_of(place, b.name), b.share) for b in chosen]


def _named(name: str, share: float) -> Behaviour:
    if name in BEHAVIOURS:
        return Behaviour(name, None, share)
    path = Path(name) / "model.zip" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UsageError(f"There is no behaviour '{name}', nor a saved agent there.{nearest(name, BEHAVIOURS)}")
    return Behaviour(name, path, share)


def _model_of(place: Path, name: str) -> Path | None:
    return None if BEHAVIOURS[name][0] is None else place / f"{name}.zip"


def _snapshots(place: Path, training: str) -> list[Path]:
    return [place / f"{name}.zip" for name, (of, _, _) in BEHAVIOURS.items() if of == training]


def _train(training: str, env_id: str, seed: int, steps: int, place: Path, env_kwargs: dict[str, Any]) -> None:
    """Train one policy and save its snapshots, the last one last."""
    import torch as th

    from tether.agents import MDPO
    from tether.envs import make_vec

    from .presets import build_arguments, preset

    th.set_num_threads(1)
    arguments = preset("MDPO", env_id)
    env: VecEnv = make_vec(env_id, arguments["n_envs"], backend="dummy", seed=seed, env_kwargs=env_kwargs)
    if training == "safe":
        env = penalised(env)
    agent = MDPO("MlpPolicy", env, seed=seed, device="cpu", **build_arguments("MDPO", arguments))
    for name, (of, part, _) in sorted(BEHAVIOURS.items(), key=lambda item: item[1][1]):
        if of == training:
            agent._total_timesteps = steps
            agent.learn(int(steps * part) - agent.num_timesteps, reset_num_timesteps=False)
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
