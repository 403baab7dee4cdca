"""Environments for control, behind one door: `make_env` for one, `make_vec` for a Stable-Baselines3 `VecEnv`."""

import os
import sys

from .datasets import DatasetError, OfflineDataset, list_datasets, load_dataset
from .make import (
    cautious_arguments,
    clinician_of,
    collecting_arguments,
    list_envs,
    make_env,
    make_vec,
    resolve_backend,
    scoring_arguments,
    scripted_behaviours,
    unseen_arguments,
)
from .suite import EnvError

__all__ = [
    "DatasetError",
    "EnvError",
    "OfflineDataset",
    "cautious_arguments",
    "clinician_of",
    "collecting_arguments",
    "list_datasets",
    "list_envs",
    "load_dataset",
    "make_env",
    "make_vec",
    "resolve_backend",
    "scoring_arguments",
    "scripted_behaviours",
    "unseen_arguments",
]

# MuJoCo and dm_control read this once, when they are imported, and fail to render where there is no display.
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("MUJOCO_GL", "egl")
