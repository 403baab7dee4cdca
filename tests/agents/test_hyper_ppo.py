"""HyperPPO: the paper's network, the four presets, the bound of the feature while training, and its losses."""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from tests.kit.worlds import DictIdentity, Pictures
from tether.agents import HyperPPO
from tether.agents.common.embedding import Embedding
from tether.agents.common.flat_adam import FlatAdam
from tether.agents.common.hyperbolic import BallPointRegression, HyperboloidRegression, PoincareRegression
from tether.agents.common.normalization import RewardScaler
from tether.agents.common.updates import minibatches


class ProcgenLike(Pictures):
    """ProcGen's shapes without its programs: 64 x 64 pictures, 15 actions."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Discrete(15)

    def _frame(self):
        return np.kron(super()._frame()[:32, :32], np.ones((2, 2, 1), np.uint8))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def tiny(**kwargs):
    arguments = {"n_steps": 64, "seed": 0, "device": "cpu", **kwargs}
    return HyperPPO("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), **arguments)


def collected(agent):
    agent._setup_learn(10_000)
    callback = agent._init_callback(None)
    agent.collect_rollouts(agent.env, callback)
    schedules = {key: th.tensor(value) for key, value in agent.schedules().items()}
    return agent._rollout_batch() | schedules


class TestThePublishedNetwork:
    def test_parameters(self):
        agent = HyperPPO("CnnPolicy", ProcgenLike(), device="cpu")
        policy = agent.policy
        assert parameters(policy) == 165_379
        assert parameters(policy.features_extractor) == 163_201
        assert (parameters(policy.action_net), parameters(policy.value_net)) == (495, 1_683)
        assert [tuple(p.shape) for p in policy.action_net.parameters()] == [(15, 32), (15, 1)]

    def test_defaults_are_the_papers(self):
        agent = HyperPPO("CnnPolicy", make_vec_env(ProcgenLike, 64), device="cpu")
        assert (agent.n_steps, agent.minibatch_size(), agent.n_epochs) == (256, 2048, 2)
        assert (agent.gamma, agent.gae_lambda) == (0.999, 0.95)
        assert (agent.ent_coef, agent.vf_coef, agent.max_grad_norm) == (0.01, 0.5, 0.5)
        optimizer = agent.policy.optimizer
        assert isinstance(optimizer, FlatAdam)
        assert (optimizer.defaults["lr"], optimizer.defaults["eps"]) == (5e-4, 1e-5)
        assert (agent.normalize_rewards, agent.reward_scaler.clip, agent.reward_scaler.gamma) == (True, 10.0, 0.999)

    def test_initial_state(self):
        """Near-uniform policy and values near zero, without a small-weight initialisation."""
        th.manual_seed(0)
        agent = HyperPPO("CnnPolicy", ProcgenLike(), device="cpu", seed=0)
        images = th.randint(0, 256, (64, 3, 64, 64), dtype=th.uint8)
        with th.no_grad():
            embedded, distribution, outputs = agent.policy.outputs_at(images)
            values = agent.policy.predict_values(images)
        assert embedded.gate.mean().item() == pytest.approx(0.5, abs=0.1)
        assert embedded.x.norm(dim=1).mean().item() == pytest.approx(0.6, abs=0.15)
        assert distribution.entropy().min() > 0.99 * math.log(15)
        assert agent.policy.value_net.value.loss(outputs, th.zeros(64)).item() == pytest.approx(3.93, abs=0.1)
        assert (values.shape, values.dtype) == ((64, 1), th.float32)
        assert values.abs().max() < 1.0

    def test_heads_compute_in_float64_from_float32(self):
        """The float64 head, rounded, is what the policy gives; a float32 head would differ."""
        agent = tiny()
        x = th.randn(50, 32)
        head = agent.policy.action_net
        exact = head.double()(x.double())
        assert th.equal(head.float()(x), exact.float())

    def test_sb3_methods_give_values_not_logits(self):
        agent = tiny()
        observations = th.randn(5, 4)
        actions, values, log_prob = agent.policy(observations)
        again, log_prob_again, entropy = agent.policy.evaluate_actions(observations, actions)
        assert values.shape == again.shape == (5, 1)
        assert th.allclose(values, again)
        assert th.allclose(log_prob, log_prob_again)
        assert entropy.shape == (5,)
        assert th.allclose(agent.policy.values_at(observations), values.flatten())


VARIANTS = {
    "hyper++": (HyperboloidRegression, "rms_norm", 1.3951),
    "hyper++-poincare": (PoincareRegression, "rms_norm", 1.3951),
    "s-rym": (BallPointRegression, "spectral_norm", math.inf),
    "unregularized": (BallPointRegression, "none", math.inf),
    "euclidean": (th.nn.Linear, "none", math.inf),
}


@pytest.mark.parametrize("name", VARIANTS)
class TestVariants:
    def make(self, name, **kwargs):
        return tiny(**HyperPPO.VARIANTS[name], **kwargs)

    def test_is_what_it_says(self, name):
        head, regularization, bound = VARIANTS[name]
        agent = self.make(name)
        embedding = agent.policy.features_extractor
        assert type(agent.policy.action_net) is head
        assert embedding.regularization == regularization
        assert embedding.bound == pytest.approx(bound, abs=1e-4)
        assert agent.n_epochs == (2 if name.startswith("hyper++") else 3)

    def test_learns_and_is_saved(self, name, tmp_path):
        agent = self.make(name).learn(256)
        agent.save(tmp_path / "it")
        loaded = HyperPPO.load(tmp_path / "it", device="cpu")
        observations = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
        assert np.array_equal(*(a.predict(observations, deterministic=True)[0] for a in (agent, loaded)))
        a, b = (x.policy.predict_values(th.as_tensor(observations)) for x in (agent, loaded))
        assert th.equal(a, b)
        policy = type(agent.policy)(**agent.policy._get_constructor_parameters())
        policy.load_state_dict(agent.policy.state_dict())

    def test_the_ratio_starts_at_one(self, name):
        agent = self.make(name)
        batch = collected(agent)
        log_prob = agent._evaluate(batch["observations"], batch["actions"])[0]
        assert th.allclose(log_prob, batch["old_log_prob"], atol=1e-6)
        _, info = agent.loss(minibatches(batch, agent.minibatch_size())[0])
        advantages = agent.standardized(batch["advantages"][: agent.minibatch_size()])
        assert info["policy_gradient_loss"].item() == pytest.approx(-advantages.mean().item(), abs=1e-6)

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_no_nan_whatever_the_scale_of_the_inputs(self, name, scale):
        """And where the feature is bounded, it keeps its bound in every minibatch of the training."""
        env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0), norm_obs=False, norm_reward=False)
        env.normalize_obs = lambda observation: (scale * observation).astype(np.float32)  # type: ignore[method-assign]
        agent = HyperPPO("MlpPolicy", env, n_steps=64, seed=0, device="cpu", learning_rate=1e-2, **HyperPPO.VARIANTS[name])
        largest = []
        record = agent._record_update
        agent._record_update = lambda info, batch: (largest.append(info["embedding_norm_max"].item()), record(info, batch))
        agent.learn(1_024)
        assert all(p.isfinite().all() for p in agent.policy.parameters())
        assert len(largest) == 8
        assert max(largest) <= agent.policy.features_extractor.bound + 1e-6


class TestLosses:
    def test_value_loss_is_that_of_its_name(self):
        for kind, outputs in (("hl_gauss", 51), ("two_hot", 51), ("mse", 1)):
            agent = tiny(value_loss=kind)
            batch = collected(agent)
            _, _, made = agent.policy.outputs_at(batch["observations"])
            assert made.shape == (128, outputs)
            expected = agent.policy.value_net.value.loss(made, batch["returns"])
            assert agent.value_loss(made, batch).item() == expected.item()

    def test_total(self):
        """L = L_pi - c_e H + c_v L_V, recomputed from its parts."""
        agent = tiny(ent_coef=0.03, vf_coef=0.7)
        batch = collected(agent)
        loss, info = agent.loss(batch)
        entropy = agent._evaluate(batch["observations"], batch["actions"])[1].mean()
        expected = info["policy_gradient_loss"] - 0.03 * entropy + 0.7 * info["value_loss"]
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)

    def test_old_values_are_expectations(self):
        agent = tiny()
        batch = collected(agent)
        with th.no_grad():
            _, _, outputs = agent.policy.outputs_at(batch["observations"])
        assert th.allclose(batch["old_values"], agent.policy.value_net.value.expectation(outputs), atol=1e-6)
        assert th.allclose(batch["returns"], batch["advantages"] + batch["old_values"])

    def test_group_norms_add_up(self, tmp_path):
        agent = tiny(max_grad_norm=1e9)
        logged = {}
        record = agent._record_update
        agent._record_update = lambda info, batch: (logged.update(info), record(info, batch))
        agent.batch_size = agent.n_steps * agent.n_envs
        agent.n_epochs = 1
        agent._setup_model()
        agent.learn(128)
        total = math.hypot(logged["grad_norm_encoder"].item(), logged["grad_norm_head"].item())
        assert logged["grad_norm"].item() == pytest.approx(total, rel=1e-5)

    def test_mse_is_halved_as_in_the_authors_code(self):
        agent = tiny(value_loss="mse")
        batch = collected(agent)
        _, _, outputs = agent.policy.outputs_at(batch["observations"])
        half = 0.5 * (agent.policy.values_at(batch["observations"]) - batch["returns"]).square().mean()
        assert agent.value_loss(outputs, batch).item() == pytest.approx(half.item(), rel=1e-6)


def test_gradients_of_the_whole_chain_in_float64():
    """u to logits through norm, gate, exponential map and heads, against finite differences of the loss."""
    embedding = Embedding(spaces.Box(-1.0, 1.0, (6,)), 4, trunk_kwargs={"widths": (5,), "activation_fn": th.nn.Tanh}).double()
    heads = [HyperboloidRegression(4, 3).double(), PoincareRegression(4, 3).double()]
    x = th.randn(3, 6, dtype=th.float64, generator=th.Generator().manual_seed(0)).requires_grad_()
    for head in heads:
        th.autograd.gradcheck(lambda x, head=head: head(embedding(x)), (x,), rtol=1e-6, atol=1e-9)


def test_reward_of_one_without_discount_is_clipped():
    """The documented edge: a constant return has no spread, so its scaled reward is the clip."""
    scaler = RewardScaler(4, gamma=0.0)
    for _ in range(3):
        scaled = scaler.scale(th.ones(50, 4), th.zeros(50, 4, dtype=th.bool))
    assert (scaled == 10.0).all()


def test_minibatches_follow_the_rollout():
    assert HyperPPO("MlpPolicy", "CartPole-v1", device="cpu").minibatch_size() == 32
    assert tiny(n_steps=50).minibatch_size() == 10  # of 100 samples, the largest divisor up to 12
    with pytest.raises(ValueError, match="no divisor near an eighth"):
        HyperPPO("MlpPolicy", "CartPole-v1", n_steps=13, device="cpu")


def test_dicts_and_images(tmp_path):
    agent = HyperPPO("MultiInputPolicy", DictIdentity(), n_steps=32, device="cpu", policy_kwargs={"net_arch": [8]}).learn(64)
    assert agent.policy.features_extractor.bound == pytest.approx(1.3951, abs=1e-4)
    kwargs = {"features_extractor_kwargs": {"trunk_kwargs": {"channels": (4, 4)}}}
    agent = HyperPPO("CnnPolicy", make_vec_env(Pictures, 2), n_steps=32, device="cpu", policy_kwargs=kwargs).learn(64)
    assert agent.rollout.observations.dtype == th.uint8
    assert not agent.policy.normalize_images


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"geometry": "sphere"}, "geometry must be one of hyperboloid"),
        ({"poincare_head": "lines"}, "poincare_head must be one of hyperplanes"),
        ({"curvature": 0.0}, "curvature is c > 0"),
        ({"value_loss": "c51"}, "value_loss must be one of"),
        ({"regularization": "batch_norm"}, "regularization must be one of"),
        ({"alpha": 1.5}, "0 < alpha < 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"use_sde": True}, "no state-dependent exploration"),
    ],
)
def test_refuses_in_words(kwargs, word):
    with pytest.raises(ValueError, match=word):
        tiny(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"share_features_extractor": False}, "share their encoder"),
        ({"net_arch": {"pi": [64], "vf": [64]}}, "net_arch is a list of the trunk's widths"),
    ],
)
def test_refuses_policy_arguments_in_words(kwargs, word):
    with pytest.raises(ValueError, match=word):
        tiny(policy_kwargs=kwargs)


def test_another_optimizer_would_leave_the_ball():
    with pytest.raises(ValueError, match="needs Riemannian Adam"):
        tiny(**HyperPPO.VARIANTS["s-rym"], policy_kwargs={"optimizer_class": th.optim.SGD})
    assert isinstance(tiny(policy_kwargs={"optimizer_class": th.optim.SGD}).policy.optimizer, th.optim.SGD)


def test_widths_are_for_vectors():
    with pytest.raises(ValueError, match="net_arch and activation_fn are for vectors"):
        HyperPPO("CnnPolicy", Pictures(), device="cpu", policy_kwargs={"net_arch": [64]})


@pytest.mark.parametrize("name", ["s-rym", "unregularized"])
def test_resumes_exactly_with_points_in_the_ball(name, tmp_path):
    from tests.kit.resume import StopAt, difference, everything

    whole = tiny(**HyperPPO.VARIANTS[name]).learn(512)
    stopped = tiny(**HyperPPO.VARIANTS[name]).learn(512, callback=StopAt(200))
    stopped.save_checkpoint(tmp_path)
    agent = HyperPPO.load_checkpoint(tmp_path, make_vec_env("CartPole-v1", 2, seed=0), device="cpu")
    agent.learn(512 - agent.num_timesteps, reset_num_timesteps=False)
    assert difference(everything(agent), everything(whole)) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_learns_cart_pole(name):
    """Random play lasts about 20 steps; the last hundred episodes of training lasted 113 to 365 over four seeds of each
    variant. The final policy's own episodes say less: their means lie anywhere from 120 to 500."""
    from tether.experiments.presets import build_arguments, preset

    arguments = {**build_arguments("HyperPPO", preset("HyperPPO", "CartPole-v1")), **HyperPPO.VARIANTS[name], "n_epochs": 20}
    agent = HyperPPO("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=0), seed=0, device="cpu", **arguments).learn(40_000)
    assert np.mean([episode["r"] for episode in agent.ep_info_buffer]) > 80
