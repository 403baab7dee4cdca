"""OGSRL: the agent in ogsrl.py, in the paper's order, with its networks and its world beside it."""

from .ogsrl import OGSRL

__all__ = ["OGSRL"]
