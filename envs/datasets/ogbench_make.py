"""OGBench's datasets without its server: play and noisy manipulation by the package's oracles, walks through its mazes.

Settings are those of the scripts that made the published files (`data_gen_scripts` of OGBench's repository; Park et al., ICLR
2025, arXiv 2410.20092). An episode follows from its seed alone, where theirs follow from none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from .dataset import DatasetError
from .hdf5 import import_extra

Arrays = dict[str, np.ndarray]
Walker = Callable[[np.ndarray], np.ndarray]  # from a state without its place and a direction, (o - 2 + 2,), to an action (d,)

_NOISE, _SMOOTHING, _LEAST_NORM = 0.1, 0.5, 0.4  # of the oracles
_NOISY = np.array([1.0, 1.0, 1.0, 3.0, 10.0])  # of an action's parts, in "noisy" data
_STACKING = {"single": (0.0, 0.0), "double": (0.0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}
_DTYPES = {"terminals": bool, "button_states": np.int64}
_NAME = re.compile(
    r"(?P<env>cube-(single|double|triple|quadruple)|scene|puzzle-(3x3|4x4|4x5|4x6))-(?P<kind>play|noisy)-v0"
    r"|(?P<maze>(point|ant)maze-(medium|large|giant|teleport))-(?P<way>navigate|stitch)-v0"
)


@dataclass(frozen=True)
class Recipe:
    """How a dataset is made.

    :param env_id: OGBench's environment
    :param kind: play or noisy (manipulation); navigate or stitch (mazes)
    :param episodes: of the published training part; the validation part has a tenth of them
    :param length: rows of an episode, one more than its transitions
    """

    name: str
    env_id: str
    kind: str
    episodes: int
    length: int

    @property
    def is_maze(self) -> bool:
        return "maze" in self.env_id

    @property
    def walks(self) -> bool:
        """Whether its episodes need a walker."""
        return self.env_id.startswith("ant")


def recipe(name: str) -> Recipe:
    """The recipe of a published dataset's name.

    :raises DatasetError: for one that cannot be made here
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DatasetError(
            f"'{name}' cannot be made here: cubes, scene and puzzles can (play, noisy), pointmaze and antmaze (navigate, "
            "stitch), by names such as cube-single-play-v0."
        )
    if match["maze"]:
        stitch, giant = match["way"] == "stitch", "giant" in name
        episodes, length = (5000, 201) if stitch else (500, 2001) if giant else (1000, 1001)
        return Recipe(name, f"{match['maze']}-v0", match["way"], episodes, length)
    episodes = {"triple": 3000, "4x5": 3000, "quadruple": 5000, "4x6": 5000}.get(match["env"].rpartition("-")[2], 1000)
    return Recipe(name, f"{match['env']}-v0", match["kind"], episodes, 1001)


class Generator:
    """Makes episodes of a dataset, one environment for all of them.

    :param walker: moves the robot of an ant's maze into a direction; its noise is added here
    :raises DatasetError: where OGBench is not installed, or a walker is missing
    """

    def __init__(self, recipe: Recipe, walker: Walker | None = None) -> None:
        import_extra("ogbench", recipe.name, extra="ogbench")
        if recipe.walks and walker is None:
            raise DatasetError(f"'{recipe.name}' needs a walker: `tether collect {recipe.name}` trains one.")
        self.recipe, self.walker = recipe, walker
        options: dict[str, Any] = {} if recipe.is_maze else {"mode": "data_collection"}
        self.env = gym.make(
            recipe.env_id, terminate_at_goal=False, max_episode_steps=recipe.length, disable_env_checker=True, **options
        )
        self.oracles = {} if recipe.is_maze else _oracles(recipe, self.env)

    def episode(self, seed: int) -> Arrays:
        """``observations``, ``actions``, ``terminals`` (at the last row), ``qpos``, ``qvel`` and, where there are buttons,
        ``button_states``, as the published files hold them; rows of one episode."""
        before = np.random.get_state()  # noqa: NPY002 - the oracles draw from the global generator
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            rows = self._walk(seed) if self.recipe.is_maze else self._handle(seed)
            while self.recipe.env_id.startswith("scene") and not _cube_stays_visible(rows["qpos"][:, 14:17]):
                rows = self._handle(None)
            return rows
        finally:
            np.random.set_state(before)  # noqa: NPY002

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    # ------------------------------------------------------------------ manipulation

    def _handle(self, seed: int | None) -> Arrays:
        """One task of an oracle after the other."""
        env, rows = self.env, _Rows()
        observation, info = env.reset(seed=seed)
        low, high = _STACKING.get(self.recipe.env_id.split("-")[1], (0.5, 0.5))
        stacking = np.random.uniform(low, high)  # noqa: NPY002
        noisy = self.recipe.kind == "noisy"
        scale = np.random.uniform(0.0, _NOISE) * _NOISY if noisy else None  # noqa: NPY002
        random = (0.2 if self.recipe.env_id.startswith("puzzle") else 0.1) if noisy else 0.0
        oracle, done = self._oracle(observation, info), False
        while not done:
            if random and np.random.rand() < random:  # noqa: NPY002
                action = np.random.uniform(-1.0, 1.0, env.action_space.shape)  # noqa: NPY002
            else:
                action = np.array(oracle.select_action(observation, info))
                if scale is not None:
                    action = action + np.random.normal(0.0, scale)  # noqa: NPY002
            action = np.clip(action, -1.0, 1.0)
            following, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            if oracle.done:
                oracle = self._oracle(*env.unwrapped.set_new_target(p_stack=stacking))  # type: ignore[attr-defined]
            rows.add(observation, action, done, info)
            observation = following
        return rows.arrays()

    def _oracle(self, observation: np.ndarray, info: dict[str, Any]) -> Any:
        oracle = self.oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        return oracle

    # ------------------------------------------------------------------ mazes

    def _walk(self, seed: int) -> Arrays:
        """From a cell to a goal; "navigate": and from there to the next."""
        world: Any = self.env.unwrapped
        free, corners = _cells(world.maze_map)
        start = _any_of(free)
        stitch = self.recipe.kind == "stitch"
        goal = _any_of(_cells_at(world.maze_map, start, 4) or [start]) if stitch else _any_of(corners)
        task = {"task_info": {"init_ij": start, "goal_ij": goal}}
        rows, done = _Rows(), False
        observation, _ = self.env.reset(seed=seed, options=task)
        while not done:
            place = world.get_xy()
            way = world.get_oracle_subgoal(place, world.cur_goal_xy)[0] - place
            action = np.clip(self._step_towards(way / (np.linalg.norm(way) + 1e-6)), -1.0, 1.0)
            following, _, terminated, truncated, info = self.env.step(action)
            done = terminated or truncated
            if info["success"] and not stitch:
                world.set_goal(_any_of(corners))
            rows.add(observation, action, done, info)
            observation = following
        return rows.arrays()

    def _step_towards(self, direction: np.ndarray) -> np.ndarray:
        if self.walker is None:
            return direction + np.random.normal(0.0, 0.5, direction.shape)  # noqa: NPY002
        state = self.env.unwrapped.get_ob(ob_type="states")  # type: ignore[attr-defined]
        action = self.walker(np.concatenate([state[2:], direction]))
        return action + np.random.normal(0.0, 0.2, action.shape)  # noqa: NPY002


class _Rows:
    """The rows of an episode."""

    def __init__(self) -> None:
        self.lists: dict[str, list[Any]] = defaultdict(list)

    def add(self, observation: np.ndarray, action: np.ndarray, last: bool, info: dict[str, Any]) -> None:
        """A row: what was done where, and the state of the simulation there."""
        row = {"observations": observation, "actions": action, "terminals": last}
        for name in ("qpos", "qvel", "button_states"):
            if f"prev_{name}" in info:
                row[name] = info[f"prev_{name}"]
        for name, value in row.items():
            self.lists[name].append(value)

    def arrays(self) -> Arrays:
        """(rows, ...) each."""
        return {name: np.array(values, _DTYPES.get(name, np.float32)) for name, values in self.lists.items()}


def _oracles(recipe: Recipe, env: gym.Env) -> dict[str, Any]:
    """The package's scripted policies for the tasks of an environment: plans for play data, closed loops for noisy data."""
    from importlib import import_module

    puzzle, scene = recipe.env_id.startswith("puzzle"), recipe.env_id.startswith("scene")
    things = ["cube", "button", "drawer", "window"] if scene else ["button"] if puzzle else ["cube"]
    plan = recipe.kind == "play"
    found = {}
    for thing in things:
        kind = "plan" if plan else "markov"
        module = import_module(f"ogbench.manipspace.oracles.{kind}.{thing}_{kind}")
        options: dict[str, Any] = {"noise": _NOISE, "noise_smoothing": _SMOOTHING} if plan else {"min_norm": _LEAST_NORM}
        options |= {"gripper_always_closed": True} if puzzle else {}
        options |= {"max_step": 100} if scene and thing == "cube" and not plan else {}
        found[thing] = getattr(module, f"{thing.title()}{kind.title()}Oracle")(env=env, **options)
    return found


def _cube_stays_visible(places: np.ndarray) -> bool:
    """Whether a scene's cube, (rows, 3), stays on the table or in the drawer, where the camera sees it."""
    too_far_right = places[:, 1] >= 0.29
    outside_drawer = (places[:, 2] < 0.06) | (places[:, 2] > 0.08)
    return not (too_far_right | ((places[:, 1] <= -0.3) & outside_drawer)).any()


def _cells(maze: np.ndarray) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The free cells of a maze, and those of them that are not the middle of a straight corridor."""
    free = [(int(i), int(j)) for i, j in np.argwhere(maze == 0)]

    def is_corridor(i: int, j: int) -> bool:
        vertical, horizontal = (maze[i - 1, j], maze[i + 1, j]), (maze[i, j - 1], maze[i, j + 1])
        return {vertical, horizontal} == {(0, 0), (1, 1)}

    return free, [cell for cell in free if not is_corridor(*cell)]


def _cells_at(maze: np.ndarray, start: tuple[int, int], distance: int) -> list[tuple[int, int]]:
    """Cells so many steps from ``start``."""
    steps, queue = {start: 0}, [start]
    for i, j in queue:
        for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if maze[cell] == 0 and cell not in steps:
                steps[cell] = steps[i, j] + 1
                queue.append(cell)
    return [cell for cell, n in steps.items() if n == distance]


def _any_of(cells: list[tuple[int, int]]) -> tuple[int, int]:
    return cells[np.random.randint(len(cells))]  # noqa: NPY002
