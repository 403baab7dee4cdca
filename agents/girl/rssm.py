"""The recurrent state-space model: a deterministic state h, a stochastic one z, and the distributions of z.

    h_t = GRU(x, h_{t-1}),  x = SiLU(LN(W [z_{t-1}, a_{t-1}]))
    prior     p(z_t | h_t)           posterior  q(z_t | h_t, e_t)
Tensors of sequences are time-major, (T, B, ...). The facts are those of NM512/dreamerv3-torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch as th
from torch import nn

from .latents import Latent
from .networks import EPSILON, Dense, normal, uniform


class State(NamedTuple):
    """h (..., deter) and z (..., latent.features)."""

    h: th.Tensor
    z: th.Tensor

    @property
    def features(self) -> th.Tensor:
        """[z, h], which every head sees."""
        return th.cat((self.z, self.h), -1)


class Filtered(NamedTuple):
    """What observing a sequence gives: states, and the posteriors that z was drawn from."""

    states: State
    posterior: th.Tensor


class RSSM(nn.Module):
    """Sequence model, prior and posterior.

    :param embedding: width of e
    :param action_dim: width of a
    :param latent: family of z
    :param deter: width of h
    :param hidden: width of the layers between
    """

    def __init__(self, embedding: int, action_dim: int, latent: Latent, deter: int, hidden: int) -> None:
        super().__init__()
        self.latent, self.deter, self.action_dim = latent, deter, action_dim
        self.features = latent.features + deter
        self.initial = nn.Parameter(th.zeros(deter))
        self.inputs = Dense(latent.features + action_dim, hidden)
        self.gru = normal(nn.Linear(hidden + deter, 3 * deter, bias=False))
        self.gru_norm = nn.LayerNorm(3 * deter, eps=EPSILON)
        self.prior_hidden = Dense(deter, hidden)
        self.prior_out = uniform(nn.Linear(hidden, latent.statistics))
        self.posterior_hidden = Dense(deter + embedding, hidden)
        self.posterior_out = uniform(nn.Linear(hidden, latent.statistics))

    def start(self) -> State:
        """The state before an episode: h = tanh(W), z the mode of the prior there; (deter,) and (features,)."""
        h = self.initial.tanh()
        return State(h, self.latent.mode(self.latent.describe(self.prior_raw(h))))

    def prior_raw(self, h: th.Tensor) -> th.Tensor:
        """What the network says of z before anything is seen, (..., statistics): `latent.describe` makes it a prior."""
        return self.prior_out(self.prior_hidden(h))

    def advance(self, state: State, pushed: th.Tensor) -> th.Tensor:
        """h_t from the state at t - 1 and the action's part of the first layer (B, hidden)."""
        x = self.inputs.late(state.z, pushed)
        parts = self.gru_norm(self.gru(th.cat((x, state.h), -1))).float()
        reset, candidate, update = parts.chunk(3, -1)
        return state.h.lerp((reset.sigmoid() * candidate).tanh(), (update - 1.0).sigmoid())

    def pushed(self, actions: th.Tensor) -> th.Tensor:
        """The part of the first layer that belongs to actions (..., A)."""
        return self.inputs.early(actions)

    def posterior(self, h: th.Tensor, seen: th.Tensor) -> th.Tensor:
        """q(z | h, e), described; ``seen`` is e's part of its first layer."""
        return self.latent.describe(self.posterior_out(self.posterior_hidden.late(h, seen)))

    def seen(self, embeddings: th.Tensor) -> th.Tensor:
        """The part of the posterior's first layer that belongs to embeddings (..., E)."""
        return self.posterior_hidden.early(embeddings)

    def observe(
        self, embeddings: th.Tensor, actions: th.Tensor, first: th.Tensor, noise: th.Tensor, before: State | None = None
    ) -> Filtered:
        """Filter sequences.

        What does not hang on the state is computed for all steps at once; what is left runs step by step.

        :param embeddings: e_t (T, B, E)
        :param actions: a_{t-1}, which led to the step (T, B, A)
        :param first: (T, B) bool, where the state and the action before do not count
        :param noise: of the samples, (T, B, ...)
        :param before: the state before the first step, (B, ...); None: the sequence begins at :meth:`start`
        """
        start, steps = self.start(), embeddings.shape[0]
        if before is None:
            first = th.cat((th.ones_like(first[:1]), first[1:]))
            before = State(start.h.expand(first.shape[1], -1), start.z.expand(first.shape[1], -1))
        resets = first.unsqueeze(-1)
        pushed, seen = self.pushed(actions.masked_fill(resets, 0.0)), self.seen(embeddings)
        state, hs, zs, posteriors = before, [], [], []
        for t in range(steps):
            state = State(th.where(resets[t], start.h, state.h), th.where(resets[t], start.z, state.z))
            h = self.advance(state, pushed[t])
            posterior = self.posterior(h, seen[t])
            state = State(h, self.latent.sample(posterior, noise[t]))
            hs.append(state.h)
            zs.append(state.z)
            posteriors.append(posterior)
        return Filtered(State(th.stack(hs), th.stack(zs)), th.stack(posteriors))
