"""Every agent of the library, in the smallest setting that learns; new agents are added here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gymnasium import spaces

from tether.agents import BPO, MDPO, PPO, R2VPO, OffPolicyMDPO


@dataclass(frozen=True)
class Subject:
    """An agent under test.

    :param small: arguments that make it quick
    :param learns: arguments and env steps with which it solves an identity task
    :param spaces: action spaces it supports; the others of SB3 it must refuse in words
    """

    cls: type
    small: dict[str, Any]
    learns: dict[str, Any]
    steps: int
    spaces: tuple[type[spaces.Space[Any]], ...] = field(default=(spaces.Box, spaces.Discrete))

    @property
    def name(self) -> str:
        return self.cls.__name__

    def make(self, env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
        """The agent on ``env``, small, on the CPU, seed 0 unless told otherwise."""
        return self.cls(policy, env, **{"seed": 0, "device": "cpu", **self.small, **kwargs})


ALL_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
SMALL = {"n_steps": 128, "policy_kwargs": {"net_arch": [16]}}
IDENTITY = {"n_steps": 256, "learning_rate": 3e-3, "gamma": 0.5}

SUBJECTS = [
    Subject(BPO, small=SMALL, learns={**IDENTITY, "gae_lambda": 0.5}, steps=6_000, spaces=ALL_SPACES),
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
