"""What happens beside learning: evaluations, stopping, the finite guard for peers, costs, the configuration's log."""

from __future__ import annotations

import copy
import csv
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from tether.agents.common.agent import Agent
from tether.agents.common.finite import ADVICE, NonFiniteError, check_finite
from tether.agents.common.model_file import write_model
from tether.agents.common.rollout import stacked
from tether.agents.common.workers import close
from tether.agents.girl.drift import CONTEXT, Episode

from .evaluate import Evaluation, evaluate
from .imagination import FPS, EpisodeRecorder, chart, drift_row, drift_table, film, has_world_model
from .imagination_report import COLUMNS as DRIFT_COLUMNS
from .interrupts import Stop
from .logs import write_configuration, write_figure, write_now, write_video
from .manifest import write_atomically

COLUMNS = ("timesteps", "mean_reward", "std_reward", "mean_cost", "ep_length", "episodes")
UNSEEN_COLUMNS = ("unseen_mean_reward", "unseen_std_reward")  # where training does not see all levels
SUCCESS_COLUMNS = ("success_rate",)  # where the environment reports success


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Rows of an ``evaluations.csv``; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{**row, "timesteps": int(row["timesteps"])} for row in csv.DictReader(file)]


class EvaluationCallback(BaseCallback):
    """Evaluates the policy every ``every`` steps, keeps ``evaluations.csv`` and the best model.

    :param env: evaluation environment; a ``VecNormalize`` follows the statistics of the training environment's
    :param folder: of the run
    :param every: steps between evaluations
    :param episodes: whole episodes per evaluation
    :param seed: an evaluation's episodes follow from it and the step, so that a resumed run evaluates as an uninterrupted one
    :param deterministic: take the likeliest actions, and do not sample
    :param unseen: a second environment, of what training does not see
    """

    def __init__(
        self,
        env: VecEnv,
        folder: Path,
        every: int,
        episodes: int,
        seed: int = 0,
        deterministic: bool = True,
        unseen: VecEnv | None = None,
    ) -> None:
        super().__init__()
        self.env, self.folder, self.every, self.episodes, self.seed = env, folder, every, episodes, seed
        self.deterministic, self.unseen = deterministic, unseen
        self.next: int | None = None

    def _init_callback(self) -> None:
        if self.next is not None:  # of a second training, in whose file there may be rows of what a kill cut off
            return
        done = self.model.num_timesteps
        self.rows = [row for row in read_evaluations(self.folder / "evaluations.csv") if row["timesteps"] <= done]
        self.best = max((float(row["mean_reward"]) for row in self.rows), default=-float("inf"))
        last = self.rows[-1]["timesteps"] if self.rows else done
        self.next = (last // self.every + 1) * self.every

    def _on_step(self) -> bool:
        # The last one is made after the last update, see `finish`.
        assert self.next is not None
        if self.next <= self.num_timesteps < self.model._total_timesteps:
            self.evaluate()
        return True

    def evaluate_once(self, model: BaseAlgorithm) -> None:
        """Evaluate outside of a training, if it was not done at this step."""
        self.init_callback(model)
        if not self.rows or self.rows[-1]["timesteps"] < model.num_timesteps:
            self.evaluate()

    def finish(self) -> None:
        """Evaluate the final policy."""
        self.rows = [row for row in self.rows if row["timesteps"] < self.model.num_timesteps]
        self.evaluate()

    def evaluate(self) -> None:
        """Evaluate now, write the row, and keep the model if it is the best so far."""
        step = self.model.num_timesteps
        self.next = (step // self.every + 1) * self.every
        recorder = EpisodeRecorder(self.model) if has_world_model(self.model) else None
        result = self._episodes_of(self.env, step, recorder)
        row, logged = {"timesteps": step, **result.row}, _logged(result)
        if recorder is not None:
            told, drift = drift_row(self.model, recorder.episodes, self.seed + step)
            if drift is not None:
                write_atomically(self.folder / "drift.csv", drift_table(drift))
            row |= told
            logged |= {f"eval/{name}": value for name, value in told.items()}
            for episode in [episode for episode in recorder.episodes if len(episode.actions) >= CONTEXT][:1]:
                self._show_dream(episode, step)
        if self.unseen is not None:
            unseen = self._episodes_of(self.unseen, step)
            row |= {"unseen_mean_reward": unseen.row["mean_reward"], "unseen_std_reward": unseen.row["std_reward"]}
            logged["eval/unseen_mean_reward"] = float(unseen.returns.mean())
        self.rows.append(row)
        self._write()
        write_now(self.logger, logged, step)
        if result.returns.mean() > self.best:
            self.best = float(result.returns.mean())
            write_model(self.model, self.folder / "best_model.zip")

    def _show_dream(self, episode: Episode, step: int) -> None:
        """A real episode beside what the model imagines of it, in TensorBoard."""
        dream = self.model.dream(episode, CONTEXT)  # type: ignore[attr-defined]
        frames, figure = film(dream), chart(dream)
        if frames is not None:
            write_video(self.logger, "imagination/film", frames, step, FPS)
        if figure is not None:
            write_figure(self.logger, "imagination/chart", figure, step)

    def _episodes_of(self, env: VecEnv, step: int, watch: EpisodeRecorder | None = None) -> Evaluation:
        """Evaluate in one environment; training's own random numbers stay as they are."""
        normalizer = self.model.get_vec_normalize_env()
        if normalizer is not None:
            assert isinstance(env, VecNormalize)
            env.obs_rms = copy.deepcopy(normalizer.obs_rms)
        env.seed(self.seed + step)
        device, numpys = self.model.device, np.random.get_state()  # noqa: NPY002
        with th.random.fork_rng([device] if device.type == "cuda" else []):
            th.manual_seed(self.seed + step)
            np.random.seed((self.seed + step) % 2**32)  # noqa: NPY002
            try:
                return evaluate(self.model, env, self.episodes, self.deterministic, watch)
            finally:
                np.random.set_state(numpys)  # noqa: NPY002

    def close(self) -> None:
        """Close the environments."""
        for env in (self.env, self.unseen):
            if env is not None:
                close(env)

    def latest(self) -> float | None:
        """Mean return of the last evaluation, if there was one."""
        return float(self.rows[-1]["mean_reward"]) if self.rows else None

    def _write(self) -> None:
        further = [c for c in (*UNSEEN_COLUMNS, *SUCCESS_COLUMNS, *DRIFT_COLUMNS) if any(c in row for row in self.rows)]
        columns = [*COLUMNS, *further]
        lines = [",".join(columns), *(",".join(str(row.get(c, "")) for c in columns) for row in self.rows)]
        write_atomically(self.folder / "evaluations.csv", "\n".join(lines) + "\n")


def _logged(result: Evaluation) -> dict[str, float]:
    values = {"eval/mean_reward": result.returns, "eval/mean_ep_length": result.lengths}
    values |= {} if result.costs is None else {"eval/mean_cost": result.costs}
    values |= {} if result.successes is None else {"eval/success_rate": result.successes}
    return {name: float(of_episodes.mean()) for name, of_episodes in values.items()}


class StopCallback(BaseCallback):
    """Ends the training where :class:`Stop` was requested: at once for our agents, for peers after a checkpoint.

    SB3's own agents lose a rollout that is stopped, so that they are saved before one.

    :param save: saves a checkpoint
    """

    def __init__(self, stop: Stop, save: Callable[[], None]) -> None:
        super().__init__()
        self.stop, self.save, self.saved, self.stopped = stop, save, False, False

    def _on_rollout_start(self) -> None:
        if self.stop.requested and not isinstance(self.model, Agent):
            self.save()
            self.saved = True

    def _on_step(self) -> bool:
        self.stopped = self.stop.requested and (self.saved or isinstance(self.model, Agent))
        return not self.stopped


class FiniteCallback(BaseCallback):
    """Stops at the first action, reward, observation or logged loss that is not finite, for SB3's own agents."""

    def _on_rollout_start(self) -> None:
        for name, value in self.logger.name_to_value.items():
            of_training = name.startswith("train/") and name != "train/explained_variance"  # 0/0 where returns are constant
            if of_training and isinstance(value, float) and not math.isfinite(value):
                raise NonFiniteError(f"The logged '{name}' is {value}", ADVICE, self.num_timesteps)

    def _on_step(self) -> bool:
        check_finite(np.asarray(self.locals["actions"]), "action", self.num_timesteps)
        check_finite(self.locals["rewards"], "reward", self.num_timesteps)
        check_finite(self.locals["new_obs"], "observation", self.num_timesteps)
        for env, info in enumerate(self.locals["infos"]):
            if "terminal_observation" in info:
                check_finite(stacked((info["terminal_observation"],)), "terminal observation", self.num_timesteps, env)
        return True


class CostCallback(BaseCallback):
    """Logs ``rollout/ep_cost_mean`` over the last 100 episodes, where the environment reports costs."""

    def _on_training_start(self) -> None:
        self.running = [0.0] * self.training_env.num_envs
        self.episodes: deque[float] = deque(maxlen=100)
        self.seen = False

    def _on_step(self) -> bool:
        for env, info in enumerate(self.locals.get("infos", ())):  # there are none while an agent learns offline
            self.seen |= "cost" in info
            self.running[env] += float(info.get("cost", 0.0))
            if self.locals["dones"][env]:
                self.episodes.append(self.running[env])
                self.running[env] = 0.0
        if self.seen and self.episodes:
            self.logger.record("rollout/ep_cost_mean", sum(self.episodes) / len(self.episodes))
        return True


class ConfigurationCallback(BaseCallback):
    """Writes the configuration to TensorBoard once, see :func:`write_configuration`."""

    def __init__(self, hparams: Mapping[str, Any], text: str) -> None:
        super().__init__()
        self.hparams, self.text, self.written = dict(hparams), text, False

    def _on_training_start(self) -> None:
        if not self.written:  # a run may be two trainings, offline and online
            write_configuration(self.logger, self.hparams, self.text, self.num_timesteps)
            self.written = True

    def _on_step(self) -> bool:
        return True
