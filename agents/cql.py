"""CQL for treatments, and its guarded and resampled forms: the model-free baselines of OGSRL (arXiv 2505.16242).

DDPG with conservative Q-learning's penalty (Kumar et al. 2020), as appendix G.4 of the paper describes it. The authors'
code has batch normalisation, whose statistics its target networks do not follow; there is none here.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from .common.batched import BatchedMLP, BatchedValues, copy_of, frozen, move_towards, torch_default
from .common.guardian import KernelGuardian
from .common.min_max import MinMax
from .common.offline import Batch, Draw, OfflineAgent
from .common.offline_data import OfflineData
from .common.offline_policy import OfflinePolicy
from .common.ranges import require_at_least

BINS = 5  # of each action, of whose joint modes trajectories are resampled
LEAKY = partial(nn.LeakyReLU, 0.01, inplace=True)


class CQLPolicy(OfflinePolicy):
    """A deterministic actor, one critic, and the averages of both, in units where the data fill [-1, 1].

    :param net_arch: hidden units of each
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        net_arch: tuple[int, ...] = (128, 128),
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, seeds, net_arch=net_arch)
        self.actor = BatchedMLP(seeds, self.obs_dim, net_arch, self.action_dim, LEAKY, torch_default)
        self.critic = BatchedValues(seeds, 1, self.obs_dim + self.action_dim, net_arch, torch_default)
        self.actor_target, self.critic_target = copy_of(self.actor), copy_of(self.critic)

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """The actor's action, (S, B, d)."""
        return self.actor(observations).tanh()


class CQL(OfflineAgent):
    """Conservative Q-learning with a deterministic actor ("CQL"), guarded ("GCQL"), resampled ("CCQL"), and both.

    :param policy: MlpPolicy or a class derived from :class:`CQLPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of both Adams
    :param batch_size: rows per gradient step
    :param gamma: discount
    :param tau: of the averages
    :param conservatism: weight of the penalty
    :param n_candidates: actions at random, and as many around the actor's own, in the penalty's logarithm
    :param candidate_noise: standard deviation of the latter
    :param guarded: bootstrap with ``ood_value`` where (s', pi(s')) lies outside the data, as in the paper. Its code
        punishes the reward of the transition that is in the data instead
    :param ood_value: the value that stands for the paper's "large negative value"; None: as far below the lowest return of
        the data's episodes as that is below the highest. The authors' -25 would be praise where returns are lower
    :param alpha: share of the data that the guardian leaves outside
    :param bandwidth: of its density; None: Scott's factor
    :param resampled: draw episodes so that every joint mode of binned actions is equally frequent, with replacement, and
        keep each at most once, as the paper's code does, so that rare modes are not repeated
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": CQLPolicy}
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "guarded": {"guarded": True},
        "resampled": {"resampled": True},
        "guarded-resampled": {"guarded": True, "resampled": True},
    }
    OPTIMIZERS = ("actor_optimizer", "critic_optimizer")
    policy: CQLPolicy

    def __init__(
        self,
        policy: str | type[CQLPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-4,
        batch_size: int = 32,
        gamma: float = 0.99,
        tau: float = 0.001,
        conservatism: float = 1.0,
        n_candidates: int = 12,
        candidate_noise: float = 0.1,
        guarded: bool = False,
        ood_value: float | None = None,
        alpha: float = 0.05,
        bandwidth: float | None = None,
        resampled: bool = False,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        require_at_least(1, n_candidates=n_candidates)
        require_at_least(0, conservatism=conservatism, candidate_noise=candidate_noise)
        super().__init__(
            policy, env, learning_rate, batch_size, gamma, tau, seeds, tensorboard_log, policy_kwargs, verbose, seed, device
        )
        self.conservatism, self.n_candidates, self.candidate_noise = conservatism, n_candidates, candidate_noise
        self.guarded, self.ood_value, self.alpha, self.bandwidth = guarded, ood_value, alpha, bandwidth
        self.resampled = resampled
        self._guardian: KernelGuardian | None = None
        self._worst = 0.0  # ood_value, once the data are known
        if _init_setup_model:
            self._setup_model()

    def _make_optimizers(self) -> None:
        self.actor_optimizer = self._adam(self.policy.actor.parameters())
        self.critic_optimizer = self._adam(self.policy.critic.parameters())

    def _prepare(self, data: OfflineData) -> Batch:
        """Observations scaled to [-1, 1]; time limits bootstrap."""
        scale = MinMax.of(data.observations)
        self.policy.obs_mean.copy_(scale.middle)
        self.policy.obs_std.copy_(scale.half)
        rows = {
            "observations": self.policy.normalized(data.observations),
            "actions": data.actions,
            "rewards": data.rewards,
            "next_observations": self.policy.normalized(data.next_observations),
            "going_on": 1.0 - data.terminals,
        }
        if self.guarded:
            returns = data.per_episode(data.rewards)
            self._worst = float(2.0 * returns.min() - returns.max()) if self.ood_value is None else self.ood_value
            pairs = th.cat([rows["observations"], rows["actions"]], 1)
            self._guardian = KernelGuardian.fit(pairs, self.alpha, self.bandwidth)
        if not self.resampled:
            return rows
        kept = self.resample(data)[data.episode_of]
        return {name: values[kept] for name, values in rows.items()}

    def resample(self, data: OfflineData) -> th.Tensor:
        """Which episodes are kept, (episodes,) bool: of every joint mode of the binned actions, the mean count is drawn."""
        bins = ((data.actions + 1.0) * (BINS / 2.0)).long().clamp(0, BINS - 1)
        joint = (bins * BINS ** th.arange(bins.shape[1], device=bins.device)).sum(1)
        counts = th.stack([data.per_episode((joint == code).float()) for code in range(BINS ** bins.shape[1])], 1)
        modes = counts.argmax(1)
        classes = modes.unique()
        generator = th.Generator(modes.device).manual_seed(self.seed or 0)  # the same episodes after a resume
        size = max(1, len(modes) // len(classes))
        kept = th.zeros(len(modes), dtype=th.bool, device=modes.device)
        for code in classes:
            members = (modes == code).nonzero().squeeze(1)
            kept[members[th.randint(len(members), (size,), generator=generator, device=members.device)]] = True
        return kept

    # ------------------------------------------------------------------ losses

    def target(self, batch: Batch) -> th.Tensor:
        """y = r + gamma (1 - d) Q'(s', pi'(s')), with the worst value for Q' where the guardian finds (s', pi') outside."""
        following = batch["next_observations"]
        with th.no_grad():
            actions = self.policy.actor_target(following).tanh()
            q = self.policy.critic_target(following, actions)[:, 0]
            if self._guardian is not None:
                pairs = th.cat([following, actions], 2)
                outside = self._guardian.outside(pairs.flatten(0, 1)).view(q.shape)
                q = th.where(outside, self._worst, q)
            return batch["rewards"] + self.gamma * batch["going_on"] * q

    @th.no_grad()
    def candidates(self, observations: th.Tensor) -> th.Tensor:
        """Actions, half of them uniform, half around pi(s): (S, B, o) to (S, B, n, d)."""
        own = self.policy.actor(observations).tanh().unsqueeze(2)
        own = own.repeat(1, 1, self.n_candidates, 1)
        near = (own + self.candidate_noise * th.randn_like(own)).clamp(-1.0, 1.0)
        return th.cat([2.0 * th.rand_like(own) - 1.0, near], 2)

    def penalty(self, observations: th.Tensor, candidates: th.Tensor, q: th.Tensor) -> th.Tensor:
        """log sum_i exp Q(s, a_i) - Q(s, a) over candidates: (S, B).

        :param candidates: a_i, (S, B, n, d)
        :param q: Q(s, a) of the data, (S, B)
        """
        n = candidates.shape[2]
        values = self.policy.critic(observations.repeat_interleave(n, 1), candidates.flatten(1, 2))[:, 0]
        return values.view(*q.shape, n).logsumexp(2) - q

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """E[ (Q(s, a) - y)^2 ] + conservatism E[ penalty ]."""
        q = self.policy.critic(batch["observations"], batch["actions"])[:, 0]
        error, observations = (q - self.target(batch)).square().mean(1), batch["observations"]
        penalty = self.penalty(observations, self.candidates(observations), q).mean(1)
        loss = (error + self.conservatism * penalty).sum()
        return loss, {"critic_loss": loss / self.seeds, "penalty": penalty.mean(), "q": q.mean()}

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """-E[ Q(s, pi(s)) ]."""
        observations = batch["observations"]
        with frozen(self.policy.critic):
            loss = -self.policy.critic(observations, self.policy.actor(observations).tanh()).mean((1, 2)).sum()
        return loss, {"actor_loss": loss / self.seeds}

    # ------------------------------------------------------------------ training

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One step of critic and actor, and the averages."""
        infos = self._descend(
            draw(self.batch_size), (self.critic_optimizer, self.critic_loss), (self.actor_optimizer, self.actor_loss)
        )
        move_towards(self.policy.critic_target, self.policy.critic, self.tau)
        move_towards(self.policy.actor_target, self.policy.actor, self.tau)
        return infos

    def _forget_data(self) -> None:
        super()._forget_data()
        self._guardian = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_guardian"]
