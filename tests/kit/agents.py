"""Every agent of the library, in the smallest setting that learns; new agents are added here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from tests.kit.worlds import VecThreeActions
from tether.agents import BPO, GIRL, MDPO, PPO, R2VPO, HyperDDQN, HyperPPO, OffPolicyMDPO


@dataclass(frozen=True)
class Subject:
    """An agent under test.

    :param small: arguments that make it quick
    :param learns: arguments and env steps with which it solves an identity task
    :param spaces: action spaces it supports; the others of SB3 it must refuse in words
    :param tiny: arguments that make its files small
    :param score: mean return of 10 with which the identity task counts as solved; of the box, world models make a coarse
        picture
    :param activations: whether its policy takes ``net_arch`` and ``activation_fn``
    :param trust_region: whether it has one, and so logs its size and bound
    """

    cls: type
    small: dict[str, Any]
    learns: dict[str, Any]
    steps: int
    spaces: tuple[type[spaces.Space[Any]], ...] = field(default=(spaces.Box, spaces.Discrete))
    trust_region: bool = True
    activations: bool = True
    tiny: dict[str, Any] = field(default_factory=lambda: {"policy_kwargs": {"net_arch": [4]}})
    score: float = 8.0

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def discrete(self) -> bool:
        """Whether it takes no boxes as actions."""
        return spaces.Box not in self.spaces

    @property
    def world(self) -> str:
        """An id of Pendulum with actions that it takes."""
        return "KitTest/ThreeTorques-v0" if self.discrete else "Pendulum-v1"

    def make(self, env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
        """The agent on ``env``, small, on the CPU, seed 0 unless told otherwise."""
        if self.discrete and isinstance(env, VecEnv) and isinstance(env.action_space, spaces.Box):
            env = VecThreeActions(env)
        return self.cls(policy, env, **{"seed": 0, "device": "cpu", **self.small, **kwargs})


ALL_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
SMALL = {"n_steps": 128, "policy_kwargs": {"net_arch": [16]}}
WORLD = {
    "size": "small", "deter": 16, "hidden": 16, "variables": 4, "classes": 4, "units": 16, "encoder_layers": 1,
    "encoder_units": 16, "ensemble_units": 16, "cnn_depth": 2,
}  # fmt: skip
IDENTITY = {"n_steps": 256, "learning_rate": 3e-3, "gamma": 0.5}

SUBJECTS = [
    Subject(BPO, small=SMALL, learns={**IDENTITY, "gae_lambda": 0.5}, steps=6_000, spaces=ALL_SPACES),
    Subject(
        HyperPPO,
        small={"n_steps": 128, "policy_kwargs": {"net_arch": [16]}},
        learns={"n_steps": 256, "learning_rate": 3e-3, "gamma": 0.5, "n_epochs": 10},
        steps=6_000,
        spaces=ALL_SPACES,
    ),
    Subject(
        HyperDDQN,
        small={
            "buffer_size": 2_000,
            "learning_starts": 60,
            "batch_size": 32,
            "target_update_interval": 60,
            "embedding_dim": 8,
            "policy_kwargs": {"net_arch": [16]},
        },
        learns={
            "learning_starts": 200,
            "learning_rate": 3e-3,
            "gamma": 0.5,
            "train_freq": 1,
            "batch_size": 64,
            "exploration_fraction": 0.5,
        },
        steps=1_500,
        spaces=(spaces.Discrete,),
        trust_region=False,
    ),
    Subject(
        GIRL,
        small={
            "buffer_size": 2_000,
            "learning_starts": 60,
            "pretrain_updates": 2,
            "batch_size": 4,
            "batch_length": 8,
            "train_ratio": 4.0,
            "horizon": 3,
            "encoder_updates": 5,
            "warmup_steps": 100,
            "radius_interval": 5,
            "policy_kwargs": WORLD,
        },
        learns={
            "learning_starts": 200,
            "pretrain_updates": 50,
            "learning_rate": 6e-3,
            "behaviour_learning_rate": 6e-3,
            "gamma": 0.5,
            "batch_size": 8,
            "batch_length": 16,
            "train_ratio": 128.0,
            "horizon": 3,
        },
        steps=1_500,
        activations=False,
        tiny={"grounding": None, "policy_kwargs": {**WORLD, "deter": 4, "hidden": 4, "units": 4, "encoder_units": 4}},
        score=6.5,
    ),
    Subject(PPO, small=SMALL, learns=IDENTITY, steps=6_000, spaces=ALL_SPACES),
    Subject(R2VPO, small=SMALL, learns={**IDENTITY, "delta": 0.1}, steps=6_000, spaces=ALL_SPACES),
    Subject(
        MDPO,
        small=SMALL,
        learns={"n_steps": 256, "policy_steps": 20, "learning_rate": 3e-3, "step_size": 1.0, "gamma": 0.5},
        steps=6_000,
        spaces=ALL_SPACES,
    ),
    Subject(
        OffPolicyMDPO,
        small={"buffer_size": 2_000, "learning_starts": 60, "batch_size": 32, "policy_kwargs": {"net_arch": [16]}},
        learns={
            "learning_starts": 200,
            "learning_rate": 3e-3,
            "gamma": 0.5,
            "ent_coef": 0.05,
            "anchor_interval": 100,
            "batch_size": 64,
        },
        steps=1_000,
    ),
]
