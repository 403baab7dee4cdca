"""FMQ: flow-map policies from offline to online."""

from .fmq import FMQ

__all__ = ["FMQ"]
