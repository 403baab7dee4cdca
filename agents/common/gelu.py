"""gelu(x) = x (1 + tanh(c x (1 + a x^2) / 2)) / 2 = x sigmoid(c x (1 + a x^2)), its "tanh" form, by the sigmoid: on a CPU
torch's tanh takes several times as long. c = 2 sqrt(2 / pi), a = .044715."""

from __future__ import annotations

import math
from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

C, A = 2.0 * math.sqrt(2.0 / math.pi), 0.044715


def _quadratic(x: th.Tensor, factor: float) -> th.Tensor:
    """c (1 + factor x^2) in one pass over x."""
    return th.addcmul(x.new_full((), C), x, x, value=factor * C)


def gelu_and_slope(x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """gelu and gelu' = s + y c (1 + 3 a x^2) (1 - s), s the sigmoid and y gelu; elementwise, without gradients."""
    s = _quadratic(x, A).mul_(x).sigmoid_()
    y = x * s
    slope = _quadratic(x, 3.0 * A).mul_(y)
    return y, slope.addcmul_(slope, s, value=-1.0).add_(s)


class _GELU(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        y, ctx.slope = gelu_and_slope(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        return gradient * ctx.slope


def gelu(x: th.Tensor) -> th.Tensor:
    """Elementwise; torch's own kernel on a GPU. On a CPU a second derivative is refused."""
    if x.is_cuda:
        return F.gelu(x, approximate="tanh")
    if x.requires_grad and th.is_grad_enabled():
        return _GELU.apply(x)
    return _quadratic(x, A).mul_(x).sigmoid_().mul_(x)


class GELU(nn.Module):
    """:func:`gelu` as a layer."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return gelu(x)
