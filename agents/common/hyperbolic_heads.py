"""The heads of the hyperbolic agents: which layer and optimiser a geometry has, and a value head that gives a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from .embedding import Embedded
from .hyperbolic import (
    BallPointRegression,
    HyperboloidRegression,
    PoincareRegression,
    conformal_factor,
    poincare_exp,
)
from .networks import orthogonal
from .riemannian_adam import RiemannianAdam
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


def optimizer_for(
    geometry: str, poincare_head: str, curvature: float, default: type[th.optim.Optimizer], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a policy with an optimiser: ``default`` (an Adam), or Riemannian Adam where points lie in the ball.

    :param kwargs: the policy's own arguments, which win
    :raises ValueError: for another optimiser where points lie in the ball, which it would move out of it
    """
    if geometry == "poincare" and poincare_head == "points":
        default, ours = RiemannianAdam, {"eps": 1e-5, "curvature": curvature}
        if kwargs.get("optimizer_class", default) is not default:
            raise ValueError('poincare_head="points" needs Riemannian Adam: leave out optimizer_class.')
    else:
        ours = {"eps": 1e-5, "fused": True} if kwargs.get("optimizer_class", default) is default else {}
    given = kwargs.get("optimizer_kwargs") or {}
    return {"optimizer_class": default, **kwargs, "optimizer_kwargs": {**ours, **given}}


def embedding_arguments(
    given: dict[str, Any], curvature: float, net_arch: Sequence[int] | None, activation_fn: type[nn.Module]
) -> dict[str, Any]:
    """Arguments of an :class:`Embedding` from those that SB3's policies have for networks on vectors.

    :param given: what the user gave for the embedding itself, which wins
    :param net_arch: widths of the trunk; None leaves them to it
    :raises ValueError: for a net_arch with parts
    """
    if isinstance(net_arch, dict) or any(isinstance(width, dict) for width in net_arch or ()):
        raise ValueError("net_arch is a list of the trunk's widths, [64, 64]: actor and critic share it.")
    ours: dict[str, Any] = {} if net_arch is None else {"widths": tuple(net_arch)}
    if activation_fn is not nn.ReLU:
        ours["activation_fn"] = activation_fn
    return {"curvature": curvature, **given, "trunk_kwargs": {**ours, **(given.get("trunk_kwargs") or {})}}


@th.no_grad()
def describe(embedded: Embedded, geometry: str, poincare_head: str, curvature: float) -> dict[str, th.Tensor]:
    """Scalars for the log: |x_E|, the gate, and the conformal factor of the points in the ball."""
    x, gate = embedded
    norm = x.norm(dim=-1)
    info = {"embedding_norm": norm.mean(), "embedding_norm_max": norm.max()}
    if gate is not None:
        info |= {"gate": gate.mean(), "gate_std": gate.std(unbiased=False)}
    if geometry != "euclidean":
        # The isometry to the ball halves the hyperboloid's distance to the origin.
        v = x.double() if poincare_head == "hyperplanes" else x
        v = 0.5 * v if geometry == "hyperboloid" else v
        factor = conformal_factor(poincare_exp(v, curvature), curvature).to(x.dtype)
        info |= {"conformal_factor": factor.mean(), "conformal_factor_max": factor.max()}
    return info


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
