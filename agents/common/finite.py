"""The finite guard: the first number that is not finite stops training before it reaches the weights, and is named."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from .atomic import replace_file

logger = logging.getLogger("tether")


class NonFiniteError(ValueError):
    """A NaN or an infinity met during training; the message names the culprit and the step.

    :param culprit: what is not finite, as the beginning of a sentence
    :param advice: what to do
    :param step: env steps taken so far; the engine fills it in where the place that noticed does not know it
    :param batch: arrays and tensors by name, in which the culprit was found
    """

    def __init__(self, culprit: str, advice: str, step: int | None = None, batch: Mapping[str, Any] | None = None) -> None:
        super().__init__(culprit)
        self.culprit, self.advice, self.step, self.batch = culprit, advice, step, dict(batch or {})
        self.report: Path | None = None  # the file that holds the batch

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        where = "" if self.report is None else f" The batch is in {self.report}."
        return f"{self.culprit}{at}, so training stopped before it could reach the weights: {self.advice}.{where}"

    def save_report(self, folder: str | os.PathLike[str]) -> Path:
        """Write the batch to ``nonfinite-<step>.npz``, which ``numpy.load`` reads, and the sentence beside it."""
        path = Path(folder) / f"nonfinite-{self.step or 0}.npz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = io.BytesIO()
            np.savez(file, **dict(_flat_arrays(self.batch)))  # type: ignore[arg-type]
            replace_file(path, file.getvalue())
            self.report = path
            replace_file(path.with_suffix(".json"), json.dumps({"error": str(self), "step": self.step}, indent=2))
        except OSError as error:  # the culprit matters more than its report
            logger.warning("The batch could not be written to %s (%s).", path, error)
        return path


def _flat_arrays(batch: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, np.ndarray]]:
    for name, value in batch.items():
        if isinstance(value, Mapping):
            yield from _flat_arrays(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value.detach().cpu().numpy() if isinstance(value, th.Tensor) else np.asarray(value)


# ---------------------------------------------------------------------- what comes from environments


SQUARE_OF_LARGEST = 1e76  # of float32, about


def check_finite(values: Any, name: str, step: int, first: int = 0) -> None:
    """Raise :class:`NonFiniteError` if a value of one environment of the vector is not finite.

    :param values: array (n_envs, ...) of floats, or a dict of such arrays
    :param name: what the values are, in the singular ("reward", "observation", "action")
    :param step: env steps taken so far, for the message
    :param first: number of the first environment in ``values``
    """
    if isinstance(values, dict):
        for key, part in values.items():
            check_finite(part, f"{name} '{key}'", step, first)
        return
    if values.dtype.kind != "f":
        return
    flat = values.ravel()
    # One call, whose result is small only if all values are; where it is not, the values themselves are asked.
    if float(np.vdot(flat, flat)) < SQUARE_OF_LARGEST:  # not in float32, in which the limit is infinite
        return
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)  # in which they are stored: what is too large for that is not finite
    if np.isfinite(values).all():
        return
    env = int(np.argwhere(~np.isfinite(values))[0][0])
    bad = np.ravel(values[env])[~np.isfinite(np.ravel(values[env]))][0]
    advice = f"repair the environment, or wrap it so that it ends the episode with a finite {name}"
    if name == "action":
        advice = "look at the observations that led to it, and normalise them, or lower the learning rate"
    raise NonFiniteError(f"The {name} of env {first + env} is {bad}", advice, step, {name: np.array(values)})


# ---------------------------------------------------------------------- what comes from losses


ADVICE = "go back to the last checkpoint and lower the learning rate or the step size"


def check_step(
    loss: th.Tensor,
    norm: th.Tensor,
    terms: Mapping[str, th.Tensor],
    batch: Mapping[str, Any],
    named: Iterable[tuple[str, th.nn.Parameter]],
) -> None:
    """Raise :class:`NonFiniteError` if a loss or its gradient is not finite; on the CPU, where asking costs nothing.

    :param loss: scalar
    :param norm: of its gradient
    :param terms: of the loss, by name
    :param batch: that the loss was computed on
    :param named: the parameters, which still hold the gradient, with their names
    """
    if math.isfinite(norm.item()) and math.isfinite(loss.item()):
        return
    raise NonFiniteError(_culprit(loss, terms, named), ADVICE, batch=batch)


def _culprit(
    loss: th.Tensor, terms: Mapping[str, th.Tensor], named: Iterable[tuple[str, th.nn.Parameter]]
) -> str:
    for name, value in {**terms, "loss": loss}.items():
        if not bool(value.isfinite().all()):
            return f"The term '{name}' of the loss is {float(value.detach().flatten()[0])}"
    for name, parameter in named:
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            bad = parameter.grad[~parameter.grad.isfinite()][0]
            return f"The gradient of '{name}' is {float(bad)}"
    return "The norm of the gradient is too large for its dtype"


class DeviceGuard:
    """The same for a GPU, which is not asked inside the loop: after the first step that is not finite, none is taken.

    :param optimizer: a fused one, whose kernel reads ``found_inf``
    """

    def __init__(self, optimizer: th.optim.Optimizer, device: th.device) -> None:
        self.failed = th.zeros((), device=device)
        optimizer.found_inf = self.failed  # type: ignore[attr-defined]

    def look(self, loss: th.Tensor, norm: th.Tensor) -> None:
        """Before a step of the optimiser."""
        self.failed.logical_or_(~th.isfinite(norm + loss.detach()))

    def failed_since(self) -> bool:
        """Whether a step was not finite since the last call; waits for the device."""
        failed = bool(self.failed)
        self.failed.zero_()
        return failed


def check_finite_info(
    info: Mapping[str, th.Tensor], step: int, may_be_nan: Collection[str] = ()
) -> dict[str, float]:
    """Move the scalars of an update to the host in one transfer and check them.

    :param info: name -> scalar tensor
    :param step: env steps taken so far, for the message
    :param may_be_nan: names that are not checked
    :return: the same names with floats
    :raises NonFiniteError: naming the first term that is not finite
    """
    floats = th.stack([value.detach().float().reshape(()) for value in info.values()]).tolist()
    numbers = dict(zip(info, floats, strict=True))
    for name, value in numbers.items():
        if not np.isfinite(value) and name not in may_be_nan:
            raise NonFiniteError(f"The term '{name}' of the update is {value}", ADVICE, step)
    return numbers


def check_weights(model: Any) -> None:
    """Refuse to save weights, moments or optimiser states that are not finite, in the place of the last good ones.

    :raises NonFiniteError: naming the tensor
    """
    for name, value in _tensors(model.get_parameters(), ""):
        if value.is_floating_point() and not bool(value.isfinite().all()):
            advice = "go back to the last checkpoint, which stays, and lower the learning rate or the step size"
            raise NonFiniteError(f"'{name}' has values that are not finite", advice, model.num_timesteps)


def _tensors(value: Any, name: str) -> Iterable[tuple[str, th.Tensor]]:
    if isinstance(value, th.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}".lstrip("."))
