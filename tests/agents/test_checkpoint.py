"""The folder of checkpoints: what stays, what is written again, and what is read of older formats."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env

from tests.kit.resume import StopAt, difference, everything
from tether.agents import BPO, CheckpointCallback, CheckpointError, OffPolicyMDPO, list_checkpoints, save_checkpoint
from tether.agents.common import blocks, checkpoint
from tether.agents.common.blocks import BlockStore, rows_per_block
from tether.agents.common.checkpoint import find_checkpoint
from tether.agents.common.replay_state import read_replay_buffer, write_replay_buffer


def vec(n_envs: int = 2):
    return make_vec_env("Pendulum-v1", n_envs, seed=1)


def bpo(**kwargs):
    return BPO("MlpPolicy", vec(), n_steps=32, batch_size=32, policy_kwargs={"net_arch": [4]}, seed=1, device="cpu", **kwargs)


def mdpo(size: int = 400, **kwargs):
    return OffPolicyMDPO(
        "MlpPolicy",
        vec(),
        buffer_size=size,
        learning_starts=10**6,
        policy_kwargs={"net_arch": [4]},
        seed=1,
        device="cpu",
        **kwargs,
    )


class TestRotation:
    def test_the_newest_and_the_best_stay(self, tmp_path: Path):
        agent = bpo().learn(64)
        for score in (1.0, 7.0, 3.0, None, 2.0, 6.0):
            agent.save_checkpoint(tmp_path, keep=2, score=score)
        kept = list_checkpoints(tmp_path)
        assert [(c.number, c.manifest["score"]) for c in kept] == [(2, 7.0), (5, 2.0), (6, 6.0)]
        assert find_checkpoint(tmp_path).number == 6

    def test_without_scores_only_the_newest(self, tmp_path: Path):
        agent = bpo().learn(64)
        for _ in range(4):
            agent.save_checkpoint(tmp_path, keep=3)
        assert [c.number for c in list_checkpoints(tmp_path)] == [2, 3, 4]

    def test_one_checkpoint_can_be_named(self, tmp_path: Path):
        agent = bpo().learn(64)
        first = agent.save_checkpoint(tmp_path)
        agent.learn(64, reset_num_timesteps=False).save_checkpoint(tmp_path)
        assert BPO.load_checkpoint(first.folder, vec(), device="cpu").num_timesteps == 64
        assert BPO.load_checkpoint(tmp_path, vec(), device="cpu").num_timesteps == 128

    def test_after_a_damaged_one_numbers_go_on(self, tmp_path: Path):
        agent = bpo().learn(64)
        agent.save_checkpoint(tmp_path)
        damaged = agent.save_checkpoint(tmp_path)
        (damaged.folder / "manifest.json").write_text("{}")
        assert find_checkpoint(tmp_path).number == 1
        agent.save_checkpoint(tmp_path)
        assert [c.number for c in list_checkpoints(tmp_path)] == [1, 3]
        assert not damaged.folder.exists()

    def test_nothing_there(self, tmp_path: Path):
        assert find_checkpoint(tmp_path) is find_checkpoint(tmp_path / "nothing") is None
        with pytest.raises(CheckpointError, match="There is no checkpoint in"):
            BPO.load_checkpoint(tmp_path, vec())

    def test_arguments(self, tmp_path: Path):
        with pytest.raises(ValueError, match="keep is how many checkpoints stay: 1 or more, not 0"):
            bpo().save_checkpoint(tmp_path, keep=0)
        bpo().save_checkpoint(tmp_path, score=np.float32(1.5))
        with pytest.raises(CheckpointError, match="give env, made as the training's was"):
            BPO.load_checkpoint(tmp_path, None)
        with pytest.raises(ValueError, match="seconds between checkpoints must be above 0"):
            CheckpointCallback(tmp_path, seconds=0.0)


class TestReplay:
    """Of a large buffer only what was added is written, and every row comes back."""

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(blocks, "BLOCK", 512)

    @pytest.mark.parametrize("kwargs", [
        {}, {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
    ], ids=["whole", "half the memory"])  # fmt: skip
    def test_every_row_comes_back(self, kwargs, tmp_path: Path):
        agent = mdpo(**kwargs)
        agent._setup_learn(10**6)
        for steps in (7, 30, 1, 260, 500, 3, 390, 800):  # shorter than the buffer, around its end, longer than it
            agent.learn(steps, reset_num_timesteps=False)
            agent.save_checkpoint(tmp_path, keep=1)
            same_rows(agent, OffPolicyMDPO.load_checkpoint(tmp_path, vec(), device="cpu"))

    def test_after_a_training_that_counts_anew(self, tmp_path: Path):
        """1.5 times around: the position fits what was added, but every row is another."""
        agent = mdpo()
        for steps in (400, 600):
            agent.learn(steps)
            agent.save_checkpoint(tmp_path, keep=1)
        same_rows(agent, OffPolicyMDPO.load_checkpoint(tmp_path, vec(), device="cpu"))

    def test_only_what_was_added_is_written(self, tmp_path: Path):
        writes = []

        class Saving(CheckpointCallback):
            def _on_step(self) -> bool:
                if self.num_timesteps in (300, 320):
                    before = set((tmp_path / "blocks").glob("*")) if self.num_timesteps == 320 else set()
                    self.save()
                    writes.append(len(set((tmp_path / "blocks").glob("*")) - before))
                return True

        mdpo().learn(330, Saving(tmp_path))
        assert writes[0] > 20
        assert writes[1] < writes[0] / 3

    def test_blocks_of_removed_checkpoints_go(self, tmp_path: Path):
        agent = mdpo().learn(100)
        for _ in range(4):
            agent.learn(100, reset_num_timesteps=False)
            agent.save_checkpoint(tmp_path, keep=1)
        used = set(itertools.chain(*(c.manifest["blocks"] for c in list_checkpoints(tmp_path))))
        assert {path.stem for path in (tmp_path / "blocks").iterdir()} == used

    def test_two_folders(self, tmp_path: Path):
        agent = mdpo().learn(100)
        for folder in ("a", "b", "a", "b"):
            agent.learn(20, reset_num_timesteps=False)
            agent.save_checkpoint(tmp_path / folder, keep=1)
            same_rows(agent, OffPolicyMDPO.load_checkpoint(tmp_path / folder, vec(), device="cpu"))

    def test_a_buffer_that_writes_elsewhere(self, tmp_path: Path):
        """Of a class that we do not know every row is looked at."""

        class Relabelling(ReplayBuffer):
            pass

        agent = SAC("MlpPolicy", vec(), buffer_size=100, replay_buffer_class=Relabelling, learning_starts=10**6, device="cpu")
        agent.learn(80)
        store = BlockStore(tmp_path)
        write_replay_buffer(agent.replay_buffer, store, 40, 0)
        agent.replay_buffer.rewards[3] = 17.0
        state = write_replay_buffer(agent.replay_buffer, store, 40, 0)
        other = SAC("MlpPolicy", vec(), buffer_size=100, replay_buffer_class=Relabelling, device="cpu").replay_buffer
        read_replay_buffer(other, state, store)
        assert (other.rewards[3] == 17.0).all()

    def test_rows_per_block(self):
        assert rows_per_block(np.zeros((1000, 4), np.float32)) == 32
        assert rows_per_block(np.zeros((10, 1000))) == 1

    def test_another_size_is_refused(self, tmp_path: Path):
        mdpo().learn(100).save_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="holds rows of another shape than the buffer"):
            OffPolicyMDPO.load_checkpoint(tmp_path, vec(), device="cpu", buffer_size=20)


def same_rows(agent, loaded) -> None:
    ours, theirs = agent.replay_buffer, loaded.replay_buffer
    assert (ours.pos, ours.full) == (theirs.pos, theirs.full)
    for name, value in vars(ours).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(theirs, name)[: ours.size()], value[: ours.size()], err_msg=name)


class TestFormats:
    def test_migration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """What the next format changes is said once, as a function from this one."""
        whole = bpo().learn(128)
        bpo().learn(128, StopAt(40)).save_checkpoint(tmp_path)
        monkeypatch.setattr(checkpoint, "FORMAT", 3)
        with pytest.raises(CheckpointError, match="has format 1, and this Tether reads 3: update Tether"):
            BPO.load_checkpoint(tmp_path, vec(), device="cpu")
        seen = []

        def rename(manifest, state):
            seen.append(manifest["timesteps"])
            return manifest, state

        monkeypatch.setattr(checkpoint, "MIGRATIONS", {1: rename, 2: rename})
        agent = BPO.load_checkpoint(tmp_path, vec(), device="cpu")
        assert seen == [40, 40]
        agent.learn(128 - agent.num_timesteps, reset_num_timesteps=False)
        assert difference(everything(agent), everything(whole)) == 0.0

    def test_a_golden_checkpoint_of_format_1(self):
        folder = Path(__file__).parent / "golden" / "checkpoint"
        agent = BPO.load_checkpoint(folder, vec(), device="cpu")
        assert agent.num_timesteps == 40
        agent.learn(128 - agent.num_timesteps, reset_num_timesteps=False)
        assert agent.num_timesteps == 128


class TestCallback:
    def test_by_the_clock(self, tmp_path: Path):
        seen = []
        callback = CheckpointCallback(tmp_path, seconds=1e-6, keep=5, score=lambda: 1.0, on_save=seen.append)
        bpo().learn(192, callback)
        assert seen
        assert [c.folder for c in seen][-5:] == [c.folder for c in list_checkpoints(tmp_path)][-5:]

    def test_many_short_trainings(self, tmp_path: Path):
        callback = CheckpointCallback(tmp_path, seconds=0.05)
        agent = bpo()
        for _ in range(4):
            time.sleep(0.03)
            agent.learn(64, callback, reset_num_timesteps=False)
        assert list_checkpoints(tmp_path)

    def test_in_the_middle_of_a_long_rollout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("tether.agents.common.checkpoint_callback.PATIENCE", 0.0)
        agent = BPO("MlpPolicy", vec(), n_steps=4096, batch_size=64, device="cpu")
        agent.learn(8_192, [CheckpointCallback(tmp_path, seconds=1e-6), StopAt(8_000)])
        assert list_checkpoints(tmp_path)[-1].timesteps % 8_192

    def test_plain_sb3(self, tmp_path: Path):
        agent = SAC("MlpPolicy", vec(), buffer_size=500, learning_starts=50, policy_kwargs={"net_arch": [4]}, device="cpu")
        agent.learn(150, CheckpointCallback(tmp_path, seconds=1e-6))
        assert list_checkpoints(tmp_path)
        assert save_checkpoint(agent, tmp_path).timesteps == agent.num_timesteps
