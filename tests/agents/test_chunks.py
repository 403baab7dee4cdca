"""Chunks of actions: cut out of a small dataset by hand, and gathered step by step into a ring."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th

from tether.agents.common.chunks import ChunkMemory, Transition, chunks_of
from tether.agents.common.offline_data import OfflineData

GAMMA = 0.99


def two_episodes(rewards=(-1, -1, 0, -1, -1, -1, -1), first=4, terminals=(), reset=True):
    """Seven steps of two episodes, the first of ``first`` steps; the state counts, and starts at 100 in the second."""
    n = len(rewards)
    start = np.where(np.arange(n) < first, 0, 100 - first) if reset else np.zeros(n)
    state = (np.arange(n) + start).astype(np.float32)[:, None]
    return OfflineData({
        "observations": state, "next_observations": state + 1.0,
        "actions": (np.arange(n, dtype=np.float32) / 10.0)[:, None] * np.array([1.0, -1.0], np.float32),
        "rewards": np.array(rewards, np.float32), "terminals": np.isin(np.arange(n), terminals),
        "timeouts": np.arange(n) == first - 1 if reset else np.zeros(n, bool),
    })  # fmt: skip


def test_golden_returns():
    """r = (-1, -1, 0, -1, -1): the numbers of a chunk's sums of every length."""
    data = two_episodes((-1, -1, 0, -1, -1), first=5)
    sums = [chunks_of(data, horizon, GAMMA)["returns"][0].item() for horizon in range(1, 6)]
    assert sums == pytest.approx([-1.0, -1.99, -1.99, -2.960299, -3.920895], abs=1e-6)


def test_masks_end_with_the_episode():
    chunks = chunks_of(two_episodes(), 3, GAMMA)
    assert chunks["valid"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert chunks["next_observations"][:, 0].tolist() == [3, 4, 4, 4, 103, 103, 103]
    assert chunks["actions"][0].tolist() == pytest.approx([0.0, 0.0, 0.1, -0.1, 0.2, -0.2])
    assert (chunks["going_on"] == 1.0).all()
    assert chunks["returns"][3].item() == -1.0


def test_an_episode_may_go_on_after_its_goal():
    """Play data: the goal in the middle is terminal for the values, and what comes after does not count."""
    chunks = chunks_of(two_episodes(terminals=(2,)), 3, GAMMA)
    assert chunks["valid"].tolist()[:4] == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert chunks["going_on"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert chunks["returns"][:3].tolist() == pytest.approx([-1.99, -1.0, 0.0])


def test_a_row_follows_only_where_it_begins_where_the_last_ended():
    """Also without a timeout: the file does not say that an episode ended, its observations do."""
    data = two_episodes()
    data.timeouts.zero_()
    assert chunks_of(data, 3, GAMMA)["valid"].tolist() == chunks_of(two_episodes(), 3, GAMMA)["valid"].tolist()


def test_actions_stay_inside_the_box():
    data = two_episodes()
    data.actions.fill_(1.0)
    assert chunks_of(data, 2, GAMMA)["actions"].max().item() == pytest.approx(1.0 - 1e-5)


def memory(rows=50, horizon=3, n_envs=1):
    return ChunkMemory(rows, 1, 2, horizon, GAMMA, n_envs, th.device("cpu"))


def play(ring, data, env=0, rows=None):
    """Add a dataset's steps one by one."""
    for i in rows or range(len(data)):
        done = bool(data.timeouts[i] or data.terminals[i] or i == len(data) - 1)
        arrays = (data.observations[i].numpy(), data.actions[i].numpy(), float(data.rewards[i]), bool(data.terminals[i]))
        ring.add(env, Transition(*arrays, data.next_observations[i].numpy()), done)


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
def test_step_by_step_gives_the_same_chunks(horizon):
    """Where they are valid; and what is not valid never counts."""
    data, ring = two_episodes(terminals=(3,)), memory(horizon=horizon)
    data.timeouts[3] = 0.0
    play(ring, data)
    expected = chunks_of(data, horizon, GAMMA)
    mask = expected["valid"].repeat_interleave(2, 1)
    for name, values in expected.items():
        found = ring.arrays[name][: len(ring)]
        if name == "actions":
            values, found = values * mask, found * mask
        assert th.allclose(found, values, atol=1e-6), name
    assert len(ring) == 7


def test_environments_do_not_mix():
    data, ring = two_episodes(), memory(n_envs=2)
    for i in range(4):
        play(ring, data, 0, [i])
        if i < 3:
            play(ring, data, 1, [4 + i])
    states = ring.arrays["observations"][: len(ring), 0]
    order = states.argsort()
    assert th.equal(ring.arrays["valid"][: len(ring)][order], chunks_of(data, 3, GAMMA)["valid"])


def test_the_ring_forgets_the_oldest():
    ring = memory(rows=5)
    ring.fill({name: values[:3] for name, values in chunks_of(two_episodes(), 3, GAMMA).items()})
    play(ring, two_episodes())
    assert len(ring) == 5
    assert ring.full
    assert ring.pos == (3 + 7) % 5
    assert ring.arrays["observations"][:, 0].tolist() == [2, 3, 100, 101, 102]


def test_draws_are_uniform_over_what_there_is():
    ring = memory(rows=20)
    play(ring, two_episodes())
    ring.note_size()
    drawn = ring.draw(2, 20_000)
    assert drawn["actions"].shape == (2, 20_000, 6)
    states, counts = drawn["observations"].unique(return_counts=True)
    assert states.tolist() == [0, 1, 2, 3, 100, 101, 102]
    assert (counts / counts.sum() * 7 - 1).abs().max() < 0.05


def test_unfinished_chunks_are_kept_for_a_checkpoint():
    first, second, data = memory(), memory(), two_episodes()
    play(first, data, rows=[0, 1])
    second.restore_unfinished(first.unfinished())
    second.fill({name: values[: len(first)] for name, values in first.arrays.items()})
    for ring in (first, second):
        play(ring, data, rows=range(2, 7))
    assert all(th.equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    first.forget_unfinished()
    assert first.unfinished() == [[]]
