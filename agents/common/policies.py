"""SB3's actor-critic policy with an observation normaliser inside, so that ``predict`` always takes raw observations."""

from __future__ import annotations

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from .normalization import RunningMoments

OBSERVATION_CLIP = 10.0


def is_vector(space: spaces.Space[Any]) -> bool:
    """Whether observations are plain float vectors (images, dicts and discrete spaces are not)."""
    return isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"


class NormalizedActorCriticPolicy(ActorCriticPolicy):
    """:class:`ActorCriticPolicy` whose networks see (observation - mean) / std, clipped to +-10.

    Mean and variance are buffers of the policy: they are saved, loaded and moved with the weights.

    :param normalize_observations: keep moments and use them; ignored unless observations are float vectors
    :param args: as in :class:`ActorCriticPolicy`
    :param kwargs: as in :class:`ActorCriticPolicy`
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
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        shape = self.observation_space.shape or ()
        self.moments = RunningMoments(shape) if self.normalize_observations else None
        super()._build(lr_schedule)

    def update_moments(self, observations: PyTorchObs) -> None:
        """Merge raw observations (B, o) into the normaliser; nothing happens where there is none."""
        if self.moments is not None:
            self.moments.update(observations)  # type: ignore[arg-type]

    def _normalize(self, obs: PyTorchObs) -> PyTorchObs:
        return obs if self.moments is None else self.moments.standardize(obs, OBSERVATION_CLIP)  # type: ignore[arg-type]

    # The three doors through which SB3's policy reads observations. (get_distribution and predict_values call the
    # base class's extract_features past this class, hence not one door.)
    def extract_features(  # type: ignore[override]
        self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor | None = None
    ) -> th.Tensor | tuple[th.Tensor, th.Tensor]:
        return super().extract_features(self._normalize(obs), features_extractor)

    def get_distribution(self, obs: PyTorchObs) -> Any:
        return super().get_distribution(self._normalize(obs))

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        return super().predict_values(self._normalize(obs))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "normalize_observations": self.normalize_observations}
