"""The trunks that agents put before their last layers: images or vectors in, flat features out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch as th
from torch import nn


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3 x 3; (B, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + self.second(self.first(x.relu()).relu())


class ImpalaCNN(nn.Sequential):
    """The residual network of IMPALA (Espeholt et al. 2018), torch's default initialisation.

    A stage is conv 3 x 3, max-pool 3 x 3 of stride 2 and two residual blocks; (B, C, H, W) to (B, features).

    :param channels_in: of the images
    :param channels: of the stages
    """

    def __init__(self, channels_in: int, channels: Sequence[int] = (16, 32, 32)) -> None:
        layers: list[nn.Module] = []
        for before, after in zip((channels_in, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            layers += [Residual(after), Residual(after)]
        super().__init__(*layers, nn.Flatten(), nn.ReLU())


class NatureCNN(nn.Sequential):
    """The convolutions of the DQN paper (Mnih et al. 2015), orthogonal with gain sqrt(2); (B, C, H, W) to (B, features).

    :param channels_in: of the images
    :param channels: of the layers
    """

    def __init__(self, channels_in: int, channels: Sequence[int] = (32, 64, 64)) -> None:
        layers: list[nn.Module] = []
        shapes = zip((channels_in, *channels), channels, (8, 4, 3), (4, 2, 1), strict=False)
        for before, after, kernel, stride in shapes:
            layers += [orthogonal(nn.Conv2d(before, after, kernel, stride)), nn.ReLU()]
        super().__init__(*layers, nn.Flatten())


class MLP(nn.Sequential):
    """Dense layers, orthogonal with gain sqrt(2); (B, n) to (B, widths[-1]).

    :param features: n
    :param widths: of the layers
    :param activation_fn: after each of them
    """

    def __init__(self, features: int, widths: Sequence[int] = (64, 64), activation_fn: type[nn.Module] = nn.ReLU) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip((features, *widths), widths, strict=False):
            layers += [orthogonal(nn.Linear(before, after)), activation_fn()]
        super().__init__(*layers)
        self.features = (features, *widths)[-1]


def orthogonal(layer: nn.Module, gain: float = np.sqrt(2.0)) -> nn.Module:
    """``layer`` with orthogonal weights and zero bias."""
    nn.init.orthogonal_(layer.weight, gain)  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
