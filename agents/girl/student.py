"""The distilled prior: a small network that learns to say what the frozen encoder would, and takes its place when it can.

From digests: a convolutional student of about 1.2 million parameters regresses the grounding signal on replayed batches and
replaces DINOv2 once its loss is below 0.05. Layout, average, hysteresis and the check on fresh rows complete that and are
not verified.
"""

from __future__ import annotations

from itertools import pairwise

import torch as th
from torch import nn
from torch.nn import functional as F

SIZE = 64
START, STOP = 0.05, 0.10  # it takes over below the first, and goes back above the second
DECAY = 0.99
CHECKED = 16  # while it is in use, one new row in so many is still embedded by the frozen encoder


class Student(nn.Module):
    """Four convolutions of stride 2 (32, 64, 128, 256 channels) and a linear layer: 1,214,560 parameters for c of 128.

    :param dim: width of c
    :param pictures: seen side by side
    """

    average: th.Tensor
    began: th.Tensor
    in_use: th.Tensor

    def __init__(self, dim: int = 128, pictures: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise((3 * pictures, 32, 64, 128, 256)):
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.SiLU()]
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * (SIZE // 16) ** 2, dim))
        self.register_buffer("average", th.zeros(()))
        self.register_buffer("began", th.zeros((), dtype=th.bool))
        self.register_buffer("in_use", th.zeros((), dtype=th.bool))

    def forward(self, frames: th.Tensor) -> th.Tensor:
        """c (..., dim) of RGB frames (..., 3 pictures, H, W) uint8, which are resized to 64 x 64."""
        pixels = frames.flatten(0, -4).float() / 255.0 - 0.5
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear")
        return self.network(pixels).view(*frames.shape[:-3], -1)

    @staticmethod
    def loss(told: th.Tensor, c: th.Tensor, known: th.Tensor) -> th.Tensor:
        """L_distill = || student(o) - sg(c) ||^2, the mean over the dimensions of c and the rows whose c is known.

        :param known: (...) bool, where the frozen encoder has embedded the row
        """
        of_each = (told.float() - c.detach()).square().mean(-1)
        return (of_each * known).sum() / known.sum().clamp(min=1)

    @th.no_grad()
    def follow(self, loss: th.Tensor, known: th.Tensor) -> None:
        """Average the loss, and decide who gives c: the student from the first average below 0.05, no longer above 0.10.

        :param known: as in :meth:`loss`; where none is, there was no loss
        """
        loss, told = loss.detach().float(), known.any()
        average = th.where(self.began, loss.lerp(self.average, DECAY), loss)
        self.average.copy_(th.where(told, average, self.average))
        self.began.logical_or_(told)
        self.in_use.copy_(self.began & th.where(self.in_use, self.average <= STOP, self.average < START))
