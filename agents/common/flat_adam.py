"""Adam on one long vector: the parameters of a small network are updated by one kernel instead of a loop over layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch as th


class FlatAdam(th.optim.Adam):
    """:class:`torch.optim.Adam` whose parameters :meth:`flatten` makes views of one vector, with the same numbers.

    After it, use the four methods below in the order of their appearance; gradients live in the parameters until
    :meth:`gather`. Weights must be written in place from then on (as ``load_state_dict`` does). A deep copy of a
    policy acts as ever, but only the original is trained.

    :param params: parameters of one group
    :param kwargs: as torch's
    """

    def __init__(self, params: Iterable[th.nn.Parameter], **kwargs: Any) -> None:
        self.trained = list(params)
        self.flat: th.nn.Parameter | None = None
        super().__init__(self.trained, **kwargs)

    def flatten(self) -> None:
        """Move the parameters into one vector on their device; before the first step, after the last ``.to``."""
        if self.flat is not None or self.state:
            raise RuntimeError("FlatAdam.flatten must be called once, before the first step.")
        with th.no_grad():
            self.flat = th.nn.Parameter(th.cat([p.flatten() for p in self.trained]))
            for p, part in zip(self.trained, self.flat.split([p.numel() for p in self.trained]), strict=True):
                p.data = part.data.view_as(p)
        self.flat.grad = th.zeros_like(self.flat)
        self._zeros = [th.zeros(p.numel(), device=p.device) for p in self.trained]  # for what a loss does not reach
        self.param_groups[0]["params"] = [self.flat]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the parameters."""
        for p in self.trained:
            p.grad = None

    def gather(self) -> th.Tensor:
        """Copy the gradients of the parameters into the vector's, which is returned."""
        assert self.flat is not None
        assert self.flat.grad is not None
        parts = [z if p.grad is None else p.grad.flatten() for p, z in zip(self.trained, self._zeros, strict=True)]
        return th.cat(parts, out=self.flat.grad)
