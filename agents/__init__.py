"""Tether's agents: Stable-Baselines3 classes whose every update stays inside a trust region."""

from .mdpo import MDPO

__all__ = ["MDPO"]
