"""Environments for control, behind one door: `make_env` for one, `make_vec` for a Stable-Baselines3 `VecEnv`."""

from .make import list_envs, make_env, make_vec, resolve_backend
from .suite import EnvError

__all__ = ["EnvError", "list_envs", "make_env", "make_vec", "resolve_backend"]
