"""Where grounding vectors come from: the frozen encoder, what it said of remembered rows, and the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch as th
from gymnasium import spaces

from .masked_autoencoder import WIDTH, WINDOW
from .networks import is_picture, joined, parts_of
from .picture_encoders import DINOV2, NETWORKS, FrozenEncoder, newest_frame, picture_encoder
from .replay import Batch, SequenceReplay
from .student import CHECKED

if TYPE_CHECKING:
    from .policy import GIRLPolicy

MASKED_AUTOENCODER, EFFICIENTNET = "masked-autoencoder", "efficientnet-lite0"
NAMES = ("auto", MASKED_AUTOENCODER, *NETWORKS)
EMBED_AT_ONCE = {True: 2048, False: 64}  # rows: windows of vectors, pictures


class Signals:
    """The grounding vectors of batches and episodes, for one agent.

    :param name: of the frozen encoder, one of :data:`NAMES`, or None: no grounding
    :param weights: see :func:`picture_encoder`
    :param space: of the observations
    :param device: where an encoder of pictures lives
    """

    policy: GIRLPolicy
    """Has the map Psi, and where there are these the masked autoencoder and the student; set once it is there."""

    def __init__(self, name: str | None, weights: str | None, space: spaces.Space, device: th.device) -> None:
        if weights is not None and name not in DINOV2:
            raise ValueError(
                f"encoder_weights names a folder of a DINOv2 model, and grounding={name!r} has no use for it: "
                f"ground with one of {', '.join(DINOV2)}."
            )
        self.weights, self.device, parts = weights, device, parts_of(space)
        self.pictures = [part for part in parts if is_picture(parts[part])]
        self.name = name
        if name == "auto":
            self.name = MASKED_AUTOENCODER if len(self.pictures) < len(parts) else EFFICIENTNET
        self._of_pictures: FrozenEncoder | None = None  # made when it is needed

    @property
    def encoder(self) -> FrozenEncoder:
        """What gives Phi: the policy's masked autoencoder, or the encoder of pictures, which is no part of a saved agent."""
        if self.name == MASKED_AUTOENCODER:
            assert self.policy.masked_autoencoder is not None
            return self.policy.masked_autoencoder
        if self._of_pictures is None:
            assert self.name is not None
            self._of_pictures = picture_encoder(self.name, self.pictures, self.weights).to(self.device)
        return self._of_pictures

    def width(self) -> int:
        """Numbers of Phi; 0 without grounding."""
        if self.name is None:
            return 0
        return WIDTH if self.name == MASKED_AUTOENCODER else self.encoder.dim

    # ------------------------------------------------------------------ c

    def of_batch(self, batch: Batch) -> th.Tensor | None:
        """The grounding vectors c_t (T, B, dim) of a batch, 0 before grounding starts; None without grounding.

        A student that is in use gives all of them, and in any case those of rows that were not embedded.
        """
        grounding, student = self.policy.grounding, self.policy.student
        if grounding is None:
            return None
        c = grounding.signal(batch["embeddings"])
        if student is not None:
            told = batch["told"] if "told" in batch else self.told(batch["observations"]).detach()
            c = th.where((student.in_use | ~batch["known"]).unsqueeze(-1), told.float(), c)
        return c * self.policy.grounded

    def told(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        """What the student says c (..., dim) is, from the newest frames."""
        assert self.policy.student is not None
        return self.policy.student(th.cat([newest_frame(observations[name]) for name in self.pictures], -3))

    @th.no_grad()
    def of_episode(self, observations: dict[str, th.Tensor]) -> th.Tensor | None:
        """The same (T, 1, dim) of a whole episode's observations (T, 1, ...)."""
        if self.policy.grounding is None:
            return None
        length, encoder = len(next(iter(observations.values()))), self.encoder
        back = th.arange(encoder.window - 1, -1, -1, device=self.device)
        rows = (th.arange(length, device=self.device).unsqueeze(1) - back).clamp(min=0).split(self._at_once)
        phi = th.cat([encoder.embed({name: observations[name][some, 0] for name in encoder.parts}) for some in rows])
        known = th.ones(length, 1, dtype=th.bool, device=self.device)
        return self.of_batch({"observations": observations, "embeddings": phi.half().unsqueeze(1), "known": known})

    # ------------------------------------------------------------------ Phi

    @property
    def _at_once(self) -> int:
        return EMBED_AT_ONCE[self.encoder.window > 1]

    def embed_waiting(self, memory: SequenceReplay) -> None:
        """Give the rows that came since the last time their embeddings; where a student is in use, few of them."""
        in_use = self.policy.student is not None and bool(self.policy.student.in_use)
        waiting = (part.split(self._at_once) for part in memory.waiting(CHECKED if in_use else 1))
        for env, number in zip(*waiting, strict=True):
            windows = memory.windows(env, number, self.encoder.window, self.encoder.parts)
            memory.set_embeddings(env, number, self.encoder.embed(windows))

    def warm_start(self, memory: SequenceReplay, updates: int, step: Callable[[th.Tensor], None]) -> th.Tensor:
        """Let the masked autoencoder learn from what was collected; arguments and result as those of its own."""
        encoder = self.policy.masked_autoencoder
        assert encoder is not None
        lengths, oldest = th.as_tensor(memory.lengths()), th.as_tensor(memory.totals - memory.lengths())

        def windows(env: th.Tensor, number: th.Tensor, width: int) -> th.Tensor:
            return joined(memory.windows(env, oldest[env] + number, width, encoder.parts), encoder.parts)

        def draw(size: int) -> th.Tensor:
            env = th.randint(memory.n_envs, (size,))
            return windows(env, (th.rand(size, dtype=th.float64) * lengths[env]).long(), WINDOW)

        states = [windows(th.full((n,), env), th.arange(n), 1)[:, 0] for env, n in enumerate(lengths.tolist())]
        return encoder.warm_start(th.cat(states), draw, updates, step)
