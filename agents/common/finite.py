"""The finite guard: the first number that is not finite stops training, and its name is said."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch as th


class NonFiniteError(ValueError):
    """A NaN or an infinity met during training; the message names the culprit and the step."""


def check_finite(values: Any, name: str, step: int, first: int = 0) -> None:
    """Raise :class:`NonFiniteError` if one environment of the vector returned a value that is not finite.

    :param values: array (n_envs, ...) of floats, or a mapping of such arrays (dict observations)
    :param name: what the values are, in the singular ("reward", "observation")
    :param step: env steps taken so far, for the message
    :param first: number of the first environment in ``values``
    """
    if isinstance(values, Mapping):
        for key, part in values.items():
            check_finite(part, f"{name} '{key}'", step, first)
        return
    if values.dtype.kind != "f":
        return
    flat = values.ravel()
    # The dot product is one call and finite only if all are; when it overflows, the values themselves are asked.
    if math.isfinite(np.vdot(flat, flat)) or np.isfinite(flat).all():
        return
    env = int(np.argwhere(~np.isfinite(values))[0][0])
    bad = np.ravel(values[env])[~np.isfinite(np.ravel(values[env]))][0]
    raise NonFiniteError(
        f"The {name} of env {first + env} is {bad} at step {step}, so training stopped before it could reach the weights: "
        f"repair the environment, or wrap it so that it ends the episode with a finite {name}."
    )


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
            raise NonFiniteError(
                f"The term '{name}' of the update at step {step} is {value}, so training stopped: "
                "go back to the last checkpoint and lower the learning rate or the step size."
            )
    return numbers
