"""The offline engine: a dataset on the training device, gradient steps on batches drawn from it, and nothing else.

An agent adds ``_prepare``, what it makes of the data once, and ``update``, one gradient step. All of its networks have
the seed as their first axis: ``seeds=5`` trains five agents in the same operations, each on batches of its own.
"""

from __future__ import annotations

import io
import math
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from .acceleration import CapturedCall
from .agent import Agent
from .checkpoint import random_state, restore_random_state
from .finite import check_finite_info
from .meter import Meter
from .model_file import ModelFile, build_model, read_model
from .offline_data import DataError, OfflineData
from .offline_policy import OfflinePolicy
from .ranges import require_at_least
from .spaces_only import SpacesOnly

SelfOfflineAgent = TypeVar("SelfOfflineAgent", bound="OfflineAgent")
Batch = dict[str, th.Tensor]
Draw = Callable[[int], Batch]
Loss = Callable[[Batch], tuple[th.Tensor, dict[str, th.Tensor]]]

UPDATES_PER_GRAPH = 10  # on a GPU, of one captured graph


class OfflineAgent(Agent):
    """Base of the offline agents: everything but the losses.

    ``num_timesteps`` counts gradient steps. A callback's ``on_step`` comes after every one of them. On a GPU, where
    :data:`UPDATES_PER_GRAPH` of them are one captured graph, it comes after every graph (so that SB3's ``eval_freq`` and
    ``save_freq`` count graphs, as they count vector steps elsewhere), the log tells of the last step of each graph, and
    learning rates change between graphs.

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
    steps_environments: bool = False
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
        require_at_least(1, batch_size=batch_size, seeds=seeds)
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
        if self._vec_normalize_env is not None:
            raise ValueError(f"{type(self).__name__} learns from raw data: give its environment without VecNormalize.")
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

    @classmethod
    def spaces_of(cls, env: VecEnv, data: dict[str, Any]) -> dict[str, Any]:
        """The spaces of an environment in the place of those of a dataset, which knows no bounds of observations."""
        own, theirs = data["observation_space"], env.observation_space
        unbounded = isinstance(own, spaces.Box) and not own.bounded_below.any() and not own.bounded_above.any()
        return {"observation_space": theirs} if unbounded and own.shape == theirs.shape else {}

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As SB3's; the environment's bounds take the place of a dataset's, which knows none."""
        wrapped = self._wrap_env(env, self.verbose)
        vars(self).update(self.spaces_of(wrapped, vars(self)))
        super().set_env(wrapped, force_reset)

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

    def _descend(self, batch: Batch, *steps: tuple[th.optim.Optimizer, Loss]) -> dict[str, th.Tensor]:
        """One step of each optimiser down its loss, in this order; what all of them tell."""
        infos: dict[str, th.Tensor] = {}
        for optimizer, loss_of in steps:
            loss, info = loss_of(batch)
            self._step(optimizer, loss, info, batch)
            infos |= info
        return infos

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
        if gradient_steps < (1 if reset_num_timesteps else 0) or log_interval < 1:
            raise ValueError(f"Steps and log_interval must be 1 or more, not {gradient_steps} and {log_interval}.")
        try:
            self._take_data(OfflineData(dataset, self.device))
            total, callback = self._begin(gradient_steps, callback, reset_num_timesteps, tb_log_name, progress_bar)
            with self._torch_threads(self.batch_size):
                callback.on_training_start(locals(), globals())
                while self.num_timesteps < total:
                    self._take_steps(min(self._updates_per_call, total - self.num_timesteps), log_interval)
                    callback.update_locals(locals())
                    if not callback.on_step():
                        break
                callback.on_training_end()
        finally:
            self._forget_data()
        return self

    def _forget_data(self) -> None:
        """After a training: what holds on to the dataset."""
        self._data, self._graph = {}, None
        if hasattr(self, "policy"):
            self.policy.set_training_mode(False)

    @property
    def _updates_per_call(self) -> int:
        if self.device.type != "cuda" or self._n_updates % self._period:
            return 1
        return self._period * math.ceil(UPDATES_PER_GRAPH / self._period)

    def _take_data(self, data: OfflineData) -> None:
        """Prepare the data; take the spaces from them where there are none yet.

        :raises DataError: if the agent cannot learn from them; it is as it was then
        """
        observations, actions = data.spaces()
        fresh = not hasattr(self, "observation_space")
        if fresh:
            self.observation_space, self.action_space = observations, actions
            self._setup_model()
        try:
            for name, mine, theirs in (
                ("observations", self.observation_space, observations),
                ("actions", self.action_space, actions),
            ):
                if mine.shape != theirs.shape:
                    raise DataError(f"The dataset's {name} have the shape {theirs.shape}, and the agent's {mine.shape}.")
            self._data = self._prepare(data)
        except ValueError:
            if fresh:
                del self.observation_space, self.action_space, self.policy
            raise

    def _begin(
        self, steps: int, callback: MaybeCallback, reset: bool, tb_log_name: str | None, progress_bar: bool
    ) -> tuple[int, BaseCallback]:
        """SB3's ``_setup_learn`` without an environment."""
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
        given = callback if isinstance(callback, (list, tuple)) else [callback]
        callbacks = [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in given]
        return total, self._init_callback([*callbacks, *([StepsBar(steps)] if progress_bar else [])])

    def _take_steps(self, steps: int, log_interval: int) -> None:
        self._improve(steps)
        before, self.num_timesteps = self.num_timesteps, self.num_timesteps + steps
        if self.num_timesteps // log_interval > before // log_interval:
            self._dump()

    def _improve(self, steps: int) -> None:
        """So many gradient steps, with the rates of this moment."""
        self.policy.set_training_mode(True)  # a callback's `predict` ends it
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        self._set_rates()
        info = self._guarded(lambda: self._updates(steps), "train")
        self._n_updates += steps
        if info is not None:
            self._meter.add(info)

    def _set_rates(self) -> None:
        """Give the optimisers the learning rates of this step."""
        rate = self.lr_schedule(self._current_progress_remaining)
        for name in self.OPTIMIZERS:
            utils.update_learning_rate(getattr(self, name), rate)

    def _updates(self, steps: int) -> dict[str, th.Tensor]:
        """Several gradient steps, on a GPU as one captured graph; the scalars of the last."""
        if self.device.type != "cuda" or steps != self._updates_per_call:
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
        means = self._meter.take()
        for name, value in (self._guarded(lambda: self._checked(means), "log") or {}).items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        self.logger.record("time/fps", (self.num_timesteps - self._num_timesteps_at_start) / elapsed)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)

    def _checked(self, means: dict[str, th.Tensor]) -> dict[str, float]:
        self._ask_guards()
        return check_finite_info(means, self.num_timesteps) if means else {}

    # ------------------------------------------------------------------ several seeds, files

    def split(self: SelfOfflineAgent) -> list[SelfOfflineAgent]:
        """The agents that were trained side by side, each as one of its own, with its optimisers."""
        random, file = random_state(), io.BytesIO()
        self.save(file)
        whole = read_model(io.BytesIO(file.getvalue()), self.device)
        own = {name for name, _ in self.policy.named_parameters()}
        parts = [self._part(whole, own, k) for k in range(self.seeds)]
        restore_random_state(random)  # building an agent seeds the generators
        return parts

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
        """What is in no file of the model, for a checkpoint.

        :raises NonFiniteError: on a GPU, if a step since the last look was not finite
        """
        self._ask_guards()
        return {"meter": [[list(names), sums, count] for names, (sums, count) in self._meter.sums.items()]}

    def restore_rollout_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`rollout_state` gave."""
        self._meter.sums = {tuple(names): (sums.to(self.device), count) for names, sums, count in state["meter"]}

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As SB3's.

        :raises ValueError: before the first training of an agent without an environment
        """
        self._refuse_unbuilt()
        return super().predict(*args, **kwargs)

    def _refuse_unbuilt(self) -> None:
        if not hasattr(self, "policy"):
            raise ValueError(f"This {type(self).__name__} has no networks yet: learn_offline makes them, or give an env.")

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        self._refuse_unbuilt()
        return ["policy", *self.OPTIMIZERS], []

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_meter", "_data", "_graph"]


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
