"""Tether's agents: Stable-Baselines3 classes whose every update stays inside a trust region."""

from .bpo import BPO
from .mdpo import MDPO
from .off_policy_mdpo import OffPolicyMDPO
from .ppo import PPO
from .r2vpo import R2VPO

__all__ = ["BPO", "MDPO", "PPO", "R2VPO", "OffPolicyMDPO"]
