"""What happens beside learning: evaluations, checkpoints, the finite guard for peers, hyperparameters in TensorBoard."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from tether.agents.common.finite import check_finite

from .checkpoints import save_checkpoint, save_model
from .evaluate import Evaluation, evaluate
from .manifest import write_atomically

COLUMNS = ("timesteps", "mean_reward", "std_reward", "mean_cost", "ep_length", "episodes")


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Rows of an ``evaluations.csv``; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class EvaluationCallback(BaseCallback):
    """Evaluates the policy every ``every`` env steps, keeps ``evaluations.csv`` and the best model.

    :param env: evaluation environment (``VecNormalize`` statistics follow the training environment's)
    :param folder: of the run
    :param every: env steps between evaluations
    :param episodes: whole episodes per evaluation, deterministic actions
    """

    def __init__(self, env: VecEnv, folder: Path, every: int, episodes: int) -> None:
        super().__init__()
        self.env, self.folder, self.every, self.episodes = env, folder, every, episodes
        self.rows: list[dict[str, Any]] = []
        self.last: Evaluation | None = None

    def _init_callback(self) -> None:
        done = self.model.num_timesteps
        self.rows = [r for r in read_evaluations(self.folder / "evaluations.csv") if int(float(r["timesteps"])) <= done]
        self.best = max((float(r["mean_reward"]) for r in self.rows), default=-float("inf"))
        self.next = (done // self.every + 1) * self.every

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.next:
            self.evaluate()
            self.next += self.every * (1 + (self.num_timesteps - self.next) // self.every)
        return True

    def evaluate(self) -> Evaluation:
        """Evaluate now; a second call at the same step returns the first one's result."""
        step = self.model.num_timesteps
        if self.last is not None and self.rows and int(float(self.rows[-1]["timesteps"])) == step:
            return self.last
        sync_envs_normalization(self.training_env, self.env)
        self.last = evaluate(self.model, self.env, self.episodes)
        self.rows.append({"timesteps": step, **self.last.row})
        self._write()
        self.logger.record("eval/mean_reward", self.last.returns.mean())
        self.logger.record("eval/mean_ep_length", self.last.lengths.mean())
        if self.last.costs is not None:
            self.logger.record("eval/mean_cost", self.last.costs.mean())
        if self.last.returns.mean() > self.best:
            self.best = float(self.last.returns.mean())
            save_model(self.model, self.folder / "best_model.zip")
        return self.last

    def _write(self) -> None:
        lines = [",".join(COLUMNS), *(",".join(str(row[c]) for c in COLUMNS) for row in self.rows)]
        write_atomically(self.folder / "evaluations.csv", "\n".join(lines) + "\n")


class CheckpointCallback(BaseCallback):
    """Saves the resumable state every ``seconds`` of wall time.

    :param folder: of the checkpoint
    :param on_save: called after each save, so that the manifest knows how far the checkpoint goes
    """

    def __init__(self, folder: Path, seconds: float, on_save: Callable[[], None]) -> None:
        super().__init__()
        self.folder, self.seconds, self.on_save = folder, seconds, on_save

    def _on_training_start(self) -> None:
        self.due = time.monotonic() + self.seconds

    def _on_step(self) -> bool:
        if time.monotonic() >= self.due:
            self.save()
        return True

    def save(self) -> None:
        """Save now."""
        save_checkpoint(self.model, self.folder)
        self.on_save()
        self.due = time.monotonic() + self.seconds


class FiniteCallback(BaseCallback):
    """Stops at the first reward or observation that is not finite, for agents that do not look themselves."""

    def _on_step(self) -> bool:
        check_finite(self.locals["rewards"], "reward", self.num_timesteps)
        check_finite(self.locals["new_obs"], "observation", self.num_timesteps)
        return True


class CostCallback(BaseCallback):
    """Logs ``rollout/ep_cost_mean`` over the last 100 episodes, where the environment reports costs."""

    def _on_training_start(self) -> None:
        self.running = [0.0] * self.training_env.num_envs
        self.episodes: list[float] = []

    def _on_step(self) -> bool:
        for env, info in enumerate(self.locals["infos"]):
            if "cost" in info:
                self.running[env] += info["cost"]
                if self.locals["dones"][env]:
                    self.episodes = [*self.episodes[-99:], self.running[env]]
                    self.running[env] = 0.0
                    self.logger.record("rollout/ep_cost_mean", sum(self.episodes) / len(self.episodes))
        return True


class HParamCallback(BaseCallback):
    """Fills TensorBoard's hparams tab, and shows the whole configuration as text.

    :param hparams: flat mapping of names to numbers, words or booleans
    :param text: the configuration as Markdown
    """

    def __init__(self, hparams: Mapping[str, Any], text: str) -> None:
        super().__init__()
        self.hparams, self.text = dict(hparams), text

    def _on_training_start(self) -> None:
        metrics: dict[str, float | int] = {"rollout/ep_rew_mean": 0.0, "eval/mean_reward": 0.0}
        self.logger.record("hparams", HParam(self.hparams, metrics), exclude=("stdout", "log", "json", "csv"))
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                output.writer.add_text("configuration", self.text, self.num_timesteps)

    def _on_step(self) -> bool:
        return True
