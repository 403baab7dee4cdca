"""Denoising diffusion with a few discrete steps: the variance-preserving schedule, noising, and the DDPM sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch as th
from torch import nn

BETA_MIN, BETA_MAX = 0.1, 10.0


class Diffusion(nn.Module):
    """T steps, k = 0 the least noisy; with n = k + 1

        alpha_k = exp( -b0 / T - (b1 - b0) (2 n - 1) / (2 T^2) ),   beta_k = 1 - alpha_k,   abar_k = prod_{j <= k} alpha_j.

    abar_{T-1} = exp(-(b0 + b1) / 2), whatever T is (the FISOR authors' code; Xiao et al. 2022, arXiv 2112.07804).

    :param steps: T
    """

    alpha: th.Tensor
    abar: th.Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        n = th.arange(1, steps + 1, dtype=th.float64)
        alpha = th.exp(-BETA_MIN / steps - (BETA_MAX - BETA_MIN) * (2.0 * n - 1.0) / (2.0 * steps**2))
        self.register_buffer("alpha", alpha.float(), persistent=False)
        self.register_buffer("abar", alpha.cumprod(0).float(), persistent=False)
        # Numbers of the sampler's steps, so that it reads nothing back from a GPU.
        self.coefficients = [
            (float(a), float((1.0 - a) / (1.0 - b).sqrt()), float((1.0 - a).sqrt()))
            for a, b in zip(alpha, alpha.cumprod(0), strict=True)
        ]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.coefficients)

    def noised(self, x: th.Tensor, k: th.Tensor, noise: th.Tensor) -> th.Tensor:
        """sqrt(abar_k) x + sqrt(1 - abar_k) eps.

        :param x: clean samples (..., d)
        :param k: indices (...,)
        :param noise: eps, standard normal, as ``x``
        """
        abar = self.abar[k].unsqueeze(-1)
        return abar.sqrt() * x + (1.0 - abar).sqrt() * noise

    def sample(self, eps: Callable[[th.Tensor, int], th.Tensor], start: th.Tensor) -> th.Tensor:
        """DDPM from noise to data in [-1, 1], at temperature 1. For k = T-1, ..., 0

            x <- (x - (1 - alpha_k) / sqrt(1 - abar_k) eps(x, k)) / sqrt(alpha_k),   x <- x + sqrt(beta_k) z where k > 0,

        and x is clipped to [-1, 1] after every step, noise included (authors' code). The variance is beta_k, not the
        posterior's.

        :param eps: the network: (x, k) -> predicted noise
        :param start: standard normal
        """
        x = start
        for k in reversed(range(self.steps)):
            alpha, weight, std = self.coefficients[k]
            x = (x - weight * eps(x, k)) * alpha**-0.5
            if k > 0:
                x = x + std * th.randn_like(x)
            x = x.clamp(-1.0, 1.0)
        return x
