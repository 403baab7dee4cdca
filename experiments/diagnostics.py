"""What training logged about its trust region, thinned, beside the evaluations of an exported run."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .manifest import write_atomically

STEP = "time/total_timesteps"
KEYS = (
    "approx_kl", "clip_fraction", "trust_region", "trust_region_bound", "embedding_norm", "embedding_norm_max",
    "embedding_norm_bound", "gate", "gate_std", "conformal_factor", "conformal_factor_max",
    "grad_norm_encoder", "grad_norm_head", "entropy_loss", "explained_variance", "beta", "information_gain",
    "performance_loss", "decoder_loss", "reward_loss",
)  # fmt: skip
MARKS = ("approx_kl", "trust_region")  # a row without them is of something else
ROWS = 200  # of an exported file; a maximum is that of the rows it stands for, everything else their mean

Series = dict[str, NDArray[np.float64]]


def read_diagnostics(place: Path) -> Series:
    """What a run logged about its trust region, (T,) each, with ``timesteps``; empty where it logged nothing.

    :param place: a run's folder, or the CSV of an exported run
    """
    if place.suffix == ".csv":
        return _columns(place.with_suffix(".diagnostics.csv"), "timesteps", "")
    return _columns(place / "progress.csv", STEP, "train/")


def export_diagnostics(folder: Path, target: Path) -> None:
    """Write the diagnostics of a run's folder beside its exported CSV ``target``, at most :data:`ROWS` rows."""
    series = read_diagnostics(folder)
    if not series:
        return
    thin = _thinned(series)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(thin)
    for row in zip(*thin.values(), strict=True):
        writer.writerow([f"{row[0]:.0f}", *(f"{value:.6g}" for value in row[1:])])
    write_atomically(target.with_suffix(".diagnostics.csv"), text.getvalue())


def _columns(path: Path, step: str, prefix: str) -> Series:
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(step) and any(row.get(prefix + key) for key in MARKS)]
    if not rows:
        return {}
    known = [key for key in KEYS if any(row.get(prefix + key) for row in rows)]
    numbers = {key: np.array([float(row.get(prefix + key) or "nan") for row in rows]) for key in known}
    return {"timesteps": np.array([float(row[step]) for row in rows]), **numbers}


def _thinned(series: Series) -> Series:
    """Blocks of rows as one row each: their last step, the largest of what ends in ``_max``, the mean of the rest."""
    steps = series["timesteps"]
    blocks = np.array_split(np.arange(len(steps)), min(len(steps), ROWS))
    thin = {"timesteps": np.array([steps[block[-1]] for block in blocks])}
    for key, values in series.items():
        if key != "timesteps":
            together = np.max if key.endswith("_max") else np.mean
            thin[key] = np.array([together(values[block]) for block in blocks])
    return thin
