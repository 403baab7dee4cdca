"""What a run may begin with: a dataset, to learn from or in the replay buffer of a peer, and the weights of a saved model; and
what is said then."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError, first_line
from .published import same_task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stable_baselines3.common.base_class import BaseAlgorithm

    from tether.envs import OfflineDataset

    from .run_config import RunConfig


def dataset_of(config: RunConfig) -> OfflineDataset | None:
    """What an offline agent learns from, or a peer begins with; OGBench's data with the rewards of the run's own task."""
    from tether.envs import load_dataset
    from tether.envs.datasets import ogbench

    if config.dataset is None:
        return None
    of_ogbench = Path(config.dataset).suffix == ".npz" or ogbench.address(config.dataset) is not None
    options = {"task": config.env} if of_ogbench and "singletask" in config.env.split("-") else {}
    # What changes the environment's rewards changes those of its data.
    own = "sparse" if of_ogbench else "step_penalty" if config.env.startswith("robomimic/") else None
    options |= {own: config.env_kwargs[own]} if own in config.env_kwargs else {}
    whole = load_dataset(config.dataset, **options)
    return whole if config.train_share == 1.0 else whole.split((config.train_share,))[0]


def sha256_of_model(config: RunConfig) -> str | None:
    """Of the file that ``--init-from`` names; None where it names none.

    :raises UsageError: if there is no such file
    """
    if config.init_from is None:
        return None
    try:
        return hashlib.sha256(Path(config.init_from).read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(
            f"--init-from names {config.init_from}, which cannot be read ({error.strerror}): train that model first, or "
            "correct the path."
        ) from error


def start_from(model: Any, config: RunConfig) -> dict[str, Any]:
    """Give a new agent the parameters, optimisers and counters of a saved one, also of one of another class.

    :param model: just built
    :return: what was taken, for the manifest
    :raises UsageError: if its parameters have other names or shapes, or it leaves nothing to train
    """
    from stable_baselines3.common.save_util import recursive_setattr

    from tether.agents.common.model_file import ModelFileError, read_model

    assert config.init_from is not None
    assert config.steps is not None
    try:
        file = read_model(Path(config.init_from), config.device)
    except ModelFileError as error:
        raise UsageError(f"--init-from: {error}") from error
    _refuse_others(model, file.params, config)
    try:
        model.set_parameters(file.params, exact_match=True, device=model.device)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"{config.agent} cannot begin with {config.init_from} ({first_line(error)}).") from error
    done = int(file.data.get("num_timesteps", 0))
    if done > config.steps or done == config.total:
        raise UsageError(
            f"{config.init_from} has learnt for {done:,} steps, which --steps counts, and it is {config.steps:,}: "
            "give more, or --online-steps."
        )
    for name, value in (file.variables or {}).items():
        recursive_setattr(model, f"{name}.data", value.data)
    model.num_timesteps, model._n_updates = done, int(file.data.get("_n_updates", 0))
    agent = (file.classes[0] if file.classes else "").rpartition(".")[2]
    return {"source": Path(config.init_from).name, "agent": agent, "timesteps": done}


def _refuse_others(model: Any, theirs: dict[str, Any], config: RunConfig) -> None:
    """:raises UsageError: naming the first thing in which the parameters of two agents differ"""
    mine, start = model.get_parameters(), f"{config.agent} cannot begin with {config.init_from}: "
    here, there = ({name: tuple(value.shape) for name, value in of.get("policy", {}).items()} for of in (mine, theirs))
    for own, other in ((set(mine), set(theirs)), (set(here), set(there))):
        for name in sorted(own ^ other):
            lacks = f"it lacks '{name}'" if name in own else f"{config.agent} has no '{name}'"
            raise UsageError(f"{start}{lacks}. Take a model of the same networks.")
    for name, shape in here.items():
        if shape != there[name]:
            sizes = f"'{name}' has the shape {there[name]} in it, and {shape} here"
            raise UsageError(f"{start}{sizes}. Give --hp the sizes of its networks, or take another model.")


def fill_replay_buffer(model: BaseAlgorithm, dataset: OfflineDataset, agent: str) -> None:
    """Put a dataset into the empty replay buffer of an agent of SB3's.

    Of several environments each gets a part of the transitions, in order; where they cannot be shared out evenly, the last
    few are left out.

    :raises UsageError: if they do not fit
    """
    from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

    from tether.agents.common.replay_state import end_last_trajectory

    buffer: Any = model.replay_buffer  # type: ignore[attr-defined]
    if type(buffer) not in (ReplayBuffer, NStepReplayBuffer) or buffer.optimize_memory_usage:
        raise UsageError(f"A dataset goes into SB3's plain replay buffer: leave out what makes {agent} use another.")
    for name, mine in (("observations", buffer.obs_shape), ("actions", (buffer.action_dim,))):
        theirs = getattr(dataset, name).shape[1:]
        if tuple(mine) != theirs:
            raise UsageError(f"The dataset's {name} have the shape {theirs}, and those of the environment {tuple(mine)}.")
    rows = len(dataset) // buffer.n_envs
    if not 0 < rows < buffer.buffer_size:
        raise UsageError(
            f"The dataset has {len(dataset):,} transitions and the replay buffer room for "
            f"{buffer.buffer_size * buffer.n_envs:,}: give a larger buffer_size, or leave it out."
        )

    def shared(values: Any) -> np.ndarray:
        part = np.asarray(values[: rows * buffer.n_envs])
        return part.reshape(buffer.n_envs, rows, *part.shape[1:]).swapaxes(0, 1)

    buffer.observations[:rows] = shared(dataset.observations)
    buffer.next_observations[:rows] = shared(dataset.next_observations)
    buffer.actions[:rows] = shared(dataset.actions).clip(-1.0, 1.0)  # SB3 stores actions scaled to [-1, 1], as datasets do
    buffer.rewards[:rows] = shared(dataset.rewards)
    buffer.dones[:rows] = shared(dataset.terminals | dataset.timeouts)
    if buffer.handle_timeout_termination:
        buffer.timeouts[:rows] = shared(dataset.timeouts & ~dataset.terminals)
    buffer.pos = rows
    end_last_trajectory(buffer)


def remarks(config: RunConfig, dataset: OfflineDataset | None, model: BaseAlgorithm) -> Iterator[str]:
    """Sentences on what may surprise: a dataset of another task, no updates, or at first only random steps.

    :param model: as the run begins or goes on with it
    """
    named = None if dataset is None else dataset.meta.get("env_id")
    if named and not same_task(named, config.env):
        yield f"The dataset is of {named}, and the agent is evaluated in {config.env}."
    first, length = getattr(model, "learning_starts", 0), getattr(model, "batch_length", 0)
    if config.total < (length - 1) * model.n_envs:
        yield f"{config.agent} learns from sequences of {length:,} steps (batch_length): this run is shorter."
    if config.collects and config.total <= first:
        yield f"{config.agent} learns after its first {first:,} steps (learning_starts): this run ends before."
    elif (work := getattr(model, "first_work", "")) and model.num_timesteps <= first:
        yield f"{config.agent} acts at random for {first:,} steps; then come {work} at once."
