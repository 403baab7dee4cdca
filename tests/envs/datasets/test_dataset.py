"""`OfflineDataset`: what it checks, its episodes, its subsets; `Rows` as plain indexing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tether.envs import DatasetError, OfflineDataset
from tether.envs.datasets import dataset as module
from tether.envs.datasets.rows import Rows

Make = Callable[..., dict[str, np.ndarray]]


def change(arrays: dict[str, np.ndarray], name: str, row: int, value: Any) -> None:
    arrays[name] = arrays[name].copy()
    arrays[name][row] = value


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["observations", "next_observations", "actions", "rewards", "costs"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("block", [1, module.BLOCK])
def test_not_finite(transitions: Make, monkeypatch: pytest.MonkeyPatch, name: str, value: float, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    arrays = transitions()
    change(arrays, name, 7, value)
    change(arrays, name, 9, value)
    with pytest.raises(DatasetError, match=rf"^somewhere\.hdf5: '{name}' is not finite at row 7: repair or drop it\.$"):
        OfflineDataset(**arrays, meta={"source": "somewhere.hdf5"})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("actions", 1.01, r"'actions' leaves \[-1, 1\] at row 3"),
        ("actions", -1.01, r"'actions' leaves \[-1, 1\] at row 3"),
        ("costs", -0.5, "'costs' is negative at row 3"),
    ],
)
def test_out_of_range(transitions: Make, name: str, value: float, words: str) -> None:
    arrays = transitions()
    change(arrays, name, 3, value)
    with pytest.raises(DatasetError, match=words):
        OfflineDataset(**arrays)


def test_actions_may_pass_one_by_rounding(transitions: Make) -> None:
    arrays = transitions()
    change(arrays, "actions", 3, 1 + 5e-6)
    assert len(OfflineDataset(**arrays)) == 15


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"costs": np.zeros(14, np.float32)}, "'costs' has 14 rows where 'rewards' has 15"),
        ({"rewards": np.zeros(0, np.float32)}, "'observations' has 15 rows where 'rewards' has 0"),
        ({"actions": np.zeros(15, np.float32)}, r"'actions' has the shape \(15,\): it must be \(N, d\)"),
        ({"observations": np.zeros((15, 4))}, "'observations' is float64: cast it to float32 or uint8"),
        ({"terminals": np.zeros(15, np.float32)}, "'terminals' is float32: cast it to bool"),
        ({"next_observations": np.zeros((15, 3), np.float32)}, "'next_observations' is float32"),
        ({"costs": np.zeros((15, 2), np.float32)}, r"'costs' has 2 columns: name each of them in meta\['cost_names'\]"),
        (dict.fromkeys(["terminals", "timeouts"], np.zeros(15, bool)), "'terminals' and 'timeouts' end no episode in rows 0"),
    ],
)
def test_forms(transitions: Make, changes: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        OfflineDataset(**{**transitions(), **changes})


def test_no_rows(transitions: Make) -> None:
    with pytest.raises(DatasetError, match="'rewards' has no rows"):
        OfflineDataset(**{name: array[:0] for name, array in transitions().items()})


def test_images_are_accepted(transitions: Make) -> None:
    images = np.zeros((15, 3, 8, 8), np.uint8)
    dataset = OfflineDataset(**{**transitions(), "observations": images, "next_observations": images})
    assert dataset.observations.dtype == np.uint8


# ---------------------------------------------------------------------- episodes


def test_a_tail_is_cut_in_a_copy(transitions: Make) -> None:
    arrays = {name: array[:13] for name, array in transitions().items()}
    dataset = OfflineDataset(**arrays)
    assert dataset.timeouts[-1]
    assert not arrays["timeouts"][-1]
    assert dataset.episodes().lengths.tolist() == [5, 5, 3]


def test_episodes(transitions: Make) -> None:
    dataset = OfflineDataset(**transitions())
    assert dataset.episode_starts.tolist() == [0, 5, 10]
    assert dataset.episode_ends.tolist() == [4, 9, 14]
    returns, costs, lengths = dataset.episodes()
    assert costs is not None
    for number, (start, stop) in enumerate([(0, 5), (5, 10), (10, 15)]):
        assert returns[number] == pytest.approx(dataset.rewards[start:stop].sum())
        assert costs[number] == np.asarray(dataset.costs)[start:stop].sum()
    assert lengths.tolist() == [5, 5, 5]


def test_several_costs(transitions: Make) -> None:
    arrays = transitions()
    arrays["costs"] = np.stack([arrays["costs"], 2 * arrays["costs"]], axis=1)
    dataset = OfflineDataset(**arrays, meta={"cost_names": ["heat", "force"]})
    costs = dataset.episodes().costs
    assert costs is not None
    np.testing.assert_array_equal(costs[:, 1], 2 * costs[:, 0])
    assert dataset.unsafe_transitions == int((arrays["costs"][:, 0] > 0).sum())


def test_unsafe_transitions(transitions: Make) -> None:
    arrays = transitions()
    costs = arrays.pop("costs")
    assert OfflineDataset(**arrays).unsafe_transitions is None
    assert OfflineDataset(**arrays, costs=costs).unsafe_transitions == int(costs.sum())
    assert OfflineDataset(**arrays, constraint_values=2 * costs - 1).unsafe_transitions == int(costs.sum())


def test_select_cuts_where_rows_are_left_out(transitions: Make) -> None:
    dataset = OfflineDataset(**transitions(), meta={"env_id": "here"})
    chosen = dataset.select([2, 3, 6, 7, 9, 12])
    assert chosen.timeouts.tolist() == [False, True, False, True, False, True]
    assert chosen.terminals.tolist() == [False, False, False, False, True, False]
    np.testing.assert_array_equal(chosen.actions, dataset.actions[[2, 3, 6, 7, 9, 12]])
    assert chosen.meta == dataset.meta
    assert len(dataset.select(dataset.rewards > 0)) == int((dataset.rewards > 0).sum())


def test_select_whole_episodes(transitions: Make) -> None:
    dataset = OfflineDataset(**transitions())
    chosen = dataset.select_episodes([2, 0])
    np.testing.assert_array_equal(chosen.rewards, np.concatenate([dataset.rewards[10:], dataset.rewards[:5]]))
    np.testing.assert_allclose(chosen.episodes().returns, dataset.episodes().returns[[2, 0]])
    assert chosen.episodes().lengths.tolist() == [5, 5]


@given(st.lists(st.sampled_from(["", "terminal", "timeout"]), min_size=1, max_size=40).filter(any), st.integers(0, 2**32 - 1))
def test_episode_sums_are_those_of_a_loop(kinds: list[str], seed: int) -> None:
    n = len(kinds)
    rewards = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    states = np.zeros((n, 1), np.float32)
    terminals, timeouts = (np.array([kind == which for kind in kinds]) for which in ("terminal", "timeout"))
    dataset = OfflineDataset(states, np.zeros((n, 1), np.float32), rewards, terminals, timeouts, states)
    sums, total = [], 0.0
    for row in range(n):
        total += float(rewards[row])
        if kinds[row] or row == n - 1:
            sums.append(total)
            total = 0.0
    np.testing.assert_allclose(dataset.episodes().returns, sums)
    assert dataset.episodes().lengths.sum() == n


# ---------------------------------------------------------------------- rows


@given(st.data())
def test_rows_are_plain_indexing(data: st.DataObject) -> None:
    array = data.draw(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5), elements=st.just(0)))
    array[...] = np.arange(array.size).reshape(array.shape)
    index = data.draw(hnp.arrays(np.int64, st.integers(1, 8), elements=st.integers(0, len(array) - 1)))
    rows, plain = Rows(array, index), array[index]
    assert (rows.shape, rows.dtype, rows.ndim, len(rows)) == (plain.shape, plain.dtype, plain.ndim, len(plain))
    keys = [
        data.draw(st.integers(-len(index), len(index) - 1)),
        data.draw(st.slices(len(index))),
        data.draw(hnp.arrays(np.int64, 3, elements=st.integers(0, len(index) - 1))),
        data.draw(hnp.arrays(bool, len(index))),
    ]
    for key in keys:
        np.testing.assert_array_equal(rows[key], plain[key])
    np.testing.assert_array_equal(np.asarray(rows), plain)
    assert np.asarray(rows, dtype=np.float64).dtype == np.float64


def test_rows_serve_as_next_observations(transitions: Make) -> None:
    arrays = transitions()
    base = np.concatenate([arrays["observations"], arrays["next_observations"][-1:]])
    index = np.arange(15)
    dataset = OfflineDataset(**{**arrays, "observations": Rows(base, index), "next_observations": Rows(base, index + 1)})
    np.testing.assert_array_equal(dataset.select([3]).next_observations, base[4:5])
