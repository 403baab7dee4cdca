"""Tether's agents: Stable-Baselines3 classes whose every update stays inside a trust region."""

from .mdpo import MDPO
from .off_policy_mdpo import OffPolicyMDPO

__all__ = ["MDPO", "OffPolicyMDPO"]
