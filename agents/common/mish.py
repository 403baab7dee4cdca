"""mish(x) = x tanh(softplus(x)), with its derivative from the same exponential: torch's own is slow on a CPU."""

from __future__ import annotations

from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LARGE = 20.0  # above it tanh(softplus(x)) is 1 in float32


class _Mish(th.autograd.Function):
    """With e = exp(x) and n = e (e + 2): tanh(softplus(x)) = n / (n + 2) and mish' = n / (n + 2) + 4 x (n - e) / (n + 2)^2."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        e = x.clamp(max=LARGE).exp_()
        n = (e + 2.0).mul_(e)
        r = (n + 2.0).reciprocal_()
        t = n * r
        y = x * t
        ctx.slope = t.add_(n.sub_(e).mul_(r).mul_(r).mul_(x), alpha=4.0)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        return gradient * ctx.slope


def mish(x: th.Tensor) -> th.Tensor:
    """Elementwise; torch's own kernel on a GPU, and where no gradient is asked. On a CPU a second derivative is refused."""
    return _Mish.apply(x) if x.requires_grad and th.is_grad_enabled() and not x.is_cuda else F.mish(x)


class Mish(nn.Module):
    """:func:`mish` as a layer."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return mish(x)
