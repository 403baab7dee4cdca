"""The glucose environment: its equilibrium, what doses and meals do, its costs, ends and seeds, and the behaviour."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tether.agents.common.env_state import env_state, restore_env_state
from tether.envs import EnvError, glucose
from tether.envs.glucose import (
    COST_NAMES,
    OBSERVATION_NAMES,
    Clinician,
    Glucose,
    basal_bolus,
    risk,
)
from tether.envs.suite import installed

OWN_BASAL = np.array([-0.5, -1.0])  # the patient's own rate and no bolus
NOTHING = np.array([-1.0, -1.0])


@pytest.fixture
def glucosim(need: Any) -> None:
    need(installed("glucosim"), "glucosim")


def column(observations: np.ndarray, name: str) -> Any:
    return observations[..., OBSERVATION_NAMES.index(name)]


def lived(env: Glucose, actions: Any, start: float | None = None) -> np.ndarray:
    """True glucose after each action, from the patient's own basal glucose unless told."""
    env.reset(seed=0, options=None if start is None else {"glucose": start})
    if start is None:
        env.reset(seed=0, options={"glucose": env.model.params["Gb"]})
    return np.array([env.step(action)[4]["glucose"] for action in actions])


def episode(env: Glucose, policy: Any, seed: int) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]], bool]:
    """Observations (T + 1, 10), rewards (T,), infos and whether it terminated."""
    observations, rewards, infos, ended = [env.reset(seed=seed)[0]], [], [], False
    while not ended:
        observation, reward, terminated, truncated, info = env.step(policy(observations[-1]))
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
        ended = terminated or truncated
    return np.array(observations), np.array(rewards), infos, terminated


def rule(observation: np.ndarray) -> np.ndarray:
    return basal_bolus(observation[None], np.ones(2))[0]


# ---------------------------------------------------------------------- without glucosim


def test_risk() -> None:
    np.testing.assert_allclose(risk(np.array([40.0, 70.0, 112.5, 180.0, 250.0])), [36.4, 7.76, 0.0, 7.73, 22.4], atol=0.05)


def test_the_rule_doses_what_it_says() -> None:
    observations = np.zeros((3, 10))
    observations[:, 0] = [100.0, 200.0, 200.0]
    observations[:, OBSERVATION_NAMES.index("insulin_on_board")] = [-1.0, -1.0, 1.5]
    observations[:, OBSERVATION_NAMES.index("carbohydrates_announced")] = [44.0, 0.0, 22.0]
    units = [44 / 22, 80 / 40, 22 / 22 + 80 / 40 - 1.5]
    actions = basal_bolus(observations, np.ones(2))
    np.testing.assert_allclose(actions, [[-0.5, units_ / 2.5 - 1.0] for units_ in units], atol=1e-6)
    gains = np.array([[0.5, 1.0], [1.0, 0.5], [8.0, 8.0]])
    expected = [[-0.75, 2.0 / 2.5 - 1.0], [-0.5, 1.0 / 2.5 - 1.0], [1.0, 1.0]]
    np.testing.assert_allclose(basal_bolus(observations, gains), expected, atol=1e-6)


def test_clinicians_differ_between_episodes_and_follow_from_their_seed() -> None:
    observations = np.tile(np.array([100.0] * 4 + [0.0, 0.0, 30.0, 0.0, 0.0, 1.0]), (200, 1))
    first, second, other = Clinician(1, 200), Clinician(1, 200), Clinician(2, 200)
    assert (first.gains >= 0.5).all()
    assert (first.gains <= 1.5).all()
    actions = first(observations, np.arange(200))
    assert (actions.shape, actions.dtype) == ((200, 2), np.float32)
    np.testing.assert_array_equal(actions, second(observations, np.arange(200)))
    assert not np.array_equal(actions, other(observations, np.arange(200)))
    noise = actions - basal_bolus(observations, first.gains)
    assert noise.std() == pytest.approx(glucose.NOISE, rel=0.2)
    some = np.array([7, 3])
    np.testing.assert_allclose(first(observations[:2], some), basal_bolus(observations[:2], first.gains[some]), atol=0.1)


def test_refusals() -> None:
    with pytest.raises(EnvError, match=r"There is no patient 'adlut': use one of adult, adolescent, child\."):
        Glucose("adlut")
    with pytest.raises(EnvError, match=r"patient_id is -1: use a whole number from 0 on, or None\."):
        Glucose(patient_id=-1)
    with pytest.raises(EnvError, match=r"patient_id is 1\.5: use a whole number"):
        Glucose(patient_id=1.5)
    with pytest.raises(EnvError, match=r"max_episode_steps is 0: use a whole number from 1 on\."):
        Glucose(max_episode_steps=0)
    with pytest.raises(EnvError, match=r"has no render_mode 'human': leave it out\."):
        Glucose(render_mode="human")


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.envs.suite.installed", lambda *modules: False)
    with pytest.raises(EnvError, match=r'needs an extra: pip install "tether-rl\[clinical\]".'):
        Glucose()


# ---------------------------------------------------------------------- what doses and meals do


@pytest.mark.usefixtures("glucosim")
@pytest.mark.parametrize(("patient", "patient_id"), [("adult", 0), ("adolescent", 1), ("child", 2)])
def test_the_own_basal_rate_holds_glucose(patient: str, patient_id: int) -> None:
    env = Glucose(patient, patient_id, meals=False)
    traced = lived(env, [OWN_BASAL] * 96)
    np.testing.assert_allclose(traced, env.model.params["Gb"], atol=1.0)
    assert env.model.params["gamma"] == 0.0
    assert env.on_board == pytest.approx(0.0, abs=1e-9)


@pytest.mark.usefixtures("glucosim")
def test_minutes_are_those_of_the_package() -> None:
    """Where insulin is above Ib, so that the bound of its X does not matter."""
    from glucosim.models.bergman import BergmanModel

    ours, theirs = BergmanModel(), BergmanModel()
    rng = np.random.default_rng(0)
    for rate, appearance in zip(rng.uniform(0.6, 5.0, 300), rng.uniform(0.0, 6.0, 300), strict=True):
        glucose._advance(ours, rate, appearance)
        after = theirs.step(rate, appearance)
        assert ours.glucose == pytest.approx(after["glucose"], rel=1e-12)
        assert ours.insulin_action == pytest.approx(after["insulin_action"], rel=1e-12)


@pytest.mark.usefixtures("glucosim")
def test_without_insulin_glucose_rises_to_its_balance() -> None:
    """dG = 0 with X = -p3 Ib / p2: G = p1 Gb / (p1 - p3 Ib / p2). More than the own rate lowers it."""
    env = Glucose(meals=False)
    traced = lived(env, [NOTHING] * 96)
    p = env.model.params
    assert traced[-1] == pytest.approx(p["p1"] * p["Gb"] / (p["p1"] - p["p3"] * p["Ib"] / p["p2"]), abs=0.5)
    assert 150.0 < traced[-1] < 200.0
    assert 50.0 < lived(env, [np.array([1.0, -1.0])] * 96)[-1] < 70.0


@pytest.mark.usefixtures("glucosim")
def test_a_bolus_lowers_glucose() -> None:
    """1 U in the first interval, by 20 to 50 mg/dL within an hour; nothing is left after five hours."""
    env = Glucose(meals=False)
    traced = lived(env, [np.array([-0.5, -0.6])] + [OWN_BASAL] * 20)
    fall = env.model.params["Gb"] - traced
    assert 20.0 < fall.max() < 50.0
    assert fall.argmax() in (1, 2, 3)
    assert abs(fall[-1]) < 2.0


@pytest.mark.usefixtures("glucosim")
def test_a_meal_raises_glucose() -> None:
    """Nothing happens before breakfast; it raises glucose by 2 to 6 mg/dL for each g, and is announced and remembered."""
    env = Glucose()
    env.reset(seed=0)
    env.reset(seed=0, options={"glucose": env.model.params["Gb"]})
    minute, size = min(env.plan)
    assert 405 <= minute <= 495
    assert 0.7 * 45 * 57 / 70 < size < 1.3 * 45 * 58 / 70
    before, traced = (minute - 360) // 15, []
    for step in range(before + 12):
        observation = env._look()
        assert (column(observation, "carbohydrates_announced") == pytest.approx(size)) == (step == before)
        assert (column(observation, "carbohydrates_last_hour") == pytest.approx(size)) == (0 < step - before <= 4)
        traced.append(env.step(OWN_BASAL)[4]["glucose"])
    np.testing.assert_allclose(traced[:before], env.model.params["Gb"], atol=1e-6)
    assert 2.0 * size < max(traced) - traced[0] < 6.0 * size


@pytest.mark.usefixtures("glucosim")
def test_actions_are_basal_then_bolus() -> None:
    """Both doses at their maximum: a bolus of 5 U kills, four times the basal rate gives 0.5 U and does not."""
    env = Glucose(meals=False)
    env.reset(seed=0)
    env.step(np.array([1.0, -1.0]))
    on_board = env.on_board
    assert on_board == pytest.approx(3.0 * env.basal / 4.0, rel=0.2)
    assert lived(env, [np.array([1.0, -1.0])] * 8).min() > 60.0
    env.reset(seed=0)
    env.step(np.array([-0.5, 1.0]))
    assert env.on_board == pytest.approx(5.0, rel=0.3)
    assert lived(env, [np.array([-0.5, 1.0]), OWN_BASAL]).min() < 45.0


@pytest.mark.usefixtures("glucosim")
def test_observations() -> None:
    """The sensor follows true glucose, its history moves on by one, and the slope and the time are right."""
    env = Glucose()
    observations, _, infos, _ = episode(env, rule, 3)
    assert observations.shape == (97, len(OBSERVATION_NAMES))
    assert all(row in env.observation_space for row in observations)
    np.testing.assert_array_equal(observations[1:, 1:4], observations[:-1, :3])
    true = np.array([info["glucose"] for info in infos])
    errors = observations[1:, 0] / true - 1.0  # the sensor is 10 minutes late and 2 % noisy
    assert 0.005 < errors.std() < 0.15
    differences = (observations[:, 0] - observations[:, 1]) / 15.0
    assert np.corrcoef(column(observations, "slope"), differences)[0, 1] > 0.8
    angles = 2 * np.pi * (6.0 + 0.25 * np.arange(97)) / 24.0
    np.testing.assert_allclose(column(observations, "sin_time"), np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(column(observations, "cos_time"), np.cos(angles), atol=1e-6)


# ---------------------------------------------------------------------- rewards, costs, ends


@pytest.mark.usefixtures("glucosim")
def test_rewards_and_costs_are_those_of_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    env, minutes, seen = Glucose(), list[float](), set()
    advance = glucose._advance

    def noted(model: Any, rate: float, appearance: float) -> None:
        advance(model, rate, appearance)
        minutes.append(model.glucose)

    monkeypatch.setattr(glucose, "_advance", noted)
    rng = np.random.default_rng(0)
    for seed, start in enumerate([80.0, 150.0, 300.0]):
        env.reset(seed=seed, options={"glucose": start})
        for _ in range(60):
            minutes.clear()
            _, reward, terminated, _, info = env.step(np.array([rng.uniform(-1, 1), -1.0 + 0.5 * (rng.random() < 0.2)]))
            assert info["costs"].dtype == np.float32
            assert info["costs"].tolist() == [float(min(minutes) < 70.0), float(max(minutes) > 250.0)]
            assert info["cost"] == info["costs"].sum()
            assert info["glucose"] == minutes[-1]
            assert len(minutes) == 15 or terminated
            assert reward == pytest.approx(1.0 - np.mean([float(risk(np.array(g))) for g in minutes]) / 10.0)
            seen.add(tuple(info["costs"]))
            if terminated:
                break
    assert {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)} <= seen
    assert info["costs"].shape == (len(COST_NAMES),)


@pytest.mark.usefixtures("glucosim")
def test_death_terminates() -> None:
    env = Glucose()
    _, rewards, infos, terminated = episode(env, lambda _: np.array([1.0, 1.0]), 0)
    assert terminated
    assert len(infos) < 5
    assert [info["death"] for info in infos] == [False] * (len(infos) - 1) + [True]
    assert infos[-1]["glucose"] <= 40.0
    assert infos[-1]["costs"][0] == 1.0
    assert rewards.sum() < 5.0  # a day lived well is worth some 85


@pytest.mark.usefixtures("glucosim")
def test_time_limit_is_a_truncation() -> None:
    assert [len(episode(Glucose(max_episode_steps=n), rule, 0)[1]) for n in (1, 20, 96)] == [1, 20, 96]
    assert not episode(Glucose(), rule, 0)[3]
    env = Glucose(max_episode_steps=200)  # there are meals on the third day as well
    env.reset(seed=0)
    assert len({minute // 1440 for minute, _ in env.plan}) == 3


@pytest.mark.usefixtures("glucosim")
def test_is_a_valid_environment() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some observations have no bounds
        check_env(Glucose(), skip_render_check=True)


@pytest.mark.usefixtures("glucosim")
@pytest.mark.parametrize("patient_id", [0, None])
def test_seeds(patient_id: int | None) -> None:
    first, second = Glucose(patient_id=patient_id), Glucose(patient_id=patient_id)
    observations = episode(first, rule, 5)[0]
    episode(second, rule, 6)
    np.testing.assert_array_equal(episode(second, rule, 5)[0], observations)
    assert not np.array_equal(episode(second, rule, 6)[0], observations)


@pytest.mark.usefixtures("glucosim")
def test_patients() -> None:
    def weights(env: Glucose) -> list[float]:
        env.reset(seed=0)
        return [(env.reset(), env.model.params["body_weight"])[1] for _ in range(4)]

    assert len(set(weights(Glucose(patient_id=1)))) == 1
    assert weights(Glucose(patient_id=1)) != weights(Glucose(patient_id=2))
    assert len(set(weights(Glucose(patient_id=None)))) == 4
    assert max(weights(Glucose("child", None))) <= 42.0 < 56.0 <= min(weights(Glucose("adult", None)))


@pytest.mark.usefixtures("glucosim")
def test_another_instance_goes_on() -> None:
    first, second = Glucose(patient_id=None), Glucose(patient_id=None)
    first.reset(seed=1)
    for _ in range(10):
        first.step(OWN_BASAL)
    restore_env_state(second, env_state(first))
    for _ in range(10):
        for ours, theirs in zip(first.step(OWN_BASAL)[:2], second.step(OWN_BASAL)[:2], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("glucosim")
@pytest.mark.parametrize("start", [40.0, 700.0, float("nan"), "high"])
def test_starts_that_are_refused(start: Any) -> None:
    with pytest.raises(EnvError, match=r"The glucose to start at is .*: give a number above 40 and up to 600 mg/dL."):
        Glucose().reset(options={"glucose": start})


@pytest.mark.usefixtures("glucosim")
def test_the_rule_treats_well_and_clinicians_less_so() -> None:
    """25 days each. The gain of the bolus trades one constraint for the other, which the return does not show."""
    env, days = Glucose(), {}
    clinician = Clinician(0, 25)
    policies: dict[str, Any] = {
        "rule": lambda k, o: rule(o),
        "half": lambda k, o: basal_bolus(o[None], np.array([1.0, 0.5]))[0],
        "more": lambda k, o: basal_bolus(o[None], np.array([1.0, 1.5]))[0],
        "clinician": lambda k, o: clinician(o[None], np.array([k]))[0],
        "nothing": lambda k, o: NOTHING,
    }
    for name, policy in policies.items():
        lives = [episode(env, lambda o, k=k, policy=policy: policy(k, o), k) for k in range(25)]
        assert not any(terminated for *_, terminated in lives)
        costs = np.mean([info["costs"] for _, _, infos, _ in lives for info in infos], axis=0)
        days[name] = (*costs, np.mean([rewards.sum() for _, rewards, _, _ in lives]))
    assert days["rule"][0] < 0.02
    assert days["rule"][1] < 0.02
    assert days["half"][0] < days["rule"][0] < days["more"][0]
    assert days["half"][1] > days["rule"][1] >= days["more"][1]
    assert days["nothing"][1] > 0.2
    assert days["rule"][2] > days["clinician"][2] > days["nothing"][2]
