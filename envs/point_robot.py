"""FISOR's point robot between two discs: a safe task whose feasible states can be computed.

A state is (x, y, v, theta): place in m, speed in m/s, heading in rad. The functions take whole batches of states, (B, 4)
float64, so that data sets and learnt value functions can be checked against them. Source: the authors' env/point_robot.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .suite import EnvError, Suite, unknown_argument

ID = "PointRobot-v0"
STEPS = 300  # time limit
DT = 0.05  # s
HAZARDS = np.array([[0.4, -1.2], [-0.4, 1.2]])  # centres, m
HAZARD_RADIUS = 0.8
GOAL = np.array([2.2, 2.2])
GOAL_RADIUS = 0.3
ARENA = 3.0  # the episode ends where |x| or |y| is above

_START = np.array([-1.8, 0.0, 2.0, np.pi / 4])
_LOWEST, _HIGHEST = np.array([-3.0, -3.0, 0.5, np.pi / 4]), np.array([3.0, 3.0, 2.0, 3 * np.pi / 4])
_ARGUMENTS = ("random_start", "feasible_start", "max_episode_steps")
_PIXELS = 256

# ---------------------------------------------------------------------- motion, constraint, observation


def dynamics(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The states one Euler step of 0.05 s later; every rate is that of the old state.

        x' = v cos(theta), y' = v sin(theta), v' = a_0, theta' = a_1

    :param states: (B, 4)
    :param actions: (B, 2), acceleration in m/s^2 and yaw rate in rad/s, clipped to [-1, 1]
    :return: (B, 4) float64; neither the speed nor the heading is bounded
    """
    speed, heading = states[:, 2], states[:, 3]
    rates = np.column_stack([speed * np.cos(heading), speed * np.sin(heading), np.clip(actions, -1.0, 1.0)])
    return states + DT * rates


def constraint_values(states: np.ndarray) -> np.ndarray:
    """h(s) = 0.8 - distance to the nearer disc's centre, in m: violated where positive, (B, 4) -> (B,) float64."""
    return HAZARD_RADIUS - _distances(states).min(axis=1)


def _distances(states: np.ndarray) -> np.ndarray:
    """Of the places (B, 4) to the discs' centres, (B, 2)."""
    return np.linalg.norm(HAZARDS - states[:, None, :2], axis=2)


def ended(states: np.ndarray) -> np.ndarray:
    """Whether episodes end in the states, at the goal or outside the arena: (B, 4) -> (B,) bool."""
    outside = (np.abs(states[:, :2]) > ARENA).any(axis=1)
    return outside | (_to_goal(states) <= GOAL_RADIUS)


def _to_goal(states: np.ndarray) -> np.ndarray:
    return np.linalg.norm(states[:, :2] - GOAL, axis=1)


def observation_of(states: np.ndarray) -> np.ndarray:
    """What the robot sees: (B, 4) -> (B, 11) float32.

    x, y, v, cos(theta), sin(theta), and for each disc the distance of its centre, and cosine and sine of the direction
    to it as seen from the heading.
    """
    ways = HAZARDS - states[:, None, :2]
    bearings = np.arctan2(ways[..., 1], ways[..., 0]) - states[:, 3:]
    seen = np.stack([_distances(states), np.cos(bearings), np.sin(bearings)], axis=2)
    own = [states[:, :3], np.cos(states[:, 3]), np.sin(states[:, 3])]
    return np.column_stack([*own, seen.reshape(len(states), 6)]).astype(np.float32)


def states_of(observations: np.ndarray) -> np.ndarray:
    """The states behind observations, (B, 11) -> (B, 4) float64, with the heading in [-pi, pi]."""
    observations = observations.astype(np.float64)
    return np.column_stack([observations[:, :3], np.arctan2(observations[:, 4], observations[:, 3])])


# ---------------------------------------------------------------------- controllers

CRUISE = 1.5  # m/s, that controllers aim at
CLEARANCE = 0.15  # m, that a path around a disc keeps


def seek_goal(observations: np.ndarray) -> np.ndarray:
    """Straight to the goal, through whatever lies there: (B, 11) -> actions (B, 2)."""
    states = states_of(observations)
    return _steer(states, _direction(GOAL - states[:, :2]))


def seek_goal_safely(observations: np.ndarray) -> np.ndarray:
    """To the goal past the discs: (B, 11) -> actions (B, 2).

    It aims at the tangent of a disc that lies in the way; where the action would leave the avoidable states, it brakes and
    turns away from the nearer disc instead, as :func:`avoidable` supposes. Inside a disc it goes on.
    """
    states = states_of(observations)
    actions = _steer(states, _around(states))
    fatal = ~avoidable(dynamics(states, actions)) & (constraint_values(states) <= 0.0)
    way = HAZARDS[_distances(states).argmin(axis=1)] - states[:, :2]
    aside = np.cos(states[:, 3]) * way[:, 1] - np.sin(states[:, 3]) * way[:, 0]
    evasion = np.column_stack([-np.sign(states[:, 2]), np.where(aside >= 0.0, -1.0, 1.0)])
    return np.where(fatal[:, None], evasion, actions)


def _steer(states: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Actions (B, 2) that turn to a direction (B,) and take up the cruising speed; slower, the more there is to turn."""
    error = (direction - states[:, 3] + np.pi) % (2 * np.pi) - np.pi
    speed = CRUISE * np.maximum(np.cos(error), 0.2)
    return np.clip(np.column_stack([3.0 * (speed - states[:, 2]), 3.0 * error]), -1.0, 1.0)


def _direction(ways: np.ndarray) -> np.ndarray:
    return np.arctan2(ways[:, 1], ways[:, 0])


def _around(states: np.ndarray) -> np.ndarray:
    """The direction to the goal, or past the nearest disc between it and the robot, (B,)."""
    direction = _direction(GOAL - states[:, :2])
    for hazard in HAZARDS:
        bearing, half, offset = _disc_seen(states, hazard, direction, HAZARD_RADIUS + CLEARANCE)
        direction = np.where(np.abs(offset) < half, bearing + np.where(offset >= 0.0, half, -half), direction)
    return direction


def barred(states: np.ndarray) -> np.ndarray:
    """Whether a disc lies on the straight way to the goal: (B, 4) -> (B,) bool."""
    direction = _direction(GOAL - states[:, :2])
    seen = [_disc_seen(states, hazard, direction, HAZARD_RADIUS) for hazard in HAZARDS]
    return np.any([np.abs(offset) < half for _, half, offset in seen], axis=0)


def _disc_seen(
    states: np.ndarray, hazard: np.ndarray, direction: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bearing of a disc, half the angle that it fills (0 behind the goal), and the direction's offset to it, (B,) each."""
    way = hazard - states[:, :2]
    distance, bearing = np.linalg.norm(way, axis=1), _direction(way)
    half = np.arcsin(np.minimum(radius / distance, 1.0)) * (distance < _to_goal(states))
    return bearing, half, (direction - bearing + np.pi) % (2 * np.pi) - np.pi


# ---------------------------------------------------------------------- which states are feasible


def avoidable(states: np.ndarray) -> np.ndarray:
    """The authors' check of whether a violation can still be avoided: (B, 4) -> (B,) bool.

    For each disc alone: False inside it; True where the heading misses it; otherwise the robot brakes with a_0 = -1 and
    turns away from the disc's centre with the full yaw rate, and the disc must not be touched before it stands. Because
    one manoeuvre is tried for each disc, what avoids the first may enter the second; `feasible_values` tries many plans,
    each against both, and agrees on all of 100,000 random starts. A robot that reverses is taken as one that drives
    forward with the opposite heading, which is the same motion; the authors' code calls every such state outside the
    discs avoidable.
    """
    forward = _forward(states)
    return np.all([_avoids(forward, hazard) for hazard in HAZARDS], axis=0)


def _forward(states: np.ndarray) -> np.ndarray:
    """The states with v >= 0 that move as these do."""
    turned = np.where(states[:, 2] < 0.0, np.pi, 0.0)
    return np.column_stack([states[:, :2], np.abs(states[:, 2]), states[:, 3] + turned])


def _avoids(states: np.ndarray, hazard: np.ndarray) -> np.ndarray:
    """Whether one disc is avoided, (B, 4) -> (B,) bool."""
    way = hazard - states[:, :2]
    cosine, sine = np.cos(states[:, 3]), np.sin(states[:, 3])
    ahead, aside = way[:, 0] * cosine + way[:, 1] * sine, cosine * way[:, 1] - sine * way[:, 0]
    safe = np.hypot(ahead, aside) > HAZARD_RADIUS
    turns = np.where(aside >= 0.0, -1.0, 1.0)  # away from the disc's centre
    moving = np.flatnonzero(safe & (ahead > 0.0) & (np.abs(aside) <= HAZARD_RADIUS) & (states[:, 2] > 0.0))
    states = states.copy()
    while moving.size:
        states[moving] = dynamics(states[moving], np.column_stack([np.full(moving.size, -1.0), turns[moving]]))
        safe[moving] = np.linalg.norm(hazard - states[moving, :2], axis=1) > HAZARD_RADIUS
        moving = moving[safe[moving] & (states[moving, 2] > 0.0)]
    return safe


def feasible_values(states: np.ndarray, holds: tuple[int, ...] = (4, 8, 16)) -> np.ndarray:
    """V_h(s), the least over plans of the largest h from this state on, in m: (B, 4) -> (B,) float64.

    A plan holds one of the nine actions {-1, 0, 1}^2 for some steps, then brakes to a stop with a yaw rate of -1, 0 or 1
    and stays. These are some of all plans, so the values are upper bounds and V_h <= 0 is an inner approximation of the
    feasible states: in each of them a plan is known that touches no disc. That episodes end is left out of account, which
    only makes the values larger.

    :param holds: how many steps the first action may be held; plans that only brake are always tried
    """
    now = constraint_values(states)
    values = np.full(len(states), np.inf)
    firsts = itertools.product((-1.0, 0.0, 1.0), (-1.0, 0.0, 1.0), holds)
    for first, yaw in itertools.product([(0.0, 0.0, 0), *firsts], (-1.0, 0.0, 1.0)):
        open_ = np.flatnonzero(values > now)  # no plan gives less than h(s)
        values[open_] = np.minimum(values[open_], _largest_h(states[open_], first, yaw))
    return values


def _largest_h(states: np.ndarray, first: tuple[float, float, int], yaw: float) -> np.ndarray:
    """The largest h under one plan, (B, 4) -> (B,), from the states themselves on."""
    largest = constraint_values(states)
    for _ in range(first[2]):
        states = dynamics(states, np.tile(first[:2], (len(states), 1)))
        largest = np.maximum(largest, constraint_values(states))
    while states[:, 2].any():
        states = dynamics(states, np.column_stack([-states[:, 2] / DT, np.full(len(states), yaw)]))
        states[np.abs(states[:, 2]) < 1e-9, 2] = 0.0
        largest = np.maximum(largest, constraint_values(states))
    return largest


# ---------------------------------------------------------------------- the environment


class PointRobot(gym.Env):
    """Drive to the goal and through neither disc.

    Observations (11,) float32 as `observation_of` gives them; actions (2,) in [-1, 1], acceleration and yaw rate. The
    reward is the way gained towards the goal in m, and 1 more on reaching it. ``info["constraint_value"]`` is the signed h
    at the new state, ``info["cost"]`` is 1.0 where it is positive, else 0.0 (the authors' code has the flag the other way
    round). An episode ends at the goal or outside the arena.

    :param random_start: start anywhere with x, y in [-3, 3], v in [0.5, 2], theta in [pi / 4, 3 pi / 4] rather than at
        (-1.8, 0, 2, pi / 4). ``reset(options={"random_start": True})`` does so once, and ``options={"state": s}`` starts
        in the state (4,)
    :param feasible_start: start in such a random state from which a violation can be avoided, and the straight way to the
        goal leads through a disc; evaluations do so
    :param render_mode: None or ``rgb_array``
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(
        self, random_start: bool = False, feasible_start: bool = False, render_mode: str | None = None
    ) -> None:
        self.random_start, self.feasible_start, self.render_mode = random_start, feasible_start, render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (11,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.state = _START.copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        options = options or {}
        if "state" in options:
            self.state = np.array(options["state"], dtype=np.float64)
            if self.state.shape != (4,):
                raise EnvError(f"The state to start in has shape {self.state.shape}: give (x, y, v, theta).")
        elif self.feasible_start and "random_start" not in options:
            drawn = self.np_random.uniform(_LOWEST, _HIGHEST, (100, 4))
            self.state = drawn[avoidable(drawn) & barred(drawn) & ~ended(drawn)][0]
        elif options.get("random_start", self.random_start):
            self.state = self.np_random.uniform(_LOWEST, _HIGHEST)
        else:
            self.state = _START.copy()
        return observation_of(self.state[None])[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        before, after = self.state[None], dynamics(self.state[None], np.asarray(action, dtype=np.float64)[None])
        self.state = after[0]
        distance = float(_to_goal(after)[0])
        reward = float(_to_goal(before)[0]) - distance + float(distance <= GOAL_RADIUS)
        value = float(constraint_values(after)[0])
        info = {"cost": float(value > 0.0), "constraint_value": value}
        return observation_of(after)[0], reward, bool(ended(after)[0]), False, info

    def render(self) -> np.ndarray | None:
        """The arena from above, (256, 256, 3) uint8: discs blue, goal green, the robot with its nose red."""
        if self.render_mode != "rgb_array":
            return None
        axis = np.linspace(-ARENA, ARENA, _PIXELS)
        places = np.stack(np.meshgrid(axis, axis[::-1]), axis=2)
        picture = np.full((_PIXELS, _PIXELS, 3), 255, np.uint8)
        nose = self.state[:2] + 0.12 * np.array([math.cos(self.state[3]), math.sin(self.state[3])])
        for centre, radius, colour in [
            *((hazard, HAZARD_RADIUS, (153, 193, 222)) for hazard in HAZARDS),
            (GOAL, GOAL_RADIUS, (170, 212, 170)),
            (self.state[:2], 0.1, (60, 60, 60)),
            (nose, 0.05, (200, 40, 40)),
        ]:
            picture[np.linalg.norm(places - centre, axis=2) <= radius] = colour
        return picture


def _make(env_id: str, flatten: bool, render_mode: str | None, *, max_episode_steps: int = STEPS, **kwargs: Any) -> gym.Env:
    """Make the robot; arguments are those of `PointRobot`, and ``max_episode_steps``, 300 by default."""
    for name in kwargs:
        if name not in _ARGUMENTS:
            raise unknown_argument(env_id, name, _ARGUMENTS)
    env = PointRobot(render_mode=render_mode, **kwargs)
    env.spec = gym.envs.registration.EnvSpec(env_id, max_episode_steps=max_episode_steps)
    return gym.wrappers.TimeLimit(env, max_episode_steps)


SUITE = Suite(
    "point-robot",
    owns=lambda env_id: env_id == ID,
    ids=lambda: [ID],
    make=_make,
    scoring={"feasible_start": True},
    collecting={"random_start": True},
    behaviours={"reward": seek_goal, "safe": seek_goal_safely},
)
