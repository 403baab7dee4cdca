"""Behaviour cloning, and cloning of safe episodes only: what every offline method has to beat."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from .common.batched import BatchedActor
from .common.offline import Batch, Draw, OfflineAgent
from .common.offline_data import DataError, OfflineData
from .common.offline_policy import OfflinePolicy


class BCPolicy(OfflinePolicy):
    """A deterministic actor, o - 256 - 256 - d, ReLU, tanh.

    :param net_arch: hidden units
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        net_arch: tuple[int, ...] = (256, 256),
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, seeds, net_arch=net_arch)
        self.actor = BatchedActor(seeds, self.obs_dim, self.action_dim, net_arch)

    def act(self, observations: th.Tensor, deterministic: bool) -> th.Tensor:
        """The actor's action, (S, B, d)."""
        return self.actor(observations)


class BC(OfflineAgent):
    """Behaviour cloning: E[ (pi(s) - a)^2 ], mean over batch and dimensions. Defaults as in OSRL's baseline.

    :param policy: MlpPolicy or a class derived from :class:`BCPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of Adam
    :param batch_size: rows per gradient step
    :param cost_limit: clone only episodes whose cost is at most this ("BC-Safe"); None: all
    :param normalize: standardise observations with the dataset's mean and standard deviation; OSRL does not
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": BCPolicy}
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {"safe": {"cost_limit": 10.0}}
    OPTIMIZERS = ("actor_optimizer",)
    policy: BCPolicy

    def __init__(
        self,
        policy: str | type[BCPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-3,
        batch_size: int = 512,
        cost_limit: float | None = None,
        normalize: bool = False,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy, env, learning_rate, batch_size, 0.0, 1.0, seeds, tensorboard_log, policy_kwargs, verbose, seed, device
        )
        self.cost_limit, self.normalize = cost_limit, normalize
        if _init_setup_model:
            self._setup_model()

    def _make_optimizers(self) -> None:
        self.actor_optimizer = self._adam(self.policy.actor.parameters())

    def _prepare(self, data: OfflineData) -> Batch:
        """The rows to clone: all, or those of episodes within the cost limit."""
        if self.normalize:
            self.policy.standardize(data.observations)
        rows = {"observations": self.policy.normalized(data.observations), "actions": data.actions}
        if self.cost_limit is None:
            return rows
        if data.costs is None:
            raise DataError("The dataset has no 'costs', by which safe episodes are chosen: leave cost_limit=None.")
        safe = data.per_episode(data.costs) <= self.cost_limit
        if not bool(safe.any()):
            raise DataError(f"No episode's cost is at most {self.cost_limit}: raise cost_limit, or mix in safe episodes.")
        chosen = safe[data.episode_of]
        return {name: values[chosen] for name, values in rows.items()}

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """E[ (pi(s) - a)^2 ]."""
        loss = (self.policy.actor(batch["observations"]) - batch["actions"]).square().mean((1, 2)).sum()
        return loss, {"actor_loss": loss / self.seeds}

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One step of the actor."""
        batch = draw(self.batch_size)
        loss, info = self.actor_loss(batch)
        self._step(self.actor_optimizer, loss, info, batch)
        return info
