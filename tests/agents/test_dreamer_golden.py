"""GIRL with its parts off against NM512/dreamerv3-torch: golden numbers that its code computed; none of it is here.

It was https://github.com/NM512/dreamerv3-torch at commit 6ef8646d807cd10ce0c88e10a7e943211e7fc44c, given the weights, inputs
and noise of the formulas below, its samplers replaced by ours. Its configuration was `dmc_proprio` with the sizes below;
`dyn_discrete: False` for Gaussian latents; `onehot` and `reinforce`, as it has for Atari, for Discrete actions; and an
`imag_horizon` of H + 1, as it counts the state where imagination starts.
"""

import math

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces

from tether.agents import GIRL
from tether.agents.girl import girl
from tether.agents.girl.imagination import actor_loss, critic_loss, imagine
from tether.agents.girl.networks import Decoder, Encoder, parts_of

T, B, H = 5, 2, 4
SIZES = {"deter": 8, "hidden": 8, "variables": 3, "classes": 4, "units": 8, "encoder_layers": 1, "encoder_units": 8}
CASES = {"categorical": spaces.Box(-1.0, 1.0, (2,)), "gaussian": spaces.Discrete(3)}  # family of the latents: actions

MODEL = {
    "categorical": {
        "h": [0.06198781, -0.05772921, -0.2937397, -0.1047577], "z": [0.0, 0.0, 0.0, 1.0],
        "posterior": [-0.4441735, -2.694867, -1.448743, -2.878321], "prior": [-0.9321535, -1.221293, -1.21039, -4.315102],
        "drift": 1.244095, "kl_loss": 0.7560843, "kl_free_0.01": 0.7464569, "decoder_loss": 5.988507, "reward_loss": 6.120324,
        "continue_loss": 0.3573137, "loss": 13.22223, "norm": 7.315371,
    },
    "gaussian": {
        "h": [0.08438528, -0.06980244, -0.2867203, -0.09764633], "z": [0.3445834, -1.277069, -0.7437343],
        "posterior": [1.092607, -0.7743738, 0.2848901, 0.8404677], "prior": [1.48796, 1.332879, 1.117043, 0.8863388],
        "drift": 1.323433, "kl_loss": 0.8295262, "kl_free_0.01": 0.7940599, "decoder_loss": 7.162399, "reward_loss": 5.914403,
        "continue_loss": 0.4318649, "loss": 14.33819, "norm": 7.200116,
    },
}  # fmt: skip
BEHAVIOUR = {
    "categorical": {
        "features": [0.6069761, -0.04124603, 0.01186167, 0.1617506], "action": [0.7539903, -0.4984989],
        "returns": [-6.050192, -4.898792, -3.93897, -2.667886], "weights": [1.0, 0.8095395, 0.6527134, 0.5224416],
        "percentiles": [-1.058629, 1.968379], "entropy": 2.641654, "actor_loss": 1.08079, "actor_norm": 0.05480231,
        "critic_loss": 8.655448, "critic_norm": 1.210325,
    },
    "gaussian": {
        "features": [0.6157916, 0.1148178, -0.1794364, 0.5486103], "action": [1.0, 0.0, 0.0],
        "returns": [-3.707434, -3.69411, -2.604465, -2.257211], "weights": [1.0, 0.7385935, 0.5733942, 0.4847018],
        "percentiles": [-0.04863724, -0.01037215], "entropy": 0.8783412, "actor_loss": -1.304541, "actor_norm": 1.174995,
        "critic_loss": 8.548527, "critic_norm": 1.449018,
    },
}  # fmt: skip
THIRD = {
    "categorical": {
        "loss": 13.20574, "drift": 1.240853, "imagined_return": -4.161517, "percentiles": [-1.174161, 1.906155],
        "actor_loss": 1.062979, "critic_loss": 8.821146,
    },
    "gaussian": {
        "loss": 14.32033, "drift": 1.319902, "imagined_return": -3.182774, "percentiles": [-0.1442394, -0.03069436],
        "actor_loss": -1.301795, "critic_loss": 8.741593,
    },
}  # fmt: skip
PICTURES = {
    "convolved": [-0.1420076, -0.1450302, -0.04533166, -0.1072968], "dense": [0.3932355, 0.1842936],
    "camera": [0.4794986, 0.9418788, -0.4447923], "vector": [4.137883, 3.08217, 3.241755], "loss": [372.3787, 361.9956],
}  # fmt: skip


class Spaces(gym.Env):
    """Nothing steps it."""

    def __init__(self, actions):
        self.observation_space, self.action_space = spaces.Box(-9.0, 9.0, (3,)), actions


def wave(*shape, start=0.0):
    """Numbers in [-1, 1], the same on every machine: sin(start + i^2 / 3)."""
    i = th.arange(math.prod(shape), dtype=th.float64)
    return (start + i.square() / 3.0).sin().float().view(shape)


def fill(*modules):
    """Matrices in [-0.8, 0.8] and vectors in [-0.4, 1], one wave for each parameter."""
    for number, p in enumerate(p for module in modules for p in module.parameters()):
        numbers = wave(*p.shape, start=number)
        p.data = 0.8 * numbers if p.dim() > 1 else 0.3 + 0.7 * numbers


def uniform(*shape):
    """Numbers in (0, 1): multiples of the golden section."""
    return ((th.arange(math.prod(shape), dtype=th.float64) + 0.5) * (math.sqrt(5.0) - 1.0) / 2.0).frac().float().view(shape)


def make(latent):
    """The agent, a batch of sequences, and the noise of imagination from there."""
    kwargs = {"horizon": H, "policy_kwargs": {**SIZES, "latent": latent}, "buffer_size": 100, "device": "cpu"}
    agent = GIRL("MlpPolicy", Spaces(CASES[latent]), **GIRL.VARIANTS["dreamerv3"], **kwargs)
    policy = agent.policy
    heads = policy.reward, policy.going_on, policy.actor, policy.critic, policy.slow_critic
    fill(policy.encoder, policy.rssm, policy.decoder, *heads)
    if not policy.discrete:  # where NM512 does not divide by the scale: it stays 1
        policy.return_scale.percentiles.copy_(th.tensor([-1.0, 2.0]))
    first, terminals = th.zeros(T, B, dtype=th.bool), th.zeros(T, B)
    first[0], first[2, 1], terminals[1, 1] = True, True, 1.0
    actions = wave(T, B, policy.action_dim, start=2.0)
    if policy.discrete:
        actions = th.eye(policy.action_dim)[actions.argmax(-1)]
    draw = uniform if latent == "categorical" else wave
    inner = (3, 1) if latent == "categorical" else (3,)
    batch = {
        "observations": {"observation": 4.0 * wave(T, B, 3, start=1.0)}, "actions": actions, "first": first,
        "rewards": 6.0 * wave(T, B, start=3.0), "terminals": terminals, "noise": draw(T, B, *inner),
    }  # fmt: skip
    noise = {"z_noise": draw(H, T * B, *inner), "action_noise": 1.5 * wave(H, T * B, policy.action_dim, start=4.0)}
    return agent, batch, noise


def pictures():
    """Encoder and decoder of a picture and a vector, and two observations."""
    parts = parts_of(spaces.Dict({"camera": spaces.Box(0, 255, (3, 16, 16), "uint8"), "vector": spaces.Box(-9.0, 9.0, (3,))}))
    encoder, decoder = Encoder(parts, 2, 1, 8), Decoder(20, parts, 2, 1, 8)
    fill(encoder, decoder)
    camera = (th.arange(2 * 3 * 16 * 16) ** 2 % 251).to(th.uint8).view(2, 3, 16, 16)
    return encoder, decoder, {"camera": camera, "vector": 4.0 * wave(2, 3, start=1.0)}


def check(ours, golden):
    for name, value in golden.items():
        assert ours[name].tolist() == pytest.approx(value, rel=1e-5, abs=1e-7), name


def norm(loss, parameters):
    return th.cat([g.flatten() for g in th.autograd.grad(loss, list(parameters))]).norm()


@pytest.mark.parametrize("latent", CASES)
def test_world_model(latent, monkeypatch):
    """States, distributions, losses and their gradient; an episode begins in the midst of a sequence."""
    agent, batch, _ = make(latent)
    loss, info, filtered = agent.model_loss(batch)
    (h, z), posterior = filtered.states, filtered.posterior
    prior = agent.policy.prior(h)
    ours = info | {"loss": loss, "drift": info["trust_region"], "norm": norm(loss, agent.policy.model_parameters())}
    ours |= {"h": h[-1, 1, :4], "z": z[-1, 1, :4]}
    ours |= {"posterior": posterior[-1, 1].flatten()[:4], "prior": prior[-1, 1].flatten()[:4]}
    monkeypatch.setattr(girl, "FREE_NATS", 0.01)
    check(ours | {"kl_free_0.01": agent.kl_loss(posterior, prior)[0]}, MODEL[latent])


@pytest.mark.parametrize("latent", CASES)
def test_behaviour(latent):
    """An imagined rollout and the losses; the actor's gradient without that of the entropy, see `actor_loss`."""
    agent, batch, noise = make(latent)
    policy = agent.policy
    imagined = imagine(policy, agent.starts(agent.observe(batch)) | noise)
    loss, info, returns, weights = actor_loss(policy, imagined, agent.gamma, agent.lambda_, agent.entropy_coef)
    critic, _ = critic_loss(policy, imagined.features.detach(), returns, weights)
    bare = loss + agent.entropy_coef * info["entropy"]
    ours = info | {"actor_loss": loss, "critic_loss": critic, "percentiles": policy.return_scale.percentiles}
    ours |= {"features": imagined.features[-1, 7, -4:], "action": imagined.actions[-1, 7], "returns": returns[:, 7]}
    ours |= {"weights": weights[:, 7], "actor_norm": norm(bare, policy.actor.parameters())}
    check(ours | {"critic_norm": norm(critic, policy.critic.parameters())}, BEHAVIOUR[latent])


@pytest.mark.parametrize("latent", CASES)
def test_third_update(latent):
    """The losses after two updates of everything, without the entropy's."""
    agent, batch, noise = make(latent)
    agent.entropy_coef = 0.0
    for _ in range(3):
        info, filtered = agent.update_model(batch, False, False)
        info |= {"loss": info["decoder_loss"] + info["reward_loss"] + info["continue_loss"] + info["kl_loss"]}
        info |= agent.update_behaviour(agent.starts(filtered) | noise)
    check(info | {"drift": info["trust_region"], "percentiles": agent.policy.return_scale.percentiles}, THIRD[latent])


def test_pictures():
    """A picture beside a vector; NM512's linear layer in front of the convolutions has its rows in another order."""
    encoder, decoder, seen = pictures()
    features, embedding = wave(2, 20, start=5.0), encoder(seen)[1]
    ours = {"camera": decoder.pixels(features)[1, :, 5, 7], "vector": decoder.decoded(features)["vector"][1]}
    check(ours | {"loss": decoder.loss(features, seen), "convolved": embedding[:4], "dense": embedding[-2:]}, PICTURES)
