"""GIRL on pictures: the frozen encoders, the student that takes their place, what a replay memory knows of embeddings."""

import copy
import hashlib

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from tests.kit.resume import difference, everything
from tests.kit.worlds import Pictures
from tether.agents import GIRL, save_checkpoint
from tether.agents.girl.drift import Episode
from tether.agents.girl.grounding import Grounding
from tether.agents.girl.latents import CategoricalLatent
from tether.agents.girl.picture_encoders import RESOLUTION, newest_frame, picture_encoder
from tether.agents.girl.replay import SequenceReplay
from tether.agents.girl.student import CHECKED, Student
from tether.experiments.imagination import EpisodeRecorder

SMALL = {
    "batch_size": 2, "batch_length": 6, "horizon": 3, "train_ratio": 3.0, "learning_starts": 30, "pretrain_updates": 1,
    "buffer_size": 300, "warmup_steps": 40, "seed": 0, "device": "cpu",
    "policy_kwargs": {"size": "small", "deter": 16, "hidden": 16, "variables": 4, "classes": 4, "units": 16, "cnn_depth": 4},
}  # fmt: skip


class ChannelsFirst(Pictures):
    """Needs no wrapper, whose copies Python refuses to make."""

    observation_space = spaces.Box(0, 255, (3, 36, 36), np.uint8)

    def _frame(self):
        return super()._frame().transpose(2, 0, 1)


def make(env=None, **kwargs):
    return GIRL("CnnPolicy", env or ChannelsFirst(), **{**SMALL, **kwargs})


@pytest.fixture(scope="module")
def distilled():
    return make(distill=True).learn(60)


def checksum(module):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values())).hexdigest()


class TestEncoders:
    def test_making_one_leaves_random_numbers_alone(self, monkeypatch):
        """Of the GPUs too: the agent that is resumed makes it later than the first did."""
        before, gpus = th.get_rng_state(), []
        monkeypatch.setattr(th.cuda, "manual_seed_all", gpus.append)
        weights = [picture_encoder("random", ["observation"]).network.state_dict() for _ in range(2)]
        assert th.equal(th.get_rng_state(), before)
        assert not gpus
        assert all(th.equal(value, weights[1][name]) for name, value in weights[0].items())

    def test_efficientnet_knows_what_it_sees(self):
        """A shaded disc of orange is a ping-pong ball, a balloon or another of ImageNet's round things to it."""
        network = picture_encoder("efficientnet-lite0", ["observation"]).network.network
        yx = np.mgrid[-1.0:1.0:224j, -1.0:1.0:224j]
        radius = np.hypot(*yx)
        shade = (1.0 - 0.5 * np.hypot(yx[0] + 0.3, yx[1] + 0.3))[..., None]
        picture = np.where((radius < 0.7)[..., None], shade * (255, 140, 0), (40, 90, 40)).clip(0, 255)
        scaled = (th.tensor(picture, dtype=th.float32).movedim(-1, 0) / 255.0 - 0.45) / 0.225
        with th.no_grad():
            best = network(scaled.unsqueeze(0)).topk(3).indices.flatten().tolist()
        assert len(set(best) & {417, 429, 430, 574, 722, 805, 852, 890, 950}) >= 2

    def test_embedding_is_the_mean_of_the_last_feature_map(self):
        encoder = picture_encoder("efficientnet-lite0", ["observation"])
        pictures = th.randint(0, 256, (2, 1, 3, 64, 64), dtype=th.uint8)
        phi = encoder.embed({"observation": pictures})
        resized = th.nn.functional.interpolate(pictures[:, 0].float() / 255.0, (RESOLUTION, RESOLUTION), mode="bilinear")
        normal = (resized - th.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / th.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        with th.no_grad():
            features = encoder.network.network.extract_features(normal)
        assert features.shape == (2, 1280, 3, 3)
        assert phi.shape == (2, encoder.dim) == (2, 1280)
        th.testing.assert_close(phi, features.mean((2, 3)))

    def test_random_control_is_the_same_network_with_other_weights(self):
        trained, random, again = (
            picture_encoder(name, ["observation"]) for name in ("efficientnet-lite0", "random", "random")
        )
        assert [p.shape for p in trained.parameters()] == [p.shape for p in random.parameters()]
        assert checksum(random) == checksum(again) != checksum(trained)
        pictures = th.randint(256, (6, 1, 3, 64, 64), dtype=th.uint8)
        pictures[3:] //= 4  # dark ones
        grounding = Grounding(random.dim, CategoricalLatent(2, 2), 4)
        for encoder in (trained, random):  # as the replay memory keeps it, c tells the pictures from each other
            c = grounding.signal(encoder.embed({"observation": pictures}).half())
            assert c.std(0).mean() > 0.03

    def test_dinov2_from_a_folder(self, tmp_path):
        """A small DINOv2, written by its own library: Phi is its normalised CLS token."""
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
        model.save_pretrained(tmp_path / "small")
        encoder = picture_encoder("dinov2-small", ["left", "right"], str(tmp_path / "small"))
        assert (encoder.dim, encoder.name) == (64, f"dinov2-small from {tmp_path / 'small'}")
        left, right = th.randint(0, 256, (2, 3, 1, 3, 64, 64), dtype=th.uint8)
        phi = encoder.embed({"left": left, "right": right})
        pixels = th.nn.functional.interpolate(right[:, 0].float() / 255.0, (RESOLUTION, RESOLUTION), mode="bilinear")
        with th.no_grad():
            tokens = model((pixels - encoder.mean) / encoder.std).last_hidden_state
        th.testing.assert_close(phi[:, 32:], tokens[:, 0])

    def test_newest_frame(self):
        stacked = th.arange(6).view(1, 6, 1, 1)
        assert newest_frame(stacked).flatten().tolist() == [3, 4, 5]
        assert newest_frame(stacked[:, :4]).flatten().tolist() == [3, 3, 3]

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"grounding": "dinov3"}, "grounding is one of auto, masked-autoencoder, efficientnet-lite0, random"),
            ({"grounding": "masked-autoencoder"}, "there are pictures alone: use grounding='auto'"),
            ({"grounding": "dinov2-small", "encoder_weights": "/nowhere"}, "name it with encoder_weights"),
            ({"encoder_weights": "/nowhere"}, "has no use for it"),
            ({"grounding": None, "distill": True}, "learns from an encoder of pictures"),
        ],
    )
    def test_refusals(self, arguments, sentence):
        with pytest.raises(ValueError, match=sentence):
            make(**arguments)

    def test_no_pictures(self):
        with pytest.raises(ValueError, match="there are none: use 'masked-autoencoder'"):
            GIRL("MlpPolicy", "Pendulum-v1", **{**SMALL, "grounding": "random", "policy_kwargs": {"size": "small"}})


class TestStudent:
    def test_has_as_many_parameters_as_the_specification_says(self):
        assert sum(p.numel() for p in Student(128).parameters()) == 1_214_560

    def test_takes_over_at_the_first_average_below_005_and_goes_back_above_010(self):
        student, average, in_use = Student(4), None, False
        losses = [0.5] * 3 + [0.01] * 400 + [0.3] * 40 + [0.0] * 300
        told = []
        for loss in losses:
            average = loss if average is None else 0.99 * average + 0.01 * loss
            in_use = average <= 0.1 if in_use else average < 0.05
            student.follow(th.tensor(loss), th.ones(1, dtype=th.bool))
            student.follow(th.tensor(0.0), th.zeros(1, dtype=th.bool))  # nothing was known: nothing is learnt from it
            assert bool(student.in_use) == in_use, average
            told.append(in_use)
        assert [told[i] for i in (0, 3, 402, 442, 742)] == [False, False, True, False, True]
        assert float(student.average) == pytest.approx(average, rel=1e-4)

    def test_loss_counts_known_rows_alone(self):
        told, c = th.randn(5, 3, 8), th.randn(5, 3, 8, requires_grad=True)
        known = th.rand(5, 3) < 0.5
        loss = Student.loss(told, c, known)
        assert loss.item() == pytest.approx((told - c).square().mean(-1)[known].mean().item(), rel=1e-5)
        assert not loss.requires_grad  # the target is fixed
        assert Student.loss(told, c, th.zeros(5, 3, dtype=th.bool)).item() == 0.0

    def test_other_sizes_are_resized(self):
        assert Student(128, pictures=2)(th.randint(0, 256, (2, 3, 6, 84, 96), dtype=th.uint8)).shape == (2, 3, 128)

    def test_who_gives_the_signal(self, distilled):
        """The encoder's c before the switch, the student's after it, and the student's of rows without an embedding."""
        agent = copy.deepcopy(distilled)
        batch = agent._draw()
        batch["known"][2] = False
        with th.no_grad():
            student = agent.policy.student(newest_frame(batch["observations"]["observation"]))
            teacher = agent.policy.grounding.signal(batch["embeddings"])
            before = agent.signals.of_batch(batch)
            agent.policy.student.in_use.fill_(True)
            after = agent.signals.of_batch(batch)
        th.testing.assert_close(after, student)
        th.testing.assert_close(before[2], student[2])
        th.testing.assert_close(before[:2], teacher[:2])

    def test_learns_what_the_encoder_says(self, distilled):
        agent = copy.deepcopy(distilled)
        assert 0.0 < float(agent.policy.student.average) < 5.0
        batch = agent._draw()
        losses = [float(agent._distil(batch, True)[1]["distill_loss"]) for _ in range(60)]
        raw = agent.policy.student.loss(
            agent.policy.student(newest_frame(batch["observations"]["observation"])),
            agent.policy.grounding.signal(batch["embeddings"]), batch["known"],
        )  # fmt: skip
        assert float(raw) < 0.5 * losses[0]

    def test_spares_the_encoder_and_comes_back(self, distilled):
        """In use, one new row in sixteen is embedded; when it is not any more, all the others are."""
        agent = copy.deepcopy(distilled)
        memory = agent.replay_buffer
        agent._embed_waiting()
        assert memory.known[: memory.totals[0]].all()
        agent.policy.student.in_use.fill_(True)
        agent.policy.student.average.fill_(-100.0)  # it stays in use
        before = int(memory.totals[0])
        agent.learn(100, reset_num_timesteps=False)
        rows = np.arange(before, memory.totals[0] - 1)  # the last one may come after the last update
        assert memory.known[rows, 0].tolist() == (rows % CHECKED == 0).tolist()
        agent.policy.student.in_use.fill_(False)
        agent._embed_waiting()
        assert memory.known[: memory.totals[0]].all()

    def test_everything_is_saved(self, distilled, tmp_path):
        distilled.save(tmp_path / "agent.zip")
        loaded = GIRL.load(tmp_path / "agent.zip", device="cpu")
        assert checksum(loaded.policy) == checksum(distilled.policy)
        assert loaded.signals._of_pictures is None  # made again when it is needed, and not in the file
        assert loaded.grounding_name == "efficientnet-lite0"


def test_frozen_encoder_stays_as_it_is(distilled):
    agent = copy.deepcopy(distilled)
    before = checksum(agent.signals.encoder)
    agent.policy.set_training_mode(True)
    agent.improve(3)
    assert not any(p.requires_grad for p in agent.signals.encoder.parameters())
    assert checksum(agent.signals.encoder) == before
    assert agent.policy.grounding.psi[1].weight.grad is not None  # Psi learns, from the KL


def test_recorded_pictures_have_their_channels_first(distilled):
    recorder = EpisodeRecorder(distilled)
    evaluate_policy(distilled, Monitor(Pictures()), 1, callback=recorder)
    [episode] = recorder.episodes
    (picture,) = distilled.policy.parts.values()
    (seen,) = episode.observations.values()
    assert seen.shape[1:] == picture.shape
    assert np.isfinite(distilled.measure_drift([episode], 3).dfm(3))


def test_drift_of_pictures(distilled):
    frames = np.random.default_rng(0).integers(0, 256, (12, 3, 36, 36), dtype=np.uint8)

    drift = distilled.measure_drift([Episode({"observation": frames}, np.eye(3, dtype=np.float32)[np.zeros(11, int)])], 5)
    assert set(drift.kl) == {"real", "predicted", "none"}
    assert all(np.isfinite(values).all() and (values >= 0.0).all() for values in drift.kl.values())


def test_replay_knows_which_rows_have_an_embedding():
    space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    replay = SequenceReplay(40, space, space, "cpu", 2, action_dim=1, embedding_dim=3)

    def add(steps):
        for _ in range(steps):
            x = np.zeros((2, 1), np.float32)
            replay.add(x, x, x, np.zeros(2), np.array([False, False]), [{}, {}])

    add(4)
    env, number = replay.waiting()
    assert (env.tolist(), number.tolist()) == ([0] * 5 + [1] * 5, [*range(5)] * 2)
    replay.set_embeddings(env, number, th.ones(10, 3))
    add(4)
    env, number = replay.waiting(4)
    assert (env.tolist(), number.tolist()) == ([0, 0, 1, 1][::2], [8, 8])
    replay.set_embeddings(env, number, th.ones(2, 3))
    add(1)
    env, number = replay.waiting()
    assert number.tolist() == [5, 6, 7, 9] * 2
    replay.set_embeddings(env, number, th.ones(8, 3))
    assert replay.waiting()[0].numel() == 0
    add(40)  # round the ring: none of these is known
    assert not replay.known.any()


def test_resumed_equals_uninterrupted(tmp_path):
    """With a student in use, rows without an embedding and half of an episode behind it."""
    def begun():
        agent = make(distill=True, env=DummyVecEnv([ChannelsFirst])).learn(45)
        agent.policy.student.in_use.fill_(True)
        agent.policy.student.average.fill_(-100.0)
        return agent

    whole = begun().learn(40, reset_num_timesteps=False)
    stopped = begun().learn(17, reset_num_timesteps=False)
    save_checkpoint(stopped, tmp_path)
    resumed = GIRL.load_checkpoint(tmp_path, DummyVecEnv([ChannelsFirst]), device="cpu")
    assert not resumed.replay_buffer.known[: resumed.replay_buffer.totals[0]].all()
    resumed.learn(85 - resumed.num_timesteps, reset_num_timesteps=False)
    assert difference(everything(whole), everything(resumed)) == 0.0
    th.testing.assert_close(whole.replay_buffer.known, resumed.replay_buffer.known)
    th.testing.assert_close(whole.replay_buffer.embeddings, resumed.replay_buffer.embeddings)
