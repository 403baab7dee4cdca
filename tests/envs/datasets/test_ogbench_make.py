"""OGBench's data as the suite makes them: their format, their rewards, and that an episode follows from its seed alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tether.envs import DatasetError, load_dataset, make_env
from tether.envs.datasets import ogbench
from tether.envs.datasets import ogbench_make as module
from tether.envs.datasets.ogbench_make import Generator, recipe

package = pytest.importorskip("ogbench")


def short(name: str, length: int = 61, walker=None) -> Generator:
    """A generator of short episodes."""
    return Generator(replace(recipe(name), length=length), walker)


def walk_straight(observation: np.ndarray) -> np.ndarray:
    return np.tile(observation[-2:], 4)


SHAPES = {
    "cube-single-play-v0": (28, 5, 21, 20, None), "cube-double-noisy-v0": (37, 5, 28, 26, None),
    "cube-triple-play-v0": (46, 5, 35, 32, None), "scene-noisy-v0": (40, 5, 25, 24, 2),
    "puzzle-3x3-play-v0": (55, 5, 23, 23, 9), "puzzle-3x3-noisy-v0": (55, 5, 23, 23, 9),
    "pointmaze-medium-navigate-v0": (2, 2, 2, 2, None), "pointmaze-giant-stitch-v0": (2, 2, 2, 2, None),
    "antmaze-medium-navigate-v0": (29, 8, 15, 14, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_an_episode_is_as_in_the_published_files(name: str) -> None:
    """Keys, shapes and types; the mark at the last row; and the same seed gives the same numbers, another one others."""
    generator = short(name, walker=walk_straight if name.startswith("ant") else None)
    first, other, same = (generator.episode(seed) for seed in (3, 4, 3))
    generator.close()
    obs, action, nq, nv, buttons = SHAPES[name]
    shapes = {"observations": (61, obs), "actions": (61, action), "terminals": (61,), "qpos": (61, nq), "qvel": (61, nv)}
    shapes |= {} if buttons is None else {"button_states": (61, buttons)}
    assert {key: values.shape for key, values in first.items()} == shapes
    types = {"terminals": np.bool_, "button_states": np.int64}
    assert all(values.dtype == types.get(key, np.float32) for key, values in first.items())
    assert first["terminals"].tolist() == [False] * 60 + [True]
    assert np.abs(first["actions"]).max() <= 1.0
    assert all(np.array_equal(first[key], same[key]) for key in first)
    assert not np.array_equal(first["actions"], other["actions"])


def test_the_global_generator_is_left_alone() -> None:
    generator = short("cube-single-noisy-v0", 11)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    generator.episode(0)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def written(folder: Path, name: str, episodes: int, length: int) -> Path:
    """Training and validation part."""
    generator = short(name, length)
    rows = [generator.episode(seed) for seed in range(episodes)]
    generator.close()
    path = folder / f"{name}.npz"
    for place in (path, folder / f"{name}-val.npz"):
        np.savez_compressed(place, **{key: np.concatenate([row[key] for row in rows]) for key in rows[0]})
    return path


@pytest.mark.parametrize(
    ("name", "task", "episodes", "length", "rewards"),
    [
        ("cube-single-play-v0", "cube-single-play-singletask-task1-v0", 3, 301, {-1.0, 0.0}),
        ("puzzle-3x3-play-v0", "puzzle-3x3-play-singletask-task1-v0", 2, 201, set(range(-9, 1))),
        ("scene-play-v0", "scene-play-singletask-task1-v0", 2, 101, set(range(-5, 1))),
        ("pointmaze-medium-navigate-v0", "pointmaze-medium-navigate-singletask-task1-v0", 20, 301, {-1.0, 0.0}),
    ],
)
def test_the_package_reads_them_and_so_do_we(
    tmp_path: Path, name: str, task: str, episodes: int, length: int, rewards: set[float]
) -> None:
    """The loader of OGBench and ours: every row, reward, mask and next observation."""
    path = written(tmp_path, name, episodes, length)
    _, train, val = package.make_env_and_datasets(task, dataset_path=str(path))
    dataset = load_dataset(path, task=task)
    n = episodes * (length - 1)
    assert len(dataset) == len(train["rewards"]) == len(val["rewards"]) == n
    assert train["terminals"].sum() == episodes
    assert set(np.unique(train["rewards"])) <= rewards
    assert np.array_equal(train["masks"] == 0.0, train["rewards"] == 0.0)
    for key in ("observations", "actions", "next_observations", "rewards"):
        np.testing.assert_array_equal(np.asarray(getattr(dataset, key)[:]), train[key])
    terminals, timeouts = np.asarray(dataset.terminals), np.asarray(dataset.timeouts)
    np.testing.assert_array_equal(terminals, train["masks"] == 0.0)
    np.testing.assert_array_equal(timeouts, (train["terminals"] == 1.0) & ~terminals)
    going_on = train["terminals"][:-1] == 0.0
    np.testing.assert_array_equal(train["next_observations"][:-1][going_on], train["observations"][1:][going_on])


def test_walks_reach_goals(tmp_path: Path) -> None:
    """Point mazes: goals are reached, and the walk goes on to the next."""
    path = written(tmp_path, "pointmaze-medium-navigate-v0", 20, 301)
    tasks = [f"pointmaze-medium-navigate-singletask-task{k}-v0" for k in range(1, 6)]
    assert sum(int(np.asarray(load_dataset(path, task=task).terminals).sum()) for task in tasks) > 10


def test_cells() -> None:
    maze = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1], [1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    free, corners = module._cells(maze)
    assert len(free) == 7
    assert corners == [(1, 1), (1, 4), (2, 4), (3, 1)]  # not (1, 2), (1, 3) and (2, 1), which lie in corridors
    assert module._cells_at(maze, (1, 1), 4) == [(2, 4)]


def test_scenes_whose_cube_is_lost_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, True]
    monkeypatch.setattr(module, "_cube_stays_visible", lambda _: answers.pop(0))
    short("scene-play-v0", 11).episode(0)
    assert answers == []
    monkeypatch.undo()
    places = np.array([[0.4, 0.0, 0.02], [0.4, -0.3, 0.07]])
    assert module._cube_stays_visible(places)
    assert not module._cube_stays_visible(np.array([[0.4, 0.29, 0.02]]))
    assert not module._cube_stays_visible(np.array([[0.4, -0.3, 0.02]]))


@pytest.mark.parametrize(
    ("name", "episodes", "length"),
    [
        ("cube-triple-play-v0", 3000, 1001), ("cube-quadruple-noisy-v0", 5000, 1001), ("puzzle-4x5-play-v0", 3000, 1001),
        ("scene-play-v0", 1000, 1001), ("pointmaze-large-navigate-v0", 1000, 1001), ("antmaze-giant-navigate-v0", 500, 2001),
        ("antmaze-teleport-stitch-v0", 5000, 201),
    ],
)  # fmt: skip
def test_published_sizes(name: str, episodes: int, length: int) -> None:
    made = recipe(name)
    assert (made.episodes, made.length) == (episodes, length)
    assert name in ogbench.names()


def test_errors_in_words() -> None:
    with pytest.raises(DatasetError, match="'humanoidmaze-medium-navigate-v0' cannot be made here"):
        recipe("humanoidmaze-medium-navigate-v0")
    with pytest.raises(DatasetError, match="needs a walker: `tether collect antmaze-medium-navigate-v0` trains one"):
        Generator(recipe("antmaze-medium-navigate-v0"))


def test_sparse_rewards_of_data_and_world(tmp_path: Path) -> None:
    """-1 until all subtasks are done: the same in the data, and in the environment that they describe."""
    task = "scene-play-singletask-task2-v0"
    path = written(tmp_path, "scene-play-v0", 1, 101)
    dense, sparse = load_dataset(path, task=task), load_dataset(path, task=task, sparse=True)
    assert np.array_equal(np.asarray(sparse.rewards), np.where(np.asarray(dense.rewards) != 0.0, -1.0, 0.0))
    assert np.array_equal(np.asarray(sparse.terminals), np.asarray(dense.terminals))
    env, plain = make_env(task, **sparse.meta["env_kwargs"]), make_env(task)
    for one in (env, plain):
        one.reset(seed=0)
    rewards = [(env.step(np.zeros(5))[1], plain.step(np.zeros(5))[1]) for _ in range(3)]
    assert all(first == -1.0 and second < -1.0 for first, second in rewards)
