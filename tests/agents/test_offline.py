"""What every offline agent must do: the SB3 habits, exact resume, several seeds at once, data refused in words."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy.stats import ks_2samp
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.kit.offline import SUBJECTS, OneStep, one_step_tasks, pendulum_dataset, random_dataset
from tests.kit.resume import StopAt, difference, everything
from tether.agents import DataError, NonFiniteError
from tether.agents.common import batched
from tether.agents.common.batched import BatchedLinear, BatchedMLP, move_towards, one_by_one
from tether.agents.common.offline_data import OfflineData
from tether.agents.fisor import NoiseNetwork

RANDN, RANDINT, RAND = th.randn, th.randint, th.rand
each = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


# ---------------------------------------------------------------------- learning


@each
def test_learns_one_step_tasks(subject):
    agent = subject.make(**subject.learns).learn_offline(one_step_tasks(), subject.steps)
    states = np.linspace(-0.9, 0.9, 60, dtype=np.float32)[:, None]
    th.manual_seed(0)
    actions = agent.predict(states, deterministic=True)[0]
    assert subject.solved(states[:, 0], actions[:, 0]), np.c_[states, actions][::6].round(2)


@each
def test_same_seed_same_weights(subject):
    runs = [subject.make(seed=s).learn_offline(random_dataset(), 4) for s in (1, 1, 2)]
    first, same, other = map(everything, runs)
    assert difference(first, same) == 0.0
    assert difference(first, other) > 0.0


@each
def test_an_environment_gives_the_spaces_and_takes_the_actions(subject):
    env = make_vec_env("Pendulum-v1", 2)
    agent = subject.make(env=env).learn_offline(pendulum_dataset(), 3)
    actions, _ = agent.predict(np.zeros((5, 3), np.float32))
    assert actions.shape == (5, 1)
    assert np.abs(agent.predict(np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32) * 50)[0]).max() <= 2.0
    returns, _ = evaluate_policy(agent, env, 2)
    assert -2000.0 < returns <= 0.0


def test_bounds_of_actions_come_from_the_data():
    agent = SUBJECTS[0].make().learn_offline(pendulum_dataset(), 1)
    assert agent.action_space == spaces.Box(-2.0, 2.0, (1,), np.float32)
    assert agent.observation_space.shape == (3,)


# ---------------------------------------------------------------------- files


@each
def test_save_and_load(subject, tmp_path):
    agent = subject.make().learn_offline(random_dataset(), 3)
    agent.save(tmp_path / "model")
    loaded = subject.cls.load(tmp_path / "model")
    assert difference(everything(agent), everything(loaded)) == 0.0
    observations = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    th.manual_seed(0)
    expected, _ = agent.predict(observations, deterministic=True)
    th.manual_seed(0)
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    loaded.learn_offline(random_dataset(), 2, reset_num_timesteps=False)
    assert loaded.num_timesteps == 5


@each
def test_an_old_file_still_loads(subject):
    """Written once by `python -m tests.agents.golden.write`; later versions must read it."""
    path = Path(__file__).parent / "golden" / f"{subject.name}.zip"
    agent = subject.cls.load(path, device="cpu")
    th.manual_seed(0)
    actions, _ = agent.predict(np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32), deterministic=True)
    assert np.allclose(actions, np.load(path.with_suffix(".npy")), atol=1e-5)


@each
def test_training_goes_on_bit_for_bit(subject, tmp_path):
    whole = subject.make().learn_offline(random_dataset(), 11)
    half = subject.make()
    half.learn_offline(random_dataset(), 11, callback=StopAt(5))
    assert half.num_timesteps == 5
    half.save_checkpoint(tmp_path)
    th.manual_seed(99)  # what a new process would have instead
    resumed = subject.cls.load_checkpoint(tmp_path, None, device="cpu")
    resumed.learn_offline(random_dataset(), 11 - resumed.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == 11
    assert difference(everything(whole), everything(resumed)) == 0.0


def test_evaluations_in_between_change_nothing(tmp_path):
    """`predict` ends training mode, in which FISOR has dropout: the next step begins it again, also after a resume."""
    subject = next(s for s in SUBJECTS if s.name == "FISOR")

    class Evaluates(BaseCallback):
        def _on_step(self):
            with th.random.fork_rng():
                self.model.predict(np.zeros((1, 3), np.float32))
            assert not self.model.policy.training
            return self.num_timesteps < self.stop

    def evaluates(stop):
        callback = Evaluates()
        callback.stop = stop
        return callback

    plain = subject.make().learn_offline(random_dataset(), 8)
    evaluated = subject.make().learn_offline(random_dataset(), 8, evaluates(99))
    half = subject.make().learn_offline(random_dataset(), 8, evaluates(4))
    half.save_checkpoint(tmp_path)
    resumed = subject.cls.load_checkpoint(tmp_path, None, device="cpu")
    resumed.learn_offline(random_dataset(), 4, reset_num_timesteps=False)
    assert difference(everything(plain), everything(evaluated)) == difference(everything(plain), everything(resumed)) == 0.0


def test_the_log_goes_on_too(tmp_path):
    """A row of the log is a mean over its whole interval, also where a checkpoint lies in it."""
    rows = []

    def values(agent, steps, **kwargs):
        agent.set_logger(configure(str(tmp_path / str(len(rows))), ["csv"]))
        agent.learn_offline(random_dataset(), steps, log_interval=8, **kwargs)
        rows.append(agent.logger.dir)

    subject = SUBJECTS[0]
    values(subject.make(), 8)
    half = subject.make()
    half.learn_offline(random_dataset(), 8, callback=StopAt(5), log_interval=8)
    half.save_checkpoint(tmp_path / "checkpoint")
    values(subject.cls.load_checkpoint(tmp_path / "checkpoint", None, device="cpu"), 3, reset_num_timesteps=False)
    first, second = (np.genfromtxt(f"{row}/progress.csv", delimiter=",", names=True) for row in rows)
    assert float(first["trainactor_loss"]) == pytest.approx(float(second["trainactor_loss"]), rel=1e-6)


# ---------------------------------------------------------------------- several seeds


@each
def test_seeds_side_by_side_are_separate_agents(subject):
    """From equal weights and on equal batches: three at once do what each does alone."""
    together = subject.make(seeds=3)
    together.learn_offline(random_dataset(), 1)
    alone = together.split()
    batches = Batches(together)
    noise = Noise(3)
    for step in range(4):
        together.policy.set_training_mode(False)
        with noise.of(None):
            together.update(batches.all(step), step)
    for k, agent in enumerate(alone):
        prepare_alone(agent, together, k)
        for step in range(4):
            agent.policy.set_training_mode(False)
            with noise.of(k):
                agent.update(batches.one(step, k), step)
    for k, agent in enumerate(together.split()):
        assert difference(everything(agent), everything(alone[k])) < subject.rounding


def prepare_alone(agent, together, k):
    """What `_prepare` gives an agent besides batches."""
    for name in ("_actions", "_neighbour", "threshold", "_guardian", "_world", "_limits"):
        if hasattr(together, name):
            setattr(agent, name, getattr(together, name))


class Batches:
    """The same rows for the agents of all seeds and for one of them."""

    def __init__(self, agent):
        self.data = agent._prepare(OfflineData(random_dataset()))
        self.seeds = agent.seeds

    def _rows(self, step, size):
        generator = th.Generator().manual_seed(step)
        first = next(iter(self.data.values()))
        return RANDINT(len(first), (self.seeds, size), generator=generator)

    def all(self, step):
        return lambda size: {name: values[self._rows(step, size)].clone() for name, values in self.data.items()}

    def one(self, step, k):
        return lambda size: {name: values[self._rows(step, size)[k]][None] for name, values in self.data.items()}


class Noise:
    """Inside `of`, random numbers are those of seed k, or of all seeds stacked."""

    def __init__(self, seeds):
        self.seeds = seeds

    def of(self, k):
        def draw(kind):
            def replacement(*args, device=None, dtype=None, **kwargs):
                if kind.endswith("like"):
                    shape = args[0].shape
                elif kind == "int":
                    shape = args[-1]
                elif kind == "uniform":
                    shape = args
                else:
                    shape = args[0] if isinstance(args[0], (tuple, th.Size)) else args
                whole = (self.seeds, *shape[1:])
                generator = th.Generator().manual_seed(hash((kind, tuple(shape[1:]))) % 2**31)
                if kind == "int":
                    values = RANDINT(args[0], whole, generator=generator)
                else:
                    values = (RAND if kind.startswith("uniform") else RANDN)(whole, generator=generator)
                return values if k is None else values[k : k + 1]

            return replacement

        stack = ExitStack()
        for name, kind in (
            ("randn_like", "like"), ("randn", "shape"), ("randint", "int"), ("rand", "uniform"), ("rand_like", "uniform_like"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(th, name, draw(kind)))
        return stack


@each
def test_split_agents_are_those_of_the_whole(subject):
    together = subject.make(seeds=2, seed=3).learn_offline(random_dataset(), 3)
    with pytest.raises(ValueError, match=r"holds 2 agents side by side: agent.split\(\)"):
        together.predict(np.zeros((1, 3), np.float32))
    first, second = together.split()
    assert (first.seeds, first.seed, second.seed) == (1, 3, 4)
    assert difference(everything(first), everything(second)) > 0.0
    observations = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    assert first.predict(observations)[0].shape == (20, 2)
    first.learn_offline(random_dataset(), 2, reset_num_timesteps=False)


def test_seeds_are_spread_as_separate_runs_are():
    """Equal in distribution: mean and spread of the losses of 24 agents at once, and of 24 runs."""
    subject = SUBJECTS[0]
    together = subject.make(seeds=24).learn_offline(one_step_tasks(300), 30).split()
    alone = [subject.make(seed=100 + k).learn_offline(one_step_tasks(300), 30) for k in range(24)]
    states = np.linspace(-0.9, 0.9, 9, dtype=np.float32)[:, None]
    first, second = (np.stack([a.predict(states)[0][:, 0] for a in agents]) for agents in (together, alone))
    assert min(ks_2samp(first[:, i], second[:, i]).pvalue for i in range(9)) > 1e-3


# ---------------------------------------------------------------------- callbacks and log


class Counter(BaseCallback):
    def __init__(self):
        super().__init__()
        self.steps, self.begun, self.ended = [], 0, 0

    def _on_training_start(self):
        self.begun += 1

    def _on_step(self):
        self.steps.append(self.num_timesteps)
        return True

    def _on_training_end(self):
        self.ended += 1


@each
def test_callbacks_of_sb3(subject, tmp_path):
    counter = Counter()
    env = Monitor(OneStep())
    callbacks = [
        counter,
        CheckpointCallback(4, tmp_path / "sb3"),
        EvalCallback(env, n_eval_episodes=2, eval_freq=5, verbose=0, best_model_save_path=str(tmp_path)),
    ]
    subject.make().learn_offline(one_step_tasks(200), 10, callbacks, progress_bar=True)
    assert counter.steps == list(range(1, 11))
    assert (counter.begun, counter.ended) == (1, 1)
    assert {p.name for p in (tmp_path / "sb3").iterdir()} == {"rl_model_4_steps.zip", "rl_model_8_steps.zip"}
    assert (tmp_path / "best_model.zip").exists()


@each
def test_tensorboard(subject, tmp_path):
    subject.make(tensorboard_log=str(tmp_path)).learn_offline(random_dataset(), 6, log_interval=2)
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/") and tag.endswith("loss")]
    assert losses
    assert [event.step for event in events.Scalars(losses[0])] == [2, 4, 6]


@pytest.mark.parametrize("bar", [False, True])
def test_callbacks_may_be_functions_lists_and_tuples(bar):
    agent, seen = SUBJECTS[0].make(), []
    for callback in (lambda local, _: seen.append(1) or True, [Counter()], (Counter(), Counter())):
        agent.learn_offline(random_dataset(), 2, callback, progress_bar=bar)
    assert len(seen) == 2


@each
def test_policies_are_saved_alone_too(subject, tmp_path):
    agent = subject.make().learn_offline(random_dataset(), 1)
    agent.policy.save(tmp_path / "policy.pth")
    loaded = type(agent.policy).load(tmp_path / "policy.pth", device="cpu")
    assert all(th.equal(a, b) for a, b in zip(agent.policy.parameters(), loaded.parameters(), strict=True))


def test_an_environment_may_come_after_the_data(tmp_path):
    """A dataset knows no bounds of observations; those of the environment take their place."""
    env = make_vec_env("Pendulum-v1", 1)
    agent = SUBJECTS[0].make().learn_offline(pendulum_dataset(), 2)
    agent.save(tmp_path / "model")
    agent.set_env(env)
    for one in (agent, SUBJECTS[0].cls.load(tmp_path / "model", env=env)):
        assert one.observation_space == env.observation_space
        one.learn_offline(pendulum_dataset(), 1, reset_num_timesteps=False)


def test_normalised_environments_are_refused():
    with pytest.raises(ValueError, match="without VecNormalize"):
        SUBJECTS[0].make(env=VecNormalize(make_vec_env("Pendulum-v1", 1)))


def test_what_is_not_built_says_so(tmp_path):
    for use in (lambda agent: agent.save(tmp_path / "model"), lambda agent: agent.predict(np.zeros(3, np.float32))):
        with pytest.raises(ValueError, match="has no networks yet: learn_offline makes them"):
            use(SUBJECTS[0].make())


def test_splitting_leaves_the_random_numbers_alone():
    agent = SUBJECTS[0].make(seeds=2).learn_offline(random_dataset(), 1)
    state = th.get_rng_state()
    agent.split()
    assert th.equal(th.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("FISOR", {"policy_tau": 0.0}), ("FISOR", {"cost_scale": -1.0}), ("FISOR", {"decay_steps": 0}),
        ("FISOR", {"weight_floor": 200.0}), ("FISOR", {"batch_size": 33}), ("FISOR", {"critic_batch_size": 64}),
        ("FISOR", {"expectile": 0.3}), ("CPQ", {"n_samples": 0}), ("CPQ", {"cost_limit": -1.0}),
        ("BCQLag", {"pid": (0.1, 0.2)}), ("TD3BC", {"alpha": 0.0}), ("PRDC", {"beta": float("inf")}),
        ("IQL", {"expectile": 1.0}), ("CQL", {"n_candidates": 0}), ("OGSRL", {"mode": "absorbed"}), ("OGSRL", {"kl": 0.0}),
        ("OGSRL", {"method": "primal"}), ("OGSRL", {"guardian": "forest"}), ("OGSRL", {"horizon": 0}),
        ("OGSRL", {"tightening": 1.0}),
        ("BC", {"batch_size": 0}), ("BC", {"seeds": 0}), ("IQL", {"gamma": 1.0}),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(name, change):
    subject = next(s for s in SUBJECTS if s.name == name)
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[0]):
        subject.make(**change)


def test_learn_points_to_learn_offline():
    with pytest.raises(ValueError, match="call learn_offline"):
        SUBJECTS[0].make().learn(100)


# ---------------------------------------------------------------------- bad data


@each
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"actions": None}, "lacks actions"),
        ({"rewards": np.zeros(3, np.float32)}, "'rewards' has 3 rows and 'observations' 600"),
        ({"observations": np.zeros((600, 4, 4), np.float32)}, "'observations' has the shape"),
        ({"rewards": np.zeros((600, 2), np.float32)}, r"'rewards' has the shape \(600, 2\): it is one number a row"),
        ({"next_observations": np.zeros((600, 4), np.float32)}, r"'next_observations' has the shape \(600, 4\)"),
        ({"actions": np.full((600, 2), 1.5, np.float32)}, r"'actions' leaves \[-1, 1\] in row 0"),
    ],
)
def test_bad_data_is_refused(subject, change, sentence):
    agent = subject.make()
    with pytest.raises(DataError, match=sentence):
        agent.learn_offline(random_dataset() | change, 2)
    assert agent.num_timesteps == 0
    agent.learn_offline(random_dataset(obs_dim=5), 1)  # it has taken nothing over


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "costs"])
def test_the_row_that_is_not_finite_is_named(name):
    dataset = random_dataset()
    dataset[name][17] = np.nan
    with pytest.raises(ValueError, match=f"'{name}' is not finite in row 17"):
        SUBJECTS[0].make().learn_offline(dataset, 2)


def test_other_spaces_are_refused():
    agent = SUBJECTS[0].make().learn_offline(random_dataset(), 1)
    with pytest.raises(ValueError, match=r"actions have the shape \(1,\), and the agent's \(2,\)"):
        agent.learn_offline(random_dataset(action_dim=1), 1)


@each
def test_a_loss_that_is_not_finite_stops_before_the_weights(subject):
    agent = subject.make().learn_offline(random_dataset(), 2)
    dataset = random_dataset()
    dataset["rewards"] *= np.float32(1e30)  # the square of which is infinite
    dataset["meta"] = {"reference_min_return": 0.0, "reference_max_return": 1.0}  # by which IQL and FISOR scale them
    dataset["constraint_values"] = dataset["rewards"]
    if subject.name == "BC":
        agent.actor_loss = lambda batch: (agent.policy.actor(batch["observations"]).sum() * np.inf, {})
    if subject.name == "FlowBC":
        agent.flow_loss = lambda batch: (next(agent.policy.parameters()).sum() * np.inf, {})
    with pytest.raises(NonFiniteError, match=r"at step 2, so training stopped"):
        agent.learn_offline(dataset, 2, reset_num_timesteps=False)
    assert all(bool(value.isfinite().all()) for value in everything(agent).values())


# ---------------------------------------------------------------------- pieces


def test_batched_layers_are_linear_layers():
    layer, x = BatchedLinear(3, 4, 5), th.randn(3, 7, 4)
    for i in range(3):
        one = th.nn.functional.linear(x[i], layer.weight[i].T, layer.bias[i, 0])
        assert th.allclose(layer(x)[i], one, atol=1e-6)


@pytest.mark.parametrize("network", [BatchedMLP(3, 4, (128, 128), 2), NoiseNetwork(3, 4, 2, 5, 128, 2, 0.0)])
def test_networks_one_after_the_other_are_those_side_by_side(network, monkeypatch):
    noise = isinstance(network, NoiseNetwork)
    inputs = (th.randn(3, 600, 4), th.randn(3, 600, 2), th.randint(5, (3, 600))) if noise else (th.randn(3, 600, 4),)
    parameters = list(network.parameters())
    monkeypatch.setattr(batched, "IN_CACHE", np.inf)
    together = network(*inputs)
    monkeypatch.setattr(batched, "IN_CACHE", 0)
    apart = one_by_one(network, *inputs) if noise else network(*inputs)
    assert th.allclose(apart, together, atol=1e-5)
    for one, other in zip(*(th.autograd.grad(y.square().sum(), parameters) for y in (apart, together)), strict=True):
        assert th.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_move_towards():
    target, source = BatchedMLP(1, 2, (3,), 1), BatchedMLP(1, 2, (3,), 1)
    before = [p.clone() for p in target.parameters()]
    move_towards(target, source, 0.25)
    for old, new, goal in zip(before, target.parameters(), source.parameters(), strict=True):
        assert th.allclose(new, 0.75 * old + 0.25 * goal)
