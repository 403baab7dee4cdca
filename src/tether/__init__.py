"""Tether: reinforcement-learning agents whose every update stays inside a trust region, as Stable-Baselines3 classes."""

__version__ = "0.1.0"
