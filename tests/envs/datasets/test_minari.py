"""Minari's data sets, written by Minari's own writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from tether.envs import DatasetError, load_dataset

minari = pytest.importorskip("minari")
Kept = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def write(
    name: str,
    *,
    observation_space: gym.Space | None = None,
    action_space: gym.Space | None = None,
    infos: Callable[[int], dict[str, Any] | None] = lambda steps: None,
    lengths: tuple[int, ...] = (4, 6, 5),
    **kwargs: Any,
) -> list[Any]:
    """Three episodes, of which the second terminates, the first is truncated and the last has no end."""
    from minari.data_collector import EpisodeBuffer

    states = observation_space or spaces.Box(-np.inf, np.inf, (3,), np.float64)
    actions = action_space or spaces.Box(-1, 1, (2,), np.float32)
    states.seed(0)
    actions.seed(0)
    episodes = []
    for number, steps in enumerate(lengths):
        seen: Any = [states.sample() for _ in range(steps + 1)]
        last = np.arange(steps) == steps - 1
        if isinstance(states, spaces.Dict):
            seen = {key: np.array([one[key] for one in seen]) for key in states}
        buffer = EpisodeBuffer(
            id=number,
            observations=seen if isinstance(seen, dict) else np.array(seen),
            actions=np.array([actions.sample() for _ in range(steps)]),
            rewards=list(np.arange(steps, dtype=float)),
            terminations=list(last & (number == 1)),
            truncations=list(last & (number == 0)),
            infos=infos(steps),
        )
        episodes.append(buffer)
    minari.create_dataset_from_buffers(
        name, episodes, env="Pendulum-v1", observation_space=states, action_space=actions, **kwargs
    )
    return episodes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_read(home: Path) -> None:
    episodes = write("test/plain-v0", ref_min_score=-5.0, ref_max_score=7.5)
    dataset = load_dataset("test/plain-v0")
    observations = np.concatenate([episode.observations[:-1] for episode in episodes]).astype(np.float32)
    reached = np.concatenate([episode.observations[1:] for episode in episodes]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(dataset.observations), observations)
    np.testing.assert_array_equal(np.asarray(dataset.next_observations), reached)
    np.testing.assert_array_equal(dataset.actions, np.concatenate([episode.actions for episode in episodes]))
    assert dataset.episodes().returns.tolist() == [6, 15, 10]
    assert np.flatnonzero(dataset.terminals).tolist() == [9]
    assert np.flatnonzero(dataset.timeouts).tolist() == [3, 14]
    expected = {"env_id": "Pendulum-v1", "max_episode_steps": 200, "reference_min_return": -5.0, "format": "minari"}
    assert {key: dataset.meta[key] for key in expected} == expected
    assert "action_low" not in dataset.meta
    for path in (home / "test/plain-v0", home / "test/plain-v0/data", home / "test/plain-v0/data/main_data.hdf5"):
        assert len(load_dataset(path)) == 15


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_actions_of_other_bounds_are_rescaled() -> None:
    low, high = np.array([-2, 0], np.float32), np.array([2, 10], np.float32)
    episodes = write("test/bounds-v0", action_space=spaces.Box(low, high))
    dataset = load_dataset("test/bounds-v0")
    back = low + (dataset.actions + 1) / 2 * (high - low)
    np.testing.assert_allclose(back, np.concatenate([episode.actions for episode in episodes]), atol=1e-5)
    assert (dataset.meta["action_low"], dataset.meta["action_high"]) == ([-2, 0], [2, 10])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dict_observations_are_flattened() -> None:
    box = spaces.Box(-1, 1, (2,), np.float32)
    episodes = write("test/dict-v0", observation_space=spaces.Dict(goal=box, state=spaces.Box(-1, 1, (3,), np.float32)))
    dataset = load_dataset("test/dict-v0")
    assert dataset.observations.shape == (15, 5)
    np.testing.assert_array_equal(dataset.observations[0][:2], episodes[0].observations["goal"][0])
    np.testing.assert_array_equal(dataset.next_observations[14][2:], episodes[2].observations["state"][5])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("extra", [0, 1])
def test_costs(extra: int) -> None:
    write(f"test/costs{extra}-v0", infos=lambda steps: {"cost": np.arange(steps + extra, dtype=float)})
    dataset = load_dataset(f"test/costs{extra}-v0")
    assert np.asarray(dataset.costs)[:4].tolist() == [extra, extra + 1, extra + 2, extra + 3]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refusals(home: Path, kept: Kept) -> None:
    write("test/discrete-v0", action_space=spaces.Discrete(3))
    with pytest.raises(DatasetError, match="'actions' are Discrete: use a data set whose actions are a Box"):
        load_dataset("test/discrete-v0")
    write("test/text-v0", observation_space=spaces.Discrete(3))
    with pytest.raises(DatasetError, match="'observations' are Discrete"):
        load_dataset("test/text-v0")
    write("test/bad-v0")
    import h5py

    with h5py.File(home / "test/bad-v0/data/main_data.hdf5", "a") as file:
        file["episode_1/rewards"][2] = np.nan
    with pytest.raises(DatasetError, match=r"bad-v0: 'rewards' is not finite at row 6"):
        load_dataset("test/bad-v0")
    (home / "test/bad-v0/data/main_data.hdf5").unlink()
    with pytest.raises(DatasetError, match="is no data set that Minari reads"):
        load_dataset("test/bad-v0")
    assert kept() == []


def test_minari_cannot_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError("no route to the host.\nand a long story")

    monkeypatch.setattr(minari, "download_dataset", fail)
    with pytest.raises(DatasetError, match=r"^Minari cannot download mujoco/hopper/medium-v0 \(no route to the host\): "):
        load_dataset("mujoco/hopper/medium-v0")
