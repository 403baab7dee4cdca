"""The trust region of the world model: the drift KL(q || p) is held below a radius by a dual variable, the weight beta.

From digests of the paper: beta is the multiplier of E[drift] <= delta, updated from the excess and clipped; delta_0 is
the mean drift of the first 10^4 steps; delta moves up with the expected information gain and down with the relative
performance loss. The formulas and constants below complete that and are not verified.
"""

from __future__ import annotations

import torch as th
from torch import nn

RPL_MAX = 5.0


class TrustRegion(nn.Module):
    """delta, beta and the averages that they follow, as tensors: nothing here waits for the device.

    :param step_size: eta of the dual ascent
    :param decay: of the average of the drift that the ascent sees; 0 is the raw drift
    :param bounds: beta stays inside
    :param tau_eig: how far delta rises with the information gain
    :param tau_rpl: how far it falls with the performance loss
    :param radius_bounds: delta stays inside, in units of delta_0
    """

    beta: th.Tensor
    delta: th.Tensor
    delta_0: th.Tensor
    drift: th.Tensor
    replay_drift: th.Tensor
    eig_reference: th.Tensor
    warm: th.Tensor
    active: th.Tensor

    def __init__(
        self,
        step_size: float = 1e-3,
        decay: float = 0.99,
        bounds: tuple[float, float] = (0.01, 10.0),
        tau_eig: float = 0.1,
        tau_rpl: float = 0.5,
        radius_bounds: tuple[float, float] = (0.1, 3.0),
    ) -> None:
        super().__init__()
        self.step_size, self.decay, self.bounds = step_size, decay, bounds
        self.tau_eig, self.tau_rpl, self.radius_bounds = tau_eig, tau_rpl, radius_bounds
        self.register_buffer("beta", th.ones(()))
        for name in ("delta", "delta_0", "drift", "replay_drift", "eig_reference"):
            self.register_buffer(name, th.zeros(()))
        self.register_buffer("warm", th.zeros(2, dtype=th.float64))  # sum and number of the drifts before delta is set
        self.register_buffer("active", th.zeros((), dtype=th.bool))

    @property
    def bound(self) -> th.Tensor:
        """delta; before it is set, the running mean of the drift."""
        return th.where(self.active, self.delta, (self.warm[0] / self.warm[1].clamp(min=1.0)).float())

    @property
    def free_nats(self) -> th.Tensor:
        """min(1, delta / 2): below it the KL has no gradient, so that it must stay under the radius; 1 before there is one."""
        return th.where(self.active, (self.delta / 2.0).clamp(max=1.0), th.ones_like(self.delta))

    @th.no_grad()
    def update(self, drift: th.Tensor) -> None:
        """Dual ascent, beta <- clip(beta + eta (EMA(drift) - delta)); before delta is set the drift is only collected.

        :param drift: mean of the unclipped KL of a replayed batch: a clipped one could not fall below the free nats; one that
            is not finite counts as the average of those before
        """
        drift = th.where(drift.isfinite(), drift.float(), self.replay_drift)
        self.warm.add_(th.stack((drift.double(), th.ones_like(drift.double()))) * ~self.active)
        began = self.warm[1] + self.active > 1
        self.replay_drift.copy_(th.where(began, self.replay_drift.lerp(drift, 0.01), drift))
        self.drift.copy_(th.where(self.active, drift.lerp(self.drift, self.decay), drift))
        ascended = (self.beta + self.step_size * (self.drift - self.delta)).clamp(*self.bounds)
        self.beta.copy_(th.where(self.active, ascended, self.beta))

    @th.no_grad()
    def activate(self) -> None:
        """The end of the warm start: delta = delta_0 = the mean of the drifts so far, where their average starts.

        :raises ValueError: if there was none
        """
        if not self.warm[1]:
            raise ValueError("There was no update yet whose drift could be the radius: update before you activate.")
        mean = self.warm[0] / self.warm[1]
        for value in (self.delta_0, self.delta, self.drift):
            value.copy_(mean)
        self.active.fill_(True)

    @th.no_grad()
    def relative_loss(self, fresh_drift: th.Tensor) -> th.Tensor:
        """RPL = max(0, D_new / D_rep - 1), at most 5: how much worse the model is on what was just collected.

        :param fresh_drift: mean drift on the newest steps; D_rep is the average over replayed batches
        """
        return (fresh_drift / (self.replay_drift + 1e-8) - 1.0).clamp(0.0, RPL_MAX)

    @th.no_grad()
    def set_radius(self, eig: th.Tensor, rpl: th.Tensor) -> None:
        """delta = clip(delta_0 (1 + tau_EIG (EIG / EIG_ref - 1) - tau_RPL RPL)), EIG_ref a slow average of EIG.

        :param eig: 0 where there is no ensemble: its part is left out then
        :param rpl: as :meth:`relative_loss` gives it
        """
        started = self.eig_reference > 0.0
        self.eig_reference.copy_(th.where(started, self.eig_reference.lerp(eig.float(), 0.01), eig.float()))
        gain = th.where(self.eig_reference > 0.0, eig / self.eig_reference.clamp(min=1e-12) - 1.0, 0.0)
        factor = (1.0 + self.tau_eig * gain - self.tau_rpl * rpl).clamp(*self.radius_bounds)
        self.delta.copy_(self.delta_0 * factor)
