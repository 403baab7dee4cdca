"""What every agent must do to be usable in an SB3 project, on every agent of the kit."""

import io
import json
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tests.kit.agents import SUBJECTS
from tests.kit.worlds import DictIdentity, Identity, Pictures

SPACES = {
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
}

pytestmark = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


def weights(agent):
    return th.cat([p.detach().flatten() for p in agent.policy.parameters()])


@pytest.mark.parametrize("name", SPACES)
def test_learns_the_identity_or_refuses_the_space(subject, name):
    space = SPACES[name]
    if not isinstance(space, subject.spaces):
        with pytest.raises(AssertionError, match=type(space).__name__):
            subject.make(Identity(space))
        return
    agent = subject.make(Identity(space), **subject.learns)
    before = evaluate_policy(agent, Monitor(Identity(space)), 20)[0]
    agent.learn(subject.steps)
    after = evaluate_policy(agent, Monitor(Identity(space)), 20)[0]
    assert after > subject.score, f"mean return {after:.2f} of 10 (before: {before:.2f})"


def test_same_seed_same_weights(subject):
    runs = [subject.make(subject.world, seed=s).learn(300) for s in (1, 1, 2)]
    assert th.equal(weights(runs[0]), weights(runs[1]))
    assert not th.equal(weights(runs[0]), weights(runs[2]))


def test_save_and_load(subject, tmp_path):
    env = make_vec_env(subject.world, 1)
    agent = subject.make(env).learn(300)
    agent.save(tmp_path / "model")
    observations = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    expected, _ = agent.predict(observations, deterministic=True)
    for loaded in (subject.cls.load(tmp_path / "model"), subject.cls.load(tmp_path / "model", env=env)):
        assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)
        for name, parameters in agent.get_parameters().items():
            theirs = loaded.get_parameters()[name]
            assert set(parameters) == set(theirs)
            if not name.endswith("optimizer"):
                assert all(th.equal(parameters[k], theirs[k]) for k in parameters), name
    loaded.learn(200, reset_num_timesteps=False)  # and it can go on
    assert loaded.num_timesteps >= 500


def test_optimizers_are_saved(subject, tmp_path):
    agent = subject.make(subject.world).learn(300)
    agent.save(tmp_path / "model")
    loaded = subject.cls.load(tmp_path / "model")
    for name, parameters in agent.get_parameters().items():
        if name.endswith("optimizer"):
            state, theirs = parameters["state"], loaded.get_parameters()[name]["state"]
            assert state, f"{name} has no state after training"
            assert all(th.equal(state[i]["exp_avg"], theirs[i]["exp_avg"]) for i in state)


def test_set_parameters(subject):
    first, second = subject.make(subject.world).learn(300), subject.make(subject.world, seed=5)
    second.set_parameters(first.get_parameters())
    assert th.equal(weights(first), weights(second))


def test_saved_file_keeps_sb3s_layout(subject):
    file = io.BytesIO()
    subject.make(subject.world).save(file)
    with zipfile.ZipFile(file) as archive:
        assert {"data", "policy.pth", "_stable_baselines3_version"} <= set(archive.namelist())
        data = json.loads(archive.read("data"))
    assert {"observation_space", "action_space", "n_envs", "policy_class"} <= set(data)
    assert not {"actor", "critic", "rollout", "replay_buffer", "env"} & set(data)


def test_prediction_shapes(subject):
    agent = subject.make(subject.world)
    single, _ = agent.predict(np.zeros(3, np.float32))
    batch, _ = agent.predict(np.zeros((5, 3), np.float32))
    assert (single.shape, batch.shape) == (((), (5,)) if subject.discrete else ((1,), (5, 1)))
    assert np.array_equal(*(agent.predict(np.ones(3, np.float32), deterministic=True)[0] for _ in range(2)))
    draws = {float(np.squeeze(agent.predict(np.ones(3, np.float32))[0])) for _ in range(20)}
    assert len(draws) > 1 or subject.discrete, "actions are sampled; Q-learning explores only while it learns"


def test_actions_stay_in_the_box(subject):
    agent = subject.make(subject.world).learn(300)
    observations = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32) * 50
    assert np.abs(agent.predict(observations)[0]).max() <= 2.0, "indices of the three torques are below 3"


def test_several_environments(subject):
    agent = subject.make(make_vec_env(subject.world, 3)).learn(600)
    assert agent.num_timesteps >= 600
    assert agent.env.num_envs == 3


def test_dict_observations(subject):
    agent = subject.make(DictIdentity(), policy="MultiInputPolicy").learn(300)
    action, _ = agent.predict(DictIdentity().reset()[0])
    assert action.shape == ()


def test_images(subject):
    agent = subject.make(Pictures(), policy="CnnPolicy", policy_kwargs={}, **(
        {"buffer_size": 200} if "buffer_size" in subject.small else {}
    )).learn(140)  # fmt: skip
    assert agent.predict(Pictures().reset()[0])[0].shape == ()


def test_sb3_callbacks_run_unchanged(subject, tmp_path):
    agent = subject.make(subject.world)
    evaluation = EvalCallback(
        Monitor(gym.make(subject.world)), n_eval_episodes=1, eval_freq=150, best_model_save_path=str(tmp_path),
        log_path=str(tmp_path), verbose=0,
    )  # fmt: skip
    checkpoint = CheckpointCallback(150, str(tmp_path), save_replay_buffer="buffer_size" in subject.small)
    agent.learn(1_000, callback=[evaluation, checkpoint, StopTrainingOnMaxEpisodes(2)])
    assert agent.num_timesteps == 400
    assert (tmp_path / "best_model.zip").is_file()
    assert (tmp_path / "rl_model_300_steps.zip").is_file()
    assert len(np.load(tmp_path / "evaluations.npz")["timesteps"]) == 2


def test_vecnormalize_around_the_environment(subject):
    env = VecNormalize(make_vec_env(subject.world, 2))
    agent = subject.make(env).learn(300)
    assert agent.get_vec_normalize_env() is env
    env.training = False
    assert np.isfinite(evaluate_policy(agent, env, 2)[0])


def test_set_env_and_continue(subject):
    agent = subject.make(subject.world).learn(150)
    agent.set_env(DummyVecEnv([lambda: gym.make(subject.world)]))
    agent.learn(150, reset_num_timesteps=False)
    assert agent.num_timesteps >= 256


def test_train_and_eval_mode(subject):
    """Dropout is on while learning and off while acting."""
    if not subject.activations:
        pytest.skip(f"{subject.name} has its own activations")
    modes = []

    class Look(th.nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x.tanh()

    agent = subject.make(subject.world, policy_kwargs={"net_arch": [16], "activation_fn": Look})
    agent.predict(np.zeros(3, np.float32))
    assert set(modes) == {False}
    modes.clear()
    agent.learn(200)
    assert set(modes) == {True, False}


def test_tensorboard_and_progress_bar(subject, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent = subject.make(subject.world, tensorboard_log=str(tmp_path))
    if hasattr(agent, "anchor_interval"):
        agent.anchor_interval = 100
    agent.learn(850, progress_bar=True)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"{subject.name}_1"
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"rollout/ep_rew_mean", "train/learning_rate"} <= tags
    assert not subject.trust_region or {"train/trust_region", "train/trust_region_bound"} <= tags
    assert all(np.isfinite(e.value) for tag in tags for e in events.Scalars(tag))


def test_environments_of_the_kit_are_valid(subject):
    for space in SPACES.values():
        check_env(Identity(space), warn=False)
    check_env(DictIdentity(), warn=False)
    check_env(Pictures(), warn=False, skip_render_check=True)
