"""Damaged files: whatever was cut, flipped or overwritten, there is a sentence, no crash, and nothing is run."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env

from tests.kit.resume import StopAt
from tether.agents import MDPO, CheckpointError, ModelFileError, OffPolicyMDPO, list_checkpoints
from tether.agents.common.checkpoint import find_checkpoint

FEW, MANY = 60, 250  # damages to each of four kinds of files; MANY are a thousand in all


def damages():
    """Functions from the bytes of a file to other bytes."""
    part = st.floats(0.0, 1.0, exclude_max=True)

    def cut(at):
        return lambda data: data[: int(at * len(data))]

    def flip(at, bit):
        return lambda data: _with(data, int(at * len(data)), bytes([data[int(at * len(data))] ^ (1 << bit)]))

    def overwrite(at, content):
        return lambda data: _with(data, int(at * len(data)), content)

    def insert(at, content):
        return lambda data: data[: int(at * len(data))] + content + data[int(at * len(data)) :]

    def drop(at, length):
        return lambda data: data[: int(at * len(data))] + data[int(at * len(data)) + length :]

    def zeros(at):
        return lambda data: data[: int(at * len(data))] + bytes(len(data) - int(at * len(data)))

    some = st.binary(min_size=1, max_size=64)
    return st.one_of(
        st.builds(cut, part), st.builds(flip, part, st.integers(0, 7)), st.builds(overwrite, part, some),
        st.builds(insert, part, some), st.builds(drop, part, st.integers(1, 500)), st.builds(zeros, part),
    )  # fmt: skip


def _with(data: bytes, at: int, content: bytes) -> bytes:
    return data[:at] + content[: len(data) - at] + data[at + len(content) :]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A training with a replay buffer, stopped: one checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    agent = OffPolicyMDPO(
        "MlpPolicy", make_vec_env("Pendulum-v1", 2, seed=0), buffer_size=200, learning_starts=20, batch_size=8, seed=0,
        policy_kwargs={"net_arch": [4]}, device="cpu",
    )  # fmt: skip
    agent.learn(200, callback=StopAt(150)).save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("model") / "it.zip"
    MDPO("MlpPolicy", "Pendulum-v1", n_steps=128, policy_kwargs={"net_arch": [4]}, seed=0).learn(128).save(path)
    return path.read_bytes()


def budget(examples: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


def check_model(content: bytes, damage, folder: Path) -> None:
    damaged = damage(content)
    if damaged == content:
        return
    (folder / "it.zip").write_bytes(damaged)
    with pytest.raises(ModelFileError) as refusal:
        MDPO.load(folder / "it.zip", device="cpu")
    assert "\n" not in str(refusal.value)
    assert str(folder / "it.zip") in str(refusal.value)


def check_checkpoint(whole: Path, damage, name: str, folder: Path) -> None:
    shutil.rmtree(folder / "copy", ignore_errors=True)
    shutil.copytree(whole, folder / "copy")
    (only,) = list_checkpoints(folder / "copy")
    places = {"block": next((folder / "copy/blocks").glob("*.bin"))}
    place = places.get(name, only.folder / name)
    damaged = damage(place.read_bytes())
    if damaged == place.read_bytes():
        return
    place.write_bytes(damaged)
    if name != "block":  # these are looked at when they are read
        with pytest.raises(CheckpointError, match=r"Every checkpoint in .* is damaged"):
            find_checkpoint(folder / "copy")
    with pytest.raises(CheckpointError) as refusal:
        OffPolicyMDPO.load_checkpoint(only.folder, make_vec_env("Pendulum-v1", 2), device="cpu")
    assert "\n" not in str(refusal.value)


@given(damage=damages())
@budget(FEW)
def test_damaged_models(model: bytes, tmp_path: Path, damage):
    check_model(model, damage, tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.npz", "model.zip", "block"])
@given(damage=damages())
@budget(FEW // 4)
def test_damaged_checkpoints(checkpoints: Path, tmp_path: Path, name: str, damage):
    check_checkpoint(checkpoints, damage, name, tmp_path)


@pytest.mark.slow
@given(damage=damages())
@budget(2 * MANY)
def test_five_hundred_damaged_models(model: bytes, tmp_path: Path, damage):
    check_model(model, damage, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.npz", "model.zip", "block"])
@given(damage=damages())
@budget(2 * MANY // 5)
def test_five_hundred_damaged_checkpoints(checkpoints: Path, tmp_path: Path, name: str, damage):
    check_checkpoint(checkpoints, damage, name, tmp_path)


@given(content=st.binary(max_size=2_000))
@budget(FEW)
def test_files_that_are_anything(tmp_path: Path, content: bytes):
    (tmp_path / "it.zip").write_bytes(content)
    for trust in (False, True):
        with pytest.raises(ModelFileError, match="is not a saved model, or is damaged"):
            MDPO.load(tmp_path / "it.zip", trust=trust)


def test_a_block_of_another_buffer(checkpoints: Path, tmp_path: Path):
    """A block is known by its content, so that one in the place of another is found out."""
    shutil.copytree(checkpoints, tmp_path / "copy")
    first, second = sorted((tmp_path / "copy/blocks").glob("*.bin"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="is missing or not as it was written"):
        OffPolicyMDPO.load_checkpoint(tmp_path / "copy", make_vec_env("Pendulum-v1", 2), device="cpu")
