"""Epochs of minibatches: the loop in which every on-policy agent spends its update.

An update reads nothing back to the host. On a GPU an epoch is captured once as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch as th

from .acceleration import CapturedCall, CompiledCall
from .finite import ADVICE, DeviceGuard, NonFiniteError, check_step
from .flat_adam import FlatAdam

# Name -> tensor (N, ...), a scalar tensor for what all samples share, or a dict of such.
Batch = dict[str, Any]
T = TypeVar("T")
Loss = Callable[[Batch], tuple[th.Tensor, dict[str, th.Tensor]]]


def map_batch(function: Callable[[th.Tensor], th.Tensor], batch: Any) -> Any:
    """Apply ``function`` to the tensors of a batch that have a sample axis."""
    if isinstance(batch, dict):
        return {key: map_batch(function, part) for key, part in batch.items()}
    return function(batch) if batch.ndim else batch


def batch_length(batch: Any) -> int:
    """N, the number of samples."""
    if isinstance(batch, dict):
        return next(n for n in map(batch_length, batch.values()) if n)
    return len(batch) if batch.ndim else 0


def minibatches(batch: Batch, size: int) -> list[Batch]:
    """Consecutive parts of ``size`` samples, as views; a last partial one is left out."""
    n = batch_length(batch)
    return [map_batch(lambda x, i=i: x[i : i + size], batch) for i in range(0, n - size + 1, size)]  # type: ignore[misc]


def in_chunks(function: Callable[[Any], th.Tensor], batch: Any, size: int = 4096) -> th.Tensor:
    """``function`` of a batch, evaluated ``size`` samples at a time: images of a whole rollout may not fit at once."""
    n = batch_length(batch)
    if n <= size:
        return function(batch)
    return th.cat([function(map_batch(lambda x, i=i: x[i : i + size], batch)) for i in range(0, n, size)])  # type: ignore[misc]


def mean_of(infos: list[dict[str, th.Tensor]]) -> dict[str, th.Tensor]:
    """Means of named scalars; the largest of those whose name ends in ``_max``."""
    stacked = {key: th.stack([info[key].detach() for info in infos]) for key in infos[0]}
    return {key: values.max() if key.endswith("_max") else values.mean() for key, values in stacked.items()}


def side_by_side(first: Callable[[], T], second: Callable[[], T], threads: bool) -> tuple[T, T]:
    """Results of two updates that share no parameters, in two threads or one after the other.

    torch lets other threads run inside its operations, so the second core works too, and no thread ever spins. At most
    one of the two may draw random numbers, or the seed would not fix the weights; and none may compile, which puts the
    generator's state back behind the other's draws.
    """
    if not threads:
        return first(), second()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second)
        return first(), other.result()


def norm_of_gradients(parameters: Iterable[th.nn.Parameter]) -> th.Tensor:
    """Global norm of the gradients that there are."""
    return th.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Update:
    """Minimises one loss over a rollout.

    :param loss: minibatch -> (scalar, named scalars for the log). Whatever changes between iterations must come in
        the batch, scalars too: a captured epoch does not see new Python numbers
    :param optimizer: of the parameters that the loss trains
    :param batch_size: samples a step, drawn without replacement each epoch; None: the whole rollout, in its order
    :param max_grad_norm: gradients are clipped to this global norm; None: they are not
    :param network: whose parameters the finite guard names
    :param compile_loss: run the loss through ``torch.compile``
    :param groups: parameters whose gradients' norm, before clipping, is logged as ``grad_norm_<name>``
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: th.optim.Optimizer,
        batch_size: int | None,
        max_grad_norm: float | None,
        network: th.nn.Module,
        compile_loss: bool = False,
        groups: dict[str, list[th.nn.Parameter]] | None = None,
    ) -> None:
        self.groups = groups or {}
        self.loss: Loss = CompiledCall(loss) if compile_loss else loss
        self.optimizer = optimizer
        self.batch_size, self.max_grad_norm = batch_size, max_grad_norm
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.named = [(name, p) for name, p in network.named_parameters() if id(p) in own]
        if isinstance(optimizer, FlatAdam):
            optimizer.flatten()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._epoch: Callable[[Batch], dict[str, th.Tensor]] = self.epoch
        self.guard: DeviceGuard | None = None
        if self.parameters[0].is_cuda and optimizer.defaults.get("fused"):
            self.guard = DeviceGuard(optimizer, self.parameters[0].device)
        # Without the guard on the device every step is looked at on the host, which no graph can do.
        if self.guard is not None and "capturable" in optimizer.defaults:
            self._epoch = CapturedCall(self.epoch, optimizer)

    def run(
        self, batch: Batch, epochs: int, after_epoch: Callable[[dict[str, th.Tensor]], bool] = lambda info: False
    ) -> dict[str, th.Tensor]:
        """Several epochs.

        :param batch: everything the loss reads, N samples
        :param after_epoch: called with the means of the epoch's named scalars; True ends the update
        :return: means of the named scalars over all epochs, on the device
        :raises NonFiniteError: naming the loss term or the gradient that is not finite; the weights are those before it
        """
        infos = []
        for _ in range(epochs):
            infos.append(self._epoch(self._shuffled(batch)))
            if after_epoch(infos[-1]):
                break
        if self.guard is not None and self.guard.failed_since():
            self._name_culprit(batch)
        return mean_of(infos)

    def _name_culprit(self, batch: Batch) -> None:
        """Look for what was not finite, with the weights that the guard kept as they were before it."""
        for part in [batch] if self.batch_size is None else minibatches(batch, self.batch_size):
            self.optimizer.zero_grad(set_to_none=True)
            loss, info = self.loss(part)
            loss.backward()
            norm = norm_of_gradients([p for _, p in self.named])
            check_step(loss, norm, info, part, self.named)
        raise NonFiniteError("A loss or gradient of the update is not finite", ADVICE, batch=batch)

    def _shuffled(self, batch: Batch) -> Batch:
        if self.batch_size is None:
            return batch
        order = th.randperm(batch_length(batch), device=self.parameters[0].device)
        return map_batch(lambda x: x.index_select(0, order), batch)

    def epoch(self, batch: Batch) -> dict[str, th.Tensor]:
        """One optimiser step per minibatch of a shuffled batch; means of the named scalars."""
        parts = [batch] if self.batch_size is None else minibatches(batch, self.batch_size)
        infos = []
        for part in parts:
            loss, info = self.loss(part)
            norm = self.step(loss, info, part)
            infos.append({**info, "grad_norm": norm, **self._group_norms})
        return mean_of(infos)

    def step(self, loss: th.Tensor, info: dict[str, th.Tensor], batch: Batch) -> th.Tensor:
        """One step of the optimiser down the gradient of ``loss``, clipped; its norm before that.

        :param info: terms of the loss, and ``batch``, what it was computed on: for the finite guard
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._group_norms = {f"grad_norm_{name}": norm_of_gradients(group) for name, group in self.groups.items()}
        if isinstance(self.optimizer, FlatAdam):
            gradients = [self.optimizer.gather()]
            norm = gradients[0].norm()
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = th.nn.utils.get_total_norm(gradients)
        if self.guard is not None:
            self.guard.look(loss, norm)
        elif not (norm.is_cuda and th.cuda.is_current_stream_capturing()):
            check_step(loss, norm, info, batch, self.named)
        if self.max_grad_norm is not None:
            th._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        self.optimizer.step()
        return norm
