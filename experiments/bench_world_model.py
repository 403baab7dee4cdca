"""Updates a second of the world-model agents: the DreamerV3 arm, what each part of GIRL costs, and what makes both fast."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .manifest import git_revision, hardware, versions, write_atomically, write_json
from .markdown import table

ENV = "dm_control/cartpole-swingup-v0"
COLLECTED = 1500  # random steps in the replay memory
SIZES: dict[str, dict[str, Any]] = {
    "small": {"policy_kwargs": {"size": "small"}, "batch_size": 8, "batch_length": 32},
    "default": {"batch_size": 16, "batch_length": 64},
}
ARM = {"grounding": None, "trust_region": False, "ensemble_members": 0}
BASE, WHOLE = "DreamerV3 arm", "GIRL"
CONTESTANTS: dict[str, dict[str, Any]] = {
    BASE: ARM,
    "+ trust region": {**ARM, "trust_region": True},
    "+ ensemble": {**ARM, "ensemble_members": 5},
    "+ ensemble, every 4th update": {**ARM, "ensemble_members": 5, "ensemble_interval": 4},
    "+ grounding": {**ARM, "grounding": "masked-autoencoder"},
    WHOLE: {},
    "GIRL, ensemble every 4th update": {"ensemble_interval": 4},
    "DreamerV3 arm, other precision": {**ARM, "precision": "other"},
    "DreamerV3 arm, not captured": {**ARM, "captured": False},
    "DreamerV3 arm, compiled": {**ARM, "compile_loss": True},
    "DreamerV3 arm, compiled, other precision": {**ARM, "compile_loss": True, "precision": "other"},
    "GIRL, compiled, other precision, ensemble every 4th update": {
        "compile_loss": True, "precision": "other", "ensemble_interval": 4,
    },
}  # fmt: skip


def world_model(
    out: Path | None = None,
    only: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 3.0,
    command: str = "tether bench world-model",
    device: str = "auto",
    size: str = "default",
) -> str:
    """Measure updates a second; each contestant runs once a round.

    :param out: folder for ``world-model-<size>.md`` and ``.json``
    :param only: names of contestants; None: all that the device knows (compiled ones on a CPU, "not captured" on a GPU)
    :param seconds: of each contestant in a round, about
    :param device: of the agents
    :param size: "small" (sequences 8 x 32) or "default" (16 x 64)
    :return: the table
    """
    import torch as th
    from stable_baselines3.common.utils import get_device

    place = get_device(device)
    unknown = set(only or ()) - set(CONTESTANTS)
    if unknown:
        raise UsageError(f"There is no contestant '{min(unknown)}': use some of {', '.join(CONTESTANTS)}.")
    names = only or [name for name in CONTESTANTS if ("compiled" in name) <= (place.type == "cpu")]
    names = [name for name in names if place.type == "cuda" or "not captured" not in name]
    agents = {name: _agent(CONTESTANTS[name], size, place) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, (agent, speed) in agents.items():
            rates[name].append(_measure(agent, max(2, round(seconds * speed))))
    result = {
        "command": command, "hardware": hardware(), "versions": versions(), **git_revision(), "threads": th.get_num_threads(),
        "device": place.type, "size": size, "updates per second": rates,
    }  # fmt: skip
    text = _markdown(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"world-model-{size}.json", result)
        write_atomically(out / f"world-model-{size}.md", text)
    return text


def _agent(arguments: dict[str, Any], size: str, device: Any) -> tuple[Any, float]:
    """An agent that has warmed up, and about how many updates a second it makes."""
    from tether.agents import GIRL
    from tether.envs import make_vec

    arguments = {**SIZES[size], **arguments}
    captured = arguments.pop("captured", True)
    if arguments.get("precision") == "other":
        arguments["precision"] = "float32" if device.type == "cuda" else "bfloat16"
    env = make_vec(ENV, seed=0, env_kwargs={"action_repeat": 2})
    agent = GIRL(
        "MlpPolicy", env, seed=0, device=device, learning_starts=COLLECTED, buffer_size=2 * COLLECTED, encoder_updates=10,
        warmup_steps=0, **arguments,
    )  # fmt: skip
    agent.captures = captured
    agent.learn(COLLECTED)
    agent.improve(12)
    return agent, _measure(agent, 4)


def _measure(agent: Any, updates: int) -> float:
    """Updates a second."""
    import torch as th

    with agent._torch_threads(agent.batch_size):
        begun = time.perf_counter()
        agent.improve(updates)
        if agent.device.type == "cuda":
            th.cuda.synchronize()
        return updates / (time.perf_counter() - begun)


def _markdown(result: dict[str, Any]) -> str:
    machine, rates = result["hardware"], {k: np.array(v) for k, v in result["updates per second"].items()}
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}, {result['threads']} torch threads"
    shape = SIZES[result["size"]]
    reference = rates.get(BASE)
    body = []
    for name, values in rates.items():
        times = None if reference is None else reference / values  # of an update, against the arm's
        cost = "-" if times is None or name == BASE else f"{np.median(times):.2f} [{times.min():.2f}, {times.max():.2f}]"
        body.append([name, f"{np.median(values):.3g} [{values.min():.3g}, {values.max():.3g}]", cost])
    other = "float32" if result["device"] == "cuda" else "bfloat16"
    how = "bfloat16, every update one CUDA graph" if result["device"] == "cuda" else "float32, not compiled"
    return "\n".join([
        f"# Speed of the world models, size {result['size']}", "",
        f"`{result['command']}` on {where}; on {result['device']}. Sequences {shape['batch_size']} x {shape['batch_length']} "
        f"of cartpole's states, horizon 15; {how} where nothing else is said, other precision is {other}. Medians over "
        f"{len(next(iter(rates.values())))} rounds, ranges in brackets. An update is the world model's, the actor's and the "
        "critic's; the masked autoencoder's embeddings lie in the replay memory.", "",
        *table(["what", "updates per second", "time of an update / the arm's"], body),
    ]) + "\n"  # fmt: skip
