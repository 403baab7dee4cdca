"""The door: formats told from content, names, sentences for what is not known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tether.envs import DatasetError, list_datasets, load_dataset
from tether.envs.datasets import load

Make = Callable[..., dict[str, np.ndarray]]
Save = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SafetyBalRun-v0-80-940", "did you mean 'SafetyBallRun-v0-80-940'?"),
        ("OfflineBallRunn-v0", "did you mean 'OfflineBallRun-v0'?"),
        ("halfcheeta-medium-v2", "did you mean 'halfcheetah-medium-v2'?"),
        ("cube-single-plays-v0", "did you mean 'cube-single-play-v0'?"),
        ("xyz", "give a path, or a name that list_datasets() gives."),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    with pytest.raises(DatasetError) as caught:
        load_dataset(name)
    assert str(caught.value) == f"There is no data set '{name}': {words}"


def test_a_missing_file() -> None:
    with pytest.raises(DatasetError, match=r"^There is no file some/where\.hdf5: correct the path\.$"):
        load_dataset("some/where.hdf5")


@pytest.mark.parametrize("name", ["OfflineBallRun-v0", "SafetyBallRun-v0-80-940", "SafetyBallRun-v0-80-940.hdf5"])
def test_dsrl_names(transitions: Make, save_hdf5: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []

    def download(url: str, path: Path, sha256: str | None) -> Path:
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        return save_hdf5(path, transitions())

    monkeypatch.setattr(load, "download", download)
    dataset = load_dataset(name)
    assert asked == ["https://huggingface.co/datasets/YYY-45/DSRL/resolve/main/SafetyBallRun-v0-80-940.hdf5"]
    assert dataset.meta["dataset_id"] == "OfflineBallRun-v0"
    assert dataset.meta["env_id"] == "SafetyBallRun-v0"


def test_formats_that_are_none(save_hdf5: Save, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no format 'csv': use one of dsrl, d4rl, minari, ogbench, robomimic, mimic\."):
        load_dataset("anything", format="csv")
    words = {key: np.zeros(3) for key in ("observations", "actions", "terminals")}
    path = save_hdf5(tmp_path / "words.hdf5", {**words, "rewards": np.array(["a", "b", "c"], dtype="O")})
    with pytest.raises(DatasetError, match=r"words\.hdf5: 'rewards' holds object: use a file in which it is numbers"):
        load_dataset(path)
    with pytest.raises(DatasetError, match=r"a\.hdf5 has the keys images, which no format has"):
        load_dataset(save_hdf5(tmp_path / "a.hdf5", {"images": np.zeros(3)}))
    with pytest.raises(DatasetError, match=r"without Minari's metadata\.json"):
        load_dataset(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DatasetError, match=r"notes\.txt is not a whole HDF5 file"):
        load_dataset(tmp_path / "notes.txt")


def test_names_are_listed_once() -> None:
    names = [name for names in list_datasets().values() for name in names]
    assert len(set(names)) == len(names) > 200


def test_robomimic_files_of_one_name_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []

    def download(url: str, path: Path, sha256: str | None) -> Path:
        paths.append(path)
        raise DatasetError("enough")

    monkeypatch.setattr(load, "download", download)
    for name in list_datasets()["robomimic"]:
        with pytest.raises(DatasetError, match="enough"):
            load_dataset(name)
    assert len(set(paths)) == len(paths)


def test_a_missing_extra(transitions: Make, save_hdf5: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_hdf5(tmp_path / "a.hdf5", transitions())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DatasetError, match=r'a\.hdf5 needs an extra: pip install "tether-rl\[offline\]"\.$'):
        load_dataset(path)


def test_the_import_is_light() -> None:
    code = "import sys, tether.envs; print(*[name for name in ('h5py', 'minari', 'ogbench') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
