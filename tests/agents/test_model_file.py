"""Model files: SB3's layout, nothing in them that runs, and clear words for what cannot be loaded."""

import io
import json
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import data_to_json, load_from_zip_file
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

import tether.agents
from tests.kit.agents import SUBJECTS
from tests.kit.resume import difference, everything
from tether.agents import BPO, MDPO, PPO, ModelFileError
from tether.agents.common import plain
from tether.agents.common.model_file import read_model

OBSERVATIONS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
GOLDEN = Path(__file__).parent / "golden"


class Payload:
    """Pickled, it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def rewritten(path: Path, **members: bytes) -> None:
    """Replace members of a model's file and give it the checksum that an attacker would give it."""
    import hashlib

    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
        comment = archive.comment
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (contents | members).items():
            archive.writestr(name, content)
        archive.comment = comment
    body = file.getvalue()[:-64]
    path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())


def data_of(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    PPO("MlpPolicy", "Pendulum-v1", n_steps=64, policy_kwargs={"net_arch": [4]}, seed=0).learn(64).save(tmp_path / "it")
    return tmp_path / "it.zip"


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
class TestEveryAgent:
    def test_sb3_reads_it(self, subject, tmp_path: Path):
        agent = subject.make(subject.world).learn(300)
        agent.save(tmp_path / "it")
        data, params, _ = load_from_zip_file(tmp_path / "it", device="cpu")
        assert data["num_timesteps"] == agent.num_timesteps
        assert set(params) == set(agent.get_parameters())
        other = subject.make(subject.world, seed=9)
        BaseAlgorithm.set_parameters(other, str(tmp_path / "it.zip"))
        assert difference(everything(agent), everything(other)) == 0.0

    def test_nothing_in_it_is_pickled(self, subject, tmp_path: Path):
        subject.make(subject.world).learn(300).save(tmp_path / "it")
        assert not any(isinstance(value, dict) and ":serialized:" in value for value in data_of(tmp_path / "it.zip").values())
        with zipfile.ZipFile(tmp_path / "it.zip") as archive:
            for name in archive.namelist():
                if name.endswith(".pth"):  # torch's own format
                    th.load(io.BytesIO(archive.read(name)), weights_only=True)
                else:
                    assert b"\x80\x04" not in archive.read(name)  # where a pickle begins

    def test_sb3_compatible(self, subject, tmp_path: Path):
        agent = subject.make(subject.world).learn(300)
        agent.save(tmp_path / "it", sb3_compatible=True)
        theirs = BaseAlgorithm.load.__func__(subject.cls, tmp_path / "it", device="cpu")  # as SB3's own classes load it
        ours = subject.cls.load(tmp_path / "it", device="cpu", trust=True)
        for loaded in (theirs, ours):
            assert difference(everything(agent), everything(loaded)) == 0.0
        with pytest.raises(ModelFileError, match="load it with trust=True"):
            subject.cls.load(tmp_path / "it")

    def test_streams(self, subject):
        agent = subject.make(subject.world)
        for compatible in (False, True):
            file = io.BytesIO()
            agent.save(file, sb3_compatible=compatible)
            file.seek(0)
            assert difference(everything(agent), everything(subject.cls.load(file, trust=compatible))) == 0.0

    def test_golden_file_of_format_1(self, subject):
        """Files written by released versions must load for ever; `golden/write.py` made them."""
        loaded = subject.cls.load(GOLDEN / f"{subject.name}.zip", device="cpu")
        expected = np.load(GOLDEN / f"{subject.name}.npy")
        np.testing.assert_allclose(loaded.predict(OBSERVATIONS, deterministic=True)[0], expected, rtol=1e-5)


class TestSafety:
    def test_pickled_field(self, saved: Path, tmp_path: Path):
        payload = data_to_json({"observation_space": Payload(tmp_path / "mark")})
        rewritten(saved, data=json.dumps(data_of(saved) | json.loads(payload)).encode())
        with pytest.raises(ModelFileError, match="'observation_space' is pickled: if you trust the file's origin"):
            PPO.load(saved)
        assert not (tmp_path / "mark").exists()
        space = PPO("MlpPolicy", "Pendulum-v1").observation_space
        assert PPO.load(saved, custom_objects={"observation_space": space}).observation_space == space

    def test_pickled_weights(self, saved: Path, tmp_path: Path):
        rewritten(saved, **{"policy.pth": pickle.dumps(Payload(tmp_path / "mark"))})
        with pytest.raises(ModelFileError, match="is not a saved model, or is damaged"):
            PPO.load(saved)
        file = io.BytesIO()
        th.save({"weight": Payload(tmp_path / "mark")}, file)
        rewritten(saved, **{"policy.pth": file.getvalue()})
        with pytest.raises(ModelFileError, match="is not a saved model, or is damaged"):
            PPO.load(saved)
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "builtins.eval", "torch.nn.Linear", 3, None, ["x"]])
    def test_names_are_looked_up_and_nothing_is_imported(self, saved: Path, name):
        for value in ({"type": "name", "name": name}, {"type": "object", "class": name, "state": {}}):
            rewritten(saved, data=json.dumps(data_of(saved) | {"policy_kwargs": value}).encode())
            with pytest.raises(ModelFileError, match=r"is not known here|makes no object"):
                PPO.load(saved)

    @pytest.mark.parametrize("value", [
        {"type": "array", "dtype": "|O", "shape": [1], "data": "AAAA"},
        {"type": "array", "dtype": "<f4", "shape": [10**6, 10**6], "fill": "AAAAAA=="},
        {"type": "array", "dtype": "<f4", "shape": [7], "data": "AAAAAA=="},
        {"type": "array"}, {"type": "nothing"}, {"type": "float", "value": "one"}, {"type": "policy", "name": "Other"},
        {"type": "object", "class": "Box", "state": {"low": 1}}, {"type": "dict", "items": 5}, {"type": ["x"]},
    ], ids=str)  # fmt: skip
    def test_data_that_is_no_object(self, saved: Path, value):
        for key in ("observation_space", "policy_class"):
            rewritten(saved, data=json.dumps(data_of(saved) | {key: value}).encode())
            with pytest.raises(ModelFileError):
                PPO.load(saved)

    @pytest.mark.parametrize("attributes", [
        {"n_envs": 10**15}, {"n_steps": "many"}, {"policy_kwargs": {"net_arch": [10**9, 10**9]}}, {"policy_kwargs": 5},
        {"gamma": {}}, {"learning_rate": "fast"}, {"device": "moon"}, {"policy": 3}, {"_setup_model": 3}, {"train": {"a": 1}},
    ], ids=str)  # fmt: skip
    def test_attributes_that_no_agent_has(self, saved: Path, attributes):
        """They are refused, or have no effect: never another exception."""
        rewritten(saved, data=json.dumps(data_of(saved) | attributes).encode())
        with suppress(ModelFileError):
            PPO.load(saved, device="cpu").predict(OBSERVATIONS)

    def test_a_file_of_sb3_asks_for_trust(self, tmp_path: Path):
        SB3PPO("MlpPolicy", "Pendulum-v1", device="cpu").save(tmp_path / "theirs")
        with pytest.raises(ModelFileError, match=r"theirs holds pickled objects, .* load it with trust=True"):
            PPO.load(tmp_path / "theirs")
        with pytest.raises(ModelFileError, match=r"No GIRL .* policy is stable_baselines3.common.policies.ActorCriticPoli"):
            tether.agents.GIRL.load(tmp_path / "theirs", trust=True)

    def test_cloudpickled_lambda_of_a_stranger(self, saved: Path, tmp_path: Path):
        mark = tmp_path / "mark"
        code = cloudpickle.dumps(Payload(mark))
        import base64

        field = {":type:": "function", ":serialized:": base64.b64encode(code).decode()}
        with zipfile.ZipFile(saved) as archive:
            weights = {n: archive.read(n) for n in archive.namelist() if n.endswith(".pth")}
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
            archive.writestr("data", json.dumps({"learning_rate": field}))
            for name, content in weights.items():
                archive.writestr(name, content)
        for name in ("evil", "evil.zip"):
            with pytest.raises(ModelFileError, match="trust=True"):
                PPO.load(tmp_path / name)
        assert not mark.exists()


class Wide(th.nn.Module):
    """An activation of the user's."""

    def forward(self, x):
        return x.tanh() * 1.5


def falling(progress: float) -> float:
    return 1e-3 * progress


class TestUsersOwn:
    def test_a_lambda_is_left_out_and_asked_for(self, tmp_path: Path):
        agent = PPO("MlpPolicy", "Pendulum-v1", learning_rate=lambda progress: 1e-3 * progress)
        with pytest.warns(UserWarning, match="learning_rate is not in the saved model: .*<lambda>"):
            agent.save(tmp_path / "it")
        with pytest.raises(ModelFileError, match=r"load it with custom_objects=\{'learning_rate': ...\}"):
            PPO.load(tmp_path / "it")
        loaded = PPO.load(tmp_path / "it", custom_objects={"learning_rate": 5e-4})
        assert loaded.lr_schedule(0.5) == 5e-4
        agent.save(tmp_path / "theirs", sb3_compatible=True)
        assert PPO.load(tmp_path / "theirs", trust=True).lr_schedule(0.5) == 5e-4

    def test_schedules_of_sb3(self, tmp_path: Path):
        PPO("MlpPolicy", "Pendulum-v1", learning_rate=LinearSchedule(1e-3, 0.0, 0.5)).save(tmp_path / "it")
        assert PPO.load(tmp_path / "it").lr_schedule(0.75) == pytest.approx(5e-4)

    def test_classes_and_functions_are_registered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for table in ("_NAMED", "_NAMES", "_FORMS"):
            monkeypatch.setattr(plain, table, dict(getattr(plain, table)))
        agent = PPO("MlpPolicy", "Pendulum-v1", learning_rate=falling, policy_kwargs={"activation_fn": Wide})
        with pytest.warns(UserWarning, match="not plain data"):
            agent.save(tmp_path / "before")
        assert tether.agents.register(Wide) is Wide
        tether.agents.register(falling, "my falling rate")
        agent.save(tmp_path / "after")
        loaded = PPO.load(tmp_path / "after")
        assert isinstance(loaded.policy.mlp_extractor.policy_net[1], Wide)
        assert loaded.lr_schedule(0.5) == 5e-4
        del plain._NAMED["my falling rate"]
        with pytest.raises(ModelFileError, match=r"'my falling rate' is not known here: import it and call"):
            PPO.load(tmp_path / "after")

    def test_a_policy_of_ones_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for table in ("_NAMED", "_NAMES"):
            monkeypatch.setattr(plain, table, dict(getattr(plain, table)))

        @tether.agents.register
        class Mine(PPO.policy_aliases["MlpPolicy"]):
            pass

        PPO(Mine, "Pendulum-v1").save(tmp_path / "it")
        assert type(PPO.load(tmp_path / "it").policy) is Mine

    def test_what_cannot_be_registered(self):
        with pytest.raises(plain.PlainDataError, match="register takes a class or a function"):
            tether.agents.register(3)


class TestFiles:
    def test_normaliser_travels_inside(self, tmp_path: Path):
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0), clip_obs=5.0, gamma=0.9)
        MDPO("MlpPolicy", env, n_steps=128).learn(256).save(tmp_path / "it")
        loaded = MDPO.load(tmp_path / "it", env=make_vec_env("Pendulum-v1", 4))
        ours = loaded.get_vec_normalize_env()
        assert (ours.clip_obs, ours.gamma, ours.num_envs) == (5.0, 0.9, 4)
        np.testing.assert_array_equal(ours.obs_rms.mean, env.obs_rms.mean)
        assert (ours.obs_rms.count, ours.ret_rms.var) == (env.obs_rms.count, env.ret_rms.var)
        own = VecNormalize(make_vec_env("Pendulum-v1", 2))
        assert MDPO.load(tmp_path / "it", env=own).get_vec_normalize_env() is own  # the user's own stays

    def test_another_class(self, saved: Path):
        with pytest.raises(ModelFileError, match=r"holds a tether.PPO: load it with that class, not with tether.BPO"):
            BPO.load(saved)

    def test_a_subclass_reads_its_parent(self, saved: Path):
        class Mine(PPO):
            pass

        assert type(Mine.load(saved)) is Mine

    def test_attributes_can_be_set_at_loading(self, saved: Path):
        assert PPO.load(saved, learning_rate=1e-2).lr_schedule(1.0) == 1e-2
        with pytest.raises(ValueError, match="policy_kwargs are those of the saved networks"):
            PPO.load(saved, policy_kwargs={"net_arch": [99]})

    def test_missing_file(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError):
            PPO.load(tmp_path / "nothing")

    def test_other_spaces(self, saved: Path):
        with pytest.raises(ValueError, match="spaces do not match"):
            PPO.load(saved, env=make_vec_env("CartPole-v1"))

    def test_a_later_format(self, saved: Path):
        rewritten(saved, **{"tether.json": json.dumps({"format": 99, "classes": ["tether.PPO"]}).encode()})
        with pytest.raises(ModelFileError, match="has format 99, and this Tether reads 1: update Tether"):
            PPO.load(saved)

    def test_exclude_and_include(self, tmp_path: Path):
        agent = PPO("MlpPolicy", "Pendulum-v1", seed=3)
        agent.save(tmp_path / "it", exclude=["seed"], include=["_last_episode_starts"])
        assert "seed" not in data_of(tmp_path / "it.zip")
        assert "_last_episode_starts" in data_of(tmp_path / "it.zip")

    def test_a_changed_file(self, saved: Path):
        with zipfile.ZipFile(saved, "a") as archive:
            archive.writestr("more", "of it")
        with pytest.raises(ModelFileError, match="is damaged, or was changed since it was written"):
            PPO.load(saved)
        assert PPO.load(saved, trust=True).num_timesteps == 64

    def test_system_info(self, saved: Path, capsys):
        PPO.load(saved, print_system_info=True)
        said = capsys.readouterr().out
        assert "SAVED MODEL SYSTEM INFO" in said
        assert said.count("Stable-Baselines3") == 2

    def test_read_model_is_what_the_agent_is(self, saved: Path):
        file = read_model(saved)
        assert file.classes[0] == "tether.PPO"
        assert file.data["n_steps"] == 64
