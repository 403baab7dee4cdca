"""A first rollout of an agent, outside `learn`."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.callbacks import CallbackList


def collected(agent: Any, steps: int) -> dict[str, Any]:
    """The batch of the agent's first rollout, with the scalars of its schedules where it has any."""
    agent._setup_learn(steps)
    callback = CallbackList([])
    callback.init_callback(agent)
    agent.collect_rollouts(agent.env, callback)
    schedules = agent.schedules() if hasattr(agent, "schedules") else {}
    return agent._rollout_batch() | {key: th.tensor(value) for key, value in schedules.items()}
