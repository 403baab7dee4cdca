"""DreamerV3's networks: dense layers with layer norm, encoders and decoders of pictures and vectors, heads.

Sizes, initialisation and epsilons are those of NM512/dreamerv3-torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from torch import nn
from torch.nn import functional as F

from ..common.batched import LECUN_STD
from ..common.value_distributions import TwoHot

EPSILON = 1e-3  # of every layer norm

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def symlog(x: th.Tensor) -> th.Tensor:
    """sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: th.Tensor) -> th.Tensor:
    """The inverse of :func:`symlog`."""
    return x.sign() * x.abs().expm1()


def _fans(layer: nn.Module) -> float:
    """Mean of inputs and outputs of a layer."""
    if isinstance(layer, nn.Linear):
        return (layer.in_features + layer.out_features) / 2.0
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    return math.prod(layer.kernel_size) * (layer.in_channels + layer.out_channels) / 2.0


def normal(layer: Layer) -> Layer:
    """Weights of variance 1 / mean(in, out), cut at two standard deviations; zero bias."""
    std = math.sqrt(1.0 / _fans(layer)) / LECUN_STD
    nn.init.trunc_normal_(layer.weight, std=std, a=-2.0 * std, b=2.0 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def uniform(layer: Layer, scale: float = 1.0) -> Layer:
    """Weights uniform with variance ``scale`` / mean(in, out); zero bias."""
    limit = math.sqrt(3.0 * scale / _fans(layer))
    nn.init.uniform_(layer.weight, -limit, limit)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Dense(nn.Module):
    """Linear without bias, layer norm, SiLU; (..., in) to (..., out).

    Where the input is of two halves of which one is there early, its part of the product can be made early.
    """

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.linear, self.norm = normal(nn.Linear(features, units, bias=False)), nn.LayerNorm(units, eps=EPSILON)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.silu(self.norm(self.linear(x)))

    def early(self, x: th.Tensor) -> th.Tensor:
        """The part of the product that belongs to the last inputs (..., n)."""
        return F.linear(x, self.linear.weight[:, -x.shape[-1] :])

    def late(self, x: th.Tensor, early: th.Tensor) -> th.Tensor:
        """The layer, from its first inputs (B, m) and the part of the others (B, out)."""
        return F.silu(self.norm(th.addmm(early, x, self.linear.weight[:, : x.shape[-1]].t())))


class MLP(nn.Sequential):
    """``layers`` of :class:`Dense` and, where ``outputs`` is given, a linear layer behind them.

    :param scale: of the last layer's initial weights; 0 makes all outputs 0
    """

    def __init__(self, features: int, layers: int, units: int, outputs: int | None = None, scale: float = 1.0) -> None:
        widths = [features, *[units] * layers]
        dense: list[nn.Module] = [Dense(a, b) for a, b in pairwise(widths)]
        self.features = outputs or units
        super().__init__(*dense, *([] if outputs is None else [uniform(nn.Linear(widths[-1], outputs), scale)]))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a picture (B, C, H, W)."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def is_picture(space: spaces.Space) -> TypeGuard[spaces.Box]:
    """Whether a part of the observation goes through convolutions: uint8 with three axes, channels first."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == "uint8"


def parts_of(space: spaces.Space) -> dict[str, spaces.Box]:
    """The parts of an observation by name, as the world model sees them: vectors of floats, and pictures of uint8 with the
    channels first. A space that is no Dict has the name "observation"; a Discrete is seen as one-hot vectors, tables flat.

    :raises ValueError: for parts that are none of these, or pictures of several sizes
    """
    parts: dict[str, spaces.Box] = {}
    for name, part in (space.spaces if isinstance(space, spaces.Dict) else {"observation": space}).items():
        if isinstance(part, spaces.Discrete):
            part = spaces.Box(0.0, 1.0, (int(part.n),), np.float32)
        if isinstance(part, spaces.Box) and _is_table(part):
            part = spaces.Box(part.low.ravel(), part.high.ravel(), dtype=np.float32)
        if is_picture(part) and not (is_image_space(part) or is_image_space_channels_first(part)):
            raise ValueError(
                f"'{name}' is {part}: give pictures their channels first, or values up to 255, by which SB3 knows them."
            )
        if not isinstance(part, spaces.Box) or not (is_picture(part) or (part.dtype.kind == "f" and len(part.shape) == 1)):
            raise ValueError(f"A world model sees uint8 pictures, vectors of floats and Discrete, and '{name}' is {part}.")
        parts[name] = part
    if len({part.shape[1:] for part in parts.values() if is_picture(part)}) > 1:
        raise ValueError("A world model sees pictures of one size: resize those of the observation.")
    return parts


def seen(observation: Any, space: spaces.Space) -> dict[str, Any]:
    """Observations (n, ...), arrays or tensors, by name as :func:`parts_of` says that they are seen."""
    whole = {"observation": space} if not isinstance(space, spaces.Dict) else space.spaces
    parts = observation if isinstance(space, spaces.Dict) else {"observation": observation}
    return {name: _as_seen(parts[name], of) for name, of in whole.items()}


def _is_table(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and space.dtype.kind == "f" and len(space.shape) in (0, 2)


def _as_seen(part: Any, space: spaces.Space) -> Any:
    if isinstance(space, spaces.Discrete):
        return _one_hot(part, space)
    return part.reshape(len(part), -1) if _is_table(space) else part


def _one_hot(index: Any, space: spaces.Discrete) -> Any:
    if isinstance(index, th.Tensor):
        return F.one_hot(index.long().flatten() - int(space.start), int(space.n)).float()
    return np.eye(int(space.n), dtype=np.float32)[np.asarray(index).reshape(-1).astype(int) - int(space.start)]


def _halvings(shape: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """How often a picture (C, H, W) is halved until about 4 pixels are left, and how many are left of it, padded."""
    stages = max(1, round(math.log2(min(shape[1:]) / 4)))
    return stages, (-(-shape[1] // 2**stages), -(-shape[2] // 2**stages))


class Encoder(nn.Module):
    """Pictures through stride-2 convolutions down to about 4 x 4, vectors through symlog and an MLP; both joined.

    :param parts: spaces by name
    :param cnn_depth: channels of the first convolution, which double
    :param layers: of the MLP, with ``units`` each
    """

    def __init__(self, parts: Mapping[str, spaces.Box], cnn_depth: int, layers: int, units: int) -> None:
        super().__init__()
        self.pictures = [name for name, part in parts.items() if is_picture(part)]
        self.vectors = [name for name in parts if name not in self.pictures]
        self.features = 0
        if self.pictures:
            channels, shape = sum(parts[name].shape[0] for name in self.pictures), parts[self.pictures[0]].shape
            stages, left = _halvings(shape)
            padding = (0, left[1] * 2**stages - shape[2], 0, left[0] * 2**stages - shape[1])
            down: list[nn.Module] = [nn.ZeroPad2d(padding)] if any(padding) else []
            for i in range(stages):
                depth = cnn_depth * 2**i
                down += [normal(nn.Conv2d(channels, depth, 4, 2, 1, bias=False)), ChannelNorm(depth, eps=EPSILON), nn.SiLU()]
                channels = depth
            self.cnn = nn.Sequential(*down, nn.Flatten())
            self.features += channels * math.prod(left)
        if self.vectors:
            self.mlp = MLP(sum(spaces.flatdim(parts[name]) for name in self.vectors), layers, units)
            self.features += units

    def forward(self, observations: Mapping[str, th.Tensor]) -> th.Tensor:
        """(..., *part) by name to (..., features)."""
        embedded = []
        if self.pictures:
            pixels = th.cat([observations[name] for name in self.pictures], -3)
            lead = pixels.shape[:-3]
            embedded.append(self.cnn(pixels.flatten(0, -4).float() / 255.0 - 0.5).view(*lead, -1))
        if self.vectors:
            embedded.append(self.mlp(symlog(joined(observations, self.vectors))))
        return embedded[0] if len(embedded) == 1 else th.cat(embedded, -1)


def joined(observations: Mapping[str, th.Tensor], names: list[str]) -> th.Tensor:
    """Vectors side by side, (..., sum of widths)."""
    return observations[names[0]] if len(names) == 1 else th.cat([observations[name] for name in names], -1)


class Decoder(nn.Module):
    """Pictures and vectors from latent features: the encoder's way back, and an MLP in symlog space."""

    def __init__(self, features: int, parts: Mapping[str, spaces.Box], cnn_depth: int, layers: int, units: int) -> None:
        super().__init__()
        self.pictures = [name for name, part in parts.items() if is_picture(part)]
        self.vectors = [name for name in parts if name not in self.pictures]
        self.widths = [spaces.flatdim(parts[name]) for name in self.vectors]
        self.channels = [parts[name].shape[0] for name in self.pictures]
        if self.pictures:
            self.shape = parts[self.pictures[0]].shape
            stages, left = _halvings(self.shape)
            depths = [cnn_depth * 2**i for i in reversed(range(stages))]
            self.first = uniform(nn.Linear(features, depths[0] * math.prod(left)))
            up: list[nn.Module] = [nn.Unflatten(-1, (depths[0], *left))]
            for a, b in pairwise(depths):
                up += [normal(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)), ChannelNorm(b, eps=EPSILON), nn.SiLU()]
            self.cnn = nn.Sequential(*up, uniform(nn.ConvTranspose2d(depths[-1], sum(self.channels), 4, 2, 1)))
        if self.vectors:
            self.mlp = MLP(features, layers, units, sum(self.widths))

    def pixels(self, features: th.Tensor) -> th.Tensor:
        """(..., features) to pictures (..., C, H, W), in units of 1."""
        pictures = self.cnn(self.first(features.flatten(0, -2)))[..., : self.shape[1], : self.shape[2]].float() + 0.5
        return pictures.reshape(*features.shape[:-1], *pictures.shape[1:])

    def decoded(self, features: th.Tensor) -> dict[str, th.Tensor]:
        """The observations (..., *part) by name that features stand for, pictures in units of 1."""
        observations: dict[str, th.Tensor] = {}
        if self.pictures:
            observations |= zip(self.pictures, self.pixels(features).clamp(0.0, 1.0).split(self.channels, -3), strict=True)
        if self.vectors:
            observations |= zip(self.vectors, symexp(self.mlp(features)).split(self.widths, -1), strict=True)
        return observations

    def loss(self, features: th.Tensor, observations: Mapping[str, th.Tensor]) -> th.Tensor:
        """-log p(o | s) of unit variance without constants and halves, (...): sum of (o_hat - o)^2, of vectors in symlog."""
        loss: th.Tensor | float = 0.0
        if self.pictures:
            pixels = th.cat([observations[name] for name in self.pictures], -3).float() / 255.0
            loss = loss + (self.pixels(features).float() - pixels).square().sum((-3, -2, -1))
        if self.vectors:
            error = self.mlp(features).float() - symlog(joined(observations, self.vectors))
            loss = loss + error.square().sum(-1)
        assert isinstance(loss, th.Tensor)
        return loss


class SymlogTwoHot(nn.Module):
    """A scalar as a histogram of 255 bins over symlog space [-20, 20]; the network's last layer starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.bins = TwoHot(255, -20.0, 20.0)
        self.outputs = self.bins.outputs

    def log_prob(self, outputs: th.Tensor, targets: th.Tensor) -> th.Tensor:
        """Of targets (...), under outputs (..., 255)."""
        return self.bins.log_prob(outputs.float(), symlog(targets))

    def mean(self, outputs: th.Tensor) -> th.Tensor:
        """symexp of the histogram's mean, (..., 255) to (...), in float32 also where the networks compute in less."""
        with th.autocast(outputs.device.type, enabled=False):
            return symexp(self.bins.expectation(outputs.float()))


def bernoulli_loss(logits: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """-log p of targets in {0, 1}, (...)."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
