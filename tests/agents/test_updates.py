"""The update loop and its parts against readable references: torch's own Adam, clipping and plain indexing."""

import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kit.rollouts import collected
from tests.kit.worlds import Identity
from tether.agents import BPO, MDPO, PPO, R2VPO
from tether.agents.common.distributions import action_distribution
from tether.agents.common.finite import DeviceGuard, NonFiniteError
from tether.agents.common.flat_adam import FlatAdam
from tether.agents.common.updates import Update, batch_length, in_chunks, map_batch, minibatches, side_by_side


def make(cls, **kwargs):
    return cls("MlpPolicy", "Pendulum-v1", n_steps=256, seed=0, **kwargs)


def reference_run(agent, batch, epochs, batch_size, max_grad_norm):
    """The update as one would write it down: per-parameter Adam, indexing per minibatch, torch's clipping."""
    parameters = list(agent.policy.parameters())
    optimizer = th.optim.Adam(parameters, lr=3e-4, eps=1e-5, foreach=False, fused=False)
    for _ in range(epochs):
        order = th.randperm(len(batch["returns"]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            part = {key: value[rows] if value.ndim else value for key, value in batch.items()}
            loss, _ = agent.loss(part)
            optimizer.zero_grad()
            loss.backward()
            th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()


@pytest.mark.parametrize("cls", [PPO, BPO, R2VPO])
def test_the_fast_update_equals_the_readable_one(cls):
    """Same weights, rollout and shuffles: after 4 epochs of 4 steps the weights agree to 1e-6 and have moved by 1e-3."""
    fast, plain = make(cls), make(cls)
    batch = collected(fast, 256)
    collected(plain, 256)
    before = [p.clone() for p in fast.policy.parameters()]
    th.manual_seed(7)
    fast.update.run(batch, 4)
    th.manual_seed(7)
    reference_run(plain, batch, 4, 64, fast.max_grad_norm)
    ours, theirs = list(fast.policy.parameters()), list(plain.policy.parameters())
    assert max((a - b).abs().max().item() for a, b in zip(before, ours, strict=True)) > 1e-3
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-6


class NoHostReads(TorchDispatchMode):
    """Refuses the operations that make a GPU wait for the host."""

    READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.READS, f"{func} reads a tensor back to the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", [PPO, BPO, R2VPO])
@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_an_update_reads_nothing_back_to_the_host(cls, env):
    """As on a GPU, with its guard. Adam's fused step on the CPU reads its own step count, so it is left out of the watch."""
    agent = cls("MlpPolicy", env, n_steps=256, ent_coef=0.01, seed=0)
    batch = collected(agent, 256)
    agent.update.optimizer.step = lambda: None
    agent.update.guard = DeviceGuard(agent.update.optimizer, agent.device)
    with NoHostReads():
        agent.update.epoch(batch)
        agent.measure(batch)
    assert not agent.update.guard.failed_since()


@pytest.mark.parametrize("cls", [PPO, BPO, R2VPO])
def test_the_guard_of_a_gpu(cls):
    """Nothing is asked in the loop: after the step that is not finite none is taken, and then its term is named."""
    agent = cls("MlpPolicy", "Pendulum-v1", n_steps=256, batch_size=32, n_epochs=3, seed=0)
    agent.update.guard = DeviceGuard(agent.update.optimizer, agent.device)
    batch, plain, states = collected(agent, 256), agent.update.loss, []

    def loss(part):
        states.append([p.detach().clone() for p in agent.policy.parameters()])
        value, info = plain(part)
        if (part["returns"] == batch["returns"][100]).any():
            return value * th.nan, {**info, "value_loss": info["value_loss"] * th.nan}
        return value, info

    agent.update.loss = loss
    with pytest.raises(NonFiniteError, match="The term 'value_loss' of the loss is nan"):
        agent.update.run(batch, 3)
    last = [p.detach() for p in agent.policy.parameters()]
    met = next(i for i, state in enumerate(states) if all(map(th.equal, state, last)))
    assert met < 8  # in the first epoch of eight steps, and from there on nothing moved
    assert all(all(map(th.equal, state, last)) for state in states[met:])
    assert all(p.isfinite().all() for p in last)


def test_the_watch_sees_host_reads():
    with NoHostReads(), pytest.raises(AssertionError, match="host"):
        th.ones(1).item()


def test_flat_adam_equals_adam():
    """Twenty steps, one parameter never reached by the loss."""
    nets = [th.nn.Sequential(th.nn.Linear(3, 5), th.nn.Tanh(), th.nn.Linear(5, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    unused = [th.nn.Parameter(th.ones(3)) for _ in range(2)]
    flat = FlatAdam([*nets[0].parameters(), unused[0]], lr=1e-2, fused=True)
    flat.flatten()
    adam = th.optim.Adam([*nets[1].parameters(), unused[1]], lr=1e-2)
    x, y = th.randn(16, 3), th.randn(16, 2)
    for _ in range(20):
        flat.zero_grad()
        (nets[0](x) - y).square().mean().backward()
        flat.gather()
        flat.step()
        adam.zero_grad()
        (nets[1](x) - y).square().mean().backward()
        adam.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6
    assert th.equal(unused[0], th.ones(3))
    with pytest.raises(RuntimeError, match="once"):
        flat.flatten()


def test_weights_stay_views_of_the_vector_through_loading(tmp_path):
    agent = make(PPO).learn(256)
    agent.save(tmp_path / "model")
    for policy in (agent.policy, PPO.load(tmp_path / "model").policy):
        policy.load_state_dict({k: v + 1.0 for k, v in policy.state_dict().items()})
        assert th.equal(policy.optimizer.flat, th.cat([p.flatten() for p in policy.optimizer.trained]))
    twin = copy.deepcopy(agent.policy)
    observation = np.ones(3, np.float32)
    assert np.array_equal(twin.predict(observation, deterministic=True)[0], agent.predict(observation, deterministic=True)[0])


def test_other_optimisers_are_welcome():
    agent = make(PPO, policy_kwargs={"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}})
    before = [p.clone() for p in agent.policy.parameters()]
    agent.learn(256)
    assert all(not th.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))


def test_minibatches():
    batch = {"x": th.arange(10), "nested": {"y": th.arange(20).reshape(10, 2)}, "scalar": th.tensor(3.0)}
    assert batch_length(batch) == 10
    parts = minibatches(batch, 4)
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert parts[1]["nested"]["y"][0].tolist() == [8, 9]
    assert parts[0]["scalar"].item() == 3.0
    assert map_batch(lambda x: x * 2, batch)["nested"]["y"][9].tolist() == [36, 38]
    assert th.equal(in_chunks(lambda part: part["x"] * 2, batch, size=3), th.arange(10) * 2)


def test_every_sample_is_used_once_an_epoch():
    seen = []
    w = th.nn.Parameter(th.zeros(1))

    def loss(part):
        seen.append(part["x"])
        return (w * part["x"].float()).sum(), {}

    Update(loss, th.optim.SGD([w], lr=0.1), 4, None, th.nn.ParameterList([w])).run({"x": th.arange(12)}, 2)
    epochs = th.cat(seen).reshape(2, 12)
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert not th.equal(epochs[0], epochs[1])


def test_side_by_side_gives_both_results_and_passes_errors_on():
    assert side_by_side(lambda: 1, lambda: 2, threads=True) == (1, 2)
    assert side_by_side(lambda: 1, lambda: 2, threads=False) == (1, 2)

    def broken():
        raise ValueError("of the second")

    with pytest.raises(ValueError, match="of the second"):
        side_by_side(lambda: 1, broken, threads=True)


@pytest.mark.parametrize("cls", [BPO, MDPO, PPO])
@pytest.mark.parametrize("activation", [th.nn.Tanh, th.nn.ReLU])
@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_acting_in_numpy_equals_the_policy(cls, activation, env):
    """The dense sampler against SB3's distribution with the same noise, after the moments have moved."""
    agent = cls(
        "MlpPolicy", env, n_steps=256, seed=0, normalize_observations=True, policy_kwargs={"activation_fn": activation}
    ).learn(512)
    sampler = agent.policy.sampler()
    assert sampler != agent.policy.sample
    observations = np.random.default_rng(0).normal(size=(50, *agent.observation_space.shape)).astype(np.float32)
    noise = agent.policy.draw_noise((50,)).numpy()
    given = observations.copy()
    assert sampler(observations, noise) == pytest.approx(agent.policy.sample(observations, noise), abs=2e-6)
    assert np.array_equal(observations, given), "the environment's own arrays stay as they are"


def test_what_numpy_cannot_do_goes_through_the_policy():
    elu = make(PPO, policy_kwargs={"activation_fn": th.nn.ELU})
    assert elu.policy.sampler() == elu.policy.sample
    elu.learn(256)


@pytest.mark.parametrize(
    ("space", "frequencies"),
    [
        (spaces.Discrete(3), [0.2, 0.3, 0.5]),
        (spaces.MultiDiscrete([2, 3]), [[0.4, 0.6], [0.2, 0.3, 0.5]]),
        (spaces.MultiBinary(2), [0.3, 0.8]),
    ],
)
def test_samples_from_noise_have_the_right_frequencies(space, frequencies):
    """100,000 draws: every probability within 5 standard errors (0.008)."""
    if isinstance(space, spaces.MultiBinary):
        p = th.tensor(frequencies)
        logits = (p / (1 - p)).log()
    else:
        logits = th.cat([th.tensor(f).log() for f in (frequencies if isinstance(frequencies[0], list) else [frequencies])])
    th.manual_seed(0)
    actions = action_distribution(space).proba_distribution(logits.expand(100_000, -1)).sample()
    if isinstance(space, spaces.MultiBinary):
        assert actions.mean(0).tolist() == pytest.approx(frequencies, abs=0.008)
    elif isinstance(space, spaces.Discrete):
        assert (actions.bincount() / 1e5).tolist() == pytest.approx(frequencies, abs=0.008)
    else:
        for column, expected in zip(actions.T, frequencies, strict=True):
            assert (column.bincount() / 1e5).tolist() == pytest.approx(expected, abs=0.008)


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (3,)), spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)]
)
def test_distributions_equal_sb3s(space):
    """log-probability, entropy and mode against SB3's classes on the same parameters."""
    from stable_baselines3.common.distributions import make_proba_distribution

    th.manual_seed(0)
    ours, theirs = action_distribution(space), make_proba_distribution(space)
    width = {"Box": 3, "Discrete": 4, "MultiDiscrete": 5, "MultiBinary": 3}[type(space).__name__]
    parameters = (th.randn(20, width), th.randn(width)) if isinstance(space, spaces.Box) else (th.randn(20, width),)
    ours, theirs = ours.proba_distribution(*parameters), theirs.proba_distribution(*parameters)
    actions = theirs.sample()
    assert ours.log_prob(actions).tolist() == pytest.approx(theirs.log_prob(actions).tolist(), abs=1e-5)
    assert ours.entropy().tolist() == pytest.approx(theirs.entropy().tolist(), abs=1e-5)
    assert th.equal(ours.mode(), theirs.mode())
    again = action_distribution(space).proba_distribution(**ours.parameters)
    assert again.log_prob(actions).tolist() == pytest.approx(ours.log_prob(actions).tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [PPO, BPO, R2VPO, MDPO])
def test_compiled_losses_give_the_same_weights(cls):
    """Two iterations: the same numbers to float32 rounding."""
    plain, compiled = (make(cls, compile_loss=flag).learn(512) for flag in (False, True))
    for a, b in zip(plain.policy.parameters(), compiled.policy.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def no_compiler(batch):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(th, "compile", lambda function: no_compiler)
    agent = make(PPO, compile_loss=True)
    with pytest.warns(UserWarning, match=r"torch.compile failed \(No working C\+\+ compiler found\)") as caught:
        agent.learn(512)
    assert sum("torch.compile" in str(w.message) for w in caught) == 1
    plain = make(PPO).learn(512)
    assert all(th.equal(a, b) for a, b in zip(agent.policy.parameters(), plain.policy.parameters(), strict=True))


@pytest.mark.parametrize("cls", [MDPO, PPO, BPO, R2VPO])
def test_boxes_of_actions_with_several_axes(cls):
    agent = cls("MlpPolicy", Identity(spaces.Box(-1.0, 1.0, (2, 2), np.float32)), n_steps=128, seed=0)
    observation = np.zeros((2, 2), np.float32)
    before = agent.predict(observation, deterministic=True)[0]
    agent.learn(256)
    after = agent.predict(observation, deterministic=True)[0]
    assert before.shape == after.shape == (2, 2)
    assert not np.array_equal(before, after)


def test_an_action_space_without_distribution_is_refused():
    with pytest.raises(ValueError, match="wrap the environment"):
        action_distribution(spaces.Text(3))
