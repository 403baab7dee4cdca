"""Gaussian policies side by side, N(mu(s), diag exp(2 log_std)), and the geometry of their divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch as th
from torch import nn

from .batched import BatchedLinear, BatchedMLP, torch_default
from .divergences import kl_gaussian


class BatchedGaussian(nn.Module):
    """S policies with tanh networks for the mean, and standard deviations that do not depend on the state.

    :param seeds: S
    :param widths: of the hidden layers
    :param log_std: at first
    """

    def __init__(self, seeds: int, obs_dim: int, action_dim: int, widths: Sequence[int], log_std: float = -0.5) -> None:
        super().__init__()
        self.log_std = nn.Parameter(th.full((seeds, 1, action_dim), log_std))
        self.mean = BatchedMLP(seeds, obs_dim, widths, action_dim, nn.Tanh, torch_default)

    def forward(self, observations: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Means (S, B, d) at (S, B, o), and log standard deviations (S, 1, d)."""
        return self.mean(observations), self.log_std

    def log_prob(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """log pi(a | s), (S, B)."""
        mean, log_std = self(observations)
        return (-0.5 * ((actions - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(2)

    def kl_from(self, mean: th.Tensor, log_std: th.Tensor, observations: th.Tensor) -> th.Tensor:
        """KL(old || this) at each observation, (S, B), for the old policy's means and log standard deviations."""
        new_mean, new_log_std = self(observations)
        return kl_gaussian(mean, log_std, new_mean, new_log_std).sum(2)

    # ------------------------------------------------------------------ parameters as vectors

    def flat(self, tensors: Sequence[th.Tensor] | None = None) -> th.Tensor:
        """The parameters, or tensors like them with further axes in front, as (..., S, P)."""
        parameters = list(self.parameters())
        tensors = parameters if tensors is None else tensors
        return th.cat([t.flatten(t.ndim - p.ndim + 1) for t, p in zip(tensors, parameters, strict=True)], -1)

    def unflat(self, vector: th.Tensor) -> dict[str, th.Tensor]:
        """(..., S, P) as tensors by the names of the parameters."""
        named = dict(self.named_parameters())
        parts = zip(named.items(), vector.split([p[0].numel() for p in named.values()], -1), strict=True)
        return {name: part.reshape(*part.shape[:-1], *p.shape[1:]) for (name, p), part in parts}

    @th.no_grad()
    def assign(self, vector: th.Tensor) -> None:
        """Take (S, P) as the parameters."""
        for name, part in self.unflat(vector).items():
            self.get_parameter(name).copy_(part)

    # ------------------------------------------------------------------ geometry

    @th.no_grad()
    def fisher_product(self, observations: th.Tensor, weights: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
        """The function v -> F v, F the second derivative of sum_i w_i KL(old || new) at new = old.

        For the mean that is sum_i w_i J_i' diag(exp(-2 log_std)) J_i with J its Jacobian, for log_std it is 2 sum_i w_i.
        J v goes forward through the layers and J' u back, for all v at once, with the activations of one pass.

        :param observations: (S, B, o)
        :param weights: w (S, B)
        :return: takes and gives (R, S, P)
        """
        layers = [layer for layer in self.mean if isinstance(layer, BatchedLinear)]
        inputs, slopes = [observations], []
        for layer in layers[:-1]:
            inputs.append(layer(inputs[-1]).tanh())
            slopes.append(1.0 - inputs[-1].square())
        precision = th.exp(-2.0 * self.log_std) * weights.unsqueeze(2)
        of_log_std = 2.0 * weights.sum(1)[:, None, None]

        def product(vectors: th.Tensor) -> th.Tensor:
            log_std, *parts = self.unflat(vectors).values()
            tangent = th.zeros_like(inputs[0])
            for i, layer in enumerate(layers):
                tangent = tangent @ layer.weight + inputs[i] @ parts[2 * i] + parts[2 * i + 1]
                tangent = tangent * slopes[i] if i < len(slopes) else tangent * precision
            images: list[th.Tensor] = []
            for i in reversed(range(len(layers))):
                images[:0] = [inputs[i].mT @ tangent, tangent.sum(-2, keepdim=True)]
                tangent = (tangent @ layers[i].weight.mT) * slopes[i - 1] if i else tangent
            return self.flat([of_log_std * log_std, *images])

        return product
