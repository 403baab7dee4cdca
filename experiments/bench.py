"""Speed of training, always beside a peer in the same process and in turns, because absolute times drift."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .manifest import hardware, versions, write_json
from .presets import build_arguments, preset

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

ROUNDS = 3


def on_policy(env_id: str, out: Path | None = None) -> str:
    """MDPO as its preset has it against SB3's PPO as its class defaults have it, in env steps per second.

    Both are warmed up, then train in turns, with one torch thread each: for networks of this size SB3's PPO is no faster
    with more, and on a busy machine far slower. What is compared is the ratio within a round; its median counts.

    :param out: also write the numbers there, as JSON
    :return: the comparison in sentences
    """
    import torch as th

    th.set_num_threads(1)
    ours, theirs = _mdpo(env_id), _sb3_ppo(env_id)
    rates = np.array([[_rate(ours, 16 * 2048), _rate(theirs, 2 * 2048)] for _ in range(ROUNDS)])
    ratios = rates[:, 0] / rates[:, 1]
    if out is not None:
        fields = ("MDPO", "SB3 PPO")
        numbers = {"env": env_id, **{f: rates[:, i].round(1).tolist() for i, f in enumerate(fields)}}
        write_json(out, {**numbers, "ratio": ratios.round(3).tolist(), "hardware": hardware(), "versions": versions()})
    median = np.median(rates, axis=0)
    return (
        f"{env_id}: MDPO {median[0]:,.0f} env steps/s, SB3's PPO with its defaults {median[1]:,.0f}; "
        f"ratio {np.median(ratios):.1f} (of {ROUNDS} rounds: {', '.join(f'{r:.1f}' for r in ratios)})"
    )


def _mdpo(env_id: str) -> BaseAlgorithm:
    from tether.agents import MDPO
    from tether.envs import make_vec

    arguments = preset("MDPO", env_id)
    env = make_vec(env_id, arguments["n_envs"], seed=0)
    return _warm(MDPO("MlpPolicy", env, seed=0, **build_arguments("MDPO", arguments)))


def _sb3_ppo(env_id: str) -> BaseAlgorithm:
    from stable_baselines3 import PPO

    from tether.envs import make_vec

    return _warm(PPO("MlpPolicy", make_vec(env_id, 1, backend="dummy", seed=0), seed=0, device="cpu"))


def _warm(model: Any) -> BaseAlgorithm:
    return model.learn(2048)


def _rate(model: BaseAlgorithm, steps: int) -> float:
    """Env steps per second over at least ``steps`` further steps of training."""
    before, begun = model.num_timesteps, time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    return (model.num_timesteps - before) / (time.perf_counter() - begun)
