"""Speed of OGSRL: kernel densities and labels of its guardian beside scikit-learn's, and iterations of the whole agent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import git_revision, hardware, versions, write_atomically, write_json
from .markdown import table

REFERENCES, DIMENSIONS = 20_000, 15
QUERIES = {"cpu": 8_192, "cuda": 2**20}
ITERATIONS = 200  # of OGSRL in a round
STATES, PUBLISHED = 13, 20_000  # of OGSRL's data; iterations of a published training


def guardian(out: Path | None = None, rounds: int = 5, command: str = "tether bench guardian", device: str = "auto") -> str:
    """Measure densities and labels a second, and OGSRL's iterations a second with the published 32 episodes of 20 steps.

    :param out: folder for ``guardian.md`` and ``guardian.json``
    :param rounds: each contestant runs once a round
    :param command: for the head of the table
    :param device: of ours, and of the world that OGSRL imagines in; the others run on the CPU
    :return: the table
    """
    import torch as th
    from stable_baselines3.common.utils import get_device

    place = get_device(device)
    racers = {**_queries(place), "OGSRL, iterations": _iterations(ITERATIONS, place)}
    rates: dict[str, list[float]] = {name: [] for name in racers}
    for _ in range(rounds):
        for name, (count, run) in racers.items():
            begun = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - begun))
    result = {
        "command": command, "hardware": hardware(), "versions": versions(), **git_revision(), "threads": th.get_num_threads(),
        "device": place.type, "per second": rates,
    }  # fmt: skip
    text = _markdown(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "guardian.json", result)
        write_atomically(out / "guardian.md", text)
    return text


def _points(count: int, seed: int) -> np.ndarray:
    """Of a mixture of eight lumps in the cube [-1, 1]^15, float32."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).uniform(-0.8, 0.8, (8, DIMENSIONS))
    return np.clip(centres[rng.integers(8, size=count)] + 0.2 * rng.normal(size=(count, DIMENSIONS)), -1, 1).astype(np.float32)


def _queries(device: Any) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name -> number of queries, and what answers them; every one is warmed up."""
    import torch as th

    from tether.agents.common.guardian import KernelGuardian

    count = QUERIES[device.type]
    references, queries = (th.from_numpy(_points(n, seed)).to(device) for n, seed in ((REFERENCES, 1), (count, 2)))
    ours = KernelGuardian.fit(references, 0.05, 0.535)
    u, v = (ours.scale.scaled(part).double().cpu().numpy() for part in (queries[:256], ours.scale.raw(ours.references)))

    def naive() -> np.ndarray:
        return np.array([np.exp(-((x - v) ** 2).sum(1) / (2 * 0.535**2)).mean() for x in u])

    racers: dict[str, tuple[int, Callable[[], Any]]] = {
        "Tether, exact densities": (count, lambda: ours.density(queries).sum().item()),  # which waits for a GPU
        "Tether, labels": (count, lambda: ours.outside(queries).sum().item()),
        "NumPy float64, row by row": (len(u), naive),
    }
    try:
        from sklearn.neighbors import KernelDensity
    except ImportError:
        return racers
    theirs = KernelDensity(bandwidth=0.535, rtol=1e-5).fit(v)
    return racers | {"scikit-learn KernelDensity, rtol 1e-5": (len(u), lambda: theirs.score_samples(u))}


def _iterations(count: int, device: Any) -> tuple[int, Callable[[], Any]]:
    """OGSRL on random data of as many rows as the references, episodes of eight steps."""
    from tether.agents import OGSRL

    pairs = _points(REFERENCES + 1, 3)
    rng, ends = np.random.default_rng(4), np.arange(REFERENCES) % 8 == 7
    data = {
        "observations": pairs[:-1, :STATES], "next_observations": pairs[1:, :STATES], "actions": pairs[:-1, STATES:],
        "rewards": rng.random(REFERENCES).astype(np.float32), "terminals": ends,
        "costs": (rng.random((REFERENCES, 2)) < 0.1).astype(np.float32),
    }  # fmt: skip
    agent = OGSRL(seed=0, device=device).learn_offline(data, 2)
    return count, lambda: agent.learn_offline(data, count, reset_num_timesteps=False)


def _markdown(result: dict[str, Any]) -> str:
    machine = result["hardware"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}, {result['threads']} torch threads"
    where += f"; ours on {result['device']}"
    exact = np.array(result["per second"]["Tether, exact densities"])
    body = []
    for name, rates in result["per second"].items():
        values = np.array(rates)
        ratio = "-" if "iterations" in name else f"{np.median(values / exact):.3g}"
        body.append([name, f"{np.median(values):.4g} [{values.min():.4g}, {values.max():.4g}]", ratio])
    hours = PUBLISHED / np.array(result["per second"]["OGSRL, iterations"]) / 3600.0
    return "\n".join([
        "# Speed of OGSRL and its guardian", "",
        f"`{result['command']}` on {where}; {len(exact)} rounds. Queries of {DIMENSIONS} columns against {REFERENCES:,} "
        "reference points, a second; medians over rounds, ranges in brackets. An iteration is 32 imagined episodes of at most "
        f"20 steps with two costs and the guardian; {ITERATIONS:,} of them a round, each round with its fit of guardian and "
        f"world. At that rate the published {PUBLISHED:,} take {np.median(hours):.2f} [{hours.min():.2f}, {hours.max():.2f}] "
        "hours.", "",
        *table(["what", "per second", "of our densities"], body),
    ]) + "\n"  # fmt: skip
