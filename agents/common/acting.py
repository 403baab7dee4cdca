"""Acting without torch: at a handful of observations a call of torch costs several times the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from .distributions import Categorical, Gaussian

OBSERVATION_CLIP = 10.0

# (raw observations (n, *obs), noise (n, *)) -> actions (n, *act)
Sampler = Callable[[Any, Any], np.ndarray]


def is_vector(space: spaces.Space[Any]) -> bool:
    """Whether observations are plain float vectors (images, dicts and discrete spaces are not)."""
    return isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"


def _relu(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0, out=out)


ACTIVATIONS: dict[type[nn.Module], Callable[..., np.ndarray]] = {nn.Tanh: np.tanh, nn.ReLU: _relu}


def dense_sampler(policy: ActorCriticPolicy) -> Sampler | None:
    """The policy as a function of numpy arrays, with its weights and moments of this moment.

    :return: None where it is not made of dense layers with tanh or ReLU on float vectors, with normal or categorical
        actions, on the CPU
    """
    modules = [*policy.mlp_extractor.policy_net, policy.action_net]
    dense = all(isinstance(module, nn.Linear) or type(module) in ACTIVATIONS for module in modules)
    known = type(policy.action_dist) in (Gaussian, Categorical) and policy.features_extractor_class is FlattenExtractor
    if not (dense and known and is_vector(policy.observation_space) and policy.device.type == "cpu"):
        return None
    layers = [_layer(module) for module in modules]
    standardize = _standardizer(policy)
    if isinstance(policy.action_dist, Categorical):
        return lambda observations, noise: (_through(layers, standardize(observations)) + noise).argmax(-1)
    std, shape = policy.log_std.detach().exp().numpy(), policy.action_space.shape or ()
    return lambda observations, noise: (_through(layers, standardize(observations)) + std * noise).reshape(-1, *shape)


def _layer(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    if not isinstance(module, nn.Linear):
        activation = ACTIVATIONS[type(module)]
        return lambda x: activation(x, out=x)
    weight, bias = module.weight.detach().numpy().T, module.bias.detach().numpy()

    def affine(x: np.ndarray) -> np.ndarray:
        y = x @ weight
        y += bias
        return y

    return affine


def _through(layers: list[Callable[[np.ndarray], np.ndarray]], x: np.ndarray) -> np.ndarray:
    for layer in layers:
        x = layer(x)
    return x


def _standardizer(policy: Any) -> Callable[[np.ndarray], np.ndarray]:
    """As :meth:`RunningMoments.standardizer`."""
    if policy.moments is None:
        return lambda observations: observations
    mean, scale = (x.numpy() for x in policy.moments.location_and_scale())
    return lambda observations: ((observations - mean) * scale).clip(-OBSERVATION_CLIP, OBSERVATION_CLIP)
