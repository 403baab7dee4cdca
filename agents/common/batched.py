"""Networks side by side: n of them with the same shape and other weights, as one batched matrix product a layer.

On a CPU large layers are computed network by network instead, so that what a layer has written is still in the cache when
the next one reads it.

The twins of a critic are such networks, and so are the agents of several seeds that learn at once. The first axis of
every parameter is n, with the seed as the slower index: the k networks of seed s are rows s k to (s + 1) k.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import torch as th
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

Initialiser = Callable[["BatchedLinear"], None]
RELU = partial(nn.ReLU, inplace=True)  # a product keeps its inputs only
IN_CACHE = 200_000  # numbers in a layer of all networks, up to which one product is as fast on a CPU
LECUN_STD = 0.87962566103423978  # of a standard normal that is cut at +-2


def xavier_uniform(layer: BatchedLinear) -> None:
    """Glorot's bound sqrt(6 / (in + out)), zero bias."""
    bound = math.sqrt(6.0 / sum(layer.weight.shape[1:]))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)


def lecun_normal(layer: BatchedLinear) -> None:
    """Variance 1 / in, cut at two standard deviations, zero bias: Flax's default."""
    std = math.sqrt(1.0 / layer.weight.shape[1]) / LECUN_STD
    nn.init.trunc_normal_(layer.weight, std=std, a=-2.0 * std, b=2.0 * std)
    nn.init.zeros_(layer.bias)


def torch_default(layer: BatchedLinear) -> None:
    """Weights and bias uniform within 1 / sqrt(in), as ``nn.Linear``."""
    bound = 1.0 / math.sqrt(layer.weight.shape[1])
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(layer.bias, -bound, bound)


class BatchedLinear(nn.Module):
    """y[i] = x[i] W[i] + b[i]; (n, B, in) to (n, B, out).

    :param n: number of layers side by side
    """

    def __init__(self, n: int, features_in: int, features_out: int, initialise: Initialiser = torch_default) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.empty(n, features_in, features_out))
        self.bias = nn.Parameter(th.empty(n, 1, features_out))
        initialise(self)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return affine(self.bias, self.weight, x)

    def apart(self) -> list[Callable[[th.Tensor], th.Tensor]]:
        """The n layers, (1, B, in) to (1, B, out) each."""
        return [partial(affine, b, w) for b, w in zip(self.bias.split(1), self.weight.split(1), strict=True)]


def affine(bias: th.Tensor, weight: th.Tensor, x: th.Tensor) -> th.Tensor:
    """x W + b, batched."""
    return th.baddbmm(bias, x, weight)


class BatchedLayerNorm(nn.Module):
    """Layer norm over the last axis with n scales and shifts; (n, B, h) to the same.

    :param eps: 1e-6 is Flax's default, torch's is 1e-5
    """

    def __init__(self, n: int, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.ones(n, 1, features))
        self.bias = nn.Parameter(th.zeros(n, 1, features))
        self.eps = eps

    def forward(self, x: th.Tensor) -> th.Tensor:
        return normed(self.bias, self.weight, self.eps, x)

    def apart(self) -> list[Callable[[th.Tensor], th.Tensor]]:
        """The n layers, (1, B, h) to the same each."""
        pairs = zip(self.bias.split(1), self.weight.split(1), strict=True)
        return [partial(normed, b, w, self.eps) for b, w in pairs]


def normed(bias: th.Tensor, weight: th.Tensor, eps: float, x: th.Tensor) -> th.Tensor:
    """Layer norm with scale and shift, batched."""
    return th.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=eps), weight)


def exceeds_cache(x: th.Tensor, width: int) -> bool:
    """Whether n networks with layers of this width are better computed one after the other, for inputs (n, B, in)."""
    return len(x) > 1 and not x.is_cuda and x.shape[0] * x.shape[1] * width > IN_CACHE


def one_by_one(network: nn.Module, *inputs: th.Tensor) -> th.Tensor:
    """``network(*inputs)``, for one of n networks after the other.

    :param network: its parameters have n as their first axis, as have ``inputs`` and the output
    """
    names = [name for name, _ in network.named_parameters()]
    parts = zip(*(p.split(1) for p in network.parameters()), strict=True)
    rows = zip(*(x.split(1) for x in inputs), strict=True)
    return th.cat([functional_call(network, dict(zip(names, p, strict=True)), x) for p, x in zip(parts, rows, strict=True)])


class BatchedMLP(nn.Sequential):
    """n multilayer perceptrons; (n, B, in) to (n, B, out), with no activation after the last layer.

    :param widths: of the hidden layers
    :param layer_norm: after every activation
    """

    def __init__(
        self,
        n: int,
        features_in: int,
        widths: Sequence[int],
        features_out: int,
        activation_fn: Callable[[], nn.Module] = RELU,
        initialise: Initialiser = torch_default,
        layer_norm: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        sizes = (features_in, *widths)
        for before, after in zip(sizes, widths, strict=False):
            layers += [BatchedLinear(n, before, after, initialise), activation_fn()]
            layers += [BatchedLayerNorm(n, after)] if layer_norm else []
        super().__init__(*layers, BatchedLinear(n, sizes[-1], features_out, initialise))
        self.width = max(widths, default=0)

    def forward(self, x: th.Tensor) -> th.Tensor:
        if not exceeds_cache(x, self.width):
            return super().forward(x)
        with_weights = (BatchedLinear, BatchedLayerNorm)
        apart = [layer.apart() if isinstance(layer, with_weights) else repeat(layer) for layer in self]
        outputs = []
        for y, *layers in zip(x.split(1), *apart, strict=False):
            for layer in layers:
                y = layer(y)
            outputs.append(y)
        return th.cat(outputs)


class BatchedValues(nn.Module):
    """k functions of (s, a) or of s for each of S seeds, as one :class:`BatchedMLP` of S k networks.

    :param seeds: S
    :param k: functions per seed
    :param features_in: of s, or of s and a together
    :param kwargs: of the :class:`BatchedMLP`
    """

    def __init__(
        self, seeds: int, k: int, features_in: int, widths: Sequence[int], initialise: Initialiser, **kwargs: Any
    ) -> None:
        super().__init__()
        self.k = k
        self.networks = BatchedMLP(seeds * k, features_in, widths, 1, initialise=initialise, **kwargs)

    def forward(self, *inputs: th.Tensor, members: slice | None = None) -> th.Tensor:
        """(S, B, i) each to (S, k, B), or to fewer functions of each seed."""
        x = th.cat(inputs, dim=-1) if len(inputs) > 1 else inputs[0]
        seeds, size, features = x.shape
        taken = range(self.k)[members] if members is not None else range(self.k)
        x = x.unsqueeze(1).expand(seeds, len(taken), size, features).reshape(seeds * len(taken), size, features)
        if members is None:
            return self.networks(x).view(seeds, self.k, size)
        own = {name: p.unflatten(0, (seeds, self.k))[:, members].flatten(0, 1) for name, p in self.networks.named_parameters()}
        return functional_call(self.networks, own, x).view(seeds, len(taken), size)


class BatchedActor(nn.Module):
    """S deterministic policies tanh(MLP(s)); (S, B, o) to (S, B, d), torch's default initialisation."""

    def __init__(self, seeds: int, obs_dim: int, action_dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.network = BatchedMLP(seeds, obs_dim, widths, action_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.network(observations).tanh()


_PARAMETERS: weakref.WeakKeyDictionary[nn.Module, list[th.Tensor]] = weakref.WeakKeyDictionary()


def parameters_of(module: nn.Module) -> list[th.Tensor]:
    """The parameters, looked up once: walking through the modules takes longer than an average of them."""
    if module not in _PARAMETERS:
        _PARAMETERS[module] = list(module.parameters())
    return _PARAMETERS[module]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside the block gradients pass through the modules to their inputs, and not to their weights."""
    parameters = [p for module in modules for p in parameters_of(module)]
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


def copy_of(module: nn.Module) -> Any:
    """A copy that no optimiser trains: the beginning of a Polyak average."""
    return copy.deepcopy(module).requires_grad_(False)


@th.no_grad()
def move_towards(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, for every parameter."""
    th._foreach_lerp_(parameters_of(target), parameters_of(source), tau)
