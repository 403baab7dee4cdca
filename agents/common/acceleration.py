"""Two ways of making many small operations cheap: compiled losses, and CUDA graphs of whole epochs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch as th

Result = TypeVar("Result")

# Calls before the capture: the optimiser makes its state in the first, and libraries choose their kernels.
WARM_UP = 3


class CompiledCall:
    """``function`` through ``torch.compile``, or as it is where it cannot be compiled, which is then said once.

    :param function: takes a batch
    """

    def __init__(self, function: Callable[[Any], Result]) -> None:
        self.function, self.compiled = function, th.compile(function)
        self.tried = False

    def __call__(self, batch: Any) -> Any:
        """What ``function`` gives; the first call compiles."""
        if self.tried:
            return self.compiled(batch)
        self.tried = True
        try:
            return self.compiled(batch)
        except Exception as error:  # torch has no common class for a missing compiler and code that it cannot trace
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(
                f"torch.compile failed ({reason}), so the loss runs uncompiled: install a C++ compiler (g++), or leave "
                "compile_loss=False.",
                stacklevel=2,
            )
            self.compiled = self.function
            return self.function(batch)


class CapturedCall:
    """``function(batch)`` replayed from a CUDA graph, with the same numbers as a plain call.

    The first :data:`WARM_UP` calls run plainly on a side stream; the next one is captured. Later calls copy their batch
    into the memory that the graph reads. A batch of other shapes starts anew, and so does
    an optimiser whose state was loaded.

    :param function: takes a batch (nested dicts of CUDA tensors), steps the optimisers, returns named scalars; must not
        read anything back to the host
    :param optimizers: such that torch can capture (they have the option ``capturable``); made so here, with the learning
        rate in a tensor that schedules write into
    """

    def __init__(self, function: Callable[[Any], dict[str, th.Tensor]], *optimizers: th.optim.Optimizer) -> None:
        self.function, self.optimizers = function, optimizers
        self._forget(())

    def _forget(self, shapes: Any) -> None:
        self.shapes, self.calls = shapes, 0
        # The moments that the graph writes to; loading puts others in their place.
        self.states = [optimizer.state for optimizer in self.optimizers]
        self.graph: th.cuda.CUDAGraph | None = None
        self.static: Any = None
        self.result: dict[str, th.Tensor] = {}

    def __call__(self, batch: Any) -> dict[str, th.Tensor]:
        """The named scalars."""
        others = any(o.state is not state for o, state in zip(self.optimizers, self.states, strict=True))
        if _shapes(batch) != self.shapes or others:
            self._forget(_shapes(batch))
        self._keep_rate_in_tensor()
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._on_side_stream(batch)
        if self.graph is None:
            self._capture(batch)
        _copy(self.static, batch)
        self.graph.replay()  # type: ignore[union-attr]
        return {key: value.clone() for key, value in self.result.items()}

    def _keep_rate_in_tensor(self) -> None:
        """A schedule writes a number into ``lr``: move it into the tensor that the graph reads."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["capturable"] = True
            device = group["params"][0].device
            if not isinstance(group["lr"], th.Tensor):
                place = group.setdefault("lr_tensor", th.zeros((), device=device))
                place.fill_(group["lr"])
                group["lr"] = place

    def _on_side_stream(self, batch: Any) -> dict[str, th.Tensor]:
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            result = self.function(batch)
        th.cuda.current_stream().wait_stream(stream)
        return result

    def _capture(self, batch: Any) -> None:
        self.static = _clone(batch)
        self.graph = th.cuda.CUDAGraph()
        with th.cuda.graph(self.graph):
            self.result = self.function(self.static)


def _shapes(batch: Any) -> Any:
    if isinstance(batch, dict):
        return tuple((key, _shapes(part)) for key, part in batch.items())
    return batch.shape, batch.dtype


def _clone(batch: Any) -> Any:
    return {key: _clone(part) for key, part in batch.items()} if isinstance(batch, dict) else batch.clone()


def _copy(into: Any, batch: Any) -> None:
    if isinstance(into, dict):
        for key, part in into.items():
            _copy(part, batch[key])
    else:
        into.copy_(batch)
