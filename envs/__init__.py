"""Environments for control, behind one door: `make_env` for one, `make_vec` for a Stable-Baselines3 `VecEnv`."""

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
from .offscreen import choose_renderer
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

choose_renderer()
