"""A vector environment in two halves: for everybody the same as a whole one, and stepped alternately by our agents."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from tether.agents import MDPO, PPO
from tether.envs import make_vec
from tether.envs.halves import HalvesVecEnv

pytest.importorskip("envpool")
ENV = "Hopper-v4"


class Numbered(gym.Env):
    """Knows its number."""

    observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    render_mode = None

    def __init__(self, number: int) -> None:
        self.number = number

    def twice(self) -> int:
        return 2 * self.number


@pytest.fixture
def pair():
    """A whole vector environment and one in halves, both with the same seeds."""
    envs = [make_vec(ENV, 4, seed=3, backend="envpool", halves=halves) for halves in (False, True)]
    yield envs
    for env in envs:
        env.close()


def test_steps_are_those_of_the_whole(pair):
    whole, halves = pair
    assert isinstance(halves, HalvesVecEnv)
    assert halves.observation_space == whole.observation_space
    assert np.array_equal(whole.reset(), halves.reset())
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(200):
        actions = rng.uniform(-1, 1, (4, 3)).astype(np.float32)
        ours, theirs = halves.step(actions), whole.step(actions)
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            assert np.array_equal(a, b)
        for i in np.flatnonzero(ours[2]):
            ended += 1
            assert ours[3][i]["episode"]["r"] == theirs[3][i]["episode"]["r"]
            assert np.array_equal(ours[3][i]["terminal_observation"], theirs[3][i]["terminal_observation"])
    assert ended > 4


def test_a_rollout_in_halves_is_the_same_rollout(pair):
    """Environments, noise and weights equal: what the engine stores agrees to float32 rounding of the matrix products."""
    rollouts = []
    for env in pair:
        agent = PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0, normalize_observations=True)
        agent.learn(256)
        rollouts.append(agent.rollout)
    assert rollouts[0].actions.numpy() == pytest.approx(rollouts[1].actions.numpy(), abs=1e-3)
    assert np.array_equal(rollouts[0].dones, rollouts[1].dones)
    first = slice(0, 8)  # later steps carry rounding through the physics
    assert rollouts[0].observations[first].numpy() == pytest.approx(rollouts[1].observations[first].numpy(), abs=1e-5)
    assert rollouts[0].rewards[first] == pytest.approx(rollouts[1].rewards[first], abs=1e-5)


def test_same_seed_same_weights():
    weights = []
    for _ in range(2):
        env = make_vec(ENV, 4, seed=0, backend="envpool", halves=True)
        agent = MDPO("MlpPolicy", env, n_steps=64, seed=0).learn(1024)
        weights.append(th.cat([p.flatten() for p in agent.policy.parameters()]))
        env.close()
    assert th.equal(*weights)


def test_episodes_of_both_halves_are_counted_once(tmp_path):
    env = make_vec(ENV, 4, seed=0, backend="envpool", halves=True, monitor_file=tmp_path / "monitor.csv")
    seen = []

    class Episodes(BaseCallback):
        def _on_step(self) -> bool:
            assert len(self.locals["infos"]) == len(self.locals["dones"]) == len(self.locals["rewards"]) == 4
            seen.extend(info["episode"]["r"] for info in self.locals["infos"] if "episode" in info)
            return True

    PPO("MlpPolicy", env, n_steps=128, batch_size=64, n_epochs=1, seed=0).learn(1024, callback=Episodes())
    env.close()
    table = load_results(str(tmp_path))
    assert len(seen) > 20
    assert sorted(table["r"]) == pytest.approx(sorted(seen), abs=1e-5)


def test_a_callback_may_stop_between_the_halves():
    """What is under way is taken in, so that training can go on from the environments as they are."""

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls % 10 != 0

    env = make_vec(ENV, 4, seed=0, backend="envpool", halves=True)
    agent = PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0)
    agent.learn(256, callback=Stop())
    assert agent.num_timesteps == 40
    agent.learn(256, reset_num_timesteps=False)
    assert agent.num_timesteps == 512  # 40 + 256, and the rollout that this falls into
    env.close()


def test_ordinary_tools_take_it_for_an_ordinary_environment(recwarn):
    env = make_vec(ENV, 4, seed=0, backend="envpool", halves=True)
    assert env.env_is_wrapped(Monitor) == [True] * 4
    assert env.get_attr("render_mode", [0, 3]) == [None, None]
    with pytest.raises(AttributeError, match="no attribute 'state'"):
        env.get_attr("state")
    agent = PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0)
    evaluate_policy(agent, env, 2)
    assert not [w for w in recwarn if "Monitor" in str(w.message)]
    wrapped = PPO("MlpPolicy", VecNormalize(env), n_steps=64, batch_size=64, n_epochs=1, seed=0)
    wrapped.learn(256)  # a wrapper hides the halves: they are stepped together, through it
    assert wrapped.get_env().obs_rms.count > 200
    env.close()


def test_where_there_are_no_halves():
    for kwargs in ({"backend": "dummy"}, {"n_envs": 3, "backend": "envpool"}, {"backend": "envpool", "normalize": True}):
        env = make_vec(ENV, **{"n_envs": 4, "halves": True, "seed": 0, **kwargs})
        assert not isinstance(env, HalvesVecEnv)
        env.close()
    a, b = make_vec("CartPole-v1", 2, backend="dummy"), make_vec("Pendulum-v1", 2, backend="dummy")
    with pytest.raises(ValueError, match="equal observation and action spaces"):
        HalvesVecEnv(a, b)


def test_seeds_go_on_over_the_halves():
    env = make_vec("Pendulum-v1", 2, backend="dummy")
    halves = HalvesVecEnv(VecMonitor(make_vec("Pendulum-v1", 1, backend="dummy")), make_vec("Pendulum-v1", 1, backend="dummy"))
    env.seed(5)
    halves.seed(5)
    assert np.array_equal(env.reset(), halves.reset())


def test_answers_come_in_the_order_asked():
    halves = HalvesVecEnv(*(DummyVecEnv([lambda i=i: Numbered(i) for i in part]) for part in ((0, 1), (2, 3))))
    assert halves.get_attr("number", [3, 0, 2]) == [3, 0, 2]
    assert halves.env_method("twice", indices=[2, 1]) == [4, 2]
    halves.set_attr("number", 9, [1, 2])
    assert halves.get_attr("number") == [0, 9, 9, 3]


def test_what_a_callback_keeps_stays_as_it_was():
    kept = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            kept.append([self.locals[key] for key in ("new_obs", "rewards", "dones")])
            return True

    env = make_vec(ENV, 4, seed=0, backend="envpool", halves=True)
    agent = PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0)
    agent.learn(128, callback=Keep())
    for t in range(31):
        assert np.array_equal(kept[t][0], agent.rollout.observations[t + 1].numpy())
        assert np.array_equal(kept[t][1], agent.rollout.rewards[t])
    first = kept[0][1].copy()
    agent.learn(128, reset_num_timesteps=False)
    assert np.array_equal(kept[0][1], first)
    env.close()
