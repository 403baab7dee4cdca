"""Flow behaviour cloning: a flow that imitates the data's chunks, and no values: what the others' actors start from."""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from .common.chunk_policy import ChunkPolicy, with_horizon
from .common.chunks import chunks_of
from .common.flow import FlowNetwork, euler_flow, flow_matching_loss
from .common.offline import Batch, Draw, OfflineAgent
from .common.offline_data import OfflineData
from .common.ranges import require_at_least


class FlowBCPolicy(ChunkPolicy):
    """A flow's velocity.

    :param net_arch: hidden units
    :param fourier: the time is read as Fourier features
    :param flow_steps: of Euler's method
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        seeds: int = 1,
        horizon: int = 5,
        net_arch: tuple[int, ...] = (512, 512, 512, 512),
        fourier: bool = False,
        flow_steps: int = 10,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, seeds, horizon, net_arch=net_arch, fourier=fourier,
            flow_steps=flow_steps,
        )  # fmt: skip
        require_at_least(1, flow_steps=flow_steps)
        self.flow_steps = flow_steps
        self.flow = FlowNetwork(seeds, self.obs_dim, self.chunk_dim, net_arch, 1, fourier)

    def chunk(self, observations: th.Tensor) -> th.Tensor:
        """Euler's method along the velocity, from one sample of noise."""
        seeds, size, _ = observations.shape
        self.count_calls(self.flow_steps * seeds * size)
        noise = th.randn(seeds, size, self.chunk_dim, device=observations.device)
        return euler_flow(self.flow, observations, noise, self.flow_steps)


class FlowBC(OfflineAgent):
    """Flow behaviour cloning with action chunks.

    :param policy: MlpPolicy or a class derived from :class:`FlowBCPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of Adam
    :param batch_size: chunks per gradient step
    :param horizon: H, actions of a chunk
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": FlowBCPolicy}
    OPTIMIZERS = ("actor_optimizer",)
    policy: FlowBCPolicy

    def __init__(
        self,
        policy: str | type[FlowBCPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        horizon: int = 5,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        require_at_least(1, horizon=horizon)
        super().__init__(
            policy, env, learning_rate, batch_size, 0.0, 1.0, seeds, tensorboard_log, with_horizon(policy_kwargs, horizon),
            verbose, seed, device,
        )  # fmt: skip
        self.horizon = horizon
        if _init_setup_model:
            self._setup_model()

    def _make_optimizers(self) -> None:
        self.actor_optimizer = self._adam(self.policy.flow.parameters())

    def _prepare(self, data: OfflineData) -> Batch:
        """The chunks of a dataset."""
        chunks = chunks_of(data, self.horizon, self.gamma)
        return {name: chunks[name] for name in ("observations", "actions", "valid")}

    def flow_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """E || v(a_t, t, s) - (a_1 - a_0) ||^2 on the valid actions of a chunk."""
        loss = flow_matching_loss(self.policy.flow, batch["observations"], batch["actions"], batch["valid"]).sum()
        return loss, {"actor_loss": loss / self.seeds}

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One step of the flow."""
        return self._descend(draw(self.batch_size), (self.actor_optimizer, self.flow_loss))
