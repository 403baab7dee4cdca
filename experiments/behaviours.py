"""Policies that make offline data: at random, half trained, trained for the reward, and trained to avoid costs.

The trained ones are snapshots of MDPO: a novice, from which one branch goes on for the reward, and one where a step that
costs is punished, so that they differ in what they dare and less in how they move. They are kept by environment, seed and
length of training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError, nearest
from .presets import build_arguments, preset

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

# Name -> the branch it comes from (None: not trained), when it is taken, as a part of the training, and its share of the
# steps of a mixture. Both branches begin at the novice.
BEHAVIOURS: dict[str, tuple[str | None, float, float]] = {
    "random": (None, 0.0, 0.01),  # little, because it fills the states where episodes begin, and clones then never leave them
    "novice": ("start", 0.25, 0.14),
    "reward": ("reward", 1.0, 0.35),
    "cautious": ("safe", 0.6, 0.15),
    "safe": ("safe", 1.0, 0.35),
}
SCRIPTED = {"random": 0.1, "reward": 0.55, "safe": 0.35}  # shares, where the suite brings controllers
NOISE = 0.3  # standard deviation, added to a controller's actions where they are sampled
PENALTY = 5.0  # of a unit of cost, in mean absolute rewards of a step
# Env steps of a branch and what comes before it: less than five minutes on two cores, which each take one.
TRAIN_STEPS = {"Velocity": 800_000, "SafetyCar": 200_000, "Safety": 250_000}


@dataclass(frozen=True)
class Behaviour:
    """A policy in a mixture.

    :param model: file of a saved agent; None: it acts by ``controller`` or ``clinician``, or at random without either
    :param share: of the steps
    :param clinician: see ``tether.envs.clinician_of``
    """

    name: str
    model: Path | None
    share: float
    controller: Callable[[np.ndarray], np.ndarray] | None = None
    clinician: Callable[[int, int], Callable[[np.ndarray, np.ndarray], np.ndarray]] | None = None


def train_steps(env_id: str) -> int:
    """How long the behaviours of an environment are trained by default."""
    return next((steps for word, steps in TRAIN_STEPS.items() if word in env_id), 300_000)


def make_behaviours(
    env_id: str, names: list[str], seed: int, steps: int, folder: Path, env_kwargs: Mapping[str, Any]
) -> list[Behaviour]:
    """The behaviours of a mixture, trained where they are not there yet.

    :param names: of :data:`BEHAVIOURS`, or paths of saved agents and run folders; none: all of them
    :param steps: of the training
    :param folder: where trained behaviours are kept
    :raises UsageError: for a name that is neither
    """
    from tether.envs import clinician_of, scripted_behaviours

    clinician = clinician_of(env_id)
    if clinician is not None and set(names) <= {"clinician", "random"}:
        treated = names or ["clinician"]
        return [
            Behaviour(name, None, 1.0 / len(treated), clinician=clinician if name == "clinician" else None) for name in treated
        ]
    scripted = scripted_behaviours(env_id)
    if scripted and not set(names) - set(SCRIPTED):
        return [Behaviour(name, None, SCRIPTED[name], scripted.get(name)) for name in names or SCRIPTED]
    if names:
        chosen = [_named(name, 1.0 / len(names)) for name in names]
    else:
        chosen = [Behaviour(name, None, share) for name, (_, _, share) in BEHAVIOURS.items()]
    place = folder / env_id.replace("/", "--") / f"seed-{seed}-{steps}-{recipe(env_id, env_kwargs)}"
    trained = {b.name: place / f"{b.name}.zip" for b in chosen if b.name in BEHAVIOURS and BEHAVIOURS[b.name][0]}
    if not all(path.is_file() for path in trained.values()):
        print(f"training behaviours of {env_id}, {steps:,} steps for the reward and as many for safety", flush=True)
        needed = {BEHAVIOURS[name][0] for name in trained}
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            pool.submit(_train, "start", env_id, seed, steps, place, dict(env_kwargs)).result()
            of = [b for b in ("reward", "safe") if b in needed]
            for branch in [pool.submit(_train, b, env_id, seed, steps, place, dict(env_kwargs)) for b in of]:
                branch.result()
    return [Behaviour(b.name, trained.get(b.name, b.model), b.share) for b in chosen]


def recipe(env_id: str, env_kwargs: Mapping[str, Any]) -> str:
    """A short checksum of all else that the behaviours of an environment follow from."""
    branches = {name: (branch, part) for name, (branch, part, _) in BEHAVIOURS.items()}
    from tether.envs import cautious_arguments

    content = [branches, PENALTY, preset("MDPO", env_id), dict(env_kwargs), dict(cautious_arguments(env_id))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _named(name: str, share: float) -> Behaviour:
    if name in BEHAVIOURS:
        return Behaviour(name, None, share)
    path = Path(name) / "model.zip" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UsageError(f"There is no behaviour '{name}', nor a saved agent there.{nearest(name, BEHAVIOURS)}")
    return Behaviour(name, path, share)


def _train(branch: str, env_id: str, seed: int, steps: int, place: Path, env_kwargs: dict[str, Any]) -> None:
    """Train one branch and save its snapshots, in their order."""
    import torch as th

    from tether.agents import MDPO
    from tether.envs import cautious_arguments, make_vec

    th.set_num_threads(1)
    arguments = preset("MDPO", env_id)
    kwargs = {**(cautious_arguments(env_id) if branch == "safe" else {}), **env_kwargs}
    env: VecEnv = make_vec(env_id, arguments["n_envs"], backend="dummy", seed=seed, env_kwargs=kwargs)
    env = penalised(env) if branch == "safe" else env
    if branch == "start":
        agent = MDPO("MlpPolicy", env, seed=seed, device="cpu", **build_arguments("MDPO", arguments))
    else:
        agent = MDPO.load(place / "novice.zip", env, device="cpu")
        agent.reseed(seed + 1)
    for name, (of, part, _) in BEHAVIOURS.items():
        if of == branch:
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
