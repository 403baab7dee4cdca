"""A callback that saves checkpoints by the clock, for Tether's agents and for SB3's own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from .agent import Agent
from .checkpoint import Checkpoint, save_checkpoint

logger = logging.getLogger("tether")

PATIENCE = 10.0  # seconds that a save waits for the next rollout, before which there is the least to write


class CheckpointCallback(BaseCallback):
    """Saves a checkpoint every ``seconds`` of wall time, or less often where saving takes more than a tenth of that.

    In a script of your own:

        callback = CheckpointCallback("checkpoints")
        agent = MDPO.load_checkpoint("checkpoints", env) if list_checkpoints("checkpoints") else MDPO("MlpPolicy", env)
        agent.learn(total - agent.num_timesteps, callback, reset_num_timesteps=False)

    For SB3's agents ``load_checkpoint(PPO, "checkpoints", env)`` does the same. Put it behind your other callbacks.

    :param folder: of the checkpoints
    :param seconds: between two of them
    :param keep: how many of the newest stay
    :param score: how good the agent is now, from whatever you measure; the best checkpoint stays, too
    :param on_save: called after each save
    """

    def __init__(
        self,
        folder: str | Path,
        seconds: float = 120.0,
        keep: int = 2,
        score: Callable[[], float | None] = lambda: None,
        on_save: Callable[[Checkpoint], None] = lambda checkpoint: None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if not seconds > 0.0:
            raise ValueError(f"seconds between checkpoints must be above 0, not {seconds}.")
        self.folder, self.seconds, self.keep, self.score, self.on_save = Path(folder), seconds, keep, score, on_save
        self.due = float("inf")

    def _on_training_start(self) -> None:
        if self.due == float("inf"):  # a training may be many calls of `learn`
            self.due = time.monotonic() + self.seconds

    def _on_rollout_start(self) -> None:
        if time.monotonic() >= self.due:
            self.save()

    def _on_step(self) -> bool:
        if isinstance(self.model, Agent) and time.monotonic() >= self.due + min(PATIENCE, self.seconds):
            self.save()  # in the middle of a long rollout, which SB3's agents could not take up again
        return True

    def save(self) -> None:
        """Save now; a disk that is full is said, and training goes on."""
        begun = time.monotonic()
        try:
            checkpoint = save_checkpoint(self.model, self.folder, self.keep, self.score())
        except OSError as error:
            logger.warning("No checkpoint was written (%s); the former ones are whole, and it is tried again.", error)
        else:
            self.on_save(checkpoint)
        now = time.monotonic()
        self.due = now + max(self.seconds, 10.0 * (now - begun))
