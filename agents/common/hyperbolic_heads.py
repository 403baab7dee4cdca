"""The heads of the hyperbolic agents: which layer a geometry has, and a value head that gives a value."""

from __future__ import annotations

import math

import torch as th
from torch import nn

from .hyperbolic import BallPointRegression, HyperboloidRegression, PoincareRegression
from .networks import orthogonal
from .value_distributions import CategoricalValue, ScalarValue

GEOMETRIES = ("hyperboloid", "poincare", "euclidean")
POINCARE_HEADS = ("hyperplanes", "points")


def check_geometry(geometry: str, poincare_head: str, curvature: float) -> None:
    """Refuse in a sentence what no head exists for.

    :raises ValueError: naming the argument
    """
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, not {geometry!r}.")
    if poincare_head not in POINCARE_HEADS:
        raise ValueError(f"poincare_head must be one of {', '.join(POINCARE_HEADS)}, not {poincare_head!r}.")
    if not 0.0 < curvature < math.inf:
        raise ValueError(f"curvature is c > 0 of a space of curvature -c, not {curvature}.")


def make_head(geometry: str, poincare_head: str, features: int, outputs: int, curvature: float) -> nn.Module:
    """The layer from x_E (B, features) to (B, outputs): linear, or a regression on exp_o(x_E)."""
    if geometry == "euclidean":
        return orthogonal(nn.Linear(features, outputs))
    if geometry == "hyperboloid":
        return HyperboloidRegression(features, outputs, curvature)
    if poincare_head == "points":
        return BallPointRegression(features, outputs, curvature)
    return PoincareRegression(features, outputs, curvature)


class ValueHead(nn.Module):
    """A head whose outputs stand for ``n`` values each; called, it gives the values.

    :param head: to (B, n * value.outputs)
    :param value: what the outputs of a value mean
    """

    def __init__(self, head: nn.Module, value: ScalarValue | CategoricalValue) -> None:
        super().__init__()
        self.head, self.value = head, value

    def outputs(self, x_e: th.Tensor) -> th.Tensor:
        """What the loss takes, (B, n, value.outputs)."""
        return self.head(x_e).unflatten(-1, (-1, self.value.outputs))

    def forward(self, x_e: th.Tensor) -> th.Tensor:
        """The values (B, n)."""
        return self.value.expectation(self.outputs(x_e))
