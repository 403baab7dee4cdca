"""The masked state autoencoder that grounds a world model of vectors (ProprioGIRL).

From digests: a window of 16 states, 40 % masked, its embedding in the place of DINOv2's. The architecture, the loss on
masked steps only and the warm start complete that and are not verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch as th
from torch import nn

from ..common.normalization import RunningMoments
from .networks import joined, symlog

WINDOW = 16
MASKED = 0.4
WIDTH = 128
BATCH = 64  # windows of an update of the warm start
RATE = 1e-3


class MaskedStateAutoencoder(nn.Module):
    """A two-layer Transformer over the latest states; ``embed`` is what grounds, and is frozen after the warm start.

    :param features: width of a state
    :param vectors: names of the observations' parts that are the state
    """

    dim = WIDTH
    window = WINDOW
    name = "masked-autoencoder"

    def __init__(self, features: int, vectors: Sequence[str] = ("observation",)) -> None:
        super().__init__()
        self.parts = list(vectors)
        self.moments = RunningMoments((features,))
        self.inputs, self.outputs = nn.Linear(features, WIDTH), nn.Linear(WIDTH, features)
        self.position = nn.Parameter(0.02 * th.randn(WINDOW, WIDTH))
        self.token = nn.Parameter(th.zeros(WIDTH))  # in the place of a masked step
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def normalized(self, windows: th.Tensor) -> th.Tensor:
        """symlog, then the running moments of that; (B, 16, features)."""
        mean, scale = self.moments.location_and_scale()
        return ((symlog(windows) - mean) * scale).clamp(-10.0, 10.0)

    def loss(self, windows: th.Tensor, masked: th.Tensor) -> th.Tensor:
        """Mean squared error of the masked steps, which are told from the others.

        :param windows: (B, 16, features)
        :param masked: (B, 16) bool
        """
        x = self.normalized(windows)
        told = self.outputs(self._tokens(x, masked))
        return ((told - x).square().mean(-1) * masked).sum() / masked.sum().clamp(min=1)

    def _tokens(self, x: th.Tensor, masked: th.Tensor | None) -> th.Tensor:
        tokens = self.inputs(x)
        if masked is not None:
            tokens = th.where(masked.unsqueeze(-1), self.token, tokens)
        return self.transformer(tokens + self.position)

    @th.no_grad()
    def embed(self, observations: Mapping[str, th.Tensor]) -> th.Tensor:
        """Phi: the mean over the tokens of the unmasked window; (B, 16, *part) by name to (B, 128)."""
        return self._tokens(self.normalized(joined(observations, self.parts)), None).mean(1)

    def warm_start(
        self, states: th.Tensor, draw: Callable[[int], th.Tensor], updates: int, step: Callable[[th.Tensor], None]
    ) -> th.Tensor:
        """Learn from what was collected, then freeze (proposal).

        :param states: all of it (N, features), for the moments
        :param draw: (B, 16, features) windows of it
        :param step: takes a loss, and the optimiser one step
        :return: the last loss
        """
        self.moments.update(symlog(states))
        self.requires_grad_(True).train()
        loss = states.new_zeros(())
        for _ in range(updates):
            loss = self.loss(draw(BATCH), self.mask(BATCH, states.device))
            step(loss)
        self.requires_grad_(False).eval()
        return loss.detach()

    @staticmethod
    def mask(batch_size: int, device: th.device) -> th.Tensor:
        """40 % of the steps of each window, at random, (B, 16) bool."""
        ranks = th.rand(batch_size, WINDOW, device=device).argsort(1)
        return ranks < round(MASKED * WINDOW)
