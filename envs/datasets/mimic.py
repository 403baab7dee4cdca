"""A user's own MIMIC-III sepsis cohort, as CSV in the columns of microsoft/mimic_sepsis, with OGSRL's states and doses.

MIMIC-III is given only to credentialed users, so nothing is downloaded, and no copy is left in the cache. Columns read:

- traj, step, o:<name> for the names in `OBSERVATIONS` and for max_dose_vaso, input_4hourly, Weight_kg and SOFA, and r:reward,
  as ``sepsis_cohort.py --process_raw`` of github.com/microsoft/mimic_sepsis (read at fce1d05) names them in
  ``sepsis_final_data_RAW_withTimes.csv`` and OGSRL's own script in ``sepsis_final_data_RAW_withTimes_continuous.csv``;
- or the same with a:max_dose_vaso, a:input_4hourly, co:Weight_kg and r:SOFA (minus the score), as ``feat_selection.ipynb`` of
  github.com/Runz96/SafeRL-OGSRL (read at 01a3168) names them in ``sepsis_final_RAW_continuous_13_weights.csv``.

Others, as m:<name> and a:action (one of 25 bins of the doses), are not read. Units are the file's: ages there are in days.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .cache import checked_sha256
from .dataset import DatasetError, OfflineDataset, as_field

OBSERVATIONS = (
    *("gender", "re_admission", "age", "mechvent", "GCS", "FiO2_1", "paO2", "PaO2_FiO2", "Total_bili"),
    *("output_4hourly", "output_total", "input_total", "SpO2"),
)
ACTIONS = ("max_dose_vaso", "input_4hourly")
# What the file may call a column; the first name that it has is taken.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "traj": ("traj",),
    "step": ("step",),
    **{name: (f"o:{name}",) for name in OBSERVATIONS},
    **{name: (f"a:{name}", f"o:{name}") for name in ACTIONS},
    "Weight_kg": ("o:Weight_kg", "co:Weight_kg"),
    "SOFA": ("o:SOFA", "r:SOFA"),
    "outcome": ("r:reward",),
}
_REWARDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "inverse_sofa": lambda sofa: 1 / np.maximum(sofa, 1),
    "sofa": lambda sofa: np.clip(-sofa, -12.5, -2.5),
}


def read(
    path: Path | str, *, sha256: str | None = None, meta: Mapping[str, Any] | None = None, reward: str = "inverse_sofa"
) -> OfflineDataset:
    """Read a table with one row per stay and step, in any order; the stays come in the order of their numbers.

    A stay of n rows gives n - 1 transitions from one row to the next; of the last row only the state and the outcome are
    used. The last transition is terminal where the last row's r:reward is 1 (survived) or -1 (died), else a timeout.

    Observations are raw. Actions are [vasopressor, IV fluid], scaled to [-1, 1] by the least and largest doses of the
    transitions, which are ``action_low`` and ``action_high``. Rewards and costs are those of the state acted in: costs are
    SpO2 < 92 % and urine < 0.5 mL/kg/h, that is output_4hourly / Weight_kg < 2 mL/kg; OGSRL's released code takes the
    urine since admission, output_total, instead.

    :param sha256: what the file must have
    :param meta: goes before what is added here: observation_names, action_names, action_low, action_high, cost_names, died
        (one bool per episode of the file: a subset does not select from it), deaths (how many are true) and dropped (how
        many stays had a single row)
    :param reward: ``inverse_sofa``, 1 / max(SOFA, 1) as in OGSRL's paper, or ``sofa``, -SOFA in [-12.5, -2.5] as in its code
    :return: held in memory
    :raises DatasetError: naming file, column and line of what is wrong; the header is line 1
    """
    if reward not in _REWARDS:
        raise DatasetError(f"There is no reward '{reward}': use one of {', '.join(_REWARDS)}.")
    path = Path(path)
    digest = checked_sha256(path, sha256)
    table, last = _stays(path)
    rows = np.flatnonzero(~last)
    if not len(rows):
        raise DatasetError(f"{path}: 'traj' has no stay of two rows or more: use a table with longer stays.")
    ends, outcome = last[rows + 1], table["outcome"][rows + 1]
    states = as_field("observations", np.stack([table[name] for name in OBSERVATIONS], axis=1))
    doses = np.stack([table[name][rows] for name in ACTIONS], axis=1)
    low, high = doses.min(axis=0), doses.max(axis=0)
    unsafe = np.stack([table["SpO2"] < 92, table["output_4hourly"] / table["Weight_kg"] < 2], axis=1)
    died = outcome[ends] < 0
    found = {
        "observation_names": list(OBSERVATIONS),
        "action_names": list(ACTIONS),
        "action_low": low.tolist(),
        "action_high": high.tolist(),
        "cost_names": ["spo2", "urine"],
        "died": died.tolist(),
        "deaths": int(died.sum()),
        "dropped": int(last.sum() - ends.sum()),
    }
    return OfflineDataset(
        observations=states[rows],
        next_observations=states[rows + 1],
        actions=as_field("actions", 2 * (doses - low) / np.where(high > low, high - low, 1) - 1),
        rewards=as_field("rewards", _REWARDS[reward](table["SOFA"][rows])),
        costs=as_field("costs", unsafe[rows]),
        terminals=ends & (outcome != 0),
        timeouts=ends & (outcome == 0),
        meta={**(meta or {}), **found, "source": str(path), "format": "mimic", "sha256": digest},
    )


def header(path: Path) -> list[str]:
    """The names in the first line of a CSV file."""
    return next(_lines(path), (1, []))[1]


def _stays(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The columns by name, each (R,) float64, sorted by stay and step, and which rows (R,) are the last of a stay."""
    table, lines, names = _table(path)
    order = np.lexsort((table["step"], table["traj"]))
    table, lines = {name: column[order] for name, column in table.items()}, lines[order]
    traj, step, outcome = table["traj"], table["step"], table["outcome"]
    last = np.append(traj[1:] != traj[:-1], True)[: len(traj)]
    after = np.append(1.0, np.where(last[:-1], 1, np.diff(step)))[: len(traj)]  # how many steps after the row before

    def refuse(name: str, wrong: np.ndarray, complaint: str) -> None:
        if wrong.any():
            row = int(np.argmax(wrong))
            place = f"{path}: '{names[name]}' is {table[name][row]:.12g} in line {lines[row]}, traj {traj[row]:.12g}"
            raise DatasetError(f"{place}, {complaint}.")

    refuse("step", after == 0, "which another line of it has too: drop one of them")
    refuse("step", after != 1, "which is not one more than the step before: put the missing row back, or drop the stay")
    raw = "use the raw table, not the normalised one"
    # The normalised tables have the same names: their z-scores are known by negative scores and weights.
    score = table["SOFA"] if names["SOFA"] == "o:SOFA" else -table["SOFA"]
    refuse("SOFA", (score < 0) | (score > 24), f"which is a score outside 0 to 24: {raw}")
    refuse("Weight_kg", table["Weight_kg"] <= 0, f"which is no weight: {raw}")
    known = np.where(last, np.isin(outcome, (-1, 0, 1)), outcome == 0)
    refuse("outcome", ~known, "where only the last step of a stay may have 1 or -1: correct it, or drop the stay")
    return {**table, "SOFA": score}, last


def _table(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, str]]:
    """The columns as they stand in the file, the line of each row, and what the file calls the columns."""
    lines = _lines(path)
    held = next(lines, (1, []))[1]
    names = {name: next((choice for choice in choices if choice in held), "") for name, choices in _COLUMNS.items()}
    for name, choices in _COLUMNS.items():
        if not names[name]:
            wanted = " or ".join(f"'{choice}'" for choice in choices)
            raise DatasetError(f"{path} has no column {wanted} in line 1: use a raw table of mimic_sepsis with it.")
    places = [(names[name], held.index(names[name])) for name in _COLUMNS]
    values, numbers = array("d"), array("q")
    for line, cells in lines:
        if len(cells) != len(held):
            raise DatasetError(f"{path} has {len(cells)} cells in line {line} under {len(held)} columns: repair the line.")
        values.extend(_number(path, name, line, cells[place]) for name, place in places)
        numbers.append(line)
    columns = np.frombuffer(values).reshape(-1, len(places)).T if values else np.zeros((len(places), 0))
    return dict(zip(_COLUMNS, columns, strict=True)), np.array(numbers, np.int64), names


def _number(path: Path, name: str, line: int, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DatasetError(f"{path}: '{name}' holds '{cell}' in line {line}: write a number there, or drop the stay.")
    return value


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every line that is not empty."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
    except (OSError, csv.Error) as error:
        raise DatasetError(f"{path} cannot be read as CSV ({error}): check the file.") from error
