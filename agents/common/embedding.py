"""From observations to the Euclidean feature x_E, whose norm the regularised form of Hyper++ bounds (arXiv 2512.14202).

    u = W f + b,  y = u / sqrt(mean_i u_i^2 + eps),  q = phi(y) / sqrt(d),  g = sigmoid(w_g . q + b_g),
    x_E = g rho_max q,  rho_max = atanh(alpha) / sqrt(c)

|y| < sqrt(d) and |phi(y)| <= |y| give |q| < 1, for tanh even |q| <= tanh(1), whatever the trunk's f. So |x_E| is below
rho_max = 1.832 (alpha = 0.95, c = 1), below 1.396 for tanh, and gradients through the hyperbolic layers stay bounded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from .networks import MLP, ImpalaCNN, NatureCNN, orthogonal

EPSILON = 1.1920929e-07  # float32's, also in float64
TRUNKS = ("auto", "impala", "nature", "mlp")
REGULARIZATIONS = ("rms_norm", "spectral_norm", "none")
SCALINGS = ("learned", "constant", "none")
ACTIVATIONS = {"tanh": th.tanh, "relu": th.relu}


class Embedded(NamedTuple):
    """What an :class:`Embedding` makes of a batch: x_E (B, d), and the gate g (B, 1), None where there is none."""

    x: th.Tensor
    gate: th.Tensor | None


class Embedding(BaseFeaturesExtractor):
    """The features extractor of the hyperbolic agents: trunk, last linear layer, regularisation.

    :param observation_space: images as CHW, vectors, or a dict of such
    :param embedding_dim: d
    :param trunk: "impala" or "nature" for images, "mlp" for the rest; "auto" is the first or the last of them
    :param trunk_kwargs: arguments of the trunk (``channels``, ``widths``)
    :param regularization: "rms_norm" of the last layer, "spectral_norm" of every layer (Hyper+S-RYM), or "none"
    :param scaling: "learned" is g rho_max / sqrt(d), "constant" 1 / sqrt(d), "none" 1
    :param activation: phi, "tanh" or "relu"
    :param alpha: radius that the Poincare ball of curvature -1 is used up to, in (0, 1)
    :param curvature: c
    :param mixed_precision: on a GPU the trunk's convolutions run in bfloat16
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        embedding_dim: int = 32,
        trunk: str = "auto",
        trunk_kwargs: dict[str, Any] | None = None,
        regularization: str = "rms_norm",
        scaling: str = "learned",
        activation: str = "tanh",
        alpha: float = 0.95,
        curvature: float = 1.0,
        mixed_precision: bool = True,
    ) -> None:
        if not (0.0 < alpha < 1.0 and curvature > 0.0 and embedding_dim >= 1):
            raise ValueError(
                "An embedding needs 0 < alpha < 1, curvature > 0 and embedding_dim >= 1, "
                f"not {alpha}, {curvature} and {embedding_dim}."
            )
        super().__init__(observation_space, embedding_dim)
        choices = {"trunk": TRUNKS, "regularization": REGULARIZATIONS, "scaling": SCALINGS, "activation": tuple(ACTIVATIONS)}
        given = {"trunk": trunk, "regularization": regularization, "scaling": scaling, "activation": activation}
        for name, value in given.items():
            if value not in choices[name]:
                raise ValueError(f"{name} must be one of {', '.join(choices[name])}, not {value!r}.")
        self.images = is_image_space(observation_space)
        self.trunk, features = self._make_trunk(observation_space, trunk, trunk_kwargs or {})
        self.last = nn.Linear(features, embedding_dim)
        if not isinstance(self.trunk, ImpalaCNN):
            orthogonal(self.last)
        self.gate = nn.Linear(embedding_dim, 1) if scaling == "learned" else None
        self.regularization, self.scaling, self.activation = regularization, scaling, ACTIVATIONS[activation]
        self.mixed_precision = mixed_precision
        self.radius = math.atanh(alpha) / math.sqrt(curvature)
        # What no x_E exceeds: |q| <= 1 for ReLU and <= tanh(1) for tanh, times rho_max, and a float32's rounding; infinite
        # without normalisation.
        largest = math.tanh(1.0) if activation == "tanh" else 1.0
        largest *= {"learned": self.radius, "constant": 1.0, "none": math.sqrt(embedding_dim)}[scaling]
        self.bound = (1.0 + 1e-6) * largest if regularization == "rms_norm" else math.inf
        if regularization == "spectral_norm":
            for module in [m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
                spectral_norm(module)

    def _make_trunk(self, space: spaces.Space[Any], trunk: str, kwargs: dict[str, Any]) -> tuple[nn.Module, int]:
        """The trunk and the number of its features."""
        if self.images and trunk in ("auto", "impala", "nature"):
            if "widths" in kwargs or "activation_fn" in kwargs:
                raise ValueError(
                    "net_arch and activation_fn are for vectors: an image trunk's sizes are trunk_kwargs=dict(channels=...)."
                )
            cnn = (NatureCNN if trunk == "nature" else ImpalaCNN)(space.shape[0], **kwargs)  # type: ignore[index]
            with th.no_grad():
                return cnn, cnn(th.zeros(1, *space.shape)).shape[1]  # type: ignore[misc]
        if trunk not in ("auto", "mlp"):
            raise ValueError(f"The trunk '{trunk}' takes images, and {space} is none: use trunk='mlp'.")
        combined = CombinedExtractor(space) if isinstance(space, spaces.Dict) else None
        mlp = MLP(get_flattened_obs_dim(space) if combined is None else combined.features_dim, **kwargs)
        return mlp if combined is None else nn.Sequential(combined, mlp), mlp.features

    def embed(self, observations: Any) -> Embedded:
        """x_E and the gate; observations (B, *obs), images with values from 0 to 255."""
        u = self.last(self._features(observations))
        d = u.shape[-1]
        if self.regularization == "rms_norm":
            u = nn.functional.rms_norm(u, (d,), eps=EPSILON)
        t = self.activation(u)
        if self.scaling == "none":
            return Embedded(t, None)
        q = t / math.sqrt(d)
        if self.gate is None:
            return Embedded(q, None)
        gate = self.gate(q).sigmoid()
        return Embedded(gate * self.radius * q, gate)

    def _features(self, observations: Any) -> th.Tensor:
        """What the trunk gives, in the type of the last layer."""
        if not self.images:
            return self.trunk(observations)
        # From bytes to [-1/2, 1/2] on the device; the channels last, as convolutions like it.
        x = observations.contiguous(memory_format=th.channels_last).to(self.last.weight.dtype) / 255.0 - 0.5
        with th.autocast("cuda", th.bfloat16, enabled=self.mixed_precision and x.is_cuda, cache_enabled=False):
            return self.trunk(x).to(x.dtype)

    def forward(self, observations: Any) -> th.Tensor:
        """x_E (B, d)."""
        return self.embed(observations).x
