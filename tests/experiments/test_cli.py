"""The command line: what it lists, what it prints, and how it refuses: one sentence, exit code 2, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import tether as package
from tether.experiments.catalogue import AGENTS, OFFLINE, OURS
from tether.experiments.cli import main


class Stub(gym.Env):
    """Says 0 whatever is done."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, True, {}


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch):
    """Register an environment for one test."""

    def add(env_id: str, entry_point: Any = Stub) -> str:
        before = dict(gym.registry)
        gym.register(env_id, entry_point=entry_point)
        spec = gym.registry.pop(env_id)
        assert gym.registry == before
        monkeypatch.setitem(gym.registry, env_id, spec)
        return env_id

    return add


CARTPOLE = ["--env", "CartPole-v1"]


class TestRefusals:
    """Every refusal comes before anything is written."""

    @pytest.fixture
    def out(self, tmp_path: Path):
        yield tmp_path / "runs"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["PPP", *CARTPOLE], "There is no agent 'PPP'. Did you mean 'PPO'?"),
            (["mpdo", *CARTPOLE], "There is no agent 'mpdo'. Did you mean 'MDPO'?"),
            (["MDPO", "--env", "CartPol-v1"], "There is no environment 'CartPol-v1': did you mean 'CartPole-v1'?"),
            (["MDPO", "--env", "HalfCheeta-v5"], "There is no environment 'HalfCheeta-v5': did you mean 'HalfCheetah-v5'?"),
            (["MDPO", *CARTPOLE, "--hp", "n_step=8"], "MDPO has no argument 'n_step'. Did you mean 'n_steps'?"),
            (["MDPO", *CARTPOLE, "--hp", "n_steps=some"], "MDPO's argument 'n_steps' must be a whole number, not 'some'."),
            (["MDPO", *CARTPOLE, "--hp", "n_steps"], "--hp takes key=value, not 'n_steps'."),
            (["MDPO", *CARTPOLE, "--hp", "tsallis_q=3"], "MDPO cannot be built for CartPole-v1: tsallis_q must lie in [1, 2]"),
            (["MDPO", *CARTPOLE, "--hp", "policy_kwargs.net_arc=[8]"], "MDPO cannot be built for CartPole-v1: TypeError"),
            (["MDPO", *CARTPOLE, "--hp", "policy_kwargs.activation_fn=Relu"], "names a class of torch.nn such as ReLU"),
            (["MDPO", *CARTPOLE, "--hp", "policy=CnnPolicy"], "MDPO cannot be built for CartPole-v1"),
            (["PPO", *CARTPOLE, "--hp", "noise_std=0.1"], "PPO cannot be built for CartPole-v1"),
            (["MDPO", *CARTPOLE, "--device", "abacus"], "MDPO cannot be built for CartPole-v1: RuntimeError"),
            (["SAC", *CARTPOLE], "SAC cannot be built for CartPole-v1"),
            (["TD3", *CARTPOLE], "TD3 cannot be built for CartPole-v1"),
            (["DQN", "--env", "Pendulum-v1"], "DQN cannot be built for Pendulum-v1"),
            (["MDPO", *CARTPOLE, "--n-envs", "0"], "--n-envs must be 1 or more, not 0."),
            (["MDPO", *CARTPOLE, "--n-envs", "two"], "argument --n-envs: invalid int value: 'two'"),
            (["MDPO", *CARTPOLE, "--steps", "0"], "argument --steps: '0' is not a whole number above 0"),
            (["MDPO", *CARTPOLE, "--steps", "1.5"], "argument --steps: '1.5' is not a whole number above 0"),
            (["MDPO", *CARTPOLE, "--steps", "inf"], "argument --steps: 'inf' is not a whole number above 0"),
            (["MDPO", *CARTPOLE, "--steps", "many"], "argument --steps: 'many' is not a number"),
            (["MDPO", *CARTPOLE, "--hp", "steps=0"], "--steps must be 1 or more, not 0."),
            (["MDPO", *CARTPOLE, "--eval-every", "-5"], "argument --eval-every: '-5' is not a whole number above 0"),
            (["MDPO", *CARTPOLE, "--eval-episodes", "0"], "argument --eval-episodes: '0' is not a whole number above 0"),
            (["MDPO", *CARTPOLE, "--checkpoint-every", "0"], "--checkpoint-every is in seconds and above 0, not 0.0."),
            (["MDPO", *CARTPOLE, "--backend", "quantum"], "There is no backend 'quantum'"),
            (["MDPO", *CARTPOLE, "--env-kwargs", "colour=1"], "CartPole-v1 has no argument 'colour'"),
            (["MDPO", "--env", "no_such_module:Env-v0"], "no_such_module:Env-v0 needs the module 'no_such_module'"),
            (["MDPO"], "the following arguments are required: --env"),
            (["MDPO", *CARTPOLE, "--sede", "1"], "unrecognized arguments: --sede 1"),
        ],
    )  # fmt: skip
    def test_train(self, refused, out: Path, words: list[str], reason: str) -> None:
        assert reason in refused("train", *words, "--out", out)

    def test_missing_extra(self, refused, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "Box2D", None)
        sentence = refused("train", "MDPO", "--env", "LunarLander-v3", "--out", out)
        assert "LunarLander-v3 cannot be made: Box2D is not installed" in sentence

    def test_environment_whose_module_is_missing(self, refused, out: Path, register) -> None:
        env_id = register("CliTest/Gone-v0", "gone_for_ever:Env")
        sentence = refused("train", "MDPO", "--env", env_id, "--out", out)
        assert f"{env_id} needs the module 'gone_for_ever'" in sentence

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ([], "the following arguments are required: COMMAND"),
            (["trian"], "invalid choice: 'trian'"),
            (["list", "worlds"], "invalid choice: 'worlds'"),
            (["report", "no/such/folder"], "no/such/folder holds no run"),
            (["study", "no/such/study.yaml"], "The study no/such/study.yaml cannot be read"),
            (["evaluate", "no/such/run"], "There is no model at no/such/run"),
        ],
    )
    def test_other_commands(self, refused, words: list[str], reason: str) -> None:
        assert reason in refused(*words)

    def test_what_the_system_refuses(self, refused, finished, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        assert "File exists" in refused("report", finished[0], "--out", tmp_path / "file")
        assert (tmp_path / "file").read_text() == "in the way"


class TestPrints:
    def test_agents(self, tether) -> None:
        code, out, _ = tether("list", "agents")
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == list(AGENTS)
        kinds = dict(line.split()[:2] for line in out.splitlines())
        assert {name for name, kind in kinds.items() if kind in ("Tether", "offline")} == set(OURS)
        assert {name for name, kind in kinds.items() if kind == "offline"} == set(OFFLINE)

    def test_presets(self, tether) -> None:
        code, out, _ = tether("list", "presets")
        assert code == 0
        shown = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
        assert list(shown) == list(AGENTS)
        assert "mujoco" in shown["PPO"]
        assert shown["TQC"] == "the class defaults"

    def test_envs(self, tether, register) -> None:
        env_id = register("CliTest/Listed-v0")
        code, out, _ = tether("list", "envs")
        assert code == 0
        lines = out.splitlines()
        assert {"mujoco:", "  HalfCheetah-v5", "  HalfCheetah-v4", "  CartPole-v1", f"  {env_id}"} <= set(lines)
        assert "  dm_control/cheetah-run-v0" in lines

    @pytest.mark.parametrize(("words", "shown"), [(["--version"], package.__version__), (["train", "--help"], "--eval-every")])
    def test_help_and_version(self, capsys: pytest.CaptureFixture[str], words: list[str], shown: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        assert shown in capsys.readouterr().out

    def test_agent_in_any_case(self, tether, short_run, stop_at, tmp_path: Path) -> None:
        words = short_run("MDPO", "CartPole-v1", tmp_path)
        words[1] = "mdpo"
        with stop_at(1):
            assert tether(*words).code == 130
        assert (tmp_path / "CartPole-v1/MDPO/seed-0/manifest.json").is_file()

    def test_older_versions_are_asked_for_by_name(self, refused, register, tmp_path: Path) -> None:
        """Gymnasium's remark that there is a newer version of the environment is not printed."""
        old, _ = register("CliTest/Aged-v0"), register("CliTest/Aged-v1")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            gym.make(old)
            assert ["out of date" in str(w.message) for w in seen] == [True]
            assert "SAC cannot be built" in refused("train", "SAC", "--env", old, "--out", tmp_path)
        assert len([w for w in seen if "out of date" in str(w.message)]) == 1

    def test_interrupt_anywhere(self, tether, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("tether.experiments.presets.read_presets", interrupt)
        assert tether("list", "presets") == (130, "", "")

    def test_mistakes_of_ours_are_not_hidden(self, tether, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr("tether.experiments.presets.read_presets", fail)
        with pytest.raises(ValueError, match="a bug"):
            tether("list", "presets")

    def test_one_line_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        """What other packages print at their import does not come between."""
        words = ["train", "MDPO", "--env", "HalfCheeta-v5", "--out", str(tmp_path / "runs")]
        done = subprocess.run([sys.executable, "-m", "tether", *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr == "tether: There is no environment 'HalfCheeta-v5': did you mean 'HalfCheetah-v5'?\n"
        assert done.stdout == ""
        assert list(tmp_path.iterdir()) == []

    def test_module(self) -> None:
        """``python -m tether`` is the same command, and light: listing agents imports neither torch nor an agent."""
        code = "import sys; from tether.experiments.cli import main; main(['list', 'agents']); print('torch' in sys.modules)"
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert shown.splitlines()[-1] == "False"
        listed = subprocess.run([sys.executable, "-m", "tether", "list", "agents"], capture_output=True, text=True, check=True)
        assert listed.stdout.splitlines() == shown.splitlines()[:-1]
