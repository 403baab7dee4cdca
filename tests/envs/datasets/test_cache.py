"""The cache: converted once, mapped from then on, never half there."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tether.envs import DatasetError, load_dataset
from tether.envs.datasets import cache as module
from tether.envs.datasets.cache import cached, file_sha256

Make = Callable[..., dict[str, np.ndarray]]
Save = Callable[..., Path]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5_000_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"x" * 5_000_000).hexdigest()
    before = file_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_sha256(tmp_path) != before


def test_a_large_file_is_streamed_and_mapped(transitions: Make, save_hdf5: Save, tmp_path: Path) -> None:
    arrays = transitions(episodes=300, steps=1000, width=17)
    size = sum(array.nbytes for array in arrays.values())
    path = save_hdf5(tmp_path / "big.hdf5", arrays, compression="gzip", compression_opts=1)
    tracemalloc.start()
    try:
        dataset = load_dataset(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 40e6
    assert peak < size / 4
    for name, array in arrays.items():
        assert isinstance(getattr(dataset, name), np.memmap), name
        np.testing.assert_array_equal(getattr(dataset, name), array)
    assert dataset.meta["source"] == str(path)
    assert dataset.meta["sha256"] == file_sha256(path)


def test_it_is_converted_once(
    transitions: Make, save_hdf5: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Callable[[], list[str]]
) -> None:
    path = save_hdf5(tmp_path / "a.hdf5", transitions())
    first = load_dataset(path)
    monkeypatch.setattr(module, "_convert", lambda *_: pytest.fail("converted again"))
    path.rename(tmp_path / "b.hdf5")
    again = load_dataset(tmp_path / "b.hdf5")
    np.testing.assert_array_equal(first.observations, again.observations)
    assert kept() == [first.meta["sha256"]]


def _parts(broken: BaseException | None) -> Iterator[dict[str, np.ndarray]]:
    column = np.ones((2, 1), np.float32)
    flags = np.array([False, True])
    yield {"observations": column, "actions": column, "rewards": column[:, 0], "terminals": flags}
    if broken is not None:
        raise broken
    yield {"timeouts": flags, "next_observations": column}


@pytest.mark.parametrize("broken", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("else")])
def test_a_conversion_that_dies_leaves_nothing(broken: BaseException, kept: Callable[[], list[str]]) -> None:
    meta = {"format": "test", "source": "there"}
    with pytest.raises((DatasetError, KeyboardInterrupt, RuntimeError)) as caught:
        cached("0" * 64, {}, lambda: _parts(broken), meta)
    if isinstance(broken, OSError):
        assert str(caught.value).endswith("(No space left on device): make room, or set TETHER_DATA to another folder.")
    assert kept() == []
    assert len(cached("0" * 64, {}, lambda: _parts(None), meta)) == 2


def test_remains_of_a_kill_are_overwritten(cache: Path) -> None:
    meta = {"format": "test", "source": "there"}
    cached("0" * 64, {}, lambda: _parts(None), meta)
    (whole,) = (cache / ("0" * 64)).iterdir()
    whole.rename(whole.with_name(f".{whole.name}.new"))  # as a kill just before the rename leaves it
    cached("0" * 64, {}, lambda: _parts(None), meta)
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]


def test_a_damaged_cache_is_named(transitions: Make, save_hdf5: Save, tmp_path: Path, cache: Path) -> None:
    path = save_hdf5(tmp_path / "a.hdf5", transitions())
    load_dataset(path)
    (array,) = cache.glob("*/*/rewards.npy")
    array.write_bytes(array.read_bytes()[:20])
    with pytest.raises(DatasetError, match=r"rewards\.npy is damaged: remove the folder .* and load again\.$"):
        load_dataset(path)


def test_a_wrong_sha256_leaves_nothing(
    transitions: Make, save_hdf5: Save, tmp_path: Path, kept: Callable[[], list[str]]
) -> None:
    path = save_hdf5(tmp_path / "a.hdf5", transitions())
    with pytest.raises(DatasetError, match=r"a\.hdf5 has the sha256 [0-9a-f]{64} instead of 0{64}: get the right file\.$"):
        load_dataset(path, sha256="0" * 64)
    assert kept() == []
    assert path.exists()
    assert len(load_dataset(path, sha256=file_sha256(path).upper())) == 15
