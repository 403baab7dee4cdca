"""One training run: a folder that holds everything, and that the same command continues."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .catalogue import OURS, agent_class
from .errors import UsageError, first_line
from .imagination import has_world_model
from .interrupts import Stop, stoppable
from .manifest import describe, read_manifest, write_json
from .presets import build_arguments
from .run_config import RunConfig, identity_of, plain, refuse_other_configuration
from .starting import dataset_of, fill_replay_buffer, remarks, sha256_of_model, start_from

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv

    from tether.agents import CheckpointCallback
    from tether.agents.common.checkpoint import Checkpoint
    from tether.envs import OfflineDataset

    from .callbacks import EvaluationCallback, StopCallback

MAX_ROLLBACKS = 5  # in one call of `train`
LOG_ROWS = 100  # of an offline run, at least


@dataclass(frozen=True)
class RunResult:
    """What a finished or interrupted call of :func:`train` leaves.

    :param finished: False after Ctrl-C
    :param fresh: False if the run had been finished before this call
    """

    folder: Path
    finished: bool
    fresh: bool
    manifest: dict[str, Any]


def train(config: RunConfig, *, verbose: int = 1, command: str | None = None) -> RunResult:
    """Train one agent, or continue the run that the same configuration began.

    :param verbose: 0 silent, 1 a progress bar and sentences, 2 also SB3's table
    :param command: what was typed, for the manifest (None: the process's own command line)
    :raises UsageError: for a configuration that cannot be run, a folder in use or one with another configuration
    :raises NonFiniteError: when an action, reward, observation, loss or gradient is not finite
    """
    config, arguments = config.resolve()
    folder = config.folder
    dataset = dataset_of(config)
    if dataset is not None and not config.offline and "buffer_size" not in config.hp:
        arguments["buffer_size"] = len(dataset) + max(config.total, config.n_envs or 1)
    sha256 = {"dataset": None if dataset is None else dataset.meta["sha256"], "init_from": sha256_of_model(config)}
    identity = identity_of(config, arguments, **sha256)
    previous = read_manifest(folder)
    if previous is not None:
        refuse_other_configuration(folder, previous["config"], identity)
        if previous["status"] == "finished":
            return RunResult(folder, finished=True, fresh=False, manifest=previous)
    import torch as th  # slow, and what is refused before needs none

    if config.device == "cuda" and not th.cuda.is_available():
        raise UsageError("--device cuda finds no GPU here: leave it out, or use cpu.")
    check_environment(config)
    with _held(folder), stoppable() as stop:
        rollbacks = 0
        while True:
            run = _Run(config, arguments, identity, verbose, command or shlex.join(sys.argv), stop, dataset)
            try:
                return run.execute(previous, rollbacks)
            except ValueError as error:
                rollbacks += 1
                if not _may_roll_back(config, error, rollbacks):
                    raise
                run._say(f"{error} Going back to the last checkpoint, with other random numbers.")
                previous = read_manifest(folder)


class _Run:
    """The parts of one run and the order in which they are used."""

    def __init__(
        self,
        config: RunConfig,
        arguments: dict[str, Any],
        identity: dict[str, Any],
        verbose: int,
        command: str,
        stop: Stop,
        dataset: OfflineDataset | None = None,
    ) -> None:
        self.config, self.arguments, self.verbose, self.stop = config, arguments, verbose, stop
        self.dataset = dataset
        self.folder = config.folder
        self.manifest = {
            "agent": config.agent, "env": config.env, "seed": config.seed, "steps": config.steps, "status": "running",
            "timesteps": 0, "wall_seconds": 0.0, "deterministic": self._deterministic(), "config": identity,
            "command": command, **describe(),
        }  # fmt: skip
        if dataset is not None:
            described = {"source": Path(dataset.meta["source"]).name, "transitions": len(dataset)}
            self.manifest["dataset"] = {**{k: v for k, v in dataset.meta.items() if k != "died"}, **described}
        if config.online_steps:
            self.manifest["online_steps"] = config.online_steps

    def _deterministic(self) -> bool:
        """Whether evaluations take the likeliest actions."""
        from .evaluate import acts_deterministically

        return bool(self.arguments.get("deterministic", acts_deterministically(self.config.env)))

    def execute(self, previous: dict[str, Any] | None, rollbacks: int = 0) -> RunResult:
        """Build everything, train, and leave the folder complete.

        :param previous: manifest of the run's former part
        :param rollbacks: how often this call has gone back to a checkpoint
        """
        from tether.agents import CheckpointError
        from tether.agents.common.workers import close

        from .logs import drop_episodes_after

        checkpoint = self._find_checkpoint() if previous is not None else None
        if checkpoint is None:
            _clear(self.folder)
        else:
            drop_episodes_after(self.folder, checkpoint.time)
        env = self._make_env()
        try:
            try:
                model = self._make_model(env, checkpoint)
            except CheckpointError as error:
                raise UsageError(f"{error} Or delete {self.folder} to start it anew.") from error
            if checkpoint is not None and previous is not None:
                self.manifest["wall_seconds"] = previous.get("checkpoint_seconds", previous["wall_seconds"])
                self.manifest |= {key: previous[key] for key in ("command", "started", "init_from") if key in previous}
                self._say(f"continuing {self.folder} at step {model.num_timesteps:,} of {self.config.total:,}")
            if self.config.agent in OURS:
                model.on_nonfinite = "skip" if self.config.on_nonfinite == "skip" else "stop"  # type: ignore[attr-defined]
            if rollbacks:
                self._take_other_random_numbers(model, rollbacks)
            self._describe(model, env)
            for sentence in remarks(self.config, self.dataset, model):
                self._say(sentence)
            write_json(self.folder / "manifest.json", self.manifest)
            return self._learn(model)
        finally:
            close(env)

    def _find_checkpoint(self) -> Checkpoint | None:
        from tether.agents.common.checkpoint import find_checkpoint

        if (self.folder / "checkpoint" / "state.json").is_file():
            raise UsageError(
                f"{self.folder} was begun with an older Tether, whose checkpoints this one does not read: finish it with "
                "that version, or delete the folder to start it anew."
            )
        return find_checkpoint(self.folder / "checkpoint")

    def _take_other_random_numbers(self, model: BaseAlgorithm, rollbacks: int) -> None:
        from stable_baselines3.common.utils import set_random_seed

        seed = self.config.seed + 1_000_003 * rollbacks + model.num_timesteps
        model.reseed(seed) if hasattr(model, "reseed") else set_random_seed(seed)
        self.manifest["rollbacks"] = rollbacks

    def _say(self, sentence: str) -> None:
        if self.verbose:
            print(sentence, flush=True)

    def _make_env(self) -> VecEnv:
        """The training environment; each start of a run has a monitor file and episodes of its own."""
        from tether.agents import Resumable
        from tether.envs import make_vec

        if not self.config.collects:  # for its spaces
            return make_vec(self.config.env, backend="dummy", seed=self.config.seed, env_kwargs=self.config.env_kwargs or None)
        segment = len(list(self.folder.glob("*monitor.csv")))
        return make_vec(
            self.config.env,
            n_envs=self.config.n_envs or 1,
            backend=self.config.backend,
            seed=self.config.seed,
            normalize=bool(self.arguments.get("normalize", False)) and not self.config.offline,
            monitor_file=str(self.folder / ("monitor.csv" if segment == 0 else f"{segment}.monitor.csv")),
            env_kwargs=self.config.env_kwargs or None,
            halves=self.config.agent in OURS and not self.config.offline,
            wrapper_class=Resumable if self.config.backend == "subproc" else None,
        )

    def _make_model(self, env: VecEnv, checkpoint: Checkpoint | None) -> BaseAlgorithm:
        from tether.agents import load_checkpoint

        cls = agent_class(self.config.agent)
        if checkpoint is not None:
            return load_checkpoint(cls, checkpoint.folder, env, self.config.device)
        kwargs = build_arguments(self.config.agent, self.arguments)
        if "noise_std" in self.arguments:
            kwargs["action_noise"] = _gaussian_noise(env, self.arguments["noise_std"])
        policy = self.arguments.get("policy") or _default_policy(env)
        try:
            model = cls(policy, env, seed=self.config.seed, device=self.config.device, **kwargs)
        except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
            reason = str(error) if isinstance(error, (ValueError, ImportError)) else first_line(error)
            raise UsageError(f"{self.config.agent} cannot be built for {self.config.env}: {reason}") from error
        if self.config.init_from is not None:
            self.manifest["init_from"] = {**start_from(model, self.config), "sha256": self.manifest["config"]["init_from"]}
        if self.dataset is not None and not self.config.offline:
            fill_replay_buffer(model, self.dataset, self.config.agent)
        return model

    def _describe(self, model: BaseAlgorithm, env: VecEnv) -> None:
        import torch as th

        self.manifest["device"] = str(model.device)
        self.manifest["threads"] = th.get_num_threads()
        if has_world_model(model):
            self.manifest["grounding"] = model.grounding_name  # type: ignore[attr-defined]
        first_half, *_ = env.halves if hasattr(type(env), "halves") else (env,)  # type: ignore[attr-defined]
        self.manifest["backend"] = type(first_half.unwrapped).__name__

    def _learn(self, model: BaseAlgorithm) -> RunResult:
        from tether.agents.common.model_file import write_model
        from tether.agents.common.workers import watched

        from .logs import make_logger

        clock = _stopwatch(self.manifest["wall_seconds"])
        evaluation, checkpoint, stopper, others = self._callbacks(model, clock)
        model.set_logger(make_logger(self.folder, model.num_timesteps, verbose=self.verbose > 1))
        status, seconds, at_rest = "interrupted", clock(), False
        try:
            with self.stop.deferred(), watched(model.env):
                callbacks = [*others, evaluation, checkpoint, stopper]
                if self.config.offline:
                    self._learn_offline(model, callbacks)
                if self.config.online_steps and not stopper.stopped and model.num_timesteps == self.config.steps:
                    evaluation.evaluate_once(model)
                    write_model(model, self.folder / "offline_model.zip")  # others may begin with it, by --init-from
                    model.fill_replay(self.dataset)  # type: ignore[attr-defined]
                if self.config.collects and not stopper.stopped:
                    model.learn(self.config.total - model.num_timesteps, callbacks, **self._how)
            seconds, at_rest = clock(), True
            if not stopper.saved:
                checkpoint.save()
            if not stopper.stopped:
                evaluation.finish()
                status = "finished"
        except KeyboardInterrupt:  # the second signal, or one outside `learn`
            seconds = clock()
        except Exception:
            self._update_manifest("failed", model.num_timesteps, clock())
            raise
        finally:
            model.logger.close()
            evaluation.close()
        if at_rest:
            self.manifest["parameters"] = sum(p.numel() for p in model.policy.parameters())
            write_model(model, self.folder / "model.zip")
        self._update_manifest(status, self._reached(model), seconds)
        return RunResult(self.folder, finished=status == "finished", fresh=True, manifest=self.manifest)

    @property
    def _how(self) -> dict[str, Any]:
        """How both phases are called."""
        return {"reset_num_timesteps": False, "progress_bar": self.verbose > 0 and sys.stderr.isatty()}

    def _learn_offline(self, model: Any, callbacks: list[BaseCallback]) -> None:
        """What is left of the gradient steps."""
        assert self.config.steps is not None
        steps, log_interval = self.config.steps - model.num_timesteps, max(1, min(1000, self.config.steps // LOG_ROWS))
        model._schedule_total = self.config.total  # rates fall over both phases
        if steps > 0 or not self.config.online_steps:
            model.learn_offline(self.dataset, steps, callbacks, log_interval, **self._how)

    def _reached(self, model: BaseAlgorithm) -> int:
        """Env steps from which the run would go on, or that it ended with."""
        from tether.agents import list_checkpoints

        checkpoints = list_checkpoints(self.folder / "checkpoint")
        return checkpoints[-1].timesteps if checkpoints else 0

    def _callbacks(
        self, model: BaseAlgorithm, clock: Callable[[], float]
    ) -> tuple[EvaluationCallback, CheckpointCallback, StopCallback, list[BaseCallback]]:
        from tether.agents import CheckpointCallback

        from .callbacks import ConfigurationCallback, CostCallback, EvaluationCallback, FiniteCallback, StopCallback
        from .evaluate import unseen_arguments

        config = self.config
        assert config.eval_every is not None
        unseen = unseen_arguments(config.env, config.env_kwargs)
        evaluation = EvaluationCallback(
            self._make_evaluation_env(model, config.env_kwargs),
            self.folder,
            config.eval_every,
            config.eval_episodes,
            config.seed + 10_000,
            self._deterministic(),
            None if unseen is None else self._make_evaluation_env(model, {**config.env_kwargs, **unseen}),
        )

        def note_checkpoint(checkpoint: Checkpoint) -> None:
            self.manifest["checkpoint_seconds"] = round(clock(), 2)
            self._update_manifest("running", checkpoint.timesteps, clock())

        checkpoint = CheckpointCallback(
            self.folder / "checkpoint", config.checkpoint_every, score=evaluation.latest, on_save=note_checkpoint
        )
        checkpoint.init_callback(model)  # `save` may be called before `learn` does it
        stopper = StopCallback(self.stop, checkpoint.save)
        hparams = {"agent": config.agent, "env": config.env, "seed": config.seed}
        hparams |= {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in self.arguments.items()}
        guard = [] if config.agent in OURS else [FiniteCallback()]
        text = yaml.safe_dump(plain(self.manifest["config"]), sort_keys=False)
        configuration = ConfigurationCallback(hparams, "".join(f"    {line}\n" for line in text.splitlines()))
        costs = [CostCallback()] if config.collects else []
        return evaluation, checkpoint, stopper, [*guard, *costs, configuration]

    def _make_evaluation_env(self, model: BaseAlgorithm, env_kwargs: dict[str, Any]) -> VecEnv:
        from stable_baselines3.common.vec_env import VecNormalize

        from tether.envs import make_vec, scoring_arguments

        env = make_vec(
            self.config.env,
            n_envs=min(self.config.eval_episodes, 10),
            backend="auto" if self.config.backend == "subproc" else self.config.backend,
            seed=self.config.seed + 10_000,
            env_kwargs={**scoring_arguments(self.config.env), **env_kwargs} or None,
        )
        if model.get_vec_normalize_env() is not None:
            env = VecNormalize(env, training=False, norm_reward=False)
        return env

    def _update_manifest(self, status: str, timesteps: int, seconds: float) -> None:
        self.manifest |= {"status": status, "timesteps": timesteps, "wall_seconds": round(seconds, 2)}
        write_json(self.folder / "manifest.json", self.manifest)


# ---------------------------------------------------------------------- pieces


def _may_roll_back(config: RunConfig, error: ValueError, rollbacks: int) -> bool:
    """Whether an error is one that other random numbers may avoid, and there were not too many of them."""
    from tether.agents import NonFiniteError

    return isinstance(error, NonFiniteError) and config.on_nonfinite == "rollback" and rollbacks <= MAX_ROLLBACKS


def check_environment(config: RunConfig) -> None:
    """Make the environment once, so that a wrong id or a missing extra is said before a folder exists.

    :raises EnvError: for an id, an argument or a backend that is not known, or an extra that is not installed
    """
    from tether.envs import make_env, resolve_backend

    make_env(config.env, **config.env_kwargs).close()
    resolve_backend(config.env, config.n_envs or 1, config.backend, config.env_kwargs)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the run's folder inside the block; a folder where nothing began is taken away again.

    The system frees the lock when the process dies.
    """
    from filelock import FileLock, Timeout

    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        sentence = f"{folder} is in use by a run that is still going: wait for it, or give another --seed or --out."
        raise UsageError(sentence) from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): give a folder of yours with --out.") from error
    try:
        yield
    finally:
        if not (folder / "manifest.json").exists():
            with suppress(OSError):
                _clear(folder)
                (folder / ".lock").unlink()
                for place in made:
                    place.rmdir()
        lock.release()


def _clear(folder: Path) -> None:
    """Remove what a run wrote that left no checkpoint to continue from."""
    tables = ("*monitor.csv", "progress.csv", "evaluations.csv", "drift.csv")
    for pattern in (*tables, "events.out.tfevents.*", "*model.zip", "nonfinite-*"):
        for path in folder.glob(pattern):
            path.unlink()


def _stopwatch(before: float) -> Callable[[], float]:
    """A function that gives the seconds since now, plus those of the run's former parts."""
    begun = time.monotonic()
    return lambda: before + time.monotonic() - begun


def _default_policy(env: VecEnv) -> str:
    from gymnasium import spaces
    from stable_baselines3.common.preprocessing import is_image_space

    if isinstance(env.observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(env.observation_space) else "MlpPolicy"


def _gaussian_noise(env: VecEnv, std: float) -> Any:
    import numpy as np
    from stable_baselines3.common.noise import NormalActionNoise

    shape = env.action_space.shape
    return NormalActionNoise(np.zeros(shape), np.full(shape, std))  # type: ignore[arg-type]
