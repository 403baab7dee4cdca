"""The point robot: its motion against a scalar copy, its feasible states, its ends, costs and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env

from tether.agents.common.env_state import env_state, restore_env_state
from tether.envs import EnvError, list_envs, make_env, make_vec, scoring_arguments
from tether.envs.point_robot import (
    avoidable,
    constraint_values,
    dynamics,
    ended,
    feasible_values,
    observation_of,
    seek_goal,
    seek_goal_safely,
    states_of,
)

DISCS = ((0.4, -1.2), (-0.4, 1.2))


def drawn(n: int, seed: int = 0) -> np.ndarray:
    """States (n, 4) all over the arena, also reversing."""
    return np.random.default_rng(seed).uniform([-3, -3, -2, -np.pi], [3, 3, 3, np.pi], (n, 4))


def moved(state: Any, action: Any) -> list[float]:
    x, y, v, theta = state
    acceleration, yaw = (min(1.0, max(-1.0, part)) for part in action)
    return [x + 0.05 * v * math.cos(theta), y + 0.05 * v * math.sin(theta), v + 0.05 * acceleration, theta + 0.05 * yaw]


def h_of(state: Any) -> float:
    return 0.8 - min(math.dist(state[:2], disc) for disc in DISCS)


def seen(state: Any) -> list[float]:
    x, y, v, theta = state
    observation = [x, y, v, math.cos(theta), math.sin(theta)]
    for disc in DISCS:
        bearing = math.atan2(disc[1] - y, disc[0] - x) - theta
        observation += [math.dist((x, y), disc), math.cos(bearing), math.sin(bearing)]
    return observation


def brakes_in_time(state: Any) -> bool:
    """The authors' loop, for a robot that drives forward."""
    for disc in DISCS:
        s = list(state)
        way = (disc[0] - s[0], disc[1] - s[1])
        heading = (math.cos(s[3]), math.sin(s[3]))
        ahead, aside = way[0] * heading[0] + way[1] * heading[1], heading[0] * way[1] - heading[1] * way[0]
        if math.dist(s[:2], disc) <= 0.8:
            return False
        if ahead <= 0 or abs(aside) > 0.8:
            continue
        while s[2] > 0:
            s = moved(s, (-1.0, -1.0 if aside >= 0 else 1.0))
            if math.dist(s[:2], disc) <= 0.8:
                return False
    return True


# ---------------------------------------------------------------------- functions of whole batches


def test_motion_constraint_and_observation() -> None:
    states, actions = drawn(300), np.random.default_rng(1).uniform(-1.5, 1.5, (300, 2))
    np.testing.assert_allclose(dynamics(states, actions), [moved(*pair) for pair in zip(states, actions, strict=True)])
    np.testing.assert_allclose(constraint_values(states), [h_of(state) for state in states])
    observations = observation_of(states)
    assert (observations.shape, observations.dtype) == ((300, 11), np.float32)
    np.testing.assert_allclose(observations, [seen(state) for state in states], atol=1e-5)
    np.testing.assert_allclose(states_of(observations), states, atol=1e-6)


def test_ends() -> None:
    states = np.array([[2.2, 1.89, 0, 0], [2.2, 1.91, 0, 0], [3.0, 0, 0, 0], [3.01, 0, 0, 0], [0, -3.01, 0, 0]])
    assert ended(states).tolist() == [False, True, False, True, True]


def towards_the_upper_disc(gap: float, speed: float) -> np.ndarray:
    """A state (1, 4) from which the disc's edge lies straight ahead."""
    return np.array([[-0.4 - 0.8 - gap, 1.2, speed, 0.0]])


@pytest.mark.parametrize(
    ("state", "feasible"),
    [
        (np.array([[2.5, 0.0, 1.0, 0.0]]), True),  # far away
        (np.array([[-1.8, 0.0, 2.0, np.pi / 4]]), True),  # where episodes start
        (towards_the_upper_disc(0.05, 2.0), False),
        (towards_the_upper_disc(0.05, 0.0), True),  # it stands
        (towards_the_upper_disc(0.05, 0.1), True),
        (np.array([[-1.25, 1.2, 2.0, np.pi]]), True),  # it drives away
        (np.array([[-1.25, 1.2, -2.0, np.pi]]), False),  # it reverses into the disc
        (np.array([[-0.4, 1.2, 0.0, 0.0]]), False),  # inside
    ],
)
def test_feasible_states(state: np.ndarray, feasible: bool) -> None:
    assert avoidable(state).tolist() == [feasible]
    assert (feasible_values(state) <= 0).tolist() == [feasible]


@pytest.mark.parametrize("gap", [0.05, 0.2, 0.5])
def test_feasibility_falls_with_speed(gap: float) -> None:
    states = np.concatenate([towards_the_upper_disc(gap, speed) for speed in np.linspace(0, 3, 61)])
    answers = avoidable(states)
    assert answers[0]
    assert not answers[-1]
    assert (np.diff(answers.astype(int)) <= 0).all()
    assert ((feasible_values(states) <= 0) == answers).all()


def test_avoidable_is_the_authors_loop() -> None:
    states = drawn(1500)
    states[:, 2] = np.abs(states[:, 2])
    assert avoidable(states).tolist() == [brakes_in_time(state) for state in states]


def test_many_plans_agree_with_the_one_manoeuvre() -> None:
    """Neither set is exact by construction: plans are a sample, and the manoeuvre looks at one disc at a time."""
    states = drawn(1500, seed=2)
    values = feasible_values(states, holds=(8,))
    assert (values >= constraint_values(states)).all()
    assert ((values <= 0) == avoidable(states)).mean() > 0.995
    assert (feasible_values(states[:200], holds=(8, 16)) <= values[:200]).all()


def test_what_is_feasible_stays_feasible_under_some_action() -> None:
    states = drawn(400, seed=3)
    states = states[feasible_values(states) <= 0]
    actions = [(a, b) for a in (-1.0, 0.0, 1.0) for b in (-1.0, 0.0, 1.0)]
    best = np.min([feasible_values(dynamics(states, np.tile(a, (len(states), 1))), holds=(4,)) for a in actions], axis=0)
    assert (best <= 0.01).all()  # m: the last step to a stop is shorter than a whole one


# ---------------------------------------------------------------------- the environment


def test_is_a_valid_environment() -> None:
    assert list_envs()["point-robot"] == ["PointRobot-v0"]
    check_env(make_env("PointRobot-v0"), warn=False)


def test_rewards_and_costs() -> None:
    env = make_env("PointRobot-v0", random_start=True)
    rng, seen_costs = np.random.default_rng(0), set()
    for seed in range(30):
        observation, _ = env.reset(seed=seed)
        state, terminated = states_of(observation[None])[0], False
        while not terminated:
            action = rng.uniform(-1, 1, 2)
            before, state = state, np.array(moved(state, action))
            observation, reward, terminated, truncated, info = env.step(action)
            reached = math.dist(state[:2], (2.2, 2.2)) <= 0.3
            gained = math.dist(before[:2], (2.2, 2.2)) - math.dist(state[:2], (2.2, 2.2))
            assert float(reward) == pytest.approx(gained + reached, abs=1e-5)
            assert info["constraint_value"] == pytest.approx(h_of(state), abs=1e-5)
            assert info["cost"] == float(info["constraint_value"] > 0)
            assert terminated == (reached or bool((np.abs(state[:2]) > 3).any()))
            seen_costs.add(info["cost"])
            if truncated:
                break
    assert seen_costs == {0.0, 1.0}


def test_reaching_the_goal_ends_the_episode() -> None:
    env = make_env("PointRobot-v0")
    env.reset(options={"state": [1.85, 2.2, 2.0, 0.0]})
    _, reward, terminated, truncated, info = env.step(np.zeros(2))
    assert reward == pytest.approx(1.1)
    assert (terminated, truncated, info["cost"]) == (True, False, 0.0)


def test_starts_and_seeds() -> None:
    env = make_env("PointRobot-v0")
    np.testing.assert_allclose(states_of(env.reset(seed=0)[0][None])[0], [-1.8, 0, 2, np.pi / 4], atol=1e-6)
    np.testing.assert_array_equal(env.reset(seed=0)[0], env.reset(seed=1)[0])
    first = env.reset(seed=3, options={"random_start": True})[0]
    np.testing.assert_array_equal(make_env("PointRobot-v0", random_start=True).reset(seed=3)[0], first)
    starts = states_of(np.stack([env.reset(options={"random_start": True})[0] for _ in range(200)]))
    assert (starts >= [-3, -3, 0.5, np.pi / 4 - 1e-6]).all()
    assert (starts <= [3, 3, 2, 3 * np.pi / 4 + 1e-6]).all()
    assert len(np.unique(starts[:, 0])) == 200


def test_the_time_limit_is_a_truncation_and_costs_reach_the_vector() -> None:
    venv = make_vec("PointRobot-v0", 2, seed=0)
    venv.reset()
    for action in [(-1.0, 0.0)] * 40 + [(0.0, 0.0)] * 259:  # to a stop
        _, _, dones, _ = venv.step(np.array([action] * 2))
        assert not dones.any()
    _, _, dones, infos = venv.step(np.zeros((2, 2)))
    assert dones.all()
    for info in infos:
        assert info["TimeLimit.truncated"]
        assert info["cost"] == float(info["constraint_value"] > 0)
        assert info["episode"]["l"] == 300
    venv.close()


def test_a_vector_goes_on_elsewhere() -> None:
    first, second = (make_vec("PointRobot-v0", 2, seed=seed, env_kwargs={"random_start": True}) for seed in (1, 2))
    first.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (300, 2, 2)).astype(np.float32)
    for action in actions[:77]:
        first.step(action)
    restore_env_state(second, env_state(first))
    for action in actions[77:]:
        for ours, theirs in zip(first.step(action)[:3], second.step(action)[:3], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_picture() -> None:
    env = make_env("PointRobot-v0", render_mode="rgb_array")
    env.reset(seed=0)
    picture: Any = env.render()
    assert (picture.shape, picture.dtype) == ((256, 256, 3), np.uint8)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 5


def test_refusals() -> None:
    with pytest.raises(EnvError, match="no argument 'random_starts': did you mean 'random_start'"):
        make_env("PointRobot-v0", random_starts=True)
    with pytest.raises(EnvError, match=r"The state to start in has shape \(3,\): give \(x, y, v, theta\)."):
        make_env("PointRobot-v0").reset(options={"state": [0, 0, 0]})


def test_controllers_reach_the_goal_and_one_is_safe() -> None:
    """From the default start and from 60 feasible ones; the other drives through a disc."""
    env, costs = make_env("PointRobot-v0", random_start=True), {}
    for controller in (seek_goal, seek_goal_safely):
        costs[controller] = []
        for seed in range(-1, 60):
            options = {"state": np.array([-1.8, 0.0, 2.0, np.pi / 4])} if seed < 0 else None
            observation, _ = env.reset(seed=max(seed, 0), options=options)
            feasible, cost, ended = bool(avoidable(states_of(observation[None]))[0]), 0.0, False
            while not ended:
                observation, _, terminated, truncated, info = env.step(controller(observation[None])[0])
                cost, ended = cost + info["cost"], terminated or truncated
            if feasible:
                costs[controller].append(cost)
    assert costs[seek_goal][0] > 10.0
    assert costs[seek_goal_safely][0] == 0.0
    assert np.mean(np.array(costs[seek_goal_safely]) > 0.0) < 0.05 < np.mean(np.array(costs[seek_goal]) > 0.0)


def test_evaluations_start_where_a_violation_can_be_avoided() -> None:
    assert scoring_arguments("PointRobot-v0") == {"feasible_start": True}
    env = make_env("PointRobot-v0", feasible_start=True)
    starts = states_of(np.stack([env.reset(seed=seed)[0] for seed in range(100)]))
    assert avoidable(starts).all()
    assert not ended(starts).any()
    assert np.ptp(starts[:, 0]) > 3.0
    for start in starts:  # a disc is on the way to the goal
        way = start[:2] + np.linspace(0, 1, 500)[:, None] * (np.array([2.2, 2.2]) - start[:2])
        assert constraint_values(np.column_stack([way, np.zeros((500, 2))])).max() > -1e-3
    np.testing.assert_allclose(states_of(env.reset(seed=3)[0][None]), starts[3:4])
