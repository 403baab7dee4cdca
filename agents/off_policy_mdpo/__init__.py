"""Off-policy Mirror Descent Policy Optimization."""

from .off_policy_mdpo import OffPolicyMDPO

__all__ = ["OffPolicyMDPO"]
