"""Three ways for a network to say a value: as one number, as a histogram with a smoothed target, as one with two hot bins.

Each is the loss of a network's outputs against scalar targets, and the value that the outputs stand for.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch as th
from torch import nn
from torch.nn import functional as F


class ScalarValue(nn.Module):
    """One output, which is the value; the mean squared error.

    :param weight: of the error
    """

    outputs = 1

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """weight * mean (v - t)^2; outputs (B, 1), targets (B,)."""
        return self.weight * (outputs.squeeze(-1) - targets).square().mean()

    def expectation(self, outputs: th.Tensor) -> th.Tensor:
        """The value, (..., 1) to (...)."""
        return outputs.squeeze(-1)


class CategoricalValue(nn.Module):
    """What the two histograms share: logits over ``n_bins`` values, cross-entropy, and the mean of the softmax.

    :param values: what each bin stands for (n_bins,), float64
    :param low: targets are clamped to [low, high]
    :param high: see ``low``
    """

    values: th.Tensor

    def __init__(self, values: th.Tensor, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)
        self.outputs, self.low, self.high = len(values), low, high

    @abstractmethod
    def probabilities(self, targets: th.Tensor) -> th.Tensor:
        """The histogram (..., n_bins) of scalar targets (...)."""

    def log_prob(self, outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """sum_i p_i(t) log softmax_i, (...); outputs (..., n_bins), targets (...).

        Of a two-hot target two bins would be enough, but torch.compile's (2.13) gradient of a gather here is wrong.
        """
        return (self.probabilities(targets) * F.log_softmax(outputs, dim=-1)).sum(-1)

    def loss(self, outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """mean( -sum_i p_i(t) log softmax_i ); outputs (B, n_bins), targets (B,)."""
        return -self.log_prob(outputs, targets).mean()

    def expectation(self, outputs: th.Tensor) -> th.Tensor:
        """sum_i softmax_i m_i, (..., n_bins) to (...)."""
        return F.softmax(outputs, dim=-1) @ self.values.to(outputs.dtype)


class HLGauss(CategoricalValue):
    """HL-Gauss (Imani and White 2018; Farebrother et al. 2024): the target is a Gaussian's mass in each bin.

    p_i = (F_{i+1} - F_i) / (F_n - F_0), F_i = erf((e_i - t) / (sqrt(2) sigma)), at n + 1 edges from low to high,
    sigma = ``smoothing`` bin widths. Its mean is t to 2e-6 for |t| <= 8.5 (51 bins on [-10, 10]), and 9.729 at t = 10.

    :param n_bins: number of bins; their centres are the values
    :param low: left edge of the first bin
    :param high: right edge of the last
    :param smoothing: sigma in units of the bins' width
    """

    edges: th.Tensor

    def __init__(self, n_bins: int = 51, low: float = -10.0, high: float = 10.0, smoothing: float = 0.75) -> None:
        edges = th.linspace(low, high, n_bins + 1, dtype=th.float64)
        super().__init__((edges[1:] + edges[:-1]) / 2.0, low, high)
        self.register_buffer("edges", edges, persistent=False)
        self.scale = math.sqrt(2.0) * smoothing * (high - low) / n_bins

    def probabilities(self, targets: th.Tensor) -> th.Tensor:
        t = targets.clamp(self.low, self.high).unsqueeze(-1)
        cumulative = ((self.edges.to(targets.dtype) - t) / self.scale).erf()
        return cumulative.diff(dim=-1) / (cumulative[..., -1:] - cumulative[..., :1])


class TwoHot(CategoricalValue):
    """Two-hot targets on C51's atoms (Bellemare et al. 2017): t is shared between its two neighbours in proportion.

    :param n_bins: number of atoms, the first at ``low``, the last at ``high``
    """

    def __init__(self, n_bins: int = 51, low: float = -10.0, high: float = 10.0) -> None:
        super().__init__(th.linspace(low, high, n_bins, dtype=th.float64), low, high)
        self.width = (high - low) / (n_bins - 1)

    def probabilities(self, targets: th.Tensor) -> th.Tensor:
        t = targets.clamp(self.low, self.high).unsqueeze(-1)
        return (1.0 - (t - self.values.to(targets.dtype)).abs() / self.width).clamp(min=0.0)


VALUE_LOSSES = ("hl_gauss", "two_hot", "mse")


def value_distribution(
    kind: str, n_bins: int, low: float, high: float, mse_weight: float = 1.0
) -> ScalarValue | CategoricalValue:
    """One of :data:`VALUE_LOSSES` by name.

    :param mse_weight: of the error of "mse"
    :raises ValueError: for another name, or bins that are none
    """
    if kind not in VALUE_LOSSES:
        raise ValueError(f"value_loss must be one of {', '.join(VALUE_LOSSES)}, not {kind!r}.")
    if n_bins < 2 or not low < high:
        raise ValueError(f"A histogram of values needs n_bins >= 2 and value_range=(low, high), not {n_bins}, {low}, {high}.")
    if kind == "mse":
        return ScalarValue(mse_weight)
    return (HLGauss if kind == "hl_gauss" else TwoHot)(n_bins, low, high)
