"""Double DQN with hyperbolic heads, as in the Atari experiments of Hyper++ (arXiv 2512.14202, ICLR 2026).

The network is Hyper++'s: a feature of bounded norm (common/embedding.py), hyperboloid regression (common/hyperbolic.py),
and for every action a histogram of values trained with HL-Gauss (common/value_distributions.py). With Q(s, a) the mean of
the histogram, the target of Double DQN (van Hasselt et al. 2016) is
    y = r + gamma (1 - done) Q_target(s', argmax_a Q(s', a)), clamped to the histogram's range.
The authors' released code takes the argmax at s instead of s'; ``next_action="current"`` does as it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn

from .common.embedding import Embedded, Embedding
from .common.finite import check_finite_info
from .common.hyperbolic_heads import ValueHead, check_geometry, describe, embedding_arguments, make_head, optimizer_for
from .common.off_policy import OffPolicyAgent
from .common.updates import mean_of, norm_of_gradients
from .common.value_distributions import CategoricalValue, ScalarValue, value_distribution

LOG_EVERY = 100  # gradient steps


class HyperQNetwork(QNetwork):
    """Q(s, .) as the means of what a head says about an :class:`Embedding`.

    :param heads: geometry, poincare_head, curvature
    :param value: what the head's outputs mean
    :param kwargs: of SB3's QNetwork
    """

    features_extractor: Embedding
    q_net: ValueHead  # type: ignore[assignment]

    def __init__(self, *, heads: dict[str, Any], value: ScalarValue | CategoricalValue, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        outputs = int(self.action_space.n) * value.outputs
        self.q_net = ValueHead(make_head(**heads, features=self.features_dim, outputs=outputs), value)

    def outputs(self, observations: PyTorchObs) -> tuple[Embedded, th.Tensor]:
        """x_E, and what the loss takes (B, A, value.outputs)."""
        embedded = self.features_extractor.embed(self.preprocess(observations))
        return embedded, self.q_net.outputs(embedded.x)

    def preprocess(self, observations: PyTorchObs) -> Any:
        """As SB3's policies do before their features extractor."""
        return self.extract_features(observations, nn.Identity())  # type: ignore[arg-type]


class HyperDDQNPolicy(DQNPolicy):
    """Online and target :class:`HyperQNetwork`.

    :param geometry: see :class:`HyperDDQN`, as the next three
    :param poincare_head: "hyperplanes" or "points"
    :param value_loss: "hl_gauss", "two_hot" or "mse"
    :param curvature: c
    :param n_bins: of the value's histogram
    :param value_range: its ends
    :param net_arch: widths of the layers of the trunk for vectors
    :param activation_fn: between these layers
    :param features_extractor_kwargs: of :class:`Embedding`
    :param kwargs: of SB3's DQNPolicy
    """

    q_net: HyperQNetwork
    q_net_target: HyperQNetwork

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        geometry: str = "hyperboloid",
        poincare_head: str = "hyperplanes",
        value_loss: str = "hl_gauss",
        curvature: float = 1.0,
        n_bins: int = 51,
        value_range: Sequence[float] = (-10.0, 10.0),
        net_arch: Sequence[int] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        features_extractor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_geometry(geometry, poincare_head, curvature)
        self.heads: dict[str, Any] = {"geometry": geometry, "poincare_head": poincare_head, "curvature": curvature}
        self.values: dict[str, Any] = {"kind": value_loss, "n_bins": n_bins, "low": value_range[0], "high": value_range[1]}
        images = is_image_space(observation_space)
        embedding = {"trunk": "nature" if images else "auto", "activation": "relu", **(features_extractor_kwargs or {})}
        kwargs.setdefault("features_extractor_class", Embedding)
        kwargs.setdefault("normalize_images", not images)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            features_extractor_kwargs=embedding_arguments(embedding, curvature, net_arch, activation_fn),
            **optimizer_for(geometry, poincare_head, curvature, th.optim.Adam, kwargs),
        )

    def make_q_net(self) -> HyperQNetwork:
        """A network with an embedding of its own."""
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        return HyperQNetwork(heads=self.heads, value=value_distribution(**self.values), **arguments).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = {"value_loss": "kind", "n_bins": "n_bins"}
        values = {name: self.values[key] for name, key in names.items()}
        value_range = (self.values["low"], self.values["high"])
        own = {**self.heads, **values, "value_range": value_range, "net_arch": None}  # widths are the embedding's
        return {**super()._get_constructor_parameters(), **own}


class HyperDDQNCnnPolicy(HyperDDQNPolicy):
    """The policy for images."""


class HyperDDQNMultiInputPolicy(HyperDDQNPolicy):
    """The policy for dict observations."""


class HyperDDQN(OffPolicyAgent, DQN):
    """Double DQN on hyperbolic heads; with no argument but policy and environment, Hyper++ for Atari.

    ``HyperDDQN("CnnPolicy", env, **HyperDDQN.VARIANTS["euclidean"])`` and ``"s-rym"`` are what the paper compares it with.
    Acting, exploration and target network are those of SB3's DQN.

    :param policy: CnnPolicy, MlpPolicy, MultiInputPolicy or a class derived from :class:`HyperDDQNPolicy`
    :param env: environment, vector environment or registered id; Discrete actions
    :param learning_rate: Adam's, or a schedule of the remaining progress (1 to 0)
    :param buffer_size: transitions in the replay buffer (with Atari's frames a million of them take 56 GB, half of it with
        ``optimize_memory_usage``)
    :param learning_starts: uniformly random env steps before the first update
    :param batch_size: transitions per update
    :param tau: of the update of the target network; 1 copies it
    :param gamma: discount
    :param train_freq: env steps between training calls
    :param gradient_steps: updates per training call
    :param replay_buffer_class: as in SB3
    :param replay_buffer_kwargs: as in SB3
    :param optimize_memory_usage: as in SB3
    :param target_update_interval: env steps between updates of the target network
    :param exploration_fraction: part of the training in which epsilon falls
    :param exploration_initial_eps: epsilon at the start
    :param exploration_final_eps: epsilon after it
    :param next_action: "next" takes a* at s' (Double DQN), "current" at s, as the authors' released code
    :param geometry: of the head: "hyperboloid", "poincare" or "euclidean" (a linear head)
    :param poincare_head: "hyperplanes", or "points" in the ball with Riemannian Adam (S-RYM)
    :param regularization: of the encoder: "rms_norm" of its last layer, "spectral_norm" of every layer, or "none"
    :param scaling: of the feature: "learned", "constant" or "none", see ``common/embedding.py``
    :param activation: after the last layer, "relu" or "tanh"
    :param value_loss: "hl_gauss", "two_hot" (both 51 bins on [-10, 10], to which targets are clamped) or "mse"
    :param embedding_dim: d, the feature's dimension
    :param curvature: c of a space of curvature -c; not trained
    :param alpha: the Poincare ball of curvature -1 is used up to this radius
    :param use_sde: not supported, must be False
    :param stats_window_size: episodes that ``rollout/ep_rew_mean`` averages
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of :class:`HyperDDQNPolicy`
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    :raises ValueError: for an argument outside its range, in one sentence
    """

    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "hyper++": {},
        "s-rym": {
            "geometry": "poincare", "poincare_head": "points", "regularization": "spectral_norm", "scaling": "constant",
            "value_loss": "mse",
        },
        "euclidean": {"geometry": "euclidean", "regularization": "none", "scaling": "none", "value_loss": "mse"},
    }  # fmt: skip

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": HyperDDQNPolicy,
        "CnnPolicy": HyperDDQNCnnPolicy,
        "MultiInputPolicy": HyperDDQNMultiInputPolicy,
    }
    policy: HyperDDQNPolicy
    q_net: HyperQNetwork
    q_net_target: HyperQNetwork

    def __init__(
        self,
        policy: str | type[HyperDDQNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 80_000,
        batch_size: int = 32,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        target_update_interval: int = 1000,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.01,
        next_action: str = "next",
        geometry: str = "hyperboloid",
        poincare_head: str = "hyperplanes",
        regularization: str = "rms_norm",
        scaling: str = "learned",
        activation: str = "relu",
        value_loss: str = "hl_gauss",
        embedding_dim: int = 512,
        curvature: float = 1.0,
        alpha: float = 0.95,
        use_sde: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if use_sde:
            raise ValueError("HyperDDQN has no state-dependent exploration (gSDE): leave use_sde=False.")
        if next_action not in ("next", "current"):
            raise ValueError(f"next_action must be 'next' (Double DQN) or 'current' (the authors' code), not {next_action!r}.")
        self.next_action = next_action
        heads = {"geometry": geometry, "poincare_head": poincare_head, "value_loss": value_loss, "curvature": curvature}
        embedding = {
            "embedding_dim": embedding_dim, "regularization": regularization, "scaling": scaling,
            "activation": activation, "alpha": alpha,
        }  # fmt: skip
        given = dict(policy_kwargs or {})
        embedding |= given.pop("features_extractor_kwargs", None) or {}
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            target_update_interval=target_update_interval,
            exploration_fraction=exploration_fraction,
            exploration_initial_eps=exploration_initial_eps,
            exploration_final_eps=exploration_final_eps,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs={**heads, "features_extractor_kwargs": embedding, **given},
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        # Copied with the target network: not only batch norm's statistics, but spectral norm's singular vectors, too.
        self.batch_norm_stats = list(self.q_net.buffers())
        self.batch_norm_stats_target = list(self.q_net_target.buffers())
        self._infos: list[dict[str, th.Tensor]] = []  # since the last log

    # ------------------------------------------------------------------ the equations

    @th.no_grad()
    def target(self, replay: Any) -> th.Tensor:
        """y = r + gamma (1 - done) Q_target(s', a*), (B,), with a* = argmax_a Q at s' (or at s, see ``next_action``)."""
        choosing = replay.next_observations if self.next_action == "next" else replay.observations
        best = self.q_net(choosing).argmax(dim=1, keepdim=True)
        following = self.q_net_target(replay.next_observations).gather(1, best)
        return (replay.rewards + self.gamma * (1.0 - replay.dones) * following).flatten()

    def loss(self, replay: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """The value loss of the taken actions' outputs against y; HL-Gauss: the cross-entropy of its histogram.

        :param replay: samples of the replay buffer
        """
        embedded, outputs = self.q_net.outputs(replay.observations)
        taken = outputs[th.arange(len(outputs), device=self.device), replay.actions.long().flatten()]
        target = self.target(replay)
        loss = self.q_net.q_net.value.loss(taken, target)
        return loss, {"loss": loss, "target_mean": target.mean(), **describe(embedded, **self.policy.heads)}

    # ------------------------------------------------------------------ training

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """``gradient_steps`` Adam steps; what they were like is logged every hundred of them."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            replay = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            loss, info = self.loss(replay)
            self._step(self.policy.optimizer, loss, info, replay._asdict())
            self._infos.append(info | self._gradient_norms())
        self._n_updates += gradient_steps
        if len(self._infos) >= LOG_EVERY:
            self._record_update(mean_of(self._infos))
            self._infos.clear()

    def _gradient_norms(self) -> dict[str, th.Tensor]:
        """dL/dx_E's two sides: norms of the gradients of the encoder below it and of the head above."""
        parts = {"encoder": self.q_net.features_extractor, "head": self.q_net.q_net}
        return {f"grad_norm_{name}": norm_of_gradients(part.parameters()) for name, part in parts.items()}

    def _record_update(self, info: dict[str, th.Tensor]) -> None:
        numbers = check_finite_info(info, self.num_timesteps)
        self._ask_guards()
        for key, value in numbers.items():
            self.logger.record(f"train/{key}", value)
        if math.isfinite(self.q_net.features_extractor.bound):
            self.logger.record("train/embedding_norm_bound", self.q_net.features_extractor.bound)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "batch_norm_stats", "batch_norm_stats_target", "_infos"]
