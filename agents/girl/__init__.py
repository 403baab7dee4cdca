"""GIRL: a world model that is grounded, held in a trust region, and measured where it imagines."""

from .girl import GIRL

__all__ = ["GIRL"]
