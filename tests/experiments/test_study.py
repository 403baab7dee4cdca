"""Studies: which runs they make, how they export, continue and stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tether.envs.envpool_vec import available_cores
from tether.experiments import cli, study
from tether.experiments.errors import UsageError
from tether.experiments.presets import parse_assignments
from tether.experiments.runs import load_runs
from tether.experiments.study import Study

RUN = Path("CartPole-v1/MDPO/seed-0")
TINY: dict[str, Any] = {
    "agents": ["MDPO"],
    "envs": ["CartPole-v1"],
    "seeds": 1,
    "steps": 64,
    "n_envs": 1,
    "backend": "dummy",
    "eval_every": 64,
    "eval_episodes": 1,
    "hp": {"MDPO": {"n_steps": 64, "value_batch_size": 32, "policy_kwargs": {"net_arch": [8]}}},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a study called "tiny", with some keys changed."""

    def study_file(**changes: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**TINY, **changes}.items() if v is not None}))
        return path

    return study_file


@pytest.fixture
def start(tether, tmp_path: Path) -> Callable[..., Any]:
    """Run ``tether study`` on a file, with its folders below the test's."""

    def run(path: Path, *more: object) -> Any:
        return tether("study", path, "--out", tmp_path / "runs", "--measured", tmp_path / "measured", *more)

    return run


class InProcess:
    """A stand-in for ``subprocess.Popen`` that runs the command within the test, which is quicker."""

    commands: list[list[str]] = []  # noqa: RUF012

    def __init__(self, words: list[str], **_: Any) -> None:
        assert words[:3] == [sys.executable, "-m", "tether"]
        self.commands.append(words[3:])
        self.returncode = cli.main(words[3:])

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None:
        """It has ended already."""

    def wait(self) -> int:
        return self.returncode


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs of a study happen in this process; gives the list of their commands."""
    InProcess.commands = []
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=InProcess, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(study, "available_cores", lambda: 0)  # more runs than cores are pinned to none
    return InProcess.commands


class TestRead:
    def test_matrix(self, write, tmp_path: Path) -> None:
        path = write(agents=["mdpo", "PPO"], envs=["CartPole-v1", "dm_control/cheetah-run-v0"], seeds=[3, 5], hp=None)
        jobs = list(Study.read(path).jobs(tmp_path))
        assert [job.label for job in jobs] == [
            f"{agent} {env} seed {seed}"
            for seed in (3, 5)
            for env in ("CartPole-v1", "dm_control/cheetah-run-v0")
            for agent in ("MDPO", "PPO")
        ]
        assert jobs[2].exported(Path("m")) == Path("m/tiny/dm_control--cheetah-run-v0/MDPO/seed-3.csv")
        assert jobs[2].config.folder == tmp_path / "tiny/dm_control--cheetah-run-v0/MDPO/seed-3"

    def test_command_means_the_same_configuration(self, write, tmp_path: Path) -> None:
        policy_kwargs = {"net_arch": [8], "activation_fn": "ReLU"}
        hp = {"mdpo": {"learning_rate": "lin_3e-4", "policy_kwargs": policy_kwargs, "gamma": 1e-3}}
        (job,) = Study.read(write(hp=hp, eval_every=7, steps=500.0)).jobs(tmp_path / "with space")
        args = cli.build_parser().parse_args(job.command())
        assert (args.agent, args.env, args.steps, args.seed, args.n_envs) == ("MDPO", "CartPole-v1", 500, 0, 1)
        assert (args.backend, args.eval_every, args.eval_episodes) == ("dummy", 7, 1)
        assert args.out == tmp_path / "with space" / "tiny"
        assert parse_assignments(args.hp, "--hp") == hp["mdpo"] == job.config.hp

    @pytest.mark.parametrize("name", ["mdpo-mujoco", "mdpo-offpolicy"])
    def test_committed_studies(self, name: str, tmp_path: Path) -> None:
        committed = Study.read(Path(study.__file__).with_name("studies") / f"{name}.yaml")
        assert committed.name == name
        for job in committed.jobs(tmp_path):
            job.config.resolve()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"agnets": ["PPO"]}, "has an unknown key 'agnets'. Did you mean 'agents'?"),
            ({"step": 5}, "has an unknown key 'step'. Did you mean 'steps'?"),
            ({"agents": None}, "lacks 'agents'"),
            ({"envs": None}, "lacks 'envs'"),
            ({"seeds": None}, "lacks 'seeds'"),
            ({"steps": None}, "lacks 'steps'"),
            ({"agents": "PPO"}, "'agents' must be a list of agents, not 'PPO'"),
            ({"agents": []}, "'agents' must be a list of agents, not []"),
            ({"agents": ["PPA"]}, "There is no agent 'PPA'. Did you mean 'PPO'?"),
            ({"envs": [1]}, "'envs' must be a list of environment ids, not [1]"),
            ({"envs": ["CartPol-v1"]}, "There is no environment 'CartPol-v1': did you mean 'CartPole-v1'?"),
            ({"backend": "quantum"}, "There is no backend 'quantum'"),
            ({"seeds": 0}, "'seeds' must be the number of seeds or a list of seeds, not 0"),
            ({"seeds": [0, "one"]}, "'seeds' must be the number of seeds or a list of seeds"),
            ({"steps": "many"}, "'steps' must be a whole number above 0, not 'many'"),
            ({"steps": 0.5}, "'steps' must be a whole number above 0, not 0.5"),
            ({"steps": True}, "'steps' must be a whole number above 0, not True"),
            ({"hp": {"MDPO": 3}}, "'hp' must be a mapping of agents to mappings of arguments"),
            ({"hp": {"MDPO": {"n_step": 3}}}, "MDPO has no argument 'n_step'. Did you mean 'n_steps'?"),
            ({"hp": {"PPO": {"n_steps": 3}}}, "has 'hp' for PPO, which is not among its agents"),
        ],
    )
    def test_refusals(self, write, start, refused, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
        path = write(**changes)
        assert reason in refused("study", path, "--out", tmp_path / "runs", "--measured", tmp_path / "measured")
        assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [("agents: [PPO\nseeds: 1\n", "cannot be read in line 2"), ("- PPO\n", "must be a map"), ("", "must be a map")],
    )
    def test_damaged_files(self, tmp_path: Path, text: str, reason: str) -> None:
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(UsageError, match=rf"^The study \S+s\.yaml {reason}"):
            Study.read(tmp_path / "s.yaml")

    def test_ray_is_refused_in_words(self, write, refused) -> None:
        assert "The Ray engine is not part of this release: use --engine local" in refused("study", write(), "--engine", "ray")


class TestRun:
    def test_real_processes(self, write, start, tmp_path: Path, rows, in_process, monkeypatch: pytest.MonkeyPatch) -> None:
        """One run that works and one that cannot: the first is exported, the second reported, and only it is tried again."""
        path = write(agents=["MDPO", "SAC"])
        with monkeypatch.context() as patch:
            patch.setattr(study, "subprocess", subprocess)
            patch.setattr(study, "available_cores", available_cores)
            code, out, _ = start(path, "--jobs", 2)
        assert code == 1
        assert "study tiny: 2 runs, 0 done before" in out
        assert "finished  MDPO CartPole-v1 seed 0 in" in out
        log = tmp_path / "runs/tiny/CartPole-v1/SAC/seed-0/log.txt"
        assert f"FAILED    SAC CartPole-v1 seed 0 (exit code 2); its log: {log}" in out
        assert "tether: SAC cannot be built for CartPole-v1" in log.read_text()
        assert [p.name for p in log.parent.iterdir()] == ["log.txt"]
        assert "64 steps in" in (tmp_path / "runs" / "tiny" / RUN / "log.txt").read_text()

        exported = tmp_path / "measured/tiny" / RUN.with_suffix(".csv")
        assert exported.read_bytes() == (tmp_path / "runs" / "tiny" / RUN / "evaluations.csv").read_bytes()
        assert rows(exported)[-1]["timesteps"] == "64"
        manifest = json.loads(exported.with_suffix(".json").read_text())
        assert (manifest["study"], manifest["status"], manifest["agent"]) == ("tiny", "finished", "MDPO")
        assert manifest["command"].startswith("tether train MDPO --env CartPole-v1 --steps 64")
        (run,) = load_runs([tmp_path / "measured"])
        assert run.finished

        code, out, _ = start(path, "--jobs", 9)
        assert code == 1
        assert "study tiny: 2 runs, 1 done before" in out
        assert [words[1] for words in in_process] == ["SAC"]

    def test_again_does_nothing(self, write, start, in_process, tmp_path: Path) -> None:
        path = write(seeds=2)
        assert start(path, "--jobs", 9).code == 0
        assert len(in_process) == 2
        shutil.rmtree(tmp_path / "runs")  # as in a later clone, which has the exports alone
        code, out, _ = start(path, "--jobs", 9)
        assert code == 0
        assert out == "study tiny: 2 runs, 2 done before\n"
        assert len(in_process) == 2
        assert not (tmp_path / "runs").exists()

    def test_two_studies_of_one_agent(self, write, start, in_process) -> None:
        """Their runs lie apart: the second is not refused for what the first asked for."""
        assert start(write(), "--jobs", 9).code == 0
        assert start(write(name="other", eval_every=32), "--jobs", 9).code == 0
        assert len(in_process) == 2

    def test_each_run_is_exported_when_it_ends(self, write, start, in_process, tmp_path: Path, monkeypatch) -> None:
        """The second run is killed with the study; the first one's results are there."""
        exported = tmp_path / "measured/tiny" / RUN.with_suffix(".csv")

        def wait(_: float) -> None:
            if exported.is_file():
                raise KeyboardInterrupt

        monkeypatch.setattr(study.time, "sleep", wait)
        assert start(write(seeds=2), "--jobs", 1).code == 130
        assert exported.is_file()
        assert not exported.with_name("seed-1.csv").exists()

    def test_interrupted_run_continues(self, write, start, in_process, stop_at, tmp_path: Path, rows) -> None:
        path = write(steps=128)
        with stop_at(100):
            code, out, _ = start(path, "--jobs", 9)
        assert code == 1
        assert "FAILED    MDPO CartPole-v1 seed 0 (exit code 130)" in out
        assert not (tmp_path / "measured").exists()
        code, out, _ = start(path, "--jobs", 9)
        assert code == 0
        assert f"continuing {tmp_path / 'runs' / 'tiny' / RUN} at step 100 of 128" in out
        assert rows(tmp_path / "measured/tiny" / RUN.with_suffix(".csv"))[-1]["timesteps"] == "128"

    def test_finished_but_not_exported(self, write, start, in_process, tmp_path: Path) -> None:
        path = write()
        assert start(path, "--jobs", 9).code == 0
        shutil.rmtree(tmp_path / "measured")
        code, out, _ = start(path, "--jobs", 9)
        assert code == 0
        assert "is finished already (64 steps)" in out
        assert (tmp_path / "measured/tiny" / RUN.with_suffix(".csv")).is_file()

    def test_another_budget_under_the_same_name(self, write, start, refused, in_process, tmp_path: Path) -> None:
        assert start(write(), "--jobs", 9).code == 0
        sentence = refused("study", write(steps=128), "--out", tmp_path / "runs", "--measured", tmp_path / "measured")
        assert "seed-0.csv was run for 64 steps, the study now asks for 128" in sentence
        assert len(in_process) == 1


class TestInterrupt:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_children_are_stopped_and_waited_for(
        self, write, start, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
    ) -> None:
        """Children have a session of their own, so that Ctrl-C in the terminal reaches them through the study alone."""
        happened: list[str] = []

        class Child:
            returncode = None

            def __init__(self, words: list[str], *, start_new_session: bool, env: dict[str, str], **_: Any) -> None:
                assert start_new_session
                assert env["OMP_NUM_THREADS"] == "1"
                happened.append(f"start {words[words.index('--seed') + 1]}")

            def poll(self) -> None:
                if len(happened) == 2:
                    os.kill(os.getpid(), number)
                    time.sleep(1)

            def terminate(self) -> None:
                happened.append("terminate")

            def wait(self) -> None:
                happened.append("wait")

        monkeypatch.setattr(study, "subprocess", SimpleNamespace(Popen=Child, STDOUT=subprocess.STDOUT))
        code, out, _ = start(write(seeds=2), "--jobs", 9)
        assert code == 130
        assert happened == ["start 0", "start 1", "terminate", "terminate", "wait", "wait"]
        assert "stopping  2 runs, which save themselves" in out
