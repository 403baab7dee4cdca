"""The policy of GIRL: world model, grounding, ensemble, trust region, actor and critics; it acts from what it filters."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from .behaviour import Actor, ReturnScale
from .ensemble import Ensemble
from .grounding import Grounding, shifted
from .latents import CategoricalLatent, GaussianLatent, Latent
from .masked_autoencoder import MaskedStateAutoencoder
from .networks import MLP, Decoder, Encoder, SymlogTwoHot, parts_of, seen
from .rssm import RSSM, State
from .student import Student
from .trust_region import TrustRegion

# Of NM512/dreamerv3-torch, and one for two CPU cores (a proposal).
SIZES: dict[str, dict[str, Any]] = {
    "default": {
        "deter": 512, "hidden": 512, "variables": 32, "classes": 32, "units": 512, "cnn_depth": 32, "encoder_layers": 5,
        "encoder_units": 1024, "ensemble_units": 400,
    },
    "small": {
        "deter": 128, "hidden": 128, "variables": 16, "classes": 16, "units": 128, "cnn_depth": 8, "encoder_layers": 2,
        "encoder_units": 128, "ensemble_units": 128,
    },
}  # fmt: skip
LATENTS = ("categorical", "gaussian")


class Belief(NamedTuple):
    """What an agent remembers of an episode: h (n, deter), z (n, features) and the last action (n, A), as arrays."""

    h: np.ndarray
    z: np.ndarray
    action: np.ndarray


class GIRLPolicy(BasePolicy):
    """World model and behaviour. ``predict(observation, state, episode_start)`` filters: its second result is the
    :class:`Belief` that goes into the next call, as SB3's ``evaluate_policy`` does. Without it every observation is an
    episode's first.

    :param observation_space: a Box of floats, a Box of uint8 pictures, or a Dict of such
    :param action_space: a Box or a Discrete
    :param lr_schedule: not used here; the agent makes the optimisers
    :param size: "default" (DreamerV3's small model) or "small"; the arguments below take the place of single numbers
    :param latent: "categorical", or "gaussian" with ``variables`` dimensions
    :param layers: of every head
    :param grounding: name of the frozen encoder, see :class:`GIRL`; None is none
    :param embedding_dim: width of its Phi; a masked autoencoder, which is part of the policy, has its own
    :param grounding_dim: width of c, of an encoder of pictures
    :param literal: the prior of z_t sees c_t, and not c_{t-1}
    :param psi: see :class:`Grounding`; for an encoder of pictures: a masked autoencoder's embedding is c already
    :param distill: with a student that learns to give c
    :param ensemble_members: K; 0 is none
    :param sizes: deter, hidden, variables, classes, units, cnn_depth, encoder_layers, encoder_units, ensemble_units
    """

    grounded: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule | None = None,
        size: str = "default",
        latent: str = "categorical",
        layers: int = 2,
        grounding: str | None = None,
        embedding_dim: int = 0,
        grounding_dim: int = 128,
        literal: bool = False,
        psi: str = "trained",
        distill: bool = False,
        ensemble_members: int = 5,
        **sizes: int,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=isinstance(action_space, spaces.Box))
        if size not in SIZES:
            raise ValueError(f"size is one of {', '.join(SIZES)}, not {size!r}.")
        unknown = set(sizes) - set(SIZES[size])
        if unknown:
            raise ValueError(f"The policy has no argument '{min(unknown)}': sizes are {', '.join(SIZES[size])}.")
        if latent not in LATENTS:
            raise ValueError(f"latent is one of {', '.join(LATENTS)}, not {latent!r}.")
        self.arguments = {
            "size": size, "latent": latent, "layers": layers, "grounding": grounding, "embedding_dim": embedding_dim,
            "grounding_dim": grounding_dim, "literal": literal, "psi": psi, "distill": distill,
            "ensemble_members": ensemble_members, **sizes,
        }  # fmt: skip
        self.literal, numbers = literal, SIZES[size] | sizes
        self.parts = parts_of(observation_space)
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else spaces.flatdim(action_space)  # type: ignore[attr-defined]
        self.latent = self._make_latent(latent, numbers)
        units = numbers["units"]

        encoder = (numbers["cnn_depth"], numbers["encoder_layers"], numbers["encoder_units"])
        self.encoder = Encoder(self.parts, *encoder)
        self.rssm = RSSM(self.encoder.features, self.action_dim, self.latent, numbers["deter"], numbers["hidden"])
        features = self.rssm.features
        self.decoder = Decoder(features, self.parts, *encoder)
        self.two_hot = SymlogTwoHot()
        self.reward = MLP(features, layers, units, self.two_hot.outputs, scale=0.0)
        self.going_on = MLP(features, layers, units, 1)
        self.masked_autoencoder, self.grounding, self.student = None, None, None
        if grounding == "masked-autoencoder":
            vectors = self.encoder.vectors
            self.masked_autoencoder = MaskedStateAutoencoder(self._vector_width(), vectors).requires_grad_(False)
            if grounding_dim != self.masked_autoencoder.dim or psi == "frozen":
                raise ValueError(
                    f"A masked autoencoder's embedding is c already, of width {self.masked_autoencoder.dim}: leave "
                    "grounding_dim and psi out, they are for encoders of pictures."
                )
            self.grounding = Grounding(self.masked_autoencoder.dim, self.latent, numbers["deter"], psi="identity")
        elif grounding is not None:
            self.grounding = Grounding(embedding_dim, self.latent, numbers["deter"], grounding_dim, psi)
        if distill:
            self.student = Student(grounding_dim, len(self.encoder.pictures))
        self.register_buffer("grounded", th.zeros((), dtype=th.bool))  # after the warm start
        self.ensemble = (
            Ensemble(features, self.action_dim, self.latent, ensemble_members, numbers["ensemble_units"])
            if ensemble_members
            else None
        )
        self.trust_region = TrustRegion()
        self.actor = Actor(features, self.action_dim, layers, units, self.discrete)
        self.critic = MLP(features, layers, units, self.two_hot.outputs, scale=0.0)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.return_scale = ReturnScale()

    @staticmethod
    def _make_latent(kind: str, numbers: dict[str, Any]) -> Latent:
        if kind == "gaussian":
            return GaussianLatent(numbers["variables"])
        return CategoricalLatent(numbers["variables"], numbers["classes"])

    def _vector_width(self) -> int:
        """:raises ValueError: where there are no vectors"""
        if not self.encoder.vectors:
            raise ValueError("A masked autoencoder grounds vectors, and there are pictures alone: use grounding='auto'.")
        return sum(spaces.flatdim(self.parts[name]) for name in self.encoder.vectors)

    def model_parameters(self) -> list[nn.Parameter]:
        """What the world model's loss trains."""
        modules = [self.encoder, self.rssm, self.decoder, self.reward, self.going_on]
        modules += [self.grounding] if self.grounding is not None else []
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    # ------------------------------------------------------------------ the world model

    def prior(self, h: th.Tensor, c: th.Tensor | None = None) -> th.Tensor:
        """p(z | h), described; with the gated residual of c (..., dim) where there is grounding."""
        raw = self.rssm.prior_raw(h)
        if c is not None and self.grounding is not None:
            raw = self.grounding.shift(raw, h, c)
        return self.latent.describe(raw)

    def conditions(self, c: th.Tensor | None, first: th.Tensor) -> th.Tensor | None:
        """What of the signal the prior of z_t sees: c_{t-1}, or c_t in literal mode; (T, B, dim)."""
        return c if c is None or self.literal else shifted(c, first)

    def imagined_condition(self, z: th.Tensor, h: th.Tensor) -> th.Tensor | None:
        """What the prior of z_t sees in the place of that where nothing is observed, from z_{t-1} and h_t: f_psi(z_{t-1}), in
        literal mode f_psi of the likeliest z_t without grounding. 0 before grounding starts; None without grounding."""
        if self.grounding is None:
            return None
        source = self.latent.mode(self.latent.describe(self.rssm.prior_raw(h))) if self.literal else z
        return self.grounding.predicted(source) * self.grounded

    # ------------------------------------------------------------------ acting

    def filter(self, observation: dict[str, th.Tensor], belief: Belief | None, starts: np.ndarray, mode: bool) -> State:
        """The state (n, ...) after seeing an observation; z is the posterior's mode, or a sample of it.

        :param observation: (n, *part) by name
        :param belief: of the step before; None at the beginning
        :param starts: (n,) bool, where an episode begins
        """
        n, device = len(starts), self.device
        first = th.as_tensor(starts, dtype=th.bool, device=device).unsqueeze(0)
        before, actions = None, th.zeros(1, n, self.action_dim, device=device)
        if belief is not None:
            before = State(th.as_tensor(belief.h, device=device), th.as_tensor(belief.z, device=device))
            actions = th.as_tensor(belief.action, device=device).unsqueeze(0)
        embedding = self.encoder(observation).unsqueeze(0)
        noise = self.latent.noise(1, n, device=th.device("meta") if mode else device)
        if mode:  # the sample is not used, and who evaluates in training leaves its random numbers alone
            noise = th.zeros(noise.shape, device=device)
        states, posterior = self.rssm.observe(embedding, actions, first, noise, before)
        return State(states.h[0], self.latent.mode(posterior[0]) if mode else states.z[0])

    @th.inference_mode()
    def act(
        self, observation: dict[str, th.Tensor], belief: Belief | None, starts: np.ndarray, deterministic: bool
    ) -> tuple[np.ndarray, Belief]:
        """Actions (n, A) as the world model takes them, and what to remember.

        :param deterministic: the likeliest latent and action; NM512 samples the latent in evaluations too
        """
        state = self.filter(observation, belief, starts, deterministic)
        description = self.actor.describe(state.features)
        if deterministic:
            action = self.actor.mode(description)
        else:
            noise = self.actor.noise(len(starts), device=description.device)
            action = self.actor.sample(description, noise)
        actions = action.cpu().numpy()
        return actions, Belief(state.h.cpu().numpy(), state.z.cpu().numpy(), actions)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """What the environment takes, of actions (n, A) of the world model."""
        if self.discrete:
            return actions.argmax(-1) + self.action_space.start  # type: ignore[attr-defined]
        chosen = self.unscale_action(actions.reshape(-1, *self.action_space.shape))  # type: ignore[misc]
        return np.clip(chosen, self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]

    def to_model(self, actions: np.ndarray) -> np.ndarray:
        """What the world model takes (n, A), of the environment's actions."""
        if self.discrete:
            return np.eye(self.action_dim, dtype=np.float32)[np.asarray(actions) - self.action_space.start]  # type: ignore[attr-defined]
        with np.errstate(invalid="ignore"):
            scaled = self.scale_action(np.asarray(actions))
        free = self.action_space.high > self.action_space.low  # type: ignore[attr-defined]
        return np.where(free, scaled, 0.0).reshape(len(scaled), -1).astype(np.float32)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """As SB3's, with a :class:`Belief` as state; without one every observation is an episode's first.

        :raises ValueError: if state or episode_start are not of as many environments as the observation
        """
        self.set_training_mode(False)
        rows, vectorized = self.rows_of(observation)
        n = len(next(iter(rows.values())))
        starts = np.zeros(n, bool) if episode_start is None else np.atleast_1d(np.asarray(episode_start, bool))
        if starts.shape != (n,):
            raise ValueError(f"episode_start says of each of {n} environments whether an episode begins, not {episode_start}.")
        if state is not None and not (isinstance(state, Belief) and len(state.h) == n):
            raise ValueError(f"state is what the last call of predict gave for the same {n} environments, or None.")
        actions, belief = self.act(rows, state, starts, deterministic)
        chosen = self.to_env(actions)
        return (chosen if vectorized else chosen[0]), belief

    def rows_of(self, observation: Any) -> tuple[dict[str, th.Tensor], bool]:
        """Observations by name (n, *part) on the device, and whether there may be several."""
        tensors, vectorized = self.obs_to_tensor(observation)
        rows = seen(tensors, self.observation_space)
        return {name: value if value.dtype == th.uint8 else value.float() for name, value in rows.items()}, vectorized

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        rows = seen(observation, self.observation_space)
        n = len(next(iter(rows.values())))
        actions, _ = self.act(rows, None, np.ones(n, bool), deterministic)
        return th.as_tensor(self.to_env(actions) if self.discrete else actions)

    def forward(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        """Actions of first observations, as SB3's policies give them: those of a Box in [-1, 1]."""
        return self._predict(observation, deterministic)

    def set_training_mode(self, mode: bool) -> None:
        """As SB3's, which walks through all modules at every action."""
        if mode != self.training:
            self.train(mode)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = super()._get_constructor_parameters()
        return {"observation_space": own["observation_space"], "action_space": own["action_space"], **self.arguments}
