"""SB3's actor-critic policy with an observation normaliser inside, so that ``predict`` always takes raw observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from .acting import OBSERVATION_CLIP, Sampler, dense_sampler, is_vector
from .distributions import action_distribution
from .flat_adam import FlatAdam
from .normalization import RunningMoments


class NormalizedActorCriticPolicy(ActorCriticPolicy):
    """:class:`ActorCriticPolicy` whose networks see (observation - mean) / std, clipped to +-10.

    Mean and variance are buffers of the policy: they are saved, loaded and moved with the weights. SB3's methods take
    raw observations. Those whose names end in ``_at`` take what :meth:`standardizer` makes of them: an update
    standardises its rollout once and not in every minibatch.

    :param normalize_observations: keep moments and use them; ignored unless observations are float vectors
    :param args: as in :class:`ActorCriticPolicy`
    :param kwargs: as in :class:`ActorCriticPolicy`; the optimiser is Adam on one vector, with SB3's eps of 1e-5
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        normalize_observations: bool = False,
        **kwargs: Any,
    ) -> None:
        self.normalize_observations = normalize_observations and is_vector(observation_space)
        if kwargs.setdefault("optimizer_class", FlatAdam) in (FlatAdam, th.optim.Adam):
            kwargs["optimizer_kwargs"] = {"eps": 1e-5, "fused": True, **(kwargs.get("optimizer_kwargs") or {})}
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        shape = self.observation_space.shape or ()
        self.moments = RunningMoments(shape) if self.normalize_observations else None
        self.action_dist = action_distribution(self.action_space)
        super()._build(lr_schedule)

    # ------------------------------------------------------------------ the normaliser

    def update_moments(self, observations: PyTorchObs) -> None:
        """Merge raw observations (B, o) into the normaliser; nothing happens where there is none."""
        if self.moments is not None:
            self.moments.update(observations)  # type: ignore[arg-type]

    def standardizer(self) -> Callable[[Any], Any]:
        """The function from raw to standardised observations, with the moments of this moment."""
        return (lambda obs: obs) if self.moments is None else self.moments.standardizer(OBSERVATION_CLIP)

    # The three doors through which SB3's policy reads raw observations. (get_distribution and predict_values call the
    # base class's extract_features past this class, hence not one door.)
    def extract_features(  # type: ignore[override]
        self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor | None = None
    ) -> th.Tensor | tuple[th.Tensor, th.Tensor]:
        return super().extract_features(self.standardizer()(obs), features_extractor)

    def get_distribution(self, obs: PyTorchObs) -> Any:
        return super().get_distribution(self.standardizer()(obs))

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        return super().predict_values(self.standardizer()(obs))

    # ------------------------------------------------------------------ acting

    def draw_noise(self, shape: tuple[int, ...]) -> th.Tensor:
        """What :meth:`sampler` turns into actions, (*shape, *)."""
        return self.action_dist.draw_noise(shape, self.device)  # type: ignore[attr-defined]

    def sampler(self) -> Sampler:
        """(raw observations (n, *obs), noise (n, *)) -> actions (n, *act) on the host, with the weights of this moment.

        What a rollout calls at every step. On the CPU dense layers are evaluated by numpy where :func:`dense_sampler`
        knows how; :meth:`sample` is the reference.
        """
        return dense_sampler(self) or self.sample

    @th.inference_mode()
    def sample(self, observations: Any, noise: Any) -> np.ndarray:
        """Actions through SB3's distribution.

        :param observations: raw, arrays or tensors, or a dict of them
        :param noise: of :meth:`draw_noise`, array or tensor
        """
        if isinstance(observations, dict):
            observations = {key: th.as_tensor(part, device=self.device) for key, part in observations.items()}
        else:
            observations = th.as_tensor(observations, device=self.device)
        actions = self.get_distribution(observations).from_noise(th.as_tensor(noise, device=self.device))
        return actions.cpu().numpy().reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    # ------------------------------------------------------------------ standardised observations

    def distribution_at(self, observations: Any) -> Any:
        """pi(. | s) at standardised observations (B, *obs)."""
        features = BasePolicy.extract_features(self, observations, self.pi_features_extractor)
        return self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(features))

    def values_at(self, observations: Any) -> th.Tensor:
        """V(s), (B,), at standardised observations (B, *obs)."""
        features = BasePolicy.extract_features(self, observations, self.vf_features_extractor)
        return self.value_net(self.mlp_extractor.forward_critic(features)).flatten()

    def _latents_at(self, observations: Any) -> tuple[th.Tensor, th.Tensor]:
        """Latent codes of policy and value; a shared features extractor is evaluated once."""
        features = BasePolicy.extract_features(self, observations, self.pi_features_extractor)
        of_value = features
        if not self.share_features_extractor:
            of_value = BasePolicy.extract_features(self, observations, self.vf_features_extractor)
        return self.mlp_extractor.forward_actor(features), self.mlp_extractor.forward_critic(of_value)

    def evaluate_at(self, observations: Any) -> tuple[Any, th.Tensor]:
        """pi(. | s) and V(s) (B,) at standardised observations (B, *obs)."""
        latent_pi, latent_vf = self._latents_at(observations)
        return self._get_action_dist_from_latent(latent_pi), self.value_net(latent_vf).flatten()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "normalize_observations": self.normalize_observations}


class ForImages(ActorCriticPolicy):
    """Mixed in before a policy: its features come from SB3's NatureCNN unless told otherwise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class ForDicts(ActorCriticPolicy):
    """Mixed in before a policy: its features are SB3's combination of those of a dict's entries."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)


class NormalizedCnnPolicy(ForImages, NormalizedActorCriticPolicy):
    """The policy for images."""


class NormalizedMultiInputPolicy(ForDicts, NormalizedActorCriticPolicy):
    """The policy for dict observations."""
