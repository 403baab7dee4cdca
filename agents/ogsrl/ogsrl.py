"""OGSRL: offline guarded safe RL for treatment (Yan et al., NeurIPS 2025, arXiv 2505.16242).

Constrained policy optimisation in a world made of the data alone, where staying within the data is a constraint beside
those of safety (section 4):
    max_pi V_r(rho_0)   subject to   V_{c_j}(rho_0) <= cbar_j,   V_ghat(rho_0) <= cbar_g,
with ghat(s, a) = 1 where the guardian finds (s, a) outside the data.

The authors' released code differs, so that its constraint never binds: its violation is always -cbar, and costs have the
wrong sign. Followed is the paper. What only the code says (network sizes, step sizes, the penalty of ``absorb``) is taken
from it, but not its faults: transitions read from shifted rows, advantages that leak between episodes, standardised value
targets, a world and a guardian made of validation and test data too. ``absorb`` is its idea on these repaired parts, with
the constraints of ``constraint`` but the guardian's. "GMB-TRPO" has the guardian as its one constraint here; there it is
``absorb`` without costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from ..common.advantages import generalized_advantage
from ..common.conjugate_gradient import conjugate_gradient
from ..common.constrained_step import constrained_step
from ..common.finite import NonFiniteError
from ..common.min_max import MinMax
from ..common.offline import Batch, Draw, OfflineAgent
from ..common.offline_data import DataError, OfflineData
from ..common.ranges import require_at_least
from .policy import OGSRLPolicy
from .rollout import Rollout, Steps, by_seed
from .world import World

BACKTRACK, HALVINGS = 0.8, 30
METHODS = ("dual", "lagrangian")
MODES = ("constraint", "absorb")
GUARDIANS = ("kernel", "polynomial")
DYNAMICS = ("nearest", "density")


class OGSRL(OfflineAgent):
    """Guarded, model-based, constrained policy optimisation (the paper's GMB-CPO) and what it is compared with.

    A gradient step of :meth:`learn_offline` is one iteration: ``n_episodes`` imagined episodes, one step of the policy,
    ``value_steps`` steps of the values. The dataset is the training set: scaler, guardian and world are made of it alone.

    :param policy: MlpPolicy or a class derived from :class:`OGSRLPolicy`
    :param env: gives the spaces; None takes them from the dataset
    :param learning_rate: of the values' Adam
    :param n_episodes: imagined episodes of an iteration, from states in which recorded episodes begin
    :param horizon: their steps, at most
    :param gamma: discount, of the constraints too
    :param gae_lambda: of the advantages
    :param kl: bound of a policy step, in KL(old || new), mean over steps
    :param damping: added to the Fisher matrix. The authors' is 1, which makes steps far shorter than ``kl`` allows
    :param cg_iterations: of conjugate gradients
    :param fisher_steps: imagined steps that the Fisher matrix is a mean over, at most; they are spread over the episodes
    :param value_steps: of Adam. The authors take two passes; values that lag behind cost the constraints most
    :param value_batch_size: imagined steps of each
    :param constrained: whether the dataset's costs are constraints ("CPO"); else they are not looked at ("TRPO")
    :param cost_limits: cbar of the discounted cost of an episode: one number for all, or one for each column of ``costs``;
        None: what the data's own episodes cost
    :param guarded: whether leaving the data is a constraint ("G")
    :param ood_limit: cbar_g, of the discounted number of steps outside; None: ``alpha`` of the data's own steps
    :param tightening: share of every limit that is kept as a margin: the paper's theorems ask for one that covers the errors
        of model and estimate, and imagined costs are means over few episodes
    :param mode: ``constraint`` is the paper's. In ``absorb``, as in the released code, an episode that leaves the data
        stays where it is, and each step from there on has the reward -25 and the cost 1
    :param method: ``dual`` solves for the step under all constraints; ``lagrangian`` takes a step of TRPO on reward and
        costs weighted with multipliers nu <- clip(nu + eta (J_C - cbar), 0, nu_max)
    :param multiplier_rate: eta
    :param multiplier_max: nu_max
    :param guardian: ``kernel`` density, or the theory's ``polynomial`` sublevel set
    :param alpha: share of the data that the guardian leaves outside
    :param bandwidth: of the kernel densities; None: Scott's factor, as in the paper, which is wide (:class:`KernelGuardian`)
    :param degree: of the polynomial's monomials
    :param dynamics: ``nearest`` recorded transition, or one drawn by kernel ``density``, the theory's, which long episodes
        exploit less
    :param seeds: agents side by side
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 silent, 1 info, 2 debug
    :param seed: of everything random
    :param device: "auto" is the GPU where there is one
    :param _init_setup_model: build the networks at once
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": OGSRLPolicy}
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "absorb": {"mode": "absorb"},
        "gmb-trpo": {"constrained": False},
        "mb-cpo": {"guarded": False},
        "mb-trpo": {"guarded": False, "constrained": False},
    }
    OPTIMIZERS = ("value_optimizer",)
    policy: OGSRLPolicy

    def __init__(
        self,
        policy: str | type[OGSRLPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-3,
        n_episodes: int = 32,
        horizon: int = 20,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        kl: float = 0.01,
        damping: float = 0.1,
        cg_iterations: int = 10,
        fisher_steps: int = 512,
        value_steps: int = 10,
        value_batch_size: int = 256,
        constrained: bool = True,
        cost_limits: float | Sequence[float] | None = None,
        guarded: bool = True,
        ood_limit: float | None = None,
        tightening: float = 0.0,
        mode: str = "constraint",
        method: str = "dual",
        multiplier_rate: float = 0.1,
        multiplier_max: float = 100.0,
        guardian: str = "kernel",
        alpha: float = 0.05,
        bandwidth: float | None = None,
        degree: int = 2,
        dynamics: str = "nearest",
        seeds: int = 1,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        require_at_least(1, n_episodes=n_episodes, horizon=horizon, cg_iterations=cg_iterations, fisher_steps=fisher_steps)
        require_at_least(1, value_steps=value_steps, value_batch_size=value_batch_size, degree=degree)
        require_at_least(0, damping=damping, multiplier_rate=multiplier_rate, multiplier_max=multiplier_max)
        for name, value, known in (
            ("mode", mode, MODES), ("method", method, METHODS), ("guardian", guardian, GUARDIANS),
            ("dynamics", dynamics, DYNAMICS),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}.")
        if not 0.0 <= tightening < 1.0:
            raise ValueError(f"tightening lies in [0, 1), not {tightening}.")
        if not kl > 0.0 or not 0.0 < alpha < 1.0 or not 0.0 <= gae_lambda <= 1.0:
            raise ValueError(f"kl is above 0, alpha in (0, 1), gae_lambda in [0, 1], not {kl}, {alpha} and {gae_lambda}.")
        super().__init__(
            policy, env, learning_rate, n_episodes * horizon, gamma, 1.0, seeds, tensorboard_log, policy_kwargs, verbose,
            seed, device,
        )  # fmt: skip
        self.n_episodes, self.horizon, self.gae_lambda = n_episodes, horizon, gae_lambda
        self.kl, self.damping, self.cg_iterations, self.fisher_steps = kl, damping, cg_iterations, fisher_steps
        self.value_steps, self.value_batch_size = value_steps, value_batch_size
        self.constrained, self.cost_limits, self.guarded, self.ood_limit = constrained, cost_limits, guarded, ood_limit
        self.tightening, self.mode, self.method = tightening, mode, method
        self.multiplier_rate, self.multiplier_max = multiplier_rate, multiplier_max
        self.guardian, self.alpha, self.bandwidth, self.degree = guardian, alpha, bandwidth, degree
        self.dynamics = dynamics
        self.constraint_names = self._with_guardian(["cost"] if constrained else [])  # until there is a dataset
        self._world: World | None = None
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Build the networks, with a value for each constraint."""
        self.policy_kwargs = {**self.policy_kwargs, "constraints": len(self.constraint_names)}
        super()._setup_model()

    def _make_optimizers(self) -> None:
        self.value_optimizer = self._adam(self.policy.values.parameters())

    # ------------------------------------------------------------------ the data

    def _take_data(self, data: OfflineData) -> None:
        """As the engine's; an agent that has not learnt yet takes the dataset's constraints over."""
        before, names = self.constraint_names, self._constraints_of(data)
        if names != before and self._n_updates:
            raise DataError(f"The dataset's constraints are {names}, and the agent's {before}.")
        self._take_constraints(names)
        try:
            super()._take_data(data)
        except ValueError:
            self._take_constraints(before)
            raise

    def _take_constraints(self, names: list[str]) -> None:
        """Build the networks anew for other constraints, where there are any networks."""
        if names != self.constraint_names:
            self.constraint_names = names
            if hasattr(self, "policy"):
                self._setup_model()

    def _constraints_of(self, data: OfflineData) -> list[str]:
        """Names of the constraints, in the order of the signals after the reward."""
        names: list[str] = []
        if self.constrained:
            if data.cost_columns is None:
                raise DataError("The dataset has no 'costs' to constrain: give some, or take constrained=False.")
            count = data.cost_columns.shape[1]
            names += data.meta.get("cost_names") or (["cost"] if count == 1 else [f"cost_{j}" for j in range(count)])
            if len(names) != count:
                raise DataError(f"meta['cost_names'] has {len(names)} names and 'costs' {count} columns: name each column.")
        return self._with_guardian(list(map(str, names)))

    def _with_guardian(self, names: list[str]) -> list[str]:
        return [*names, "ood"] if self._guard_is_constraint else names

    @property
    def _guard_is_constraint(self) -> bool:
        return self.guarded and self.mode == "constraint"

    def _prepare(self, data: OfflineData) -> Batch:
        """The world, and the states in which its episodes begin."""
        pairs = th.cat([data.observations, data.actions], 1)
        scale, split = MinMax.of(pairs), data.observations.shape[1]
        limits, world = self._limits_of(data), World(self, data, pairs, scale)  # which may refuse the data
        self._limits, self._world = limits, world
        self.policy.obs_mean.copy_(scale.middle[:split])
        self.policy.obs_std.copy_(scale.half[:split])
        self.policy.action_middle.copy_(scale.middle[split:])
        self.policy.action_half.copy_(scale.half[split:])
        begins = data.ends.roll(1)
        return {"observations": self.policy.normalized(data.observations[begins])}

    def _limits_of(self, data: OfflineData) -> th.Tensor:
        """cbar of every constraint, (m,), tightened: as given, or what the data's own episodes have within the horizon."""
        steps = data.step_of
        weight = th.where(steps < self.horizon, self.gamma ** steps.double(), 0.0)

        def mean(values: th.Tensor) -> float:
            return float(data.per_episode(values.double() * weight).mean())

        limits: list[float] = []
        if self.constrained:
            assert data.cost_columns is not None
            count = data.cost_columns.shape[1]
            if self.cost_limits is None:
                limits = [mean(column) for column in data.cost_columns.T]
            elif isinstance(self.cost_limits, Sequence):
                limits = list(map(float, self.cost_limits))
            else:
                limits = [float(self.cost_limits)] * count
            if len(limits) != count:
                raise DataError(f"cost_limits has {len(limits)} numbers and 'costs' {count} columns: give one a column.")
        if self._guard_is_constraint:
            limits.append(self.alpha * mean(th.ones_like(steps)) if self.ood_limit is None else self.ood_limit)
        return th.tensor(limits, dtype=th.float32, device=self.device) * (1.0 - self.tightening)

    # ------------------------------------------------------------------ imagination

    @th.no_grad()
    def imagine(self, starts: th.Tensor) -> Rollout:
        """Episodes of the policy in the world; what comes after an episode's end is not alive and has no signal.

        :param starts: (S, E, o), scaled
        """
        assert self._world is not None
        observations, actions, signals, alive, ends = [starts], list[th.Tensor](), [], [], []
        going = th.ones(starts.shape[:2], dtype=th.bool, device=starts.device)
        frozen = th.zeros_like(going)
        for _ in range(self.horizon):
            state = observations[-1]
            mean, log_std = self.policy.actor(state)
            action = mean + log_std.exp() * th.randn_like(mean)
            if self.mode == "absorb" and actions:
                action = th.where(frozen.unsqueeze(2), actions[-1], action)
            following, values, outside, end = self._world.step(state, action, going)
            if self.mode == "absorb":
                frozen = frozen | outside
                following = th.where(frozen.unsqueeze(2), state, following)
                values = th.where(frozen.unsqueeze(2), self._world.frozen, values)
                end = end & ~frozen
            observations.append(following)
            actions.append(action)
            signals.append(values)
            alive.append(going)
            ends.append(end)
            going = going & ~end
        return Rollout(*map(th.stack, (observations, actions, signals, alive, ends)))

    def advantages(self, rollout: Rollout) -> tuple[th.Tensor, th.Tensor]:
        """GAE of every signal, and A + V, what its value should have been: (T, S, E, K) each.

        An end gives no bootstrap, the horizon bootstraps with the value of the state reached, though J ends there: values
        do not know the time. Episodes frozen by ``absorb`` bootstrap too.
        """
        steps, seeds, episodes, count = rollout.signals.shape
        with th.no_grad():
            values = self.policy.value(by_seed(rollout.observations))
        values = values.view(seeds, count, steps + 1, episodes).permute(2, 0, 3, 1)
        ends = rollout.ends.unsqueeze(3).expand_as(rollout.signals)
        found = generalized_advantage(
            rollout.signals.flatten(1), values.flatten(1), ends.flatten(1), self.gamma, self.gae_lambda
        ).view_as(rollout.signals)
        return found, found + values[:-1]

    def expected(self, rollout: Rollout) -> th.Tensor:
        """J of every signal, mean over episodes of sum_t gamma^t signal_t: (S, K)."""
        return (rollout.signals * self._discounts(rollout)).sum(0).mean(1)

    def _discounts(self, rollout: Rollout) -> th.Tensor:
        """gamma^t, (T, 1, 1, 1)."""
        steps = th.arange(len(rollout.signals), device=self.device, dtype=th.float32)
        return (self.gamma**steps)[:, None, None, None]

    # ------------------------------------------------------------------ the policy's step

    def surrogate_weights(self, rollout: Rollout, advantages: th.Tensor) -> th.Tensor:
        """What ratios are multiplied with to give the K surrogates, (T, S, E, K).

        Of the loss, -E_steps[ ratio A_r ] with A_r standardised over steps; of constraint j, in the unit of its J,
        1/E sum_{e, t} gamma^t ratio A_j.
        """
        alive = rollout.alive.unsqueeze(3)
        count = alive.sum((0, 2), keepdim=True)
        mean = (advantages * alive).sum((0, 2), keepdim=True) / count
        spread = (((advantages - mean) * alive).square().sum((0, 2), keepdim=True) / count).sqrt()
        loss = -((advantages - mean) / (spread + 1e-8) / count)[..., :1]
        others = advantages[..., 1:] * self._discounts(rollout) / self.n_episodes
        return th.cat([loss, others], 3) * alive

    def alive_steps(self, rollout: Rollout) -> Steps:
        """What the policy's and the values' steps are computed on."""
        advantages, returns = self.advantages(rollout)
        alive = by_seed(rollout.alive.unsqueeze(3)).squeeze(2)
        order = alive.byte().argsort(stable=True, dim=1, descending=True)[:, : int(alive.sum(1).max())]

        def chosen(values: th.Tensor) -> th.Tensor:
            return by_seed(values).take_along_dim(order.unsqueeze(2), 1)

        weights, count = self.surrogate_weights(rollout, advantages), alive.sum(1, keepdim=True)
        return Steps(
            chosen(rollout.observations[:-1]), chosen(rollout.actions), chosen(weights).mT, chosen(returns).mT,
            alive.take_along_dim(order, 1) / count,
        )  # fmt: skip

    def improve(self, steps: Steps, excess: th.Tensor) -> dict[str, th.Tensor]:
        """One step of the policy under the constraints, found on a line from the solution of the linearised problem.

        :param excess: c = J_C - cbar, (S, m)
        """
        actor, (observations, actions, weights, _, alive) = self.policy.actor, steps
        with th.no_grad():
            before = actor.log_prob(observations, actions)
            mean, log_std = (part.clone() for part in actor(observations))

        def surrogates() -> th.Tensor:
            ratio = (actor.log_prob(observations, actions) - before).exp()
            return (weights * ratio.unsqueeze(1)).sum(2)

        at_first = surrogates()
        parameters = list(actor.parameters())
        rows = [th.autograd.grad(of.sum(), parameters, retain_graph=True) for of in at_first.unbind(1)]
        gradients = th.stack(list(map(actor.flat, rows)))
        if not bool(gradients.isfinite().all()):
            raise NonFiniteError("The gradient of the policy", "look at the dataset's rewards and costs", self.num_timesteps)
        every = -(-observations.shape[1] // self.fisher_steps)
        some = alive[:, ::every]
        fisher = actor.fisher_product(observations[:, ::every], some / some.sum(1, keepdim=True))
        step, objective, recovers = self._solve(lambda v: fisher(v) + self.damping * v, gradients, excess)

        # On the way back to a violated constraint the objective may have to get worse.
        coming_back = recovers | (excess > 0.0).any(1) if self.method == "dual" else recovers

        @th.no_grad()
        def accepts() -> tuple[th.Tensor, th.Tensor]:
            change = surrogates() - at_first.detach()
            divergence = (actor.kl_from(mean, log_std, observations) * alive).sum(1)
            better = ((change * objective).sum(1) < 0.0) | coming_back
            safe = th.ones_like(better)
            if self.method == "dual":
                safe = (excess + change[:, 1:] <= excess.clamp(min=0.0)).all(1)
            return better & safe & (divergence <= self.kl), divergence

        accepted, divergence = self._backtrack(step, accepts)
        return {
            "trust_region": divergence.mean(), "trust_region_bound": th.tensor(self.kl, device=self.device),
            "accepted": accepted.float().mean(), "recovery": recovers.float().mean(),
        }  # fmt: skip

    @th.no_grad()
    def _solve(self, product: Any, gradients: th.Tensor, excess: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The step (S, P), the weights of the surrogates in what has to fall (S, K), and whether it recovers (S,)."""
        weights = th.zeros(self.seeds, len(gradients), device=self.device)
        weights[:, 0] = 1.0
        if self.method == "lagrangian":
            rise = th.where(excess.isfinite(), self.multiplier_rate * excess, -self.multiplier_max)  # no limit: down to 0
            nu = self.policy.nu.add_(rise).clamp_(0.0, self.multiplier_max)
            weights[:, 1:] = nu
            # A multiplier of 0 leaves the gradient as it is, also where the limit is infinite.
            combined = gradients[0] + th.where(nu.T.unsqueeze(2) > 0.0, nu.T.unsqueeze(2) * gradients[1:], 0.0).sum(0)
            solved = conjugate_gradient(product, combined.unsqueeze(0), self.cg_iterations)[0]
            length = (combined * solved).sum(1, keepdim=True).clamp(min=1e-20)
            return -solved * (2.0 * self.kl / length).sqrt(), weights, th.zeros_like(weights[:, 0], dtype=th.bool)
        solved = conjugate_gradient(product, gradients, self.cg_iterations)
        gram = th.einsum("ksp,lsp->skl", gradients.double(), solved.double())
        problems = zip(((gram + gram.mT) / 2.0).cpu().numpy(), excess.double().cpu().numpy(), strict=True)
        steps = [constrained_step(m[0, 0], m[0, 1:], m[1:, 1:], c, self.kl) for m, c in problems]
        along = np.array([[step.along_g, *step.along_b] for step in steps])
        self.policy.nu.copy_(th.from_numpy(np.array([step.nu for step in steps])))
        recovers = th.tensor([not step.feasible for step in steps], device=self.device)
        coefficients = th.from_numpy(along).to(self.device, th.float32)
        return -th.einsum("sk,ksp->sp", coefficients, solved), weights, recovers

    @th.no_grad()
    def _backtrack(self, step: th.Tensor, accepts: Any) -> tuple[th.Tensor, th.Tensor]:
        """Take the first of 0.8^i times the step that is accepted, each seed its own; none: stay.

        :return: whether one was, (S,), and KL(old || new), (S,)
        """
        actor, before = self.policy.actor, self.policy.actor.flat().clone()
        accepted = th.zeros(self.seeds, dtype=th.bool, device=self.device)
        chosen, divergence = before.clone(), th.zeros(self.seeds, device=self.device)
        for i in range(HALVINGS):
            candidate = before + BACKTRACK**i * step
            actor.assign(th.where(accepted.unsqueeze(1), chosen, candidate))
            good, of = accepts()
            new = good & ~accepted
            chosen = th.where(new.unsqueeze(1), candidate, chosen)
            divergence, accepted = th.where(new, of, divergence), accepted | good
            if bool(accepted.all()):
                break
        actor.assign(chosen)
        return accepted, divergence

    # ------------------------------------------------------------------ the values, and all of it

    def value_loss(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """sum_k E[ (V_k(s) - (A_k + V_k)_old)^2 ], mean over some of the imagined steps."""
        loss = (self.policy.value(batch["observations"]) - batch["returns"]).square().mean(2).sum()
        return loss, {"value_loss": loss / self.seeds}

    def _some_steps(self, steps: Steps) -> Batch:
        """``value_batch_size`` steps for each seed, of those that are alive, which come first."""
        count = (steps.alive > 0.0).sum(1, keepdim=True)
        rows = (th.rand(self.seeds, self.value_batch_size, device=self.device) * count).long()
        return {
            "observations": steps.observations.take_along_dim(rows.unsqueeze(2), 1),
            "returns": steps.returns.take_along_dim(rows.unsqueeze(1), 2),
        }

    def update(self, draw: Draw, number: int) -> dict[str, th.Tensor]:
        """One iteration."""
        rollout = self.imagine(draw(self.n_episodes)["observations"])
        steps = self.alive_steps(rollout)
        infos = self.improve(steps, self.expected(rollout)[:, 1:] - self._limits)
        for _ in range(self.value_steps):
            infos |= self._descend(self._some_steps(steps), (self.value_optimizer, self.value_loss))
        return infos | self._told(rollout)

    @th.no_grad()
    def _told(self, rollout: Rollout) -> dict[str, th.Tensor]:
        """What the log says of the imagined episodes and the constraints."""
        expected = self.expected(rollout).mean(0)
        told = {"imagined/return": expected[0], "imagined/length": rollout.alive.float().sum(0).mean()}
        for j, name in enumerate(self.constraint_names):
            told[f"imagined/{name}"] = expected[1 + j]
            told |= {f"limit/{name}": self._limits[j]} if np.isfinite(float(self._limits[j])) else {}
            told[f"nu/{name}"] = self.policy.nu[:, j].mean()
        return told | {"std": self.policy.actor.log_std.exp().mean()}

    @property
    def _updates_per_call(self) -> int:
        return 1  # the step's dual is solved on the host

    def _forget_data(self) -> None:
        super()._forget_data()
        self._world = None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_world", "_limits"]
