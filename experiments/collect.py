"""Offline data without a server: episodes of a mixture of behaviours, with costs, as a file of DSRL's format.

Episodes are collected in rounds, each of which depends on its seed alone and is kept until the file is written: the same
command goes on where it was interrupted, and gives the same file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .behaviours import NOISE, Behaviour, make_behaviours, train_steps
from .errors import UsageError
from .interrupts import stoppable
from .manifest import describe, write_json

if TYPE_CHECKING:
    from tether.envs import OfflineDataset

STEPS = 100_000
WIDTH = 8  # episodes of a round, at most; fewer of a behaviour that has a small share
FIELDS = ("observations", "actions", "rewards", "costs", "next_observations", "terminals", "timeouts", "constraint_values")
Round = dict[str, np.ndarray]


@dataclass(frozen=True)
class CollectConfig:
    """What ``tether collect`` was asked for.

    :param env: environment that reports costs; or the name of a dataset of OGBench, see `collect_ogbench`
    :param out: file, or folder that gets a file named by DSRL's rule
    :param steps: transitions, at least; episodes are whole. None: 100,000, of OGBench's data as many as were published
    :param behaviours: names or saved agents; none: the default mixture
    :param train_steps: of each training of behaviours; None: by environment
    :param cache: folder of trained behaviours
    """

    env: str
    out: Path
    steps: int | None = None
    seed: int = 0
    behaviours: tuple[str, ...] = ()
    train_steps: int | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    cache: Path = Path("results/runs/behaviours")


def collect(config: CollectConfig, command: str = "") -> Path:
    """Collect a dataset, or go on with one.

    :param command: what was typed, for the datasheet
    :return: the file; a datasheet (``.json``) and a picture of return and cost (``.png``) lie beside it
    :raises UsageError: for what cannot be collected
    """
    from tether.envs import collecting_arguments, make_env
    from tether.envs.datasets import ogbench

    if config.env in ogbench.names():
        from .collect_ogbench import collect_ogbench

        return collect_ogbench(config, command)

    make_env(config.env, **config.env_kwargs).close()
    kwargs = {**collecting_arguments(config.env), **config.env_kwargs}
    steps = config.train_steps or train_steps(config.env)
    mixture = make_behaviours(config.env, list(config.behaviours), config.seed, steps, config.cache, kwargs)
    shards = _shards_folder(config, kwargs, steps)
    with stoppable():
        rounds, names = _collect_rounds(config, mixture, kwargs, shards)
    return _finish(config, rounds, names, kwargs, shards, command)


def _shards_folder(config: CollectConfig, kwargs: Mapping[str, Any], steps: int) -> Path:
    """Where finished rounds lie.

    :raises UsageError: if rounds of another command lie there
    """
    target = config.out if config.out.suffix == ".hdf5" else config.out / config.env.replace("/", "--")
    folder = target.with_name(f".{target.name}.partial")
    identity = {
        "env": config.env, "seed": config.seed, "behaviours": list(config.behaviours), "train_steps": steps,
        "env_kwargs": dict(kwargs),
    }  # fmt: skip
    note = folder / "collecting.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != json.loads(json.dumps(identity)):
        raise UsageError(f"{folder} holds rounds of another collection: finish that one, or delete the folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, identity)
    return folder


# ---------------------------------------------------------------------- episodes


def _collect_rounds(
    config: CollectConfig, mixture: Sequence[Behaviour], kwargs: Mapping[str, Any], shards: Path
) -> tuple[list[Round], list[str]]:
    """Rounds until there are enough steps, and the behaviour of each."""
    from tether.envs import make_env

    envs = [make_env(config.env, **kwargs) for _ in range(WIDTH)]
    policies = {b.name: _policy(b, envs[0].action_space) for b in mixture if b.clinician is None}
    taken = dict.fromkeys((b.name for b in mixture), 0)
    rounds: list[Round] = []
    names: list[str] = []
    try:
        while sum(taken.values()) < (config.steps or STEPS):
            behaviour = min(mixture, key=lambda b: taken[b.name] / b.share)
            path = shards / f"{len(rounds):06d}.npz"
            if path.is_file():
                with np.load(path, allow_pickle=False) as file:
                    rounds.append(dict(file))
            else:
                likeliest = names.count(behaviour.name) % 2 == 1  # every second round, for data without its noise
                width = min(WIDTH, max(1, round(5 * WIDTH * behaviour.share)))
                seed = config.seed + 1_000_003 * (len(rounds) + 1)
                policy: Any = partial(_of_all, policies.get(behaviour.name), likeliest)
                if behaviour.clinician is not None:
                    policy = behaviour.clinician(seed, width)
                rounds.append(run_round(envs[:width], policy, seed))
                _write_round(path, rounds[-1])
            names.append(behaviour.name)
            taken[behaviour.name] += len(rounds[-1]["rewards"])
    finally:
        for env in envs:
            env.close()
    return rounds, names


def _policy(behaviour: Behaviour, space: Any) -> Any:
    """The function from whether to take the likeliest, and observations (B, o), to actions (B, d) of a behaviour."""
    if behaviour.controller is not None:
        return partial(_controlled, behaviour.controller)
    if behaviour.model is None:
        return lambda _, observations: np.random.uniform(space.low, space.high, (len(observations), *space.shape))  # noqa: NPY002
    from .evaluate import load_trained

    trained = load_trained(behaviour.model, env_id="behaviour")
    if trained.file.normalizer is not None:
        raise UsageError(f"{behaviour.model} was trained inside VecNormalize: name an agent that takes raw observations.")
    if trained.model.action_space.shape != space.shape:
        raise UsageError(f"{behaviour.model} acts in {trained.model.action_space}, not in {space}: name one of this task.")
    return lambda likeliest, observations: trained.model.predict(observations, deterministic=likeliest)[0]


def _of_all(policy: Any, likeliest: bool, observations: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """The actions of a policy that is the same in all episodes."""
    return policy(likeliest, observations)


def _controlled(controller: Any, likeliest: bool, observations: np.ndarray) -> np.ndarray:
    """A controller's actions in [-1, 1], with noise unless ``likeliest``."""
    actions = controller(observations)
    noise = 0.0 if likeliest else NOISE * np.random.standard_normal(actions.shape)  # noqa: NPY002
    return np.clip(actions + noise, -1.0, 1.0)


def run_round(envs: Sequence[Any], policy: Any, seed: int) -> Round:
    """One episode of each environment; everything random follows from ``seed``.

    :param policy: from observations (B, o) and the numbers of their environments (B,) to actions (B, d)
    """
    from stable_baselines3.common.utils import set_random_seed

    set_random_seed(seed % 2**32)
    space = envs[0].action_space
    observations = [env.reset(seed=(seed + i) % 2**31)[0] for i, env in enumerate(envs)]
    died: dict[int, bool] = {}
    episodes: list[list[tuple[Any, ...]]] = [[] for _ in envs]
    going = list(range(len(envs)))
    while going:
        chosen = policy(np.stack([observations[i] for i in going]), np.array(going))
        actions = np.clip(chosen, space.low, space.high).astype(np.float32)
        for i, action in zip(list(going), actions, strict=True):
            following, reward, terminated, truncated, info = envs[i].step(action)
            scaled = 2.0 * (action - space.low) / (space.high - space.low) - 1.0
            cost = info.get("costs", info.get("cost", 0.0))
            row = (observations[i], scaled, reward, cost, following, terminated, truncated and not terminated)
            episodes[i].append((*row, info["constraint_value"]) if "constraint_value" in info else row)
            observations[i] = following
            if terminated or truncated:
                going.remove(i)
                died |= {i: info["death"]} if "death" in info else {}
    columns = zip(*(row for episode in episodes for row in episode), strict=True)
    dtypes = {"terminals": bool, "timeouts": bool}
    arrays = {name: np.array(c, dtypes.get(name, np.float32)) for name, c in zip(FIELDS, columns, strict=False)}
    return arrays | ({"died": np.array([died[i] for i in range(len(envs))])} if died else {})


def _write_round(path: Path, arrays: Round) -> None:
    beside = path.with_suffix(".new")
    with open(beside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    beside.replace(path)


# ---------------------------------------------------------------------- the file


def _finish(
    config: CollectConfig, rounds: list[Round], names: list[str], kwargs: Mapping[str, Any], shards: Path, command: str
) -> Path:
    from tether.envs import OfflineDataset, make_env
    from tether.envs.datasets import dsrl

    arrays = {name: np.concatenate([r[name] for r in rounds]) for name in rounds[0]}
    with closing(make_env(config.env, **kwargs)) as env:
        space, limit = env.action_space, env.spec.max_episode_steps if env.spec else None
        several = {"cost_names": list(env.get_wrapper_attr("cost_names"))} if arrays["costs"].ndim == 2 else {}
    several |= {"died": arrays.pop("died").tolist()} if "died" in arrays else {}  # of every episode
    meta: dict[str, Any] = {"env_id": config.env, "max_episode_steps": limit or int(_lengths(arrays).max()), **several}
    if not (np.all(space.low == -1.0) and np.all(space.high == 1.0)):  # type: ignore[attr-defined]
        meta |= {"action_low": space.low.tolist(), "action_high": space.high.tolist()}  # type: ignore[attr-defined]
    dataset = OfflineDataset(**arrays, meta=meta)
    returns, costs, _ = _episodes(dataset)
    meta |= {"reference_min_return": float(returns.min()), "reference_max_return": float(returns.max())}
    meta |= {"reference_max_cost": float(costs.max())}
    known = dsrl.task_meta(dsrl_name(config.env))
    meta |= {key: known[key] for key in known if key != "env_id"}  # so that scores compare with published ones
    attrs = {"seed": config.seed, "behaviours": json.dumps(dict(_shares(rounds, names)))}
    path = config.out if config.out.suffix == ".hdf5" else config.out / dsrl.file_name(config.env.replace("/", "--"), dataset)
    dsrl.write(path, dataset, {**meta, **attrs})
    _describe(path, config, dataset, rounds, names, meta, command)
    shutil.rmtree(shards)
    return path


def dsrl_name(env_id: str) -> str:
    """DSRL's name of the data set of an environment, whether it has one or not."""
    task = env_id.removeprefix("Safety")
    return f"Offline{task.replace('-v', 'Gymnasium-v')}" if "Velocity" in task else f"Offline{task}"


def _episodes(dataset: OfflineDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, cost (the sum of several) and length of every episode, (E,) each."""
    returns, costs, lengths = dataset.episodes()
    assert costs is not None
    return returns, costs.reshape(len(costs), -1).sum(1), lengths


def _lengths(arrays: Round) -> np.ndarray:
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
    return np.diff(np.concatenate([[-1], ends]))


def _shares(rounds: list[Round], names: list[str]) -> Iterator[tuple[str, int]]:
    for name in dict.fromkeys(names):
        yield name, sum(len(r["rewards"]) for r, of in zip(rounds, names, strict=True) if of == name)


def _describe(
    path: Path, config: CollectConfig, dataset: OfflineDataset, rounds: list[Round], names: list[str],
    meta: dict[str, Any], command: str,
) -> None:  # fmt: skip
    """The datasheet and its picture."""
    from tether.envs.datasets.cache import file_sha256

    from .offline_figures import coverage

    returns, costs, lengths = _episodes(dataset)
    counts = [int((r["terminals"] | r["timeouts"]).sum()) for r in rounds]
    of_episode = np.repeat(np.array(names), counts)
    sheet = {
        "file": path.name, "sha256": file_sha256(path), "env": config.env, "seed": config.seed, "command": command,
        "transitions": len(dataset), "episodes": len(returns), "unsafe_transitions": dataset.unsafe_transitions,
        "episodes_without_cost": int((costs == 0).sum()), "mean_length": float(lengths.mean()),
        "return": _spread(returns), "cost": _spread(costs), **{k: v for k, v in meta.items() if k != "died"},
        "behaviours": {
            name: {
                "transitions": steps, "episodes": int((of_episode == name).sum()),
                "return": _spread(returns[of_episode == name]), "cost": _spread(costs[of_episode == name]),
            }
            for name, steps in _shares(rounds, names)
        },
        **describe(),
    }  # fmt: skip
    write_json(path.with_suffix(".json"), sheet)
    path.with_suffix(".png").write_bytes(coverage(returns, costs, of_episode, config.env))
    if dataset.unsafe_transitions in (0, len(dataset)) or (costs > 0).all():
        print(f"{path}: episodes with a cost and episodes without are not both in it: train longer, or add --behaviour.")


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}
