"""The offline engine: a dataset on the training device, gradient steps on batches drawn from it, and nothing else.

An agent adds ``_prepare``, what it makes of the data once, and ``update``, one gradient step. All of its networks have
the seed as their first axis: ``seeds=5`` trains five agents in the same operations, each on batches of its own.
"""

from __future__ import annotations

import io
import math
import time
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from .acceleration import CapturedCall
from .agent import Agent
from .finite import check_finite_info
from .model_file import ModelFile, build_model, read_model

SelfOfflineAgent = TypeVar("SelfOfflineAgent", bound="OfflineAgent")
Batch = dict[str, th.Tensor]
Draw = Callable[[int], Batch]

REQUIRED = ("observations", "actions", "rewards", "next_observations", "terminals")
OPTIONAL = ("timeouts", "costs", "constraint_values")
UPDATES_PER_GRAPH = 10  # on a GPU, of one captured graph


# ---------------------------------------------------------------------- data


class DataError(ValueError):
    """A dataset that an agent cannot learn from; the message is a sentence that says what to do."""


class OfflineData:
    """A dataset as float32 tensors on one device, N rows each; on the CPU they share the memory of its arrays.

    It is made of any object with these attributes, or a mapping: ``observations`` (N, o), ``actions`` (N, d) in [-1, 1],
    ``rewards`` (N,), ``next_observations`` (N, o), ``terminals`` (N,); where there are, ``timeouts`` (N,), ``costs`` (N,)
    or (N, m), ``constraint_values`` (N,), and ``meta``, a mapping. ``tether.envs.datasets`` reads them from files.

    :raises DataError: for what is missing, not as long, not a vector or not finite, naming the array and the row
    """

    def __init__(self, dataset: Any, device: th.device | str = "cpu") -> None:
        get = dataset.get if isinstance(dataset, Mapping) else lambda name: getattr(dataset, name, None)
        missing = [name for name in REQUIRED if get(name) is None]
        if missing:
            raise DataError(f"The dataset lacks {', '.join(missing)}: offline agents read {', '.join(REQUIRED)}.")
        self.meta: dict[str, Any] = dict(get("meta") or {})
        arrays: dict[str, Any] = {name: get(name) for name in (*REQUIRED, *OPTIONAL) if get(name) is not None}
        length = len(arrays["observations"])
        for name, array in arrays.items():
            if len(array) != length or length == 0:
                raise DataError(f"'{name}' has {len(array)} rows and 'observations' {length}: give equally many, and some.")
        for name in ("observations", "next_observations", "actions"):
            if len(arrays[name].shape) != 2:
                raise DataError(f"'{name}' has the shape {arrays[name].shape}: offline agents take vectors, (N, n).")
        tensors: dict[str, th.Tensor] = {name: _tensor(array).to(device) for name, array in arrays.items()}
        for name, values in tensors.items():
            _refuse_non_finite(name, values)
        self.observations, self.next_observations = tensors["observations"], tensors["next_observations"]
        self.actions, self.rewards = tensors["actions"], tensors["rewards"].reshape(-1)
        self.terminals = tensors["terminals"].reshape(-1)
        self.timeouts = tensors.get("timeouts", th.zeros_like(self.terminals)).reshape(-1)
        self.costs = _total(tensors.get("costs"))
        signed = tensors.get("constraint_values")
        self.constraint_values = None if signed is None else signed.reshape(-1)

    def __len__(self) -> int:
        """N, the number of transitions."""
        return len(self.rewards)

    @property
    def ends(self) -> th.Tensor:
        """(N,) bool: the last row of its episode."""
        ends = (self.terminals + self.timeouts) > 0
        ends[-1] = True
        return ends

    @property
    def episode_of(self) -> th.Tensor:
        """(N,) number of each row's episode, from 0 on."""
        return self.ends.long().cumsum(0) - self.ends.long()

    def per_episode(self, values: th.Tensor) -> th.Tensor:
        """Sums of ``values`` (N,) over episodes, (episodes,) float64."""
        sums = th.zeros(int(self.ends.sum()), dtype=th.float64, device=values.device)
        return sums.index_add_(0, self.episode_of, values.double())

    def spaces(self) -> tuple[spaces.Box, spaces.Box]:
        """Of observations and actions; ``meta["action_low"]`` and ``meta["action_high"]`` say what +-1 stands for."""
        low, high = (np.asarray(self.meta.get(f"action_{end}", sign), np.float32) for end, sign in (("low", -1), ("high", 1)))
        shape = (self.actions.shape[1],)
        actions = spaces.Box(np.broadcast_to(low, shape).copy(), np.broadcast_to(high, shape).copy(), dtype=np.float32)
        return spaces.Box(-np.inf, np.inf, (self.observations.shape[1],), np.float32), actions

    def safe_costs(self) -> th.Tensor:
        """The costs (N,), for agents that learn from safe and unsafe rows.

        :raises DataError: if there are none, or the rows are of one kind only
        """
        if self.costs is None:
            raise DataError("The dataset has no 'costs': a safe agent needs them, so take data of a task that reports costs.")
        self.refuse_one_class("costs", self.costs > 0)
        return self.costs

    def refuse_one_class(self, name: str, unsafe: th.Tensor) -> None:
        """:raises DataError: if ``unsafe`` (N,) bool, found in the array ``name``, holds for no row or for all of them"""
        count = int(unsafe.sum())
        if count in (0, len(self)):
            kind = "safe" if count == 0 else "unsafe"
            raise DataError(
                f"By '{name}' every one of the {len(self)} rows is {kind}, so there is nothing to tell safe from unsafe by: "
                "mix data of several behaviours, as `tether collect` does."
            )


def _tensor(array: Any) -> th.Tensor:
    array = np.asarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written to
        return th.from_numpy(np.ascontiguousarray(array, np.float32))


def _total(costs: th.Tensor | None) -> th.Tensor | None:
    return None if costs is None else costs.reshape(len(costs), -1).sum(1)


def _refuse_non_finite(name: str, values: th.Tensor) -> None:
    if not bool(th.isfinite(values.sum())) and not bool(th.isfinite(values).all()):
        row = int((~th.isfinite(values)).reshape(len(values), -1).any(1).nonzero()[0])
        raise DataError(f"'{name}' is not finite in row {row}: repair the dataset, or leave that episode out.")


def reward_scale(data: OfflineData) -> float:
    """T_max / (R_max - R_min): the dataset's references in its ``meta``, or what its own episodes show.

    :raises DataError: if all episodes have one return
    """
    returns = data.per_episode(data.rewards)
    low = data.meta.get("reference_min_return", returns.min())
    high = data.meta.get("reference_max_return", returns.max())
    longest = data.meta.get("max_episode_steps", data.per_episode(th.ones_like(data.rewards)).max())
    if not float(high) > float(low):
        raise DataError(f"Every episode of the dataset returns {float(low):.3g}: give reward_scale, the factor of rewards.")
    return float(longest) / (float(high) - float(low))


def cost_threshold(data: OfflineData, cost_limit: float, gamma: float) -> float:
    """The discounted cost of an episode that spends ``cost_limit`` evenly: limit (1 - gamma^T) / ((1 - gamma) T).

    T is the longest episode, of the dataset's ``meta`` or of its rows.
    """
    longest = data.meta.get("max_episode_steps", data.per_episode(th.ones_like(data.rewards)).max())
    return cost_limit * (1.0 - gamma ** float(longest)) / ((1.0 - gamma) * float(longest))


# ---------------------------------------------------------------------- policy


class OfflinePolicy(BasePolicy):
    """Base of the offline agents' policies: networks with the seed as their first axis, actions in [-1, 1] inside.

    :param observation_space: a Box of vectors
    :param action_space: a Box
    :param lr_schedule: not used here; the agent makes the optimisers
    :param seeds: S, agents side by side; only where it is 1 does the policy act
    """

    obs_mean: th.Tensor
    obs_std: th.Tensor

    def __init__(
        self, observation_space: spaces.Box, action_space: spaces.Box, lr_schedule: Schedule | None = None, seeds: int = 1
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True)
        self.seeds = seeds
        self.obs_dim, self.action_dim = spaces.flatdim(observation_space), spaces.flatdim(action_space)
        # Of the dataset, where the agent normalises; `predict` takes raw observations in any case.
        self.register_buffer("obs_mean", th.zeros(self.obs_dim))
        self.register_buffer("obs_std", th.ones(self.obs_dim))

    def normalized(self, observations: th.Tensor) -> th.Tensor:
        """(x - mean) / std."""
        return (observations - self.obs_mean) / self.obs_std

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        if self.seeds > 1:
            raise ValueError(f"This agent holds {self.seeds} agents side by side: agent.split() gives them one by one.")
        rows = self.normalized(observation.float().flatten(1))
        return self.act(rows.unsqueeze(0), deterministic)[0]

    @abstractmethod
    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """Actions in [-1, 1], (S, B, d), at normalised observations (S, B, o)."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "seeds": self.seeds}


# ---------------------------------------------------------------------- agent


class OfflineAgent(Agent):
    """Base of the offline agents: everything but the losses.

    ``num_timesteps`` counts gradient steps. A callback's ``on_step`` comes after every one of them; on a GPU, where
    :data:`UPDATES_PER_GRAPH` of them are one captured graph, after every graph.

    :param policy: of the agent's ``policy_aliases``, or a class
    :param env: gives the spaces, and is not stepped; None takes them from the dataset
    :param learning_rate: of the optimisers
    :param batch_size: rows per gradient step
    :param gamma: discount
    :param tau: of the Polyak averages that make the target critics
    :param seeds: agents that are trained side by side, see :meth:`split`
    :raises ValueError: for an argument outside its range
    """

    OPTIMIZERS: ClassVar[tuple[str, ...]] = ()
    steps_environments: ClassVar[bool] = False
    _period: int = 1  # gradient steps after which the pattern of updates repeats
    policy: OfflinePolicy

    def __init__(
        self,
        policy: str | type[OfflinePolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule,
        batch_size: int,
        gamma: float,
        tau: float,
        seeds: int,
        tensorboard_log: str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: th.device | str,
    ) -> None:
        for name, number in (("batch_size", batch_size), ("seeds", seeds)):
            if number < 1:
                raise ValueError(f"{name} must be 1 or more, not {number}.")
        if not 0.0 <= gamma < 1.0 or not 0.0 < tau <= 1.0:
            raise ValueError(f"gamma lies in [0, 1) and tau in (0, 1], not gamma={gamma} and tau={tau}.")
        super().__init__(
            policy,
            env,
            learning_rate,
            policy_kwargs=policy_kwargs,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            supported_action_spaces=(spaces.Box,),
        )
        self.n_envs = 1 if self.env is None else self.env.num_envs
        self.batch_size, self.gamma, self.tau, self.seeds = batch_size, gamma, tau, seeds
        self._meter = Meter()
        self._data: Batch = {}
        self._graph: CapturedCall | None = None

    def _setup_model(self) -> None:
        """Build the networks; without an environment this waits for the dataset."""
        if not hasattr(self, "observation_space"):
            return
        if not isinstance(self.observation_space, spaces.Box) or len(self.observation_space.shape) != 1:
            raise ValueError(f"{type(self).__name__} takes vectors, a Box of one axis, not {self.observation_space}.")
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, seeds=self.seeds, **self.policy_kwargs
        ).to(self.device)  # type: ignore[assignment]
        self._make_optimizers()

    @abstractmethod
    def _make_optimizers(self) -> None:
        """Set the attributes that :attr:`OPTIMIZERS` names."""

    def _adam(self, parameters: Iterable[th.nn.Parameter], **kwargs: Any) -> th.optim.Adam:
        return th.optim.Adam(list(parameters), **{"lr": self.lr_schedule(1.0), "fused": True, **kwargs})

    def get_env(self) -> VecEnv | None:
        """The environment, or where there is none something with its spaces, which SB3's callbacks ask for."""
        if self.env is None and hasattr(self, "observation_space"):
            return SpacesOnly(self.observation_space, self.action_space)
        return self.env

    # ------------------------------------------------------------------ what an agent adds

    @abstractmethod
    def _prepare(self, data: OfflineData) -> Batch:
        """What batches are drawn from: tensors of N rows; called once a training.

        :raises DataError: if the agent cannot learn from the data
        """

    @abstractmethod
    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One gradient step.

        :param draw: n -> a batch of n rows for each seed, (S, n, ...) tensors
        :param number: of the step, from 0 on; only its remainder by :attr:`_period` may matter
        :return: scalars for the log, on the device
        """

    # ------------------------------------------------------------------ learning

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: there is nothing to collect.

        :raises ValueError: always
        """
        raise ValueError(f"{type(self).__name__} learns from a dataset: call learn_offline(dataset, gradient_steps).")

    def learn_offline(
        self: SelfOfflineAgent,
        dataset: Any,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1000,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineAgent:
        """Train for ``gradient_steps`` on a dataset.

        :param dataset: see :class:`OfflineData`
        :param callback: as in SB3's ``learn``
        :param log_interval: gradient steps between two rows of the log, each of means since the last
        :param tb_log_name: name of the TensorBoard run
        :param reset_num_timesteps: False goes on counting, and to the same folder of TensorBoard
        :param progress_bar: show one
        :raises DataError: for a dataset that this agent cannot learn from; nothing has changed then
        :raises NonFiniteError: naming the first loss or gradient that is not finite
        """
        data = OfflineData(dataset, self.device)
        self._match_spaces(data)
        self._data = self._prepare(data)
        total_timesteps, callback = self._begin(gradient_steps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        try:
            with self._torch_threads(self.batch_size):
                callback.on_training_start(locals(), globals())
                while self.num_timesteps < total_timesteps:
                    self._take_steps(min(self._updates_per_call, total_timesteps - self.num_timesteps), log_interval)
                    callback.update_locals(locals())
                    if not callback.on_step():
                        break
                callback.on_training_end()
        finally:
            self.policy.set_training_mode(False)
            self._data, self._graph = {}, None
        return self

    @property
    def _updates_per_call(self) -> int:
        if self.device.type != "cuda" or self._n_updates % self._period:
            return 1
        return self._period * math.ceil(UPDATES_PER_GRAPH / self._period)

    def _match_spaces(self, data: OfflineData) -> None:
        """Take the spaces from the data, or check them against it."""
        observations, actions = data.spaces()
        if not hasattr(self, "observation_space"):
            self.observation_space, self.action_space = observations, actions
            self._setup_model()
        for name, mine, theirs in (
            ("observations", self.observation_space, observations),
            ("actions", self.action_space, actions),
        ):
            if mine.shape != theirs.shape:
                raise DataError(f"The dataset's {name} have the shape {theirs.shape}, and the agent's {mine.shape}.")

    def _begin(
        self, steps: int, callback: MaybeCallback, reset: bool, tb_log_name: str | None, progress_bar: bool
    ) -> tuple[int, BaseCallback]:
        """SB3's ``_setup_learn`` without an environment."""
        if steps < 1 and reset:
            raise ValueError(f"gradient_steps must be 1 or more, not {steps}.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite must be 'stop' or 'skip', not {self.on_nonfinite!r}.")
        self.start_time, self._skipped_in_a_row = time.time_ns(), {}
        if self.ep_info_buffer is None or reset:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if reset:
            self.num_timesteps, self._schedule_total, self._threads, self._meter = 0, None, None, Meter()
        total = int(steps) + self.num_timesteps
        self._total_timesteps, self._num_timesteps_at_start = max(total, self._schedule_total or 0), self.num_timesteps
        if not self._custom_logger:
            name = tb_log_name or type(self).__name__
            self._logger = utils.configure_logger(self.verbose, self.tensorboard_log, name, reset)
        if progress_bar:
            callback = [*_as_list(callback), StepsBar(total - self.num_timesteps)]
        return total, self._init_callback(callback)

    def _take_steps(self, steps: int, log_interval: int) -> None:
        self.policy.set_training_mode(True)  # a callback's `predict` ends it
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        self._set_rates()
        info = self._guarded(lambda: self._updates(steps), "train")
        before, self.num_timesteps = self.num_timesteps, self.num_timesteps + steps
        self._n_updates += steps
        if info is not None:
            self._meter.add(info)
        if self.num_timesteps // log_interval > before // log_interval:
            self._dump()

    def _set_rates(self) -> None:
        """Give the optimisers the learning rates of this step."""
        rate = self.lr_schedule(self._current_progress_remaining)
        for name in self.OPTIMIZERS:
            utils.update_learning_rate(getattr(self, name), rate)

    def _updates(self, steps: int) -> dict[str, th.Tensor]:
        """Several gradient steps, on a GPU as one captured graph; the scalars of the last."""
        if steps == 1 or steps < self._updates_per_call:
            for i in range(steps):
                info = self.update(self._draw, self._n_updates + i)
            return info
        if self._graph is None:
            self._graph = CapturedCall(self._one_graph, *(getattr(self, name) for name in self.OPTIMIZERS))
        return self._graph({})

    def _one_graph(self, _: Any) -> dict[str, th.Tensor]:
        for i in range(self._updates_per_call):
            info = self.update(self._draw, i)
        return info

    def _draw(self, size: int) -> Batch:
        """``size`` rows for each seed, uniformly and with replacement."""
        first = next(iter(self._data.values()))
        rows = th.randint(len(first), (self.seeds * size,), device=first.device)
        return {
            name: values.index_select(0, rows).view(self.seeds, size, *values.shape[1:]) for name, values in self._data.items()
        }

    def _dump(self) -> None:
        self._ask_guards()
        means = self._meter.take()
        for name, value in (check_finite_info(means, self.num_timesteps) if means else {}).items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        self.logger.record("time/fps", (self.num_timesteps - self._num_timesteps_at_start) / elapsed)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)

    # ------------------------------------------------------------------ several seeds, files

    def split(self: SelfOfflineAgent) -> list[SelfOfflineAgent]:
        """The agents that were trained side by side, each as one of its own, with its optimisers."""
        file = io.BytesIO()
        self.save(file)
        whole = read_model(io.BytesIO(file.getvalue()), self.device)
        own = {name for name, _ in self.policy.named_parameters()}
        return [self._part(whole, own, k) for k in range(self.seeds)]

    def _part(self: SelfOfflineAgent, whole: ModelFile, own: set[str], k: int) -> SelfOfflineAgent:
        def mine(tensor: th.Tensor) -> th.Tensor:
            return tensor.chunk(self.seeds)[k].clone() if tensor.ndim else tensor.clone()

        params = dict(whole.params)
        params["policy"] = {name: mine(v) if name in own else v for name, v in params["policy"].items()}
        for name in self.OPTIMIZERS:
            state = {i: {key: mine(v) for key, v in of.items()} for i, of in params[name]["state"].items()}
            params[name] = {**params[name], "state": state}
        variables = {name: mine(value) for name, value in (whole.variables or {}).items()}
        file = ModelFile({**whole.data, "seeds": 1}, params, variables, whole.normalizer, whole.classes)
        return build_model(type(self), file, self.env, self.device, seed=None if self.seed is None else self.seed + k)

    def rollout_state(self) -> dict[str, Any]:
        """What is in no file of the model, for a checkpoint."""
        return {"meter": [[list(names), sums, count] for names, (sums, count) in self._meter.sums.items()]}

    def restore_rollout_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`rollout_state` gave."""
        self._meter.sums = {tuple(names): (sums.to(self.device), count) for names, sums, count in state["meter"]}

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *self.OPTIMIZERS], []

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_meter", "_data", "_graph"]


class SpacesOnly(VecEnv):
    """What an agent without an environment shows to callbacks that ask for it: the spaces, and nothing to step."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        super().__init__(1, observation_space, action_space)

    def reset(self) -> Any:
        raise ValueError("This agent learns from a dataset and has no environment: give a callback one of its own.")

    def step_async(self, actions: np.ndarray) -> None:
        self.reset()

    def step_wait(self) -> Any:
        self.reset()

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        self.reset()

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return self.reset()

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [False]


class Meter:
    """Means of named scalars since the last look, summed on the device."""

    def __init__(self) -> None:
        # By the names that came together: steps of a delayed actor have more of them than the others.
        self.sums: dict[tuple[str, ...], tuple[th.Tensor, int]] = {}

    def add(self, info: Mapping[str, th.Tensor]) -> None:
        """Take in one step's scalars."""
        values, names = th.stack([value.detach() for value in info.values()]), tuple(info)
        total, count = self.sums.get(names, (None, 0))
        self.sums[names] = (values if total is None else total.add_(values), count + 1)

    def take(self) -> dict[str, th.Tensor]:
        """The means, and a new beginning."""
        totals: dict[str, tuple[th.Tensor, int]] = {}
        for names, (sums, count) in self.sums.items():
            for name, value in zip(names, sums, strict=True):
                before, of = totals.get(name, (th.zeros_like(value), 0))
                totals[name] = (before + value, of + count)
        self.sums = {}
        return {name: total / count for name, (total, count) in totals.items()}


class StepsBar(BaseCallback):
    """A progress bar of gradient steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_training_start(self) -> None:
        from tqdm.auto import tqdm

        self.bar, self.shown = tqdm(total=self.steps, unit="step"), self.num_timesteps

    def _on_step(self) -> bool:
        self.bar.update(self.num_timesteps - self.shown)
        self.shown = self.num_timesteps
        return True

    def _on_training_end(self) -> None:
        self.bar.close()


def _as_list(callback: MaybeCallback) -> list[Any]:
    if callback is None:
        return []
    return list(callback) if isinstance(callback, (list, tuple)) else [callback]

