"""Behaviour learned in imagination: the rollout, its returns, and what actor and critic learn from it (DreamerV3; the digests
tell no deviation)."""

from __future__ import annotations

from typing import NamedTuple

import torch as th
from torch.func import functional_call

from .policy import GIRLPolicy
from .replay import Batch
from .rssm import State


class Imagined(NamedTuple):
    """An imagined rollout: [z, h] at s_0..s_H (H + 1, N, ...), actions a_0..a_{H-1} and what the actor said of them."""

    features: th.Tensor
    actions: th.Tensor
    descriptions: th.Tensor


def imagine(policy: GIRLPolicy, starts: Batch) -> Imagined:
    """H steps of the prior, with actions of the actor, which sees the states without a gradient; the prior is conditioned
    on c_hat = f_psi(z), never on what was observed."""
    state = State(starts["h"], starts["z"])
    features, actions, descriptions = [state.features], [], []
    for z_noise, action_noise in zip(starts["z_noise"].unbind(), starts["action_noise"].unbind(), strict=True):
        descriptions.append(policy.actor.describe(features[-1].detach()))
        actions.append(policy.actor.sample(descriptions[-1], action_noise))
        h = policy.rssm.advance(state, policy.rssm.pushed(actions[-1]))
        state = State(h, policy.latent.sample(policy.prior(h, policy.imagined_condition(state.z, h)), z_noise))
        features.append(state.features)
    return Imagined(th.stack(features), th.stack(actions), th.stack(descriptions))


def actor_loss(
    policy: GIRLPolicy, imagined: Imagined, gamma: float, lambda_: float, entropy_coef: float
) -> tuple[th.Tensor, dict[str, th.Tensor], th.Tensor, th.Tensor]:
    """-mean( w_i (R_i - v_i) / S ) - eta mean( H[pi(s_i)] ), i = 0..H-1; for Discrete actions
    -mean( w_i log pi(a_i|s_i) sg((R_i - v_i) / S) ) in the place of the first.

    The gradient of the former goes through the imagined dynamics (NM512); reward, continue head and critic stay fixed.
    NM512 leaves out S where it uses the score function; here it scales both. Its entropy also has a gradient through the
    states, of a few thousandths of the whole; here it has none.

    :return: loss, terms, the returns R (H, N) and the weights w (H, N), both constant
    """
    features = imagined.features
    rewards = policy.two_hot.mean(policy.reward(features))
    discounts = gamma * policy.going_on(features).squeeze(-1).float().sigmoid()
    fixed = {name: parameter.detach() for name, parameter in policy.critic.named_parameters()}
    values = policy.two_hot.mean(functional_call(policy.critic, fixed, (features,)))
    returns = lambda_returns(rewards, discounts, values, lambda_)
    policy.return_scale.update(returns)
    advantages = (returns - values[:-1]) / policy.return_scale.scale
    weights = weights_of(discounts)
    gain = advantages
    if policy.discrete:
        gain = policy.actor.log_prob(imagined.descriptions, imagined.actions) * advantages.detach()
    entropy = policy.actor.entropy(imagined.descriptions).mean()
    loss = -(weights * gain).mean() - entropy_coef * entropy
    info = {
        "actor_loss": loss, "entropy": entropy, "imagined_reward": rewards[1:].mean(),
        "imagined_return": returns.mean(), "return_scale": policy.return_scale.scale,
    }  # fmt: skip
    return loss, info, returns.detach(), weights


def critic_loss(
    policy: GIRLPolicy, features: th.Tensor, returns: th.Tensor, weights: th.Tensor
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """mean( w_i [ -log p(R_i | s_i) - log p(sg slow critic's mean | s_i) ] ).

    :param features: [z, h] of s_0..s_H (H + 1, N, ...), constant
    """
    outputs = policy.critic(features)[:-1]  # of all: compiled, this and the values of the actor's loss are one product
    with th.no_grad():
        slow = policy.two_hot.mean(policy.slow_critic(features[:-1]))
    log_prob = policy.two_hot.log_prob(outputs, returns) + policy.two_hot.log_prob(outputs, slow)
    loss = -(weights * log_prob).mean()
    return loss, {"critic_loss": loss, "value": slow.mean()}


def lambda_returns(rewards: th.Tensor, discounts: th.Tensor, values: th.Tensor, lam: float) -> th.Tensor:
    """R_i = rho_{i+1} + d_{i+1} [ (1 - lambda) v_{i+1} + lambda R_{i+1} ] for i = 0..H-1, R_H = v_H.

    :param rewards: rho_0..rho_H, on arriving at states s_0..s_H (H + 1, ...); rho_0 does not count
    :param discounts: d_0..d_H, gamma times the chance to go on
    :param values: v_0..v_H
    :return: (H, ...)
    """
    inputs = rewards[1:] + discounts[1:] * (1.0 - lam) * values[1:]
    last, returns = values[-1], []
    for i in reversed(range(inputs.shape[0])):
        last = inputs[i] + discounts[i + 1] * lam * last
        returns.append(last)
    return th.stack(returns[::-1])


def weights_of(discounts: th.Tensor) -> th.Tensor:
    """prod_{j<i} d_j, the chance and worth of ever being at s_i: 1 at s_0; (H, ...) of (H + 1, ...), detached."""
    return th.cat((th.ones_like(discounts[:1]), discounts[:-2])).cumprod(0).detach()
