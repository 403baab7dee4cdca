"""Atari games of the Arcade Learning Environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from .suite import Suite, installed, require


def _owns(env_id: str) -> bool:
    return env_id.startswith("ALE/")


def _ids() -> list[str]:
    if not installed("ale_py", "cv2"):
        return []
    _register()
    return sorted(env_id for env_id in gym.registry if env_id.startswith("ALE/") and env_id.endswith("-v5"))


def _register() -> None:
    import ale_py

    gym.register_envs(ale_py)


def _make(
    env_id: str,
    flatten: bool,
    render_mode: str | None,
    *,
    preprocess: bool = False,
    noop_max: int = 30,
    screen_size: int = 84,
    terminal_on_life_loss: bool = True,
    clip_reward: bool = True,
    **kwargs: Any,
) -> gym.Env:
    """Make a game.

    :param preprocess: wrap it in SB3's ``AtariWrapper`` (every fourth frame, grey, (84, 84, 1) uint8), whose arguments
        the next four are; `make_vec` does. Scores are whole games' without ``clip_reward`` and
        ``terminal_on_life_loss`` only.
    """
    require(env_id, "atari", "ale_py", "cv2")
    _register()
    if not preprocess:
        return gym.make(env_id, render_mode=render_mode, disable_env_checker=True, **kwargs)
    from stable_baselines3.common.atari_wrappers import AtariWrapper

    # The wrapper skips the frames, so the game itself must not.
    env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True, frameskip=1, **kwargs)
    return AtariWrapper(
        env,
        noop_max=noop_max,
        screen_size=screen_size,
        terminal_on_life_loss=terminal_on_life_loss,
        clip_reward=clip_reward,
    )


_SCORING = {"clip_reward": False, "terminal_on_life_loss": False}
SUITE = Suite("atari", owns=_owns, ids=_ids, make=_make, vec_arguments={"preprocess": True}, frame_stack=4, scoring=_SCORING)
