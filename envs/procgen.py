"""ProcGen's 16 games, easy and hard, from EnvPool's build or, where Qt is missing, from OpenAI's.

A game ends by itself after its own number of steps (500 to 6,000) and, as in OpenAI's build, that is a termination; a
shorter ``max_episode_steps`` is a truncation.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from .pool_env import PoolEnv
from .suite import EnvError, PoolTask, Suite, installed, unknown_argument

GAMES = (
    "bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot", "heist", "jumper",
    "leaper", "maze", "miner", "ninja", "plunder", "starpilot",
)  # fmt: skip

_FORM = re.compile(rf"procgen/(?P<game>{'|'.join(GAMES)})-(?P<mode>easy|hard)-v0")
_LEVELS = {"num_levels": 200, "start_level": 0}
_ARGUMENTS = frozenset({
    *_LEVELS, "center_agent", "paint_vel_info", "restrict_themes", "use_backgrounds", "use_generated_assets",
    "use_monochrome_assets", "use_sequential_levels",
})  # fmt: skip


class OpenAIProcgen(gym.Env):
    """One game of OpenAI's build: observations (64, 64, 3) uint8, 15 actions.

    It starts the next episode in the step that ends one, so the last picture of an episode is the one before its end.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012
    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Discrete(15)

    def __init__(self, render_mode: str | None, **options: Any) -> None:
        self.render_mode, self._options = render_mode, options
        self._game: Any = None
        self._fresh = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        from procgen import ProcgenGym3Env

        super().reset(seed=seed)
        if seed is not None or not self._fresh:
            self._game = ProcgenGym3Env(num=1, num_threads=0, rand_seed=int(self.np_random.integers(2**31)), **self._options)
        self._fresh = False
        self._picture = self._look()[1]
        return self._picture, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._game.act(np.array([action]))
        reward, picture, self._fresh = self._look()
        if not self._fresh:
            self._picture = picture
        return self._picture, reward, self._fresh, False, {}

    def _look(self) -> tuple[float, np.ndarray, bool]:
        rewards, observations, firsts = self._game.observe()
        return float(rewards[0]), observations["rgb"][0].copy(), bool(firsts[0])

    def resumable_state(self) -> dict[str, Any]:
        """The game's own state and what it showed last, as plain data."""
        state = {"random": self.np_random.bit_generator.state, "fresh": self._fresh, "game": None}
        if self._game is not None:
            state |= {"game": self._game.callmethod("get_state")[0], "picture": self._picture}
        return state

    def resume_from(self, state: dict[str, Any]) -> None:
        """Bring the game to where :meth:`resumable_state` found it."""
        if state["game"] is not None:
            if self._game is None:
                self.reset(seed=0)
            self._game.callmethod("set_state", [state["game"]])
            self._game.observe()
            self._picture = state["picture"].copy()
        self._fresh = state["fresh"]
        self.np_random.bit_generator.state = state["random"]

    def render(self) -> Any:
        return self._picture if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = None


@functools.cache
def build() -> str | None:
    """Which build of ProcGen there is: ``envpool``, ``openai`` or none."""
    if installed("envpool"):
        try:  # without Qt the module can be imported, and asking for its names raises
            from envpool.procgen import ProcgenEnvSpec  # noqa: F401

            return "envpool"
        except ImportError:
            pass
    return "openai" if installed("procgen", "gym3", "gym") else None


def _owns(env_id: str) -> bool:
    return env_id.startswith("procgen/")


def _ids() -> list[str]:
    return [f"procgen/{game}-{mode}-v0" for game in GAMES for mode in ("easy", "hard")] if build() else []


def _make(
    env_id: str, flatten: bool, render_mode: str | None, *, max_episode_steps: int | None = None, **options: Any
) -> gym.Env:
    """Make a game.

    :param options: ``num_levels`` (0 is all, by default 200) from ``start_level`` on, and the game's own options
    """
    match = _parse(env_id)
    for name in options:
        if name not in _ARGUMENTS:
            raise unknown_argument(env_id, name, _ARGUMENTS)
    env: gym.Env
    if build() == "envpool":
        config = {**_LEVELS, **options, "channel_first": False}
        env = PoolEnv(_pool_id(match), OpenAIProcgen.observation_space, OpenAIProcgen.action_space, config, render_mode)
    else:
        env = OpenAIProcgen(render_mode, env_name=match["game"], distribution_mode=match["mode"], **{**_LEVELS, **options})
    env.spec = EnvSpec(env_id, max_episode_steps=max_episode_steps)
    return gym.wrappers.TimeLimit(env, max_episode_steps) if max_episode_steps else env


def _parse(env_id: str) -> re.Match[str]:
    match = _FORM.fullmatch(env_id)
    if match is None:
        raise gym.error.NameNotFound(env_id)
    if build() is None:
        raise EnvError(
            f'{env_id} needs EnvPool and Qt 5: pip install "tether-rl[procgen]" and apt-get install libqt5core5a '
            "libqt5gui5, or, without Qt, pip install gym==0.26.2 cffi and pip install --no-deps gym3 "
            "procgen-mirror==0.10.7."
        )
    return match


def _pool_id(match: re.Match[str]) -> str:
    return f"{match['game'].capitalize()}{match['mode'].capitalize()}-v0"


def _pool(env_id: str) -> PoolTask | None:
    if _FORM.fullmatch(env_id) is None:
        return None
    match = _parse(env_id)
    if build() != "envpool":
        return None
    return PoolTask(_pool_id(match), agrees=True, arguments=_ARGUMENTS, config=_LEVELS)


SUITE = Suite("procgen", owns=_owns, ids=_ids, make=_make, pool=_pool, unseen={"num_levels": 0, "start_level": 0})
