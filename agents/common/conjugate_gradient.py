"""Conjugate gradients for many symmetric positive systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch as th


def conjugate_gradient(
    product: Callable[[th.Tensor], th.Tensor], right: th.Tensor, iterations: int, tolerance: float = 1e-10
) -> th.Tensor:
    """x with A x = b after some iterations, for every system by itself.

    :param product: v (..., P) to A v
    :param right: b (..., P), one system for each index of the leading axes
    :param tolerance: of |b - A x|^2 / |b|^2, at which a system is left as it is
    :return: x (..., P)
    """
    x, residual, direction = th.zeros_like(right), right.clone(), right.clone()
    squared = residual.square().sum(-1, keepdim=True)
    enough = tolerance * squared
    for _ in range(iterations):
        image = product(direction)
        going = squared > enough
        step = th.where(going, squared / (direction * image).sum(-1, keepdim=True), 0.0)
        x, residual = th.addcmul(x, step, direction), th.addcmul(residual, step, image, value=-1.0)
        before, squared = squared, residual.square().sum(-1, keepdim=True)
        direction = th.addcmul(residual, th.where(going, squared / before, 0.0), direction)
    return x
