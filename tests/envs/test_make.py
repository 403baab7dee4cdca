"""`make_env`, `list_envs` and every sentence with which they refuse."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env

from tether.envs import EnvError, list_envs, make_env, make_vec
from tether.envs.procgen import build


class Corridor(gym.Env):
    """A user's own environment, with float64 observations."""

    observation_space = spaces.Box(-1, 1, (2,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 3, render_mode: str | None = None) -> None:
        self.length, self.render_mode = length, render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.ones(2), float(self.length), False, False, {}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    gym.register("Corridor-v0", entry_point=Corridor, max_episode_steps=5)
    yield
    del gym.registry["Corridor-v0"]


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Humanoid-v5", "CartPole-v1", "dm_control/walker-walk-v0"])
def test_sb3_accepts_it(env_id: str) -> None:
    env = make_env(env_id)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*symmetric and normalized")  # Humanoid's torques are up to 0.4
        check_env(env)
    env.close()


def test_the_users_own_id(registered: Any) -> None:
    assert "Corridor-v0" in list_envs()["gymnasium"]
    env = make_env("Corridor-v0", length=7, max_episode_steps=2)
    assert env.reset(seed=0)[0].dtype == np.float32
    env.step(0)
    observation, reward, terminated, truncated, _ = env.step(0)
    assert observation.dtype == np.float32
    assert (reward, terminated, truncated) == (7, False, True)
    venv = make_vec("Corridor-v0", 2, env_kwargs={"length": 4})
    venv.reset()
    assert venv.step(np.zeros(2, dtype=int))[1].tolist() == [4, 4]


def test_an_id_with_its_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import gymnasium\ngymnasium.register('Elsewhere-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    (tmp_path / "elsewhere.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    make_env("elsewhere:Elsewhere-v0").close()
    del gym.registry["Elsewhere-v0"], sys.modules["elsewhere"]


def test_list_envs() -> None:
    suites = list_envs()
    assert list(suites)[:2] == ["mujoco", "dm_control"]
    assert {"HalfCheetah-v5", "HalfCheetah-v4"} <= set(suites["mujoco"])
    assert "Pusher-v4" not in suites["mujoco"]
    assert len(suites["dm_control"]) == 51
    assert "CartPole-v1" in suites["gymnasium"]
    ids = [env_id for names in suites.values() for env_id in names]
    assert len(ids) == len(set(ids))


def test_list_envs_without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("atari", "bullet", "clinical", "robosuite", "robotics", "registered"):
        monkeypatch.setattr(f"tether.envs.{module}.installed", lambda *names: False)
    monkeypatch.setattr("tether.envs.procgen.build", lambda: None)
    suites = list_envs()
    assert suites.pop("clinical") == ["tether/LinearPatient-v0"]  # which needs none
    assert set(suites) <= {"mujoco", "dm_control", "gymnasium", "point-robot", "safety", "tether"}


class WithoutQt(ModuleType):
    """EnvPool's module where Qt is missing: it can be imported, and asking for what it exports raises."""

    def __getattr__(self, name: str) -> Any:
        if name == "ProcgenEnvSpec":
            raise ImportError("libQt5Gui.so.5: cannot open shared object file")
        raise AttributeError(name)


def test_without_qt_there_is_no_procgen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, because test_procgen.py is skipped without Qt."""
    pytest.importorskip("envpool")
    monkeypatch.setitem(sys.modules, "envpool.procgen", WithoutQt("envpool.procgen"))
    monkeypatch.setattr("tether.envs.procgen.installed", lambda *names: names == ("envpool",))
    assert build.__wrapped__() is None


@pytest.mark.parametrize(
    ("env_id", "kwargs", "sentence"),
    [
        ("HalfCheeta-v5", {}, "There is no environment 'HalfCheeta-v5': did you mean 'HalfCheetah-v5'?"),
        ("HalfCheetah-v9", {}, "There is no environment 'HalfCheetah-v9': did you mean 'HalfCheetah-v5'?"),
        (
            "dm_control/cheetah-fly-v0",
            {},
            "There is no environment 'dm_control/cheetah-fly-v0': did you mean 'dm_control/cheetah-run-v0'?",
        ),
        ("?", {}, "There is no environment '?': list_envs() gives those that are known."),
        ("Pusher-v4", {}, "Pusher-v4 runs on MuJoCo 2 only: use Pusher-v5."),
        ("HalfCheetah-v2", {}, "HalfCheetah-v2 runs on MuJoCo 2 only: use HalfCheetah-v5."),
        ("nowhere:Thing-v0", {}, "nowhere:Thing-v0 needs the module 'nowhere': install it, or correct its name."),
        (
            "HalfCheetah-v5",
            {"nonsense": 1},
            "HalfCheetah-v5 has no argument 'nonsense': leave it out, or look for its right name.",
        ),
        (
            "HalfCheetah-v4",
            {"frame_skip": 1},
            "HalfCheetah-v4 has no argument 'frame_skip': leave it out, or look for its right name.",
        ),
        (
            "dm_control/cheetah-run-v0",
            {"camera": 1},
            "dm_control/cheetah-run-v0 has no argument 'camera': leave it out, or look for its right name.",
        ),
    ],
)
def test_refusals(env_id: str, kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EnvError) as error:
        make_env(env_id, **kwargs)
    assert str(error.value) == sentence


def test_an_error_of_the_environment_itself_passes(registered: Any) -> None:
    """Only the arguments' names are ours to judge."""
    with pytest.raises(TypeError):
        gym.make("Corridor-v0").unwrapped.reset(1)
    gym.register("Broken-v0", entry_point=lambda render_mode=None: len(5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="len"):
        make_env("Broken-v0")
    del gym.registry["Broken-v0"]


@pytest.mark.parametrize(
    ("env_id", "extra", "module"),
    [
        ("ALE/Pong-v5", "atari", "ale_py"),
        ("AdroitHandDoor-v1", "robotics", "gymnasium_robotics"),
        ("Meta-World/reach-v3", "envpool", "envpool"),
        ("cube-single-play-singletask-task1-v0", "ogbench", "ogbench"),
        ("Sepsis/ICU-Sepsis-v2", "clinical", "icu_sepsis"),
    ],
)
def test_a_missing_extra_is_named(env_id: str, extra: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.envs.suite.installed", lambda *names: module not in names)
    with pytest.raises(EnvError) as error:
        make_env(env_id)
    assert str(error.value) == f'{env_id} needs an extra: pip install "tether-rl[{extra}]".'


def test_box2d_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise gym.error.DependencyNotInstalled("Box2D is not installed, run `pip install gymnasium[box2d]`")

    monkeypatch.setattr("gymnasium.make", fail)
    with pytest.raises(EnvError, match=r"^LunarLander-v3 cannot be made: Box2D is not installed, run `pip .*`\.$"):
        make_env("LunarLander-v3")


class Plain(gym.Env):
    """A user's environment whose constructor knows no ``render_mode``."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self) -> None:
        self.steps = 0


def test_an_environment_without_a_render_mode_is_made():
    gym.register("Plain-v0", entry_point=Plain)
    assert make_env("Plain-v0").action_space == Plain.action_space
