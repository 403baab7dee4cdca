"""FMQ: flow maps aligned with optimal Q-guidance ("Aligning Flow Map Policies with Optimal Q-Guidance", arXiv 2605.12416).

Offline a flow map u learns the data's chunks and critics their values (:mod:`.flow_maps`). Online u is fitted to the closed
form of the best map within a ball around the frozen offline one,
    u*_{r,1}(a_r | s) = u_off(a_r, r, 1, s) + eta g,   g = grad_a Q(s, a) / || grad_a Q(s, a) ||   at a = X^off_{r,1}(a_r | s),
which maximises the first-order expansion of Q(s, X_{r,1}(a_r)) subject to || u - u_off || <= eta (Theorem 3.2). A sample takes
one evaluation of the network; by default the best of 32 is played.

The paper's text was not read: equations are those of its released code and of notes of others, and where code and paper are
known to differ, the code is followed and a parameter gives the paper's form.
"""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from ..common.batched import frozen
from ..common.flow import interpolated, masked_mean, uniform_times
from ..common.offline import Batch
from ..common.ranges import require_at_least
from .flow_maps import FlowMapAgent, FlowMapPolicy
from .search import direction

DISAGREEMENT_FLOOR = 1e-8


# ---------------------------------------------------------------------- the paper's equations


def trust_region_target(reference: th.Tensor, gradient: th.Tensor, radius: th.Tensor | float) -> th.Tensor:
    """u* = u_off + eta g / (||g|| + 1e-8), the norm over the whole chunk (Theorem 3.2); (S, B, A).

    :param reference: u_off(a_r, r, 1, s), (S, B, A)
    :param gradient: of Q at the action that ``reference`` leads to, (S, B, A)
    :param radius: eta, a number or (S, B)
    """
    radius = radius if isinstance(radius, float) else radius.unsqueeze(-1)
    return reference + radius * direction(gradient)


def adaptive_radius(q: th.Tensor, eta: float, beta: float) -> th.Tensor:
    """eta / (1 + beta d), d the ensemble's standard deviation over its mean in the batch (Eq. 13); (S, B).

    At beta = 0 it is eta everywhere. With eta = 1 it is what the released code computes, which has no eta in it.

    :param q: (S, E, B)
    """
    deviation = q.std(1, unbiased=False)
    return eta / (1.0 + beta * deviation / (deviation.mean(-1, keepdim=True) + DISAGREEMENT_FLOOR))


# ---------------------------------------------------------------------- the agent


class FMQ(FlowMapAgent):
    """Flow-map policies with Q-guidance in a trust region, from offline to online.

        agent = FMQ(env=env).learn_offline(dataset, 1_000_000)
        agent.learn(1_000_000)

    Its log has ``train/trust_region``, the mean distance || u - u_off || of a batch, and ``train/trust_region_bound``, the
    mean radius; a distance passes the radius only by what the fit lacks.

    :param policy: MlpPolicy or a class derived from :class:`FlowMapPolicy`
    :param env: to learn in online; None takes the spaces from the dataset
    :param learning_rate: of both Adams
    :param batch_size: chunks per gradient step
    :param horizon: H, actions of a chunk
    :param gamma: discount of a single step
    :param tau: of the Polyak average that makes the target critics
    :param distillation: "mf" (published), "lsd" or "psd", how the map learns to jump
    :param warmup: gradient steps of flow matching alone
    :param anneal_end: gradient steps after which two times of a jump are as far apart as two uniform draws
    :param eta: radius of the trust region, in the norm of the chunk's velocity
    :param beta: how much the radius shrinks where the critics disagree; 0: the radius is ``eta``. The published configuration
        has eta 1 and beta .3, the paper's fixed radius is .5
    :param lambda_diagonal: weight of flow matching on the replay memory online; at 0 the diagonal drifts, on which QGBS with
        ``denoise="diagonal"`` relies
    :param lambda_flow_map: weight of the identity of ``distillation`` online
    :param gradient_at: where the critic's gradient is taken: "reference", the action of the frozen map, or "online", that of
        the map in training
    :param offline_ranking: "mean" or "min" of the critics, in targets and best-of-N; "mean" in the code, "min" in the paper
    :param online_ranking: the same online; "min" in both
    :param target_candidates: N of the best-of-N that is bootstrapped from; None: the policy's ``n_candidates`` (code); 1: one
        sample (paper)
    :param buffer_size: chunks that the replay memory holds at most, but the dataset's at least
    :param learning_starts: env steps before the first online update
    :param gradient_steps: updates per step of the (vector) environment
    :param seeds: agents that are trained side by side offline
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    :raises ValueError: for an argument outside its range, in one sentence
    """

    def __init__(
        self,
        policy: str | type[FlowMapPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        horizon: int = 5,
        gamma: float = 0.99,
        tau: float = 0.005,
        distillation: str = "mf",
        warmup: int = 5000,
        anneal_end: int = 50_000,
        eta: float = 1.0,
        beta: float = 0.3,
        lambda_diagonal: float = 0.0,
        lambda_flow_map: float = 0.0,
        gradient_at: str = "reference",
        offline_ranking: str = "mean",
        online_ranking: str = "min",
        target_candidates: int | None = None,
        buffer_size: int = 2_000_000,
        learning_starts: int = 5000,
        gradient_steps: int = 1,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        require_at_least(0.0, beta=beta, lambda_diagonal=lambda_diagonal, lambda_flow_map=lambda_flow_map)
        if not eta > 0.0:
            raise ValueError(f"eta, the radius of the trust region, is above 0, not {eta}.")
        if gradient_at not in ("reference", "online"):
            raise ValueError(f"gradient_at is 'reference' or 'online', not {gradient_at!r}.")
        super().__init__(
            policy, env, learning_rate, batch_size, horizon, gamma, tau, distillation, warmup, anneal_end, offline_ranking,
            online_ranking, target_candidates, buffer_size, learning_starts, gradient_steps, seeds, tensorboard_log,
            policy_kwargs, verbose, seed, device,
        )  # fmt: skip
        self.eta, self.beta, self.gradient_at = eta, beta, gradient_at
        self.lambda_diagonal, self.lambda_flow_map = lambda_diagonal, lambda_flow_map
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ the online phase

    def online_actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """L_FMQ + lambda_flow_map L_identity + lambda_diagonal L_diagonal; L_FMQ (Eq. 12) is

            E || u(a_r, r, 1, s) - sg[ u*_{r,1}(a_r | s) ] ||^2,   a_r = (1 - r) a_0 + r a,   r uniform in [0, 1),

        a chunk of the replay memory and a_0 normal.
        """
        observations, actions, valid = batch["observations"], batch["actions"], batch["valid"]
        r = uniform_times(actions)
        x, _ = interpolated(th.randn_like(actions), actions, r)
        u = self.policy.actor(observations, x, r, th.ones_like(r))
        target, u_off, radius = self.target_and_radius(observations, x, r, u.detach())
        guided = masked_mean((u - target).square(), valid)
        loss = guided
        if self.lambda_diagonal or self.lambda_flow_map:
            diagonal, identity = self.flow_map_losses(observations, actions, valid)
            loss = loss + self.lambda_diagonal * diagonal + self.lambda_flow_map * identity
        loss = loss.sum()
        return loss, {
            "actor_loss": loss / self.seeds,
            "guided_loss": guided.mean(),
            "trust_region": (u.detach() - u_off).norm(dim=-1).mean(),
            "trust_region_bound": radius.mean(),
        }

    def target_and_radius(
        self, observations: th.Tensor, x: th.Tensor, r: th.Tensor, u: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """u*_{r,1}, u_off (S, B, A) and the radius (S, B), all constants.

        The gradient is that of the first critic of the ensemble (authors' code), at the clipped action, without the clip's.
        Where it is that of the map in training, the critics' disagreement is still that at the offline one's (authors' code).

        :param u: of the map in training
        """

        def arrival(velocity: th.Tensor) -> th.Tensor:
            return (x + (1.0 - r) * velocity).clamp(-1.0, 1.0)

        at_reference = self.gradient_at == "reference"
        with th.no_grad():
            u_off = self.policy.reference(observations, x, r, th.ones_like(r))
        at = arrival(u_off if at_reference else u).requires_grad_()
        with frozen(self.policy.critics), th.enable_grad():
            first = self.policy.critics(observations, at, members=slice(0, 1))
        (gradient,) = th.autograd.grad(first.sum(), at)
        radius: th.Tensor = first.new_full(first[:, 0].shape, self.eta)
        if self.beta:
            with th.no_grad():
                others = self.policy.critics(observations, arrival(u_off), members=slice(1 if at_reference else 0, None))
            q = th.cat([first.detach(), others], dim=1) if at_reference else others
            radius = adaptive_radius(q, self.eta, self.beta)
        return trust_region_target(u_off, gradient, radius), u_off, radius
