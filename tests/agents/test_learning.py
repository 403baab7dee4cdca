"""Learning on real tasks: slow, and no proof of the mathematics - that is what the other tests are for."""

import pytest
from stable_baselines3.common.evaluation import evaluate_policy

from tether.agents import MDPO, OffPolicyMDPO
from tether.envs import make_vec

pytestmark = pytest.mark.slow


def final_return(agent, env_id):
    return evaluate_policy(agent, make_vec(env_id, 4, seed=100), 20)[0]


def test_mdpo_balances_the_pole():
    agent = MDPO("MlpPolicy", make_vec("CartPole-v1", 8, seed=0), n_steps=64, learning_rate=1e-3, seed=0)
    agent.learn(20_000)
    assert final_return(agent, "CartPole-v1") > 450.0


@pytest.mark.parametrize("tsallis_q", [1.0, 1.5])
def test_off_policy_mdpo_swings_the_pendulum_up(tsallis_q):
    """Random actions get about -1,200; a policy that swings up and holds, better than -250."""
    agent = OffPolicyMDPO(
        "MlpPolicy", make_vec("Pendulum-v1", seed=0), learning_rate=1e-3, learning_starts=500, tsallis_q=tsallis_q,
        anchor_interval=250, batch_size=128, policy_kwargs={"net_arch": [64, 64]}, seed=0, device="cpu",
    )  # fmt: skip
    agent.learn(8_000)
    assert final_return(agent, "Pendulum-v1") > -250.0
