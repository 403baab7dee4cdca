"""GIRL against the specification's independent checks (section 13), on the real world model."""

import copy
import hashlib
import math
import resource
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import VecNormalize
from torch.nn import functional as F

from tests.kit.worlds import Bandit, Identity
from tether.agents import GIRL, NonFiniteError
from tether.agents.common.value_distributions import TwoHot
from tether.agents.girl.behaviour import Actor, ReturnScale
from tether.agents.girl.drift import Drift, Episode, measure_drift
from tether.agents.girl.ensemble import Ensemble
from tether.agents.girl.grounding import Grounding, shifted
from tether.agents.girl.imagination import actor_loss, imagine, lambda_returns, weights_of
from tether.agents.girl.latents import CategoricalLatent, GaussianLatent
from tether.agents.girl.masked_autoencoder import WINDOW, MaskedStateAutoencoder
from tether.agents.girl.networks import Decoder, parts_of
from tether.agents.girl.normalized import scaled
from tether.agents.girl.replay import SequenceReplay
from tether.agents.girl.trust_region import TrustRegion

SMALL = {
    "batch_size": 4, "batch_length": 8, "horizon": 3, "train_ratio": 4.0, "learning_starts": 60, "pretrain_updates": 2,
    "buffer_size": 2000, "encoder_updates": 20, "warmup_steps": 120, "radius_interval": 5, "seed": 0, "device": "cpu",
    "policy_kwargs": {
        "size": "small", "deter": 16, "hidden": 16, "variables": 4, "classes": 4, "units": 16, "encoder_layers": 1,
        "encoder_units": 16, "ensemble_units": 16,
    },
}  # fmt: skip
ARM = {"grounding": None, "trust_region": False, "ensemble_members": 0}


def make(env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    return GIRL(policy, env, **{**SMALL, **kwargs})


@pytest.fixture(scope="module")
def trained():
    """A small agent past its warm starts."""
    return make().learn(400)


def one_hot_logits(index, classes=32, variables=1):
    logits = th.full((variables, classes), -1e9)
    logits[:, index] = 0.0
    return logits.flatten()


def gaussian(mean, std, n):
    return th.stack((th.full((n,), float(mean)), th.full((n,), float(std))))


# ---------------------------------------------------------------------- distributions (1, 2)


def test_categorical_golden_numbers():
    latent = CategoricalLatent(1, 32)
    p, q = latent.describe(one_hot_logits(3)), latent.describe(one_hot_logits(7))
    assert p.exp().max().item() == pytest.approx(0.9903125, abs=1e-7)
    assert p.exp().min().item() == pytest.approx(0.0003125, abs=1e-9)
    assert latent.kl(p, q).item() == pytest.approx(7.98056, abs=1e-5)
    assert latent.kl(p, latent.describe(th.zeros(32))).item() == pytest.approx(3.37791, abs=1e-5)
    assert latent.entropy(p).item() == pytest.approx(0.08783, abs=1e-5)
    whole = CategoricalLatent(32, 32)
    of_all = [whole.describe(one_hot_logits(i, variables=32)) for i in (3, 7)]
    assert whole.kl(*of_all).item() == pytest.approx(255.378, abs=1e-3)


def test_categorical_samples_have_the_probabilities_and_their_gradient():
    latent = CategoricalLatent(2, 3)
    raw = th.tensor([0.0, 1.0, 2.0, 1.0, 0.0, -1.0], requires_grad=True)
    p = latent.describe(raw)
    noise = latent.noise(50_000, device=th.device("cpu"))
    samples = latent.sample(p.expand(50_000, -1, -1), noise)
    assert th.allclose(samples.mean(0).view(2, 3), p.exp(), atol=0.01)
    one = latent.sample(p, noise[0])
    assert sorted(one.detach().tolist()) == pytest.approx([0, 0, 0, 0, 1, 1], abs=1e-6)
    weights = th.arange(6.0)
    through = th.autograd.grad((one * weights).sum(), raw)[0]
    exact = th.autograd.grad((latent.describe(raw).exp().flatten() * weights).sum(), raw)[0]
    assert th.allclose(through, exact, atol=1e-6)
    edge = latent.sample(p, th.full((2, 1), 1.0))  # rounding may leave the cumulated probabilities below 1
    assert edge.view(2, 3).sum(-1).tolist() == pytest.approx([1.0, 1.0])


def test_gaussian_golden_numbers():
    latent = GaussianLatent(30)
    kl = latent.kl(gaussian(0, 1, 30), gaussian(1, 1, 30))
    assert kl.item() == pytest.approx(15.0)
    assert latent.kl(gaussian(0, 2, 1), gaussian(1, 3, 1)).item() == pytest.approx(
        th.distributions.kl_divergence(th.distributions.Normal(0.0, 2.0), th.distributions.Normal(1.0, 3.0)).item()
    )
    assert latent.describe(th.zeros(60))[1].tolist() == pytest.approx([1.1] * 30)
    agent = make(**ARM, policy_kwargs={**SMALL["policy_kwargs"], "latent": "gaussian", "variables": 30})
    loss, info = agent.kl_loss(gaussian(0, 1, 30), gaussian(1, 1, 30))
    assert (loss.item(), info["trust_region"].item()) == (pytest.approx(9.0), pytest.approx(15.0))


def test_kl_halves_and_free_nats():
    """The halves send gradient to the prior alone and to the posterior alone; below the free nats there is none."""
    agent = make(**ARM, policy_kwargs={**SMALL["policy_kwargs"], "latent": "gaussian", "variables": 1})
    for mean, value in ((math.sqrt(0.6), 0.6), (2.0, 0.6 * 2.0)):  # KL 0.3 and 2
        q, p = gaussian(mean, 1, 1).requires_grad_(), gaussian(0, 1, 1).requires_grad_()
        loss, info = agent.kl_loss(q, p)
        assert loss.item() == pytest.approx(value)
        to_q, to_p = th.autograd.grad(loss, (q, p))
        free = info["trust_region"].item() < 1.0
        assert to_q[0].item() == pytest.approx(0.0 if free else 0.1 * mean)
        assert to_p[0].item() == pytest.approx(0.0 if free else -0.5 * mean)


# ---------------------------------------------------------------------- behaviour (3)


def test_lambda_returns_golden_numbers():
    ones, discounts = th.ones(4), th.full((4,), 0.99)
    assert lambda_returns(ones, discounts, th.zeros(4), 0.95).tolist() == pytest.approx([2.82504025, 1.9405, 1.0], abs=1e-6)
    twos = th.full((4,), 2.0)
    assert lambda_returns(ones, discounts, twos, 0.95).tolist() == pytest.approx([4.768539, 3.90169, 2.98], abs=1e-5)
    changed = th.tensor([7.0, 1.0, 1.0, 1.0])  # what belongs to the start state does not count
    assert th.equal(lambda_returns(changed, discounts, changed, 0.95), lambda_returns(ones, discounts, ones, 0.95))
    assert weights_of(th.tensor([0.9, 0.5, 0.2, 0.1])).tolist() == pytest.approx([1.0, 0.9, 0.45])


def test_return_scale_is_the_moving_quantile():
    scale, returns = ReturnScale(decay=0.0), 30.0 * th.randn(15, 41)
    scale.update(returns)
    assert th.allclose(scale.percentiles, th.quantile(returns.flatten(), th.tensor([0.05, 0.95])))
    scale = ReturnScale()
    scale.update(100.0 * returns)
    spread = (returns.quantile(0.95) - returns.quantile(0.05)).item()
    assert scale.scale.item() == pytest.approx(spread, rel=1e-5)  # a hundredth of a hundred times that
    assert ReturnScale().scale.item() == 1.0
    before = scale.percentiles.clone()
    scale.update(th.tensor([1.0, math.nan, 2.0]))
    assert th.allclose(scale.percentiles[1], before[1])  # the 95th was nan


def test_two_hot_log_prob_is_that_of_its_two_bins():
    bins, outputs = TwoHot(255, -20.0, 20.0), th.randn(7, 5, 255)
    targets = th.cat((th.tensor([[-30.0, -20.0, 20.0, 30.0, 0.0]]), 8.0 * th.randn(6, 5)))
    place = (targets.clamp(-20.0, 20.0) + 20.0) / bins.width
    below = place.floor().clamp(max=253)
    low, high = outputs.log_softmax(-1).gather(-1, th.stack((below, below + 1), -1).long()).unbind(-1)
    assert th.allclose(bins.log_prob(outputs, targets), low.lerp(high, place - below), atol=1e-4)


def test_actor_scales_back_what_leaves_the_box():
    actor = Actor(4, 2, 1, 8, discrete=False)
    description = actor.describe(th.randn(5, 4))
    assert description[:, 1].min() >= 0.1
    assert description[:, 1].max() <= 1.0
    assert actor.sample(description, th.full((5, 2), 50.0)).max().item() == pytest.approx(1.0)
    normal = th.distributions.Normal(*description.unbind(-2))
    assert th.allclose(actor.entropy(description), normal.entropy().sum(-1))


def test_behaviour_has_no_gradient_for_the_model_and_each_part_only_its_own(trained):
    agent = copy.deepcopy(trained)
    batch = agent._draw()
    with th.no_grad():
        starts = agent.starts(agent.observe(batch))
    for p in agent.policy.parameters():
        p.grad = None
    actor_loss, critic_loss, _ = agent.behaviour_losses(starts)
    actor_loss.backward(retain_graph=True)
    assert all(p.grad is None for p in agent.policy.critic.parameters())
    before = [p.grad.clone() for p in agent.policy.actor.parameters()]
    critic_loss.backward()
    assert all(p.grad is not None for p in agent.policy.critic.parameters())
    assert all(th.equal(a, p.grad) for a, p in zip(before, agent.policy.actor.parameters(), strict=True))
    agent.policy.zero_grad()
    behaviour = ("actor", "critic", "slow")
    model = {name: p.clone() for name, p in agent.policy.named_parameters() if not name.startswith(behaviour)}
    agent.update_behaviour(starts)
    for name, p in agent.policy.named_parameters():
        if name in model:
            assert p.grad is None
            assert th.equal(p, model[name])


def test_actors_gradient_through_the_dynamics_is_that_of_finite_differences():
    """Gaussian latents, no clipped action, constant discounts: nothing that moves with the actor is detached in the loss."""
    th.manual_seed(0)
    agent = make(policy_kwargs={**SMALL["policy_kwargs"], "latent": "gaussian"})
    policy = agent.policy
    for head in (policy.reward, policy.critic):
        th.nn.init.normal_(head[-1].weight, std=0.1)
    th.nn.init.zeros_(policy.going_on[-1].weight)
    starts = {"h": th.randn(32, 16).tanh(), "z": th.randn(32, 4)}
    starts |= {"z_noise": th.randn(3, 32, 4), "action_noise": th.zeros(3, 32, 1)}
    policy.return_scale.percentiles.zero_()
    parameters = list(policy.actor.parameters())
    arguments = agent.gamma, agent.lambda_, agent.entropy_coef
    loss = actor_loss(policy, imagine(policy, starts), *arguments)[0]
    gradient = th.autograd.grad(loss, parameters)
    norm = th.sqrt(sum(g.square().sum() for g in gradient))
    ends = []
    for sign in (1.0, -1.0):
        for p, g in zip(parameters, gradient, strict=True):
            p.data.add_(sign * 0.01 / norm * g)
        policy.return_scale.percentiles.zero_()
        ends.append(actor_loss(policy, imagine(policy, starts), *arguments)[0].item())
        for p, g in zip(parameters, gradient, strict=True):
            p.data.sub_(sign * 0.01 / norm * g)
    assert (ends[0] - ends[1]) / 0.02 == pytest.approx(norm.item(), rel=0.02)


# ---------------------------------------------------------------------- trust region (4, 5, 6, 8)


def active(delta=1.0, **kwargs):
    region = TrustRegion(**kwargs)
    region.update(th.tensor(delta))
    region.activate()
    return region


def test_dual_ascent_golden_numbers():
    region, betas = active(step_size=0.01, decay=0.0), []
    for drift in (3.0, 3.0, 0.2, 0.2):
        region.update(th.tensor(drift))
        betas.append(region.beta.item())
    assert betas == pytest.approx([1.02, 1.04, 1.032, 1.024], abs=1e-6)
    region.update(th.tensor(1.0))
    assert region.beta.item() == pytest.approx(1.024, abs=1e-6)  # at the radius nothing moves
    for drift, end in ((1e6, 10.0), (-1e6, 0.01)):
        region.update(th.tensor(drift))
        assert region.beta.item() == pytest.approx(end)


def test_beta_stays_inside_the_bounds_of_the_agent():
    region = make(beta_bounds=[1.0, 1.5], beta_step_size=0.1).policy.trust_region  # a list, as YAML reads it
    region.update(th.tensor(1.0))
    region.activate()
    for drift, end in ((-1e6, 1.0), (1e9, 1.5)):
        region.update(th.tensor(drift))
        assert region.beta.item() == pytest.approx(end)


def test_radius_starts_at_the_mean_drift_and_is_frozen_there():
    region = TrustRegion()
    for drift in (3.0, 1.0, 0.5):
        region.update(th.tensor(drift))
        assert region.beta.item() == 1.0
    assert region.bound.item() == pytest.approx(1.5)
    assert region.free_nats.item() == 1.0
    region.activate()
    region.update(th.tensor(9.0))
    assert (region.delta_0.item(), region.delta.item(), region.bound.item()) == pytest.approx((1.5, 1.5, 1.5))
    assert region.drift.item() == pytest.approx(0.99 * 1.5 + 0.01 * 9.0)
    state = {name: value.clone() for name, value in region.state_dict().items()}
    region.update(th.tensor(math.nan))  # counts as an average one
    assert region.drift.item() == pytest.approx(0.99 * state["drift"].item() + 0.01 * state["replay_drift"].item())
    assert all(value.isfinite().all() for value in region.state_dict().values())
    assert region.free_nats.item() == pytest.approx(0.75)


def test_radius_follows_gain_and_loss_inside_its_bounds():
    region = active()

    def radius(eig, rpl):
        one = copy.deepcopy(region)
        one.set_radius(th.tensor(1.0), th.tensor(0.0))
        one.set_radius(th.tensor(eig), th.tensor(rpl))
        return one.delta.item()

    assert radius(1.0, 0.0) == pytest.approx(1.0)
    assert radius(2.0, 0.0) == pytest.approx(1.0 + 0.1 * (2.0 / 1.01 - 1.0))
    assert radius(1.0, 1.0) == pytest.approx(0.5)
    assert radius(1e6, 0.0) == 3.0
    assert radius(1.0, 5.0) == pytest.approx(0.1)


def test_performance_loss():
    region = active(2.0)
    assert region.relative_loss(th.tensor(2.0)).item() == pytest.approx(0.0, abs=1e-6)
    assert region.relative_loss(th.tensor(4.0)).item() == pytest.approx(1.0, abs=1e-6)
    assert region.relative_loss(th.tensor(1.0)).item() == 0.0
    assert region.relative_loss(th.tensor(400.0)).item() == 5.0


@pytest.mark.parametrize(("delta", "change"), [(0.6, -0.2), (0.2, 0.2)])
def test_the_dual_sees_the_unclipped_drift(delta, change):
    """Free nats 1 and a KL of 0.4: a clipped drift of 1 would raise beta in both cases, and by 0.8 eta in the second."""
    agent = make(policy_kwargs={**SMALL["policy_kwargs"], "latent": "gaussian", "variables": 1})
    region = agent.policy.trust_region
    region.decay, region.step_size = 0.0, 0.01
    region.update(th.tensor(delta))
    region.activate()
    _, info = agent.kl_loss(gaussian(math.sqrt(0.8), 1, 1), gaussian(0, 1, 1))
    region.update(info["trust_region"])
    assert region.beta.item() == pytest.approx(1.0 + 0.01 * change, abs=1e-6)


# ---------------------------------------------------------------------- information gain (7)


def test_information_gain_golden_numbers():
    latent = CategoricalLatent(1, 5, unimix=0.0)
    apart = th.eye(5).clamp(min=1e-30).log().unsqueeze(1)
    assert latent.disagreement(apart).item() == pytest.approx(math.log(5.0), abs=1e-6)
    assert latent.disagreement(apart[:1].expand(5, -1, -1)).item() < 1e-6
    two = CategoricalLatent(1, 2, unimix=0.0)
    members = th.tensor([[0.9, 0.1]] * 4 + [[0.1, 0.9]]).log().unsqueeze(1)
    assert two.disagreement(members).item() == pytest.approx(0.247974, abs=1e-6)
    assert two.disagreement(members.flip(0)).item() == pytest.approx(0.247974, abs=1e-6)
    normal = GaussianLatent(1)
    means = th.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    members = th.stack((means, th.ones(5)), -1).unsqueeze(-1)
    assert normal.disagreement(members).item() == pytest.approx(0.074210, abs=1e-6)


@pytest.mark.parametrize("latent", [CategoricalLatent(3, 4), GaussianLatent(5)])
def test_information_gain_is_never_negative_nor_asks_for_the_order(latent):
    th.manual_seed(0)
    members = latent.describe(3.0 * th.randn(5, 200, latent.statistics))
    gain = latent.disagreement(members)
    assert gain.shape == (200,)
    assert (gain > 0.0).all()
    th.testing.assert_close(latent.disagreement(members[th.randperm(5)]), gain)
    assert latent.disagreement(members[:1].expand(5, *members.shape[1:])).max() < 1e-6


def test_ensemble_learns_the_next_posterior_and_agrees_where_it_has_learnt():
    th.manual_seed(0)
    latent = CategoricalLatent(2, 4)
    ensemble = Ensemble(6, 2, latent, members=3, units=32)
    optimizer = th.optim.Adam(ensemble.parameters(), 3e-3)
    inputs = th.randn(256, 8)
    target = latent.describe(3.0 * inputs)
    everything = th.ones(256)
    first, gain = ensemble.loss(inputs, target, everything).item(), ensemble.information_gain(inputs, everything).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = ensemble.loss(inputs, target, everything)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first
    assert ensemble.information_gain(inputs, everything).item() < gain
    assert ensemble.information_gain(inputs, everything) < ensemble.information_gain(5.0 * th.randn(256, 8), everything)
    some, other = everything.clone(), inputs.clone()
    some[100:] = 0.0
    other[100:] += 1.0
    told = []
    for of in (inputs, other):
        th.manual_seed(1)
        told.append(ensemble.loss(of, target, some).item())
    assert told[0] == told[1]  # a sample of weight 0 has no say
    assert ensemble.loss(inputs, target, 0.0 * everything).item() == 0.0


# ---------------------------------------------------------------------- grounding (9, 10, 11)


@pytest.mark.parametrize("latent", [CategoricalLatent(3, 4), GaussianLatent(5)])
def test_without_residual_or_behind_a_closed_gate_the_prior_is_the_base_prior(latent):
    grounding = Grounding(7, latent, 6, dim=8)
    raw, h, c = th.randn(9, latent.statistics), th.randn(9, 6), th.randn(9, 8)
    assert th.equal(grounding.shift(raw, h, c), raw)
    th.nn.init.normal_(grounding.residual.weight)
    assert not th.equal(grounding.shift(raw, h, c), raw)
    th.nn.init.zeros_(grounding.gate.weight)
    th.nn.init.constant_(grounding.gate.bias, -50.0)
    assert th.equal(grounding.shift(raw, h, c), raw)


def test_consistency_loss_trains_the_latent_and_not_the_target():
    grounding = Grounding(7, GaussianLatent(5), 6, dim=8)
    z = th.randn(4, 5, requires_grad=True)
    grounding.consistency_loss(z, grounding.signal(th.randn(4, 7))).sum().backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is None for p in grounding.psi.parameters())


def test_causal_prior_sees_the_step_before(trained):
    """Changing the signal of step t changes the prior at t + 1 and not at t; in literal mode at t."""
    agent = copy.deepcopy(trained)
    th.nn.init.normal_(agent.policy.grounding.residual.weight)
    batch = agent._draw()
    batch["first"][:] = False
    with th.no_grad():
        h = agent.observe(batch).states.h
    other = batch | {"embeddings": batch["embeddings"].clone()}
    other["embeddings"][3] += th.randn_like(other["embeddings"][3])
    for literal, changed in ((False, 4), (True, 3)):
        agent.policy.literal = literal
        conditions = [agent.policy.conditions(agent.signals.of_batch(b), b["first"]) for b in (batch, other)]
        priors = [agent.policy.prior(h, of) for of in conditions]
        moved = (priors[0] != priors[1]).flatten(1).any(1)
        assert moved.nonzero().flatten().tolist() == [changed]
    first = batch["first"].clone()
    first[4] = True
    assert shifted(agent.signals.of_batch(batch), first)[4].abs().sum() == 0.0


def test_what_is_seen_changes_only_later_grounding(trained):
    """The same from the observations on: windows of the frozen encoder end with the step that they ground."""
    th.manual_seed(0)
    seen = {"observation": th.randn(25, 1, 3)}
    other = {"observation": seen["observation"].clone()}
    other["observation"][7] += 1.0
    before, after = (trained.signals.of_episode(observations) for observations in (seen, other))
    moved = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved == list(range(7, 7 + WINDOW))
    padded = seen["observation"][:1].expand(1, WINDOW, 3)  # before the first step stands that step
    c = trained.policy.grounding.signal(trained.policy.masked_autoencoder.embed({"observation": padded}).half())
    th.testing.assert_close(before[0], c, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("literal", [False, True], ids=["causal", "literal"])
@pytest.mark.parametrize(("share", "predicted"), [(0.0, []), (0.5, [0, 2]), (1.0, [0, 1, 2, 3]), (0.01, [0])])
def test_prior_is_trained_on_what_imagination_gives_it(trained, literal, share, predicted):
    """In a share of the sequences the condition at t is what `imagine` takes at that place; in the others it is c."""
    agent = copy.deepcopy(trained)
    agent.policy.literal, agent.predicted_share = literal, share
    batch = agent._draw()
    batch["first"][:] = False
    with th.no_grad():
        states, c = agent.observe(batch).states, agent.signals.of_batch(batch)
        got = agent.conditions(c, states, batch["first"])
        real = agent.policy.conditions(c, batch["first"])
        imagined = agent.policy.imagined_condition(states.z[2], states.h[3])  # of z_3, from z_2 and h_3
    for sequence in range(4):
        expected = imagined if sequence in predicted else real[3]
        th.testing.assert_close(got[3, sequence], expected[sequence])
    assert not th.allclose(imagined, real[3])


def test_predicted_conditions_train_the_prior_and_not_the_projector(trained):
    agent = copy.deepcopy(trained)
    agent.predicted_share, agent.consistency_coef = 1.0, 0.0
    th.nn.init.normal_(agent.policy.grounding.residual.weight)
    agent.policy.zero_grad()
    agent.model_loss(agent._draw())[0].backward()
    assert agent.policy.grounding.residual.weight.grad.abs().sum() > 0.0
    assert all(p.grad is None or not p.grad.any() for p in agent.policy.grounding.projector.parameters())


def test_projector_learns_in_bfloat16_as_in_float32(trained):
    """What is computed without a gradient must leave nothing in autocast's cache."""
    gradients = []
    for precision in ("float32", "bfloat16"):
        agent = copy.deepcopy(trained)
        th.manual_seed(0)
        batch = agent._draw()
        agent.precision = precision
        agent.policy.zero_grad()
        with agent._precision():
            loss = agent.model_loss(batch)[0]
        loss.backward()
        gradients.append(th.cat([p.grad.flatten() for p in agent.policy.grounding.projector.parameters()]))
    assert gradients[0].norm() > 0.0
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_encoder_is_frozen_after_its_warm_start(trained):
    def checksum():
        state = agent.policy.masked_autoencoder.state_dict()
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()

    agent = copy.deepcopy(trained)
    assert bool(agent.policy.grounded)
    assert not any(p.requires_grad for p in agent.policy.masked_autoencoder.parameters())
    before = checksum()
    agent.improve(5)
    assert checksum() == before
    assert make(encoder_updates=3).learn(80).policy.grounded


def test_masked_autoencoder_is_judged_on_masked_steps_and_learns_a_line():
    th.manual_seed(0)
    encoder = MaskedStateAutoencoder(2)
    masked = encoder.mask(64, th.device("cpu"))
    assert masked.sum(1).tolist() == [6] * 64  # 40 % of 16
    slope, place = th.randn(64, 1, 2), th.randn(64, 1, 2)
    windows = place + slope * th.linspace(-1.0, 1.0, WINDOW).view(1, -1, 1)
    loss = encoder.loss(windows, masked)
    told = encoder.outputs(encoder._tokens(encoder.normalized(windows), masked))
    errors = (told - encoder.normalized(windows)).square().mean(-1)
    assert loss.item() == pytest.approx(errors[masked].mean().item(), rel=1e-5)
    optimizer = th.optim.Adam(encoder.parameters(), 1e-3)
    for _ in range(400):
        optimizer.zero_grad()
        loss = encoder.loss(windows, encoder.mask(64, th.device("cpu")))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * encoder.normalized(windows).var().item()
    assert encoder.embed({"observation": windows}).shape == (64, 128)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_performance_loss_compares_one_measure_of_drift(trained, share):
    """On the batch that the model is trained on, new drift is replay drift: RPL = 0 (check 8, in the agent)."""
    agent = copy.deepcopy(trained)
    agent.predicted_share = share
    th.nn.init.normal_(agent.policy.grounding.residual.weight)
    batch = agent._draw()
    with th.no_grad():
        trained_on = agent.model_loss(batch)[1]["trust_region"]
        agent.policy.trust_region.replay_drift.copy_(trained_on)
        assert agent.policy.trust_region.relative_loss(agent.drift_of(batch)).item() == pytest.approx(0.0, abs=1e-5)
        agent.policy.trust_region.replay_drift.copy_(trained_on / 2.0)
        assert agent.policy.trust_region.relative_loss(agent.drift_of(batch)).item() == pytest.approx(1.0, rel=1e-4)
        # Of three sequences the prior of two sees a prediction, in the batch that of half: they count as half.
        two, three = (agent.drift_of(_first_sequence(batch, times)).item() for times in (2, 3))
        assert two == pytest.approx(three, rel=1e-4)


def _first_sequence(batch, times):
    """The first sequence of a batch (T, B, ...), so many times."""

    def repeated(part):
        return {name: repeated(of) for name, of in part.items()} if isinstance(part, dict) else part[:, [0] * times]

    return repeated(batch)


def test_radius_without_an_ensemble_follows_the_performance_loss_alone():
    region = TrustRegion()
    region.update(th.tensor(2.0))
    region.activate()
    region.set_radius(th.zeros(()), th.zeros(()))
    assert region.delta.item() == pytest.approx(2.0)
    region.set_radius(th.zeros(()), th.tensor(0.4))
    assert region.delta.item() == pytest.approx(2.0 * 0.8)


def test_newest_rows_of_many_environments():
    """Also where a sequence of each is more than the steps asked for."""
    space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    replay = SequenceReplay(4000, space, space, "cpu", 40, action_dim=1)
    for t in range(70):
        x = np.full((40, 1), t, np.float32)
        replay.add(x, x + 1, x, np.zeros(40), np.zeros(40, bool), [{}] * 40)
    newest = replay.newest(1000, 64)["observations"]["observation"]
    assert newest.shape == (64, 40, 1)
    assert (newest[-1] == 70.0).all()
    assert replay.newest(10_000, 16)["first"].shape == (16, 160)  # as many as there are


# ---------------------------------------------------------------------- drift (13, 14)


def test_drift_of_a_wrong_linear_model_golden_numbers():
    latent, lags = GaussianLatent(1), range(1, 6)

    def predictive(a, lag):
        return th.tensor([[a**lag], [math.sqrt(0.01 * sum(a ** (2 * i) for i in range(lag)))]], dtype=th.float64)

    assert all(latent.kl(predictive(0.9, lag), predictive(0.9, lag)).item() == 0.0 for lag in lags)
    kl = np.array([latent.kl(predictive(0.9, lag), predictive(0.8, lag)).item() for lag in lags])
    assert kl == pytest.approx([0.5, 0.88361, 1.15784, 1.33264, 1.4221], abs=1e-5)
    drift = Drift({"none": kl}, {"none": kl}, "none")
    for lag in (0, lags[-1] + 1000):
        with pytest.raises(ValueError, match="measured over lags 1 to"):
            drift.dfm(lag)
    assert [drift.dfm(h) for h in lags] == pytest.approx([0.5, 0.69181, 0.84715, 0.96852, 1.05924], abs=1e-5)


@pytest.fixture(scope="module")
def episode():
    rng, env = np.random.default_rng(0), gym.make("Pendulum-v1")
    seen, actions = [env.reset(seed=0)[0]], rng.uniform(-1, 1, (40, 1)).astype(np.float32)
    for action in actions:
        seen.append(env.step(2.0 * action)[0])
    return Episode({"observation": np.stack(seen)}, actions)


def test_drift_at_lag_one_is_the_one_step_kl(trained, episode):
    """From every point: DFM(1) is the mean KL that filtering the episode gives, with the same samples."""
    policy = trained.policy
    with th.no_grad():
        observations = {"observation": th.as_tensor(episode.observations["observation"]).unsqueeze(1)}
        actions = F.pad(th.as_tensor(episode.actions), (0, 0, 1, 0)).unsqueeze(1)
        first = th.arange(41).unsqueeze(1) == 0
        th.manual_seed(5)
        noise = policy.latent.noise(41, 1, device=th.device("cpu"))
        filtered = policy.rssm.observe(policy.encoder(observations), actions, first, noise)
        c = shifted(trained._signal_of_episode(observations), first)
        kl = policy.latent.kl(filtered.posterior, policy.prior(filtered.states.h, c))[1:, 0]
        many = measure_drift(policy, [episode], 1, trained._signal_of_episode, starts=20_000, seed=5)
    assert many.dfm(1, "real") == pytest.approx(kl.mean().item(), rel=0.02)
    assert set(many.kl) == {"real", "predicted", "none"}
    assert many.honest == "predicted"


def test_drift_is_reproducible_and_follows_the_recorded_actions(trained, episode):
    drift = trained.measure_drift([episode], 10, seed=1)
    again = trained.measure_drift([episode], 10, seed=1)
    other = trained.measure_drift([episode], 10, seed=2)
    assert all(np.array_equal(drift.kl[name], again.kl[name]) for name in drift.kl)
    assert not np.array_equal(drift.kl["none"], other.kl["none"])
    assert min(values.min() for values in drift.kl.values()) >= 0.0
    reversed_ = Episode(episode.observations, episode.actions[::-1].copy())
    assert not np.array_equal(drift.kl["none"], trained.measure_drift([reversed_], 10, seed=1).kl["none"])
    with pytest.raises(ValueError, match="No episode has as many steps as the horizon, 41"):
        trained.measure_drift([episode], 41)


# ---------------------------------------------------------------------- replay


def test_replay_keeps_episodes_apart_and_in_order():
    space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    replay = SequenceReplay(40, space, space, "cpu", n_envs=2, action_dim=1, embedding_dim=0)
    for t in range(12):
        done = np.array([t == 4, False])
        obs, following = np.array([[t], [100 + t]], np.float32), np.array([[t + 1], [101 + t]], np.float32)
        if t > 4:
            obs[0], following[0] = 50 + t, 51 + t
        infos = [{"TimeLimit.truncated": False}, {}]
        replay.add(obs, following, np.full((2, 1), t, np.float32), np.array([t, -t], np.float32), done, infos)
    assert replay.lengths().tolist() == [14, 13]
    rows = replay.sequences(th.tensor([0]), th.tensor([0]), 14)
    seen = rows["observations"]["observation"].flatten().tolist()
    assert seen == [0, 1, 2, 3, 4, 5, 55, 56, 57, 58, 59, 60, 61, 62]
    assert rows["first"].flatten().nonzero().flatten().tolist() == [0, 6]
    assert rows["terminals"].flatten().nonzero().flatten().tolist() == [5]
    assert rows["actions"].flatten().tolist() == [0, 0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 9, 10, 11]
    assert rows["rewards"].flatten().tolist() == [0, 0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 9, 10, 11]
    window = replay.windows(th.tensor([0, 0]), th.tensor([2, 7]), 4, ["observation"])["observation"].squeeze(-1)
    assert window.tolist() == [[0, 0, 1, 2], [55, 55, 55, 56]]
    newest = replay.newest(8, 4)
    assert newest["observations"]["observation"][:, :, 0].t().tolist() == [[59, 60, 61, 62], [109, 110, 111, 112]]


def test_replay_goes_round_and_never_joins_new_to_old():
    space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    replay = SequenceReplay(10, space, space, "cpu", action_dim=1)
    for t in range(33):
        step = np.array([[t]], np.float32)
        replay.add(step, step + 1, step, np.zeros(1), np.array([False]), [{}])
    assert replay.size() == 10
    th.manual_seed(0)
    rows = replay.draw(500, 4)["observations"]["observation"].squeeze(-1)
    assert (rows.diff(dim=0) == 1).all()
    assert (rows.min(), rows.max()) == (24, 33)


# ---------------------------------------------------------------------- the agent (15, 16)


def test_with_everything_off_girl_is_the_dreamer():
    """mu = 0, the gate closed, beta at 1 and free nats of 1: the same losses and the same gradients of what both have."""
    arm, girl = make(**ARM), make(consistency_coef=0.0, trust_region=False)
    girl.policy.load_state_dict(arm.policy.state_dict(), strict=False)
    th.nn.init.normal_(girl.policy.grounding.residual.weight)
    th.nn.init.zeros_(girl.policy.grounding.gate.weight)
    th.nn.init.constant_(girl.policy.grounding.gate.bias, -50.0)
    arm.learn(70)
    girl.policy.load_state_dict(arm.policy.state_dict(), strict=False)
    girl.policy.grounded.fill_(True)  # the arm's says no
    batch = arm._draw()
    shape = (*batch["first"].shape, 128)
    losses = [agent.model_loss(batch | {"embeddings": th.randn(shape)}) for agent in (arm, girl)]
    for name in ("decoder_loss", "reward_loss", "continue_loss", "kl_loss", "trust_region"):
        assert losses[0][1][name].item() == pytest.approx(losses[1][1][name].item(), rel=1e-6), name
    assert losses[0][0].item() == pytest.approx(losses[1][0].item(), rel=1e-6)
    starts = arm.starts(losses[0][2])
    for ours, theirs in zip(arm.behaviour_losses(starts)[:2], girl.behaviour_losses(starts)[:2], strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for agent, (loss, *_) in zip((arm, girl), losses, strict=True):
        agent.policy.zero_grad()
        loss.backward()
    theirs = dict(girl.policy.named_parameters())
    compared = [(p.grad, theirs[name].grad) for name, p in arm.policy.named_parameters() if p.grad is not None]
    assert len(compared) > 20
    for ours, same in compared:
        th.testing.assert_close(ours, same, rtol=1e-4, atol=1e-6)


def test_files_keep_the_trust_region(trained, tmp_path):
    trained.save(tmp_path / "model")
    loaded = GIRL.load(tmp_path / "model", device="cpu")
    region = trained.policy.trust_region
    assert bool(region.active)
    assert region.delta_0 > 0
    for name, value in region.state_dict().items():
        assert th.equal(loaded.policy.trust_region.state_dict()[name], value), name
    for name, value in trained.policy.ensemble.state_dict().items():
        assert th.equal(loaded.policy.ensemble.state_dict()[name], value), name
    assert loaded._warm
    assert loaded._debt == trained._debt


def test_parameters_of_before_the_warm_start(tmp_path):
    """The trust region begins anew, and the memory's embeddings are those of the encoder that the agent has then."""
    agent = make(warmup_steps=150)
    agent.learn(100)
    agent.save(tmp_path / "early")
    agent.learn(100, reset_num_timesteps=False)
    assert agent._warm
    agent.set_parameters(tmp_path / "early", device="cpu")
    assert not agent._warm
    agent.learn(20, reset_num_timesteps=False)
    assert bool(agent.policy.trust_region.active)
    agent.set_parameters(make(seed=7, warmup_steps=150).learn(100).get_parameters(), device="cpu")
    agent._embed_waiting()
    memory, encoder = agent.replay_buffer, agent.signals.encoder
    env, number = th.zeros(50, dtype=th.long), th.arange(50)
    fresh = encoder.embed(memory.windows(env, number, encoder.window, encoder.parts))
    th.testing.assert_close(memory.embeddings[:50, 0], fresh.half(), rtol=1e-2, atol=1e-2)


def test_first_radius_is_the_mean_of_the_logged_drifts():
    agent, drifts = make(warmup_steps=150), []
    update = agent._one_update

    def look():
        info = update()
        if not agent._warm:
            drifts.append(info["trust_region"].item())
        return info

    agent._one_update = look
    agent.learn(300)
    assert len(drifts) > 10
    assert agent.policy.trust_region.delta_0.item() == pytest.approx(np.mean(drifts), rel=1e-5)


def test_updates_follow_the_train_ratio():
    agent = make(train_ratio=16.0, learning_starts=50, pretrain_updates=3).learn(250)
    assert agent._n_updates == 3 + 200 * 16 // 32
    agent.learn(100, reset_num_timesteps=True)  # begins with random steps again, and goes on training after them
    assert agent._n_updates == 3 + (200 + 50) * 16 // 32


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"train_ratio": 0.0}, "train_ratio must be above 0, not 0.0"),
        ({"behaviour_grad_norm": -1.0}, "behaviour_grad_norm must be above 0, not -1.0"),
        ({"beta_bounds": (1.0,)}, r"beta_bounds is \(low, high\), .* not \(1.0,\)"),
        ({"batch_length": 1}, "batch_length"),
        ({"grounding_index": "future"}, "grounding_index is one of causal, literal"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], not 1.5"),
        ({"predicted_share": -0.1}, r"predicted_share must be in \[0, 1\], not -0.1"),
        ({"consistency_coef": -1.0}, "consistency_coef must be 0 or more, not -1.0"),
        ({"encoder_weights": "/nowhere"}, "grounding='auto' has no use for it"),
        ({"buffer_size": 7}, "7 rows for each of 1 environments, fewer than batch_length=8: raise buffer_size"),
        ({"precision": "int8"}, "precision is one of"),
        ({"beta_bounds": (2.0, 10.0)}, r"0 <= low <= 1 <= high, as beta begins at 1: not \(2.0, 10.0\)"),
        ({"grounding": "dinov9"}, "grounding is"),
        ({"policy_kwargs": {"grounding": None}}, "is an argument of the agent"),
        ({"policy_kwargs": {"grounding_dim": 32}}, "embedding is c already, of width 128: leave grounding_dim and psi out"),
        ({"policy_kwargs": {"psi": "frozen"}}, "leave grounding_dim and psi out"),
        ({"policy_kwargs": {"size": "huge"}}, "size is one of default, small"),
        ({"policy_kwargs": {"depth": 3}}, "no argument 'depth'"),
        ({"policy_kwargs": {"latent": "binary"}}, "latent is one of"),
    ],
)
def test_wrong_arguments_are_refused_in_words(kwargs, words):
    with pytest.raises(ValueError, match=words):
        make(**kwargs)


def test_a_grid_with_its_channels_last_is_refused():
    """SB3 turns pictures, and does not know a grid for one whose values end at 10."""
    with pytest.raises(ValueError, match="give pictures their channels first"):
        parts_of(spaces.Box(0, 10, (9, 9, 3), np.uint8))
    for space in (spaces.Box(0, 255, (9, 9, 3), np.uint8), spaces.Box(0, 10, (3, 9, 9), np.uint8)):
        assert parts_of(space) == {"observation": space}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_losses_have_the_gradients_of_the_eager_ones():
    agent = make().learn(200)
    batch = agent._draw()
    with th.no_grad():
        starts = agent.starts(agent.observe(batch))
    own = agent.policy
    scale = copy.deepcopy(own.return_scale.state_dict())
    for function, of, parts in (
        (agent.model_loss, batch, own.model_parameters()),
        (agent.behaviour_losses, starts, [*own.actor.parameters(), *own.critic.parameters()]),
    ):
        gradients = []
        for run in (function, th.compile(function)):
            own.return_scale.load_state_dict(scale)
            own.zero_grad()
            losses = run(of)
            (losses[0] if function == agent.model_loss else losses[0] + losses[1]).backward()
            gradients.append([th.zeros(()) if p.grad is None else p.grad.clone() for p in parts])
        for eager, compiled in zip(*gradients, strict=True):
            assert th.allclose(eager, compiled, rtol=1e-3, atol=1e-4 * max(1.0, eager.abs().max().item()))


def test_drift_under_a_normalizer_shows_encoders_what_they_learnt_from(tmp_path):
    """Recorded observations are normalised; the grounding vectors are those that the replay memory has."""
    env = VecNormalize(make_vec_env("Pendulum-v1", 1))
    agent = make(env).learn(150)
    agent._embed_waiting()
    rows = slice(0, 60)
    raw = {"observation": agent.replay_buffer.observations["observation"][rows]}
    kept = agent.policy.grounding.signal(agent.replay_buffer.embeddings[rows])
    shown = scaled(raw, env)
    again = agent._signal_of_episode(shown)
    assert (shown["observation"] - raw["observation"]).abs().max() > 0.1
    assert (kept - again).square().mean() < 1e-3
    agent.save(tmp_path / "it")
    recorded = Episode({"observation": shown["observation"][:9, 0].numpy()}, np.zeros((8, 1), np.float32))
    with pytest.raises(ValueError, match="give it its environment"):
        GIRL.load(tmp_path / "it").measure_drift([recorded], 5)
    back = GIRL.load(tmp_path / "it", env=make_vec_env("Pendulum-v1", 1))
    assert back.measure_drift([recorded], 5).dfm(5, "real") == agent.measure_drift([recorded], 5).dfm(5, "real")


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_tables_of_floats_and_float64(shape):
    class Table(gym.Env):
        observation_space = spaces.Box(-1.0, 1.0, shape, np.float64)
        action_space = spaces.Box(-1.0, 1.0, (2, 2), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return self.observation_space.sample(), {}

        def step(self, action):
            assert action.shape == (2, 2)
            self.steps += 1
            return np.asarray(self.observation_space.sample()), 0.0, False, self.steps == 20, {}

    agent = make(Table(), warmup_steps=70).learn(80)
    flat = np.random.default_rng(0).normal(size=(12, int(np.prod(shape))))
    drift = agent.measure_drift([Episode({"observation": flat}, np.zeros((11, 4), np.float32))], 5)
    assert np.isfinite(drift.kl["predicted"]).all()


def test_replay_memory_is_saved_and_loaded(trained, tmp_path):
    trained.save_replay_buffer(tmp_path / "memory")
    other = make(learning_starts=500)
    other.load_replay_buffer(tmp_path / "memory")
    assert other.replay_buffer.totals.tolist() == trained.replay_buffer.totals.tolist()
    assert other.replay_buffer.begins.all()
    save_to_pkl(tmp_path / "other.pkl", {})
    with pytest.raises(ValueError, match="holds a dict, and a world model learns from a SequenceReplay"):
        other.load_replay_buffer(tmp_path / "other.pkl")
    two = make(make_vec_env("Pendulum-v1", 2))
    with pytest.raises(ValueError, match="was made with n_envs 1, and this agent has 2: make both alike"):
        two.load_replay_buffer(tmp_path / "memory")
    with pytest.raises(ValueError, match="was made with observation_space"):
        make("CartPole-v1").load_replay_buffer(tmp_path / "memory")
    with pytest.raises(ValueError, match="has 2000 rows for each of 1 environments, fewer than batch_length=2001"):
        make(buffer_size=3000, batch_length=2001).load_replay_buffer(tmp_path / "memory")


@pytest.mark.parametrize("kwargs", [{}, ARM], ids=["another encoder", "no encoder"])
def test_embeddings_of_a_loaded_memory_are_the_agents_own(tmp_path, kwargs):
    make(seed=1, **kwargs).learn(100).save_replay_buffer(tmp_path / "memory")
    agent = make()
    agent.load_replay_buffer(tmp_path / "memory")
    agent.improve(1)
    memory, encoder = agent.replay_buffer, agent.policy.masked_autoencoder
    number = th.arange(int(memory.totals[0]))
    assert memory.known[number, 0].all()
    windows = memory.windows(th.zeros_like(number), number, WINDOW, encoder.parts)
    assert th.equal(memory.embeddings[number, 0], encoder.embed(windows).half())
    arm = make(**ARM)
    agent.save_replay_buffer(tmp_path / "own")
    arm.load_replay_buffer(tmp_path / "own")
    arm.improve(1)


def test_deterministic_actions_leave_random_numbers_alone(trained):
    before, belief = th.get_rng_state(), None
    for _ in range(3):
        _, belief = trained.predict(np.ones((1, 3), np.float32), belief, np.zeros(1, bool), deterministic=True)
    assert th.equal(th.get_rng_state(), before)
    trained.predict(np.ones((1, 3), np.float32), belief, np.zeros(1, bool))
    assert not th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"episode_start": np.ones(2, bool)}, "episode_start says of each of 3 environments"),
        ({"state": (np.zeros((3, 16)),)}, "state is what the last call of predict gave for the same 3 environments"),
    ],
)
def test_predict_refuses_what_is_of_other_environments(trained, kwargs, words):
    with pytest.raises(ValueError, match=words):
        trained.predict(np.zeros((3, 3), np.float32), **kwargs)
    _, belief = trained.predict(np.zeros(3, np.float32), episode_start=True)  # one may come without its list
    with pytest.raises(ValueError, match="for the same 3 environments"):
        trained.predict(np.zeros((3, 3), np.float32), belief)


def test_region_of_an_agent_that_had_none_begins_with_the_drifts_to_come(tmp_path):
    make(**{**ARM, "grounding": "auto", "ensemble_members": 0}).learn(150).save(tmp_path / "model")
    agent = GIRL.load(tmp_path / "model", env="Pendulum-v1", device="cpu", trust_region=True)  # an id, as the constructor
    agent.learn(60, reset_num_timesteps=False)
    region = agent.policy.trust_region
    assert bool(region.active)
    assert region.delta_0 > 0.0


def test_memory_on_a_cpu_is_taken_as_it_is_written():
    space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = SequenceReplay(1_000_000, space, spaces.Discrete(3), "cpu", action_dim=3, embedding_dim=1280)
    assert memory.observations["observation"].nbytes > 12e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB


def test_no_ensemble_without_a_region_to_follow_it(trained, tmp_path):
    assert make(trust_region=False).policy.ensemble is None
    trained.save(tmp_path / "it")
    agent = GIRL.load(tmp_path / "it", env="Pendulum-v1", trust_region=False)
    before = copy.deepcopy([agent.policy.ensemble.state_dict(), agent.policy.trust_region.state_dict()])
    agent.learn(150, reset_num_timesteps=False)
    after = [agent.policy.ensemble.state_dict(), agent.policy.trust_region.state_dict()]
    assert agent._n_updates > trained._n_updates + agent.radius_interval
    assert all(th.equal(part[name], then[name]) for part, then in zip(after, before, strict=True) for name in part)


def test_region_without_a_drift_is_not_activated():
    with pytest.raises(ValueError, match="update before you activate"):
        TrustRegion().activate()


def test_batches_without_a_transition_tell_nothing_of_information():
    """Episodes of one step in sequences of two rows: some only join one to the next."""
    agent = make(Bandit(), batch_size=1, batch_length=2, tau_rpl=0.0, warmup_steps=70).learn(90)
    region, draw, batches, silent = agent.policy.trust_region, agent._draw, [], 0
    agent._draw = lambda: batches.append(draw()) or batches[-1]
    for _ in range(20):
        before = region.eig_reference.clone()
        agent._refresh_radius()
        if batches[-1]["first"][1].all():
            silent += 1
            assert region.delta == region.delta_0
            assert region.eig_reference == before
    assert 0 < silent < 20


def test_share_of_predicted_conditions_is_rounded_up():
    agent = make()
    for sequences, share, expected in ((50, 0.3, 15), (25, 0.6, 15), (4, 0.3, 2), (8, 0.5, 4), (3, 0.0, 0), (3, 1.0, 3)):
        agent.predicted_share = share
        assert agent._with_prediction(sequences).sum() == expected


class Counting(gym.Env):
    """Shows how many steps the episode has; a reward is not finite at one step."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, action_space=None, at=None):
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.at, self.total = at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps, self.total = self.steps + 1, self.total + 1
        return np.full(1, self.steps, np.float32), float("nan") if self.total == self.at else 0.0, False, self.steps == 40, {}


def test_learning_on_after_a_number_that_is_not_finite_joins_no_steps():
    agent = make(Counting(at=75))
    with pytest.raises(NonFiniteError, match="reward"):
        agent.learn(200)
    agent.learn(60, reset_num_timesteps=False)
    memory = agent.replay_buffer
    seen, first = memory.observations["observation"][: memory.size(), 0, 0], memory.first[: memory.size(), 0]
    assert memory.size() > 130
    assert th.equal(seen[1:][~first[1:]], seen[:-1][~first[1:]] + 1.0)
    assert (seen[first] == 0.0).all()


@pytest.mark.parametrize("bounds", [((-2.0, -2.0), (-0.8, -0.8)), ((0.0, -1.0), (0.0, 1.0))], ids=["rounded", "one is fixed"])
def test_actions_stay_in_their_box(bounds):
    agent = make(Counting(spaces.Box(*(np.array(bound, np.float32) for bound in bounds)))).learn(250)
    assert agent.replay_buffer.actions.abs().max() <= 1.0  # also not nan
    assert agent.policy(th.zeros(3, 1)).shape == (3, 2)


def test_policy_called_as_a_module_gives_what_predict_gives():
    agent = make(Identity(spaces.Discrete(3, start=5)))
    observations = np.array([5, 6, 7])
    told = agent.policy(*agent.policy.obs_to_tensor(observations)[:1], deterministic=True)
    assert told.tolist() == agent.predict(observations, None, np.ones(3, bool), deterministic=True)[0].tolist()


def test_checkpoint_of_as_many_rows_as_environments(tmp_path):
    """What is kept of every environment is not cut to the rows that are written."""
    env = make_vec_env(Counting, 6)
    agent = make(env, buffer_size=36, batch_length=6, batch_size=2, learning_starts=500).learn(12)
    agent.save_checkpoint(tmp_path)
    back = GIRL.load_checkpoint(tmp_path, make_vec_env(Counting, 6), device="cpu").replay_buffer
    for name in ("totals", "looked", "begins", "ages", "first", "rewards"):
        assert np.array_equal(getattr(back, name), getattr(agent.replay_buffer, name)), name
    assert back.totals.tolist() == [3] * 6


def test_two_environments():
    agent = make(make_vec_env("Pendulum-v1", 2)).learn(200)
    assert agent.replay_buffer.lengths().tolist() == [101, 101]
    actions, belief = agent.predict(np.zeros((2, 3), np.float32), None, np.ones(2, bool))
    assert actions.shape == (2, 1)
    again, _ = agent.predict(np.zeros((2, 3), np.float32), belief, np.array([False, True]), deterministic=True)
    assert again.shape == (2, 1)


def test_dream_sees_the_context_and_no_more(trained):
    """What comes after the context changes nothing of what is imagined; the context does."""
    env = gym.make("Pendulum-v1")
    observations, actions = [env.reset(seed=0)[0]], []
    for _ in range(30):
        actions.append(env.action_space.sample() / 2.0)
        observations.append(env.step(actions[-1] * 2.0)[0])
    seen, acted = np.stack(observations), np.stack(actions).astype(np.float32)
    later, sooner = seen.copy(), seen.copy()
    later[5:] += 1.0
    sooner[:5] *= -3.0
    one, other, third = (trained.dream(Episode({"observation": o}, acted), 5, 20) for o in (seen, later, sooner))
    assert one.imagined["observation"].shape == one.real["observation"].shape == (25, 3)
    np.testing.assert_array_equal(one.real["observation"], seen[:25])
    np.testing.assert_array_equal(one.imagined["observation"], other.imagined["observation"])
    assert np.abs(one.imagined["observation"] - third.imagined["observation"])[6:].max() > 1e-3
    assert len(trained.dream(Episode({"observation": seen}, acted)).imagined["observation"]) == 31
    with pytest.raises(ValueError, match="begins with 1 observation or more, not 0"):
        trained.dream(Episode({"observation": seen}, acted), 0)
    with pytest.raises(ValueError, match="The episode has 5 observations, no more than the context of 5"):
        trained.dream(Episode({"observation": seen[:5]}, acted[:4]), 5)


def test_decoder_says_what_its_loss_measures():
    parts = {
        "left": spaces.Box(0, 255, (3, 20, 20), np.uint8), "state": spaces.Box(-1.0, 1.0, (4,), np.float32),
        "right": spaces.Box(0, 255, (1, 20, 20), np.uint8), "more": spaces.Box(-1.0, 1.0, (2,), np.float32),
    }  # fmt: skip
    decoder, features = Decoder(7, parts, 4, 1, 8), th.randn(5, 2, 7)
    decoder.cnn[-1].weight.data.mul_(0.05)  # inside of what pictures can show
    told = decoder.decoded(features)
    assert {name: tuple(part.shape) for name, part in told.items()} == {n: (5, 2, *p.shape) for n, p in parts.items()}
    seen = {n: (v * 255.0).round().to(th.uint8) if v.dim() == 5 else v for n, v in told.items()}
    assert decoder.loss(features, seen).max() < 1600 * (0.5 / 255.0) ** 2 + 1e-6  # but for rounding
