"""The agents that the command line knows: ours, and the peers that run through the same harness."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .errors import UsageError, nearest

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

OURS = {
    "BPO": "tether.agents:BPO",
    "DreamerV3": "tether.agents:GIRL",
    "GIRL": "tether.agents:GIRL",
    "GIRL-Distill": "tether.agents:GIRL",
    "GIRL-FixedBeta": "tether.agents:GIRL",
    "GIRL-NoGrounding": "tether.agents:GIRL",
    "HyperDDQN": "tether.agents:HyperDDQN",
    "HyperDDQN-SRYM": "tether.agents:HyperDDQN",
    "HyperDDQN-Euclidean": "tether.agents:HyperDDQN",
    "HyperPPO": "tether.agents:HyperPPO",
    "HyperPPO-Poincare": "tether.agents:HyperPPO",
    "HyperPPO-SRYM": "tether.agents:HyperPPO",
    "HyperPPO-Unregularized": "tether.agents:HyperPPO",
    "HyperPPO-Euclidean": "tether.agents:HyperPPO",
    "MDPO": "tether.agents:MDPO",
    "OffPolicyMDPO": "tether.agents:OffPolicyMDPO",
    "PPO": "tether.agents:PPO",
    "R2VPO": "tether.agents:R2VPO",
}
OFFLINE_TO_ONLINE = {
    "FMQ": "tether.agents:FMQ",
    "FQL": "tether.agents:FQL",
    "MVP": "tether.agents:MVP",
    "QC": "tether.agents:QC",
}  # these learn from a dataset first, and from their environment where --online-steps asks for it
OFFLINE = OFFLINE_TO_ONLINE | {
    "BC": "tether.agents:BC",
    "BC-Safe": "tether.agents:BC",
    "BCQLag": "tether.agents:BCQLag",
    "CCQL": "tether.agents:CQL",
    "CPQ": "tether.agents:CPQ",
    "CQL": "tether.agents:CQL",
    "FISOR": "tether.agents:FISOR",
    "FlowBC": "tether.agents:FlowBC",
    "GCCQL": "tether.agents:CQL",
    "GCQL": "tether.agents:CQL",
    "GMB-TRPO": "tether.agents:OGSRL",
    "IQL": "tether.agents:IQL",
    "MB-CPO": "tether.agents:OGSRL",
    "MB-TRPO": "tether.agents:OGSRL",
    "OGSRL": "tether.agents:OGSRL",
    "OGSRL-Absorb": "tether.agents:OGSRL",
    "PRDC": "tether.agents:PRDC",
    "TD3BC": "tether.agents:TD3BC",
}  # these learn from a dataset
OURS |= OFFLINE
PEERS = {
    "SB3-PPO": "stable_baselines3:PPO",
    "SAC": "stable_baselines3:SAC",
    "TD3": "stable_baselines3:TD3",
    "DQN": "stable_baselines3:DQN",
    "TRPO": "sb3_contrib:TRPO",
    "CrossQ": "sb3_contrib:CrossQ",
    "TQC": "sb3_contrib:TQC",
}
AGENTS = OURS | PEERS
TAKE_DATASETS = {*OFFLINE, "SAC", "TD3", "CrossQ", "TQC"}  # these peers begin with a dataset in their replay buffer

# Names of a class with other arguments: they have its presets, and over these an entry of its VARIANTS.
VARIANTS = {
    "BC-Safe": ("BC", "safe"),
    "CCQL": ("CQL", "resampled"),
    "DreamerV3": ("GIRL", "dreamerv3"),
    "GCCQL": ("CQL", "guarded-resampled"),
    "GCQL": ("CQL", "guarded"),
    "GIRL-Distill": ("GIRL", "distill"),
    "GIRL-FixedBeta": ("GIRL", "fixed-beta"),
    "GIRL-NoGrounding": ("GIRL", "no-grounding"),
    "GMB-TRPO": ("OGSRL", "gmb-trpo"),
    "MB-CPO": ("OGSRL", "mb-cpo"),
    "MB-TRPO": ("OGSRL", "mb-trpo"),
    "OGSRL-Absorb": ("OGSRL", "absorb"),
    "HyperDDQN-SRYM": ("HyperDDQN", "s-rym"),
    "HyperDDQN-Euclidean": ("HyperDDQN", "euclidean"),
    "HyperPPO-Poincare": ("HyperPPO", "hyper++-poincare"),
    "HyperPPO-SRYM": ("HyperPPO", "s-rym"),
    "HyperPPO-Unregularized": ("HyperPPO", "unregularized"),
    "HyperPPO-Euclidean": ("HyperPPO", "euclidean"),
}


def canonical_name(name: str) -> str:
    """The agent's name in its own spelling; case does not matter.

    :raises UsageError: with the nearest right name
    """
    by_lower = {known.lower(): known for known in AGENTS}
    if name.lower() not in by_lower:
        raise UsageError(f"There is no agent '{name}'.{nearest(name, AGENTS)} `tether list agents` shows them all.")
    return by_lower[name.lower()]


def agent_class(name: str) -> type[BaseAlgorithm]:
    """The class of an agent; imported only here, so that listing stays quick."""
    module, attribute = AGENTS[canonical_name(name)].split(":")
    return getattr(importlib.import_module(module), attribute)
