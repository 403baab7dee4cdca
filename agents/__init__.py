"""Tether's agents: Stable-Baselines3 classes whose every update stays inside a trust region."""

from .mdpo import MDPO
from .off_policy_mdpo import OffPolicyMDPO
from .ppo import PPO

__all__ = ["MDPO", "PPO", "OffPolicyMDPO"]
