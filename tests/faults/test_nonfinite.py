"""A number that is not finite, in every place where one may come up: named, stopped before the weights, reported."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from tests.kit.agents import SUBJECTS
from tests.kit.resume import difference, everything
from tether.agents import BPO, MDPO, R2VPO, NonFiniteError, OffPolicyMDPO
from tether.agents.common.agent import SKIPS
from tether.envs import make_vec
from tether.experiments.cli import main

every_agent = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


class Faulty(gym.Env):
    """That whose seed ends in ``faulty`` gives a value that is not finite at its 150th step; with ``once``, only there."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, what: str = "nothing", dtype: str = "float32", faulty: int = 1, once: bool = True) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.dtype(dtype).type)
        self.what, self.faulty, self.once = what, faulty, once
        self.count, self.mine = 0, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.mine = self.mine or (seed is not None and seed % 10 == self.faulty)
        return self._observe(), {}

    def _observe(self):
        return self.np_random.normal(size=2).astype(self.observation_space.dtype)

    def step(self, action):
        self.count += 1
        now = self.mine and (self.count == 150 if self.once else self.count >= 150)
        observation, reward, done = self._observe(), 0.5, self.count % 16 == 0
        if now and self.what in ("observation", "terminal observation"):
            observation[1] = np.nan
        if now and self.what == "huge observation":
            observation[1] = 1e39
        if now and self.what == "reward":
            reward = -np.inf
        truncated = done or (now and self.what == "terminal observation")
        return observation, reward, False, truncated, {}


gym.register("FaultTest/Faulty-v0", f"{Faulty.__module__}:Faulty")


def vec(what: str, **kwargs):
    return make_vec_env(lambda: Faulty(what, **kwargs), 3, seed=10)


def small(subject, env, **kwargs):
    return subject.make(env, **kwargs)


class TestEnvironments:
    @every_agent
    @pytest.mark.parametrize(
        ("what", "name", "value"),
        [
            ("observation", "observation", "nan"),
            ("reward", "reward", "-inf"),
            ("terminal observation", "terminal observation", "nan"),
        ],
    )
    def test_the_environment_is_named(self, subject, what, name, value, tmp_path: Path):
        agent = small(subject, vec(what))
        agent.set_logger(configure(str(tmp_path), []))
        with pytest.raises(
            NonFiniteError, match=rf"^The {name} of env 1 is {value} at step 450, so training stopped"
        ) as caught:
            agent.learn(2_000)
        assert all(value.isfinite().all() for value in everything(agent).values())
        assert caught.value.report == tmp_path / "nonfinite-450.npz"
        with np.load(caught.value.report) as report:
            assert not np.isfinite(report[name]).all()
        assert "env 1" in json.loads((tmp_path / "nonfinite-450.json").read_text())["error"]

    @every_agent
    def test_too_large_for_the_networks(self, subject):
        agent = small(subject, vec("huge observation", dtype="float64"))
        with pytest.raises(NonFiniteError, match="The observation of env 1 is inf at step 450"):
            agent.learn(2_000)

    @every_agent
    def test_nothing_of_it_is_stored(self, subject):
        agent = small(subject, vec("observation"))
        with pytest.raises(NonFiniteError):
            agent.learn(2_000)
        replay = getattr(agent, "replay_buffer", None)
        if replay is not None:
            if hasattr(replay, "next_observations"):
                assert replay.pos == 149
                assert np.isfinite(replay.next_observations).all()
            else:  # a row for every episode's first observation besides
                assert replay.pos == 149 + replay.first[:, 0].sum()
                assert replay.observations["observation"].isfinite().all()

    def test_in_a_half_of_the_environments(self):
        agent = BPO("MlpPolicy", make_vec("CartPole-v1", 4, halves=True), n_steps=32, batch_size=32, device="cpu")
        second = agent.env.halves[1]
        original = type(second).step_wait

        def broken(self):
            observations, rewards, dones, infos = original(self)
            if self is second:
                rewards = rewards.copy()
                rewards[1] = np.nan
            return observations, rewards, dones, infos

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(second), "step_wait", broken)
            with pytest.raises(NonFiniteError, match="The reward of env 3 is nan at step 4"):
                agent.learn(100)
        agent.learn(100)  # nothing is under way any more


def poison(agent, method: str, at: int, how) -> None:
    """Change what a loss gives at its ``at``-th call."""
    original, calls = getattr(agent, method), [0]

    def changed(*args):
        calls[0] += 1
        result = original(*args)
        return how(*result) if calls[0] == at else result

    if hasattr(agent, "update"):
        agent.update.loss = changed
    elif method == "policy_loss":
        agent.policy_update.loss = changed
    elif method == "value_loss":
        agent.value_update.loss = changed
    else:
        setattr(agent, method, changed)


def nan_term(loss, info):
    return loss * th.nan, {**info, "value_loss": info["value_loss"] * th.nan}


def bad_gradient(loss, info):
    """The loss is finite, its gradient is not."""
    x = loss * 0.0
    return loss + th.sqrt(x.abs()).where(x < 0, x), info


LOSSES = [(BPO, "loss"), (R2VPO, "loss"), (MDPO, "value_loss"), (OffPolicyMDPO, "critic_loss")]


def agent_of(cls, **kwargs):
    small = {"buffer_size": 500, "learning_starts": 20, "batch_size": 16} if cls is OffPolicyMDPO else {"n_steps": 128}
    return cls("MlpPolicy", vec("nothing"), seed=0, device="cpu", policy_kwargs={"net_arch": [8]}, **small, **kwargs)


class TestLosses:
    @pytest.mark.parametrize(("cls", "method"), LOSSES, ids=lambda v: getattr(v, "__name__", v))
    def test_the_term_is_named(self, cls, method, tmp_path: Path):
        agent = agent_of(cls)
        agent.set_logger(configure(str(tmp_path), []))
        poison(agent, method, 7, nan_term)
        with pytest.raises(
            NonFiniteError, match=r"^The term 'value_loss' of the loss is nan at step \d+, so training stopped"
        ):
            agent.learn(3_000)
        assert all(value.isfinite().all() for value in everything(agent).values())
        with np.load(next(tmp_path.glob("nonfinite-*.npz"))) as report:
            assert np.isfinite(report["observations"]).all()  # the batch is there to be looked at
            assert len(report["observations"]) > 1

    @pytest.mark.parametrize(("cls", "method"), LOSSES, ids=lambda v: getattr(v, "__name__", v))
    def test_the_parameter_is_named(self, cls, method):
        agent = agent_of(cls)
        poison(agent, method, 7, bad_gradient)
        with pytest.raises(NonFiniteError, match=r"^The gradient of '[\w.]+' is nan at step \d+, so training stopped"):
            agent.learn(3_000)
        assert all(value.isfinite().all() for value in everything(agent).values())

    def test_weights_are_those_before_the_step(self):
        agents = [agent_of(BPO), agent_of(BPO)]
        for agent in agents:
            poison(agent, "loss", 1, nan_term)
        with pytest.raises(NonFiniteError):
            agents[0].learn(384)
        agents[1]._setup_learn(384)
        assert difference(everything(agents[0]), everything(agents[1])) == 0.0

    @every_agent
    def test_actions_of_broken_weights(self, subject):
        agent = small(subject, vec("nothing"), **({"learning_starts": 0} if "buffer_size" in subject.small else {}))
        with th.no_grad():
            for parameter in agent.policy.parameters():
                parameter.fill_(th.nan)
        # The index of the largest NaN is an action like any other: the first loss tells.
        where = "The term 'loss' of the loss is nan" if subject.discrete else "The action of env 0 is nan at step 0"
        with pytest.raises(NonFiniteError, match=where):
            agent.learn(500)

    @every_agent
    def test_broken_weights_are_not_saved(self, subject, tmp_path: Path):
        agent = small(subject, vec("nothing")).learn(300)
        agent.save_checkpoint(tmp_path)
        with th.no_grad():
            next(iter(agent.policy.parameters()))[0] = th.inf
        with pytest.raises(NonFiniteError, match="has values that are not finite"):
            agent.save_checkpoint(tmp_path)
        assert len(list(tmp_path.glob("0*"))) == 1


class TestSkip:
    @every_agent
    @pytest.mark.parametrize("what", ["observation", "reward"])
    def test_episodes_are_begun_anew(self, subject, what, caplog):
        agent = small(subject, vec(what))
        agent.on_nonfinite = "skip"
        agent.learn(1_500)
        assert agent.num_timesteps >= 1_500
        assert caplog.text.count("which is skipped") == 1
        assert all(value.isfinite().all() for value in everything(agent).values())

    @pytest.mark.parametrize(("cls", "method"), LOSSES, ids=lambda v: getattr(v, "__name__", v))
    def test_an_update_is_left_out(self, cls, method, caplog):
        agent = agent_of(cls)
        agent.on_nonfinite = "skip"
        poison(agent, method, 7, nan_term)
        agent.learn(2_000)
        assert caplog.text.count("The term 'value_loss' of the loss is nan") == 1
        assert all(value.isfinite().all() for value in everything(agent).values())

    @pytest.mark.parametrize("cls", [BPO, OffPolicyMDPO])
    def test_not_for_ever(self, cls, caplog):
        agent = agent_of(cls)
        agent.on_nonfinite = "skip"

        def fail(*_, **__):
            raise NonFiniteError("The loss is nan", "mend it")

        agent.train = fail
        with pytest.raises(NonFiniteError, match="The loss is nan at step"):
            agent.learn(100_000)
        assert caplog.text.count("which is skipped") == SKIPS

    def test_environments_that_stay_broken(self):
        agent = agent_of(BPO)
        agent.set_env(vec("reward", once=False))
        agent.on_nonfinite = "skip"
        with pytest.raises(NonFiniteError):
            agent.learn(100_000)

    def test_another_word(self):
        agent = agent_of(BPO)
        agent.set_env(vec("reward"))
        agent.on_nonfinite = "ignore"
        with pytest.raises(ValueError, match="on_nonfinite must be 'stop' or 'skip', not 'ignore'"):
            agent.learn(2_000)


def words(agent: str, out: Path, *more: str) -> list[str]:
    text = "what=reward once=true"
    return [
        "train", agent, "--env", "FaultTest/Faulty-v0", "--backend", "dummy", "--n-envs", "2", "--seed", "10",
        "--steps", "600",
        "--eval-every", "200", "--eval-episodes", "1", "--checkpoint-every", "0.001", "--out", str(out), "--env-kwargs",
        *text.split(), *more, "--hp", "policy_kwargs.net_arch=[8]", "n_steps=32", "batch_size=32",
    ]  # fmt: skip


class TestCommand:
    def test_stop(self, tmp_path: Path, capsys):
        assert main(words("BPO", tmp_path)) == 2
        said = capsys.readouterr().err
        assert "tether: The reward of env 1 is -inf at step 300, so training stopped before it could reach the weights" in said
        folder = tmp_path / "FaultTest--Faulty-v0/BPO/seed-10"
        assert (folder / "nonfinite-300.npz").is_file()
        assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
        assert list((folder / "checkpoint").glob("0*"))

    def test_skip(self, tmp_path: Path, capsys):
        assert main(words("BPO", tmp_path, "--on-nonfinite", "skip")) == 0

    @pytest.mark.parametrize("agent", ["BPO", "SB3-PPO"])
    def test_rollback(self, agent, tmp_path: Path, capsys):
        """The environment breaks at its own 150th step, whatever the actions: after some rollbacks the sentence comes."""
        assert main(words(agent, tmp_path, "--on-nonfinite", "rollback")) == 2
        streams = capsys.readouterr()
        assert streams.out.count("Going back to the last checkpoint, with other random numbers.") == 5
        assert "The reward of env 1 is -inf at step 300" in streams.err

    def test_peers_cannot_skip(self, tmp_path: Path, capsys):
        assert main(words("SB3-PPO", tmp_path, "--on-nonfinite", "skip")) == 2
        assert "--on-nonfinite of SB3-PPO is one of stop, rollback, not 'skip'" in capsys.readouterr().err
