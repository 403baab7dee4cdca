"""DFM(H): how far imagination drifts from what filtering finds, on episodes that the model never saw.

From N points of real episodes the prior is rolled on with the recorded actions, sampled on the way:
    DFM(H) = (1/N) sum_n (1/H) sum_{l=1..H} KL( q(z_{t+l} | o_{<=t+l}) || p(z_{t+l} | open-loop state, c) )
The digests name the KL and what the prior is conditioned on; normalisation and starts complete it and are not verified.
A KL in one model's latent is no measure of another's: the decoder's error on the same paths is the fairer one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th

from .policy import GIRLPolicy
from .rssm import State

VARIANTS = ("real", "predicted", "none")
CONTEXT = 5  # observations that a dream begins with


class Episode(NamedTuple):
    """What was seen, L + 1 observations by name, and the actions between, (L, A) as the world model takes them."""

    observations: dict[str, np.ndarray]
    actions: np.ndarray


class Drift(NamedTuple):
    """Means over the start points by lag, (H,) each.

    :param kl: of each variant: the prior conditioned on "real" grounding vectors (the paper's, which sees what will be
        observed), on those "predicted" from the imagined latent (honest), or on "none"
    :param decoder_error: of each variant, -log p(o | imagined state) as in the decoder's loss
    :param honest: the variant that imagination itself uses
    """

    kl: dict[str, np.ndarray]
    decoder_error: dict[str, np.ndarray]
    honest: str

    def dfm(self, horizon: int, variant: str | None = None) -> float:
        """DFM(H) of a variant; None: of the honest one.

        :raises ValueError: if so many lags were not measured
        """
        return self._upto(self.kl, horizon, variant)

    def error(self, horizon: int, variant: str | None = None) -> float:
        """Mean of the decoder's error up to a lag; arguments as those of :meth:`dfm`."""
        return self._upto(self.decoder_error, horizon, variant)

    def _upto(self, values: dict[str, np.ndarray], horizon: int, variant: str | None) -> float:
        of = values[variant or self.honest]
        if not 1 <= horizon <= len(of):
            raise ValueError(f"The drift was measured over lags 1 to {len(of)}, and not to {horizon}.")
        return float(of[:horizon].mean())


class Paths(NamedTuple):
    """States of real episodes (N, ...) and what came after them, (H, N, ...): how it came about, was seen and filtered."""

    start: State
    actions: th.Tensor
    observations: dict[str, th.Tensor]
    posterior: th.Tensor
    conditions: th.Tensor | None


@th.no_grad()
def measure_drift(
    policy: GIRLPolicy,
    episodes: Sequence[Episode],
    horizon: int,
    signal: Callable[[dict[str, th.Tensor]], th.Tensor | None],
    starts: int = 20,
    seed: int = 0,
) -> Drift:
    """The drift of a world model.

    :param episodes: held out; those of fewer steps than the horizon are left out
    :param horizon: H
    :param signal: from observations (T, 1, ...) by name to grounding vectors c_t (T, 1, dim)
    :param starts: points of each episode, at random
    :param seed: of the starts and the samples
    :raises ValueError: if no episode has as many steps as the horizon
    """
    long_enough = [episode for episode in episodes if len(episode.actions) >= horizon]
    if not long_enough:
        raise ValueError(f"No episode has as many steps as the horizon, {horizon}: measure the drift over a shorter one.")
    device = policy.device
    with th.random.fork_rng([device] if device.type == "cuda" else []):
        th.manual_seed(seed)
        of_each = []
        for episode in long_enough:
            whole = _filter(policy, episode, signal)
            of_each.append(_cut(whole, th.randint(len(episode.actions) - horizon + 1, (starts,)).to(device), horizon))
        paths = _join(of_each)
        grounded = policy.grounding is not None and bool(policy.grounded)
        variants = VARIANTS if grounded else ("none",)
        kls, errors = {}, {}
        for name in variants:
            kl, features = _roll(policy, paths, name)
            kls[name] = kl.mean(1).cpu().numpy()
            lags = zip(features.unbind(), *(part.unbind() for part in paths.observations.values()), strict=True)
            of_lag = [policy.decoder.loss(x, dict(zip(paths.observations, seen, strict=True))).mean() for x, *seen in lags]
            errors[name] = th.stack(of_lag).cpu().numpy()
    return Drift(kls, errors, "predicted" if grounded else "none")


class Dream(NamedTuple):
    """An episode beside what a world model makes of it, (T, *part) by name; vectors as they are, pictures in units of 1.

    :param context: so many first steps are filtered; what comes after them is imagined
    """

    real: dict[str, np.ndarray]
    imagined: dict[str, np.ndarray]
    context: int


@th.no_grad()
def dream(
    policy: GIRLPolicy,
    episode: Episode,
    signal: Callable[[dict[str, th.Tensor]], th.Tensor | None],
    context: int = CONTEXT,
    horizon: int = 60,
    seed: int = 0,
) -> Dream:
    """Filter the first steps of an episode and imagine the next with the recorded actions, as behaviour is learnt.

    :param context: observations that are seen
    :param horizon: steps that are not, at most what is left
    :raises ValueError: if the context is below 1, or nothing is left after it
    """
    if context < 1:
        raise ValueError(f"A dream begins with 1 observation or more, not {context}.")
    horizon = min(horizon, len(episode.actions) - context + 1)
    if horizon < 1:
        raise ValueError(f"The episode has {len(episode.actions) + 1} observations, no more than the context of {context}.")
    device = policy.device
    with th.random.fork_rng([device] if device.type == "cuda" else []):
        th.manual_seed(seed)
        whole = _filter(policy, episode, signal)
        paths = _cut(whole, th.tensor([context - 1], device=device), horizon)
        grounded = policy.grounding is not None and bool(policy.grounded)
        _, after = _roll(policy, paths, "predicted" if grounded else "none")
        imagined = policy.decoder.decoded(th.cat((whole.start.features[:context], after)))
    real = {name: part[: context + horizon] for name, part in episode.observations.items()}
    units = {name: 255.0 if part.dtype == np.uint8 else 1.0 for name, part in real.items()}
    return Dream(
        {name: (part / units[name]).astype(np.float32) for name, part in real.items()},
        {name: part[:, 0].float().cpu().numpy() for name, part in imagined.items()}, context,
    )  # fmt: skip


def _filter(policy: GIRLPolicy, episode: Episode, signal: Callable[..., th.Tensor | None]) -> Paths:
    """Filter an episode: all of its steps, (L + 1, 1, ...) each, the states among them."""
    device, steps = policy.device, len(episode.actions)
    observations = {name: _on(device, part).unsqueeze(1) for name, part in episode.observations.items()}
    actions = th.as_tensor(episode.actions, dtype=th.float32, device=device).unsqueeze(1)
    came_by = th.cat((th.zeros_like(actions[:1]), actions))
    first = th.zeros(steps + 1, 1, dtype=th.bool, device=device)
    first[0] = True
    noise = policy.latent.noise(steps + 1, 1, device=device)
    filtered = policy.rssm.observe(policy.encoder(observations), came_by, first, noise)
    conditions = policy.conditions(signal(observations), first)
    return Paths(filtered.states, came_by, observations, filtered.posterior, conditions)


def _on(device: th.device, part: np.ndarray) -> th.Tensor:
    """A part of the observations as the networks take it: pictures uint8, all else float32."""
    return th.as_tensor(part if part.dtype == np.uint8 else part.astype(np.float32), device=device)


def _cut(whole: Paths, begin: th.Tensor, horizon: int) -> Paths:
    """What follows each start point ``begin`` (N,) of an episode."""
    after = begin + 1 + th.arange(horizon, device=begin.device).unsqueeze(1)  # (H, N)
    return Paths(
        State(whole.start.h[begin, 0], whole.start.z[begin, 0]),
        whole.actions[after, 0],
        {name: part[after, 0] for name, part in whole.observations.items()},
        whole.posterior[after, 0],
        None if whole.conditions is None else whole.conditions[after, 0],
    )


def _join(paths: list[Paths]) -> Paths:
    """Paths of several episodes side by side."""
    start = State(*(th.cat(parts) for parts in zip(*(p.start for p in paths), strict=True)))
    conditions = None if paths[0].conditions is None else th.cat([p.conditions for p in paths], 1)  # type: ignore[misc]
    names: Mapping[str, Any] = paths[0].observations
    return Paths(
        start, th.cat([p.actions for p in paths], 1), {n: th.cat([p.observations[n] for p in paths], 1) for n in names},
        th.cat([p.posterior for p in paths], 1), conditions,
    )  # fmt: skip


def _roll(policy: GIRLPolicy, paths: Paths, variant: str) -> tuple[th.Tensor, th.Tensor]:
    """The prior open loop along recorded actions: KL from the filtered posterior (H, N), and [z, h] (H, N, ...)."""
    state, kls, features = paths.start, [], []
    noise = policy.latent.noise(*paths.actions.shape[:2], device=policy.device)
    for lag, action in enumerate(paths.actions.unbind()):
        h = policy.rssm.advance(state, policy.rssm.pushed(action))
        condition = None
        if variant == "predicted":
            condition = policy.imagined_condition(state.z, h)
        elif variant == "real" and paths.conditions is not None:
            condition = paths.conditions[lag]
        prior = policy.prior(h, condition)
        kls.append(policy.latent.kl(paths.posterior[lag], prior))
        state = State(h, policy.latent.sample(prior, noise[lag]))
        features.append(state.features)
    return th.stack(kls), th.stack(features)
