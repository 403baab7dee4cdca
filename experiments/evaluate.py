"""Evaluation of a policy: returns, costs and lengths of whole episodes, with intervals; videos on request."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv


@dataclass(frozen=True)
class Evaluation:
    """Per-episode results, each of length ``episodes``; ``costs`` is None where the environment reports none."""

    returns: np.ndarray
    lengths: np.ndarray
    costs: np.ndarray | None

    @property
    def row(self) -> dict[str, Any]:
        """The columns of ``evaluations.csv`` without ``timesteps``."""
        return {
            "mean_reward": float(self.returns.mean()),
            "std_reward": float(self.returns.std()),
            "mean_cost": "" if self.costs is None else float(self.costs.mean()),
            "ep_length": float(self.lengths.mean()),
            "episodes": len(self.returns),
        }


class _Costs:
    """Sums ``info["cost"]`` per episode while SB3's ``evaluate_policy`` runs (it calls back once per env and step)."""

    def __init__(self) -> None:
        self.running: dict[int, float] = defaultdict(float)
        self.episodes: list[float] = []
        self.seen = False

    def __call__(self, local: dict[str, Any], _: dict[str, Any]) -> None:
        env, info = local["i"], local["info"]
        if "cost" in info:
            self.seen = True
            self.running[env] += float(info["cost"])
        if local["done"]:
            if local["episode_counts"][env] < local["episode_count_targets"][env]:
                self.episodes.append(self.running[env])
            self.running[env] = 0.0


def evaluate(model: BaseAlgorithm, env: VecEnv, episodes: int, deterministic: bool = True) -> Evaluation:
    """Run ``episodes`` whole episodes of ``model`` on ``env`` with SB3's ``evaluate_policy``, which spreads them evenly.

    :param env: vector environment with a ``VecMonitor``, so that returns are those of the raw reward
    """
    from stable_baselines3.common.evaluation import evaluate_policy

    costs = _Costs()
    returns, lengths = evaluate_policy(
        model, env, n_eval_episodes=episodes, deterministic=deterministic, return_episode_rewards=True, callback=costs
    )
    return Evaluation(np.array(returns), np.array(lengths), np.array(costs.episodes) if costs.seen else None)


def load_trained(source: Path, env_id: str | None, n_envs: int, seed: int, device: str = "auto") -> tuple[Any, VecEnv, str]:
    """A trained agent with an environment to run it in, from a run folder or a model file.

    :param source: a run's folder (its ``model.zip``, or ``best_model.zip`` named explicitly) or a saved model
    :param env_id: needed where no manifest beside the model names it
    :return: model, vector environment (normalised as in training), env id
    :raises UsageError: for a missing file or an env that is not known
    """
    from tether.envs import make_vec

    from .catalogue import agent_class
    from .checkpoints import restore_normalizer

    path = source / "model.zip" if source.is_dir() else source
    if not path.is_file():
        raise UsageError(f"There is no model at {path}: name a run's folder that holds model.zip, or a model's file.")
    manifest_path = path.with_name("manifest.json")
    if not manifest_path.is_file():
        raise UsageError(f"{manifest_path} is missing, so it is not known which agent {path.name} is: evaluate a run's folder.")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    config = manifest["config"]
    env_id = env_id or manifest["env"]
    env: VecEnv = make_vec(env_id, n_envs=n_envs, backend="dummy", seed=seed, env_kwargs=config.get("env_kwargs") or None)
    normalizer = path.with_name("vecnormalize.pkl")
    if normalizer.is_file():
        env = restore_normalizer(env, normalizer)
        env.training, env.norm_reward = False, False  # type: ignore[attr-defined]
    return agent_class(manifest["agent"]).load(path, device=device), env, env_id


def summary(result: Evaluation) -> str:
    """Mean, standard deviation, IQM and its 95 % bootstrap interval, in one line (two where there are costs)."""
    from .statistics import interval, iqm

    low, high = interval(result.returns, iqm)
    lines = [
        f"return over {len(result.returns)} episodes: mean {result.returns.mean():.1f} (std {result.returns.std():.1f}), "
        f"IQM {iqm(result.returns):.1f} [{low:.1f}, {high:.1f}], length {result.lengths.mean():.0f}"
    ]
    if result.costs is not None:
        low, high = interval(result.costs, iqm)
        lines.append(f"cost: mean {result.costs.mean():.2f}, IQM {iqm(result.costs):.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)


def record_video(model: BaseAlgorithm, env_id: str, env_kwargs: dict[str, Any], path: Path, wrap: Path | None, seed: int) -> int:
    """Film one episode as mp4.

    :param wrap: ``vecnormalize.pkl`` of the run, where there is one
    :return: number of frames
    :raises UsageError: if the environment cannot render
    """
    import imageio.v2 as imageio

    from tether.envs import make_vec

    from .checkpoints import restore_normalizer

    env: VecEnv = make_vec(
        env_id, n_envs=1, backend="dummy", seed=seed, env_kwargs={**env_kwargs, "render_mode": "rgb_array"}
    )
    fps = int((env.get_attr("metadata")[0] or {}).get("render_fps", 30))
    if wrap is not None and wrap.is_file():
        env = restore_normalizer(env, wrap)
        env.training, env.norm_reward = False, False  # type: ignore[attr-defined]
    observation, frames, done = env.reset(), 0, False
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".new-{path.name}")
    with imageio.get_writer(beside, format="FFMPEG", fps=fps, macro_block_size=1) as writer:  # type: ignore[arg-type]
        while not done:
            frame = env.render()
            if frame is None:
                raise UsageError(f"{env_id} does not render to pictures, so there is no video of it.")
            writer.append_data(np.asarray(frame))
            action, _ = model.predict(observation, deterministic=True)
            observation, _, dones, _ = env.step(action)
            done, frames = bool(dones[0]), frames + 1
    beside.replace(path)
    env.close()
    return frames
