"""A sepsis cohort's CSV table: which row a value comes from, the order of the doses, outcomes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tether.envs import DatasetError, load_dataset
from tether.envs.datasets import mimic

pd = pytest.importorskip("pandas")

# Stays in the order of the file: 7 has four rows and dies, 3 survives, 5 is a single row, 9 has no outcome.
LENGTHS = {7: 4, 3: 3, 5: 1, 9: 2}
OUTCOMES = {7: -1, 3: 1, 5: 1, 9: 0}
STATE = [
    *("o:gender", "o:re_admission", "o:age", "o:mechvent", "o:GCS", "o:FiO2_1", "o:paO2", "o:PaO2_FiO2", "o:Total_bili"),
    *("o:output_4hourly", "o:output_total", "o:input_total", "o:SpO2"),
]


def table() -> Any:
    """A table of mimic_sepsis, where a state's value k (but for oxygen and urine) is 1000 traj + 100 step + k."""
    rows = []
    for traj, steps in LENGTHS.items():
        for step in range(steps):
            rows.append(
                {
                    "traj": traj,
                    "step": step,
                    "m:presumed_onset": 7245486000.0,
                    "m:charttime": 7245400000.0 + 14400 * step,
                    "m:icustayid": 200000 + traj,
                    **{name: 1000.0 * traj + 100 * step + place for place, name in enumerate(STATE)},
                    "o:Weight_kg": 80.0,
                    "o:SOFA": 0,
                    "o:max_dose_vaso": 0.0,
                    "o:input_4hourly": 50.0,
                    "o:SpO2": 97.0,
                    "o:output_4hourly": 400.0,
                    "a:action": 24,
                    "r:reward": OUTCOMES[traj] if step == steps - 1 else 0,
                }
            )
    frame = pd.DataFrame(rows)
    seven, three, nine = (frame["traj"] == traj for traj in (7, 3, 9))
    frame.loc[seven, "o:SOFA"] = [0, 4, 16, 24]
    frame.loc[seven, "o:SpO2"] = [92.0, 91.9, 97.0, 50.0]
    frame.loc[seven, "o:output_4hourly"] = [159.0, 160.0, 400.0, 0.0]
    frame.loc[seven, "o:max_dose_vaso"] = [0.0, 0.5, 2.0, 9.0]
    frame.loc[seven, "o:input_4hourly"] = [1050.0, 550.0, 50.0, 9000.0]
    frame.loc[three, "o:SOFA"] = [2, 3, 8]
    frame.loc[three, "o:Weight_kg"] = [200.0, 201.0, 300.0]
    frame.loc[nine, "o:SOFA"] = [1, 5]
    return frame


def save(path: Path, frame: Any) -> Path:
    frame.to_csv(path, index=False)
    return path


def arrays(dataset: Any) -> dict[str, np.ndarray]:
    names = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")
    return {name: np.asarray(getattr(dataset, name)) for name in names}


def assert_equal(first: Any, second: Any) -> None:
    for name, array in arrays(first).items():
        np.testing.assert_array_equal(array, arrays(second)[name], err_msg=name)


# Transitions: stay 3 from rows 4, 5; stay 7 from rows 0, 1, 2; stay 9 from row 8; row 7 is the single one.
HERE, THERE = [4, 5, 0, 1, 2, 8], [5, 6, 1, 2, 3, 9]


def test_states_and_the_rows_they_come_from(tmp_path: Path) -> None:
    frame = table()
    dataset = load_dataset(save(tmp_path / "cohort.csv", frame))
    assert dataset.observations.dtype == np.float32
    np.testing.assert_array_equal(dataset.observations, frame[STATE].to_numpy(np.float32)[HERE])
    np.testing.assert_array_equal(dataset.next_observations, frame[STATE].to_numpy(np.float32)[THERE])
    assert dataset.observations[2].tolist() == [*range(7000, 7009), 159, 7010, 7011, 92]
    assert [f"o:{name}" for name in dataset.meta["observation_names"]] == STATE
    assert dataset.meta["format"] == "mimic"
    assert dataset.meta["source"] == str(tmp_path / "cohort.csv")
    assert len(dataset.meta["sha256"]) == 64


def test_actions_are_vasopressor_then_fluid(tmp_path: Path) -> None:
    dataset = load_dataset(save(tmp_path / "a.csv", table()))
    assert dataset.meta["action_names"] == ["max_dose_vaso", "input_4hourly"]
    assert dataset.meta["action_low"] == [0, 50]
    assert dataset.meta["action_high"] == [2, 1050], "the doses of last rows, 9 and 9000, lead nowhere"
    expected = [[-1, -1], [-1, -1], [-1, 1], [-0.5, 0], [1, -1], [-1, -1]]
    np.testing.assert_allclose(dataset.actions, expected, atol=1e-6)


def test_a_dose_that_never_changes_is_minus_one(tmp_path: Path) -> None:
    dataset = load_dataset(save(tmp_path / "a.csv", table().assign(**{"o:max_dose_vaso": 0.3})))
    assert np.asarray(dataset.actions[:, 0]).tolist() == [-1] * 6
    assert dataset.meta["action_low"][0] == dataset.meta["action_high"][0] == 0.3


def test_rewards(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", table())
    np.testing.assert_allclose(load_dataset(path).rewards, [1 / 2, 1 / 3, 1, 1 / 4, 1 / 16, 1])
    np.testing.assert_allclose(load_dataset(path, reward="sofa").rewards, [-2.5, -3, -2.5, -4, -12.5, -2.5])
    with pytest.raises(DatasetError, match=r"^There is no reward 'SOFA': use one of inverse_sofa, sofa\.$"):
        load_dataset(path, reward="SOFA")


def test_costs_are_those_of_the_state_acted_in(tmp_path: Path) -> None:
    """92 % and 2 mL/kg in 4 h are safe; the urine since admission is far beyond 2 mL/kg in every row."""
    dataset = load_dataset(save(tmp_path / "a.csv", table()))
    assert dataset.meta["cost_names"] == ["spo2", "urine"]
    expected = [[0, 0], [0, 1], [0, 1], [1, 0], [0, 0], [0, 0]]
    np.testing.assert_array_equal(dataset.costs, expected)
    frame = table().assign(**{"o:output_total": 1.0})
    np.testing.assert_array_equal(load_dataset(save(tmp_path / "b.csv", frame)).costs, expected)


def test_ends_and_outcomes(tmp_path: Path) -> None:
    dataset = load_dataset(save(tmp_path / "a.csv", table()))
    assert dataset.episodes().lengths.tolist() == [2, 3, 1]
    assert np.flatnonzero(dataset.terminals).tolist() == [1, 4]
    assert np.flatnonzero(dataset.timeouts).tolist() == [5]
    assert dataset.meta["died"] == [False, True, False]
    assert dataset.meta["deaths"] == 1
    assert dataset.meta["dropped"] == 1


def test_the_order_of_rows_and_columns_does_not_matter(tmp_path: Path) -> None:
    frame = table()
    expected = load_dataset(save(tmp_path / "a.csv", frame))
    shuffled = frame.sample(frac=1, random_state=3)[sorted(frame.columns, reverse=True)]
    assert not shuffled.index.is_monotonic_increasing
    dataset = load_dataset(save(tmp_path / "b.csv", shuffled))
    assert_equal(dataset, expected)
    assert dataset.meta["died"] == expected.meta["died"]


def test_the_names_of_ogsrl(tmp_path: Path) -> None:
    """Its reduced table has the weight, the doses and minus the score under other names."""
    frame = table()
    expected = load_dataset(save(tmp_path / "a.csv", frame))
    names = {"o:Weight_kg": "co:Weight_kg", "o:max_dose_vaso": "a:max_dose_vaso", "o:input_4hourly": "a:input_4hourly"}
    reduced = frame.assign(**{"r:SOFA": -frame["o:SOFA"].astype(np.float32)}).rename(columns=names)
    reduced = reduced[["traj", "step", *STATE, *names.values(), "r:SOFA", "r:reward"]]
    dataset = load_dataset(save(tmp_path / "b.csv", reduced))
    assert_equal(dataset, expected)
    assert dataset.meta["action_high"] == expected.meta["action_high"]
    reduced["r:SOFA"] *= -1
    with pytest.raises(DatasetError, match=r"'r:SOFA' is 2 in line 6, traj 3, which is a score outside 0 to 24"):
        load_dataset(save(tmp_path / "c.csv", reduced))


def test_a_last_row_gives_only_its_state_and_outcome(tmp_path: Path) -> None:
    frame = table()
    expected = arrays(load_dataset(save(tmp_path / "a.csv", frame)))
    poison = {name: 1e6 for name in [*STATE, "o:max_dose_vaso", "o:input_4hourly"]} | {"o:SpO2": 1.0, "o:SOFA": 24}
    frame.loc[3, list(poison)] = list(poison.values())
    found = arrays(load_dataset(save(tmp_path / "b.csv", frame)))
    assert (found["next_observations"][4] != expected["next_observations"][4]).sum() == 13
    found["next_observations"][4] = expected["next_observations"][4]
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_nothing_is_copied_to_the_cache(tmp_path: Path, kept: Callable[[], list[str]]) -> None:
    load_dataset(save(tmp_path / "a.csv", table()))
    assert kept() == []


def test_recognition(tmp_path: Path) -> None:
    frame = table()
    path = save(tmp_path / "a.csv", frame)
    assert_equal(load_dataset(path), mimic.read(path))
    assert_equal(load_dataset(path, format="mimic"), mimic.read(path))
    marked = tmp_path / "marked.CSV"
    frame.to_csv(marked, index=False, encoding="utf-8-sig")  # as spreadsheets write it
    assert_equal(load_dataset(marked), mimic.read(path))
    other = save(tmp_path / "other.csv", frame.drop(columns="o:gender"))
    with pytest.raises(DatasetError, match=r"other\.csv has not all of the columns traj, step and o:gender: use a raw table"):
        load_dataset(other)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DatasetError, match=r"empty\.csv has not all of the columns"):
        load_dataset(tmp_path / "empty.csv")
    with pytest.raises(DatasetError, match=r"^There is no file some/where\.csv: correct the path\.$"):
        load_dataset("some/where.csv")
    with pytest.raises(DatasetError, match=r"a\.csv has the sha256 \w+ instead of 00: get the right file"):
        load_dataset(path, sha256="00")


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ("o:GCS", "'o:GCS'"),
        ("r:reward", "'r:reward'"),
        ("o:SOFA", "'o:SOFA' or 'r:SOFA'"),
        ("o:Weight_kg", "'o:Weight_kg' or 'co:Weight_kg'"),
        ("o:max_dose_vaso", "'a:max_dose_vaso' or 'o:max_dose_vaso'"),
    ],
)
def test_missing_columns(tmp_path: Path, column: str, named: str) -> None:
    with pytest.raises(DatasetError) as caught:
        load_dataset(save(tmp_path / "a.csv", table().drop(columns=column)))
    advice = "use a raw table of mimic_sepsis with it"
    assert str(caught.value) == f"{tmp_path / 'a.csv'} has no column {named} in line 1: {advice}."


@pytest.mark.parametrize(("cell", "held"), [("high", "high"), (np.nan, ""), ("nan", "nan"), (np.inf, "inf")])
@pytest.mark.parametrize("column", ["o:GCS", "o:input_4hourly", "traj", "r:reward"])
def test_cells_that_are_no_number(tmp_path: Path, column: str, cell: object, held: str) -> None:
    """Row 5 stands in line 7, under the header."""
    frame = table().astype({column: object})
    frame.loc[5, column] = cell
    with pytest.raises(DatasetError) as caught:
        load_dataset(save(tmp_path / "a.csv", frame))
    wrong = f"{tmp_path / 'a.csv'}: '{column}' holds '{held}' in line 7"
    assert str(caught.value) == f"{wrong}: write a number there, or drop the stay."


def test_columns_that_are_not_read_may_be_empty(tmp_path: Path) -> None:
    assert len(load_dataset(save(tmp_path / "a.csv", table().assign(**{"m:charttime": np.nan})))) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({(5, "step"): 0}, r"'step' is 0 in line 7, traj 3, which another line of it has too: drop one of them\."),
        ({(6, "step"): 5}, r"'step' is 5 in line 8, traj 3, which is not one more than the step before: put the missing"),
        ({(1, "o:SOFA"): -0.4}, r"'o:SOFA' is -0\.4 in line 3, traj 7, which is a score outside 0 to 24: use the raw table"),
        ({(1, "o:SOFA"): 25}, r"'o:SOFA' is 25 in line 3, traj 7, which is a score outside 0 to 24"),
        ({(1, "o:Weight_kg"): 0}, r"'o:Weight_kg' is 0 in line 3, traj 7, which is no weight: use the raw table"),
        ({(1, "r:reward"): -1}, r"'r:reward' is -1 in line 3, traj 7, where only the last step of a stay may have 1 or -1"),
        ({(3, "r:reward"): 0.5}, r"'r:reward' is 0\.5 in line 5, traj 7, where only the last step of a stay may have 1 or -1"),
    ],
)
def test_rows_that_contradict(tmp_path: Path, changes: dict[tuple[int, str], float], words: str) -> None:
    frame = table().astype({"o:SOFA": float, "r:reward": float})
    for (row, column), value in changes.items():
        frame.loc[row, column] = value
    with pytest.raises(DatasetError, match=rf"a\.csv: {words}"):
        load_dataset(save(tmp_path / "a.csv", frame))


def test_lines_that_are_cut_off(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", table())
    text = path.read_text().splitlines()
    path.write_text("\n".join([*text[:3], "", text[3].rpartition(",")[0], *text[4:]]))
    columns = len(text[0].split(","))
    with pytest.raises(DatasetError, match=rf"a\.csv has {columns - 1} cells in line 5 under {columns} columns: repair the"):
        load_dataset(path)


def test_no_transition_at_all(tmp_path: Path) -> None:
    frame = table()
    for few in (frame[frame["traj"] == 5], frame[:0]):
        with pytest.raises(DatasetError, match=r"a\.csv: 'traj' has no stay of two rows or more: use a table with longer"):
            load_dataset(save(tmp_path / "a.csv", few))
