"""Speed of training on images: Hyper++'s update beside its baselines, and a whole iteration beside SB3's PPO.

All have the same encoder, rollout and minibatch. SB3's PPO runs our policy class, with linear heads: the same network in
SB3's own loops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bench import _timed
from .manifest import git_revision, hardware, versions, write_atomically, write_json
from .markdown import spread, table

ENV = "procgen/bigfish-easy-v0"
N_ENVS, BATCH = 64, 2048
TARGET = 25_000_000 / (15 * 60)  # env steps/s of ProcGen's 25 million in a quarter of an hour
H100_BF16 = 989e12  # FLOP/s, dense, of NVIDIA's data sheet for the H100 SXM


@dataclass
class _Racer:
    """A way of training on images, and what was measured of it."""

    name: str
    make: Callable[[Any], Any]
    model: Any = None
    update: list[float] = field(default_factory=list)  # seconds per minibatch
    iteration: list[float] = field(default_factory=list)  # env steps/s
    shares: list[dict[str, float]] = field(default_factory=list)  # microseconds per env step


def _racers(channels: tuple[int, ...], n_steps: int, device: str) -> list[_Racer]:
    import stable_baselines3 as sb3

    from tether.agents import HyperPPO
    from tether.agents.hyper_ppo import HyperCnnPolicy

    rollout: dict[str, Any] = {"n_steps": n_steps, "batch_size": BATCH, "seed": 0, "device": device}
    trunk = {"trunk_kwargs": {"channels": channels}}

    def ours(variant: str, n_epochs: int) -> Callable[[Any], Any]:
        arguments: dict[str, Any] = {**HyperPPO.VARIANTS[variant], "n_epochs": n_epochs, **rollout}
        return lambda env: HyperPPO("CnnPolicy", env, policy_kwargs={"features_extractor_kwargs": trunk}, **arguments)

    def peer(env: Any) -> Any:
        plain = {"regularization": "none", "scaling": "none", "activation": "relu", **trunk}
        policy: dict[str, Any] = {"geometry": "euclidean", "value_loss": "mse", "features_extractor_kwargs": plain}
        return sb3.PPO(HyperCnnPolicy, env, n_epochs=3, policy_kwargs=policy, **rollout)

    return [
        _Racer("Hyper++, 2 epochs as published", ours("hyper++", 2)),
        _Racer("Euclidean PPO, 3 epochs", ours("euclidean", 3)),
        _Racer("Hyper+S-RYM, 3 epochs", ours("s-rym", 3)),
        _Racer("SB3's PPO, same network, 3 epochs", peer),
    ]


def images(
    out: Path | None = None,
    rounds: int = 3,
    channels: tuple[int, ...] = (16, 32, 32),
    n_steps: int = 32,
    command: str = "tether bench images",
    device: str = "auto",
) -> str:
    """Measure the update of a minibatch and whole iterations, in turns.

    :param out: folder for ``images.md`` and ``images.json``
    :param rounds: each does one of both a round, after one to warm up
    :param channels: of the IMPALA encoder; the paper's by default
    :param n_steps: steps per environment in an iteration, 64 environments; the paper has 256
    :return: the table
    """
    from tether.envs import make_vec

    racers = _racers(channels, n_steps, device)
    for racer in racers:
        racer.model = racer.make(make_vec(ENV, N_ENVS, seed=0, halves="SB3" not in racer.name))
    for round_ in range(rounds + 1):
        for racer in racers:
            _iterate(racer, keep=round_ > 0)
            if hasattr(racer.model, "update"):
                _update(racer, keep=round_ > 0)
    for racer in racers:
        racer.model.get_env().close()
    result = {
        "command": command, "hardware": hardware(), "versions": versions(), **git_revision(), "env": ENV,
        "device": str(racers[0].model.device), "channels": list(channels), "n_steps": n_steps, "batch": BATCH,
        "flop per env step": _flop(racers[0].model),
        "racers": {r.name: {"update s": r.update, "env steps/s": r.iteration, "us per env step": r.shares} for r in racers},
    }  # fmt: skip
    text = _markdown(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "images.json", result)
        write_atomically(out / "images.md", text)
    return text


def _iterate(racer: _Racer, keep: bool) -> None:
    """One iteration: a rollout and its update."""
    model, clock = racer.model, dict.fromkeys(("env", "update"), 0.0)
    steps = model.n_steps * model.n_envs
    begun = time.perf_counter()
    with _timed(model, clock):
        model.learn(steps, reset_num_timesteps=model.num_timesteps == 0)
    spent = time.perf_counter() - begun
    clock["inference"] = spent - sum(clock.values())
    if keep:
        if not hasattr(model, "update"):  # SB3's `train` is nothing but its minibatches
            racer.update.append(clock["update"] * BATCH / (steps * model.n_epochs))
        racer.iteration.append(steps / spent)
        racer.shares.append({part: 1e6 * took / steps for part, took in clock.items()})


def _update(racer: _Racer, keep: bool) -> None:
    """One minibatch of the last rollout: loss, gradient, step."""
    import torch as th

    from tether.agents.common.memory import freed_memory_kept
    from tether.agents.common.updates import minibatches

    model = racer.model
    with freed_memory_kept():
        batch = model._rollout_batch() | {k: th.tensor(v, device=model.device) for k, v in model.schedules().items()}
        part = minibatches(batch, BATCH)[0]
        model.policy.set_training_mode(True)
        begun = _now(model)
        model.update.epoch(part)
        if keep:
            racer.update.append(_now(model) - begun)


def _now(model: Any) -> float:
    import torch as th

    if model.device.type == "cuda":
        th.cuda.synchronize()
    return time.perf_counter()


def _flop(model: Any) -> dict[str, float]:
    """Floating-point operations per env step that one pass over images takes, forward and with its gradient."""
    import torch as th
    from torch.utils.flop_counter import FlopCounterMode

    images_ = th.zeros((8, *model.observation_space.shape), dtype=th.uint8, device=model.device)
    with FlopCounterMode(display=False) as forward:
        loss = model.policy.values_at(images_).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    model.policy.optimizer.zero_grad()
    return {"forward": forward.get_total_flops() / 8, "backward": backward.get_total_flops() / 8}


def _markdown(result: dict[str, Any]) -> str:
    machine, racers = result["hardware"], result["racers"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; device {result['device']}"
    reference = np.array(racers["Euclidean PPO, 3 epochs"]["update s"])
    peer = np.array(racers["SB3's PPO, same network, 3 epochs"]["env steps/s"])
    rounds = len(peer)
    lines = [
        "# Training speed on images",
        "",
        f"`{result['command']}` on {where}; {rounds} rounds, medians, ranges in brackets; ratios are medians of the ratios",
        f"within a round. {result['env']}, {N_ENVS} environments x {result['n_steps']} steps, minibatches of",
        f"{result['batch']}, IMPALA encoder with {result['channels']} channels. *update*: loss, gradient and step of one",
        "minibatch; a whole iteration is a rollout and all its epochs, split into *env*, *inference* and *update* (with the",
        "evaluation of the rollout before and after it).",
        "",
    ]
    header = ["agent", "update, ms", "of Euclidean", "env steps/s", "env µs", "inference µs", "update µs", "of SB3"]
    body = []
    for name, row in racers.items():
        update, rate = 1e3 * np.array(row["update s"]), np.array(row["env steps/s"])
        shares = [np.median([share[part] for share in row["us per env step"]]) for part in ("env", "inference", "update")]
        cells = [name, spread(update), f"{np.median(update / (1e3 * reference)):.2f}", spread(rate)]
        body.append([*cells, *(f"{share:,.0f}" for share in shares), f"{np.median(rate / peer):.2f}"])
    lines += table(header, body)
    if result["device"] == "cpu":
        lines += ["", *_estimate(result)]
    return "\n".join(lines) + "\n"


def _estimate(result: dict[str, Any]) -> list[str]:
    """What the target on a GPU asks for: counted operations, nothing measured there."""
    forward, backward = (result["flop per env step"][kind] for kind in ("forward", "backward"))
    passes, epochs = 3, 2  # acting, the rollout's values, its divergence afterwards; Hyper++'s epochs
    total = passes * forward + epochs * (forward + backward)
    share = total * TARGET / H100_BF16
    env = np.median([s["env"] for s in result["racers"]["Hyper++, 2 epochs as published"]["us per env step"]])
    return [
        "**Estimate, not a measurement.** 25 million steps in 15 minutes are "
        f"{TARGET:,.0f} env steps/s. Hyper++ spends {total / 1e6:,.0f} MFLOP per env step (counted: {passes} forward passes "
        f"of {forward / 1e6:.0f} and {epochs} epochs of {(forward + backward) / 1e6:.0f}), so it needs "
        f"{total * TARGET / 1e12:.1f} TFLOP/s, {100 * share:.1f} % of an H100's bfloat16 peak ({H100_BF16 / 1e12:.0f}, data "
        f"sheet). Of the environments it asks {1e6 / TARGET:.0f} µs a step; here they take {env:.0f} µs beside everything "
        "else. What a GPU does with 64 pictures at a time is not known from this machine.",
    ]
