"""PRDC: policy regularization with dataset constraint (Ran et al., ICML 2023, arXiv 2306.06569).

TD3 whose actor is pulled to the action of the nearest (state, action) pair of the whole dataset,
    d_D(s, a) = min_i || (beta s, a) - (beta s_i, a_i) ||,
instead of, as in TD3+BC, to the action that was stored with the sampled state.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from .common.neighbours import NearestNeighbour
from .common.offline import Batch
from .common.offline_data import OfflineData
from .td3_bc import TD3BC, TD3BCPolicy


class PRDC(TD3BC):
    """Policy regularization with dataset constraint, for the nearest pair (k = 1).

    The paper writes the regulariser as the distance; the authors' code regresses on the nearest pair's action alone,
    which is followed: up to the square and a factor the gradient is the same. No gradient passes through the search.

    :param policy: MlpPolicy or a class derived from :class:`TD3BCPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of both Adams
    :param batch_size: rows per gradient step
    :param gamma: discount
    :param tau: of the averages
    :param alpha: weight of the normalised Q; 2.5 for hopper and walker2d, 40 for halfcheetah, 7.5 for antmaze
    :param beta: weight of the (standardised) state in the distance; infinite is TD3+BC, 0 the nearest action anywhere
    :param policy_noise: standard deviation of the target action's noise
    :param noise_clip: bound of that noise
    :param policy_delay: critic steps per step of the actor and the averages
    :param normalize: standardise observations, in the search too
    :param reward_scale: what rewards are multiplied by; 10,000 for antmaze
    :param reward_shift: added to rewards; -1 for antmaze
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": TD3BCPolicy}

    def __init__(
        self,
        policy: str | type[TD3BCPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        gamma: float = 0.99,
        tau: float = 0.005,
        alpha: float = 2.5,
        beta: float = 2.0,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_delay: int = 2,
        normalize: bool = True,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if not 0.0 <= beta < float("inf"):
            raise ValueError(f"beta is 0 or a positive number, not {beta}; TD3BC is the limit of a large one.")
        super().__init__(
            policy, env, learning_rate, batch_size, gamma, tau, alpha, policy_noise, noise_clip, policy_delay, normalize,
            reward_scale, reward_shift, seeds, tensorboard_log, policy_kwargs, verbose, seed, device, False,
        )  # fmt: skip
        self.beta = beta
        self._neighbour: NearestNeighbour | None = None
        if _init_setup_model:
            self._setup_model()

    def _prepare(self, data: OfflineData) -> Batch:
        """As TD3+BC, and the search structure of the dataset's pairs."""
        rows = super()._prepare(data)
        self._actions = rows["actions"]
        self._neighbour = NearestNeighbour(th.cat([self.beta * rows["observations"], rows["actions"]], 1))
        return rows

    def anchor(self, batch: Batch, actions: th.Tensor) -> th.Tensor:
        """The action of the nearest pair to (s, pi(s)), (S, B, d)."""
        assert self._neighbour is not None
        keys = th.cat([self.beta * batch["observations"], actions], -1).flatten(0, 1)
        return self._actions[self._neighbour(keys)].view_as(actions)

    def _forget_data(self) -> None:
        super()._forget_data()
        self._neighbour, self._actions = None, th.empty(0)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_neighbour", "_actions"]
