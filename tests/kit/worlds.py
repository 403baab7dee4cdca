"""Environments small enough for exact answers."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper


class Bandit(gym.Env):
    """One state, one step; reward is that of the chosen arm."""

    def __init__(self, rewards: tuple[float, ...] = (1.0, -1.0, 0.5, 0.0)) -> None:
        self.observation_space = spaces.Discrete(1)
        self.action_space = spaces.Discrete(len(rewards))
        self.rewards = rewards

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, self.rewards[int(action)], True, False, {}


class Identity(gym.Env):
    """The action must repeat the observation: 1 for doing so (boxes: minus the distance); 10 steps an episode."""

    def __init__(self, space: spaces.Space[Any], cost: bool = False) -> None:
        self.action_space = space
        self.observation_space = space
        self.cost = cost

    def _observe(self):
        self.state = self.observation_space.sample()
        return self.state

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        if isinstance(self.action_space, spaces.Box):
            reward = 1.0 - float(np.abs(np.asarray(action) - self.state).mean())
        else:
            reward = float(np.mean(np.asarray(action) == self.state))
        self.steps += 1
        info = {"cost": 1.0} if self.cost else {}
        return self._observe(), reward, False, self.steps >= 10, info


class Broken(gym.Env):
    """Gives a reward or an observation that is not finite at one step."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, what: str = "reward", at: int = 7) -> None:
        self.what, self.at, self.count = what, at, 0

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.count += 1
        broken = self.count == self.at
        observation = np.full(2, np.nan if broken and self.what == "observation" else 0.1, np.float32)
        return observation, float("inf") if broken and self.what == "reward" else 0.5, False, self.count % 20 == 0, {}


class Pictures(gym.Env):
    """36 x 36 uint8 frames whose colour names the right action."""

    observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.steps = 0
        return self._frame(), {}

    def _frame(self) -> np.ndarray:
        self.colour = int(self.np_random.integers(3))
        frame = np.zeros((36, 36, 3), np.uint8)
        frame[..., self.colour] = 255
        return frame

    def step(self, action):
        reward = float(int(action) == self.colour)
        self.steps += 1
        return self._frame(), reward, False, self.steps >= 10, {}


class DictIdentity(Identity):
    """:class:`Identity` whose observation is a dict."""

    def __init__(self) -> None:
        super().__init__(spaces.Discrete(3))
        self.inner = self.observation_space
        self.observation_space = spaces.Dict(
            {"state": spaces.Discrete(3), "noise": spaces.Box(-1.0, 1.0, (2,), np.float32)}
        )

    def _observe(self):
        self.observed = self.observation_space.sample()
        self.state = self.observed["state"]
        return self.observed


class Mortal(gym.Env):
    """The environment with seed 1 dies at its 30th step, in the way that it is told."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, how: str = "kill") -> None:
        self.how, self.count, self.mortal = how, 0, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.mortal = self.mortal or seed == 1
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.count += 1
        if self.mortal and self.count == 30:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "exit":
                os._exit(3)
            raise RuntimeError("The motor is broken.")
        return np.zeros(2, np.float32), 0.0, False, self.count % 10 == 0, {}


class ThreeTorques(gym.ActionWrapper):
    """Pendulum for agents of discrete actions: full torque to either side, or none."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1").unwrapped)
        self.action_space = spaces.Discrete(3)

    def action(self, action):
        return np.array([2.0 * (int(action) - 1)], np.float32)


class VecThreeActions(VecEnvWrapper):
    """A vector of environments with one action in a box, for agents of discrete actions: its ends and its middle."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv, action_space=spaces.Discrete(3))
        box = venv.action_space
        self.actions = np.stack([box.low, (box.low + box.high) / 2.0, box.high])

    def reset(self):
        return self.venv.reset()

    def step_async(self, actions):
        self.venv.step_async(self.actions[actions])

    def step_wait(self):
        return self.venv.step_wait()


gym.register("KitTest/ThreeTorques-v0", "tests.kit.worlds:ThreeTorques", max_episode_steps=200)
gym.register("FaultTest/Mortal-v0", "tests.kit.worlds:Mortal")
