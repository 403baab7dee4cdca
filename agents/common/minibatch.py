"""What PPO's relatives have in common: epochs of shuffled minibatches on one loss, with one optimiser."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch as th

from .on_policy import OnPolicyAgent
from .updates import Batch, Update


class MinibatchAgent(OnPolicyAgent):
    """An on-policy agent that trains policy and value together; it adds :meth:`loss` and :meth:`trust_region`.

    :param n_steps: steps per environment and iteration
    :param batch_size: samples a gradient step; must divide ``n_steps * n_envs``; None: an eighth of these
    :param n_epochs: passes over the rollout
    :param kwargs: the other arguments of :class:`OnPolicyAgent`
    """

    update: Update

    def __init__(self, policy: Any, env: Any, *, batch_size: int | None, n_epochs: int, **kwargs: Any) -> None:
        if batch_size is not None and batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (advantages are normalised by their spread), not {batch_size}.")
        if n_epochs < 1:
            raise ValueError(f"n_epochs must be at least 1, not {n_epochs}.")
        self.batch_size, self.n_epochs = batch_size, n_epochs
        super().__init__(policy, env, **kwargs)

    def _setup_model(self) -> None:
        samples = self.n_steps * self.n_envs
        size = self.minibatch_size()
        if self.env is not None and (samples % size or size < samples // 16 or size < 2) and self.batch_size is None:
            raise ValueError(
                f"The rollout of n_steps * n_envs = {self.n_steps} * {self.n_envs} = {samples} samples has no divisor near "
                "an eighth of it: give a batch_size, or an n_steps that 8 divides."
            )
        if self.env is not None and samples % size:
            raise ValueError(
                f"batch_size={size} does not divide the rollout of n_steps * n_envs = {self.n_steps} * "
                f"{self.n_envs} = {samples} samples: choose a divisor, so that every sample is used as often."
            )
        super()._setup_model()
        optimizer = self.policy.optimizer
        self.update = Update(
            self.loss, optimizer, size, self.max_grad_norm, self.policy, self.compile_loss, self.gradient_groups()
        )

    def minibatch_size(self) -> int:
        """Samples of a gradient step."""
        samples = self.n_steps * self.n_envs
        return self.batch_size or max((n for n in range(2, samples // 8 + 1) if samples % n == 0), default=1)

    def samples_per_step(self) -> int:
        """The minibatch."""
        return self.minibatch_size()

    def gradient_groups(self) -> dict[str, list[th.nn.Parameter]]:
        """Parameters whose gradients' norms are logged by name, beside the norm of all."""
        return {}

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """The scalar to minimise on a minibatch of :meth:`_rollout_batch` and :meth:`schedules`, and its named terms."""

    def schedules(self) -> dict[str, float]:
        """Scalars of the loss at this point of the training; they join the batch and the log."""
        return {}

    @abstractmethod
    def trust_region(self, ratio: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Size of the step, from the ratios pi / pi_old of the whole rollout (N,), and what bounds it."""

    def violations(self, ratio: th.Tensor) -> dict[str, th.Tensor]:
        """Further scalars for the log that say how often the ratios (N,) left the trust region."""
        return {}

    def after_epoch(self, batch: Batch, info: dict[str, th.Tensor]) -> bool:
        """Called after every epoch with the whole rollout and the epoch's means; True ends the update."""
        return False

    def after_update(self, measured: dict[str, th.Tensor]) -> None:
        """Called with what :meth:`measure` found when the epochs are done."""

    def train(self) -> None:
        """``n_epochs`` passes over the rollout."""
        self._update_learning_rate(self.policy.optimizer)
        schedules = {key: th.tensor(value, device=self.device) for key, value in self.schedules().items()}
        batch = self._rollout_batch() | schedules  # in evaluation mode, as it was collected
        self.policy.set_training_mode(True)

        def after_epoch(means: dict[str, th.Tensor]) -> bool:
            self._n_updates += 1
            return self.after_epoch(batch, means)

        info = self.update.run(batch, self.n_epochs, after_epoch)
        measured = self.measure(batch)
        self.after_update(measured)
        self._record_update(info | measured | schedules, batch)

    def measure(self, batch: Batch) -> dict[str, th.Tensor]:
        """:meth:`divergence`, in evaluation mode, as the rollout was collected."""
        training = self.policy.training
        self.policy.set_training_mode(False)
        measured = self.divergence(batch)
        self.policy.set_training_mode(training)
        return measured

    @th.no_grad()
    def divergence(self, batch: Batch) -> dict[str, th.Tensor]:
        """How far the policy is from the one that collected the rollout, over all its samples.

        approx_kl = mean(ratio - 1 - log ratio) estimates KL(old || new) without bias (as SB3 logs it).
        """
        log_prob, entropy = self._evaluate(batch["observations"], batch["actions"])
        log_ratio = log_prob - batch["old_log_prob"]
        ratio = log_ratio.exp()
        size, bound = self.trust_region(ratio)
        return {
            "approx_kl": (ratio - 1.0 - log_ratio).mean(),
            "entropy_loss": -entropy.mean(),
            "trust_region": size,
            "trust_region_bound": bound,
            **self.violations(ratio),
        }
