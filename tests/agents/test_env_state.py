"""The state of environments: what is seen, what is refused, and that both go on as one."""

import enum
import logging
import random
import threading
from collections import deque, namedtuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from tether.agents.common.env_state import env_state, restore_env_state
from tether.agents.common.known_objects import NoStateError
from tether.agents.common.plain import Arrays, decode, encode
from tether.envs import make_vec

# Which environments of which suites; the first of each line in every test run, the others when there is time.
READ = """
HalfCheetah-v5 Ant-v5 Humanoid-v5 Hopper-v4 Walker2d-v5 Swimmer-v5 Pusher-v5 Reacher-v5 InvertedDoublePendulum-v5
dm_control/cartpole-swingup-v0 dm_control/reacher-easy-v0 dm_control/humanoid-walk-v0 dm_control/quadruped-escape-v0
CartPole-v1 Pendulum-v1 Acrobot-v1 MountainCar-v0 FrozenLake-v1 Taxi-v4
AdroitHandDoor-v1 FetchReach-v4 PointMaze_UMaze-v3
cube-single-play-singletask-task1-v0 antmaze-medium-navigate-singletask-task1-v0
Sepsis/ICU-Sepsis-v2
ALE/Pong-v5
procgen/coinrun-easy-v0
Meta-World/reach-v3
"""
LIVED_AGAIN = """
Hopper-v5 HalfCheetah-v5 Ant-v4 Humanoid-v5 Walker2d-v5 Swimmer-v4 InvertedPendulum-v5 HumanoidStandup-v5
CartPole-v1 Acrobot-v1 MountainCar-v0 MountainCarContinuous-v0
dm_control/hopper-hop-v0 dm_control/cartpole-balance-v0 dm_control/cheetah-run-v0 dm_control/finger-spin-v0
dm_control/walker-run-v0 dm_control/reacher-hard-v0 dm_control/humanoid-walk-v0 dm_control/swimmer-swimmer6-v0
procgen/bigfish-easy-v0 procgen/coinrun-hard-v0 procgen/starpilot-easy-v0 procgen/maze-easy-v0 procgen/miner-easy-v0
Meta-World/reach-v3 Meta-World/door-open-v3
"""


def listed(text: str):
    lines = [line.split() for line in text.strip().splitlines()]
    marked = [(env_id, [] if i == 0 else [pytest.mark.slow]) for line in lines for i, env_id in enumerate(line)]
    return [pytest.param(env_id, marks=marks) for env_id, marks in marked]


def through_a_file(state):
    arrays = Arrays()
    written = encode(state, arrays)
    return decode(written, arrays.packed())


def go_on_as_one(env_id: str, backend: str, steps: int) -> None:
    """One environment is stepped; another one is given its state, and both are stepped on."""
    try:
        first, second = (make_vec(env_id, 2, backend=backend, seed=seed) for seed in (5, 77))
    except ValueError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise
    first.reset()
    first.action_space.seed(0)
    actions = [np.stack([np.asarray(first.action_space.sample()) for _ in range(2)]) for _ in range(steps + 100)]
    for action in actions[:steps]:
        first.step(action)
    restore_env_state(second, through_a_file(env_state(first)))
    for action in actions[steps:]:
        for ours, theirs in zip(first.step(action)[:3], second.step(action)[:3], strict=True):
            equal(ours, theirs)
    first.close()
    second.close()


def equal(ours, theirs) -> None:
    if isinstance(ours, dict):
        for key in ours:
            equal(ours[key], theirs[key])
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("env_id", listed(READ))
def test_state_that_is_read(env_id):
    go_on_as_one(env_id, "dummy", 137)


@pytest.mark.parametrize("env_id", listed(LIVED_AGAIN))
def test_state_that_is_lived_through_again(env_id):
    """Over several ends of episodes: the number of resets counts."""
    go_on_as_one(env_id, "envpool", 1_130 if env_id.startswith("dm_control") else 400)


def test_vecnormalize():
    first, second = (VecNormalize(make_vec_env("Pendulum-v1", 2, seed=seed)) for seed in (1, 2))
    first.reset()
    for _ in range(30):
        first.step(np.zeros((2, 1)))
    restore_env_state(second, through_a_file(env_state(first)))
    for _ in range(250):  # over the end of an episode
        for ours, theirs in zip(first.step(np.ones((2, 1)))[:3], second.step(np.ones((2, 1)))[:3], strict=True):
            np.testing.assert_array_equal(ours, theirs)


# ---------------------------------------------------------------------- what an environment may be made of


class Mode(enum.Enum):
    WALK = 1
    RUN = 2


class Room:
    def __init__(self) -> None:
        self.visits = 0


class Slotted:
    __slots__ = ("inner", "unset")

    def __init__(self) -> None:
        self.inner = 3


class Counter:
    def __init__(self) -> None:
        self.n = 0

    def scale(self, x):
        self.n += 1
        return x


def hop():
    return "hop"


class Anything(gym.Env):
    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, **more) -> None:
        self.number, self.word, self.nothing, self.flag = 1, "a", None, False
        self.array, self.tensor = np.zeros((3, 2)), th.zeros(2)
        self.view_of = self.array
        self.list, self.dict, self.deque, self.set = [1], {"a": 1}, deque([1], maxlen=3), {1}
        self.history = self.list
        self.mode, self.python, self.legacy = Mode.WALK, random.Random(1), np.random.RandomState(1)
        self.rooms = [Room(), Room()]
        self.slotted, self.counter = Slotted(), Counter()
        self.scale = self.counter.scale
        self.clock, self.lock, self.log, self.how = 0, threading.Lock(), logging.getLogger("x"), hop
        self.generator = None
        vars(self).update(more)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def change(self):
        self.number, self.word, self.nothing, self.flag = 7, "b", (1, 2.5), True
        self.array[1, 1], self.tensor[1] = 5.0, 6.0
        self.list.append(2)
        self.dict["b"] = [3]
        self.deque.extend([2, 3, 4])
        self.set.add(9)
        self.mode = Mode.RUN
        self.python.random(), self.legacy.rand()
        self.rooms[1].visits = 4
        self.slotted.inner, self.clock = 7, 8
        self.scale(1)
        self.generator = np.random.default_rng(3)
        self.generator.random(5)


def restored(**more) -> tuple[Anything, Anything]:
    first, second = Anything(**more), Anything(**more)
    first.change()
    restore_env_state(second, through_a_file(env_state(first)))
    return first, second


class TestObjects:
    def test_everything_comes_back(self):
        first, second = restored()
        for name in ("number", "word", "nothing", "flag", "list", "dict", "deque", "set", "mode", "clock"):
            assert getattr(second, name) == getattr(first, name), name
        assert second.deque.maxlen == 3
        np.testing.assert_array_equal(second.array, first.array)
        assert th.equal(second.tensor, first.tensor)
        assert [room.visits for room in second.rooms] == [0, 4]
        assert (second.slotted.inner, second.counter.n) == (7, 1)
        assert second.python.random() == first.python.random()
        assert second.legacy.rand() == first.legacy.rand()
        assert second.generator.random() == first.generator.random()
        assert (Mode.WALK.value, Mode.RUN.value) == (1, 2)

    def test_who_looked_at_something_still_does(self):
        _, second = restored()
        assert second.view_of is second.array
        assert second.history is second.list
        second.scale(1)
        assert second.counter.n == 2

    def test_the_state_is_that_of_its_moment(self):
        first = Anything()
        state = env_state(first)
        first.change()
        second = Anything()
        restore_env_state(second, state)
        assert second.number == 1
        assert not second.array.any()

    def test_references_that_moved_are_refused(self):
        """Written to the wrong room, it would be worse than a new episode."""
        first, second = Anything(), Anything()
        for env in (first, second):
            env.here = env.rooms[0]
        first.here = first.rooms[1]
        first.rooms[1].visits = 3
        with pytest.raises(NoStateError, match="refers to another object here than where the state was taken"):
            restore_env_state(second, through_a_file(env_state(first)))
        assert [room.visits for room in second.rooms] == [0, 0]

    @pytest.mark.parametrize(("more", "path"), [
        ({"game": (x for x in ())}, "Anything.game is a generator"),
        ({"game": iter([1])}, "Anything.game is a list_iterator"),
        ({"game": namedtuple("P", "x")(1)}, "Anything.game is a P"),
        ({"game": np.array([object()])}, "Anything.game is a ndarray"),
        ({"game": [{"deep": iter({})}]}, r"Anything.game\[0\]\['deep'\] is a dict_keyiterator"),
    ], ids=["generator", "iterator", "namedtuple", "objects", "deep"])  # fmt: skip
    def test_what_cannot_be_read_is_named(self, more, path):
        with pytest.raises(NoStateError, match=f"{path}, whose state cannot be read"):
            env_state(Anything(**more))

    @pytest.mark.parametrize("change", [
        lambda env: env.rooms.append(Room()), lambda env: setattr(env, "how", len),
        lambda env: setattr(env, "counter", Room()), lambda env: env.dict.update(c=Room()),
    ])  # fmt: skip
    def test_an_environment_of_another_make_is_refused(self, change):
        first, second = Anything(), Anything()
        change(first)
        with pytest.raises(NoStateError):
            restore_env_state(second, through_a_file(env_state(first)))

    def test_large_tables_are_compared(self):
        table = np.arange(2**22, dtype=np.float64)  # 32 MiB
        state = through_a_file(env_state(Anything(table=table)))
        restore_env_state(Anything(table=table.copy()), state)
        with pytest.raises(NoStateError, match="is not that of where the state was taken"):
            restore_env_state(Anything(table=table + 1), state)
        arrays = Arrays()
        encode(state, arrays)
        assert sum(array.nbytes for array in arrays.packed().values()) < 10_000
