"""Finishing an interrupted training in a process that has seen nothing of it."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from tests.kit.agents import SUBJECTS
from tether.envs import make_vec


class StopAt(BaseCallback):
    """Ends the training at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        return self.num_timesteps < self.step


def everything(agent: Any) -> dict[str, th.Tensor]:
    """All weights, buffers and optimiser states of an agent, as one flat dict."""
    return dict(_flat(agent.get_parameters(), ""))


def _flat(value: Any, name: str):
    if isinstance(value, th.Tensor):
        yield name, value.detach().clone().double()
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}")


def difference(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> float:
    """The largest absolute difference; infinite where the two have other names."""
    if set(first) != set(second):
        return float("inf")
    return max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel())


def finish(subject: str, env: dict[str, Any], total: int, folder: str, out: str) -> None:
    """Load the checkpoint in ``folder``, train up to ``total`` and write everything to ``out``."""
    cls = next(s.cls for s in SUBJECTS if s.name == subject)
    agent = cls.load_checkpoint(folder, make_vec(**env), device="cpu")
    agent.learn(total - agent.num_timesteps, reset_num_timesteps=False)
    th.save({"state": everything(agent), "timesteps": agent.num_timesteps}, out)


def finish_elsewhere(subject: str, env: dict[str, Any], total: int, folder: Path) -> dict[str, Any]:
    """:func:`finish` in a new process, forked from a server that has only imported things."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kit.resume"])
    out = folder / "finished.pt"
    process = context.Process(target=finish, args=(subject, env, total, str(folder), str(out)))
    process.start()
    process.join()
    assert process.exitcode == 0
    return th.load(out, weights_only=True)
