"""A cache of its own for every test, and small data to write in the formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TETHER_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def transitions() -> Callable[..., Arrays]:
    """``transitions(episodes=3, steps=5)``: DSRL's seven arrays; odd episodes end in a terminal, others in a timeout."""

    def make(episodes: int = 3, steps: int = 5, width: int = 4, seed: int = 0) -> Arrays:
        rng = np.random.default_rng(seed)
        states = rng.normal(size=(episodes, steps + 1, width)).astype(np.float32)
        last = np.arange(steps) == steps - 1
        terminals = np.array([last & (episode % 2 == 1) for episode in range(episodes)]).ravel()
        rows = episodes * steps
        return {
            "observations": states[:, :-1].reshape(rows, width),
            "next_observations": states[:, 1:].reshape(rows, width),
            "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
            "rewards": rng.normal(size=rows).astype(np.float32),
            "costs": rng.integers(0, 2, rows).astype(np.float32),
            "terminals": terminals,
            "timeouts": np.tile(last, episodes) & ~terminals,
        }

    return make


@pytest.fixture(scope="session")
def save_hdf5() -> Callable[..., Path]:
    """``save_hdf5(path, arrays, **options)``: groups are keys with slashes; options go to h5py's create_dataset."""
    h5py = pytest.importorskip("h5py")

    def save(path: Path, arrays: Arrays, **options: Any) -> Path:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array, **options)
        return path

    return save


@pytest.fixture
def kept(cache: Path) -> Callable[[], list[str]]:
    """What lies in the cache, locks aside."""
    return lambda: sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))
