"""Evaluation of a policy: returns, costs and lengths of whole episodes, with intervals; videos on request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError, first_line
from .manifest import read_manifest

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

    from tether.agents.common.model_file import ModelFile


@dataclass(frozen=True)
class Evaluation:
    """Per-episode results, each of length ``episodes``; ``costs`` and ``successes`` are None where none are reported."""

    returns: np.ndarray
    lengths: np.ndarray
    costs: np.ndarray | None
    successes: np.ndarray | None = None
    """1 where the last step of an episode says that the task is solved, 0 elsewhere."""

    @property
    def row(self) -> dict[str, Any]:
        """The columns of ``evaluations.csv`` without ``timesteps``."""
        success = {} if self.successes is None else {"success_rate": float(self.successes.mean())}
        return {
            "mean_reward": float(self.returns.mean()),
            "std_reward": float(self.returns.std()),
            "mean_cost": "" if self.costs is None else float(self.costs.mean()),
            "ep_length": float(self.lengths.mean()),
            "episodes": len(self.returns),
            **success,
        }


class _Infos:
    """What the infos tell of each episode while SB3's ``evaluate_policy`` runs (it calls back once per env and step).

    It sums ``info["cost"]``, and of ``info["success"]`` or ``info["is_success"]`` it takes the last.
    """

    def __init__(self) -> None:
        self.running: dict[int, float] = defaultdict(float)
        self.costs: list[float] = []
        self.successes: list[float] = []
        self.with_costs = self.with_successes = False

    def __call__(self, local: dict[str, Any], _: dict[str, Any]) -> None:
        env, info = local["i"], local["info"]
        if "cost" in info:
            self.with_costs = True
            self.running[env] += float(info["cost"])
        if local["done"]:
            success = info.get("success", info.get("is_success"))
            self.with_successes |= success is not None
            if local["episode_counts"][env] < local["episode_count_targets"][env]:
                self.costs.append(self.running[env])
                self.successes.append(float(bool(success)))
            self.running[env] = 0.0


def evaluate(
    model: BaseAlgorithm,
    env: VecEnv,
    episodes: int,
    deterministic: bool = True,
    watch: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
) -> Evaluation:
    """Run ``episodes`` whole episodes of ``model`` on ``env`` with SB3's ``evaluate_policy``, which spreads them evenly.

    :param env: vector environment with a ``VecMonitor``, so that returns are those of the raw reward
    :param watch: called as SB3 calls the callback of ``evaluate_policy``, besides
    """
    from stable_baselines3.common.evaluation import evaluate_policy

    infos = _Infos()

    def callback(local: dict[str, Any], world: dict[str, Any]) -> None:
        infos(local, world)
        if watch is not None:
            watch(local, world)

    returns, lengths = evaluate_policy(
        model, env, n_eval_episodes=episodes, deterministic=deterministic, return_episode_rewards=True, callback=callback
    )
    costs = np.array(infos.costs) if infos.with_costs else None
    successes = np.array(infos.successes) if infos.with_successes else None
    return Evaluation(np.array(returns), np.array(lengths), costs, successes)


@dataclass(frozen=True)
class Trained:
    """A trained agent, and what it takes to make environments for it.

    :param name: of the agent, as the catalogue has it
    :param env_kwargs: as in training
    :param file: what was read, with the ``VecNormalize`` it was trained in
    :param deterministic: whether its run was evaluated without noise
    :param left_out: arguments of the environment of the training, which this other one does not get
    """

    model: BaseAlgorithm
    name: str
    env_id: str
    env_kwargs: dict[str, Any]
    file: ModelFile
    deterministic: bool = True
    left_out: dict[str, Any] = field(default_factory=dict)

    def worlds(self) -> list[tuple[str, dict[str, Any]]]:
        """Where to evaluate, in words and as arguments of the environment: as in training, and on what it did not see."""
        unseen = unseen_arguments(self.env_id, self.env_kwargs)
        if unseen is None:
            return [("", {})]
        return [(" as in training", {}), (f" with {', '.join(f'{k}={v}' for k, v in unseen.items())}", dict(unseen))]

    def make_env(self, n_envs: int, seed: int, **kwargs: Any) -> VecEnv:
        """A vector environment whose observations are normalised as in training, its rewards left raw.

        :param kwargs: further arguments of the environment (``render_mode``)
        :raises UsageError: if the agent has other spaces
        """
        from stable_baselines3.common.utils import check_for_correct_spaces
        from stable_baselines3.common.vec_env import VecNormalize

        from tether.envs import make_vec, scoring_arguments

        arguments = {**scoring_arguments(self.env_id), **self.env_kwargs, **kwargs}
        env: VecEnv = make_vec(self.env_id, n_envs=n_envs, backend="dummy", seed=seed, env_kwargs=arguments)
        env = self.file.wrap(env)
        if isinstance(env, VecNormalize):
            env.training = env.norm_reward = False
        env = self.model._wrap_env(env, verbose=0, monitor_wrapper=False)  # images as the agent takes them
        try:
            check_for_correct_spaces(env, self.model.observation_space, self.model.action_space)
        except ValueError as error:
            raise UsageError(f"The agent was trained in other spaces than those of {self.env_id}: {error}.") from error
        return env


def load_trained(
    source: Path,
    env_id: str | None = None,
    device: str = "auto",
    trust: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Trained:
    """A trained agent from a run's folder or a model file.

    :param source: a run's folder (its ``model.zip``) or a saved model
    :param env_id: another environment than the one it was trained in; needed where no manifest beside the model names it
    :param trust: also take files of SB3 itself, which run code that the file chooses
    :param env_kwargs: arguments of the environment; those of the training stay beside them where it is the same one
    :raises UsageError: for a file that is missing or not a model
    :raises ModelFileError: for one that is damaged or asks for trust
    """
    from tether.agents.common.model_file import ModelFileError, build_model, read_model

    from .catalogue import agent_class

    path = source / "model.zip" if source.is_dir() else source
    if not path.is_file():
        raise UsageError(f"There is no model at {path}: name a run's folder that holds model.zip, or a model's file.")
    manifest = read_manifest(path.parent)
    if manifest and ":" in manifest["env"] and env_id is None and not trust:
        raise UsageError(
            f"{path.parent / 'manifest.json'} names an environment in a module of its own, {manifest['env']}, which would be "
            "imported: if you trust it, give --trust, or name the environment with --env."
        )
    file = read_model(path, device, trust=trust)
    name = manifest["agent"] if manifest else _saved_agent(path, file)
    if env_id is None and manifest is None:
        raise UsageError(f"No manifest.json beside {path} names its environment: give it with --env.")
    try:
        model = build_model(agent_class(name), file, device=device)
    except ModelFileError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a model of {name} ({first_line(error)}).") from error
    config = manifest["config"] if manifest else {}
    same_env = manifest is not None and env_id in (None, manifest["env"])
    env_id, of_training = env_id or config["env"], config.get("env_kwargs") or {}
    arguments = {**(of_training if same_env else {}), **(env_kwargs or {})}
    left_out = {} if same_env else {k: v for k, v in of_training.items() if k not in arguments}
    deterministic = manifest["deterministic"] if manifest and same_env else acts_deterministically(env_id)
    return Trained(model, name, env_id, arguments, file, deterministic, left_out)


def unseen_arguments(env_id: str, env_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments of the environment that training does not see all of; None where it does."""
    from tether import envs

    unseen = envs.unseen_arguments(env_id)
    return None if unseen is None or unseen.items() <= env_kwargs.items() else dict(unseen)


def acts_deterministically(env_id: str) -> bool:
    """Whether policies are evaluated by their likeliest actions: everywhere but on ProcGen, whose papers sample."""
    return not env_id.startswith("procgen/")


def _saved_agent(path: Path, file: ModelFile) -> str:
    """The agent that saved a model: as the file says, or of those all of whose attributes are in it, the one with the most."""
    from .catalogue import AGENTS, VARIANTS, agent_class

    agents = {name: place for name, place in AGENTS.items() if name not in VARIANTS}
    for name, place in agents.items():
        package, attribute = place.split(":")
        if file.classes[:1] == (f"{package.split('.')[0]}.{attribute}",):
            return name
    fitting, saved = {}, set(file.data)
    for name in agents:
        bare = agent_class(name)("MlpPolicy", None, _init_setup_model=False)  # type: ignore[call-arg]
        # What is still None is filled later, and may be saved as tensors.
        attributes = {key for key, value in vars(bare).items() if value is not None} - set(bare._excluded_save_params())
        if attributes <= saved:
            fitting[name] = len(attributes)
    if not fitting:
        raise UsageError(f"{path} was saved by none of {', '.join(agents)}, or by an old version: evaluate a run's folder.")
    return max(fitting, key=lambda name: fitting[name])


def summary(result: Evaluation, env_id: str) -> str:
    """Mean, standard deviation, IQM and its 95 % bootstrap interval in a line; further ones for costs, success and scores."""
    from .scores import normalized
    from .statistics import interval

    episodes = f"{len(result.returns)} episode{'s' if len(result.returns) > 1 else ''}"
    lines = [
        f"return over {episodes}: mean {result.returns.mean():.1f} (std {result.returns.std():.1f}), "
        f"{_iqm_in_words(result.returns, 1)}, length {result.lengths.mean():.0f}"
    ]
    if result.costs is not None:
        lines.append(f"cost: mean {result.costs.mean():.2f}, {_iqm_in_words(result.costs, 2)}")
    if result.successes is not None:
        low, high = interval(result.successes, np.mean)
        around = f" [{low:.3f}, {high:.3f}]" if len(result.successes) > 1 else ""
        lines.append(f"success rate: {result.successes.mean():.3f}{around}")
    scores = normalized(env_id, result.returns)
    if scores is not None:
        lines.append(f"normalised score: mean {scores.mean():.3f}, {_iqm_in_words(scores, 3)}")
    return "\n".join(lines)


def _iqm_in_words(values: np.ndarray, digits: int) -> str:
    from .statistics import interval, iqm

    low, high = interval(values, iqm)
    middle = f"IQM {iqm(values):.{digits}f}"
    return f"{middle} [{low:.{digits}f}, {high:.{digits}f}]" if len(values) > 1 else middle


def record_video(trained: Trained, path: Path, seed: int) -> int:
    """Film one episode as mp4.

    :return: number of frames
    :raises UsageError: if the environment cannot render
    """
    import imageio.v2 as imageio

    env = trained.make_env(1, seed, render_mode="rgb_array")
    fps = int(env.get_attr("metadata")[0].get("render_fps") or 30)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".new-{path.name}")
    try:
        with closing(imageio.get_writer(beside, format="FFMPEG", fps=fps, macro_block_size=2)) as writer:
            frames = 0
            for frame in _frames(trained, env):
                writer.append_data(frame)
                frames += 1
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
        env.close()
    return frames


def _frames(trained: Trained, env: VecEnv) -> Iterator[np.ndarray]:
    """The pictures of one episode, each taken before the step that leaves it."""
    renders = "rgb_array" in (env.get_attr("metadata")[0].get("render_modes") or ())
    observation, plan, done = env.reset(), None, False
    while not done:
        frame = env.render() if renders else None
        if frame is None:
            raise UsageError(f"{trained.env_id} does not render to pictures, so there is no video of it.")
        yield np.asarray(frame)
        action, plan = trained.model.predict(observation, plan, deterministic=True)  # type: ignore[arg-type]
        observation, _, dones, _ = env.step(action)
        done = bool(dones[0])
