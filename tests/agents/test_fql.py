"""FQL, QC and flow BC: their losses from their parts, and where their gradients go."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th

from tests.kit.offline import random_dataset
from tether.agents import FQL, QC, FlowBC
from tether.agents.common.chunks import chunks_of
from tether.agents.common.flow import euler_flow, interpolated
from tether.agents.common.offline_data import OfflineData

SMALL = {"seed": 0, "device": "cpu", "batch_size": 8, "horizon": 2}


def trained(cls, steps=5, **kwargs):
    policy_kwargs = {"net_arch": [16], "flow_steps": 4, **kwargs.pop("policy_kwargs", {})}
    return cls(**SMALL, policy_kwargs=policy_kwargs, **kwargs).learn_offline(random_dataset(), steps)


def with_invalid_rows():
    chunks = chunks_of(OfflineData(random_dataset()), 2, 0.99)
    batch = {name: values[None, :8].clone() for name, values in chunks.items()}
    batch["valid"][:, 4:, 1] = 0.0
    return batch


def flow_loss_by_hand(flow, batch, seed):
    """Row by row: squares of valid actions over all of the batch's entries."""
    th.manual_seed(seed)
    actions = batch["actions"]
    noise, time = th.randn_like(actions), th.rand(*actions.shape[:2], 1)
    total = 0.0
    for row in range(actions.shape[1]):
        x, velocity = interpolated(noise[:, row : row + 1], actions[:, row : row + 1], time[:, row : row + 1])
        error = flow(batch["observations"][:, row : row + 1], x, time[:, row : row + 1]) - velocity
        for step in range(2):
            if batch["valid"][0, row, step]:
                total += error[0, 0, 2 * step : 2 * step + 2].square().sum()
    return total / actions.numel()


@pytest.mark.parametrize("cls", [QC, FlowBC])
def test_flow_matching_counts_valid_actions_only(cls):
    agent = trained(cls)
    batch = with_invalid_rows()
    expected = flow_loss_by_hand(agent.policy.flow, batch, 3).item()
    th.manual_seed(3)
    loss = (agent.flow_loss if cls is FlowBC else agent.offline_actor_loss)(batch)[0]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_fql_loss_from_its_parts():
    agent = trained(FQL, alpha=7.0)
    policy, batch = agent.policy, with_invalid_rows()
    expected = flow_loss_by_hand(policy.flow, batch, 3)
    noise = th.randn_like(batch["actions"])
    chosen = policy.actor(batch["observations"], noise)
    teacher = euler_flow(policy.flow, batch["observations"], noise, 4)
    expected = expected + 7.0 * (chosen - teacher).square().mean()
    expected = expected - policy.critics(batch["observations"], chosen.clamp(-1.0, 1.0)).mean()
    th.manual_seed(3)
    assert agent.offline_actor_loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_fql_trains_the_flow_by_imitation_alone():
    """With alpha and values without weight on it: the flow's gradient is that of flow matching."""
    agent = trained(FQL, alpha=7.0)
    batch = agent._draw(8)
    agent.policy.zero_grad()
    th.manual_seed(3)
    agent.offline_actor_loss(batch)[0].backward()
    expected = th.autograd.grad(flow_loss_by_hand(agent.policy.flow, batch, 3), list(agent.policy.flow.parameters()))
    for parameter, gradient in zip(agent.policy.flow.parameters(), expected, strict=True):
        assert th.allclose(parameter.grad, gradient, atol=1e-6)
    assert all(p.grad is None for p in agent.policy.critics.parameters())
    assert all(p.grad.abs().sum() > 0 for p in agent.policy.actor.parameters())


@pytest.mark.parametrize(("cls", "inference", "calls"), [(QC, "plain", 10), (QC, "best-of-n", 320), (FQL, "plain", 1)])
def test_network_calls(cls, inference, calls):
    agent = cls(**SMALL, policy_kwargs={"net_arch": [8], "inference": inference}).learn_offline(random_dataset(), 1)
    before = agent.policy.network_calls
    agent.predict(np.zeros(3, np.float32))
    assert agent.policy.network_calls - before == calls


def test_best_of_n_takes_the_best():
    agent = trained(QC, policy_kwargs={"n_candidates": 6})
    policy, observations = agent.policy, th.randn(1, 5, 3)
    th.manual_seed(0)
    best = policy.best_of(observations, 6)
    th.manual_seed(0)
    repeated = observations.repeat_interleave(6, 1)
    samples = policy.sample(repeated, th.randn(1, 30, 4))
    q = policy.critics(repeated, samples).mean(1).view(5, 6)
    assert th.equal(best[0], samples.view(5, 6, 4)[th.arange(5), q.argmax(1)])
    assert best.abs().max() <= 1.0


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (FQL, {"alpha": -1.0}), (QC, {"policy_kwargs": {"flow_steps": 0}}), (QC, {"policy_kwargs": {"inference": "qgbs"}}),
        (QC, {"policy_kwargs": {"n_candidates": 0}}), (FlowBC, {"horizon": 0}),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(cls, change):
    name, value = next(iter(change.items()))
    word = next(iter(value)) if isinstance(value, dict) else name
    with pytest.raises(ValueError, match=word):
        cls(**change).learn_offline(random_dataset(), 1)
