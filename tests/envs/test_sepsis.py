"""ICU-Sepsis with features: the package's numbers, exact values against simulation, the clinician, refusals."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tether.envs import EnvError, clinician_of, make_env, make_vec, sepsis
from tether.envs.suite import installed

ID = "Sepsis/ICU-Sepsis-v2"


@pytest.fixture(autouse=True)
def _needs_the_package(need: Any) -> None:
    need(installed("icu_sepsis"), "icu-sepsis")


def features(**kwargs: Any) -> gym.Env:
    return make_env(ID, representation="features", **kwargs)


def test_the_packages_own_environment_is_unchanged() -> None:
    for kwargs in ({}, {"representation": "states"}):
        env = make_env(ID, **kwargs)
        assert env.observation_space == gym.spaces.Discrete(716)
        assert env.action_space == gym.spaces.Discrete(25)


def test_golden_values_of_the_shipped_policy() -> None:
    """Without a time limit a return of .78184 and 9.24 steps, within 20 steps .19473 dead and .11329 in hospital."""
    known = sepsis.process()
    endless = sepsis.truth(known.expert, "survival", 1.0, None)
    assert endless.value == pytest.approx(0.78184, abs=5e-6)
    assert (endless.death, endless.length) == (pytest.approx(0.2182, abs=5e-5), pytest.approx(9.24, abs=5e-3))
    assert endless.inadmissible == pytest.approx(0.121, abs=5e-4)
    assert endless.sofa == pytest.approx(6.147, abs=5e-4)
    short = sepsis.truth(known.expert, steps=20)
    assert (short.length, short.death, short.truncated) == (
        pytest.approx(8.0851, abs=5e-5), pytest.approx(0.19473, abs=5e-6), pytest.approx(0.11329, abs=5e-6),
    )  # fmt: skip
    uniform = np.full((713, 25), 1 / 25)
    assert sepsis.truth(uniform, "survival", 1.0, None).value == pytest.approx(0.7801, abs=5e-5)


@pytest.mark.slow
def test_twenty_thousand_episodes_of_the_packages_environment() -> None:
    """Of the shipped policy: a mean return within .78184 +- .009."""
    env, known, rng = make_env(ID).unwrapped, sepsis.process(), np.random.default_rng(0)
    cumulative, total = known.expert.cumsum(1), 0.0
    for episode in range(20_000):
        state, _ = env.reset(seed=0) if episode == 0 else env.reset()
        ended = False
        while not ended:
            index = min(24, int(np.searchsorted(cumulative[state], rng.random())))
            state, reward, ended, _, _ = env.step(np.array(divmod(index, 5)))
            total += reward
    assert total / 20_000 == pytest.approx(0.78184, abs=0.009)


def test_the_linear_solve_is_the_limit_of_long_episodes() -> None:
    policy = sepsis.process().clinician
    endless, long = sepsis.truth(policy, steps=None), sepsis.truth(policy, steps=600)
    for one, other in zip(endless, long, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_constraints_and_their_occupancy() -> None:
    """A tenth of the states each; the shipped policy is there in 7.85 and 9.59 % of its steps."""
    known = sepsis.process()
    assert known.costs.mean(0) == pytest.approx([0.1, 0.1], abs=1 / 713)
    truth = sepsis.truth(known.expert, gamma=1.0, steps=None)
    assert truth.costs / truth.length == pytest.approx([0.0785, 0.0959], abs=5e-5)


def test_exact_values_are_those_of_simulated_episodes() -> None:
    env, clinician, steps = features(), sepsis.Clinician(0), []
    for episode in range(1500):
        observation, _ = env.reset(seed=episode)
        discount, total, costs, ended = 1.0, 0.0, np.zeros(2), False
        for _ in range(sepsis.STEPS):
            observation, reward, ended, truncated, info = env.step(clinician(observation[None])[0])
            total, costs, discount = total + discount * reward, costs + discount * info["costs"], discount * 0.99
            assert info["admissible"]
            if ended or truncated:
                break
        steps.append([total, *costs, info["death"], env.unwrapped.steps])
    found = np.array(steps, float)
    truth = sepsis.truth(sepsis.policy_matrix(sepsis.Clinician(1), 64))
    expected = [truth.value, *truth.costs, truth.death, truth.length]
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - expected) < 4.0 * error).all()
    assert truth.inadmissible == 0.0


def test_the_clinician_knows_its_patient_through_the_jitter() -> None:
    known, rng = sepsis.process(), np.random.default_rng(0)
    states = np.repeat(np.arange(713), 20)
    actions = sepsis.Clinician(0)(sepsis.observe(states, rng))
    index = sepsis.action_index(actions)
    assert known.clinician[states, index].min() > 0.0
    certain = known.clinician.max(1)[states] == 1.0
    assert np.array_equal(index[certain], known.clinician.argmax(1)[states][certain])


def test_doses_are_vasopressor_then_fluid() -> None:
    """The package's action is 5 fluid + vasopressor."""
    assert sepsis.action_index(np.array([1.0, -1.0])) == 4
    assert sepsis.action_index(np.array([-1.0, 1.0])) == 20
    assert np.array_equal(sepsis.action_index(sepsis.doses_of(np.arange(25))), np.arange(25))
    assert sepsis.action_index(np.array([9.0, -9.0])) == 4
    rounded = sepsis.action_index(np.array([[-0.76, -1.0], [-0.74, -1.0]]))
    assert rounded.tolist() == [0, 1]


def test_rewards() -> None:
    """Of the three, minus SOFA makes an early death the better policy: the best by it kills more than the clinicians."""
    known = sepsis.process()
    assert sepsis.rewards("inverse_sofa").max() <= 1.0
    assert (sepsis.rewards("sofa").min(), sepsis.rewards("sofa").max()) == (-12.5, -2.5)

    def best(reward: str) -> np.ndarray:
        values = np.zeros(716)
        for _ in range(sepsis.STEPS):
            q = sepsis.rewards(reward)[:, None] + known.transitions @ values
            values[:713] = np.where(known.admissible, q, -np.inf).max(1)
        return np.eye(25)[np.where(known.admissible, q, -np.inf).argmax(1)]

    clinicians = sepsis.truth(known.clinician).death
    assert sepsis.truth(best("sofa"), "sofa").death > clinicians
    assert sepsis.truth(best("inverse_sofa")).death < clinicians
    env = features(reward="survival")
    env.reset(seed=0)
    _, reward, *_ = env.step(np.zeros(2, np.float32))
    assert reward in (0.0, 1.0)


def test_contract() -> None:
    env = features()
    check_env(sepsis.SepsisFeatures(), skip_render_check=True)
    assert (env.spec.id, env.spec.max_episode_steps) == (ID, 20)
    trajectories = []
    for seed in (0, 0, 1):
        observation, _ = env.reset(seed=seed)
        trajectories.append([observation, *(env.step(np.array([0.5, -0.5]))[0] for _ in range(2))])
    assert np.array_equal(trajectories[0], trajectories[1])
    assert not np.array_equal(trajectories[0], trajectories[2])
    venv = make_vec(ID, 2, seed=0, env_kwargs={"representation": "features"})
    assert venv.reset().shape == (2, 13)
    assert clinician_of(ID) is sepsis.Clinician


def test_time_limit() -> None:
    env = features(max_episode_steps=1)
    env.reset(seed=0)
    _, _, ended, truncated, _ = env.step(np.zeros(2))
    assert ended != truncated


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"representation": "pictures"}, "There is no representation 'pictures': use one of states, features."),
        ({"representation": "features", "reward": "money"}, "There is no reward 'money': use one of inverse_sofa"),
        ({"representation": "features", "rewrad": "sofa"}, "no argument 'rewrad': did you mean 'reward'?"),
        ({"representation": "features", "max_episode_steps": 0}, "max_episode_steps is 0: use a whole number from 1 on."),
        ({"representation": "features", "render_mode": "human"}, "has no render_mode 'human': leave it out."),
    ],
)
def test_refusals(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EnvError) as error:
        make_env(ID, **kwargs)
    assert sentence in str(error.value)
