"""The linear patient: its motion, costs and ends, and the closed form against simulation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tether.agents.common.env_state import env_state, restore_env_state
from tether.envs import EnvError
from tether.envs.linear_patient import (
    COST_NAMES,
    NOISE,
    START_COV,
    START_MEAN,
    LinearPatient,
    costs,
    dynamics,
    expected_cost,
    expected_return,
    rewards,
)

UNTREATED = np.zeros((2, 2))
TREATED = np.array([[0.5, 0.0], [0.0, 0.5]])
CROSSED = np.array([[0.3, 0.4], [-0.2, 0.6]])


def episode(env: LinearPatient, seed: int, steps: int = 20) -> np.ndarray:
    rng = np.random.default_rng(seed)
    seen = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        observation, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 2))
        seen.append(observation)
        if terminated or truncated:
            break
    return np.array(seen)


def test_motion_rewards_and_costs() -> None:
    states, actions = np.array([[1.0, 0.0], [0.5, 2.0]]), np.array([[1.0, -1.0], [0.0, 0.5]])
    by_hand = [[1.05 - 0.3, 0.1 + 0.3], [0.525 + 0.2, 1.8 - 0.15]]
    np.testing.assert_allclose(dynamics(states, actions), by_hand)
    np.testing.assert_allclose(dynamics(states, actions, np.full((2, 2), 0.1)), np.array(by_hand) + 0.1)
    np.testing.assert_allclose(rewards(states), [0.0, -3.25])
    assert costs(np.array([[1.0, 5.0], [1.01, 0.0]])).tolist() == [0.0, 1.0]
    assert costs(states, limit=0.2).tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------- the closed form


def test_first_step_is_a_gaussian_tail() -> None:
    tail = 0.5 * math.erfc((1.0 - 0.6) / 0.2 / math.sqrt(2.0))
    assert expected_cost(TREATED, START_MEAN, START_COV, 1, 0.9) == pytest.approx(tail)
    assert expected_return(TREATED, START_MEAN, START_COV, 1, 0.9) == pytest.approx(1.0 - 0.36 - 0.08)


def test_without_noise_costs_are_counted() -> None:
    """s_0 = 0.6 * 1.05^t passes 1 at t = 11."""
    cost = expected_cost(UNTREATED, START_MEAN, np.zeros((2, 2)), 20, 0.9, noise=0.0)
    assert cost == pytest.approx(sum(0.9**t for t in range(11, 20)))


@pytest.mark.parametrize("K", [UNTREATED, TREATED, CROSSED])
@pytest.mark.parametrize(("gamma", "limit"), [(1.0, 1.0), (0.9, 0.2)])
def test_closed_form_is_what_simulation_gives(K: np.ndarray, gamma: float, limit: float) -> None:
    """Within four standard errors of 40,000 episodes."""
    n, rng = 40_000, np.random.default_rng(0)
    states = rng.multivariate_normal(START_MEAN, START_COV, n)
    cost, gained = np.zeros(n), np.zeros(n)
    for t in range(20):
        cost += gamma**t * costs(states, limit)
        gained += gamma**t * rewards(states)
        states = dynamics(states, states @ K.T, rng.normal(0.0, NOISE, (n, 2)))
    exact = expected_cost(K, START_MEAN, START_COV, 20, gamma, limit=limit)
    assert abs(cost.mean() - exact) < 4.0 * cost.std() / math.sqrt(n)
    exact = expected_return(K, START_MEAN, START_COV, 20, gamma)
    assert abs(gained.mean() - exact) < 4.0 * gained.std() / math.sqrt(n)


def test_the_environment_is_what_the_closed_form_speaks_of() -> None:
    env, totals = LinearPatient(limit=0.5), []
    for seed in range(1000):
        state, _ = env.reset(seed=seed)
        cost, gained, ended = 0.0, 0.0, False
        while not ended:
            state, reward, terminated, ended, info = env.step(TREATED @ state)
            cost, gained = cost + info["cost"], gained + reward
            assert not terminated
        totals.append((cost, gained))
    error = 4.0 * np.std(totals, axis=0) / math.sqrt(len(totals))
    exact = (
        expected_cost(TREATED, START_MEAN, START_COV, 20, 1.0, limit=0.5),
        expected_return(TREATED, START_MEAN, START_COV, 20, 1.0),
    )
    assert (np.abs(np.mean(totals, axis=0) - exact) < error).all()


def test_treatment_lowers_the_cost() -> None:
    untreated, treated = (expected_cost(K, START_MEAN, START_COV, 20, 1.0) for K in (UNTREATED, TREATED))
    assert untreated > 8.0
    assert treated < 0.05


# ---------------------------------------------------------------------- the environment


def test_is_a_valid_environment() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the observation has no bounds
        check_env(LinearPatient(), skip_render_check=True)


def test_seeds() -> None:
    np.testing.assert_array_equal(episode(LinearPatient(), 3), episode(LinearPatient(), 3))
    assert not np.array_equal(episode(LinearPatient(), 3)[0], episode(LinearPatient(), 4)[0])
    starts = np.array([LinearPatient().reset(seed=seed)[0] for seed in range(400)])
    np.testing.assert_allclose(starts.mean(axis=0), START_MEAN, atol=0.05)
    np.testing.assert_allclose(starts.std(axis=0), 0.2, atol=0.03)


def test_reward_and_cost_are_those_of_the_state_left() -> None:
    env = LinearPatient()
    env.reset(seed=0, options={"state": [1.1, 0.5]})
    observation, reward, _, _, info = env.step(np.array([1.0, 0.0]))
    assert reward == pytest.approx(1.0 - 1.21 - 0.25)
    assert (info["costs"].tolist(), info["costs"].dtype, info["cost"]) == ([1.0], np.float32, 1.0)
    assert info["costs"].shape == (len(COST_NAMES),)
    _, reward, _, _, info = env.step(np.zeros(2))
    assert reward == pytest.approx(1.0 - float(observation @ observation), abs=1e-6)
    assert (observation[0] < 1.0, info["cost"]) == (True, 0.0)


def test_each_dose_acts_on_its_own_deviation() -> None:
    env, after = LinearPatient(noise=0.0), {}
    for name, action in {"none": (0, 0), "first": (1, 0), "second": (0, 1), "too much": (9, 0)}.items():
        env.reset(options={"state": [0.5, 0.5]})
        after[name] = env.step(np.array(action, np.float32))[0]
    np.testing.assert_allclose(after["first"] - after["none"], [-0.3, 0.1], atol=1e-6)
    np.testing.assert_allclose(after["second"] - after["none"], [0.0, -0.3], atol=1e-6)
    np.testing.assert_array_equal(after["too much"], after["first"])


def test_ends() -> None:
    env = LinearPatient(noise=0.0)
    env.reset(options={"state": [2.7, 0.0]})
    observation, _, terminated, truncated, info = env.step(np.array([-1.0, 0.0]))
    assert np.linalg.norm(observation) > 3.0
    assert (terminated, truncated, info["death"]) == (True, False, True)
    env.reset(options={"state": [0.0, 0.0]})
    ends = [env.step(np.zeros(2))[2:4] for _ in range(20)]
    assert ends == [(False, False)] * 19 + [(False, True)]


def test_another_instance_goes_on() -> None:
    first, second = LinearPatient(), LinearPatient()
    episode(first, 1, 7)
    restore_env_state(second, env_state(first))
    for _ in range(5):
        np.testing.assert_array_equal(first.step(np.zeros(2))[0], second.step(np.zeros(2))[0])


def test_refusals() -> None:
    with pytest.raises(EnvError, match=r"noise is -1: use a standard deviation of 0 or more\."):
        LinearPatient(noise=-1)
    with pytest.raises(EnvError, match=r"limit is nan: use a finite number\."):
        LinearPatient(limit=math.nan)
    with pytest.raises(EnvError, match=r"max_episode_steps is 0: use a whole number from 1 on\."):
        LinearPatient(max_episode_steps=0)
    with pytest.raises(EnvError, match=r"has no render_mode 'human': leave it out\."):
        LinearPatient(render_mode="human")
    with pytest.raises(EnvError, match=r"The state to start in is \[1.0\]: give two finite numbers."):
        LinearPatient().reset(options={"state": [1.0]})
    with pytest.raises(EnvError, match=r"have the shapes \(\(2,\), .*: give \(2, 2\), \(2,\) and \(2, 2\)."):
        expected_cost(np.zeros(2), START_MEAN, START_COV, 20, 1.0)
