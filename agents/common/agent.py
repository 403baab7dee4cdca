"""What every agent of the library has beside SB3's ``BaseAlgorithm``: safe files, exact checkpoints, the finite guard."""

from __future__ import annotations

import io
import logging
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import get_system_info, set_random_seed

from .atomic import replace_file
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .finite import ADVICE, DeviceGuard, NonFiniteError, check_step
from .model_file import ModelPath, build_model, read_model, with_suffix, write_model
from .threads import threads_for, use_threads
from .workers import watched

logger = logging.getLogger("tether")

SKIPS = 10  # numbers in a row that are not finite: skipping them does not help

SelfAgent = TypeVar("SelfAgent", bound="Agent")
T = TypeVar("T")


class Agent(BaseAlgorithm):
    """Comes before SB3's base class in an agent's bases.

    After ``load_checkpoint`` schedules follow the total of the interrupted training, also where ``learn`` is called for a
    part of what is left.

    ``agent.on_nonfinite`` says what happens when a number is not finite: "stop" raises :class:`NonFiniteError`; "skip"
    leaves out the rest of an update, or resets the environments, and goes on, up to :data:`SKIPS` times in a row. The
    batch is written into the logger's folder in both cases.
    """

    on_nonfinite: str = "stop"
    _skipped: int = 0
    _schedule_total: int | None = None
    _skipped_in_a_row: dict[str, int]
    _threads: int | None = None
    _guards: dict[th.optim.Optimizer, DeviceGuard]
    _NOT_SAVED: ClassVar[tuple[str, ...]] = ("_schedule_total", "_skipped_in_a_row", "_guards")

    # ------------------------------------------------------------------ files

    def save(
        self,
        path: ModelPath,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        sb3_compatible: bool = False,
    ) -> None:
        """Save the agent in one file that holds no pickled objects; see ``model_file.py`` for what is in it.

        What cannot be plain data (a lambda as learning rate, a class that is not registered) is left out with a warning.

        :param path: ``.zip`` is added where it has no suffix; or an open binary file
        :param exclude: attributes to leave out
        :param include: attributes to save that would be left out
        :param sb3_compatible: write SB3's own pickled form, which ``BaseAlgorithm.load`` of plain SB3 reads
        """
        if not sb3_compatible:
            return write_model(self, path, exclude, include)
        if isinstance(path, io.BufferedIOBase):
            return super().save(path, exclude, include)
        file = io.BytesIO()
        super().save(file, exclude, include)
        path = with_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return replace_file(path, file.getvalue())

    @classmethod
    def load(
        cls: type[SelfAgent],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trust: bool = False,
        **kwargs: Any,
    ) -> SelfAgent:
        """An agent from its file; nothing in the file is run.

        :param env: environment to go on with; it is wrapped in the training's ``VecNormalize`` where there was one
        :param custom_objects: attributes to take from here instead of from the file
        :param print_system_info: print on what system it was saved, and this one
        :param force_reset: as in SB3; the environment is reset in any case, for its state is in checkpoints
        :param trust: also read files of SB3 itself, which run code that the file chooses
        :param kwargs: attributes to set otherwise than in the file
        :raises ModelFileError: for a file that is no model of this class, damaged, or asks for trust
        """
        file = read_model(path, device, custom_objects, trust)
        if print_system_info:
            _print_system_info(path)
        return build_model(cls, file, env, device, force_reset, **kwargs)

    def save_checkpoint(self, folder: str | os.PathLike[str], keep: int = 2, score: float | None = None) -> Checkpoint:
        """Save everything about the training, see :func:`~.checkpoint.save_checkpoint`; also from a callback."""
        return save_checkpoint(self, pathlib.Path(folder), keep, score)

    @classmethod
    def load_checkpoint(
        cls: type[SelfAgent],
        folder: str | os.PathLike[str],
        env: GymEnv | None,
        device: th.device | str = "auto",
        **kwargs: Any,
    ) -> SelfAgent:
        """The agent in the middle of its training, see :func:`~.checkpoint.load_checkpoint`.

            agent = MDPO.load_checkpoint(folder, env)
            agent.learn(total - agent.num_timesteps, reset_num_timesteps=False)
        """
        return load_checkpoint(cls, pathlib.Path(folder), env, device, **kwargs)

    # ------------------------------------------------------------------ learning

    def _setup_learn(
        self, total_timesteps: int, callback: Any = None, reset_num_timesteps: bool = True, *args: Any
    ) -> tuple[int, BaseCallback]:
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite must be 'stop' or 'skip', not {self.on_nonfinite!r}.")
        total_timesteps, self._skipped_in_a_row = int(total_timesteps), {}
        if reset_num_timesteps:
            self._schedule_total = self._threads = None
        noise = getattr(self, "action_noise", None)
        if self._schedule_total is not None and self._last_obs is not None and noise is not None:
            self.action_noise = None  # a resumed training's noise goes on as it was, and is not reset
        try:
            with watched(self.env):
                result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args)
        finally:
            if noise is not None and self.action_noise is None:
                self.action_noise = noise
        self._total_timesteps = max(self._total_timesteps, self._schedule_total or 0)
        return result

    def _guarded(self, work: Callable[[], T], kind: str) -> T | None:
        """What ``work`` returns; None where it met a number that is not finite, and ``on_nonfinite`` says to skip it.

        :param kind: of work, each of which may fail :data:`SKIPS` times in a row
        """
        try:
            with watched(self.env):
                result = work()
        except NonFiniteError as error:
            error.step = self.num_timesteps if error.step is None else error.step
            in_a_row = self._skipped_in_a_row[kind] = self._skipped_in_a_row.get(kind, 0) + 1
            folder = self.logger.get_dir()
            if folder is not None and in_a_row == 1:
                error.save_report(folder)
            if self.on_nonfinite == "stop" or in_a_row > SKIPS:
                if kind == "collect":
                    self._last_obs = None  # the environments have gone on: who learns on begins new episodes
                raise
            logger.warning("%s at step %d, which is skipped.", error.culprit, error.step)
            self._skipped += 1
            self.logger.record("train/skipped", self._skipped)
            return None
        self._skipped_in_a_row[kind] = 0
        return result

    def _step(
        self,
        optimizer: th.optim.Optimizer,
        loss: th.Tensor,
        terms: dict[str, th.Tensor],
        batch: Mapping[str, Any],
        max_grad_norm: float | None = None,
    ) -> None:
        """One step down the gradient of ``loss``, if both are finite.

        :param terms: of the loss, and ``batch``, what it was computed on: for the finite guard
        :param max_grad_norm: the gradient is clipped to this norm; None: it is not
        :raises NonFiniteError: naming the term or the parameter; the weights are those before the step
        """
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._follow(optimizer, loss, terms, batch, max_grad_norm)

    def _follow(
        self,
        optimizer: th.optim.Optimizer,
        loss: th.Tensor,
        terms: dict[str, th.Tensor],
        batch: Mapping[str, Any],
        max_grad_norm: float | None = None,
    ) -> None:
        """The step of :meth:`_step`, along the gradients that are there."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = th.nn.utils.get_total_norm(gradients)
        if self.device.type == "cpu" or not optimizer.defaults.get("fused"):
            own = {id(p) for p in parameters}
            named = ((name, p) for name, p in self.policy.named_parameters() if id(p) in own)
            check_step(loss, norm, terms, batch, named)
        else:
            guards = vars(self).setdefault("_guards", {})
            if optimizer not in guards:
                guards[optimizer] = DeviceGuard(optimizer, self.device)
            guards[optimizer].look(loss, norm)
        if max_grad_norm is not None:
            th._foreach_mul_(gradients, (max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        optimizer.step()

    def _ask_guards(self) -> None:
        """On a GPU: whether a step since the last call was not finite; it waits for the device, so call it where one logs.

        :raises NonFiniteError: if so; the weights of that optimiser are those before the step, others may have gone on
        """
        if any([guard.failed_since() for guard in vars(self).get("_guards", {}).values()]):
            raise NonFiniteError("A loss or gradient of the latest updates was not finite", ADVICE, self.num_timesteps)

    def _restart_environments(self) -> None:
        """Begin new episodes in the middle of a training."""
        assert self.env is not None
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(self.env.num_envs, dtype=bool)
        if self._vec_normalize_env is not None:
            self._last_original_obs = self._vec_normalize_env.get_original_obs()

    def reseed(self, seed: int) -> None:
        """Other random numbers from here on, in the middle of a training."""
        set_random_seed(seed, using_cuda=self.device.type == "cuda")

    @contextmanager
    def _torch_threads(self, batch_size: int) -> Iterator[None]:
        """As many threads inside the block as the rule gives, or as the training began with: sums depend on their number."""
        if self._threads is None:
            self._threads = threads_for(self.policy, batch_size)
        with use_threads(self._threads):
            yield

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *self._NOT_SAVED]


def _print_system_info(path: Any) -> None:
    """SB3's two paragraphs."""
    print("== CURRENT SYSTEM INFO ==")
    get_system_info()
    with zipfile.ZipFile(path if isinstance(path, io.BufferedIOBase) else with_suffix(path)) as archive:
        print("== SAVED MODEL SYSTEM INFO ==")
        print(archive.read("system_info.txt").decode())
