"""Expectile regression: values near the best or the worst of what the data shows, without asking for other actions."""

from __future__ import annotations

import torch as th


def expectile_loss(u: th.Tensor, tau: float) -> th.Tensor:
    """|tau - 1(u < 0)| u^2, elementwise: its minimiser over v of u = x - v is the tau-expectile of x."""
    return th.where(u > 0.0, tau, 1.0 - tau) * u.square()


def reversed_expectile_loss(u: th.Tensor, tau: float) -> th.Tensor:
    """|tau - 1(u > 0)| u^2, elementwise: the (1 - tau)-expectile, which nears the minimum as tau nears 1."""
    return th.where(u < 0.0, tau, 1.0 - tau) * u.square()
