"""Type-1 diabetes with two doses to choose, basal and bolus insulin, and two constraints on the patient's glucose.

The equations are those of glucosim 0.1.1: Bergman's minimal model of glucose and insulin, a gut, and a glucose sensor.
Nobody has validated them against patients: this is a world for algorithms, and nothing in it is medical advice.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from .suite import EnvError, require

ID = "tether/Glucose-v0"
STEPS = 96  # time limit: 24 h
INTERVAL = 15  # minutes between two decisions
OBSERVATION_NAMES = (
    "glucose",  # the sensor's reading, mg/dL
    "glucose_15",  # the same 15, 30 and 45 minutes ago
    "glucose_30",
    "glucose_45",
    "slope",  # of the readings of the last 15 minutes, mg/dL per minute
    "insulin_on_board",  # U beyond the patient's own basal rate; negative where there was less
    "carbohydrates_announced",  # g, eaten in the coming interval
    "carbohydrates_last_hour",  # g
    "sin_time",  # of the day
    "cos_time",
)
COST_NAMES = ("hypoglycaemia", "hyperglycaemia")
PATIENTS = ("adult", "adolescent", "child")

LOW, HIGH = 70.0, 250.0  # mg/dL, outside which an interval costs
DEATH = 40.0  # mg/dL, at which an episode ends
LARGEST_BASAL = 4.0  # times the patient's own basal rate
LARGEST_BOLUS = 5.0  # U per interval
BOLUS_MINUTES = 5  # of an interval, in which the bolus flows
ON_BOARD_MINUTES = 45.0  # time constant of insulin on board; the model's insulin acts for 1/n + 1/p2, about as long

_MEALS = ((450, 45.0), (750, 70.0), (930, 20.0), (1110, 80.0))  # minute of the day, and g for 70 kg, as in glucosim
_DELAY = 45  # minutes by which a meal may be early or late
_SIZES = (0.7, 1.3)  # times the usual size
_MORNING, _DAY = 360, 1440  # minutes: episodes begin at 6 o'clock
_START = (0.85, 1.5)  # times the patient's basal glucose
_SENSED = 5  # minutes between two readings of the sensor


def risk(glucose: np.ndarray) -> np.ndarray:
    """Kovatchev's blood-glucose risk 10 f^2 with f = 1.509 (ln(g)^1.084 - 5.381), g > 1 in mg/dL: any shape, float64.

    It is 0 at 112.5, 7.8 at 70, 7.7 at 180, 22 at 250 and 36 at 40 mg/dL.
    """
    return 10.0 * (1.509 * (np.log(glucose) ** 1.084 - 5.381)) ** 2


class Glucose(gym.Env):
    """Choose basal and bolus insulin every 15 minutes for a day that begins at 6 o'clock.

    Observations (10,) float32 are named in `OBSERVATION_NAMES`. Actions (2,) in [-1, 1] are basal and bolus: a rate of
    2 (a_0 + 1) times the patient's own basal rate, and 2.5 (a_1 + 1) U in the first five minutes. The reward is
    1 - risk / 10, averaged over the minutes of the interval: at most 1, and below 0 outside 66 to 192 mg/dL. The 1 makes
    a day worth living: with minus the risk alone an early death would be the best policy. ``info["costs"]`` says whether
    glucose was below 70 and whether it was above 250 mg/dL in any minute of the interval, (2,) float32, ``info["cost"]``
    is their sum, ``info["glucose"]`` the true glucose at its end in mg/dL. The episode ends where that falls to 40, with
    ``info["death"]``.

    glucosim's patients have a pancreas; here its parameter gamma is 0. The patient's own basal rate, n Ib 60 VI BW / 1000
    U/h, is then the one under which insulin stays at Ib and glucose at Gb. glucosim also keeps insulin action X at 0 or
    above, so that its patients would stay at Gb with no insulin at all. Here X may be negative, as Bergman's equations have
    it: glucose then rises slowly, to 172 mg/dL in the default patient.

    :param patient: ``adult``, ``adolescent`` or ``child``
    :param patient_id: seed of the virtual patient, or None for another one in every episode
    :param meals: whether there are breakfast, lunch, snack and dinner, at random times within 45 minutes of the usual
        ones, with random sizes in proportion to body weight
    :param max_episode_steps: time limit, a truncation
    :raises EnvError: for an argument out of its range, or where glucosim is not installed

    ``reset(options={"glucose": g})`` starts at g mg/dL rather than at 0.85 to 1.5 times the patient's Gb.
    """

    metadata = {"render_modes": []}  # noqa: RUF012
    cost_names = COST_NAMES

    def __init__(
        self,
        patient: str = "adult",
        patient_id: int | None = 0,
        meals: bool = True,
        max_episode_steps: int = STEPS,
        render_mode: str | None = None,
    ) -> None:
        if patient not in PATIENTS:
            raise EnvError(f"There is no patient '{patient}': use one of {', '.join(PATIENTS)}.")
        if patient_id is not None and not (_is_whole(patient_id) and patient_id >= 0):
            raise EnvError(f"patient_id is {patient_id!r}: use a whole number from 0 on, or None.")
        if not (_is_whole(max_episode_steps) and max_episode_steps >= 1):
            raise EnvError(f"max_episode_steps is {max_episode_steps!r}: use a whole number from 1 on.")
        if render_mode is not None:
            raise EnvError(f"{ID} has no render_mode '{render_mode}': leave it out.")
        require(ID, "clinical", "glucosim")
        self.patient, self.patient_id, self.meals = patient, patient_id, meals
        self.max_episode_steps, self.render_mode = max_episode_steps, render_mode
        highest = np.array([500.0] * 4 + [np.inf] * 4 + [1.0] * 2, np.float32)
        lowest = np.array([30.0] * 4 + [-np.inf] * 2 + [0.0] * 2 + [-1.0] * 2, np.float32)
        self.observation_space = spaces.Box(lowest, highest, dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    # ------------------------------------------------------------------ the beginning of a day

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        from glucosim.models.bergman import BergmanModel
        from glucosim.models.meal import MealModel
        from glucosim.models.patient import VirtualPatient
        from glucosim.models.sensor import CGMSensor

        super().reset(seed=seed)
        number = int(self.np_random.integers(2**31)) if self.patient_id is None else self.patient_id
        params = {**VirtualPatient(self.patient, seed=number).params, "gamma": 0.0}
        self.model = BergmanModel(params)
        self.gut = MealModel({"BW": params["body_weight"], "VG": params["VG"]})
        self.sensor = CGMSensor(sample_interval=_SENSED, seed=int(self.np_random.integers(2**31)))
        self.basal = params["n"] * params["Ib"] * 60.0 * params["VI"] * params["body_weight"] / 1000.0  # U/h
        self.plan = self._draw_meals(params["body_weight"]) if self.meals else []
        start = params["Gb"] * self.np_random.uniform(*_START)
        start = _checked_start((options or {}).get("glucose", start))
        self.model.reset(start)
        self.sensor.reset(start)
        self.time, self.steps, self.on_board = _MORNING, 0, 0.0
        self.readings = deque((self.sensor.measure(start, _SENSED) for _ in range(10)), maxlen=10)  # of 45 minutes
        return self._look(), {"glucose": self.model.glucose}

    def _draw_meals(self, weight: float) -> list[tuple[int, float]]:
        """Minute, counted from the first midnight, and g of every meal, for body weight in kg."""
        days = 1 + (_MORNING + INTERVAL * self.max_episode_steps) // _DAY
        delays = self.np_random.integers(-_DELAY, _DELAY + 1, (days, len(_MEALS)))
        sizes = self.np_random.uniform(*_SIZES, (days, len(_MEALS))) * weight / 70.0
        return [
            (day * _DAY + minute + int(delays[day, k]), usual * float(sizes[day, k]))
            for day in range(days)
            for k, (minute, usual) in enumerate(_MEALS)
        ]

    # ------------------------------------------------------------------ an interval

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        basal, bolus = (np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0) + 1.0) / 2.0
        glucose = self._live(float(basal) * LARGEST_BASAL * self.basal, float(bolus) * LARGEST_BOLUS)
        self.steps += 1
        costs = np.array([glucose.min() < LOW, glucose.max() > HIGH], np.float32)
        dead = bool(glucose[-1] <= DEATH)
        info = {"costs": costs, "cost": float(costs.sum()), "glucose": float(glucose[-1]), "death": dead}
        truncated = self.steps >= self.max_episode_steps and not dead
        return self._look(), 1.0 - float(risk(glucose).mean()) / 10.0, dead, truncated, info

    def _live(self, rate: float, bolus: float) -> np.ndarray:
        """Glucose in mg/dL after each minute of an interval, (15,), or fewer up to death; rate in U/h, bolus in U."""
        eaten, glucose = dict(self._eaten(self.time, self.time + INTERVAL)), []
        for minute in range(INTERVAL):
            self.gut.announce_meal(eaten.get(self.time, 0.0))
            flow = rate + bolus * 60.0 / BOLUS_MINUTES * (minute < BOLUS_MINUTES)
            _advance(self.model, flow, self.gut.step())
            reading = self.sensor.measure(self.model.glucose)
            self.time += 1
            self.on_board += (flow - self.basal) / 60.0 - self.on_board / ON_BOARD_MINUTES
            if self.time % _SENSED == 0:
                self.readings.append(reading)
            glucose.append(self.model.glucose)
            if self.model.glucose <= DEATH:
                break
        return np.array(glucose)

    def _eaten(self, start: int, end: int) -> list[tuple[int, float]]:
        """The meals, minute and g, in start <= minute < end."""
        return [(minute, carbohydrates) for minute, carbohydrates in self.plan if start <= minute < end]

    def _look(self) -> np.ndarray:
        readings = list(self.readings)[::-1]
        # Least squares through the last four readings, at -15, -10, -5 and 0 minutes.
        slope = (7.5 * (readings[0] - readings[3]) + 2.5 * (readings[1] - readings[2])) / 125.0
        announced, recent = (
            sum(carbohydrates for _, carbohydrates in self._eaten(self.time + start, self.time + end))
            for start, end in ((0, INTERVAL), (-60, 0))
        )
        angle = 2.0 * math.pi * self.time / _DAY
        rest = [slope, self.on_board, announced, recent, math.sin(angle), math.cos(angle)]
        return np.array([*readings[::3], *rest], np.float32)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _checked_start(glucose: Any) -> float:
    if not (isinstance(glucose, (int, float, np.number)) and DEATH < glucose <= 600.0):
        raise EnvError(f"The glucose to start at is {glucose!r}: give a number above 40 and up to 600 mg/dL.")
    return float(glucose)


def _advance(model: Any, rate: float, appearance: float) -> None:
    """One minute of ``BergmanModel.step`` without its bound X >= 0, for insulin in U/h and a meal in mg/dL per minute.

    The same fourth-order Runge-Kutta step on plain floats, which takes a third of the time.
    """
    state = (model._glucose, model._insulin_action, model._insulin)
    k1 = model._derivatives(state, rate, appearance).tolist()
    k2 = model._derivatives([s + 0.5 * k for s, k in zip(state, k1, strict=True)], rate, appearance).tolist()
    k3 = model._derivatives([s + 0.5 * k for s, k in zip(state, k2, strict=True)], rate, appearance).tolist()
    k4 = model._derivatives([s + k for s, k in zip(state, k3, strict=True)], rate, appearance).tolist()
    glucose, model._insulin_action, insulin = (
        s + (a + 2.0 * b + 2.0 * c + d) / 6.0 for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
    )
    model._glucose, model._insulin = min(max(glucose, 10.0), 600.0), max(insulin, 0.0)


# ---------------------------------------------------------------------- a behaviour to learn from

ICR = 22.0  # g of carbohydrates that 1 U covers
CF = 40.0  # mg/dL by which 1 U lowers glucose
TARGET = 120.0  # mg/dL
NOISE = 0.02  # standard deviation of `Clinician`'s actions: 4 % of the basal rate, 0.05 U

_USED = ("glucose", "insulin_on_board", "carbohydrates_announced")


def basal_bolus(observations: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Basal rate and bolus by the usual rules of thumb, each times a gain.

        basal = gain_0 (the patient's own rate)
        bolus = gain_1 (carbohydrates / ICR + max(0, (g - target) / CF - insulin on board)) in U

    ICR and CF come from a small search with the default patient: under the rule itself glucose falls below 70 mg/dL in 0.8 %
    of the intervals, and rises above 250 in none.

    :param observations: (B, 10) as `Glucose` gives them
    :param gain: (B, 2), or (2,) for all; 1 is the rule itself
    :return: actions (B, 2) float32 in [-1, 1]
    """
    columns = np.asarray(observations, dtype=np.float64).T
    glucose, on_board, announced = (columns[OBSERVATION_NAMES.index(name)] for name in _USED)
    correction = np.maximum(0.0, (glucose - TARGET) / CF - np.maximum(on_board, 0.0))
    doses = np.column_stack([np.full(len(announced), 1.0 / LARGEST_BASAL), (announced / ICR + correction) / LARGEST_BOLUS])
    return np.clip(2.0 * gain * doses - 1.0, -1.0, 1.0).astype(np.float32)


class Clinician:
    """`basal_bolus` with gains that differ from episode to episode, and noise: a behaviour to collect data with.

    :param seed: of gains and noise
    :param episodes: their number; each has gains of its own, uniform in [0.5, 1.5]^2
    """

    def __init__(self, seed: int, episodes: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.gains = self.rng.uniform(0.5, 1.5, (episodes, 2))

    def __call__(self, observations: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        """Actions (B, 2) float32 for observations (B, 10) of the episodes of these numbers (B,)."""
        actions = basal_bolus(observations, self.gains[episodes])
        return np.clip(actions + self.rng.normal(0.0, NOISE, actions.shape), -1.0, 1.0).astype(np.float32)
