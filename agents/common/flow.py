"""Flows between noise at time 0 and data at time 1: the network of a velocity, flow matching, and Euler's method.

All samples are flat chunks of actions, (S, B, A) with the seed as first axis; times are (S, B, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from .batched import BatchedLinear, BatchedMLP, xavier_uniform
from .gelu import GELU, gelu_and_slope

FREQUENCIES = 32  # of each time's features
Velocity = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]  # of observations, samples and times


class FlowNetwork(nn.Module):
    """A function of a state, a sample and some times, S of them side by side: GELU, Glorot's initialisation, no norm.

    With one time it is a velocity v(x, t, s), with two a flow map's u(x, r, t, s), with none FQL's one-step actor.

    :param seeds: S
    :param obs_dim: o
    :param sample_dim: A
    :param widths: hidden units
    :param times: how many times it reads
    :param fourier: read a time t as cos(f_i t), sin(f_i t) with f_i = 10000^(-i / 31), i = 0, ..., 31, and not as a number
    """

    frequencies: th.Tensor

    def __init__(
        self, seeds: int, obs_dim: int, sample_dim: int, widths: Sequence[int], times: int, fourier: bool = False
    ) -> None:
        super().__init__()
        self.fourier = fourier
        features = times * (2 * FREQUENCIES if fourier else 1)
        self.layers = BatchedMLP(seeds, obs_dim + sample_dim + features, widths, sample_dim, GELU, xavier_uniform)
        exponents = th.arange(FREQUENCIES, dtype=th.float32) / (FREQUENCIES - 1)
        self.register_buffer("frequencies", (-math.log(1e4) * exponents).exp(), persistent=False)
        self._features: dict[Any, th.Tensor] = {}  # of times that all samples share

    def forward(self, observations: th.Tensor, x: th.Tensor, *times: th.Tensor) -> th.Tensor:
        """(S, B, o), (S, B, A) and (S, B, 1) each to (S, B, A)."""
        return self.layers(th.cat([observations, x, *map(self.embedded, times)], dim=-1))

    def at(self, observations: th.Tensor, x: th.Tensor, *times: float) -> th.Tensor:
        """The same at times that all samples share, whose features are made once and kept."""
        key = (*times, x.device)
        if key not in self._features:
            with th.inference_mode(False):
                features = [self.embedded(th.full((1, 1, 1), time, device=x.device)) for time in times]
                self._features[key] = th.cat(features, dim=-1)
        return self.layers(th.cat([observations, x, self._features[key].expand(*x.shape[:2], -1)], dim=-1))

    def embedded(self, time: th.Tensor) -> th.Tensor:
        """What the network reads of a time."""
        if not self.fourier:
            return time
        phase = self.frequencies * time
        return th.cat([phase.cos(), phase.sin()], dim=-1)

    def with_tangent(
        self, observations: th.Tensor, x: th.Tensor, times: Sequence[th.Tensor], dx: th.Tensor, dtimes: Sequence[th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        """The value, and its derivative along the direction (dx, dtimes) as a constant.

        The same as ``torch.func.jvp`` and a detach. The direction may have fewer rows than the samples: it is then that of
        the last rows, and so is the derivative.

        :return: (S, B, A), and (S, b, A) for b rows of ``dx``
        """
        first = x.shape[1] - dx.shape[1]
        with th.no_grad():
            tangents = [self._embedded_tangent(t[:, first:], dt) for t, dt in zip(times, dtimes, strict=True)]
            tangent = th.cat([th.zeros_like(observations[:, first:]), dx, *tangents], dim=-1)
        value = th.cat([observations, x, *map(self.embedded, times)], dim=-1)
        for layer in self.layers:
            before, value = value, layer(value)
            with th.no_grad():
                if isinstance(layer, GELU):
                    tangent = tangent * gelu_and_slope(before[:, first:])[1]
                elif isinstance(layer, BatchedLinear):
                    tangent = tangent @ layer.weight
        return value, tangent

    def smooth(self, observations: th.Tensor, x: th.Tensor, *times: th.Tensor) -> th.Tensor:
        """As a call, by operations of which torch has all derivatives."""
        value = th.cat([observations, x, *map(self.embedded, times)], dim=-1)
        for layer in self.layers:
            value = F.gelu(value, approximate="tanh") if isinstance(layer, GELU) else layer(value)
        return value

    def _embedded_tangent(self, time: th.Tensor, dtime: th.Tensor) -> th.Tensor:
        if not self.fourier:
            return dtime
        phase, rate = self.frequencies * time, self.frequencies * dtime
        return th.cat([-phase.sin() * rate, phase.cos() * rate], dim=-1)


def interpolated(noise: th.Tensor, data: th.Tensor, time: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """a_t = (1 - t) a_0 + t a_1 and its velocity a_1 - a_0, (S, B, A) each."""
    velocity = data - noise
    return noise + time * velocity, velocity


def masked_mean(squares: th.Tensor, valid: th.Tensor) -> th.Tensor:
    """The mean over rows and entries, those of actions after an episode's end counting as 0; (S,).

    :param squares: (S, B, H d)
    :param valid: (S, B, H)
    """
    seeds, size, horizon = valid.shape
    return (squares.view(seeds, size, horizon, -1) * valid.unsqueeze(-1)).mean((1, 2, 3))


def flow_matching_loss(velocity: Velocity, observations: th.Tensor, actions: th.Tensor, valid: th.Tensor) -> th.Tensor:
    """E || v(a_t, t, s) - (a_1 - a_0) ||^2 with t uniform and a_0 normal, as :func:`masked_mean`; (S,).

    :param actions: a_1, (S, B, A)
    """
    noise, time = th.randn_like(actions), uniform_times(actions)
    x, target = interpolated(noise, actions, time)
    return masked_mean((velocity(observations, x, time) - target).square(), valid)


def euler_flow(velocity: FlowNetwork, observations: th.Tensor, noise: th.Tensor, steps: int) -> th.Tensor:
    """x <- x + v(x, i / n, s) / n for i = 0, ..., n - 1, from a_0 at time 0 to a_1, clipped to [-1, 1]."""
    x = noise
    for i in range(steps):
        x = x.add(velocity.at(observations, x, i / steps), alpha=1.0 / steps)
    return x.clamp(-1.0, 1.0)


def uniform_times(samples: th.Tensor) -> th.Tensor:
    """Times in [0, 1), (S, B, 1) for samples (S, B, A)."""
    return th.rand(*samples.shape[:2], 1, device=samples.device)
