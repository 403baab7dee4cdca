"""One training run: a folder that holds everything, and that the same command continues."""

from __future__ import annotations


import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalogue import OURS, agent_class, canonical_name
from .errors import UsageError
from .manifest import describe, write_json
from .presets import build_arguments, check_arguments, merge, preset

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv

DEFAULT_STEPS = 1_000_000


@dataclass(frozen=True)
class RunConfig:
    """What ``tether train`` was asked for; the run's identity is all of it but ``out`` and ``device``.

    :param agent: name in the catalogue
    :param env: environment id
    :param steps: env steps (None: the preset's, else a million)
    :param n_envs: parallel environments (None: the preset's, else 1)
    :param backend: of the vector environment: auto, dummy, subproc, envpool
    :param hp: constructor arguments that override the preset
    :param eval_every: env steps between evaluations (None: a twentieth of ``steps``)
    :param checkpoint_every: seconds between checkpoints
    :param out: folder below which run folders lie
    """

    agent: str
    env: str
    steps: int | None = None
    seed: int = 0
    n_envs: int | None = None
    backend: str = "auto"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    hp: dict[str, Any] = field(default_factory=dict)
    eval_every: int | None = None
    eval_episodes: int = 10
    checkpoint_every: float = 120.0
    out: Path = Path("results/runs")
    device: str = "auto"

    def resolve(self) -> tuple[RunConfig, dict[str, Any]]:
        """The configuration with every default filled in, and the agent's checked arguments.

        :raises UsageError: in one sentence, for anything that cannot be run
        """
        agent = canonical_name(self.agent)
        arguments = merge(preset(agent, self.env), self.hp)
        check_arguments(agent, arguments)
        steps = self.steps or arguments.get("steps") or DEFAULT_STEPS
        _require(steps >= 1, f"--steps must be 1 or more, not {steps}.")
        _require(self.eval_episodes >= 1, f"--eval-episodes must be 1 or more, not {self.eval_episodes}.")
        _require(self.eval_every is None or self.eval_every >= 1, f"--eval-every must be 1 or more, not {self.eval_every}.")
        _require(self.checkpoint_every > 0, f"--checkpoint-every is in seconds and must be above 0, not {self.checkpoint_every}.")
        n_envs = self.n_envs if self.n_envs is not None else arguments.get("n_envs", 1)
        _require(n_envs >= 1, f"--n-envs must be 1 or more, not {n_envs}.")
        if "buffer_size" not in self.hp and _takes(agent, "buffer_size"):
            # A replay buffer never holds more than the run collects; a smaller one makes smaller checkpoints.
            default = arguments.get("buffer_size", 1_000_000)
            arguments["buffer_size"] = min(default, max(steps, n_envs))
        filled = {
            **self.__dict__, "agent": agent, "steps": steps, "n_envs": n_envs,
            "eval_every": self.eval_every or max(1, steps // 20),
        }  # fmt: skip
        return RunConfig(**filled), arguments

    @property
    def folder(self) -> Path:
        """``<out>/<env>/<agent>/seed-<k>``; slashes of an env id become ``--``."""
        return self.out / self.env.replace("/", "--") / self.agent / f"seed-{self.seed}"


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UsageError(sentence)


def _takes(agent: str, argument: str) -> bool:
    import inspect

    return argument in inspect.signature(agent_class(agent).__init__).parameters


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


def train(config: RunConfig, *, verbose: int = 1, extra: dict[str, Any] | None = None) -> RunResult:
    """Train one agent, or continue the run that the same configuration began.

    :param verbose: 0 silent, 1 a progress bar and sentences, 2 also SB3's table
    :param extra: further entries of the manifest (a study's name)
    :raises UsageError: for a configuration that cannot be run, a folder in use or one with another configuration
    :raises NonFiniteError: when a reward, observation or loss is not finite
    """
    config, arguments = config.resolve()
    folder = config.folder
    identity = _identity(config, arguments)
    previous = _read_manifest(folder)
    if previous is not None:
        _refuse_other_configuration(folder, previous["config"], identity)
        if previous["status"] == "finished":
            return RunResult(folder, finished=True, fresh=False, manifest=previous)
    _check_environment(config)
    with _lock(folder):
        return _Run(config, arguments, identity, verbose, extra or {}).execute(previous)


class _Run:
    """The parts of one run and the order in which they are used."""

    def __init__(
        self, config: RunConfig, arguments: dict[str, Any], identity: dict[str, Any], verbose: int, extra: dict[str, Any]
    ) -> None:
        self.config, self.arguments, self.verbose = config, arguments, verbose
        self.folder = config.folder
        self.manifest = {
            "agent": config.agent, "env": config.env, "seed": config.seed, "steps": config.steps, "status": "running",
            "timesteps": 0, "wall_seconds": 0.0, "config": identity, **describe(), **extra,
        }  # fmt: skip

    def execute(self, previous: dict[str, Any] | None) -> RunResult:
        from .checkpoints import find_checkpoint

        checkpoint = find_checkpoint(self.folder / "checkpoint")
        env = self._make_env(segment=_next_segment(self.folder))
        model = self._make_model(env, checkpoint)
        if checkpoint is not None and previous is not None:
            self.manifest["wall_seconds"] = previous.get("checkpoint_seconds", previous["wall_seconds"])
            self.manifest["command"], self.manifest["started"] = previous["command"], previous["started"]
            self.say(f"continuing {self.folder} at step {model.num_timesteps:,} of {self.config.steps:,}")
        self._describe_model(model, env)
        write_json(self.folder / "manifest.json", self.manifest)
        return self._learn(model, env)

    def say(self, sentence: str) -> None:
        if self.verbose:
            print(sentence, flush=True)

    def _make_env(self, segment: int) -> VecEnv:
        from tether.envs import make_vec

        name = "monitor.csv" if segment == 0 else f"{segment}.monitor.csv"
        return make_vec(
            self.config.env,
            n_envs=self.config.n_envs or 1,
            backend=self.config.backend,
            seed=self.config.seed,
            normalize=bool(self.arguments.get("normalize", False)),
            monitor_file=str(self.folder / name),
            env_kwargs=self.config.env_kwargs or None,
        )

    def _make_model(self, env: VecEnv, checkpoint: Path | None) -> BaseAlgorithm:
        from .checkpoints import load_checkpoint, restore_normalizer

        cls = agent_class(self.config.agent)
        if checkpoint is not None:
            if (checkpoint / "vecnormalize.pkl").is_file():
                env = restore_normalizer(getattr(env, "venv", env), checkpoint / "vecnormalize.pkl")
            return load_checkpoint(cls, checkpoint, env, self.config.device)
        kwargs = build_arguments(self.config.agent, self.arguments)
        if "noise_std" in self.arguments:
            kwargs["action_noise"] = _gaussian_noise(env, self.arguments["noise_std"])
        policy = self.arguments.get("policy") or _default_policy(env)
        try:
            return cls(policy, env, seed=self.config.seed, device=self.config.device, **kwargs)  # type: ignore[arg-type]
        except (ValueError, AssertionError) as error:
            raise UsageError(f"{self.config.agent} cannot be built for {self.config.env}: {error}") from error

    def _describe_model(self, model: BaseAlgorithm, env: VecEnv) -> None:
        import torch as th

        self.manifest["device"] = str(model.device)
        self.manifest["threads"] = th.get_num_threads()
        self.manifest["backend"] = type(env.unwrapped).__name__
        self.manifest["parameters"] = sum(p.numel() for p in model.policy.parameters())

    def _learn(self, model: BaseAlgorithm, env: VecEnv) -> RunResult:
        from .checkpoints import save_model
        from .logs import make_logger

        callbacks, evaluation, checkpoint = self._callbacks(model)
        model.set_logger(make_logger(self.folder, model.num_timesteps, verbose=self.verbose > 1))
        # `kill` is answered like Ctrl-C, also where a shell's `nohup ... &` had the interrupt ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        begun, before = time.monotonic(), self.manifest["wall_seconds"]
        self._clock = lambda: before + time.monotonic() - begun
        try:
            model.learn(
                self.config.steps - model.num_timesteps,  # type: ignore[operator]
                callback=callbacks,
                reset_num_timesteps=False,
                progress_bar=self.verbose > 0 and sys.stderr.isatty(),
            )
            seconds = self._clock()
            evaluation.evaluate()
            model.logger.dump(model.num_timesteps)
            status = "finished"
        except KeyboardInterrupt:
            seconds = self._clock()
            checkpoint.save()
            status = "interrupted"
        save_model(model, self.folder / "model.zip")
        model.logger.close()
        env.close()
        evaluation.env.close()
        self._update_manifest(status, model.num_timesteps, seconds)
        return RunResult(self.folder, finished=status == "finished", fresh=True, manifest=self.manifest)

    def _callbacks(self, model: BaseAlgorithm) -> tuple[list[BaseCallback], Any, Any]:
        from .callbacks import CheckpointCallback, CostCallback, EvaluationCallback, FiniteCallback, HParamCallback

        assert self.config.eval_every is not None
        evaluation = EvaluationCallback(
            self._make_evaluation_env(model), self.folder, self.config.eval_every, self.config.eval_episodes
        )
        checkpoint = CheckpointCallback(
            self.folder / "checkpoint",
            self.config.checkpoint_every,
            lambda: self._update_manifest("running", model.num_timesteps, self._clock()),
        )
        hparams = {"agent": self.config.agent, "env": self.config.env, "seed": self.config.seed}
        hparams |= {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in self.arguments.items()}
        text = "\n".join(f"    {line}" for line in _lines(self.manifest["config"]))
        callbacks: list[BaseCallback] = [evaluation, checkpoint, CostCallback(), HParamCallback(hparams, text)]
        if self.config.agent not in OURS:
            callbacks.insert(0, FiniteCallback())
        return callbacks, evaluation, checkpoint

    def _make_evaluation_env(self, model: BaseAlgorithm) -> VecEnv:
        from stable_baselines3.common.vec_env import VecNormalize

        from tether.envs import make_vec

        env: VecEnv = make_vec(
            self.config.env,
            n_envs=min(self.config.eval_episodes, 10),
            backend="auto" if self.config.backend == "subproc" else self.config.backend,
            seed=self.config.seed + 10_000,
            env_kwargs=self.config.env_kwargs or None,
        )
        if model.get_vec_normalize_env() is not None:
            env = VecNormalize(env, training=False, norm_reward=False)
        return env

    def _update_manifest(self, status: str, timesteps: int, seconds: float) -> None:
        self.manifest |= {"status": status, "timesteps": timesteps, "wall_seconds": round(seconds, 2)}
        if status == "running":
            self.manifest["checkpoint_seconds"] = round(seconds, 2)
        write_json(self.folder / "manifest.json", self.manifest)


# ---------------------------------------------------------------------- pieces


def _identity(config: RunConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same: the configuration with the agent's arguments, without where and on what it runs."""
    plain = asdict(config)
    for key in ("out", "device", "checkpoint_every", "hp"):
        plain.pop(key)
    return plain | {"arguments": {k: v for k, v in arguments.items() if k not in ("n_envs", "steps")}}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    import json

    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["status"], manifest["config"]
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a run's manifest ({error!r}): delete {folder} to start the run anew.") from error


def _refuse_other_configuration(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [k for k in sorted({*before, *now}) if _plain(before.get(k)) != _plain(now.get(k))]
    if differing:
        key = differing[0]
        raise UsageError(
            f"{folder} holds a run with another configuration ('{key}' was {before.get(key)!r}, now {now.get(key)!r}): "
            "delete the folder, or give another --seed or --out."
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that a tuple equals the list it was written as."""
    import json

    return json.loads(json.dumps(value, default=str))


def _check_environment(config: RunConfig) -> None:
    """Make the environment once, so that a wrong id or a missing extra is said before a folder exists."""
    from tether.envs import make_env

    make_env(config.env, **config.env_kwargs).close()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the run's folder; the system frees the lock when the process dies."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"{folder} is in use by a run that is still going: wait for it, or give another --seed or --out.") from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): give a folder of yours with --out.") from error
    try:
        yield
    finally:
        lock.release()


def _next_segment(folder: Path) -> int:
    """Number of the next monitor file; each start of a run has its own, and SB3's plotters read them together."""
    return len(list(folder.glob("*monitor.csv")))


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


def _lines(config: dict[str, Any]) -> list[str]:
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False).splitlines()


def resume_hint(config: RunConfig, argv: list[str]) -> str:
    """How to go on after Ctrl-C."""
    return f"Saved. The same command goes on from here:\n  tether {shlex.join(argv)}"


