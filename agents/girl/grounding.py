"""Grounding: a frozen signal of what is seen corrects the prior, and the latent must tell it.

The paper's formulas were not readable. From digests: a frozen embedding Phi enters the transition prior through a
sigmoid-gated residual, and a consistency loss with stopped gradient ties the latent to it. Everything else here (widths,
initialisation, time index, layer norm) completes it and is not verified.
"""

from __future__ import annotations

import torch as th
from torch import nn
from torch.nn import functional as F

from .latents import Latent

CLOSED = -2.0  # the gate's initial bias: it begins at sigmoid(-2) = 0.12
PSI = ("trained", "frozen", "identity")


class Grounding(nn.Module):
    """c = LN(Psi(Phi(o))), the gated residual of the prior, and the projector that predicts c from a latent.

    :param embedding: width of Phi
    :param latent: family of z
    :param deter: width of h
    :param dim: width of c (digest: 128)
    :param psi: "trained" by the KL's gradient alone, "frozen" (a random orthogonal map), or "identity", where Phi has
        the width of c already
    """

    def __init__(self, embedding: int, latent: Latent, deter: int, dim: int = 128, psi: str = "trained") -> None:
        super().__init__()
        if psi not in PSI:
            raise ValueError(f"psi is one of {', '.join(PSI)}, not {psi!r}.")
        if psi == "identity" and embedding != dim:
            raise ValueError(f"psi='identity' needs an encoder of width {dim}, and this one has {embedding}.")
        self.dim, self.latent = dim, latent
        self.psi = nn.Sequential()  # the identity
        if psi != "identity":
            linear = nn.Linear(embedding, dim)
            self.psi = nn.Sequential(nn.LayerNorm(embedding, elementwise_affine=False), linear)
            if psi == "frozen":
                nn.init.orthogonal_(linear.weight)
                self.psi.requires_grad_(False)
        self.gate = nn.Linear(deter + dim, latent.grounded)
        nn.init.constant_(self.gate.bias, CLOSED)
        self.residual = nn.Linear(dim, latent.grounded, bias=False)  # W_c
        nn.init.zeros_(self.residual.weight)
        self.projector = nn.Sequential(nn.Linear(latent.features, 256), nn.SiLU(), nn.Linear(256, dim))  # f_psi

    def signal(self, phi: th.Tensor) -> th.Tensor:
        """c (..., dim) of the frozen embedding (..., D), layer-normalised so that it cannot shrink away."""
        return F.layer_norm(self.psi(phi.float()), (self.dim,))

    def predicted(self, z: th.Tensor) -> th.Tensor:
        """c_hat = f_psi(z), (..., dim)."""
        return self.projector(z)

    def shift(self, raw: th.Tensor, h: th.Tensor, c: th.Tensor) -> th.Tensor:
        """The prior's statistics with G W_c c added to logits or means, G = sigmoid(W_g [h, c] + b_g).

        Zero residual or a closed gate gives ``raw`` bit for bit: the base dynamics.
        """
        residual = self.gate(th.cat((h, c), -1)).sigmoid() * self.residual(c)
        if self.latent.grounded == self.latent.statistics:
            return raw + residual
        return th.cat((raw[..., : self.latent.grounded] + residual, raw[..., self.latent.grounded :]), -1)

    def consistency_loss(self, z: th.Tensor, c: th.Tensor) -> th.Tensor:
        """L_cm = || f_psi(z) - sg(c) ||^2, the mean over the dimensions of c, (...)."""
        return (self.predicted(z).float() - c.detach()).square().mean(-1)


def shifted(signal: th.Tensor, first: th.Tensor) -> th.Tensor:
    """c_{t-1} at every step of a sequence (T, B, dim): zero at its beginning and where an episode begins."""
    before = th.cat((th.zeros_like(signal[:1]), signal[:-1]))
    return before.masked_fill(first.unsqueeze(-1), 0.0)
