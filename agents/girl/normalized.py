"""What a ``VecNormalize`` around the environment shows, of batches that the replay memory has as they were."""

from __future__ import annotations

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from .replay import Batch

Observations = dict[str, th.Tensor]


def normalized(batch: Batch, wrapper: VecNormalize | None) -> Batch:
    """A batch of the memory with the wrapper's observations and rewards; None is no wrapper."""
    if wrapper is None:
        return batch
    batch = batch | {"observations": scaled(batch["observations"], wrapper)}
    if wrapper.norm_reward:
        scale = float(np.sqrt(wrapper.ret_rms.var + wrapper.epsilon))
        batch["rewards"] = (batch["rewards"] / scale).clamp(-wrapper.clip_reward, wrapper.clip_reward)
    return batch


def scaled(observations: Observations, wrapper: VecNormalize | None, back: bool = False) -> Observations:
    """Observations (..., *part) by name as the wrapper shows them, or ``back`` from there (clipped ones stay)."""
    if wrapper is None or not wrapper.norm_obs:
        return observations
    moments = wrapper.obs_rms if isinstance(wrapper.obs_rms, dict) else {"observation": wrapper.obs_rms}
    changed = dict(observations)
    for name, of in moments.items():
        x, numbers = observations[name], (of.mean, np.sqrt(of.var + wrapper.epsilon))
        mean, scale = (th.as_tensor(np.asarray(n), dtype=th.float32, device=x.device).flatten() for n in numbers)
        changed[name] = x * scale + mean if back else ((x - mean) / scale).clamp(-wrapper.clip_obs, wrapper.clip_obs)
    return changed
