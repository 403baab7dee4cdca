"""Hyper++: PPO with hyperbolic heads on a feature of bounded norm ("Understanding and improving hyperbolic deep RL",
arXiv 2512.14202, ICLR 2026).

The chain rule (its eq. 3) dL/dx_E = dL/dv dv/dx_H dx_H/dx_E has three factors, each of which can grow without bound and
break the trust region; each has its remedy here:
    dL/dv       a categorical value loss, HL-Gauss (common/value_distributions.py)
    dv/dx_H     regression on the hyperboloid instead of the Poincare ball (common/hyperbolic.py)
    dx_H/dx_E   RMS normalisation and a learned, bounded scale of the last Euclidean layer (common/embedding.py)
The equations are those of the authors' released code; of the paper itself only the abstract was read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from .common.embedding import Embedded, Embedding
from .common.flat_adam import FlatAdam
from .common.hyperbolic_heads import ValueHead, check_geometry, describe, embedding_arguments, make_head, optimizer_for
from .common.policies import NormalizedActorCriticPolicy
from .common.updates import Batch
from .common.value_distributions import value_distribution
from .ppo import PPO


class HyperPolicy(NormalizedActorCriticPolicy):
    """An actor and a critic head on one :class:`Embedding`.

    :param geometry: see :class:`HyperPPO`, as the next three
    :param poincare_head: "hyperplanes" or "points"
    :param value_loss: "hl_gauss", "two_hot" or "mse"
    :param curvature: c
    :param n_bins: of the value's histogram
    :param value_range: its ends
    :param net_arch: widths of the layers of the trunk for vectors (there are none between x_E and the heads)
    :param activation_fn: between these layers
    :param features_extractor_kwargs: of :class:`Embedding`
    :param kwargs: of SB3's ActorCriticPolicy
    """

    features_extractor: Embedding
    value_net: ValueHead  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
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
        self.value_loss, self.n_bins, self.value_range = value_loss, n_bins, tuple(value_range)
        kwargs.setdefault("features_extractor_class", Embedding)
        kwargs.setdefault("ortho_init", False)
        if not kwargs.get("share_features_extractor", True):
            raise ValueError("Actor and critic of Hyper++ share their encoder: leave share_features_extractor=True.")
        kwargs.setdefault("normalize_images", not is_image_space(observation_space))  # the embedding does it on the device
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            features_extractor_kwargs=embedding_arguments(features_extractor_kwargs or {}, curvature, net_arch, activation_fn),
            **optimizer_for(geometry, poincare_head, curvature, FlatAdam, kwargs),
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        value = value_distribution(self.value_loss, self.n_bins, self.value_range[0], self.value_range[1], 0.5)
        actions: int = self.action_net.out_features  # type: ignore[assignment]
        self.action_net = make_head(**self.heads, features=self.features_dim, outputs=actions)
        self.value_net = ValueHead(make_head(**self.heads, features=self.features_dim, outputs=value.outputs), value)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def outputs_at(self, observations: Any) -> tuple[Embedded, Any, th.Tensor]:
        """x_E, pi(. | s), and what the value loss takes (B, value.outputs), at standardised observations (B, *obs)."""
        images = self.normalize_images
        embedded = self.features_extractor.embed(preprocess_obs(observations, self.observation_space, images))
        distribution = self._get_action_dist_from_latent(embedded.x)
        return embedded, distribution, self.value_net.outputs(embedded.x).squeeze(1)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of the Euclidean encoder and of the heads."""
        encoder = list(self.features_extractor.parameters())
        own = {id(p) for p in encoder}
        return {"encoder": encoder, "head": [p for p in self.parameters() if id(p) not in own]}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("value_loss", "n_bins", "value_range")}
        # Widths and activation of the trunk are among the arguments of the embedding.
        return {**super()._get_constructor_parameters(), **self.heads, **values, "net_arch": None, "activation_fn": nn.ReLU}


class HyperCnnPolicy(HyperPolicy):
    """The policy for images, which its embedding's convolutions read."""


class HyperMultiInputPolicy(HyperPolicy):
    """The policy for dict observations: their entries side by side, images among them through a small CNN each."""


class HyperPPO(PPO):
    """PPO with hyperbolic actor and critic heads; with no argument but policy and environment, Hyper++ for ProcGen.

    ``HyperPPO("CnnPolicy", env, **HyperPPO.VARIANTS["s-rym"])`` and the like are what the paper compares it with: Hyper+S-RYM,
    the hyperbolic agent without regularisation, and Euclidean PPO. All differ from the authors' code in these points:
    advantages are computed once an iteration and not once an epoch (there only the last value's bootstrap changes); the
    scale of the rewards moves once an iteration and not at every step; logits are float32 after the head; on a GPU the
    convolutions run in bfloat16; and actions of other than discrete kinds are taken too (a box's mean is then the head's
    output; not in the paper).

    :param policy: CnnPolicy, MlpPolicy, MultiInputPolicy or a class derived from :class:`HyperPolicy`
    :param env: environment, vector environment or registered id; the paper has 64 of them
    :param learning_rate: Adam's, or a schedule of the remaining progress (1 to 0)
    :param n_steps: steps per environment and iteration
    :param batch_size: samples a gradient step; None: an eighth of the rollout, or its largest divisor below
    :param n_epochs: passes over the rollout (the paper: 2 for Hyper++, 3 for the others)
    :param gamma: discount
    :param gae_lambda: trade-off of bias and variance in the advantages
    :param clip_range: epsilon of the clipped ratio, or a schedule
    :param normalize_advantage: to mean 0 and standard deviation 1 in every minibatch
    :param ent_coef: weight of the entropy bonus
    :param vf_coef: weight of the value loss
    :param max_grad_norm: global norm to which gradients are clipped
    :param target_kl: end the update after an epoch with approx_kl > 1.5 target_kl; None: never
    :param geometry: of the heads: "hyperboloid", "poincare" or "euclidean" (linear heads)
    :param poincare_head: "hyperplanes" (Poincare++, Euclidean parameters), or "points" in the ball (S-RYM's head, with
        Riemannian Adam)
    :param regularization: of the encoder: "rms_norm" of its last layer, "spectral_norm" of every layer, or "none"
    :param scaling: of the feature: "learned", "constant" or "none", see ``common/embedding.py``
    :param activation: after the last layer, "tanh" or "relu"
    :param value_loss: "hl_gauss", "two_hot" (both 51 bins on [-10, 10]) or "mse" (half the mean square, as the authors)
    :param embedding_dim: d, the feature's dimension
    :param curvature: c of a space of curvature -c; not trained
    :param alpha: the Poincare ball of curvature -1 is used up to this radius
    :param normalize_observations: running moments of vector observations, inside the policy
    :param normalize_rewards: rewards divided by the running std of the discounted return, which the value's bins assume
    :param time_limits: "correct" bootstraps at time limits, "paper" does not
    :param compile_loss: run the loss through ``torch.compile``
    :param use_sde: not supported, must be False
    :param stats_window_size: episodes that ``rollout/ep_rew_mean`` averages
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of :class:`HyperPolicy`; ``net_arch`` gives the widths of the trunk for vectors, and
        ``features_extractor_kwargs=dict(trunk_kwargs=dict(channels=(16, 32, 32)))`` the channels of that for images
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the CPU for MlpPolicy, else the GPU where there is one
    :param _init_setup_model: build the networks at once
    :raises ValueError: for an argument outside its range, in one sentence
    """

    # What the paper compares, as arguments of this class.
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "hyper++": {},
        "hyper++-poincare": {"geometry": "poincare"},
        "s-rym": {
            "geometry": "poincare", "poincare_head": "points", "regularization": "spectral_norm", "scaling": "constant",
            "activation": "relu", "value_loss": "mse", "n_epochs": 3,
        },
        "unregularized": {
            "geometry": "poincare", "poincare_head": "points", "regularization": "none", "scaling": "none",
            "activation": "relu", "value_loss": "mse", "n_epochs": 3,
        },
        "euclidean": {
            "geometry": "euclidean", "regularization": "none", "scaling": "none", "activation": "relu",
            "value_loss": "mse", "n_epochs": 3,
        },
    }  # fmt: skip

    policy: HyperPolicy
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": HyperPolicy,
        "CnnPolicy": HyperCnnPolicy,
        "MultiInputPolicy": HyperMultiInputPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 5e-4,
        n_steps: int = 256,
        batch_size: int | None = None,
        n_epochs: int = 2,
        gamma: float = 0.999,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        normalize_advantage: bool = True,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        geometry: str = "hyperboloid",
        poincare_head: str = "hyperplanes",
        regularization: str = "rms_norm",
        scaling: str = "learned",
        activation: str = "tanh",
        value_loss: str = "hl_gauss",
        embedding_dim: int = 32,
        curvature: float = 1.0,
        alpha: float = 0.95,
        normalize_observations: bool = False,
        normalize_rewards: bool = True,
        time_limits: str = "correct",
        compile_loss: bool = False,
        use_sde: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
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
            n_steps=n_steps,
            batch_size=batch_size,  # type: ignore[arg-type]
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            target_kl=target_kl,
            normalize_observations=normalize_observations,
            normalize_rewards=normalize_rewards,
            time_limits=time_limits,
            compile_loss=compile_loss,
            use_sde=use_sde,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs={**heads, "features_extractor_kwargs": embedding, **given},
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """dL/dx_E's two sides: the encoder below it, the heads above."""
        return self.policy.parts()

    def value_loss(self, values: th.Tensor, batch: Batch) -> th.Tensor:
        """The loss of ``value_loss`` against the returns.

        :param values: outputs of the critic's head (B, value.outputs)
        """
        return self.policy.value_net.value.loss(values, batch["returns"])

    def loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """L_pi - c_e H + c_v L_V, with the clipped surrogate of PPO; beside it what the bound of x_E looks like."""
        embedded, distribution, outputs = self.policy.outputs_at(batch["observations"])
        ratio = th.exp(distribution.log_prob(batch["actions"]) - batch["old_log_prob"])
        policy_loss = self.policy_loss(ratio, self.standardized(batch["advantages"]), batch["clip_range"])
        value_loss = self.value_loss(outputs, batch)
        loss = policy_loss - self.ent_coef * distribution.entropy().mean() + self.vf_coef * value_loss
        info = {"policy_gradient_loss": policy_loss, "value_loss": value_loss, "loss": loss}
        return loss, info | describe(embedded, **self.policy.heads)

    def _record_update(self, info: dict[str, th.Tensor], batch: Batch) -> None:
        super()._record_update(info, batch)
        if math.isfinite(self.policy.features_extractor.bound):
            self.logger.record("train/embedding_norm_bound", self.policy.features_extractor.bound)
