"""BPO against the specification's independent checks (section 8), each with its golden number."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from scipy.optimize import brentq
from scipy.stats import norm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.nn.functional import log_softmax

from tests.kit.rollouts import collected
from tests.kit.worlds import Bandit
from tether.agents import BPO, PPO
from tether.agents.bpo import median_loss, optimal_ratio

PI = th.tensor([0.1, 0.2, 0.3, 0.4], dtype=th.float64)
UNIFORM = th.full((4,), 0.25, dtype=th.float64)
Q = th.tensor([1.0, -1.0, 0.5, 0.0], dtype=th.float64)
EPS, LOW, HIGH = 0.2, 0.8, 1.2


def exact_median(pi, q, lambda_, low=LOW, high=HIGH):
    """mu for which the ratios have mean 1 under pi, found by a bracketing root finder: the code under test has none."""

    def excess(mu):
        return (pi * (optimal_ratio(q - mu, lambda_, low, high) - 1.0)).sum().item()

    return brentq(excess, q.min().item() - 1.0, q.max().item() + 1.0, xtol=1e-15, rtol=1e-14)


# ---------------------------------------------------------------------- 8 a, b, i: the closed form on a bandit


@pytest.mark.parametrize(
    ("lambda_", "mu", "ratios", "gain"),
    [
        (1.0, 0.059353, [1.087692, 0.902973, 1.043365, 0.994066], 0.034679),
        (0.1, 0.102599, [1.199949, 0.800007, 1.192620, 0.905545], 0.088887),
        (0.001, 0.0010986, [1.2, 0.8, 1.2, 0.9], 0.09),
    ],
)
def test_bandit_golden_numbers(lambda_, mu, ratios, gain):
    found = exact_median(PI, Q, lambda_)
    rho = optimal_ratio(Q - found, lambda_, LOW, HIGH)
    assert found == pytest.approx(mu, abs=5e-7)
    assert rho.tolist() == pytest.approx(ratios, abs=1e-6)
    assert (PI * rho).sum().item() == pytest.approx(1.0, abs=1e-12)
    improvement = (PI * rho * (Q - (PI * Q).sum())).sum().item()
    assert improvement == pytest.approx(gain, abs=5e-7)
    centred = Q - found
    assert improvement == pytest.approx(EPS * (PI * centred * th.tanh(centred / (2 * lambda_))).sum().item(), abs=1e-12)
    assert (rho >= LOW).all()
    assert (rho <= HIGH).all()


def test_the_atom_at_the_median_has_its_own_ratio():
    rho = optimal_ratio(Q - exact_median(PI, Q, 0.001), 0.001, LOW, HIGH)
    assert (PI * rho).tolist() == pytest.approx([0.12, 0.16, 0.36, 0.36], abs=1e-9)


@pytest.mark.parametrize(
    ("lambda_", "ratios"), [(0.1, [1.199780, 0.800002, 1.169766, 0.830453]), (0.01, [1.2, 0.8, 1.2, 0.8])]
)
def test_uniform_bandit(lambda_, ratios):
    mu = exact_median(UNIFORM, Q, lambda_)
    assert mu == pytest.approx(0.249610 if lambda_ == 0.1 else 0.25, abs=1e-6)
    assert optimal_ratio(Q - mu, lambda_, LOW, HIGH).tolist() == pytest.approx(ratios, abs=1e-6)


def test_no_feasible_perturbation_improves_the_objective():
    """J = E[rho A - lambda H(rho)] = .135881 at lambda = .1, and less everywhere else on sum pi_0 rho = 1."""

    def objective(rho):
        below, above = rho - 1 + EPS, 1 + EPS - rho
        entropy = below * below.log() + above * above.log()
        return (PI * (rho * (Q - (PI * Q).sum()) - 0.1 * entropy)).sum().item()

    rho = optimal_ratio(Q - exact_median(PI, Q, 0.1), 0.1, LOW, HIGH)
    best = objective(rho)
    assert best == pytest.approx(0.135881, abs=1e-6)
    rng = np.random.default_rng(0)
    tried = 0
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(300):
            step = th.as_tensor(rng.normal(size=4)) * scale
            other = rho + step - (PI * step).sum()
            if ((other > LOW) & (other < HIGH)).all():
                tried += 1
                assert objective(other) < best + 1e-12
    assert tried > 100


def test_g():
    """8 b: g(0) = ln 2, even, g' = tanh(x / 2) / 2; returns 0 (.7) and 1 (.3) have their minimum at .293042."""
    x = th.linspace(-8.0, 8.0, 33, dtype=th.float64, requires_grad=True)
    g = median_loss(x, 1.0, LOW, HIGH)
    assert g[16].item() == pytest.approx(np.log(2.0), abs=1e-15)
    assert (g - g.flip(0)).abs().max() < 1e-12
    (derivative,) = th.autograd.grad(g.sum(), x)
    assert (derivative - th.tanh(x / 2) / 2).abs().max() < 1e-12
    returns = th.tensor([0.0] * 7 + [1.0] * 3, dtype=th.float64)

    def slope(m):
        m = th.tensor(m, dtype=th.float64, requires_grad=True)
        return th.autograd.grad(median_loss(returns - m, 1.0, LOW, HIGH).mean(), m)[0].item()

    m = brentq(slope, 0.0, 1.0, xtol=1e-14)
    assert m == pytest.approx(0.293042, abs=1e-6)
    assert th.tanh((returns - m) / 2).mean().item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.7, 1.5), (0.0, 5.0)])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_median_loss_is_least_where_ratios_have_mean_one(low, high, temperature):
    mu = th.tensor(exact_median(PI, Q, temperature, low, high), dtype=th.float64, requires_grad=True)
    (PI * median_loss(Q - mu, temperature, low, high)).sum().backward()
    assert mu.grad.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("lambda_", "mu", "tolerance"), [(10.0, 0.050099, 2e-3), (100.0, 0.050001, 2e-5)])
def test_large_lambda_is_a_small_gradient_step(lambda_, mu, tolerance):
    """8 i: mu -> V and rho* - 1 -> eps (Q - V) / (2 lambda)."""
    found = exact_median(PI, Q, lambda_)
    assert found == pytest.approx(mu, abs=1e-6)
    step = optimal_ratio(Q - found, lambda_, LOW, HIGH) - 1.0
    linear = EPS * (Q - 0.05) / (2.0 * lambda_)
    assert ((step - linear).abs().max() / linear.abs().max()).item() < tolerance


def test_asymmetric_bounds_refit_the_elites():
    """8 h: c_l = 0, c_h = 5, lambda -> 0: ratio 5 above the .8 quantile of Q, 0 below, mean 1."""
    q = th.as_tensor(np.random.default_rng(0).normal(size=200_000))
    pi = th.full_like(q, 1.0 / len(q))
    mu = exact_median(pi, q, 1e-4, 0.0, 5.0)
    assert mu == pytest.approx(norm.ppf(0.8), abs=0.01)
    rho = optimal_ratio(q - mu, 1e-4, 0.0, 5.0)
    between = ((rho > 0.01) & (rho < 4.99)).double().mean().item()
    assert between < 1e-3
    assert rho.mean().item() == pytest.approx(1.0, abs=1e-6)


# ---------------------------------------------------------------------- 8 g: monotone improvement


class TabularMDP:
    """5 states, 4 actions, gamma .9, everything exact."""

    gamma = 0.9

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.p = rng.dirichlet(np.ones(5), size=(5, 4))
        self.r = rng.normal(size=(5, 4))
        self.d0 = rng.dirichlet(np.ones(5))

    def evaluate(self, pi):
        """Q (5, 4), V (5,), eta and the unnormalised visitation (5,)."""
        p_pi = np.einsum("sa,sat->st", pi, self.p)
        v = np.linalg.solve(np.eye(5) - self.gamma * p_pi, (pi * self.r).sum(1))
        visits = np.linalg.solve(np.eye(5) - self.gamma * p_pi.T, self.d0)
        return self.r + self.gamma * self.p @ v, v, self.d0 @ v, visits

    def improve(self, pi, q, lambda_):
        """rho* and mu, state by state."""
        pi, q = th.as_tensor(pi), th.as_tensor(q)
        mu = np.array([exact_median(pi[s], q[s], lambda_) for s in range(5)])
        return optimal_ratio(q - th.as_tensor(mu)[:, None], lambda_, LOW, HIGH).numpy(), mu


@pytest.mark.parametrize("lambda_", [1.0, 0.1, 0.001])
@pytest.mark.parametrize("seed", range(3))
def test_monotone_improvement(lambda_, seed):
    """eta(pi*) - eta(pi_0) = eps E_{d_pi*, pi_0}[A~ tanh(A~ / (2 lambda))] >= 0, exactly; iterates never get worse."""
    mdp = TabularMDP(seed)
    pi = np.random.default_rng(seed + 100).dirichlet(np.ones(4), size=5)
    for _ in range(15):
        q, _, eta, _ = mdp.evaluate(pi)
        rho, mu = mdp.improve(pi, q, lambda_)
        _, _, new_eta, visits = mdp.evaluate(pi * rho)
        centred = q - mu[:, None]
        gain = EPS * (visits[:, None] * pi * centred * np.tanh(centred / (2 * lambda_))).sum()
        assert new_eta - eta == pytest.approx(gain, abs=1e-10)
        assert new_eta >= eta - 1e-12
        pi = pi * rho


@pytest.mark.parametrize("lambda_", [1.0, 0.1, 0.001])
def test_the_lower_bound_holds_for_any_policy(lambda_):
    """eta(pi) >= eta(pi_0) + eps E_{d_pi}[A~ tanh] - E_{d_pi}[|A| |rho - rho*|] (section 2.3)."""
    rng = np.random.default_rng(7)
    mdp = TabularMDP(0)
    for _ in range(50):
        pi0, pi = rng.dirichlet(np.ones(4), size=5), rng.dirichlet(np.ones(4), size=5)
        q, v, eta0, _ = mdp.evaluate(pi0)
        rho_star, mu = mdp.improve(pi0, q, lambda_)
        _, _, eta, visits = mdp.evaluate(pi)
        centred, weight = q - mu[:, None], visits[:, None] * pi0
        bound = EPS * (weight * centred * np.tanh(centred / (2 * lambda_))).sum()
        bound -= (weight * np.abs(q - v[:, None]) * np.abs(pi / pi0 - rho_star)).sum()
        assert eta >= eta0 + bound - 1e-10


# ---------------------------------------------------------------------- the losses of the agent


@pytest.fixture
def bpo():
    return BPO("MlpPolicy", "Pendulum-v1", n_steps=256, batch_size=256, seed=0)


def test_ppo_is_the_one_sided_half(bpo):
    """8 c: L_PPO(rho) = |A| max(sign(A) (tau - rho), 0) - A tau, tau = 1 + eps sign(A), and L_BPO its two-sided form."""
    ppo = PPO("MlpPolicy", "Pendulum-v1", seed=0)
    rho = th.linspace(0.3, 2.0, 171, dtype=th.float64)
    for a in (1.3, -0.7):
        tau = 1.0 + EPS * np.sign(a)
        for r in rho:
            one = r.reshape(1)
            advantage = th.full_like(one, a)
            clipped = ppo.policy_loss(one, advantage, th.tensor(EPS, dtype=th.float64)).item()
            one_sided = abs(a) * max(np.sign(a) * (tau - r.item()), 0.0)
            assert clipped == pytest.approx(one_sided - a * tau, abs=1e-12)
            ours = bpo.policy_loss(one, th.full_like(one, tau), advantage, th.zeros_like(one)).item()
            assert ours == pytest.approx(abs(a) * abs(r.item() - tau), abs=1e-12)


def gradient(agent, loss):
    grads = th.autograd.grad(loss, agent.policy.optimizer.trained, allow_unused=True)
    return th.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("lambda_", [0.001, 1.0, 100.0])
def test_on_policy_gradient_is_the_policy_gradient(bpo, lambda_):
    """8 d: at rho = 1 without the median, grad L_P = -grad mean(A log pi) with A = R - V, whatever lambda."""
    batch = collected(bpo, 256)
    bpo.lambda_ = lambda_
    returns, values = (batch[key].double() for key in ("returns", "old_values"))
    bounds = {"lowest_ratio": th.tensor(0.7, dtype=th.float64), "highest_ratio": th.tensor(1.3, dtype=th.float64)}
    target = bpo.target_ratio(returns, values, bounds)

    def log_prob():
        return bpo.policy.distribution_at(batch["observations"]).log_prob(batch["actions"]).double()

    ours = gradient(bpo, bpo.policy_loss(th.exp(log_prob() - log_prob().detach()), target, returns, values))
    vanilla = gradient(bpo, -((returns - values) * log_prob()).mean())
    assert (ours - vanilla).abs().max() < 1e-5 * vanilla.abs().max()


def test_with_the_median_sign_and_size_come_from_different_baselines(bpo):
    """8 d: with R between mu and V, the sign is that of R - mu and the size |R - V| (trap 8)."""
    returns, values, medians = th.tensor([1.0]), th.tensor([3.0]), th.tensor([0.0])
    batch = {"lowest_ratio": th.tensor(LOW), "highest_ratio": th.tensor(HIGH)}
    rho = th.ones(1, requires_grad=True)
    target = bpo.target_ratio(returns, medians, batch)
    (slope,) = th.autograd.grad(bpo.policy_loss(rho, target, returns, values), rho)
    assert target.item() == pytest.approx(HIGH)
    assert slope.item() == pytest.approx(-2.0)


@pytest.mark.parametrize(("a", "rho"), [(1.3, 1.4), (-0.7, 0.6)])
def test_overshooting_ratios_are_pulled_back(bpo, a, rho):
    """8 e: beyond the bound PPO's gradient is 0, BPO's is +-|A|: descent brings the ratio back."""
    ppo = PPO("MlpPolicy", "Pendulum-v1", seed=0)
    ratio, advantage = th.tensor([rho], requires_grad=True), th.tensor([a])
    (of_ppo,) = th.autograd.grad(ppo.policy_loss(ratio, advantage, th.tensor(EPS)), ratio)
    assert of_ppo.item() == 0.0
    target = th.tensor([1.0 + EPS * np.sign(a)], dtype=th.float32)
    (ours,) = th.autograd.grad(bpo.policy_loss(ratio, target, advantage, th.zeros(1)), ratio)
    assert ours.item() == pytest.approx(abs(a) * np.sign(rho - target.item()))


def test_each_loss_trains_its_own_head(bpo):
    """8 f: dL_P/dV = dL_P/dmu = 0; dL_mu/dmu = -tanh((R - mu) / 2) / (2 B); dL_V/dV = 2 (V - R) / B."""
    returns = th.randn(8, dtype=th.float64)
    values, medians = (th.randn(8, dtype=th.float64, requires_grad=True) for _ in range(2))
    ratio = th.ones(8, dtype=th.float64, requires_grad=True)
    batch = {"lowest_ratio": th.tensor(LOW, dtype=th.float64), "highest_ratio": th.tensor(HIGH, dtype=th.float64)}
    loss = bpo.policy_loss(ratio, bpo.target_ratio(returns, medians, batch), returns, values)
    grads = th.autograd.grad(loss, (values, medians, ratio), allow_unused=True)
    assert grads[0] is None
    assert grads[1] is None
    assert grads[2].abs().min() > 0.0
    (of_median,) = th.autograd.grad(bpo.median_loss(medians, returns, batch), medians)
    assert of_median.tolist() == pytest.approx((-th.tanh((returns - medians) / 2) / 16).tolist(), abs=1e-12)
    (of_value,) = th.autograd.grad(bpo.value_loss(values, returns), values)
    assert of_value.tolist() == pytest.approx((2 * (values - returns) / 8).tolist(), abs=1e-12)


def test_both_temperatures_of_the_median_loss(bpo):
    """Trap 1: the code's mu at temperature 1 is nearly the mean of small returns, the theory's their median."""
    returns = th.tensor([0.0] * 7 + [1.0] * 3)
    batch = {"lowest_ratio": th.tensor(0.7), "highest_ratio": th.tensor(1.3)}
    found = {}
    for temperature in (1.0, "lambda"):
        bpo.median_temperature = temperature
        grid = th.linspace(-0.2, 1.2, 1401)
        losses = th.stack([bpo.median_loss(m.expand(10), returns, batch) for m in grid])
        found[temperature] = grid[losses.argmin()].item()
    assert found[1.0] == pytest.approx(0.293, abs=2e-3)
    assert found["lambda"] == pytest.approx(0.0, abs=2e-3)


def test_tabular_policy_fits_the_exact_optimum():
    """8 j: L_P with exact expectations, minimised over softmax policies, ends at pi*, loss 0."""
    agent = BPO("MlpPolicy", Bandit(), n_steps=128, batch_size=128, seed=0)
    mu = exact_median(PI, Q, 0.1)
    target, value = optimal_ratio(Q - mu, 0.1, LOW, HIGH), (PI * Q).sum()
    logits = PI.log().clone().requires_grad_()
    optimizer = th.optim.Adam([logits], lr=0.01)
    counts = [0] + [1] * 2 + [2] * 3 + [3] * 4  # frequencies of PI
    for k in range(4000):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - k / 4000) ** 2
        ratio = (log_softmax(logits, 0) - PI.log()).exp()
        loss = agent.policy_loss(ratio[counts], target[counts], Q[counts], value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-4
    assert logits.softmax(0).tolist() == pytest.approx((PI * target).tolist(), abs=1e-4)


def test_interface_of_the_median_head():
    """8 k: the head's gradient reaches the value trunk; one optimiser holds all; returns stay fixed and raw."""
    agent = BPO("MlpPolicy", DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2), n_steps=128, batch_size=64, seed=0)
    batch = collected(agent, 256)
    observations, returns = batch["observations"], batch["returns"].clone()
    _, _, medians = agent.policy.evaluate_with_median_at(observations)
    trunk = list(agent.policy.mlp_extractor.value_net.parameters())
    grads = th.autograd.grad(agent.median_loss(medians, batch["returns"], batch), trunk)
    assert all(g.abs().max() > 0.0 for g in grads)
    assert {id(p) for p in agent.policy.optimizer.trained} == {id(p) for p in agent.policy.parameters()}
    agent.update.run(batch, 3)
    assert th.equal(batch["returns"], returns)
    assert returns.abs().max() > 5.0, "returns are on the scale of the rewards"


def test_median_head_is_the_authors():
    """On the value latent, hidden sizes of the policy, every layer orthogonal with gain 1."""
    kwargs = {"net_arch": {"pi": [32, 16], "vf": [24]}}
    policy = BPO("MlpPolicy", "Pendulum-v1", seed=0, policy_kwargs=kwargs).policy
    weights = [layer.weight for layer in policy.median_net if hasattr(layer, "weight")]
    assert [tuple(w.shape) for w in weights] == [(32, 24), (16, 32), (1, 16)]
    for w in weights:
        assert th.linalg.svdvals(w.detach()).tolist() == pytest.approx([1.0] * min(w.shape), abs=1e-5)


def test_without_the_median_its_head_stays_put():
    agent = BPO("MlpPolicy", "Pendulum-v1", n_steps=128, use_median=False, seed=0)
    before = [p.clone() for p in agent.policy.median_net.parameters()]
    agent.learn(256)
    assert all(th.equal(a, b) for a, b in zip(before, agent.policy.median_net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"lambda_": 0.0}, "lambda_ is a temperature"),
        ({"lambda_": -1.0}, "lambda_ is a temperature"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"clip_range": 1.5}, "clip_range"),
        ({"ratio_bounds": (1.1, 1.5)}, "straddle 1"),
        ({"ratio_bounds": (0.5, 0.9)}, "straddle 1"),
        ({"ratio_bounds": (-0.1, 2.0)}, "straddle 1"),
        ({"median_temperature": "mean"}, "median_temperature"),
        ({"n_steps": 100, "batch_size": 64}, r"batch_size=64 does not divide .* = 100 \* 1 = 100 samples"),
        ({"n_epochs": 0}, "n_epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"use_sde": True}, "gSDE"),
    ],
)
def test_bad_arguments_are_refused_in_words(kwargs, words):
    with pytest.raises(ValueError, match=words):
        BPO("MlpPolicy", "CartPole-v1", **kwargs)


def test_normalised_rewards_are_warned_of_once():
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    with pytest.warns(UserWarning, match="no longer in units of the env's return") as caught:
        BPO("MlpPolicy", env, n_steps=128, seed=0).learn(256)
    assert sum("units of the env's return" in str(w.message) for w in caught) == 1


def test_asymmetric_bounds_hold_in_training():
    agent = BPO("MlpPolicy", "Pendulum-v1", n_steps=256, ratio_bounds=(0.5, 3.0), seed=0).learn(512, log_interval=None)
    logged = agent.logger.name_to_value
    assert (logged["train/lowest_ratio"], logged["train/highest_ratio"]) == (0.5, 3.0)
    assert 0.0 < logged["train/trust_region"] < logged["train/trust_region_bound"] == 2.0


@pytest.mark.parametrize("schedule", [LinearSchedule(0.3, 0.0, 1.0), lambda progress: 0.3 * progress - 0.1])
def test_a_clip_schedule_may_end_at_zero(schedule):
    """The last update has no room left, and must leave the weights finite."""
    agent = BPO("MlpPolicy", "CartPole-v1", n_steps=128, clip_range=schedule, seed=0).learn(256)
    assert all(th.isfinite(p).all() for p in agent.policy.parameters())


def test_a_net_arch_without_policy_layers():
    BPO("MlpPolicy", "CartPole-v1", n_steps=128, policy_kwargs={"net_arch": {"vf": [8]}}, seed=0).learn(128)
