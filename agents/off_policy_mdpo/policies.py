"""The networks of off-policy MDPO: actor and anchor, twin critics, value and its target."""

from __future__ import annotations

import copy
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class MLP(BaseModel):
    """A head of ``n_networks`` MLPs on one features extractor: (B, features [+ actions]) -> n x (B, outputs)."""

    features_extractor: BaseFeaturesExtractor
    optimizer: th.optim.Optimizer

    def __init__(
        self, inputs: int, outputs: int, net_arch: list[int], activation_fn: type[nn.Module], n_networks: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.networks = nn.ModuleList(
            nn.Sequential(*create_mlp(inputs, outputs, net_arch, activation_fn)) for _ in range(n_networks)
        )

    def forward(self, obs: PyTorchObs, actions: th.Tensor | None = None, first: bool = False) -> list[th.Tensor]:
        """Outputs of every network, or of the first alone.

        :param actions: (B, d), joined to the features where the head was built for them
        """
        features = self.extract_features(obs, self.features_extractor)
        inputs = features if actions is None else th.cat([features, actions], dim=1)
        networks = self.networks[:1] if first else self.networks
        return [network(inputs) for network in networks]


class MDPOActor(BasePolicy):
    """Tanh-squashed diagonal Gaussian for boxes, categorical for discrete actions."""

    features_extractor: BaseFeaturesExtractor
    optimizer: th.optim.Optimizer

    def __init__(self, net_arch: list[int], features_dim: int, activation_fn: type[nn.Module], **kwargs: Any) -> None:
        super().__init__(squash_output=isinstance(kwargs["action_space"], spaces.Box), **kwargs)
        self.discrete = isinstance(self.action_space, spaces.Discrete)
        outputs = int(self.action_space.n) if self.discrete else 2 * get_action_dim(self.action_space)  # type: ignore[attr-defined]
        self.network = nn.Sequential(*create_mlp(features_dim, outputs, net_arch, activation_fn))

    def logits(self, obs: PyTorchObs) -> th.Tensor:
        """Unnormalised log-probabilities (B, n) of discrete actions."""
        return self.network(self.extract_features(obs, self.features_extractor))

    def mean_and_log_std(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """Mean and clamped log std of the Gaussian before the tanh, (B, d) each."""
        mean, log_std = self.network(self.extract_features(obs, self.features_extractor)).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self.discrete:
            logits = self.logits(observation)
            return logits.argmax(-1) if deterministic else th.distributions.Categorical(logits=logits).sample()
        mean, log_std = self.mean_and_log_std(observation)
        return th.tanh(mean if deterministic else mean + log_std.exp() * th.randn_like(mean))


class OffPolicyMDPOPolicy(BasePolicy):
    """Actor, its anchor pi_k, twin critics, value network and its target; every MLP 256-256 ReLU.

    :param net_arch: hidden units of every network
    :param activation_fn: between the layers
    :param features_extractor_class: each network has its own extractor
    :param glorot_init: Glorot-uniform weights and zero biases, TensorFlow's default, which the authors' runs had
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        glorot_init: bool = True,
    ) -> None:
        if optimizer_class is th.optim.Adam:
            optimizer_kwargs = {"fused": True, **(optimizer_kwargs or {})}
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
            normalize_images=normalize_images,
        )
        self.net_arch = net_arch if net_arch is not None else [256, 256]
        self.activation_fn = activation_fn
        self.glorot_init = glorot_init
        discrete = isinstance(action_space, spaces.Discrete)
        actions = int(action_space.n) if discrete else get_action_dim(action_space)  # type: ignore[attr-defined]

        self.actor = self._make_actor()
        self.critic = self._make_mlp(0, actions, 2) if discrete else self._make_mlp(actions, 1, 2)
        self.value = self._make_mlp(0, 1, 1)
        if glorot_init:
            self.apply(_glorot)
        self.anchor = copy.deepcopy(self.actor).requires_grad_(False)
        self.value_target = copy.deepcopy(self.value).requires_grad_(False)

        critics = [*self.critic.parameters(), *self.value.parameters()]
        rate = lr_schedule(1)
        self.actor.optimizer = optimizer_class(self.actor.parameters(), lr=rate, **self.optimizer_kwargs)  # type: ignore[call-arg]
        self.critic.optimizer = optimizer_class(critics, lr=rate, **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _part(self) -> dict[str, Any]:
        extractor = self.make_features_extractor()
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "features_extractor": extractor,
            "normalize_images": self.normalize_images,
        }

    def _make_actor(self) -> MDPOActor:
        part = self._part()
        return MDPOActor(self.net_arch, part["features_extractor"].features_dim, self.activation_fn, **part)

    def _make_mlp(self, extra_inputs: int, outputs: int, n_networks: int) -> MLP:
        part = self._part()
        inputs = part["features_extractor"].features_dim + extra_inputs
        return MLP(inputs, outputs, self.net_arch, self.activation_fn, n_networks, **part)

    def sync_anchor(self) -> None:
        """pi_k <- pi."""
        self.anchor.load_state_dict(self.actor.state_dict())

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.actor._predict(observation, deterministic)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "net_arch": self.net_arch,
            "activation_fn": self.activation_fn,
            "lr_schedule": self._dummy_schedule,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            "features_extractor_class": self.features_extractor_class,
            "features_extractor_kwargs": self.features_extractor_kwargs,
            "glorot_init": self.glorot_init,
        }


def _glorot(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class OffPolicyMDPOCnnPolicy(OffPolicyMDPOPolicy):
    """The policy for images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class OffPolicyMDPOMultiInputPolicy(OffPolicyMDPOPolicy):
    """The policy for dict observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
