"""FISOR: feasibility-guided safe offline reinforcement learning (Zheng et al., ICLR 2024, arXiv 2401.10700).

With h > 0 where a constraint is violated, the agent learns from data alone
    V_h(s) = min_pi max_t h(s_t), whose sign tells the feasible states, by reversed expectile regression,
    V(s), the reward value, by expectile regression (IQL),
and a diffusion policy by regression on the data's actions with a weight: the better for the reward where the state is
feasible and the action keeps it so, the safer where it is not.

Formulas, constants and the order of updates are those of the authors' code (their paper's appendix was not read).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from .common.batched import (
    BatchedLayerNorm,
    BatchedLinear,
    BatchedMLP,
    BatchedValues,
    copy_of,
    exceeds_cache,
    lecun_normal,
    move_towards,
    one_by_one,
    xavier_uniform,
)
from .common.diffusion import Diffusion
from .common.expectile import expectile_loss, reversed_expectile_loss
from .common.mish import Mish, mish
from .common.offline import Batch, Draw, OfflineAgent
from .common.offline_data import OfflineData, reward_scale
from .common.offline_policy import OfflinePolicy
from .common.ranges import require_at_least

ACTION_EDGE = 1e-5  # the data's actions are clipped to 1 - this


# ---------------------------------------------------------------------- the paper's equations


def feasible_target(h: th.Tensor, next_value: th.Tensor, going_on: th.Tensor, gamma: float) -> th.Tensor:
    """The feasible Bellman operator, (1 - gamma) h + gamma max(h, V_h(s')); h itself where the episode ends.

    All tensors of one shape; ``going_on`` is 1 - d.
    """
    backup = (1.0 - gamma) * h + gamma * th.maximum(h, next_value)
    return going_on * backup + (1.0 - going_on) * h


def policy_weight(
    advantage: th.Tensor,
    q_h: th.Tensor,
    v_h: th.Tensor,
    alpha: tuple[float, float] = (3.0, 5.0),
    caps: tuple[float, float] = (100.0, 150.0),
    floor: float = 0.0,
) -> th.Tensor:
    """The weight of a data action, all of one shape:

        min(exp(alpha_1 A_r), cap_1) 1[Q_h <= 0]     where V_h <= 0: feasible,
        clip(exp(-alpha_2 (Q_h - V_h)), floor, cap_2)  where V_h > 0.

    :param advantage: A_r = Q - V
    :param floor: 0 in the authors' main branch, 1 in their MetaDrive branch
    """
    reward = (alpha[0] * advantage).exp().clamp(max=caps[0]) * (q_h <= 0.0)
    safety = (alpha[1] * (v_h - q_h)).exp().clamp(floor, caps[1])
    return th.where(v_h <= 0.0, reward, safety)


# ---------------------------------------------------------------------- networks


class ResidualBlock(nn.Module):
    """x + Dense_h(mish(Dense_4h(LayerNorm(Dropout(x))))), (S, B, h) to the same; Flax's initialisers."""

    def __init__(self, seeds: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = BatchedLayerNorm(seeds, width)
        self.wide = BatchedLinear(seeds, width, 4 * width, lecun_normal)
        self.narrow = BatchedLinear(seeds, 4 * width, width, lecun_normal)

    def forward(self, x: th.Tensor) -> th.Tensor:
        dropped = self.dropout(x) if self.training else x  # a call less for every action
        return x + self.narrow(mish(self.wide(self.norm(dropped))))


class NoiseNetwork(nn.Module):
    """eps_theta(s, a_k, k), S of them side by side: the authors' "ln_resnet" with learnt Fourier features of k.

    The time index takes T values only, so that its features, their network and their part of the first layer are
    computed once for each of them; a one-hot k then picks its row inside the first product.

    :param steps: T of the diffusion
    :param width: of the residual stream
    :param n_blocks: residual blocks
    :param dropout: before each block's layer norm
    """

    indices: th.Tensor
    one_hot: th.Tensor

    def __init__(
        self, seeds: int, obs_dim: int, action_dim: int, steps: int, width: int, n_blocks: int, dropout: float
    ) -> None:
        super().__init__()
        self.steps, self.inputs, self.width = steps, action_dim + obs_dim, width
        self.fourier = nn.Parameter(0.2 * th.randn(seeds, 1, 32))
        self.time = BatchedMLP(seeds, 64, (128,), 128, Mish, xavier_uniform)
        self.first = BatchedLinear(seeds, self.inputs + 128, width, xavier_uniform)
        self.blocks = nn.Sequential(*(ResidualBlock(seeds, width, dropout) for _ in range(n_blocks)))
        self.last = BatchedLinear(seeds, width, action_dim, xavier_uniform)
        self.register_buffer("indices", th.arange(steps, dtype=th.float32).view(1, steps, 1), persistent=False)
        self.register_buffer("one_hot", th.eye(steps), persistent=False)

    def forward(self, observations: th.Tensor, noisy: th.Tensor, k: th.Tensor) -> th.Tensor:
        """(S, B, o), (S, B, d) and indices (S, B) to the predicted noise (S, B, d)."""
        x = th.cat([noisy, observations, self.one_hot[k]], dim=-1)
        weight = th.cat([self.first.weight[:, : self.inputs], self.time_table()], dim=1)
        return self.after_first(th.baddbmm(self.first.bias, x, weight))

    def time_table(self) -> th.Tensor:
        """What each k adds to the first layer, (S, T, width)."""
        phase = 2.0 * math.pi * self.indices * self.fourier
        features = th.cat([phase.cos(), phase.sin()], dim=-1)
        return self.time(features) @ self.first.weight[:, self.inputs :]

    def after_first(self, x: th.Tensor) -> th.Tensor:
        """The rest of the network, (S, B, width) to (S, B, d)."""
        return self.last(mish(self.blocks(x)))


class FISORPolicy(OfflinePolicy):
    """The noise network and its average, which acts; the critics, their averages, and the values.

    ``critics`` gives Q^1, Q^2, Q_h^1, Q_h^2, and ``values`` V, V_h, for each seed.

    :param net_arch: hidden units of critics and values
    :param width: of the noise network
    :param n_blocks: of the noise network
    :param dropout: of the noise network, in training
    :param diffusion_steps: T
    :param n_candidates: N, actions among which the safest is taken
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        net_arch: tuple[int, ...] = (256, 256),
        width: int = 256,
        n_blocks: int = 3,
        dropout: float = 0.1,
        diffusion_steps: int = 5,
        n_candidates: int = 16,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, seeds, net_arch=net_arch, width=width, n_blocks=n_blocks,
            dropout=dropout, diffusion_steps=diffusion_steps, n_candidates=n_candidates,
        )  # fmt: skip
        require_at_least(1, n_blocks=n_blocks, diffusion_steps=diffusion_steps, n_candidates=n_candidates)
        self.n_candidates = n_candidates
        self.diffusion = Diffusion(diffusion_steps)
        noise = (seeds, self.obs_dim, self.action_dim, diffusion_steps, width, n_blocks, dropout)
        pair = self.obs_dim + self.action_dim
        self.noise = NoiseNetwork(*noise)
        self.noise_average = copy_of(self.noise)
        self.critics = BatchedValues(seeds, 4, pair, net_arch, xavier_uniform)
        self.critics_target = copy_of(self.critics)
        self.values = BatchedValues(seeds, 2, self.obs_dim, net_arch, xavier_uniform)

    def predicted_noise(self, observations: th.Tensor, noisy: th.Tensor, k: th.Tensor) -> th.Tensor:
        """Of the network in training, see :class:`NoiseNetwork`."""
        if exceeds_cache(observations, self.noise.width):
            return one_by_one(self.noise, observations, noisy, k)
        return self.noise(observations, noisy, k)

    def reward_and_feasibility(self, observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Q = min of the target critics and Q_h = max of theirs, (S, B) each."""
        q = self.critics_target(observations, actions)
        return q[:, :2].amin(1), q[:, 2:].amax(1)

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """The safest of N samples, argmin Q_h; ``deterministic`` changes nothing, for the policy is its samples."""
        seeds, size, _ = observations.shape
        repeated = observations.repeat_interleave(self.n_candidates, 1)
        candidates = self.sample(repeated)
        q_h = self.reward_and_feasibility(repeated, candidates)[1].view(seeds, size, self.n_candidates)
        chosen = q_h.argmin(-1)[..., None, None].expand(-1, -1, 1, self.action_dim)
        return candidates.view(seeds, size, self.n_candidates, -1).gather(2, chosen).squeeze(2)

    def sample(self, observations: th.Tensor) -> th.Tensor:
        """One action of the averaged network for each row, (S, B, d)."""
        network = self.noise_average
        table, inputs = network.time_table(), network.inputs - self.obs_dim
        of_state = th.baddbmm(network.first.bias, observations, network.first.weight[:, inputs : network.inputs])

        def eps(x: th.Tensor, k: int) -> th.Tensor:
            of_index = of_state + table[:, k : k + 1]
            return network.after_first(th.baddbmm(of_index, x, network.first.weight[:, :inputs]))

        return self.diffusion.sample(eps, th.randn(*observations.shape[:2], self.action_dim, device=observations.device))


# ---------------------------------------------------------------------- the agent


class FISOR(OfflineAgent):
    """Feasibility-guided safe offline RL with a diffusion policy.

    The safety condition is one of every state, not of an episode's sum, and no cost limit enters the training.

    :param policy: MlpPolicy or a class derived from :class:`FISORPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of the values' and critics' Adam, and of the policy's at its start
    :param batch_size: rows for the policy, in ``policy_steps`` parts
    :param critic_batch_size: rows for values and critics, the first of the same sample
    :param policy_steps: steps of the policy per gradient step
    :param gamma: discount of reward and feasibility values
    :param tau: of the critics' average
    :param policy_tau: of the policy's average, which acts
    :param expectile: tau of the reward value
    :param cost_expectile: tau of the feasibility value's reversed expectile
    :param reward_temperature: alpha_1
    :param cost_temperature: alpha_2
    :param reward_weight_cap: largest weight of a feasible row
    :param cost_weight_cap: largest weight of an infeasible row
    :param weight_floor: smallest weight of an infeasible row: 0, or 1 as in the authors' MetaDrive branch
    :param cost_scale: M: h = M where the cost is above 0, else -1; not used where the data has constraint values
    :param reward_scale: what rewards are multiplied by; None: T_max / (R_max - R_min) of the dataset's ``meta``, or of its
        own episodes
    :param timeouts_terminal: no bootstrap at time limits, as in the authors' code; False: they bootstrap
    :param decay_steps: policy steps after which the cosine schedule of its learning rate is 0; None: it is constant
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    :raises ValueError: for an argument outside its range, in one sentence
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": FISORPolicy}
    OPTIMIZERS = ("policy_optimizer", "value_optimizer", "critic_optimizer")
    policy: FISORPolicy

    def __init__(
        self,
        policy: str | type[FISORPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 2048,
        critic_batch_size: int = 256,
        policy_steps: int = 2,
        gamma: float = 0.99,
        tau: float = 0.005,
        policy_tau: float = 0.001,
        expectile: float = 0.9,
        cost_expectile: float = 0.9,
        reward_temperature: float = 3.0,
        cost_temperature: float = 5.0,
        reward_weight_cap: float = 100.0,
        cost_weight_cap: float = 150.0,
        weight_floor: float = 0.0,
        cost_scale: float = 25.0,
        reward_scale: float | None = None,
        timeouts_terminal: bool = True,
        decay_steps: int | None = 3_000_000,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        for name, tau_ in (("expectile", expectile), ("cost_expectile", cost_expectile)):
            if not 0.5 <= tau_ < 1.0:
                raise ValueError(f"{name} lies in [0.5, 1), where 0.5 is the mean, not {tau_}.")
        if not 0.0 < policy_tau <= 1.0 or not cost_scale > 0.0:
            raise ValueError(f"policy_tau lies in (0, 1] and cost_scale above 0, not {policy_tau} and {cost_scale}.")
        if not 0.0 <= weight_floor <= cost_weight_cap or not reward_weight_cap > 0.0:
            raise ValueError("The weights' caps are above 0, and weight_floor lies between 0 and cost_weight_cap.")
        if decay_steps is not None:
            require_at_least(1, decay_steps=decay_steps)
        if policy_steps < 1 or batch_size % policy_steps:
            raise ValueError(f"batch_size must be a multiple of policy_steps, not {batch_size} for {policy_steps}.")
        if not 1 <= critic_batch_size <= batch_size:
            raise ValueError(f"critic_batch_size is part of batch_size, not {critic_batch_size} of {batch_size}.")
        super().__init__(
            policy, env, learning_rate, batch_size, gamma, tau, seeds, tensorboard_log, policy_kwargs, verbose, seed, device
        )
        self.critic_batch_size, self.policy_steps, self.policy_tau = critic_batch_size, policy_steps, policy_tau
        self.expectile, self.cost_expectile = expectile, cost_expectile
        self.reward_temperature, self.cost_temperature = reward_temperature, cost_temperature
        self.reward_weight_cap, self.cost_weight_cap, self.weight_floor = reward_weight_cap, cost_weight_cap, weight_floor
        self.cost_scale, self.reward_scale, self.timeouts_terminal = cost_scale, reward_scale, timeouts_terminal
        self.decay_steps = decay_steps
        if _init_setup_model:
            self._setup_model()

    def _make_optimizers(self) -> None:
        self.policy_optimizer = self._adam(self.policy.noise.parameters())
        self.value_optimizer = self._adam(self.policy.values.parameters())
        self.critic_optimizer = self._adam(self.policy.critics.parameters())

    # ------------------------------------------------------------------ the data

    def _prepare(self, data: OfflineData) -> Batch:
        """Rewards scaled, costs as h, the mask 1 - d."""
        scale = reward_scale(data) if self.reward_scale is None else self.reward_scale
        ended = data.terminals + data.timeouts if self.timeouts_terminal else data.terminals
        return {
            "observations": data.observations,
            "actions": data.actions.clamp(ACTION_EDGE - 1.0, 1.0 - ACTION_EDGE),
            "rewards": data.rewards * scale,
            "next_observations": data.next_observations,
            "h": self.constraint(data),
            "going_on": (ended == 0.0).float(),
        }

    def constraint(self, data: OfflineData) -> th.Tensor:
        """h (N,), above 0 where the constraint is violated: the data's own, or M where the cost is above 0 and -1 elsewhere.

        It belongs to the transition: the cost of the step that the action led to.

        :raises ValueError: if there are no costs, or rows of one kind only
        """
        if data.constraint_values is not None:
            data.refuse_one_class("constraint_values", data.constraint_values > 0.0)
            return data.constraint_values
        return th.where(data.safe_costs() > 0.0, self.cost_scale, -1.0)

    # ------------------------------------------------------------------ losses

    def value_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """E[ L_tau(Q - V) ] + E[ Lrev_tau(Q_h - V_h) ]: two networks that share nothing, in one step.

        Q and Q_h are those of the target critics, their minimum and their maximum.
        """
        with th.no_grad():
            q, q_h = self.policy.reward_and_feasibility(batch["observations"], batch["actions"])
        v, v_h = self.policy.values(batch["observations"]).unbind(1)
        reward = expectile_loss(q - v, self.expectile).mean(1).sum()
        safety = reversed_expectile_loss(q_h - v_h, self.cost_expectile).mean(1).sum()
        losses = {"value_loss": reward / self.seeds, "feasibility_loss": safety / self.seeds}
        means = {"value": v.mean(), "feasibility": v_h.mean(), "feasible": (v_h <= 0.0).float().mean()}
        return reward + safety, {**losses, **means}

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """E[ (Q^i - y)^2 ] + E[ (Q_h^i - y_h)^2 ], means over both twins and the batch.

        y = r + gamma (1 - d) V(s') and y_h is :func:`feasible_target`, with the values just updated.
        """
        with th.no_grad():
            v, v_h = self.policy.values(batch["next_observations"]).unbind(1)
            y = batch["rewards"] + self.gamma * batch["going_on"] * v
            y_h = feasible_target(batch["h"], v_h, batch["going_on"], self.gamma)
        q = self.policy.critics(batch["observations"], batch["actions"])
        reward = (q[:, :2] - y.unsqueeze(1)).square().mean((1, 2)).sum()
        safety = (q[:, 2:] - y_h.unsqueeze(1)).square().mean((1, 2)).sum()
        return reward + safety, {"critic_loss": reward / self.seeds, "feasibility_critic_loss": safety / self.seeds}

    @th.no_grad()
    def policy_weights(self, batch: Batch) -> th.Tensor:
        """:func:`policy_weight` of the data's actions, (S, B): target critics, online values."""
        q, q_h = self.policy.reward_and_feasibility(batch["observations"], batch["actions"])
        v, v_h = self.policy.values(batch["observations"]).unbind(1)
        alpha, caps = (self.reward_temperature, self.cost_temperature), (self.reward_weight_cap, self.cost_weight_cap)
        return policy_weight(q - v, q_h, v_h, alpha, caps, self.weight_floor)

    def policy_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """E[ w sum_dim (eps_theta(s, a_k, k) - eps)^2 ] with one k and one eps per row.

        :param batch: with ``weights``, w (S, B)
        """
        actions = batch["actions"]
        k = th.randint(self.policy.diffusion.steps, actions.shape[:2], device=actions.device)
        noise = th.randn_like(actions)
        predicted = self.policy.predicted_noise(batch["observations"], self.policy.diffusion.noised(actions, k, noise), k)
        loss = (batch["weights"] * (predicted - noise).square().sum(-1)).mean(1).sum()
        return loss, {"policy_loss": loss / self.seeds, "weight": batch["weights"].mean()}

    # ------------------------------------------------------------------ training

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """The policy on the parts of a batch, with the former critics; then values, critics and averages on its beginning."""
        policy, batch = self.policy, draw(self.batch_size)
        batch["weights"] = self.policy_weights(batch)
        size = self.batch_size // self.policy_steps
        for first in range(0, self.batch_size, size):
            part = {name: values[:, first : first + size] for name, values in batch.items()}
            loss, policy_info = self.policy_loss(part)
            self._step(self.policy_optimizer, loss, policy_info, part)
            move_towards(policy.noise_average, policy.noise, self.policy_tau)
        part = {name: values[:, : self.critic_batch_size] for name, values in batch.items()}
        loss, value_info = self.value_loss(part)
        self._step(self.value_optimizer, loss, value_info, part)
        loss, critic_info = self.critic_loss(part)
        self._step(self.critic_optimizer, loss, critic_info, part)
        move_towards(policy.critics_target, policy.critics, self.tau)
        return {**policy_info, **value_info, **critic_info}

    def _set_rates(self) -> None:
        """The policy's rate follows its cosine from call to call; the authors' from step to step."""
        super()._set_rates()
        if self.decay_steps is not None:
            done = min(1.0, self._n_updates * self.policy_steps / self.decay_steps)
            rate = self.lr_schedule(self._current_progress_remaining) * 0.5 * (1.0 + math.cos(math.pi * done))
            utils.update_learning_rate(self.policy_optimizer, rate)
