"""QGBS, Q-guided beam search: flow maps' samples, renoised, denoised, ranked, and moved up the critics' gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch as th

if TYPE_CHECKING:
    from .flow_maps import FlowMapPolicy

DENOISERS = ("diagonal", "jump")
NORM_FLOOR = 1e-8


@dataclass(frozen=True)
class Search:
    """Arguments of :func:`guided_beam_search`, which calls the network M (1 + K B) times for a chunk.

    :param beams: M, chunks that are kept
    :param levels: K, rounds
    :param branches: B, renoised copies of every beam
    :param step_size: eta, length of the step up the gradient of min_j Q_j after every round; 0 takes none
    :param snr: rho of the renoising: back to time rho / (1 + rho)
    :param denoise: "diagonal", x + (1 - t') u(x, t', t'), the mean of what x may become (the released code); or "jump", the
        flow map x + (1 - t') u(x, t', 1), which keeps their spread
    :param keep_incumbents: let every round's beams compete with their branches, so that no round makes them worse (elitism;
        not in the paper)
    :raises ValueError: for an argument outside its range
    """

    beams: int = 4
    levels: int = 1
    branches: int = 4
    step_size: float = 0.3
    snr: float = 1.5
    denoise: str = "diagonal"
    keep_incumbents: bool = False

    def __post_init__(self) -> None:
        if self.beams < 1 or self.levels < 0 or self.branches < 1:
            raise ValueError("A search has beams and branches of 1 or more, and levels of 0 or more.")
        if not self.step_size >= 0.0 or not self.snr > 0.0:
            raise ValueError(f"step_size is 0 or more and snr above 0, not {self.step_size} and {self.snr}.")
        if self.denoise not in DENOISERS:
            raise ValueError(f"denoise is one of {', '.join(DENOISERS)}, not {self.denoise!r}.")

    @property
    def time(self) -> float:
        """t' = rho / (1 + rho)."""
        return self.snr / (1.0 + self.snr) if self.snr < float("inf") else 1.0


def direction(gradient: th.Tensor) -> th.Tensor:
    """g / (||g|| + 1e-8), the norm over the whole chunk, (S, B, A)."""
    return gradient / (gradient.norm(dim=-1, keepdim=True) + NORM_FLOOR)


@th.no_grad()
def guided_beam_search(policy: FlowMapPolicy, observations: th.Tensor, search: Search) -> th.Tensor:
    """A chunk (S, B, A) for each observation (S, B, o) (Algorithm 2 by the released code).

    1. M samples of the flow map.
    2. K times: B copies of each go back to time t', x = t' a + (1 - t') eps, and forth again; the best M by min_j Q_j stay,
       and go a step up its gradient. With K = 0 the samples only go that step.
    3. The best of the M.
    """
    beams, seeds, size = search.beams, *observations.shape[:2]
    repeated = observations.repeat_interleave(beams, 1)
    noise = th.randn(seeds, size * beams, policy.chunk_dim, device=observations.device)
    chunks = policy.sample(repeated, noise)
    for _ in range(search.levels):
        candidates = renoised(policy, repeated, chunks, search)
        if search.keep_incumbents:
            candidates = _beside(candidates, chunks, seeds * size)
        chunks = _best(policy, repeated, candidates, beams)
        chunks = _uphill(policy, repeated, chunks, search)
    if search.levels == 0:
        chunks = _uphill(policy, repeated, chunks, search)
    return _best(policy, observations, chunks, 1)


def renoised(policy: FlowMapPolicy, observations: th.Tensor, chunks: th.Tensor, search: Search) -> th.Tensor:
    """B copies of each chunk (S, n, A), sent back to time t' and forth again, (S, n B, A)."""
    copies, of = chunks.repeat_interleave(search.branches, 1), observations.repeat_interleave(search.branches, 1)
    time = search.time
    x = time * copies + (1.0 - time) * th.randn_like(copies)
    velocity = policy.velocity(of, x, time, time if search.denoise == "diagonal" else 1.0)
    return (x + (1.0 - time) * velocity).clamp(-1.0, 1.0)


def _pessimistic(policy: FlowMapPolicy, observations: th.Tensor, chunks: th.Tensor) -> th.Tensor:
    """min_j Q_j, (S, n)."""
    return policy.critics(observations, chunks).amin(1)


def _best(policy: FlowMapPolicy, observations: th.Tensor, chunks: th.Tensor, kept: int) -> th.Tensor:
    """The best ``kept`` chunks of every state, best first.

    :param observations: (S, B kept, o), each state ``kept`` times in a row
    :param chunks: (S, B c, A), c of every state in a row
    :return: (S, B kept, A)
    """
    seeds, rows, width = chunks.shape
    states = observations[:, ::kept]
    each = rows // states.shape[1]
    q = _pessimistic(policy, states.repeat_interleave(each, 1), chunks).view(seeds, -1, each)
    chosen = q.topk(kept, dim=-1).indices[..., None].expand(-1, -1, -1, width)
    return chunks.view(seeds, -1, each, width).gather(2, chosen).view(seeds, -1, width)


def _beside(first: th.Tensor, second: th.Tensor, states: int) -> th.Tensor:
    """The chunks of both, state by state."""
    seeds, _, width = first.shape
    parts = [chunks.reshape(states, -1, width) for chunks in (first, second)]
    return th.cat(parts, dim=1).view(seeds, -1, width)


def _uphill(policy: FlowMapPolicy, observations: th.Tensor, chunks: th.Tensor, search: Search) -> th.Tensor:
    """clip(a + eta g / (|g| + 1e-8)), g = grad_a min_j Q_j; with ``keep_incumbents`` only where that is better."""
    if search.step_size == 0.0:
        return chunks
    with th.inference_mode(False), th.enable_grad():
        at = chunks.clone().requires_grad_()
        q = _pessimistic(policy, observations.clone(), at)
        (gradient,) = th.autograd.grad(q.sum(), at)
    moved = (chunks + search.step_size * direction(gradient)).clamp(-1.0, 1.0)
    if not search.keep_incumbents:
        return moved
    better = _pessimistic(policy, observations, moved) > q.detach()
    return th.where(better[..., None], moved, chunks)
